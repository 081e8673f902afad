"""The pages that benchmarks write, from result files alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.support.benchmarks import FOLDER, load_benchmark
from vist_rag.checkpoint import embedded_checkpoint
from vist_rag.fidelity import FIDELITY_FILE, SHARE, WORD, Fidelity


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return load_benchmark("ablations")


@pytest.fixture(scope="module")
def memory_bytes() -> ModuleType:
    return load_benchmark("memory_bytes")


@pytest.mark.parametrize("name", ["memory-bytes", "memory-bytes-test"])
def test_the_page_on_the_size_of_memory_shows_what_was_measured(memory_bytes: ModuleType, name: str) -> None:
    result = json.loads((FOLDER / "results" / f"{name}.json").read_text("utf-8"))
    page = (FOLDER.parent / "docs" / "explanation" / "memory-size.md").read_text("utf-8")
    assert memory_bytes.table(result) in page
    assert f"{result['questions']} questions" in page
    config = json.loads((embedded_checkpoint() / "compressor" / "config.json").read_text("utf-8"))
    assert result["default"] == config["memory_form"]


def test_the_page_on_fidelity_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    guard = load_benchmark("guard")
    result = json.loads((FOLDER / "results" / "guard.json").read_text("utf-8"))
    page = (FOLDER.parent / "docs" / "explanation" / "fidelity.md").read_text("utf-8")
    directory = embedded_checkpoint() / "compressor"
    fingerprint = json.loads((directory / FIDELITY_FILE).read_text("utf-8"))["fingerprint"]
    assert guard.figures_table(result) in page
    assert guard.rates_table(Fidelity.load(directory, fingerprint)) in page
    assert result["thresholds"] == {"word": WORD, "share": SHARE}
    assert f"misread in {100 * WORD:.0f} % of cases or more" in page
    for name in ("probe", "speller"):
        assert f"{result['predicts'][name]['brier']:.3f}" in page


def test_hard_questions_are_answered_by_their_passages() -> None:
    made = load_benchmark("guard_questions").hard_questions(170, 7)
    assert len({one.sort for one in made}) == 17
    assert all(one.answers[0] in one.passage.text for one in made)


def test_a_basis_keeps_what_varies_and_one_scale_serves_the_largest(memory_bytes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(400, 2)) @ rng.normal(size=(2, 12)) + 5).astype(np.float32)  # of two directions only
    back, taken = memory_bytes.principal([rows[:300]], 0.01).stored(rows[300:])
    assert taken < 100 * 12 * 2 / 8  # less than two bits a number
    assert np.abs(back - rows[300:]).mean() < 0.05 * rows.std(0).max()
    rows[:, 0] = 100
    back, taken = memory_bytes.scaled(4).stored(rows)
    assert taken == 400 * 12 // 2 + 2 * 400
    assert np.abs(back[:, 1:] - rows[:, 1:]).mean() > 1  # steps of a hundred's seventh or a little less


def result(folder: Path, name: str, *cells: tuple[str, float, float]) -> None:
    rows = [
        {"method": method, "rate": rate, "em": em, "em_95": [em - 0.05, em + 0.05], "ratio": 2 * rate}
        for method, rate, em in cells
    ]
    (folder / f"{name}.json").write_text(json.dumps({"cells": rows}))


def test_the_page_of_ablations_holds_what_was_measured_beside_the_paper(ablations: ModuleType, tmp_path: Path) -> None:
    rates = ablations.RATES
    result(tmp_path, "base", *(("memory", rate, 0.5 - rate / 100) for rate in rates))
    result(tmp_path, "joined", *(("memory", rate, 0.4 - rate / 100) for rate in rates))
    for name, alone, joined in (("base", 0.31, 0.12), ("joined", 0.22, 0.33)):
        result(tmp_path, f"{name}-retrieved", ("memory", 2.3, alone), ("joined_memory", 2.3, joined))
    page = ablations.page(tmp_path)
    assert "## Passages rendered alone or joined" in page
    assert "| base | 49.0 [44.0, 54.0] (2.0x) | 47.7 [42.7, 52.7] (4.6x) |" in page
    assert "| joined | 22.0 [17.0, 27.0] (4.6x) | 33.0 [28.0, 38.0] (4.6x) |" in page
    assert "## PVE" not in page  # one run alone is no comparison


def test_the_page_compares_what_the_recipes_train(ablations: ModuleType) -> None:
    from vist_rag.training.recipe import load_recipe

    recipes = ("ablations", "ablations-reading", "fusions")
    trained = {name for recipe in recipes for name in load_recipe(recipe)["ablations"]}
    assert {name for names in ablations.TABLES.values() for name in names} == trained
    assert ablations.TABLES.keys() == ablations.PAPER.keys()
