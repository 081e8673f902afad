"""The page, in a real Chromium: by mouse, by keyboard, on a narrow screen, and for who does not see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import WordEmbedder
from vist_rag.budget import Budget
from vist_rag.checkpoint import SETTINGS_FILE, embedded_checkpoint
from vist_rag.inspection import inspect_answer, whole_page
from vist_rag.pipeline import VistRAG
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a Chromium at {CHROMIUM}"),
    pytest.mark.skipif(
        not (embedded_checkpoint() / SETTINGS_FILE).is_file(), reason="this checkout has no embedded model"
    ),
]
Page = Any

QUESTION, ANSWER = "Who designed the stone bridge of Ferrow?", "Martin Hall"
HOSTILE = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'> & </script> 😀 Sheep graze here."
PASSAGES = [
    Passage(
        f"The town of Ferrow lies in a narrow valley 😀. Its stone bridge was designed by {ANSWER}, who had studied "
        "in Uppsala, and it was opened to carts in the spring of that year.",
        title="Ferrow bridge",
        source="notes/ferrow.txt",
    ),
    Passage(HOSTILE, title="<b>Ferrow market</b>"),
]
PATIENCE_MS = 60_000


class Server:
    """The server in a thread, with a key or without."""

    def __init__(self, rag: VistRAG, key: str | None = None) -> None:
        from vist_rag.serving import create_app

        self.server = uvicorn.Server(uvicorn.Config(create_app(rag, api_key=key), port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VistRAG]:
    with PassageIndex.open(tmp_path_factory.mktemp("page"), embedder=WordEmbedder()) as index:
        index.add(PASSAGES)
        # Without the guard, which reads what holds an emoji as text.
        yield VistRAG.from_pretrained(None, index, budget=Budget(k_memory=2), device="cpu", guard="off")


@pytest.fixture(scope="module")
def server(rag: VistRAG) -> Iterator[Server]:
    running = Server(rag)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    """A fresh page that may say nothing on its console, and may ask nobody but the server."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    yield page
    # Chromium itself writes a line for a refusal that a test provokes.
    assert not [text for text in said if "status of 40" not in text and "ERR_FAILED" not in text]
    assert all(url.startswith((server.url, "data:")) for url in asked)
    context.close()


def answered(page: Page) -> None:
    page.get_by_role("status").get_by_text("Answered from memory").wait_for()


def ask(page: Page, question: str = QUESTION) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    answered(page)


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2 A and AA."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
    found = axe.run(page, options={"runOnly": {"type": "tag", "values": tags}}).response
    assert found["passes"]
    return [f"{rule['id']}: {node['html']}" for rule in found["violations"] for node in rule["nodes"]]


def test_a_question_is_typed_and_its_answer_is_seen(page: Page, rag: VistRAG) -> None:
    ask(page)
    expected = rag.answer(QUESTION)
    assert page.locator("#from-memory").text_content() == expected.text == ANSWER
    assert page.locator("#from-raw").text_content()
    marked = page.locator("#passages li").first.locator("mark")
    assert marked.all_text_contents() == [ANSWER]  # behind a letter of two UTF-16 units
    costs = page.locator("#costs tr").first.locator("td").all_text_contents()
    assert costs == [str(expected.usage.compressed_tokens), str(expected.usage.origin_tokens)]
    picture = page.get_by_role("img").first
    told = str(picture.get_attribute("alt"))
    assert told.startswith("The page of Ferrow bridge, as the model sees it. The answer looked most at: ")
    assert all(word in told for word in ANSWER.split())
    assert picture.evaluate("image => image.complete && image.naturalWidth === 690")
    heated = page.locator("#passages li").first.locator("rect")
    assert heated.count() > 0
    # What stands in a passage is text.
    second = page.locator("#passages li").nth(1)
    assert HOSTILE in str(second.locator(".text").text_content())
    assert second.locator("rect").count() < heated.count()  # one scale for all passages
    assert second.locator("h3").text_content() == "<b>Ferrow market</b>"
    assert page.evaluate("window.broken") is None
    assert page.locator("#passages script, #passages img[src=x]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    assert violations(page) == []
    page.get_by_text("Budget and key").click()
    ask(page)
    assert violations(page) == []
    page.get_by_label("Passages read as memory").fill("9")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("alert").wait_for()
    assert violations(page) == []


def test_a_keyboard_is_enough(page: Page) -> None:
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # opens the options
    for text in ("1", "0", "8"):
        page.keyboard.press("Tab")
        page.keyboard.type(text)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.activeElement.id") == "latents"  # the focus stays where it was
    facts = page.locator("#passages .facts").all_text_contents()
    assert page.locator("#passages li").count() == 1
    assert any(fact.startswith("Read as memory: 8 positions in place of") for fact in facts)


def test_a_narrow_screen_is_not_scrolled_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.get_by_text("Budget and key").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for box in (one.bounding_box() for one in page.get_by_role("img").all()):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_while_an_answer_is_made_nothing_more_is_asked(page: Page) -> None:
    held: list[Any] = []
    page.route("**/inspect", lambda route: held.append(route))
    page.get_by_label("Question").fill(QUESTION)
    button = page.locator("#send")
    button.click()
    page.get_by_role("status").get_by_text("Answering").wait_for()
    assert button.get_attribute("aria-disabled") == "true"
    button.click(force=True)
    page.keyboard.press("Enter")
    assert len(held) == 1
    held[0].continue_()
    answered(page)
    assert button.get_attribute("aria-disabled") is None
    assert page.evaluate("document.activeElement.id") == "send"


def test_what_is_wrong_is_told_with_its_remedy(page: Page) -> None:
    page.get_by_label("Question").fill("   ")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("alert").get_by_text("ask something").wait_for()
    page.get_by_text("Budget and key").click()
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_label("Passages read as memory").fill("9")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("alert").get_by_text("top_k must be in 1..2 (passages in this index), got 9").wait_for()
    page.route("**/inspect", lambda route: route.abort())
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
    page.unroute("**/inspect")
    page.get_by_label("Passages read as memory").fill("1")
    ask(page)
    assert page.get_by_role("alert").count() == 0  # an error that is mended goes


def test_a_key_is_asked_for_and_not_kept(browser: Any, rag: VistRAG) -> None:
    server, context = Server(rag, key="wren"), browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(server.url)  # the page itself needs none
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("alert").get_by_text("wants its API key").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wren")
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.reload()
    assert page.locator("#key").input_value() == ""
    context.close()
    server.stop()


def test_one_file_shows_the_same_without_a_server(browser: Any, rag: VistRAG, tmp_path: Path) -> None:
    (tmp_path / "inspect.html").write_text(whole_page(inspect_answer(rag, QUESTION).to_dict()), encoding="utf-8")
    context = browser.new_context(offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "inspect.html").as_uri())
    assert page.locator("#from-memory").text_content() == ANSWER
    assert page.locator("mark").all_text_contents() == [ANSWER]
    assert HOSTILE in page.locator("#passages").text_content()
    assert page.evaluate("window.broken") is None
    assert not page.locator("#ask").is_visible()
    assert (
        page.evaluate("getComputedStyle(document.querySelector('mark')).borderRadius") != "0px"
    )  # the style is let in
    assert violations(page) == []
    assert said == []
    assert [url.partition(":")[0] for url in asked] == ["file", *["data"] * (len(asked) - 1)]
    context.close()
