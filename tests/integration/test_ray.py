"""``vist-rag index --engine ray``: the same index as one process makes, whoever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
pytestmark = pytest.mark.slow

PART = 8


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
    return index, run_json("index", docs, "--index", index, "--model", checkpoint)


def assert_same(index: Path, other: Path, fingerprint: str) -> None:
    with PassageIndex.open(index, read_only=True) as one, PassageIndex.open(other, read_only=True) as two:
        passages = list(one.passages())
        assert passages == list(two.passages())  # in the same order
        ids = [p.id for p in passages]
        vectors, expected = one.vectors(ids), two.vectors(ids)
        memories, wanted = (some.memories(ids, fingerprint) for some in (one, two))
        assert list(memories) == ids
        for id_ in ids:
            np.testing.assert_allclose(vectors[id_], expected[id_], atol=1e-5)
            np.testing.assert_allclose(memories[id_].astype(float), wanted[id_].astype(float), atol=2e-3, rtol=2e-3)
        assert one.meta == two.meta
        assert one.fingerprints() == two.fingerprints()


def finished(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each part that is there."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.glob("part-*.parquet")}


def stored(index: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in index.iterdir() if p.suffix in (".sqlite", ".faiss", ".json")}


def test_a_worker_that_is_killed_is_replaced(
    docs: Path, checkpoint: Path, local: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    fingerprint = local[1]["memories"]["fingerprint"]
    parts = Parts(tmp_path / "parts", WatchedRecipe(DEFAULT_MODEL, str(checkpoint), fingerprint), PART)
    before, victims, done = set(pids(checkpoint)), [], []

    def advance(n: int) -> None:
        done.append(n)
        alive = [pid for pid in set(pids(checkpoint)) - before if not victims]
        if len(alive) == 2:  # both are at a part, which takes a while
            victims.append(alive[0])
            os.kill(alive[0], signal.SIGKILL)

    plan = parts.plan(read_passages(docs))
    assert len(plan) > 8
    make_with_ray(parts, plan, workers=2, advance=advance)
    assert len(victims) == 1
    assert not Path(f"/proc/{victims[0]}/cmdline").exists() or not Path(f"/proc/{victims[0]}/cmdline").read_bytes()
    assert sum(done) == sum(part.passages for part in plan) == 102
    with PassageIndex.open(tmp_path / "index") as index:
        for part, passages in parts.again(plan, read_passages(docs)):
            parts.merge(part, passages, index, keep=True)
    assert_same(tmp_path / "index", local[0], fingerprint)


def test_a_command_that_was_killed_goes_on_where_it_was(
    docs: Path, checkpoint: Path, local: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    index, parquet = tmp_path / "index", tmp_path / "parquet"
    arguments = ["index", docs, "--index", index, "--model", checkpoint, "--engine", "ray", "--workers", 2]
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


def test_without_parquet_the_parts_go_into_the_index_and_away(
    docs: Path, checkpoint: Path, local: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    index = tmp_path / "index"
    arguments = ["index", docs, "--index", index, "--model", checkpoint, "--engine", "ray", "--part", 64]
    report = run_json(*arguments)
    assert (report["parts"]["made"] > 0, report["parts"]["directory"]) == (True, None)
    assert report["low_coverage"] == local[1]["low_coverage"] != {}
    assert_same(index, local[0], report["memories"]["fingerprint"])
    assert not (index / "parts").exists()
    report = run_json(*arguments)
    assert (report["parts"]["made"], report["parts"]["in_index"]) == (0, len(list(range(report["parts"]["in_index"]))))
    assert (report["memories"]["made"], report["memories"]["kept"]) == (0, 102)


def test_parquet_alone(docs: Path, checkpoint: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    arguments = ["index", docs / "lake.md", "--model", checkpoint, "--engine", "ray", "--parquet", tmp_path / "out"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "1 passage read" in result.stdout
    table = pq.read_table(tmp_path / "out")
    (row,) = table.to_pylist()
    assert (row["title"], row["source"]) == ("Lake", str(docs / "lake.md"))
    assert json.loads(row["metadata"]) == {"start": 0}
    assert len(row["memory"]) == 2 * row["n"] * row["d"]
    assert len(row["vector"]) == 256
    other = run(*arguments[:1], docs / "chinese.txt", *arguments[2:])
    assert "holds 1 part that are not of these files" in other.stderr


def test_what_a_worker_says_is_what_is_said(docs: Path, checkpoint: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", WatchedRecipe(DEFAULT_MODEL, str(checkpoint), "f"), 64)
    plan = parts.plan(read_passages(docs))
    for staged in (tmp_path / "parts" / "staged").iterdir():
        staged.unlink()
    with pytest.raises(bulk.StoreError, match="must be one that all machines share"):
        make_with_ray(parts, plan, workers=1)


def test_a_bad_file_leaves_nothing_behind(docs: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    line = failure(
        *("index", docs, tmp_path / "binary.txt", "--index", tmp_path / "index", "--model", checkpoint),
        *("--engine", "ray", "--part", PART),
    )
    assert "binary.txt is a binary file" in line
    assert not (tmp_path / "index").exists()
