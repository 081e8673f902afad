"""``vist-rag ask``: the library's answer, how it looks, and what is told of bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import failure, not_writable, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.budget import POLICIES
from vist_rag.cli.answers import answer_json, best_citation, cited_sentence
from vist_rag.pipeline import VistRAG
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Answer, Citation, Passage, Usage

TEXTS = (
    "The old bridge was built in 1867.",
    "The river runs from a lake to the sea.",
    "Marie Curie was born in Warsaw.",
    "The harbour bell is rung at noon.",
)
QUESTION = "When was the old bridge built?"


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    directory = tmp_path_factory.mktemp("ask")
    rows = [{"id": f"p{i}", "title": f"Title {i}", "text": text} for i, text in enumerate(TEXTS)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_json("index", directory / "rows.jsonl", "--index", directory / "index", "--model", tiny)
    return directory / "index"


def test_it_gives_the_answer_of_the_library(tiny: Path, index: Path) -> None:
    shown = run_json("ask", QUESTION, "--index", index, "--model", tiny)
    with PassageIndex.open(index) as opened:
        expected = answer_json(VistRAG.from_pretrained(tiny, opened).answer(QUESTION))
    for document in (shown, expected):
        assert set(document.pop("timings_ms")) == {"search", "memory", "generate", "total"}
    assert shown == json.loads(json.dumps(expected))
    assert shown["answer"]
    assert shown["citations"][0]["id"] == "p0"
    assert [c["mode"] for c in shown["citations"]] == ["memory", "memory"]  # the checkpoint's own budget


def test_how_passages_are_read_is_a_choice(tiny: Path, index: Path) -> None:
    shown = run_json("ask", QUESTION, "--index", index, "--model", tiny, "--k-raw", 1, "--k-memory", 2)
    assert [c["mode"] for c in shown["citations"]] == ["raw", "memory", "memory"]
    full, coarse = (
        run_json("ask", QUESTION, "--index", index, "--model", tiny, "--latents", n)["usage"] for n in (16, 2)
    )
    assert coarse["compressed_tokens"] < full["compressed_tokens"]
    assert coarse["origin_tokens"] == full["origin_tokens"]
    assert full["budget"] is None
    tight = run_json("ask", QUESTION, "--index", index, "--model", tiny, "--budget", 7)["usage"]
    assert (tight["compressed_tokens"], tight["budget"]) == (7, 7)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_is_met_as_tokens_and_as_a_rate(tiny: Path, index: Path, policy: str) -> None:
    asked = ("ask", QUESTION, "--index", index, "--model", tiny, "--k-memory", 3, "--policy", policy)
    usage = run_json(*asked, "--rate", 0.25)["usage"]
    assert usage["budget"] == usage["compressed_tokens"]
    assert run_json(*asked, "--budget", usage["budget"])["usage"] == usage
    taken = f"{usage['compressed_tokens']} of {usage['budget']} allowed as they were read"
    assert taken in run(*asked, "--rate", 0.25).stdout


def test_an_index_with_less_than_the_usual_number_of_passages_is_read_whole(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    run_json("index", tmp_path / "a.txt", "--index", tmp_path / "index", "--model", tiny)
    for asked, mode in (((), "memory"), (("--k-raw", 1), "raw"), (("--k-memory", 1), "memory")):
        shown = run_json("ask", QUESTION, "--index", tmp_path / "index", "--model", tiny, *asked)
        assert [c["mode"] for c in shown["citations"]] == [mode]


def test_the_screen_shows_answer_sources_and_cost(tiny: Path, index: Path) -> None:
    shown = run_json("ask", QUESTION, "--index", index, "--model", tiny)
    result = run("ask", QUESTION, "--index", index, "--model", tiny)
    assert result.stdout.splitlines()[0] == shown["answer"]
    assert "[1] Title 0 (read as memory, score" in result.stdout
    usage = shown["usage"]
    assert f"{usage['origin_tokens']} tokens as text, {usage['compressed_tokens']} as they were read" in result.stdout
    assert result.stderr == ""


def test_a_stream_says_the_same(tiny: Path, index: Path) -> None:
    whole = run("ask", QUESTION, "--index", index, "--model", tiny)
    streamed = run("ask", QUESTION, "--index", index, "--model", tiny, "--stream")
    assert streamed.exit_code == 0
    assert streamed.stdout.splitlines()[:-1] == whole.stdout.splitlines()[:-1]  # the last line tells the time


def test_a_memory_of_another_compressor_is_made_anew_and_it_is_said(index: Path, tmp_path: Path) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    result = run("ask", QUESTION, "--index", index, "--model", other)
    assert result.exit_code == 0
    assert "4 memories of another compressor" in result.stderr
    with PassageIndex.open(index, read_only=True) as opened:
        assert sorted(opened.fingerprints().values()) == [2, 4]  # the two that were read are kept


def test_a_read_only_index_is_read(tiny: Path, index: Path) -> None:
    for path in (tiny, *tiny.rglob("*")):  # who may not write the index may still read the checkpoint
        path.chmod(0o755)
    with not_writable(index):
        shown = run_json("ask", QUESTION, "--index", index, "--model", tiny)
    assert shown["citations"][0]["id"] == "p0"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x" * 100_000], "up to 20,000 characters, got 100,000"),
        (["why " * 4000], "must fit 512 positions"),
        ([" "], "question is empty"),
        ([QUESTION, "--budget", 9, "--rate", 0.5], "tokens and rate exclude each other, got 9 and 0.5"),
        ([QUESTION, "--rate", 4], "rate must be in (0, 1]"),
        ([QUESTION, "--budget", 9, "--policy", "best"], "policy must be one of fixed, by_rank, by_score, got 'best'"),
        ([QUESTION, "--policy", "by_rank"], "--policy must have a limit to divide, got none; give --budget or --rate"),
        ([QUESTION, "--k-memory", 5], "top_k must be in 1..4 (passages in this index), got 5"),
        ([QUESTION, "--k-raw", 4, "--k-memory", 1], "top_k must be in 1..4 (passages in this index), got 5"),
        ([QUESTION, "--k-raw", -1], "k_raw must be 0 or more"),
        ([QUESTION, "--k-raw", 0, "--k-memory", 0], "nothing would be read"),
        ([QUESTION, "--latents", 0], "latents must be 1 or more"),
        ([QUESTION, "--budget", 1], "raise the budget"),
        ([QUESTION, "--stream", "--json"], "--stream and --json"),
    ],
)
def test_bad_input_is_told(tiny: Path, index: Path, arguments: list[object], told: str) -> None:
    assert told in failure("ask", *arguments, "--index", index, "--model", tiny)


def test_an_index_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "does not exist" in failure("ask", QUESTION, "--index", tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "does not exist" in failure("ask", QUESTION, "--index", tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_index_without_passages(tiny: Path, tmp_path: Path) -> None:
    PassageIndex.open(tmp_path / "index").close()
    assert "index is empty" in failure("ask", QUESTION, "--index", tmp_path / "index", "--model", tiny)


def test_a_damaged_index_is_told(tiny: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "passages.sqlite").write_bytes((index / "passages.sqlite").read_bytes()[:5000])
    assert "damaged" in failure("ask", QUESTION, "--index", tmp_path, "--model", tiny)


# ------------------------------------------------------------------------------------------------------ what is cited


def _citation(text: str, quote: str | None) -> Citation:
    start = text.index(quote) if quote else 0
    return Citation(Passage(text, title="T"), 0.5, "memory", (start, start + len(quote)) if quote else None)


@pytest.mark.parametrize(
    ("text", "quote", "sentence"),
    [
        ("It is old. It was built in 1867 by hand. It stands.", "1867", "It was built in 1867 by hand."),
        ("Built in\n1867 by \x1b[2Jhand.", "1867", "Built in 1867 by  [2Jhand."),
        ("One ends. Two begins here. Three.", "ends. Two", "One ends. Two begins here."),
        ("No full stop 1867", "1867", "No full stop 1867"),
    ],
)
def test_the_sentence_of_the_answer_is_shown_with_the_answer_highlighted(text: str, quote: str, sentence: str) -> None:
    shown = cited_sentence(_citation(text, quote))
    assert shown.plain == sentence
    (highlight,) = shown.spans
    assert shown.plain[highlight.start : highlight.end] == quote


def test_the_best_citation_is_the_first_that_holds_the_answer() -> None:
    citations = (_citation("Nothing.", None), _citation("Here it is.", "it"), _citation("And it.", "it"))
    answer = Answer("?", "it", citations, Usage(1, 1, 1, 1), {"total": 1.0})
    assert best_citation(answer) is citations[1]
    assert cited_sentence(citations[0]).plain == ""
