"""A whole recipe on a tiny base model and a few texts: what is trained, exported, continued and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from tests.support.tiny import BERT_SIZES, TOWER, tiny_tokenizer
from vist_rag.errors import CheckpointError, ConfigError, InputError
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.pipeline import load_compressor, read_settings
from vist_rag.training.recipe import RecipeRun, load_recipe, written_decoder

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

TEXT = "The old bridge was built in 1867 by Marie Curie. The river runs from a lake to the sea."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder in the layout of a hub's: config, weights, tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT_SIZES)).save_pretrained(directory)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    texts = [{"title": f"Bridge {i}", "text": TEXT} for i in range(40)]
    rows = [{"question": "When was it built?", "answers": ["1867"], "title": "Bridge", "context": TEXT}] * 4
    for name, lines in (("texts.jsonl", texts), ("questions.jsonl", rows)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def recipe(base: Path) -> dict[str, Any]:
    reading = {
        "kind": "read",
        "steps": 2,
        "batch": 2,
        "learning_rate": 1e-3,
        "rates": {"1.0": 0.5, "0.5": 0.5},
        "tasks": {"answer": {"weight": 0.5, "words": [6, 20]}, "continue": {"weight": 0.5, "words": [6, 20]}},
    }
    return {
        "seed": 0,
        "tower": TOWER,
        "resampler": {"width": 16, "heads": 2, "layers": 1, "tower_layers": [1, -1], "salience": True},
        "generator": {"base": str(base), "vocabulary": 70, "projector_width": 32},
        "data": {"text": ["texts.jsonl"], "questions": {"questions.jsonl": 1.0}},
        "stages": [
            {"name": "tower", "kind": "tower", "steps": 2, "patches": 100, "learning_rate": 1e-3},
            {
                "name": "lexical",
                "kind": "lexical",
                "steps": 2,
                "patches": 100,
                "learning_rate": 1e-3,
                "train_tower": True,
                "reading": True,
                "salad": 0.5,
            },
            reading | {"name": "text", "raw": 1.0},
            reading | {"name": "ideal", "ideal": 1.0, "slips": 0.1, "distil": 1.0},
            reading | {"name": "answer", "distil": 1.0, "train_compressor": False},
        ],
        "settings": {"max_new_tokens": 4, "budget": {"k_raw": 0, "k_memory": 1, "latents": 8}},
    }


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("compressor", "fusion", "generator")
        for name, tensor in load_file(str(model / part / "model.safetensors")).items()
    }


def test_a_recipe_makes_a_checkpoint_that_answers_and_is_not_run_twice(base: Path, data: Path, tmp_path: Path) -> None:
    model = RecipeRun(recipe(base), data, tmp_path).run()
    for stage in ("tower", "lexical", "text", "ideal", "answer"):
        rows = [json.loads(line) for line in (tmp_path / stage / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 2
        assert rows[-1]["loss"] > 0
    before = weights(model)
    assert read_settings(model)["budget"]["latents"] == 8
    compressor = load_compressor(model, device="cpu")
    memory = compressor.encode([TEXT])[0]
    generator = VistGenerator.from_pretrained(model / "generator", fusion=model / "fusion", device="cpu")
    prompt = PromptTemplate().build("When was it built?", [], [memory])
    assert generator.generate([prompt], max_new_tokens=4)[0].completion_tokens > 0

    logs = {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")}
    again = RecipeRun(recipe(base), data, tmp_path).run()
    assert {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")} == logs
    after = weights(again)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("thirty - eight", "thirty-eight"),
        ("st mary ' s hospital", "st mary's hospital"),
        ("6 , 400 men , 3 . 5 % of them .", "6,400 men, 3.5% of them."),
        ("on may 5 , 1867 , 200 men ( or more )", "on may 5, 1867, 200 men (or more)"),
        ("ko ##sm ##o and / or him", "kosmo and/or him"),
    ],
)
def test_answers_are_written_as_people_write(tokens: str, text: str) -> None:
    assert written_decoder().decode(tokens.split()) == text


def test_weights_of_another_recipe_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    plan = recipe(base)
    plan["stages"] = plan["stages"][1:2]
    RecipeRun(plan, data, tmp_path).run()
    other = recipe(base)
    other["resampler"]["width"] = 24
    other["stages"] = other["stages"][1:3]
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        RecipeRun(other, data, tmp_path).run()


def test_a_recipe_without_stages_or_data_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[\[stages\]\]"):
        RecipeRun(recipe(base) | {"stages": []}, data, tmp_path).run()
    plan = recipe(base)
    plan["data"]["text"] = ["missing-*.jsonl"]
    with pytest.raises(InputError, match="missing"):
        RecipeRun(plan, data, tmp_path).run()


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert {stage["name"] for stage in load_recipe("embedded")["stages"]} >= {"tower", "lexical"}
    with pytest.raises(ConfigError, match="embedded"):
        load_recipe("none-such")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = [")
    with pytest.raises(ConfigError, match="must be TOML"):
        load_recipe(broken)
