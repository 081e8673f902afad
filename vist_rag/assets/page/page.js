"use strict";
// Whatever comes from an index is put in with textContent or as an attribute, never as HTML.

const NUMBERS = ["k_memory", "k_raw", "latents", "tokens"];
const LOOKED = {
  copied: "Attention here is where each word of the answer was copied from.",
  attended: "Attention here is the self-attention of the generator's last layers, the mean over their heads.",
  unknown: "This generator does not tell what its answer looked at.",
};

const $ = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children); // strings become text
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const percent = (share) => (share > 0 && share < 0.005 ? "under 1 %" : `${Math.round(100 * share)} %`);
const ms = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));
const counted = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

// ---------------------------------------------------------------------------------------------------------- answers

function showSaid(target, answer, instead) {
  target.textContent = answer || instead;
  target.classList.toggle("none", !answer);
}

function showCosts(memory, raw) {
  const missing = "–";
  const rows = [
    ["Passages, tokens", memory.passage_tokens, raw ? raw.passage_tokens : missing],
    ["Whole prompt, tokens", memory.prompt_tokens, raw ? raw.prompt_tokens : missing],
    ["Answer, tokens", memory.completion_tokens, raw ? raw.completion_tokens : missing],
    ["Search, ms", ms(memory.timings_ms.search), "the same"],
    ["Memories, ms", ms(memory.timings_ms.memory), raw ? "none" : missing],
    ["Generate, ms", ms(memory.timings_ms.generate), raw ? ms(raw.timings_ms.generate) : missing],
  ];
  $("costs").replaceChildren(
    ...rows.map(([name, ...values]) =>
      element("tr", {}, element("th", { scope: "row" }, name), ...values.map((value) => element("td", {}, String(value)))),
    ),
  );
}

// --------------------------------------------------------------------------------------------------------- passages

/** The text in pieces: the citation is marked, the words that were looked at most are underlined. */
function cited(passage) {
  const seen = passage.words
    .filter((word) => word.share >= 0.05)
    .map((word) => [word.start - passage.text_start, word.end - passage.text_start])
    .filter(([start]) => start >= 0);
  // Places are counted in code points, as Python counts them; strings here are of UTF-16 units.
  const letters = Array.from(passage.text);
  const spans = passage.span ? [passage.span] : [];
  const inside = (ranges, place) => ranges.some(([start, end]) => start <= place && place < end);
  const cuts = [...new Set([0, letters.length, ...spans.flat(), ...seen.flat()])].sort((a, b) => a - b);
  const text = element("p", { class: "text" });
  let mark = null;
  for (let i = 0; i + 1 < cuts.length; i += 1) {
    let piece = letters.slice(cuts[i], cuts[i + 1]).join("");
    if (inside(seen, cuts[i])) piece = element("span", { class: "seen" }, piece);
    if (!inside(spans, cuts[i])) {
      mark = null;
      text.append(piece);
      continue;
    }
    if (mark === null) text.append((mark = element("mark")));
    mark.append(piece);
  }
  return text;
}

function lookedAt(passage) {
  const words = passage.words.filter((word) => word.share >= 0.005);
  return words.map((word) => `${word.text} (${percent(word.share)})`).join(", ");
}

function sheet(passage, page, number, strongest) {
  const name = passage.title || passage.source || "this passage";
  const words = lookedAt(passage);
  const which = passage.pages.length > 1 ? `Page ${number} of ${passage.pages.length}` : "The page";
  const alt = `${which} of ${name}, as the model sees it. ${words ? `The answer looked most at: ${words}.` : ""}`;
  const picture = element("img", {
    src: `data:image/png;base64,${page.png}`,
    alt,
    width: page.width,
    height: page.height,
  });
  const heat = drawn("svg", { viewBox: `0 0 ${page.width} ${page.height}`, "aria-hidden": "true" });
  page.attention.forEach((share, i) => {
    const strength = strongest > 0 ? share / strongest : 0;
    if (strength < 0.02) return;
    const [x, y, width, height] = page.boxes[i];
    heat.append(drawn("rect", { x, y, width, height, "fill-opacity": (0.15 + 0.7 * Math.sqrt(strength)).toFixed(3) }));
  });
  const told = heat.childElementCount ? ": the stronger the colour, the more the answer looked there" : "";
  const caption = `${which} as the model sees it${told}.`;
  return element("figure", {}, element("div", { class: "sheet" }, picture, heat), element("figcaption", {}, caption));
}

