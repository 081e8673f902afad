"""``vist-rag report``: from result files to a page and its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import failure, run, run_json
from tests.support.synthetic_results import synthetic_directory

pytest.importorskip("matplotlib")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return synthetic_directory(tmp_path / "results")


def test_a_page_is_written_where_it_was_asked_for_and_every_file_is_told(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    result = run("report", results, "--output", page, "--title", "Synthetic figures")
    assert result.exit_code == 0, result.stderr
    written = [Path(line) for line in result.stdout.splitlines()]
    assert written[0] == page
    assert {path.parent for path in written[1:]} == {page.parent / "images" / "benchmarks"}
    assert page.read_text("utf-8").startswith("# Synthetic figures\n")
    assert sorted(path for path in page.parent.rglob("*") if path.is_file()) == sorted(written)


def test_json_names_the_page_and_its_pictures(results: Path, tmp_path: Path) -> None:
    document = run_json("report", results)
    assert document["page"] == str(results / "benchmarks.md")
    assert len(document["images"]) == 4
    before = (results / "benchmarks.md").read_bytes()
    run_json("report", results, "--output", results)
    assert (results / "benchmarks.md").read_bytes() == before


def test_what_is_left_out_is_told_on_stderr(results: Path, tmp_path: Path) -> None:
    (results / "other.json").write_text(json.dumps({"em": 1}), "utf-8")
    result = run("report", results, "--output", tmp_path / "docs")
    assert result.exit_code == 0
    assert "left out: other.json" in result.stderr


def test_bad_input_is_one_line(results: Path, tmp_path: Path) -> None:
    assert "holds no evaluation result" in failure("report", tmp_path)
    (results / "torn.json").write_text('{"format":', "utf-8")
    assert "torn.json is not whole JSON" in failure("report", results)
