"""A run's facts are facts."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from vist_rag.evaluation.provenance import commit, directory_hash, run_facts


def test_facts_of_a_run_name_versions_and_no_host() -> None:
    facts = run_facts("vist-rag demo --eval", seed=7)
    assert facts["command"] == "vist-rag demo --eval"
    assert facts["seed"] == 7
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["date"])
    assert facts["versions"]["torch"].startswith("2.")
    assert facts["machine"]["cores"] >= 1
    assert platform.node() not in facts["machine"].values()


def test_the_commit_is_that_of_the_checkout() -> None:
    found = commit()
    if not (Path(__file__).parents[3] / ".git").exists():
        assert found is None
    elif found is not None:
        assert re.fullmatch(r"[0-9a-f]{40}\+?", found)


def test_a_folder_is_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"12")
    first = directory_hash(tmp_path)
    assert first == directory_hash(tmp_path)
    (tmp_path / "a" / "weights").write_bytes(b"13")
    second = directory_hash(tmp_path)
    (tmp_path / "a" / "weights").rename(tmp_path / "a" / "weight")
    assert len({first, second, directory_hash(tmp_path)}) == 3
