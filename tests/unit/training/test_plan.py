"""A plan against what training then does: the same weights, the same batches, the same bytes on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

import vist_rag.training.plan as plan_module
import vist_rag.training.run as run_module
from tests.support.causal import causal_generator
from tests.support.tiny import BERT_SIZES, TOWER, save_tiny_checkpoint, tiny_tokenizer
from vist_rag.errors import CheckpointError, ConfigError, InputError
from vist_rag.training.baselines import recipe_runs
from vist_rag.training.plan import RunPlan, plan_run, plan_runs
from vist_rag.training.reading import MemoryReading

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

RATE = 2e9
TEXT = (
    "The old bridge was built in 1867 by Marie Curie. The river runs from a lake to the sea. The question is who built "
    "the old bridge, and the answer is a document of the lake."
)
STEPS = 3
MEASURE = plan_module._matmul_rate


@pytest.fixture(scope="module", autouse=True)
def _rate() -> Any:
    """No second is spent on measuring, but where measuring is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_matmul_rate", lambda *_: RATE)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    texts = [{"title": f"Bridge {i}", "text": TEXT[: 60 + 5 * i]} for i in range(20)]
    rows = [{"question": "When was it built?", "answers": ["1867"], "title": "Bridge", "context": TEXT}] * 4
    for name, lines in (("texts.jsonl", texts), ("questions.jsonl", rows)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder, a CLIP of which the tower is a part, a causal LM and a finished checkpoint."""
    directory = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT_SIZES)).save_pretrained(directory / "base")
    tokenizer.backend_tokenizer.save(str(directory / "base" / "tokenizer.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": 99, "projection_dim": 8},
            vision_config={**sizes, "image_size": 224, "patch_size": 14, "projection_dim": 8},
            projection_dim=8,
        )
    ).save_pretrained(directory / "clip")
    generator = causal_generator("qwen3")
    generator.model.save_pretrained(directory / "lm")
    generator.tokenizer.save_pretrained(directory / "lm")
    save_tiny_checkpoint(directory / "start")
    return directory


def stage(name: str, kind: str, **settings: Any) -> dict[str, Any]:
    size = {"batch": 3} if kind in ("align", "qa", "distill", "lm") else {"patches": 60}
    return {"name": name, "kind": kind, "steps": STEPS, "learning_rate": 1e-3, **size, **settings}


TASKS = {"answer": {"weight": 0.5, "words": [6, 20]}, "continue": {"weight": 0.5, "words": [8, 20]}}
PVE = {"weight": 0.1, "mask": "frequency"}
RESAMPLER = {"width": 16, "heads": 2, "layers": 1, "tower_layers": [1, -1], "latents_per_page": 64}


def embedded(models: Path) -> dict[str, Any]:
    learns = {"train": ["projector", "generator"], "tasks": TASKS, "rates": {"1.0": 0.5, "0.5": 0.5}}
    return {
        "tower": TOWER,
        "resampler": {**RESAMPLER, "salience": True, "spelling_width": 8},
        "generator": {"base": str(models / "base"), "vocabulary": 70, "projector_width": 24, "spelling": 4},
        "stages": [
            stage("tower", "tower"),
            stage("lexical", "lexical", train=["tower", "resampler", "projector"], reading=True, joined=2, pve=PVE),
            stage("text", "qa", raw=1.0, **learns),
            stage("ideal", "qa", ideal=1.0, slips=0.1, distil=1.0, **learns),
            stage("memory", "distill", states=1.0, distractors=0.5, **learns),
        ],
    }


def hub(models: Path) -> dict[str, Any]:
    """A pretrained pair with LoRA, as of the hub."""
    return {
        "tower": {"pretrained": str(models / "clip")},
        "resampler": RESAMPLER,
        "generator": {
            "pretrained": str(models / "lm"),
            "projector_width": 24,
            "dtype": "bfloat16",
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        },
        "trainer": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        "stages": [
            stage("align", "align", pve=PVE),
            stage("distill", "distill", train=["projector", "lora"], tasks=TASKS),
        ],
    }


def continued(models: Path) -> dict[str, Any]:
    stages = [
        stage("lexical", "lexical", salad=0.5),
        stage("qa", "qa", train=["boundaries", "generator", "embeddings"]),
    ]
    return {"start": {"checkpoint": str(models / "start")}, "stages": stages}


def sequences(models: Path) -> dict[str, Any]:
    """The paper's setting: what comes next, from plain text."""
    pair = hub(models)
    del pair["generator"]["lora"]
    data = {"text": ["texts.jsonl"], "sequence": [60, 12]}
    return {**pair, "data": data, "stages": [stage("lm", "lm", pve=PVE)]}


RECIPES = {"embedded": embedded, "hub": hub, "continued": continued, "sequences": sequences}


def planned(recipe: Mapping[str, Any], data: Path, output: Path, **options: Any) -> RunPlan:
    (run,) = recipe_runs(recipe, data, output)
    return plan_run(run, **options)


def with_data(recipe: dict[str, Any]) -> dict[str, Any]:
    data = {"text": ["texts.jsonl"], "questions": {"questions.jsonl": 1.0}}
    return {"seed": 3, "data": data, "probe": {"measure": False}, **recipe}


@dataclass
class Trained:
    """What a run gave to the stages that it trained, and what was left on disk."""

    recipe: dict[str, Any]
    output: Path
    models: dict[str, nn.Module] = field(default_factory=dict)
    trains: dict[str, set[str]] = field(default_factory=dict)
    batches: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@pytest.fixture(scope="module", params=RECIPES)
def trained(
    request: pytest.FixtureRequest, models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    recipe = with_data(RECIPES[request.param](models))
    found = Trained(recipe, tmp_path_factory.mktemp("run"))
    train_stage = run_module.train_stage

    def noted(model: nn.Module, steps: int, build: Any, directory: Path, **options: Any) -> None:
        name, count = directory.name, steps * recipe.get("trainer", {}).get("gradient_accumulation_steps", 1)
        found.models[name] = model
        found.trains[name] = {n for n, weight in model.named_parameters() if weight.requires_grad}
        found.batches[name] = [build(i) for i in range(count)]
        train_stage(model, steps, build, directory, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train_stage", noted)
        (run,) = recipe_runs(recipe, data, found.output)
        run.run()
    return found


@pytest.fixture(scope="module")
def plan(trained: Trained, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return planned(trained.recipe, data, tmp_path_factory.mktemp("plan"), draws=100)


def numel(model: nn.Module, names: set[str], *beginnings: str) -> int:
    return sum(w.numel() for n, w in model.named_parameters() if n in names and n.startswith(beginnings))


def test_parameters_are_those_that_are_trained_and_those_that_are_not(plan: RunPlan, trained: Trained) -> None:
    assert [one.name for one in plan.stages] == list(trained.models)
    for one in plan.stages:
        model, trains = trained.models[one.name], trained.trains[one.name]
        everything = {name for name, _ in model.named_parameters()}
        for names, way in ((trains, "trained"), (everything - trains, "frozen")):
            counts = {part: getattr(both, way) for part, both in one.parameters.items()}
            lora = {name for name in names if "lora_" in name}
            tower = numel(model, names, "compressor.tower.", "tower.")
            assert counts.get("tower", 0) == tower
            assert counts.get("resampler", 0) == numel(model, names, "compressor.resampler.")
            assert counts.get("projector", 0) == numel(model, names, "fusion.")
            assert counts.get("lora", 0) == numel(model, lora, "lm.")
            assert counts.get("generator", 0) == numel(model, names - lora, "lm.")
            assert sum(counts.values()) == numel(model, names, "")


def test_bytes_of_weights_gradients_and_states_are_those_of_training(plan: RunPlan, trained: Trained) -> None:
    for one in plan.stages:
        model, trains = trained.models[one.name], trained.trains[one.name]
        learnt = sum(w.numel() * w.element_size() for n, w in model.named_parameters() if n in trains)
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        if isinstance(model, MemoryReading) and model._teacher and model._teacher[0] is not model.lm:
            weights += sum(t.numel() * t.element_size() for t in model._teacher[0].parameters())
        assert one.memory.gradients == learnt
        assert one.memory.optimizer == 2 * learnt
        # The counts that a run has of its words are not made for a plan.
        assert one.memory.weights == pytest.approx(weights, rel=0.01)
        assert one.memory.total == one.memory.weights + 3 * learnt + one.memory.activations
        assert one.memory.activations > 0


def test_a_checkpoint_has_the_bytes_that_were_planned(plan: RunPlan, trained: Trained) -> None:
    for one in plan.stages:
        directory = trained.output / one.name / f"checkpoint-{STEPS}"
        stored = sum(t.numel() * t.element_size() for t in load_file(directory / "model.safetensors").values())
        states = torch.load(directory / "optimizer.pt", weights_only=True)["state"].values()
        stored += sum(t.numel() * t.element_size() for state in states for n, t in state.items() if n != "step")
        # Weights that no gradient reached have no states.
        assert 0.95 * one.checkpoint_bytes - 12_000 <= stored <= one.checkpoint_bytes


def test_work_is_that_of_the_batches_that_training_takes(plan: RunPlan, trained: Trained) -> None:
    for one in plan.stages:
        batches = trained.batches[one.name]
        assert one.steps == STEPS
        assert one.total.batches == len(batches)
        assert one.step.batches == len(batches) / STEPS
        assert one.total.pages == sum(len(batch["pixel_values"]) for batch in batches)
        if one.kind in ("tower", "lexical"):
            continue
        assert one.total.examples == sum(len(batch["targets"]) for batch in batches)
        targets = sum(len(target) for batch in batches for target in batch["targets"])
        segments = [part for batch in batches for row in batch["segments"] for part in row]
        assert one.total.target_tokens == targets
        assert one.total.text_tokens == sum(len(part) for part in segments if not isinstance(part, int))
        memory = sum(int(at[-1]) + 3 for batch in batches for at in batch["places"])
        assert one.total.memory_tokens == memory
        assert one.step.memory_tokens == pytest.approx(memory / STEPS)


def test_time_is_flops_over_what_is_done_in_it(plan: RunPlan) -> None:
    for one in plan.stages:
        flops = sum(part.forward + part.backward for part in one.flops.values())
        assert one.all_flops.total == flops
        assert (one.speed.flops_per_second, one.speed.utilisation, one.speed.processes) == (RATE, 0.4, 1)
        assert one.hours == pytest.approx(flops / (RATE * 0.4) / 3600)
    assert plan.hours == sum(one.hours for one in plan.stages)


def test_a_plan_is_json(plan: RunPlan) -> None:
    told = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert [one["name"] for one in told["stages"]] == [one.name for one in plan.stages]
    assert told["total"]["hours"] == plan.hours
    assert told["total"]["steps"] == STEPS * len(plan.stages)
    first, whole = told["stages"][0], plan.stages[0]
    assert first["parameters"]["tower"] == {
        "trained": whole.parameters["tower"].trained,
        "frozen": whole.parameters["tower"].frozen,
    }
    assert first["all_flops"] == {"forward": whole.all_flops.forward, "backward": whole.all_flops.backward}
    assert first["memory"]["total"] == whole.memory.total
    assert told["total"]["work"]["pages"] == sum(one["total"]["pages"] for one in told["stages"])


# ------------------------------------------------------------------------------------------------------------- a plan


def test_few_batches_tell_about_all(models: Path, data: Path, tmp_path: Path) -> None:
    recipe = with_data(hub(models))
    for one in recipe["stages"]:
        one["steps"] = 40
    few = planned(recipe, data, tmp_path / "few", draws=16)
    all_of_them = planned(recipe, data, tmp_path / "all", draws=1000)
    for some, every in zip(few.stages, all_of_them.stages, strict=True):
        assert some.total.examples == every.total.examples == 40 * 2 * 3
        assert some.all_flops.total == pytest.approx(every.all_flops.total, rel=0.2)
        assert some.total.text_tokens == pytest.approx(every.total.text_tokens, rel=0.2)


def test_nothing_is_read_of_pretrained_models_but_config_and_tokenizer(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the hub: what is asked for is downloaded, and no more."""
    hub_folder, asked = tmp_path / "hub", []
    for name in ("clip", "lm"):
        shutil.copytree(models / name, hub_folder / name, ignore=shutil.ignore_patterns("*.safetensors"))

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, allow_patterns))
        return str(hub_folder / name.removeprefix("someone/"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    recipe = with_data(hub(models))
    expected = planned(recipe, data, tmp_path / "local")
    recipe["tower"]["pretrained"], recipe["generator"]["pretrained"] = "someone/clip", "someone/lm"
    assert planned(recipe, data, tmp_path / "remote") == expected
    assert {name for name, _ in asked} == {"someone/clip", "someone/lm"}
    assert not any("safetensors" in pattern for _, patterns in asked for pattern in patterns)


def test_the_generator_answers_before_the_stage(models: Path, data: Path, tmp_path: Path) -> None:
    recipe = with_data(hub(models))
    recipe["stages"] = [stage("distill", "distill", answers=1000)]
    labelled = planned(recipe, data, tmp_path / "labelled").stages[0]
    del recipe["data"]["questions"]
    unlabelled = planned(recipe, data, tmp_path / "unlabelled").stages[0]
    lm = labelled.parameters["generator"].frozen
    for one, rows, calls in ((labelled, 4, 1), (unlabelled, 20, 2)):  # no more than there are; it also asks
        flops = one.flops["answers"]
        assert flops.backward == 0
        tokens = flops.forward / (2 * lm * rows * calls)
        assert 48 < tokens < 500  # as much as it may write, after the passage
        assert one.hours == pytest.approx(one.all_flops.total / (RATE * 0.4) / 3600)
        assert one.total.target_tokens > 0


def test_processes_share_the_work(models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_data(hub(models))
    recipe["stages"] = recipe["stages"][:1]
    alone = planned(recipe, data, tmp_path / "alone", draws=1000).stages[0]
    monkeypatch.setattr(plan_module, "processes", lambda: 4)
    monkeypatch.setattr(run_module, "processes", lambda: 4)
    four = planned(recipe, data, tmp_path / "four", draws=1000).stages[0]
    assert four.total.batches == 4 * alone.total.batches
    assert four.all_flops.total == pytest.approx(4 * alone.all_flops.total, rel=0.4)
    assert four.hours == pytest.approx(four.all_flops.total / 4 / (RATE * 0.4) / 3600)


@pytest.mark.parametrize(
    ("trainer", "dtype"), [({}, "bfloat16"), ({"fp16": True}, "float16"), ({"bf16": True}, "bfloat16")]
)
def test_precision_is_that_of_training(
    models: Path, data: Path, tmp_path: Path, trainer: dict[str, Any], dtype: str
) -> None:
    recipe = with_data(hub(models))
    recipe["stages"], recipe["trainer"] = recipe["stages"][:1], trainer
    assert planned(recipe, data, tmp_path).stages[0].speed.dtype == dtype


def test_the_rate_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = MEASURE("cpu", torch.float32, 0.05)
    assert 1e8 < rate < 1e14
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    assert MEASURE("cpu", torch.float32, 0.05) == rate


@pytest.mark.gpu
def test_the_rate_of_a_gpu_is_measured() -> None:
    assert MEASURE("cuda", torch.bfloat16, 0.05) > 1e12


def test_runs_that_compare_share_their_data(models: Path, data: Path, tmp_path: Path) -> None:
    sizes = {"latents_per_page": 64, "width": 16, "heads": 2, "layers": 1}
    recipe = with_data(continued(models)) | {
        "generator": {"base": str(models / "base")},
        "compressor": {"kind": "vist", "resampler": sizes},
        "ablations": {"base": {}, "fewer": {"set": ["compressor.resampler.latents_per_page=32"]}},
    }
    recipe["stages"] = recipe["stages"][:1]
    base, fewer = plan_runs(recipe_runs(recipe, data, tmp_path))
    assert (base.name, fewer.name) == ("base", "fewer")
    assert fewer.stages[0].total.memory_tokens < base.stages[0].total.memory_tokens
    assert len(list(tmp_path.rglob("rows.jsonl"))) == 1


# -------------------------------------------------------------------------------------------------------------- errors


def test_bad_rows_are_refused_as_in_training(models: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "texts.jsonl").write_text((data / "texts.jsonl").read_text() + '{"title": "no text"}\n')
    recipe = with_data(hub(models))
    recipe["stages"] = recipe["stages"][:1]
    (run,) = recipe_runs(recipe, tmp_path / "bad", tmp_path / "train")
    with pytest.raises(InputError) as in_training:
        run.run()
    with pytest.raises(InputError) as in_plan:
        planned(recipe, tmp_path / "bad", tmp_path / "plan")
    assert str(in_plan.value) == str(in_training.value)


@pytest.mark.parametrize("part", ["tower", "generator"])
def test_a_model_that_is_none_is_refused(models: Path, data: Path, tmp_path: Path, part: str) -> None:
    recipe = with_data(hub(models))
    recipe[part]["pretrained"] = str(data)
    with pytest.raises(CheckpointError, match=f"{part} .* cannot be loaded"):
        planned(recipe, data, tmp_path)


def test_parts_that_are_not_there_are_refused(models: Path, data: Path, tmp_path: Path) -> None:
    recipe = with_data(hub(models))
    del recipe["generator"]["lora"]
    with pytest.raises(ConfigError, match="lora"):
        planned(recipe, data, tmp_path)


def test_examples_that_do_not_fit_are_refused(models: Path, data: Path, tmp_path: Path) -> None:
    recipe = with_data(hub(models))
    config = json.loads((models / "lm" / "config.json").read_text())
    shutil.copytree(models / "lm", tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 30}))
    recipe["generator"]["pretrained"] = str(tmp_path / "lm")
    with pytest.raises(ConfigError, match="must fit 30 positions"):
        planned(recipe, data, tmp_path / "plan")
