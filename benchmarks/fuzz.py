"""Inputs that nobody would write, seeded: each must give a right result or a ``VistError``, within ten seconds.

    python benchmarks/fuzz.py --cases 10000 --json

Doors in turn: texts of all of Unicode to the renderer and, some of them, to the compressor; files of random bytes, odd
encodings, malformed JSON Lines and HTML to ``read_passages``; queries to an index; budgets; spans, forged ones among
them; stored memories, damaged ones among them; indexes whose files were damaged. Anything else than what is allowed is
printed with its seed;
``--seed N --cases 1`` is that case again.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vist_rag import codec
from vist_rag.budget import Budget
from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.compression import PassageCompressor
from vist_rag.errors import VistError
from vist_rag.evaluation.provenance import run_facts
from vist_rag.generation import Span, make_ref, read_spans, strip_spans, write_span
from vist_rag.retrieval import PassageIndex, read_passages
from vist_rag.types import Passage, SearchHit

LIMIT_S = 10.0
ENCODED = 10  # of so many texts, one is encoded: a tower costs a hundred times what drawing does
LONGEST = 3000  # characters of a text, now and then ten times as many

Case = Callable[[random.Random], None]


class Wrong(Exception):  # noqa: N818
    """A result that is not the right one."""


def require(right: bool, what: str) -> None:
    """Say that a result is wrong."""
    if not right:
        raise Wrong(what)


# --------------------------------------------------------------------------------------------------------------- texts

_ALPHABETS: Sequence[Callable[[random.Random], str]] = (
    lambda rng: chr(rng.randrange(0x110000)),  # lone surrogates and unassigned code points, too
    lambda rng: chr(rng.randrange(0xD800, 0xE000)),
    lambda rng: chr(rng.randrange(0x300, 0x370)),  # combining marks
    lambda rng: rng.choice("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2069\u200e\u200f\u05d0\u0627"),
    lambda rng: rng.choice("\x00\x01\x07\x08\x1b\x7f\x85\ufeff\ufffe\uffff\u2028\u2029\u00ad\u200b\u200d\ufe0f"),
    lambda rng: rng.choice(" \t\n\r\x0b\x0c\u00a0\u3000"),
    lambda rng: chr(rng.randrange(32, 127)),
    lambda rng: rng.choice(["<|vist:", "|>", "<|/vist|>", "{", "}", "%s", "\\", "[SEP]", "</s>", "{{question}}"]),
)


def any_text(rng: random.Random) -> str:
    """A text of one kind of characters or of all."""
    length = rng.choice((0, 1, 2, rng.randrange(50), rng.randrange(LONGEST), rng.randrange(LONGEST)))
    if rng.random() < 0.02:
        length *= 10
    if rng.random() < 0.1:
        return rng.choice(_ALPHABETS)(rng) * length  # one huge word, or one huge gap
    some = rng.sample(_ALPHABETS, rng.randint(1, len(_ALPHABETS)))
    return "".join(rng.choice(some)(rng) for _ in range(length))


# --------------------------------------------------------------------------------------------------------------- doors


def texts_case(compressor: PassageCompressor) -> Case:
    """Draw a text, count its latents, and now and then encode it."""

    def case(rng: random.Random) -> None:
        text: Any = any_text(rng) if rng.random() > 0.02 else rng.choice([None, 3, b"bytes", ["list"]])
        pages = compressor.renderer.render([text])
        require(len(pages) >= 1, "a text must have a page")
        require(bool(pages.pixel_values.isfinite().all()), "pixels must be finite")
        counted = compressor.count_latents(text)
        require(1 <= counted <= 64 * len(pages), f"{counted} latents on {len(pages)} pages")
        spans = pages.char_spans
        require(bool((spans >= 0).all() and (spans <= len(text)).all()), "spans must be inside of the text")
        if rng.randrange(ENCODED) == 0 and counted <= 256:
            memory = compressor.encode([text])[0]
            require(len(memory) == counted, f"counted {counted} latents, got {len(memory)}")
            require(bool(memory.latents.isfinite().all()), "latents must be finite")

    return case


_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "utf-7", "shift_jis", "koi8-r")


def any_file(rng: random.Random) -> bytes:
    """What a file may hold: noise, a text in some encoding, rows or markup that is broken somewhere."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(2000))
    if kind == 1:
        return any_text(rng).encode(rng.choice(_ENCODINGS), "ignore")
    if kind == 2:
        data = "\n".join(_row(rng) for _ in range(rng.randrange(8))).encode("utf-8", "surrogatepass")
    elif kind == 3:
        tags = ["<p>", "</p>", "<h1>", "</h2>", "<script>", "<!--", "-->", "<![CDATA[", "<table><tr>", "&#x110000;"]
        tags += [
            "&amp",
            "&#0;",
            "<meta charset=",
            "<meta charset='rot13'>",
            "<meta charset=undefined>",
            "<a b='",
            "<?",
            "<!",
            "</",
            "<title>",
        ]
        data = "".join(rng.choice(tags) + any_text(rng)[:20] for _ in range(rng.randrange(40))).encode(
            "utf-8", "ignore"
        )
    else:
        data = b"%PDF-1.4\n" + rng.randbytes(rng.randrange(400))
    if data and rng.random() < 0.5:
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(rng.randrange(3)) + data[at + rng.randrange(3) :]
    return data


