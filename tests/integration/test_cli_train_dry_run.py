"""``vist-rag train --dry-run``: what people and programs are told, and that nothing is left behind."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.support.causal import causal_generator
from tests.support.cli import failure, run, run_json

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

RECIPE = """
[tower]
pretrained = "clip"
[resampler]
width = 16
heads = 2
[generator]
pretrained = "lm"
[generator.lora]
r = 4
target_modules = ["q_proj"]
[data]
text = ["texts.jsonl"]
[[stages]]
name = "align"
kind = "align"
steps = 100
batch = 4
learning_rate = 1e-3
[[stages]]
name = "distill"
kind = "distill"
steps = 2000
batch = 2
learning_rate = 1e-3
answers = 10
train = ["projector", "lora"]
[stages.tasks]
answer = { weight = 1.0, words = [4, 20] }
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and another for temporary files; both must be left as they were."""
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return tmp_path


def left(place: Path) -> list[Path]:
    return [path for name in ("here", "temporary") for path in (place / name).iterdir()]


@pytest.fixture
def recipe(place: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)).save_pretrained(place / "clip")
    generator = causal_generator("llama")
    generator.model.save_pretrained(place / "lm")
    generator.tokenizer.save_pretrained(place / "lm")
    text = "The old bridge was built in 1867 by Marie Curie. The river runs from a lake to the sea."
    rows = [{"title": f"Bridge {i}", "text": text} for i in range(20)]
    (place / "data").mkdir()
    (place / "data" / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = place / "mine.toml"
    file.write_text(RECIPE.replace('"clip"', f'"{place / "clip"}"').replace('"lm"', f'"{place / "lm"}"'))
    return file


def test_the_smoke_recipe_is_told_without_data_and_without_output(place: Path) -> None:
    told = run("train", "smoke", "--dry-run")
    assert told.exit_code == 0, told.output
    assert left(place) == []
    lines = told.stdout.splitlines()
    for stage in ("align", "distill"):
        assert sum(line.strip().startswith(stage) for line in lines) == 4  # a row of each table
    assert sum(line.strip().startswith("total") for line in lines) == 2
    rate = r"^cpu, float32: [\d.]+ [kMGTP]FLOP/s .* measured now; 0.4 of it in training, assumed\.$"
    assert re.search(rate, told.stdout, re.MULTILINE)
    assert "activations are an estimate" in told.stdout


def test_programs_are_told_the_same(place: Path) -> None:
    report = run_json("train", "smoke", "--dry-run", "--output", place / "here" / "out")
    assert left(place) == []
    (one,) = report["runs"]
    assert (report["recipe"], one["name"]) == ("smoke", "")
    align, distill = one["stages"]
    assert (align["name"], align["kind"], align["steps"]) == ("align", "align", 2)
    assert align["parameters"]["generator"]["trained"] == align["parameters"]["tower"]["trained"] == 0
    assert distill["parameters"]["generator"]["trained"] > 1e7
    assert set(distill["flops"]) >= {"tower", "resampler", "projector", "generator", "teacher"}
    speed = align["speed"]
    assert (speed["device"], speed["dtype"], speed["utilisation"]) == ("cpu", "float32", 0.4)
    rate = speed["flops_per_second"] * speed["utilisation"]
    flops = sum(sum(stage["all_flops"].values()) for stage in one["stages"])
    assert report["hours"] == pytest.approx(flops / rate / 3600)
    assert report["hours"] == pytest.approx(one["total"]["hours"])


def test_a_pretrained_pair(place: Path, recipe: Path) -> None:
    data = place / "data"
    report = run_json("train", recipe, "--data", data, "--dry-run")
    told = run("train", recipe, "--data", data, "--dry-run")
    assert left(place) == []
    align, distill = report["runs"][0]["stages"]
    assert align["total"]["examples"] == 400
    assert distill["parameters"]["lora"] == {"trained": 2 * (32 + 32) * 4, "frozen": 0}
    assert align["parameters"]["lora"] == {"trained": 0, "frozen": 2 * (32 + 32) * 4}
    assert distill["flops"]["answers"]["backward"] == 0
    rows = [line.split() for line in told.stdout.splitlines() if line.strip().startswith("align")]
    assert rows[0][1:4] == ["100", "100", "400"]
    tower = align["parameters"]["tower"]["frozen"]
    (frozen, *_) = [line.split() for line in told.stdout.splitlines() if line.strip().startswith("frozen")]
    assert frozen[1] == f"{tower:,}"


@pytest.mark.parametrize("fusion", ["soft_prompt", "cross_attention"])
def test_the_paper(place: Path, recipe: Path, fusion: str) -> None:
    smaller = [
        f"tower.pretrained={place / 'clip'}",
        f"generator.pretrained={place / 'lm'}",
        f"generator.fusion={fusion}",
        "data.text=['texts.jsonl']",
        "data.sequence=[100, 20]",
        "resampler={latents_per_page=64, width=16, heads=2, layers=1}",
        "trainer.bf16=false",
    ]
    arguments = [argument for change in smaller for argument in ("--set", change)]
    report = run_json("train", "paper", "--data", place / "data", "--dry-run", *arguments)
    assert left(place) == []
    (stage,) = report["runs"][0]["stages"]
    assert (stage["kind"], stage["steps"], stage["step"]["examples"]) == ("lm", 2000, 16)
    # Of each sequence 20 tokens, give or take what a cut goes back to the beginning of a word.
    assert stage["step"]["target_tokens"] == pytest.approx(16 * 20, rel=0.2)
    assert stage["step"]["pages"] == 16  # 100 tokens of these are a page or less
    assert stage["parameters"]["generator"]["trained"] == stage["parameters"]["tower"]["trained"] == 0
    assert stage["parameters"]["projector"]["trained"] > 0


def test_settings_can_be_changed(place: Path, recipe: Path) -> None:
    arguments: list[Any] = ["train", recipe, "--data", place / "data", "--dry-run"]
    before = run_json(*arguments)["runs"][0]["stages"][0]
    after = run_json(*arguments, "--set", "stages.align.steps=1000")["runs"][0]["stages"][0]
    assert after["total"]["examples"] == 10 * before["total"]["examples"]
    assert after["all_flops"]["forward"] == pytest.approx(10 * before["all_flops"]["forward"], rel=0.3)


def test_data_is_checked_as_in_training(place: Path, recipe: Path) -> None:
    data = place / "data"
    with (data / "texts.jsonl").open("a") as file:
        file.write('{"title": "no text"}\n')
    line = failure("train", recipe, "--data", data, "--dry-run")
    assert line == failure("train", recipe, "--data", data, "--output", place / "output")
    assert "texts.jsonl:21" in line
    assert left(place) == []
    told = run("train", recipe, "--data", data, "--dry-run", "--skip-bad")
    assert told.exit_code == 0, told.output
    assert "1 bad passages left out" in told.stderr
    assert left(place) == []


def test_what_is_missing_is_named(place: Path, recipe: Path) -> None:
    assert "--data" in failure("train", recipe, "--dry-run")
    assert "texts.jsonl" in failure("train", recipe, "--data", place / "here", "--dry-run")
    assert "--only" in failure("train", "smoke", "--dry-run", "--only", "this")
    assert left(place) == []
