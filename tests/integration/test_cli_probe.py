"""``vist-rag probe``: a checkpoint is measured, and is guarded from then on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import failure, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.checkpoint import load_compressor
from vist_rag.fidelity import Fidelity

TEXT = "The river runs from a lake to the sea, and the old bridge was built in 1867. "
ROWS = ("The old bridge was built in 1867.", "The river runs from a lake to the sea.")


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "model")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(20)))
    return path


def test_a_checkpoint_is_measured_and_guarded_from_then_on(tmp_path: Path, tiny: Path, texts: Path) -> None:
    told = run_json("probe", tiny, "--data", texts, "--texts", 10, "--steps", 3)
    assert told["path"] == str(tiny / "compressor" / "fidelity.json")
    assert told["recipe"] == {"seed": 0, "texts": 10, "steps": 3}
    measured = Fidelity.load(tiny / "compressor", load_compressor(tiny, device="cpu").fingerprint)
    assert measured is not None
    assert measured.probe["word 3-4"].n > 20
    assert measured.speller is not None  # of the tiny fusion, which was never trained: all is lost

    index = tmp_path / "index"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(ROWS)))
    run_json("index", rows, "--index", index, "--model", tiny)
    asked = ("ask", "When was the old bridge built?", "--index", index, "--model", tiny)
    shown = run_json(*asked)
    assert [c["mode"] for c in shown["citations"]] == ["raw", "raw"]
    assert set(shown["usage"]["guarded"]) == {"p0", "p1"}
    off = run_json(*asked, "--guard", "off")
    assert [c["mode"] for c in off["citations"]] == ["memory", "memory"]
    assert off["usage"]["guarded"] == {}
    reason = shown["usage"]["guarded"]["p1"]
    least = str(off["usage"]["compressed_tokens"])
    for guard, line in (
        ("on", f"guard: {reason}, but its text did not fit"),
        ("strict", f"left out: p1: {reason}; its text did not fit"),
    ):
        assert line in run(*asked, "--guard", guard, "--budget", least).stdout
    assert f"guard: {reason}\n" in run(*asked).stdout


def test_a_folder_of_texts_is_read(tmp_path: Path, tiny: Path, texts: Path) -> None:
    (tmp_path / "folder").mkdir()
    texts.rename(tmp_path / "folder" / "texts.jsonl")
    result = run("probe", tiny, "--data", tmp_path / "folder", "--texts", 6, "--steps", 2)
    assert result.exit_code == 0
    assert "word 3-4" in result.stdout
    assert "fidelity.json" in result.stdout


def test_what_is_wrong_is_one_line(tmp_path: Path, tiny: Path, texts: Path) -> None:
    assert "CHECKPOINT must be the directory" in failure("probe", tmp_path / "none", "--data", texts)
    assert "which is not there" in failure("probe", tiny, "--data", tmp_path / "none.jsonl")
    assert "--steps must be 2 or more, got 1" in failure("probe", tiny, "--data", texts, "--steps", 1)
    index = tmp_path / "index"
    (tmp_path / "a.txt").write_text(TEXT)
    run_json("index", tmp_path / "a.txt", "--index", index, "--model", tiny)
    asked = ("ask", "When?", "--index", index, "--model", tiny)
    assert "guard must be one of off, on, strict, got 'perhaps'" in failure(*asked, "--guard", "perhaps")
    assert "vist-rag probe" in failure(*asked, "--guard", "strict")
