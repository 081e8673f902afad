"""The full-shape benchmark at its tiny sizes: what a cell says, what a second run does, what does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.benchmarks import FOLDER, load_benchmark
from vist_rag.evaluation.costs import count_costs
from vist_rag.training.recipe import load_recipe

pytest.importorskip("accelerate", reason="training needs the extra 'train'")


@pytest.fixture(scope="module")
def full_shape() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return load_benchmark("full_shape")


def measure(full_shape: ModuleType, output: Path, *arguments: str) -> dict[str, Any]:
    full_shape.main(["--tiny", "--device", "cpu", "--repeats", "2", "--output", str(output), *arguments])
    return json.loads(output.read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def result(full_shape: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("full-shape")
    shown = ("--plot", str(folder / "plot.png"), "--page", str(folder / "page.md"))
    told = measure(full_shape, folder / "out.json", *shown)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    told["page"] = (folder / "page.md").read_text("utf-8")
    return told


def cells_of(result: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {key: cell for key, cell in result["cells"].items() if cell["part"] == part}


def test_every_cell_is_measured(full_shape: ModuleType, result: dict[str, Any]) -> None:
    wanted = [cell.key for cell in full_shape.cells(full_shape.shapes(tiny=True))]
    assert list(result["cells"]) == wanted
    assert "rag/tiny/text/raw/1" in wanted
    assert "table1/tiny/soft_prompt/292+32" in wanted
    for cell in result["cells"].values():
        assert not cell["out_of_memory"]
        ms = cell["ms"]
        assert ms["low"] <= ms["median"] <= ms["high"]
        assert len(ms["runs"]) == 2
        assert cell["weight_bytes"] > 0
        assert cell["memory_bytes"] is None or cell["memory_bytes"] >= cell["weight_bytes"]
    assert {"commit", "machine", "versions", "date", "command"} <= result.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is asked of Linux")
def test_the_peak_of_a_run_on_a_cpu_is_what_it_takes(full_shape: ModuleType) -> None:
    clock = full_shape.Clock(torch.device("cpu"), repeats=1, warm_up=0)
    torch.ones(2**27)  # half a GB that is free again: not of the next run
    assert clock.measure(lambda: torch.ones(2**26))["growth_bytes"] == pytest.approx(2**28, rel=0.05)


def test_passes_of_table_1_are_those_that_are_counted(full_shape: ModuleType, result: dict[str, Any]) -> None:
    shape = full_shape.shapes(tiny=True)["tiny"]
    cells = cells_of(result, "table1")
    text = count_costs(None, shape.generator, encoded_tokens=0, text_tokens=64, all_logits=True)
    assert cells["table1/tiny/text/0+64"]["flops"] == text.flops
    soft = count_costs(
        shape.tower, shape.generator, encoded_tokens=292, text_tokens=32, resampler=shape.resampler, all_logits=True
    )
    cell = cells["table1/tiny/soft_prompt/292+32"]
    assert (cell["pages"], cell["latents"]) == (soft.pages, soft.memory_entries) == (2, 128)
    projector = {"projector", "rendering"}  # of another width there
    ours = cell["flops"] - 2 * 128 * (32 * 128 + 128 * 64)
    assert ours == sum(part.flops for part in soft.parts if part.name not in projector)


def test_the_first_token_is_timed_in_three_ways(result: dict[str, Any]) -> None:
    cells = cells_of(result, "rag")
    raw, made, ready = (
        cells[f"rag/tiny/{name}/2"] for name in ("text/raw", "soft_prompt/memory_made_now", "soft_prompt/memory_ready")
    )
    assert raw["prompt_tokens"] == raw["raw_tokens"] == ready["raw_tokens"] > 200
    assert 0 < ready["prompt_tokens"] < raw["prompt_tokens"]
    assert made["weight_bytes"] > ready["weight_bytes"] > raw["weight_bytes"]
    assert ready["form"] == "float16"
    assert ready["stored_bytes"] % (2 * 32) == 0  # latents of 32 numbers in float16
    assert ready["tokens_per_s"] == pytest.approx(1000 * ready["raw_tokens"] / ready["ms"]["median"], rel=1e-3)


def test_a_training_step_makes_hours(result: dict[str, Any]) -> None:
    cell = cells_of(result, "training")["training/tiny/soft_prompt/292+16"]
    accumulate = load_recipe("paper")["trainer"]["gradient_accumulation_steps"]
    assert (cell["sequences"], cell["pages"], cell["target_tokens"]) == (2, 4, 32)
    step = accumulate * cell["ms"]["median"] + cell["optimizer_ms"]["median"]
    assert cell["step_ms"] == pytest.approx(step, abs=0.1)
    assert cell["gpu_hours"] == pytest.approx(2000 * step / 3.6e6, abs=1e-3)
    assert cell["gradient_bytes"] == 4 * cell["trained_parameters"]
    # Two states and a count for each weight.
    assert cell["optimizer_bytes"] == pytest.approx(2 * cell["gradient_bytes"], rel=0.01)


def test_the_page_shows_what_was_measured(result: dict[str, Any]) -> None:
    page = result["page"].split("\n")
    assert sum(line.startswith("| tiny |") for line in page) == len(result["cells"])
    ms = result["cells"]["rag/tiny/soft_prompt/memory_ready/2"]["ms"]
    times = f"{ms['median']:.1f} [{ms['low']:.1f}, {ms['high']:.1f}]"
    assert any(line.startswith(f"| tiny | soft prompt | memory, ready | 2 | {times} |") for line in page)


def test_a_second_run_measures_what_is_lacking(full_shape: ModuleType, tmp_path: Path) -> None:
    output, only = tmp_path / "out.json", ("--only", "rag/tiny/text/*")
    told = measure(full_shape, output, *only)
    assert list(told["cells"]) == ["rag/tiny/text/raw/1", "rag/tiny/text/raw/2"]
    told["cells"]["rag/tiny/text/raw/1"]["ms"]["median"] = -1.0
    del told["cells"]["rag/tiny/text/raw/2"]
    output.write_text(json.dumps(told))
    again = measure(full_shape, output, *only)["cells"]
    assert again["rag/tiny/text/raw/1"]["ms"]["median"] == -1.0
    assert again["rag/tiny/text/raw/2"]["ms"]["median"] > 0
    assert measure(full_shape, output, "--only", "table1/*", "--seconds", "0")["cells"] == again
    with pytest.raises(SystemExit):
        full_shape.main(["--tiny", "--device", "cpu", "--repeats", "3", "--output", str(output)])


def test_what_does_not_fit_is_told_and_the_others_are_measured(
    full_shape: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nOf the rest nobody wants to know.")

    monkeypatch.setattr(full_shape, "forward_pass", too_large)
    told = measure(full_shape, tmp_path / "out.json", "--only", "*/tiny/text/*", "--page", str(tmp_path / "page.md"))
    assert "| tiny | none | 0 | 64 | out of memory |  |  |" in (tmp_path / "page.md").read_text()
    large = told["cells"]["table1/tiny/text/0+64"]
    assert large["out_of_memory"]
    assert large["error"] == "CUDA out of memory. Tried to allocate 9 GiB."
    assert "ms" not in large
    assert not told["cells"]["rag/tiny/text/raw/1"]["out_of_memory"]


def test_what_was_measured_before_a_stop_is_kept(
    full_shape: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(full_shape, "first_token", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(full_shape, tmp_path / "out.json", "--only", "*/tiny/text/*")
    assert list(json.loads((tmp_path / "out.json").read_text())["cells"]) == ["table1/tiny/text/0+64"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_cross_attention_takes_no_positions(result: dict[str, Any]) -> None:
    cells = result["cells"]
    soft, cross = (cells[f"rag/tiny/{name}/memory_ready/2"] for name in ("soft_prompt", "cross_attention"))
    assert cross["raw_tokens"] == soft["raw_tokens"]
    assert cells["table1/tiny/cross_attention/292+32"]["flops"] < cells["table1/tiny/soft_prompt/292+32"]["flops"]
    assert cells["training/tiny/cross_attention/292+16"]["gpu_hours"] > 0