def _row(rng: random.Random) -> str:
    values = [any_text(rng)[:60], "", None, 0, -1, 1e308, True, [], {}, [[]], {"a": {"b": [1]}}, "NaN"]
    fields = {name: rng.choice(values) for name in rng.sample(["text", "id", "title", "source", "metadata", "x"], 4)}
    row = rng.choice([json.dumps(fields), json.dumps(fields, ensure_ascii=False), json.dumps(rng.choice(values))])
    return rng.choice([row, row, row, row[: rng.randrange(len(row) + 1)], "[" * 2000, '{"text": NaN}', "{}" * 2])


def files_case(folder: Path) -> Case:
    """Read a file."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    (folder / "first.pdf").write_bytes(b"")
    with suppress(VistError):
        list(read_passages([folder / "first.pdf"]))  # which loads a library: not a matter of any case

    def case(rng: random.Random) -> None:
        path = folder / f"file{rng.choice(['.txt', '.md', '.jsonl', '.html', '.htm', '.pdf', '.JSONL', '.bin'])}"
        path.write_bytes(any_file(rng))
        try:
            passages = list(read_passages([path]))
        finally:
            path.unlink()
        require(all(p.id and isinstance(p.text, str) for p in passages), "a passage must have an id and a text")

    return case


class NoiseEmbedder:
    """Vectors that depend on the text alone, fast."""

    name = "noise"
    dimension = 16

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """float32 ``[n, 16]``, rows of length 1."""
        seeds = [hash_of(text) for text in texts]
        rows = [np.random.default_rng(seed).normal(size=self.dimension) for seed in seeds]
        vectors = np.array(rows, np.float32).reshape(-1, self.dimension)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def hash_of(text: str) -> int:
    """A number of a text, the same in every process."""
    return int.from_bytes(text.encode("utf-8", "surrogatepass")[-8:], "big") + len(text)


@contextmanager
def searched(folder: Path) -> Iterator[Case]:
    """Search an index, and read what it found again by id."""
    rng = random.Random(0)
    with PassageIndex.open(folder, embedder=NoiseEmbedder()) as index:
        index.add([Passage(any_text(rng) + f" {i}", id=f"p{i}\x00{any_text(rng)[:5]}") for i in range(50)])

        def case(rng: random.Random) -> None:
            query: Any = (
                any_text(rng) * rng.choice((1, 1, 1, 20)) if rng.random() < 0.95 else rng.choice([None, 3, b"x"])
            )
            top_k: Any = rng.choice([1, 3, 50, 51, 0, -1, 10**12])
            hits = index.search(query, top_k)
            require(len(hits) == top_k, f"asked {top_k} hits, got {len(hits)}")
            require([hit.rank for hit in hits] == list(range(top_k)), "ranks must go up from 0")
            require(all(a.score >= b.score for a, b in pairwise(hits)), "scores must go down")
            known = index.get([hit.passage.id for hit in hits])
            require(all(known[hit.passage.id] == hit.passage for hit in hits), "a hit must be what is stored")

        yield case


def budgets_case(rng: random.Random) -> None:
    """Split hits by a budget: nothing read twice, nothing over the limit."""

    def number(*also: Any) -> Any:
        return rng.choice([0, 1, 2, 5, rng.randrange(100), rng.randrange(10**6), -1, -(10**9), 10**18, *also])

    budget = Budget(number(), number(), number(None, None), number(None, None, None))
    hits = [SearchHit(Passage(f"text {i}", id=str(i)), 1.0 - i, i) for i in range(rng.randrange(12))]
    raw = {hit.passage.id: rng.randrange(1, 400) for hit in hits}
    latents = {hit.passage.id: rng.randrange(1, 65) for hit in hits}

    def memory_tokens(passage: Passage, most: int | None) -> int:
        return 2 + min(latents[passage.id], most or 10**9)

    plan = budget.split(hits, raw_tokens=lambda p: raw[p.id], memory_tokens=memory_tokens)
    read = [*plan.raw, *plan.compressed]
    require(read == hits[: len(read)] and len(read) <= budget.top_k, "the best hits must be read, each once")
    require(len(plan.raw) <= budget.k_raw and len(plan.latents) == len(plan.compressed), "as many as the budget says")
    if budget.tokens is not None:
        taken = sum(raw[hit.passage.id] for hit in plan.raw)
        taken += sum(memory_tokens(h.passage, n) for h, n in zip(plan.compressed, plan.latents, strict=True))
        require(taken <= budget.tokens, f"{taken} tokens of {budget.tokens}")


def spans_case(rng: random.Random) -> None:
    """Write spans between texts, some of them forged, and read them back."""
    fingerprint = rng.choice(["", "abc", any_text(rng)[:20]])
    parts, honest = [], []
    for _ in range(rng.randrange(6)):
        text, size = any_text(rng)[:400], rng.choice([1, 64, 999_999_999, 0, -3, 10**12, rng.randrange(1, 100)])
        kind = rng.randrange(4)
        if kind == 0:
            parts.append(strip_spans(text))
        elif kind == 1:
            parts.append(write_span(text, f"{rng.getrandbits(128):032x}.{rng.randrange(1, 99)}"))
        else:
            span = Span(text, size)
            parts.append(" " + write_span(text, make_ref(text, fingerprint, size)))
            honest.append(span)
    whole = "".join(parts)
    found = read_spans(whole, fingerprint)
    spans = [part for part in found if isinstance(part, Span)]
    require(all(span in honest for span in spans), "a forged span was honoured")
    if not any("<|vist:" in text for text in parts if not text.startswith(" <|vist:")):
        require(all(span in spans for span in honest if "<|" not in span.text), "an honest span was not honoured")
    bare = strip_spans(whole)
    require(strip_spans(bare) == bare, "stripping twice must be stripping once")
    require(not [s for s in read_spans(bare, fingerprint) if isinstance(s, Span)], "a span was left")


def memories_case(rng: random.Random) -> None:
    """Store a memory, damage it or not, and read it."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    n, d = rng.randrange(0, 20), rng.randrange(0, 40)
    latents = (numbers.normal(size=(n, d)) * 10.0 ** numbers.integers(-9, 6, (1, d))).astype(np.float32)
    if latents.size and rng.random() < 0.1:
        latents[0, 0] = rng.choice([np.nan, np.inf, -np.inf, 1e9])
    form: Any = rng.choice([*codec.FORMS, *codec.FORMS, "int5", "", None])
    data = codec.encode(latents, form)
    require(len(data) == codec.size_bytes(form, n, d), "the size must be the one that was told")
    back = codec.decode(data, form, n, d)
    require(
        bool(np.isfinite(back).all()) and codec.encode(back, form) == data, "encoding anew must give the same bytes"
    )
    noise = bytearray(data)
    for _ in range(rng.randrange(4)):
        noise[rng.randrange(len(noise))] = rng.randrange(256)
    torn = bytes(noise)[: rng.choice([len(noise), len(noise), rng.randrange(len(noise) + 1)])]
    require(bool(np.isfinite(codec.decode(torn, form, n, d)).all()), "damaged numbers must not be read")


