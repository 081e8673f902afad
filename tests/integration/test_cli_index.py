"""``vist-rag index``: what is stored, what is passed over, what is told, and what an interruption keeps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT, failure, not_writable, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint, tiny_compressor
from vist_rag.errors import StoreError
from vist_rag.retrieval import PassageIndex, PassageStore


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("The old bridge was built in 1867.")
    (docs / "b.md").write_text("# Lake\n\nThe river runs from a lake to the sea.")
    rows = [{"id": str(i), "title": f"Row {i}", "text": f"This is the row with the number {i}."} for i in range(3)]
    (docs / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return docs


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "index"


def _memories(index: Path) -> dict[str, int]:
    with PassageIndex.open(index, read_only=True) as opened:
        return opened.fingerprints()


def test_every_passage_is_stored_with_the_memory_that_the_compressor_makes(tiny: Path, docs: Path, index: Path) -> None:
    report = run_json("index", docs, "--index", index, "--model", tiny)
    assert report["passages"] == {"read": 5, "added": 5, "unchanged": 0, "in_index": 5}
    assert report["memories"]["made"] == 5
    fingerprint = report["memories"]["fingerprint"]
    with PassageIndex.open(index, read_only=True) as opened:
        passages = {p.title: p for p in opened.passages()}
        assert set(passages) == {"a", "Lake", "Row 0", "Row 1", "Row 2"}
        stored = opened.memories([p.content for p in passages.values()], fingerprint)
    compressor = tiny_compressor()
    for passage in passages.values():
        (memory,) = compressor.encode([passage.content])
        assert stored[passage.content].shape == memory.latents.shape
        assert abs(stored[passage.content] - memory.latents.numpy()).max() < 0.05  # stored in bf16, kept in float16


def test_what_is_stored_is_passed_over(tiny: Path, docs: Path, index: Path) -> None:
    run_json("index", docs, "--index", index, "--model", tiny)
    (docs / "a.txt").write_text("The new bridge was built in 1990.")
    report = run_json("index", docs, "--index", index, "--model", tiny)
    assert report["passages"] == {"read": 5, "added": 1, "unchanged": 4, "in_index": 6}
    assert (report["memories"]["made"], report["memories"]["kept"]) == (1, 4)


def test_a_changed_text_under_the_same_id_is_compressed_anew(tiny: Path, docs: Path, index: Path) -> None:
    run_json("index", docs, "--index", index, "--model", tiny)
    (docs / "c.jsonl").write_text('{"id": "1", "text": "Another text."}\n')
    report = run_json("index", docs / "c.jsonl", "--index", index, "--model", tiny)
    assert report["passages"] == {"read": 1, "added": 1, "unchanged": 0, "in_index": 5}
    with PassageIndex.open(index, read_only=True) as opened:
        stored = opened.memories(["Another text."], report["memories"]["fingerprint"])["Another text."]
    (memory,) = tiny_compressor().encode(["Another text."])
    assert stored.shape == memory.latents.shape
    assert abs(stored - memory.latents.numpy()).max() < 0.05


def test_no_memory_stores_none_and_needs_no_checkpoint(docs: Path, index: Path) -> None:
    report = run_json("index", docs, "--index", index, "--no-memory", "--model", "nobody/nothing")
    assert report["passages"]["added"] == 5
    assert report["memories"]["fingerprint"] is None
    assert _memories(index) == {}


def test_passages_that_were_indexed_without_memory_get_theirs(tiny: Path, docs: Path, index: Path) -> None:
    run_json("index", docs, "--index", index, "--no-memory")
    report = run_json("index", docs / "a.txt", "--index", index, "--model", tiny)
    assert report["memories"]["made"] == 5
    assert _memories(index) == {report["memories"]["fingerprint"]: 5}


def test_memories_of_another_compressor_are_made_anew_and_it_is_said(
    tiny: Path, other: Path, docs: Path, index: Path
) -> None:
    first = run_json("index", docs, "--index", index, "--model", tiny)["memories"]["fingerprint"]
    result = run("index", docs, "--index", index, "--model", other)
    assert result.exit_code == 0
    assert f"5 memories of another compressor ({first[:12]})" in result.stderr
    memories = _memories(index)
    assert memories.pop(first) == 5
    assert list(memories.values()) == [5]
    assert "another compressor" not in run("index", docs, "--index", index, "--model", tiny).stderr


def test_the_words_of_a_passage_are_a_choice(docs: Path, index: Path) -> None:
    (docs / "long.txt").write_text("".join(f"Sentence {i} has four words more. " for i in range(10)))
    few = run_json("index", docs / "long.txt", "--index", index, "--no-memory", "--words", 20)["passages"]["read"]
    assert few == 4  # three sentences of six words each
    assert "words" in failure("index", docs, "--index", index, "--words", 3)


def test_a_screen_report_counts_what_was_left_out(tiny: Path, docs: Path, index: Path) -> None:
    (docs / "photo.png").write_bytes(b"\x89PNG\0")
    (docs / "binary.txt").write_bytes(b"a\0b")
    (docs / "chinese.txt").write_text("上海是中国的城市。", "utf-8")
    result = run("index", docs, "--index", index, "--model", tiny)
    assert result.exit_code == 0
    assert "6 passages; 6 new or changed" in result.stdout
    assert "skipped for their extension: 1 file" in result.stdout
    assert "photo.png" in result.stdout
    assert "left out, cannot be read: 1 file" in result.stdout
    assert "no glyphs for over 2 % of the characters: 1 passage" in result.stdout
    assert "binary.txt is a binary file" in result.stderr


def test_json_names_what_was_left_out(tiny: Path, docs: Path, index: Path) -> None:
    (docs / "photo.png").write_bytes(b"\x89PNG\0")
    (docs / "binary.txt").write_bytes(b"a\0b")
    (docs / "chinese.jsonl").write_text('{"id": "shanghai", "text": "上海是中国的城市。"}\n', "utf-8")
    report = run_json("index", docs, "--index", index, "--model", tiny)
    assert report["files"]["skipped"] == [str(docs / "photo.png")]
    assert [line.split(" ")[0] for line in report["files"]["left_out"]] == [str(docs / "binary.txt")]
    assert list(report["low_coverage"]) == ["shanghai"]
    assert report["low_coverage"]["shanghai"] < 0.5


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--index", "i", "--engine", "spark"), "--engine must be local or ray, got 'spark'"),
        (("--index", "i", "--workers", 2, "--parquet", "p"), "--workers, --parquet must come with --engine ray"),
        (("--parquet", "p"), "--parquet must come with --engine ray"),
        ((), "--index must be given (with --engine ray, --parquet will do), got neither"),
        (("--engine", "ray"), "--index must be given (with --engine ray, --parquet will do), got neither"),
        (("--parquet", "p", "--verify"), "stand alone"),
    ],
)
def test_options_that_do_not_go_together(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure("index", docs, *arguments)
    assert not Path("i").exists()


def test_without_ray_its_extra_is_named(docs: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = failure("index", docs, "--index", index, "--engine", "ray")
    assert "The engine ray needs ray, which is not installed; pip install 'vist-rag[ray]'" in line
    assert not index.exists()


def _files(directory: Path) -> dict[str, tuple[str, bytes]]:
    directory.mkdir()
    given = {
        "binary": ("binary.txt", b"a\0b"),
        "not utf-8": ("latin.txt", "Zoë".encode("latin-1")),
        "empty": ("empty.txt", b" \n"),
        "no json": ("bad.jsonl", b"{"),
        "no text": ("none.jsonl", b'{"title": "x"}'),
        "unknown kind": ("photo.png", b"\x89PNG"),
        "no pdf": ("torn.pdf", b"%PDF-1.4 torn"),
    }
    for name, content in given.values():
        (directory / name).write_bytes(content)
    return given


@pytest.mark.parametrize("what", ["binary", "not utf-8", "empty", "no json", "no text", "unknown kind", "no pdf"])
def test_a_named_file_that_cannot_be_read_stops_everything_before_anything_is_stored(
    docs: Path, index: Path, tmp_path: Path, what: str
) -> None:
    if what == "no pdf":
        pytest.importorskip("pypdf")
    name, _ = _files(tmp_path / "bad")[what]
    line = failure("index", tmp_path / "bad" / name, "--index", index, "--no-memory")
    assert name in line or "corpus is empty" in line
    if what != "empty":  # beside files with text, an empty one is no mistake
        failure("index", docs, tmp_path / "bad" / name, "--index", index, "--no-memory")
    assert not index.exists()


def test_a_path_that_does_not_exist(index: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in failure("index", tmp_path / "nowhere", "--index", index)
    assert not index.exists()


def test_a_directory_without_text_is_an_empty_corpus(index: Path, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    assert "corpus is empty" in failure("index", tmp_path / "void", "--index", index)
    (tmp_path / "void" / "binary.txt").write_bytes(b"a\0b")
    assert "binary.txt is a binary file" in failure("index", tmp_path / "void", "--index", index)


def test_an_existing_file_is_no_index(docs: Path) -> None:
    line = failure("index", docs, "--index", docs / "a.txt", "--no-memory")
    assert str(docs / "a.txt") in line
    assert (docs / "a.txt").read_text() == "The old bridge was built in 1867."


def test_a_directory_that_cannot_be_written(docs: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    with not_writable(tmp_path / "full"):
        assert "cannot be written" in failure("index", docs, "--index", tmp_path / "full", "--no-memory")
        assert "cannot be made" in failure("index", docs, "--index", tmp_path / "full" / "new", "--no-memory")


def test_an_index_that_cannot_be_written_keeps_what_it_has(docs: Path, index: Path) -> None:
    run_json("index", docs / "a.txt", "--index", index, "--no-memory")
    with not_writable(index):
        assert "read-only" in failure("index", docs, "--index", index, "--no-memory")
    with PassageIndex.open(index, read_only=True) as opened:
        assert len(opened) == 1


def test_a_bad_checkpoint_makes_no_index(docs: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    failure("index", docs, "--index", index, "--model", tmp_path / "model")
    assert not index.exists()


def test_a_file_of_another_program_in_the_place_of_the_store_is_not_touched(docs: Path, index: Path) -> None:
    index.mkdir()
    (index / "passages.sqlite").write_bytes(b"something else entirely" * 50)
    assert "passages.sqlite" in failure("index", docs, "--index", index, "--no-memory")
    assert (index / "passages.sqlite").read_bytes() == b"something else entirely" * 50


# ------------------------------------------------------------------------------------------------------- interruption


def _count(store: Path) -> int:
    try:
        with PassageStore(store, read_only=True) as opened:
            return len(opened)
    except StoreError:  # not made yet
        return 0


def test_ctrl_c_keeps_what_was_stored_and_a_repetition_goes_on(tiny: Path, tmp_path: Path, index: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    passages = [{"id": str(i), "text": f"Row number {i}."} for i in range(64 * 8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in passages))
    arguments = ["index", str(rows), "--index", str(index), "--model", str(tiny), "--json"]
    command = [sys.executable, "-m", "tests.support.cli", *arguments]  # a batch takes it a while
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Who runs the tests in the background has SIGINT ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240
        while _count(index / "passages.sqlite") < 64 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, stderr
    assert stdout == ""
    with PassageIndex.open(index, read_only=True) as opened:
        kept = len(opened)
        assert opened.fingerprints() == {tiny_fingerprint(tiny): kept}
    assert 64 <= kept < len(passages)
    assert f"interrupted: {kept:,} of 512 passages are kept in {index}" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr

    report: dict[str, Any] = run_json(*arguments[:-1])
    assert report["passages"] == {"read": 512, "added": 512 - kept, "unchanged": kept, "in_index": 512}
    assert (report["memories"]["made"], report["memories"]["kept"]) == (512 - kept, kept)


def tiny_fingerprint(checkpoint: Path) -> str:
    from vist_rag.checkpoint import load_compressor

    return load_compressor(checkpoint).fingerprint