function shown(passage, looked, guarded, strongest) {
  const name = passage.title || passage.source || passage.id;
  const memory = passage.mode === "memory";
  const facts = [
    memory
      ? `Read as memory: ${counted(passage.tokens, "position")} in place of ${counted(passage.raw_tokens, "token")}`
      : `Read as text: ${counted(passage.tokens, "token")}`,
    `score ${passage.score.toFixed(2)}`,
  ];
  if (looked !== "unknown") facts.push(`${percent(passage.share)} of the answer's attention`);
  if (passage.source && passage.source !== name) facts.push(passage.source);
  const item = element("li", {}, element("h3", {}, name), element("p", { class: "facts" }, `${facts.join(" · ")}.`));
  if (guarded) item.append(element("p", { class: "facts" }, `Guard: ${guarded}.`));
  item.append(cited(passage));
  const words = lookedAt(passage);
  if (words) item.append(element("p", { class: "facts" }, `Looked at most: ${words}.`));
  passage.pages.forEach((page, i) => item.append(sheet(passage, page, i + 1, strongest)));
  return item;
}

function show(found) {
  $("asked").textContent = `Question: ${found.question}`;
  showSaid($("from-memory"), found.memory.answer, "No answer.");
  showSaid($("from-raw"), found.raw && found.raw.answer, found.raw ? "No answer." : found.raw_error);
  showCosts(found.memory, found.raw);
  const elsewhere = found.looked !== "unknown" ? ` ${percent(found.elsewhere)} of it went elsewhere than to the passages.` : "";
  $("looked").textContent = LOOKED[found.looked] + elsewhere;
  // One scale for all passages, so that the one that was looked at stands out.
  const strongest = Math.max(0, ...found.passages.flatMap(({ pages }) => pages.flatMap((page) => page.attention)));
  $("passages").replaceChildren(
    ...found.passages.map((passage) => shown(passage, found.looked, found.memory.guarded[passage.id], strongest)),
  );
  $("result").hidden = false;
}

// ----------------------------------------------------------------------------------------------------------- asking

function fail(message) {
  $("status").textContent = "";
  $("error").textContent = message;
  $("error").hidden = false;
}

/** What a refusal says, whoever it comes from. */
async function refusal(response) {
  if (response.status === 401) {
    $("options").open = true;
    $("key").focus();
    return "The server wants its API key: enter it under “Budget and key”, and ask again.";
  }
  const said = await response.json().catch(() => ({}));
  if (said.error && said.error.message) return said.error.message;
  if (Array.isArray(said.detail) && said.detail.length) return `${said.detail[0].loc.at(-1)}: ${said.detail[0].msg}.`;
  return `The server answered with status ${response.status}; its log says why.`;
}

async function ask(event) {
  event.preventDefault();
  const button = $("send");
  if (button.getAttribute("aria-disabled") === "true") return;
  const question = $("question").value.trim();
  if (!question) {
    fail("question must hold something, got nothing; ask something.");
    return;
  }
  const budget = {};
  for (const name of NUMBERS) if ($(name).value !== "") budget[name] = Number($(name).value);
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  button.setAttribute("aria-disabled", "true"); // not disabled: it would lose the focus
  button.textContent = "Asking…";
  $("error").hidden = true;
  $("status").textContent = "Answering…";
  try {
    const body = JSON.stringify({ question, budget });
    const response = await fetch("inspect", { method: "POST", headers, body });
    if (!response.ok) throw new Error(await refusal(response));
    const found = await response.json();
    show(found);
    $("status").textContent = `Answered from memory: ${found.memory.answer || "nothing"}.`;
  } catch (error) {
    // What fetch throws where nobody answers is a TypeError, in words that differ from browser to browser.
    fail(error instanceof TypeError ? "The server cannot be reached; see that it still runs, and ask again." : error.message);
  } finally {
    button.removeAttribute("aria-disabled");
    button.textContent = "Ask";
  }
}

const given = $("inspection");
if (given === null) {
  $("ask").addEventListener("submit", ask);
  $("question").focus();
} else {
  $("ask").hidden = true;
  $("status").hidden = true;
  show(JSON.parse(given.textContent));
}