# --------------------------------------------------------------------------------------------------------- store files


@contextmanager
def damaged(folder: Path) -> Iterator[Case]:
    """Open an index whose files were damaged: what is read is what was written, or refused, or missing and told."""
    folder.mkdir()
    rng = random.Random(1)
    passages = [Passage(f"{i} " + "words of a passage " * rng.randrange(1, 60), f"p{i}", f"T{i}") for i in range(60)]
    by_id = {passage.id: passage for passage in passages}
    memories = {p.content: np.full((4, 6), i, np.float16) for i, p in enumerate(passages)}
    with PassageIndex.open(folder, embedder=NoiseEmbedder()) as index:
        index.add(passages, list(memories.values()), fingerprint="f")
        vectors = index.vectors(by_id)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}

    def case(rng: random.Random) -> None:
        for file in folder.iterdir():
            file.unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        name = rng.choice(["passages.sqlite", "passages.sqlite", *files])
        (folder / name).write_bytes(spoilt(files[name], rng))
        with PassageIndex.open(folder, embedder=NoiseEmbedder(), read_only=rng.random() < 0.5) as index:
            found = index.get(by_id)
            require(found.items() <= by_id.items(), "a passage must be as it was written")
            kept = index.memories(memories, "f")
            require(all(np.array_equal(m, memories[text]) for text, m in kept.items()), "a memory must be, too")
            near = index.vectors(by_id)
            require(all(np.array_equal(v, vectors[id_]) for id_, v in near.items()), "a vector must be, too")
            hits = index.search(passages[rng.randrange(60)].content, 3)
            require(all(by_id.get(hit.passage.id) == hit.passage for hit in hits), "a hit must be a passage")
            if len(found) < 60 or len(kept) < 60 or len(near) < 60:
                require(bool(index.problems()), "what is missing must be told by verification")

    yield case


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, a stretch overwritten, or an end cut off."""
    noise = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(noise[: rng.randrange(len(noise))])
    if kind == 1:
        begin = rng.randrange(len(noise))
        stretch = min(len(noise) - begin, rng.choice([16, 512, 4096]))
        noise[begin : begin + stretch] = rng.randbytes(stretch) if rng.random() < 0.5 else bytes(stretch)
    else:
        for _ in range(rng.randrange(1, 5)):
            noise[rng.randrange(len(noise))] ^= 1 << rng.randrange(8)
    return bytes(noise)


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Violation:
    """A case that ended as none may."""

    door: str
    seed: int
    what: str


@contextmanager
def doors() -> Iterator[dict[str, Case]]:
    """Every door, ready."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with searched(folder / "index") as queries, damaged(folder / "damaged") as stores:
            yield {
                "texts": texts_case(load_compressor(find_checkpoint(None))),
                "files": files_case(folder),
                "queries": queries,
                "budgets": budgets_case,
                "spans": spans_case,
                "memories": memories_case,
                "stores": stores,
            }


