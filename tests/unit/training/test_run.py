"""A whole recipe on tiny models and a few texts: what learns, what stays, what is exported and refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPModel

from tests.support.cli import WordEmbedder
from tests.support.tiny import tiny_compressor, tiny_generator, tiny_tokenizer
from tests.support.training import (
    PVE,
    TEXT,
    log_of,
    pair_recipe,
    save_data,
    save_generator,
    save_sentence_encoder,
    save_tower,
    sentence_recipe,
    stage,
)
from vist_rag.checkpoint import load_compressor, read_settings
from vist_rag.errors import CheckpointError, ConfigError, InputError
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.pipeline import VistRAG
from vist_rag.retrieval import PassageIndex
from vist_rag.training.lexical import WordSalad
from vist_rag.training.objectives import MaskMode
from vist_rag.training.parts import train_only, written_decoder
from vist_rag.training.reading import MemoryReading
from vist_rag.training.recipe import check_recipe
from vist_rag.types import Passage

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

import vist_rag.training.run as run_module
from vist_rag.training.run import RecipeRun, texts_shown
from vist_rag.training.trainer import train_stage


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """A recipe sets them for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tower``, ``lm`` and ``base``, models as the hub has them, and ``data``."""
    directory = tmp_path_factory.mktemp("hub")
    for name, save in (
        ("tower", save_tower),
        ("lm", save_generator),
        ("base", save_sentence_encoder),
        ("data", save_data),
    ):
        (directory / name).mkdir()
        save(directory / name)
    return directory


@dataclass
class Seen:
    """The model of a stage after training, which of its weights were to learn, and which have changed."""

    model: nn.Module
    learns: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)


def run_watched(recipe: dict[str, Any], data: Path, output: Path, **options: Any) -> tuple[Path, dict[str, Seen]]:
    """Run a recipe, and watch its stages."""
    seen: dict[str, Seen] = {}

    def watched(model: nn.Module, steps: int, build: Any, directory: Path, **settings: Any) -> None:
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
        train_stage(model, steps, build, directory, **settings)
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        seen[directory.name] = Seen(model, learns, changed)
        assert learns == {name for name, weight in model.named_parameters() if weight.requires_grad}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train_stage", watched)
        return RecipeRun(recipe, data, output, **options).run(), seen


def weights(model: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.relative_to(model)}/{name}": tensor
        for file in model.rglob("*.safetensors")
        for name, tensor in load_file(str(file)).items()
    }


def answer(model: Path) -> str:
    compressor = load_compressor(model, device="cpu")
    generator = VistGenerator.from_pretrained(model / "generator", fusion=model / "fusion", device="cpu")
    prompt = PromptTemplate().build("When was it built?", [], compressor.encode([TEXT]))
    found = generator.generate([prompt], max_new_tokens=4)[0]
    assert found.completion_tokens > 0
    return found.text


# -------------------------------------------------------------------------------------------------- what comes next


@pytest.mark.parametrize("fusion", ["soft_prompt", "cross_attention"])
def test_a_pair_learns_what_comes_next(folder: Path, tmp_path: Path, fusion: str) -> None:
    recipe = pair_recipe(folder / "tower", folder / "lm", stage("lm", pve=PVE, train=["resampler", "projector"]))
    recipe["data"] = {"text": ["texts.jsonl"], "sequence": [60, 9]}
    recipe["generator"]["fusion"] = fusion
    run = RecipeRun(recipe, folder / "data", tmp_path / "look")
    compressor, generator = run.parts()
    model = run_module.reading_model(recipe["stages"][0], compressor, generator, None)
    drawn = run.examples(recipe["stages"][0], list)(random.Random(0))
    assert {(one.passages[0].text, one.target) for one in drawn} <= {(one.shown, one.told) for one in run.texts()}
    targets = model.batch(drawn, random.Random(0))["targets"]
    assert len(targets) == 2
    for one, target in zip(drawn, targets, strict=True):
        assert torch.equal(target, generator.tokenize(f" {one.target}"))  # a sequence that was cut does not end
    model_folder, seen = run_watched(recipe, folder / "data", tmp_path / "run")
    assert {name.partition(".")[0] for name in seen["lm"].changed} == {"compressor", "fusion"}
    assert "pve" in log_of(tmp_path / "run" / "lm")[-1]
    assert answer(model_folder) is not None


# ---------------------------------------------------------------------------------------------------- a pair of the hub


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Seen]]:
    """CLIP and Llama, both frozen: taught to read, to answer, and from itself."""
    stages = (
        stage("align", steps=3, pve=PVE),
        stage("qa", distractors=0.5, train=["projector"]),
        stage("distill", answers=4),
    )
    output = tmp_path_factory.mktemp("pair")
    return run_watched(pair_recipe(folder / "tower", folder / "lm", *stages), folder / "data", output)


def test_a_pair_is_trained_without_a_change_to_either(pair: tuple[Path, dict[str, Seen]], folder: Path) -> None:
    _, seen = pair
    assert list(seen) == ["align", "qa", "distill"]
    lm = AutoModelForCausalLM.from_pretrained(folder / "lm").state_dict()
    tower = CLIPModel.from_pretrained(folder / "tower").vision_model.state_dict()
    for name, one in seen.items():
        state = one.model.state_dict()
        assert {n.removeprefix("lm."): True for n in state if n.startswith("lm.")}.keys() == lm.keys()
        assert all(torch.equal(state[f"lm.{n}"], tensor) for n, tensor in lm.items()), name
        ours = {n.rpartition("vision_model.")[2]: t for n, t in state.items() if n.startswith("compressor.tower.")}
        ours = {n.removeprefix("compressor.tower.model."): t for n, t in ours.items()}
        assert ours.keys() <= tower.keys()
        assert len(ours) > 10
        assert all(torch.equal(tensor, tower[n]) for n, tensor in ours.items()), name
        parts = ("fusion.",) if name == "qa" else ("fusion.", "compressor.resampler.")
        assert one.learns == {n for n, _ in one.model.named_parameters() if n.startswith(parts)}
        assert one.changed <= one.learns
        assert {n for n in one.learns if n.endswith("weight")} <= one.changed


def test_a_pair_is_stored_as_what_was_trained_and_two_references(
    pair: tuple[Path, dict[str, Seen]], folder: Path
) -> None:
    model, seen = pair
    stored = weights(model)
    assert {name.partition("/")[0] for name in stored} == {"compressor", "fusion"}
    assert not any("tower" in name for name in stored)
    config = json.loads((model / "compressor" / "config.json").read_text())
    reference = json.loads((model / "generator" / "reference.json").read_text())
    assert (config["tower_reference"]["id"], reference["id"]) == (str(folder / "tower"), str(folder / "lm"))
    assert reference["adapter"] is False
    for name, tensor in seen["distill"].model.state_dict().items():
        if name.startswith("fusion."):
            assert torch.equal(stored[f"fusion/{name.removeprefix('fusion.')}"], tensor.bfloat16())
    # Every stage keeps what it and those before it have trained, no more.
    for name in seen:
        (*_, last) = sorted((model.parent / name).glob("checkpoint-*"))
        for directory in (last, model.parent / name / "final"):
            kept = load_file(directory / "model.safetensors")
            assert kept.keys() == seen["align"].learns


def test_a_pair_answers(pair: tuple[Path, dict[str, Seen]], tmp_path: Path) -> None:
    model, _ = pair
    answer(model)
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index:
        index.add([Passage(TEXT), Passage("the old question and its answer")])
        rag = VistRAG.from_pretrained(model, index, device="cpu")
        assert rag.budget.k_memory == 1
        told = rag.answer("When was the old bridge built?")
        assert told.usage.completion_tokens > 0


def test_every_stage_logs_its_figures(pair: tuple[Path, dict[str, Seen]]) -> None:
    output = pair[0].parent
    for name, figure in (("align", "pve"), ("qa", "token_accuracy"), ("distill", "believed")):
        rows = log_of(output / name)
        assert rows[-1]["step"] == (3 if name == "align" else 2)
        assert rows[-1]["loss"] > 0
        assert figure in rows[-1]
        assert rows[-1]["grad_norm"] > 0
    assert "believed" not in log_of(output / "qa")[-1]
    assert (output / "data" / "token_counts.safetensors").is_file()


def test_a_generator_teaches_itself_with_its_own_answers(pair: tuple[Path, dict[str, Seen]]) -> None:
    rows = [json.loads(line) for line in (pair[0].parent / "data" / "answers-distill.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert len({row["question"] for row in rows}) == 4  # drawn from the questions there are
    assert all(row["answers"] != ["1867"] for row in rows)


def test_a_mask_may_be_all_that_the_objective_knows(folder: Path) -> None:
    for mode in get_args(MaskMode):
        check_recipe(pair_recipe(folder, folder, stage("align", pve=PVE | {"mask": mode})))


# ----------------------------------------------------------------------------------------------------------- adapters


def test_adapters_learn_in_the_stage_that_names_them(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters need the extra 'train'")
    recipe = pair_recipe(
        folder / "tower",
        folder / "lm",
        stage("align", train=["resampler", "projector", "lora"], raw=0.3),
        # Layers are computed again with adapters that the teacher goes without.
        stage("distill", trainer={"gradient_checkpointing": True}),
        data={"text": ["texts.jsonl"], "questions": {"questions.jsonl": 1.0}},
    )
    recipe["generator"]["lora"] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model, seen = run_watched(recipe, folder / "data", tmp_path)
    of_lm = {name for name in seen["align"].changed if name.startswith("lm.")}
    assert of_lm == {name for name, _ in seen["align"].model.named_parameters() if "lora_" in name}
    assert not any("lora_" in name for name in seen["distill"].learns | seen["distill"].changed)
    assert all(weight.grad is None for n, weight in seen["distill"].model.named_parameters() if "lora_" in n)
    stored = weights(model)
    adapter = {name: tensor for name, tensor in stored.items() if name.startswith("generator/")}
    assert all(name.startswith("generator/adapter/") and "lora_" in name for name in adapter)
    assert len(adapter) == len(of_lm)
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert json.loads((model / "generator" / "reference.json").read_text())["adapter"] is True
    answer(model)


# --------------------------------------------------------------------------------------------- from a sentence encoder


def sentence(base: Path, **tables: Any) -> dict[str, Any]:
    tasks = {"answer": {"weight": 0.5, "words": [6, 20]}, "continue": {"weight": 0.5, "words": [6, 20]}}
    reading = {"tasks": tasks, "train": ["generator", "boundaries"], "pretrained_rate": 0.25}
    return sentence_recipe(
        base,
        stage("tower"),
        stage("lexical", train=["tower", "resampler", "projector"], reading=True, salad=0.5, pve=PVE),
        stage("qa", raw=1.0, **reading) | {"name": "text"},
        stage("distill", ideal=1.0, slips=0.1, states=1.0, **reading) | {"name": "ideal"},
        stage("distill", states=1.0, **reading),
        **tables,
    )


def test_a_recipe_makes_a_checkpoint_that_answers_and_is_not_run_twice(folder: Path, tmp_path: Path) -> None:
    model, seen = run_watched(sentence(folder / "base"), folder / "data", tmp_path)
    for name in ("tower", "lexical", "text", "ideal", "distill"):
        row = log_of(tmp_path / name)[-1]
        assert row["step"] == 2
        assert row["loss"] > 0
    assert {"character_accuracy", "pve", "salience_error"} <= log_of(tmp_path / "lexical")[-1].keys()
    assert {"apart", "believed"} <= log_of(tmp_path / "ideal")[-1].keys()
    assert any(name.startswith("compressor.tower.") for name in seen["lexical"].changed)
    for name in ("text", "ideal", "distill"):
        assert {n.partition(".")[0] for n in seen[name].changed} <= {"lm", "fusion"}
        assert "lm.bert.embeddings.word_embeddings.weight" not in seen[name].changed
    # What earlier stages taught is in the model, though later ones froze it.
    stored, last = weights(model), seen["distill"].model.state_dict()
    for part in ("resampler.project.weight", "tower.model.embeddings.position_embeddings"):
        assert torch.equal(stored[f"compressor/{part}"], last[f"compressor.{part}"].bfloat16())
    assert read_settings(model)["budget"]["latents"] == 8
    answer(model)

    logs = {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")}
    again = RecipeRun(sentence(folder / "base"), folder / "data", tmp_path).run()
    assert {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")} == logs
    after = weights(again)
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], stored[name]) for name in stored)


def test_what_memory_means_learns_and_what_it_spells_stays(folder: Path, tmp_path: Path) -> None:
    recipe = sentence_recipe(
        folder / "base",
        stage("lexical", train=["resampler", "projector"]),
        stage("distill", train=["meaning", "packer"]),
    )
    recipe["resampler"]["spelling_width"] = 8
    recipe["generator"] |= {"spelling": 20, "packer_width": 8}
    model, seen = run_watched(recipe, folder / "data", tmp_path)
    assert not any(n.removeprefix("fusion.").startswith(("boundaries", "packer")) for n in seen["lexical"].learns)
    spelling = {n for n, _ in seen["distill"].model.named_parameters() if "spell" in n or "norm_in" in n}
    assert {n.split(".")[-2] for n in spelling if "resampler" in n} == {"norm_in", "project_spelling"}
    assert not spelling & seen["distill"].learns
    assert {"compressor.resampler.latents", "fusion.projector.1.weight", "fusion.packer.write.weight"} <= (
        seen["distill"].changed
    )
    answer(model)


def test_a_part_that_is_named_beside_a_smaller_one_learns_whole() -> None:
    model = MemoryReading(tiny_compressor(spelling_width=8), tiny_generator(memory_width=24))
    train_only(model, ("resampler", "meaning"))
    assert all(weight.requires_grad for weight in model.compressor.resampler.parameters())


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


# ------------------------------------------------------------------------------------------------- evaluated, refused


def test_a_stage_that_reads_is_evaluated_and_its_best_weights_go_on(folder: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(folder / "tower", folder / "lm", stage("align", steps=4), stage("qa"))
    recipe["evaluation"] = {"every": 1, "metric": "f1", "block": {"task": "qa"}}
    judged: dict[str, Tensor] = {}

    def judge(compressor: Any, generator: Any, folder: Path) -> dict[str, float]:
        assert not compressor.training
        assert not generator.model.training
        assert not folder.exists()  # nothing of another evaluation
        folder.mkdir(parents=True)
        judged[f"{folder.parts[-3]} {folder.name}"] = generator.fusion.boundaries.detach().clone()
        return {"em": 0.0, "f1": 0.9 if len(judged) in (2, 5) else 0.1}

    (tmp_path / "align" / "evaluation" / "step-1").mkdir(parents=True)  # of a run that was killed
    RecipeRun(recipe, folder / "data", tmp_path, judge=judge).run()
    assert list(judged) == [f"align step-{n}" for n in (1, 2, 3, 4)] + ["qa step-1", "qa step-2"]
    for name, best in (("align", "align step-2"), ("qa", "qa step-1")):
        stored = load_file(tmp_path / name / "final" / "model.safetensors")
        assert torch.equal(stored["fusion.boundaries"], judged[best])
    fusion = load_file(tmp_path / "model" / "fusion" / "model.safetensors")
    assert torch.equal(fusion["boundaries"], judged["qa step-1"].bfloat16())


def test_weights_of_another_recipe_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(folder / "tower", folder / "lm", stage("align"))
    RecipeRun(recipe, folder / "data", tmp_path).run()
    other = pair_recipe(folder / "tower", folder / "lm", stage("align"), stage("qa"))
    other["resampler"]["width"] = 24
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        RecipeRun(other, folder / "data", tmp_path).run()


def test_what_cannot_be_run_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(folder / "tower", folder / "lm")
    with pytest.raises(ConfigError, match=r"\[\[stages\]\]"):
        RecipeRun(recipe, folder / "data", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    recipe = pair_recipe(folder / "tower", folder / "lm", stage("align"))
    recipe["data"]["text"] = ["missing-*.jsonl"]
    with pytest.raises(InputError, match="missing"):
        RecipeRun(recipe, folder / "data", tmp_path).run()
    recipe = pair_recipe(folder / "tower", folder / "lm", stage("align", trainer={"bf61": True}))
    with pytest.raises(ConfigError, match=r"TrainingArguments .*bf61"):
        RecipeRun(recipe, folder / "data", tmp_path).run()
    recipe["generator"]["lora"] = {"rank": 4}
    with pytest.raises(ConfigError, match=r"LoraConfig .*rank"):
        RecipeRun(recipe, folder / "data", tmp_path).run()


def test_texts_of_a_lexical_batch_are_joined_and_salted_as_the_stage_says() -> None:
    batch = ["one", "two", "three", "four"]
    assert texts_shown({}, batch, None, random.Random(0)) == batch
    assert texts_shown({"joined": 3}, batch, None, random.Random(0)) == ["one | two | three", "four"]
    salad = WordSalad(["the sea " * 3], tiny_tokenizer().backend_tokenizer)
    shown = texts_shown({"salad": 0.5}, batch * 20, salad, random.Random(0))
    assert 20 < sum(text not in batch for text in shown) < 60
    assert texts_shown({"salad": 1.0}, batch, salad, random.Random(0)) != batch
