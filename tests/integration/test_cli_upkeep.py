"""``vist-rag index --verify --stats --rebuild --compact`` and ``vist-rag reindex``."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.cli import ROOT, failure, not_writable, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return save_tiny_checkpoint(first), save_tiny_checkpoint(second, seed=1)


@pytest.fixture
def index(tmp_path: Path, checkpoints: tuple[Path, Path]) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": str(i), "text": f"Row number {i}. " * 20}) + "\n" for i in range(30)))
    run_json("index", rows, "--index", tmp_path / "index", "--model", checkpoints[0])
    return tmp_path / "index"


def damage(index: Path, statement: str) -> None:
    with closing(sqlite3.connect(index / "passages.sqlite")) as raw:
        raw.execute(statement)
        raw.commit()


# ------------------------------------------------------------------------------------------------------------- verify


def test_a_sound_index_verifies(index: Path) -> None:
    assert run_json("index", "--verify", "--index", index) == {"index": str(index), "passages": 30, "problems": []}
    result = run("index", "--verify", "--index", index)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "30 passages, everything is as it was written" in result.stdout


def test_damage_is_named_with_exit_code_1_and_derived_things_are_mended(
    index: Path, checkpoints: tuple[Path, Path]
) -> None:
    damage(index, "UPDATE memories SET latents = zeroblob(length(latents)) WHERE rowid IN (1, 2)")
    result = run("index", "--verify", "--index", index)
    assert result.exit_code == 1
    assert result.stdout.count("is not as it was written") == 2
    assert "2 problems" in result.stderr
    assert run_json("index", "--rebuild", "--index", index)["damaged_memories_removed"] == 2
    assert run("index", "--verify", "--index", index).exit_code == 0
    assert run_json("reindex", "--index", index, "--model", checkpoints[0])["made"] == 2


def test_an_index_that_cannot_even_be_opened_is_a_problem(index: Path) -> None:
    damage(index, "CREATE TABLE mine (x)")
    result = run("index", "--verify", "--index", index, "--json")
    assert result.exit_code == 1
    assert "has other tables" in json.loads(result.stdout)["problems"][0]
    assert "does not exist" in failure("index", "--verify", "--index", index / "nowhere")


# ------------------------------------------------------------------------------------------- stats, rebuild, compact


def test_stats_count_rows_and_bytes(index: Path) -> None:
    stats = run_json("index", "--stats", "--index", index)
    assert stats["passages"] == 30
    assert stats["bytes"]["vectors"] == 30 * 256 * 4
    assert stats["bytes"]["store"] == (index / "passages.sqlite").stat().st_size
    assert stats["bytes"]["faiss"] == (index / "passages.faiss").stat().st_size
    (memories,) = stats["memories"]
    assert (memories["memories"], memories["form"]) == (30, "float16")
    assert stats["bytes"]["memories"] == memories["bytes"] == memories["latents"] * 16 * 2
    shown = run("index", "--stats", "--index", index).stdout
    assert "30 passages" in shown
    assert "30 as float16" in shown


def test_a_lost_cache_is_rebuilt(index: Path) -> None:
    before = (index / "passages.faiss").read_bytes()
    (index / "passages.faiss").write_bytes(b"torn")
    run_json("index", "--rebuild", "--index", index)
    assert (index / "passages.faiss").read_bytes() == before


def test_compaction_makes_the_file_smaller(index: Path) -> None:
    with PassageIndex.open(index) as opened:
        opened.delete([str(i) for i in range(25)])
    report = run_json("index", "--compact", "--index", index)
    assert report["bytes_after"] < report["bytes_before"] / 2
    assert report["bytes_after"] == (index / "passages.sqlite").stat().st_size
    with not_writable(index):
        assert "read-only" in failure("index", "--compact", "--index", index)


@pytest.mark.parametrize("flags", [["--verify", "--stats"], ["--compact", "README.md"]])
def test_upkeep_stands_alone(index: Path, flags: list[str]) -> None:
    assert "stand alone" in failure("index", *flags, "--index", index)


def test_without_files_there_is_nothing_to_index(tmp_path: Path) -> None:
    assert "nothing to read; name files" in failure("index", "--index", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------ reindex


def test_reindex_makes_memories_of_another_compressor_beside_the_old(
    index: Path, checkpoints: tuple[Path, Path]
) -> None:
    with PassageIndex.open(index, read_only=True) as opened:
        (old,) = opened.fingerprints()
    report = run_json("reindex", "--index", index, "--model", checkpoints[1])
    assert (report["made"], report["dropped"]) == (30, 0)
    with PassageIndex.open(index, read_only=True) as opened:
        assert opened.fingerprints() == {old: 30, report["fingerprint"]: 30}
    assert run_json("reindex", "--index", index, "--model", checkpoints[1], "--drop-others")["dropped"] == 30
    with PassageIndex.open(index, read_only=True) as opened:
        assert opened.fingerprints() == {report["fingerprint"]: 30}


def test_reindex_changes_the_form_of_memories(index: Path, checkpoints: tuple[Path, Path]) -> None:
    before = run_json("index", "--stats", "--index", index)["bytes"]["memories"]
    report = run_json("reindex", "--index", index, "--model", checkpoints[0], "--memory-form", "int4")
    assert (report["made"], report["memory_form"]) == (30, "int4")
    stats = run_json("index", "--stats", "--index", index)
    assert [some["form"] for some in stats["memories"]] == ["int4"]
    assert stats["bytes"]["memories"] < before / 2
    assert run_json("reindex", "--index", index, "--model", checkpoints[0])["made"] == 0
    assert "must be one of" in failure("reindex", "--index", index, "--model", checkpoints[0], "--memory-form", "int5")


def test_reindex_needs_an_index(tmp_path: Path, checkpoints: tuple[Path, Path]) -> None:
    assert "does not exist" in failure("reindex", "--index", tmp_path / "nowhere", "--model", checkpoints[0])


def test_a_killed_reindex_keeps_its_batches_while_the_index_is_in_use(
    tmp_path: Path, checkpoints: tuple[Path, Path]
) -> None:
    index, rows = tmp_path / "index", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": str(i), "text": f"Row {i} " * 30}) + "\n" for i in range(64 * 12)))
    run_json("index", rows, "--index", index, "--no-memory")
    with PassageIndex.open(index) as opened:
        running = subprocess.Popen(
            [sys.executable, "-m", "vist_rag.cli", "reindex", "--index", index, "--model", checkpoints[1]],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        stop = threading.Timer(240, running.kill)
        stop.start()
        while running.poll() is None and not opened.fingerprints():
            opened.search("row", 3)
            opened.add([Passage(f"Added meanwhile {time.monotonic_ns()}")])
            time.sleep(0.25)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        stop.cancel()
        ((fingerprint, kept),) = opened.fingerprints().items()
        assert kept % 64 == 0
        lacking = opened.count_lacking(fingerprint)
        assert lacking > 0
    report = run_json("reindex", "--index", index, "--model", checkpoints[1])
    assert (report["made"], report["fingerprint"]) == (lacking, fingerprint)
    assert run_json("index", "--verify", "--index", index)["problems"] == []