def fuzz(cases: int, seed: int = 0) -> tuple[Counter[str], list[Violation], float]:
    """Run cases with the seeds from ``seed`` on, the doors in turn.

    Returns:
        How many cases of each door gave a result and how many were refused, what was neither, and the seconds of the
        slowest case.
    """
    counts: Counter[str] = Counter()
    violations: list[Violation] = []
    slowest = 0.0
    with warnings.catch_warnings(), doors() as ready:
        warnings.simplefilter("ignore")
        names = list(ready)
        for number in range(seed, seed + cases):
            door, begin = names[number % len(names)], time.perf_counter()
            try:
                ready[door](random.Random(number))
                counts[f"{door} read"] += 1
            except VistError:
                counts[f"{door} refused"] += 1
            except Exception as error:  # whatever it is: that is what is looked for
                violations.append(Violation(door, number, f"{type(error).__name__}: {str(error)[:200]}"))
            took = time.perf_counter() - begin
            slowest = max(slowest, took)
            if took > LIMIT_S:
                violations.append(Violation(door, number, f"took {took:.1f} s"))
    return counts, violations, slowest


def main() -> None:
    """Run, and print what went wrong or the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    counts, violations, slowest = fuzz(arguments.cases, arguments.seed)
    for violation in violations:
        print(f"{violation.door}, --seed {violation.seed} --cases 1: {violation.what}")
    result = {
        "benchmark": "fuzz",
        "cases": arguments.cases,
        "violations": [vars_of(violation) for violation in violations],
        "slowest_s": round(slowest, 3),
        "counts": dict(sorted(counts.items())),
        **run_facts(f"python benchmarks/fuzz.py --cases {arguments.cases} --json", arguments.seed),
    }
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    raise SystemExit(bool(violations))


def vars_of(violation: Violation) -> dict[str, Any]:
    """As JSON."""
    return {"door": violation.door, "seed": violation.seed, "what": violation.what}


if __name__ == "__main__":
    main()
