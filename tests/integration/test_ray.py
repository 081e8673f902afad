"""``vist-rag index --engine ray``: the same index as one process makes, whoever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.bulk import WatchedRecipe, pids
from tests.support.cli import ROOT, failure, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint
from vist_rag import bulk
from vist_rag.bulk import Parts, make_with_ray
from vist_rag.retrieval import PassageIndex, read_passages
from vist_rag.retrieval.embedder import DEFAULT_MODEL

ray = pytest.importorskip("ray", reason="needs the extra ray")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra ray")
pytestmark = pytest.mark.slow

PART = 8
EXACT = ("--memory-form", "float16")  # a coarser form turns the last bit of a number into a whole step


@pytest.fixture(scope="module", autouse=True)
def _models() -> Iterator[None]:
    with word_embedder(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "Recipe", WatchedRecipe)
        yield


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with bulk._cluster(None, 2):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    docs = tmp_path_factory.mktemp("docs")
    rows = [
        {"id": f"row {i}", "title": f"Row {i}", "text": f"The bridge over river {i} was built in {1800 + i}.", "n": i}
        for i in range(100)
    ]
    rows[7]["text"] += " \ud800 is no character."
    (docs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (docs / "lake.md").write_text("# Lake\n\nThe river runs from a lake to the sea.\n")
    (docs / "again.md").write_text("# Lake\n\nThe river runs from a lake to the sea.\n")
    (docs / "chinese.txt").write_text("上海是中国的城市。", "utf-8")
    return docs


@pytest.fixture(scope="module")
def local(docs: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    index = tmp_path_factory.mktemp("local")
    return index, run_json("index", docs, "--index", index, "--model", checkpoint, *EXACT)


def assert_same(index: Path, other: Path, fingerprint: str) -> None:
    with PassageIndex.open(index, read_only=True) as one, PassageIndex.open(other, read_only=True) as two:
        passages = list(one.passages())
        assert passages == list(two.passages())  # in the same order
        ids, texts = [p.id for p in passages], [p.content for p in passages]
        vectors, expected = one.vectors(ids), two.vectors(ids)
        memories, wanted = (some.memories(texts, fingerprint) for some in (one, two))
        assert list(memories) == texts
        for id_ in ids:
            np.testing.assert_allclose(vectors[id_], expected[id_], atol=1e-5)
        for text in texts:
            np.testing.assert_allclose(memories[text].astype(float), wanted[text].astype(float), atol=2e-3, rtol=2e-3)
        assert one.meta == two.meta
        assert one.fingerprints() == two.fingerprints()


def finished(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each part that is there."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.glob("part-*.parquet")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stored(index: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in index.iterdir() if p.suffix in (".sqlite", ".faiss", ".json")}


def test_a_worker_that_is_killed_is_replaced(
    docs: Path, checkpoint: Path, local: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    index, victims = tmp_path / "index", []

    def kill_one() -> None:
        deadline = time.monotonic() + 200
        while not victims and time.monotonic() < deadline:
            time.sleep(0.01)
            if len(pids(checkpoint)) == 2 and finished(index / "parts"):  # each is at a part, which takes a while
                victims.append(pids(checkpoint)[0])
                os.kill(victims[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    arguments = ["index", docs, "--index", index, "--model", checkpoint, "--engine", "ray", "--part", PART, *EXACT]
    report = run_json(*arguments, "--workers", 2)
    killer.join()
    assert len(victims) == 1
    assert not alive(victims[0])
    assert report["parts"]["made"] > 8
    assert report["parts"]["directory"] is None
    assert report["passages"] == local[1]["passages"] == {"read": 102, "added": 102, "unchanged": 0, "in_index": 102}
    assert report["low_coverage"] == local[1]["low_coverage"] != {}
    assert_same(index, local[0], report["memories"]["fingerprint"])
    assert not (index / "parts").exists()

    report = run_json(*arguments)  # nothing to make: no worker is asked
    assert (report["parts"]["made"], report["parts"]["kept"]) == (0, 0)
    assert (report["memories"]["made"], report["memories"]["kept"]) == (0, 102)


def test_a_command_that_was_killed_goes_on_where_it_was(
    docs: Path, checkpoint: Path, local: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    index, parquet = tmp_path / "index", tmp_path / "parquet"
    arguments = ["index", docs, "--index", index, "--model", checkpoint, "--engine", "ray", "--workers", 1, *EXACT]
    arguments += ["--parquet", parquet, "--part", PART]
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.support.bulk", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while len(finished(parquet)) < 3 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL, stderr
    time.sleep(1)  # its workers notice within that
    before = finished(parquet)
    assert not index.exists()

    report = run_json(*arguments)
    assert report["parts"]["kept"] == len(before) >= 3
    assert report["parts"]["made"] > 0
    after = finished(parquet)
    assert {name: after[name] for name in before} == before
    assert len(after) == report["parts"]["kept"] + report["parts"]["made"]
    assert report["passages"] == local[1]["passages"]
    assert_same(index, local[0], report["memories"]["fingerprint"])
    assert sorted(path.suffix for path in parquet.iterdir()) == [".parquet"] * len(after)  # nothing else is left

    bytes_before = stored(index)
    report = run_json(*arguments)
    assert (report["parts"]["made"], report["parts"]["kept"]) == (0, len(after))
    assert (report["passages"]["added"], report["passages"]["unchanged"]) == (0, 102)
    assert finished(parquet) == after
    assert stored(index) == bytes_before

    alone = run(*(a for a in arguments if a not in ("--index", index)), "--parquet", parquet)
    assert (alone.exit_code, "102 passages read" in alone.stdout) == (0, True), alone.stderr
    rows = pq.read_table(parquet).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows) == 102
    assert all(len(row["memory"]) == 2 * row["n"] * row["d"] and len(row["vector"]) == 256 for row in rows)


def test_what_a_worker_says_is_what_is_said(docs: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", WatchedRecipe(DEFAULT_MODEL), PART)
    with pytest.raises(bulk.StoreError, match="no checkpoint, no memory"):
        make_with_ray(parts, parts.plan(read_passages(docs / "lake.md")), workers=1)


def test_a_bad_file_leaves_nothing_behind(docs: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    line = failure(
        *("index", docs, tmp_path / "binary.txt", "--index", tmp_path / "index", "--model", checkpoint),
        *("--engine", "ray", "--part", PART),
    )
    assert "binary.txt is a binary file" in line
    assert not (tmp_path / "index").exists()
