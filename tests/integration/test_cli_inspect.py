"""``vist-rag inspect``: the library's inspection, in words, as JSON and as one file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import failure, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.inspection import whole_page

TEXTS = ("The old bridge was built in 1867.", "</script><b>The river</b> runs to the sea.")
QUESTION = "When was the old bridge built?"


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    directory = tmp_path_factory.mktemp("inspect")
    model = save_tiny_checkpoint(directory / "tiny")
    rows = [{"id": f"p{i}", "title": f"Title {i}", "text": text} for i, text in enumerate(TEXTS)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_json("index", directory / "rows.jsonl", "--index", directory / "index", "--model", model)
    return "inspect", QUESTION, "--index", directory / "index", "--model", model


def test_it_says_what_ask_says_and_what_was_looked_at(asked: tuple[object, ...]) -> None:
    pytest.importorskip("PIL")
    shown, answered = run_json(*asked, "--k-raw", 1), run_json("ask", *asked[1:], "--k-raw", 1)
    assert shown["memory"]["answer"] == answered["answer"]
    assert [p["id"] for p in shown["passages"]] == [c["id"] for c in answered["citations"]]
    assert [p["mode"] for p in shown["passages"]] == ["raw", "memory"]
    assert shown["memory"]["passage_tokens"] == answered["usage"]["compressed_tokens"]
    assert shown["raw"]["passage_tokens"] == answered["usage"]["origin_tokens"]
    assert sum(p["share"] for p in shown["passages"]) + shown["elsewhere"] == pytest.approx(1, abs=2e-3)


def test_the_screen_and_the_file(asked: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    result = run(*asked, "-o", tmp_path / "seen.html")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"\[1\] Title 0 \(read as memory, \d+% of the answer's attention\)", result.stdout)
    assert f"written: {tmp_path / 'seen.html'}" in result.stdout
    document = (tmp_path / "seen.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", document)  # nothing is fetched
    assert document.count("</script>") == 2  # that of a passage is none
    data = re.search(r'<script type="application/json" id="inspection">(.*?)</script>', document)
    assert data is not None
    texts = [passage["text"] for passage in json.loads(data[1])["passages"]]
    assert sorted(texts) == sorted(TEXTS)


def test_a_page_is_let_in_by_its_hash_alone() -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', whole_page({}))
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-o", "seen.png"], "--output must end in .html, got seen.png"),
        (["--k-memory", 3], "top_k must be in 1..2 (passages in this index), got 3"),
        (["-o", "nowhere/seen.html"], "nowhere/seen.html: No such file or directory"),
    ],
)
def test_bad_input_is_told(asked: tuple[object, ...], arguments: list[object], told: str) -> None:
    assert told in failure(*asked, *arguments)
