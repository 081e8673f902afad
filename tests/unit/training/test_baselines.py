"""Baselines in miniature: four compressors learn from one start, one generator and the same batches of text."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from tests.support.tiny import BERT_SIZES, save_tiny_checkpoint, tiny_tokenizer
from tests.support.training import log_of, sentence_recipe, stage
from vist_rag.checkpoint import load_compressor, read_settings
from vist_rag.compression import TextCompressor, VistCompressor
from vist_rag.compression.resampler import PerceiverResampler, WindowPooling
from vist_rag.compression.text import DIGITS
from vist_rag.compression.vision import VisionTower
from vist_rag.errors import ConfigError, IncompatibleMemoryError
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.training.lexical import lexical_batch
from vist_rag.training.recipe import KINDS, load_recipe

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

import vist_rag.training.run as run_module
from vist_rag.training.baselines import BaselineRun, ContinuedRun, recipe_runs
from vist_rag.training.run import RecipeRun
from vist_rag.training.trainer import train_stage

TEXT = "The old bridge was built in 1867 by Marie Curie. The river runs from a lake to the sea."
STEPS = 3
COMPRESSORS: dict[str, Any] = {
    "vist": {"resampler": {"latents_per_page": 32, "width": 16, "heads": 2, "layers": 1, "tower_layers": [1, -1]}},
    "text_encoder": {
        "window": 3,
        "resampler": {"latents_per_page": 8, "width": 16, "heads": 2, "layers": 1, "tower_layers": [0, -1]},
    },
    "text_encoder_flat": {"window": 1, "resampler": {"latents_per_page": 24, "width": 16, "tower_layers": [0, -1]}},
    "mean_pool": {"window": 3, "resampler": {"latents_per_page": 8, "width": 16, "tower_layers": [0]}},
}
for _settings in COMPRESSORS.values():
    _settings["resampler"]["salience"] = True
COMPRESSORS["vist"]["resampler"]["spelling_width"] = 8  # the checkpoint that all start from has none


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder in the layout of a hub's, whose tokenizer gives every piece another id than the generator's.

    As the pruned vocabulary of the embedded model does.
    """
    directory = tmp_path_factory.mktemp("base")
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    pieces = ["[unused]", *reversed(state["model"]["vocab"])]
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    state["post_processor"], state["added_tokens"] = None, []
    (directory / "tokenizer.json").write_text(json.dumps(state))
    torch.manual_seed(9)
    BertModel(BertConfig(vocab_size=len(pieces), **BERT_SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    ends = ("the sea", "a river", "the old lake", "the bridge of the river", "marie")
    rows = [{"title": f"Bridge {i}", "text": f"{TEXT} {ends[i % len(ends)]}" * (1 + i % 3)} for i in range(40)]
    (directory / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def recipe(start: Path, base: Path) -> dict[str, Any]:
    stage = {"name": "lexical", "kind": "lexical", "steps": STEPS, "salad": 0.5, "patches": 100, "learning_rate": 1e-3}
    return {
        "seed": 0,
        "probe": {"measure": False},
        "start": {"checkpoint": str(start)},
        "generator": {"base": str(base)},
        "compressors": json.loads(json.dumps(COMPRESSORS)),
        "data": {"text": ["texts.jsonl"]},
        "stages": [stage],
        "settings": {"max_new_tokens": 4, "budget": {"k_raw": 0, "k_memory": 1, "latents": 8}},
    }


@pytest.fixture(scope="module")
def runs(
    start: Path, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, list[list[str]]]]:
    """All four, run; and the texts of each step of each, in the order in which they were made into batches."""
    seen: dict[str, list[list[str]]] = {name: [] for name in COMPRESSORS}
    models: dict[str, Path] = {}
    for run in recipe_runs(recipe(start, base), data, tmp_path_factory.mktemp("output")):
        assert isinstance(run, BaselineRun)

        def noted(texts: list[str], *args: Any, name: str = run.output.name, **options: Any) -> dict[str, Any]:
            seen[name].append(list(texts))
            return lexical_batch(texts, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "lexical_batch", noted)
            models[run.output.name] = run.run()
    return models, seen


@pytest.fixture(params=COMPRESSORS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(runs: tuple[dict[str, Path], Any], kind: str) -> Path:
    return runs[0][kind]


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(load_file(str(directory / "model.safetensors")))


def load(model: Path) -> tuple[Any, VistGenerator]:
    generator = VistGenerator.from_pretrained(model / "generator", fusion=model / "fusion", device="cpu")
    return load_compressor(model, device="cpu"), generator


def test_every_kind_has_a_recipe_that_ships() -> None:
    shipped = load_recipe("baselines")
    assert tuple(shipped["compressors"]) == KINDS == tuple(COMPRESSORS)
    assert all(settings["resampler"]["salience"] for settings in shipped["compressors"].values())


def test_a_recipe_without_compressors_is_one_run(base: Path, data: Path, tmp_path: Path) -> None:
    plan = sentence_recipe(base, stage("qa"))
    (run,) = recipe_runs(plan, data, tmp_path)
    assert type(run) is RecipeRun
    assert run.output == tmp_path
    with pytest.raises(ConfigError, match=r"--only must name runs among none \(this recipe is one run\), got 'vist'"):
        recipe_runs(plan, data, tmp_path, only="vist")


def test_runs_are_chosen_by_name(start: Path, base: Path, data: Path, tmp_path: Path) -> None:
    plan = recipe(start, base)
    found = recipe_runs(plan, data, tmp_path, only="mean_pool,vist")
    assert [(type(run), run.output) for run in found] == [
        (BaselineRun, tmp_path / "mean_pool"),
        (BaselineRun, tmp_path / "vist"),
    ]
    with pytest.raises(ConfigError, match=r"--only must name runs among vist, text_encoder, .*, got 'qformer'"):
        recipe_runs(plan, data, tmp_path, only="vist,qformer")


def test_an_ablation_is_the_recipe_with_its_changes(start: Path, data: Path, tmp_path: Path) -> None:
    plan = continued(start) | {"ablations": {"plain": {}, "less": {"set": ["stages.align.steps=1", "seed=4"]}}}
    plain, less = recipe_runs(plan, data, tmp_path)
    assert [run.output.name for run in (plain, less)] == ["plain", "less"]
    assert [run.recipe["stages"][0]["steps"] for run in (plain, less)] == [2, 1]
    assert (plain.seed, less.seed) == (0, 4)
    assert type(less) is ContinuedRun
    with pytest.raises(ConfigError, match="did you mean steps"):
        recipe_runs(plan | {"ablations": {"wrong": {"set": ["stages.align.step=1"]}}}, data, tmp_path)


def continued(start: Path) -> dict[str, Any]:
    reading = {"train": ["resampler", "projector"], "pve": {"weight": 0.5}}
    return {
        "start": {"checkpoint": str(start)},
        "data": {"text": ["texts.jsonl"]},
        "probe": {"measure": False},
        "stages": [stage("align", **reading), stage("distill", tasks={"continue": {"weight": 1.0, "words": [6, 20]}})],
        "settings": {"max_new_tokens": 4},
    }


def test_a_checkpoint_is_taught_further(start: Path, data: Path, tmp_path: Path) -> None:
    (run,) = recipe_runs(continued(start), data, tmp_path)
    assert type(run) is ContinuedRun
    model = run.run()
    (before, generator), (after, learnt) = load(start), load(model)
    for name, tensor in before.tower.state_dict().items():
        assert torch.equal(after.tower.state_dict()[name], tensor), name
    for name, tensor in generator.model.state_dict().items():
        torch.testing.assert_close(learnt.model.state_dict()[name], tensor, rtol=0, atol=0.02)
    weight = "projector.1.weight"
    old = generator.fusion.state_dict()[weight]
    moved = learnt.fusion.state_dict()[weight]
    assert not torch.equal(moved, old)
    torch.testing.assert_close(moved, old, rtol=0.05, atol=0.02)  # from where it stood
    assert after.fingerprint != before.fingerprint
    assert learnt.fusion.config.fingerprint == after.fingerprint
    assert {"pve", "token_accuracy"} <= log_of(tmp_path / "align")[-1].keys()
    assert log_of(tmp_path / "distill")[-1]["believed"] > 0
    memory = after.encode([TEXT])[0]
    assert learnt.generate([PromptTemplate().build("When?", [], [memory])], max_new_tokens=4)[0].completion_tokens


def test_a_run_makes_a_model_that_reads_its_memories(model: Path, kind: str) -> None:
    compressor, generator = load(model)
    assert type(compressor) is (VistCompressor if kind == "vist" else TextCompressor)
    assert type(compressor.resampler) is (
        PerceiverResampler if kind in ("vist", "text_encoder") else WindowPooling  # flat: a latent a token, as it is
    )
    assert compressor.window == COMPRESSORS[kind].get("window", 8)  # 256 patches in 32 latents
    assert isinstance(compressor.tower, VisionTower) or (compressor.tower.model is None) == (kind == "mean_pool")
    memory = compressor.encode([TEXT])[0]
    prompt = PromptTemplate().build("When was it built?", [], [memory])
    answer = generator.generate([prompt], max_new_tokens=4)[0]
    assert answer.prompt_tokens == generator.prompt_length(prompt)
    assert answer.completion_tokens > 0
    assert read_settings(model)["budget"] == {"k_raw": 0, "k_memory": 1, "latents": 8}
    rows = [json.loads(line) for line in (model.parent / "lexical" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == STEPS
    assert rows[-1]["loss"] > 0
    assert rows[-1]["salience_error"] > 0


def test_a_fusion_is_bound_to_its_own_compressor(runs: tuple[dict[str, Path], Any], start: Path) -> None:
    loaded = {name: load(model) for name, model in runs[0].items()}
    prints = {name: compressor.fingerprint for name, (compressor, _) in loaded.items()}
    assert {name: generator.fusion.config.fingerprint for name, (_, generator) in loaded.items()} == prints
    assert len({*prints.values(), load(start)[0].fingerprint}) == 5
    foreign = loaded["mean_pool"][0].encode([TEXT])[0]
    with pytest.raises(IncompatibleMemoryError):
        loaded["text_encoder"][1].generate([PromptTemplate().build("When?", [], [foreign])])


def test_the_generator_stays_as_it_is(model: Path, start: Path) -> None:
    before, after = weights(start / "generator"), weights(model / "generator")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    ours, theirs = (json.loads((d / "generator" / "config.json").read_text()) for d in (model, start))
    assert ours | {"dtype": None} == theirs | {"dtype": None}
    ours, theirs = ((d / "generator" / "tokenizer.json").read_bytes() for d in (model, start))
    assert ours == theirs
    one, other = load(start)[1], load(model)[1]
    prompt = PromptTemplate().build("When was the bridge built?", [], [])
    ids = [torch.tensor([5, 9, 11]), torch.tensor([7])]
    assert all(torch.equal(a, b) for a, b in zip(one.score(prompt, ids), other.score(prompt, ids), strict=True))


def test_all_kinds_learn_from_the_very_same_texts(runs: tuple[Any, dict[str, list[list[str]]]]) -> None:
    seen = runs[1]
    assert [len(batches) for batches in seen.values()] == [STEPS] * 4
    assert all(batches == seen["vist"] for batches in seen.values())
    assert len({tuple(batch) for batch in seen["vist"]}) == STEPS
    flat = [text for batch in seen["vist"] for text in batch]
    assert 0 < sum(text.startswith("Bridge") for text in flat) < len(flat)  # running texts, and salads


def test_what_learns_has_moved_and_what_is_frozen_has_not(
    model: Path, kind: str, start: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    plan = recipe(start, base)
    compressor, generator = next(run for run in recipe_runs(plan, data, tmp_path) if run.output.name == kind).parts()
    trained, learnt = load(model)
    fresh = {n: t.bfloat16().float() if t.is_floating_point() else t for n, t in compressor.state_dict().items()}
    moved = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved
    assert all(name.startswith("resampler.") for name in moved)
    weight = "projector.1.weight"
    assert not torch.equal(
        learnt.fusion.state_dict()[weight], generator.fusion.state_dict()[weight].to(torch.bfloat16).float()
    )
    assert torch.equal(learnt.fusion.boundaries, load(start)[1].fusion.boundaries)  # the generator knows these


def test_fusions_differ_only_in_what_they_are_told(runs: tuple[dict[str, Path], Any], start: Path) -> None:
    old = load(start)[1].fusion.config
    for name, model in runs[0].items():
        compressor, generator = load(model)
        config = generator.fusion.config
        assert config.memory_width == compressor.memory_width
        assert (config.generator_width, config.hidden_width) == (old.generator_width, old.hidden_width)
        window = COMPRESSORS[name].get("window", 0)
        assert (config.tokens, config.spelling_width) == (window, 8 if name == "vist" else window * DIGITS)
        assert config.spelling == (old.spelling if name == "vist" else 0)


def test_the_text_encoder_has_the_base_models_layers_and_the_generators_vocabulary(
    runs: tuple[dict[str, Path], Any], base: Path
) -> None:
    source, full = weights(base), Tokenizer.from_file(str(base / "tokenizer.json"))
    own = tiny_tokenizer().get_vocab()
    words = "embeddings.word_embeddings.weight"
    for name in ("text_encoder", "text_encoder_flat"):
        compressor, _ = load(runs[0][name])
        state = compressor.tower.model.state_dict()
        assert state[words].shape[0] == len(own)
        assert any(full.token_to_id(piece) != i for piece, i in own.items())
        for piece, i in own.items():
            assert torch.equal(state[words][i], source[words][full.token_to_id(piece)].bfloat16().float()), piece
        for other in state.keys() - {words}:
            assert torch.equal(state[other], source[other].bfloat16().float()), other
        assert compressor.config.begin_token_id == own["[CLS]"]


def test_the_other_towers_are_those_of_the_start(runs: tuple[dict[str, Path], Any], start: Path) -> None:
    shipped, generator = load(start)
    pooled, _ = load(runs[0]["mean_pool"])
    words = generator.model.get_input_embeddings().weight
    assert torch.equal(pooled.tower.words.weight, words.bfloat16().float())
    again, _ = load(runs[0]["vist"])
    theirs = shipped.tower.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.tower.state_dict().items())
    assert not torch.equal(again.resampler.project.weight, shipped.resampler.project.weight)


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if kind != "vist"])  # which reads pictures
def test_tokens_of_a_memory_are_the_generators_own(runs: tuple[dict[str, Path], Any], kind: str) -> None:
    compressor, generator = load(runs[0][kind])
    memory = compressor.encode([TEXT])[0]
    shown = generator.fusion.shown(generator, memory.latents, memory.places)
    assert shown[shown >= 0].tolist() == generator.tokenize(TEXT).tolist()


def test_a_finished_run_is_not_trained_again(
    runs: tuple[dict[str, Path], Any], start: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs[0]["mean_pool"].parent, tmp_path / "mean_pool")
    final = tmp_path / "mean_pool" / "lexical" / "final" / "model.safetensors"
    log = tmp_path / "mean_pool" / "lexical" / "log.jsonl"
    before = final.stat().st_mtime_ns, log.read_text(), weights(tmp_path / "mean_pool" / "model" / "compressor")
    shutil.rmtree(tmp_path / "mean_pool" / "model")
    plan = recipe(start, base)
    plan["compressors"] = {"mean_pool": plan["compressors"]["mean_pool"]}
    (run,) = recipe_runs(plan, data, tmp_path)
    again = run.run()
    assert (final.stat().st_mtime_ns, log.read_text()) == before[:2]
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in weights(again / "compressor").items())


def test_a_compressor_is_put_beside_the_generator_of_another_start_without_training(
    runs: tuple[dict[str, Path], Any], start: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    """Compressors learn from texts alone, so that they fit each generator that keeps its input embeddings."""
    other = shutil.copytree(start, tmp_path / "other")
    generator = VistGenerator.from_pretrained(other / "generator", fusion=other / "fusion", device="cpu")
    nn.init.normal_(generator.fusion.boundaries)
    generator.fusion.save_pretrained(other / "fusion")
    shutil.copytree(runs[0]["vist"].parent, tmp_path / "vist", ignore=shutil.ignore_patterns("model"))
    plan = recipe(other, base)
    plan["compressors"] = {"vist": plan["compressors"]["vist"]}
    (run,) = recipe_runs(plan, data, tmp_path)
    compressor, generator = load(run.run())
    assert torch.equal(generator.fusion.boundaries, load(other)[1].fusion.boundaries)
    assert compressor.fingerprint == load(runs[0]["vist"])[0].fingerprint


def test_a_packer_is_added_to_a_checkpoint_and_kept_by_what_is_taught_beside(
    start: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    (run,) = recipe_runs(continued(start) | {"generator": {"packer_width": 8}}, data, tmp_path)
    compressor, generator = run.parts()
    packer = generator.fusion.packer
    assert packer is not None
    texts = load(start)[1]
    memory = compressor.encode([TEXT])[0]
    before, after = (one.fusion.read(one, memory.latents)[0] for one in (texts, generator))
    assert torch.equal(before, after)  # untaught it changes nothing
    nn.init.normal_(packer.write.weight)
    generator.fusion.save_pretrained(shutil.copytree(start, tmp_path / "packed") / "fusion")
    for one in recipe_runs(recipe(tmp_path / "packed", base), data, tmp_path):
        kept = one.parts()[1].fusion.packer
        assert kept is not None
        assert torch.equal(kept.write.weight, packer.write.weight.bfloat16().float())


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(
    start: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(start, base)
    plan["compressors"] = {"text_encoder": plan["compressors"]["text_encoder"]}
    monkeypatch.setattr(run_module, "train_stage", functools.partial(train_stage, save_every=1))
    (run,) = recipe_runs(plan, data, tmp_path / "whole")
    whole = run.run()
    stage = tmp_path / "cut" / "text_encoder" / "lexical"
    shutil.copytree(whole.parent / "lexical", stage)
    shutil.rmtree(stage / "final")
    shutil.rmtree(stage / f"checkpoint-{STEPS}")
    assert (stage / f"checkpoint-{STEPS - 1}").is_dir()
    (run,) = recipe_runs(plan, data, tmp_path / "cut")
    resumed = run.run()
    for part in ("compressor", "fusion", "generator"):
        expected = weights(whole / part)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed / part).items())
    last = json.loads((stage / "checkpoint-3" / "trainer_state.json").read_text())
    assert last["global_step"] == STEPS


@pytest.mark.parametrize("kind", ["vist", "mean_pool"])
def test_a_run_is_the_same_whatever_ran_before_it(
    runs: tuple[dict[str, Path], Any], kind: str, start: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    plan = recipe(start, base)
    plan["compressors"] = {kind: plan["compressors"][kind]}
    (run,) = recipe_runs(plan, data, tmp_path)
    torch.manual_seed(12345)
    again = run.run()
    assert load(again)[0].fingerprint == load(runs[0][kind])[0].fingerprint


@pytest.mark.parametrize("compressor", ["qformer", ""])
def test_an_unknown_kind_is_refused(start: Path, base: Path, data: Path, tmp_path: Path, compressor: str) -> None:
    plan = recipe(start, base)
    plan["compressors"] = {compressor: {}}
    with pytest.raises(ConfigError, match=f"unknown setting '{compressor}'; known are vist, text_encoder, .*mean_pool"):
        recipe_runs(plan, data, tmp_path)
    del plan["compressors"]
    for table in ({"kind": compressor}, {}):
        with pytest.raises(ConfigError, match=r"kind must be one of vist, text_encoder, .*mean_pool, got"):
            recipe_runs(plan | {"compressor": table}, data, tmp_path)
