"""One stage: resumed exactly, accumulated, evaluated on the way, logged; in every precision."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from tests.support.causal import causal_generator
from tests.support.tiny import tiny_compressor, tiny_generator
from tests.support.training import log_of
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.training.counts import count_tokens
from vist_rag.training.examples import Example
from vist_rag.training.lexical import LexicalAlignment, lexical_batch
from vist_rag.training.objectives import Pve
from vist_rag.training.reading import MemoryReading
from vist_rag.types import Passage

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

from vist_rag.training.checkpoints import last_checkpoint, load_trained
from vist_rag.training.trainer import train_stage

STEPS = 6
WORDS = ("river", "lake", "sea", "bridge", "curie")


class KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


# ------------------------------------------------------------------------------------------------------------ resumed


def fresh_model() -> MemoryReading:
    generator = tiny_generator()
    assert generator.model.config.hidden_dropout_prob > 0  # so that chance has to be the same, too
    model = MemoryReading(tiny_compressor(), generator, rates={1.0: 0.5, 0.5: 0.5})
    model.compressor.tower.requires_grad_(False)
    return model


def examples(number: int) -> list[Example]:
    return [
        Example((Passage(f"the old {word} and the sea"),), "what", word, raw=False)
        for word in (WORDS[number % 5], WORDS[(number + 2) % 5])
    ]


def train(directory: Path, *, killed_after: int | None = None, **settings: Any) -> tuple[MemoryReading, list[float]]:
    """A run of the stage, from where the directory stands; the loss of each step that it made."""
    model = fresh_model()
    losses: list[float] = []

    def listen(_: Any, __: Any, outputs: dict[str, Tensor]) -> None:
        if len(losses) == killed_after:
            raise KilledError
        losses.append(float(outputs["loss"].detach()))

    def build(number: int) -> dict[str, Any]:
        return model.batch(examples(number), random.Random(number))

    model.register_forward_hook(listen)
    train_stage(model, STEPS, build, directory, learning_rate=1e-2, save_every=2, **settings)
    return model, losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MemoryReading, list[float]]:
    """A run without a stop."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, *train(directory)


def test_a_killed_stage_goes_on_as_if_nothing_had_happened(
    whole: tuple[Path, MemoryReading, list[float]], tmp_path: Path
) -> None:
    directory, model, losses = whole
    assert len(losses) == STEPS
    with pytest.raises(KilledError):
        train(tmp_path, killed_after=3)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')  # of a step that was not saved; torn
    resumed, rest = train(tmp_path)
    assert rest == losses[2:]  # step 3 had not been saved
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert log_of(tmp_path) == log_of(directory)


def test_a_checkpoint_that_is_torn_is_passed_over(
    whole: tuple[Path, MemoryReading, list[float]], tmp_path: Path
) -> None:
    directory, model, losses = whole
    stage = shutil.copytree(directory, tmp_path / "torn")
    shutil.rmtree(stage / "final")
    (stage / "checkpoint-6" / "trainer_state.json").write_text('{"global_')  # written last
    assert last_checkpoint(stage) == stage / "checkpoint-4"
    resumed, rest = train(stage)
    assert rest == losses[4:]
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in model.state_dict().items())
    assert log_of(stage) == log_of(directory)
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_what_is_kept_is_what_was_trained(whole: tuple[Path, MemoryReading, list[float]]) -> None:
    directory, model, _ = whole
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for file in (directory / "final", directory / "checkpoint-6"):
        stored = load_file(file / "model.safetensors")
        assert stored.keys() == trained  # what is tied is there once
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())
    again = fresh_model()
    tower = {name: weight.clone() for name, weight in again.compressor.tower.state_dict().items()}
    assert not torch.equal(again.fusion.boundaries, model.fusion.boundaries)
    assert load_trained(again, directory / "final" / "model.safetensors") == trained
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert all(torch.equal(weight, tower[name]) for name, weight in again.compressor.tower.state_dict().items())


def test_weights_of_another_model_are_refused(whole: tuple[Path, MemoryReading, list[float]], tmp_path: Path) -> None:
    file = whole[0] / "final" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"does not fit this recipe .*must be \[.*24.*\], got \[.*16"):
        load_trained(MemoryReading(tiny_compressor(width=24), tiny_generator(memory_width=24)), file)
    with pytest.raises(CheckpointError, match=r"does not fit this recipe .*has no place"):
        load_trained(tiny_compressor(), file)
    with pytest.raises(CheckpointError, match="no such file; train it first"):
        load_trained(fresh_model(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_trained(fresh_model(), tmp_path / "model.safetensors")


def test_a_log_has_a_row_wherever_a_checkpoint_is(whole: tuple[Path, MemoryReading, list[float]]) -> None:
    directory, _, losses = whole
    rows = log_of(directory)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for i, row in enumerate(rows):
        assert row["loss"] == pytest.approx(sum(losses[2 * i : 2 * i + 2]) / 2, abs=1e-6)
        assert 0 <= row["token_accuracy"] <= 1
        assert {"learning_rate", "grad_norm"} <= row.keys()


def test_stdout_is_left_to_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(tmp_path, 2, lambda number: float(number))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------ steps by hand


class Line(nn.Module):
    """``y = a x`` in every part: small enough to work a step out by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm = nn.Linear(3, 1, bias=False)
        self.lm_lora_ = nn.Linear(3, 1, bias=False)
        self.new = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = (self.lm(x) + self.lm_lora_(x) + self.new(x) - 1).square().mean()
        return {"loss": loss, "seen": x[0, 0].detach()}


def batch_of(value: float) -> dict[str, Any]:
    return {"x": torch.tensor([[value, 1.0, -value], [1.0, value, 0.5]])}


def learn(
    directory: Path, steps: int, value: Callable[[int], float], model: Line | None = None, **settings: Any
) -> tuple[Line, list[int]]:
    """Train a line; the model and the batches that were made."""
    model, made = model or Line(), []

    def build(number: int) -> dict[str, Any]:
        made.append(number)
        return batch_of(value(number))

    train_stage(model, steps, build, directory, **{"learning_rate": 1e-2} | settings)
    return model, made


def test_accumulated_batches_are_one_step_and_none_is_seen_twice(tmp_path: Path) -> None:
    trainer = {"gradient_accumulation_steps": 2, "logging_steps": 1}
    model, made = learn(tmp_path, 3, lambda number: 0.3 * number, trainer=trainer, weight_decay=0.1)
    assert made == list(range(6))
    # The same by hand: the mean over both batches, clipped; AdamW; a cosine without warm-up.
    expected = Line()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 3)
    losses = []
    for step in range(3):
        loss = sum(expected(**batch_of(0.3 * n))["loss"] for n in (2 * step, 2 * step + 1)) / 2
        assert isinstance(loss, Tensor)
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-6)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    assert [row["seen"] for row in rows] == pytest.approx([0.15, 0.75, 1.35])  # figures: the mean of both


def test_what_was_pretrained_moves_slower_and_adapters_do_not(tmp_path: Path) -> None:
    before, (model, _) = (
        Line(),
        learn(tmp_path, 1, lambda _: 0.7, pretrained=".lm", pretrained_rate=0.25, weight_decay=0),
    )
    for name, share in (("lm", 0.25), ("lm_lora_", 1.0), ("new", 1.0)):
        moved = (model.get_parameter(f"{name}.weight") - before.get_parameter(f"{name}.weight")).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * share), rtol=1e-3, atol=0)


def test_the_optimizer_that_is_asked_for_is_used(tmp_path: Path) -> None:
    before = Line()
    before(**batch_of(0.7))["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(before.parameters(), 1.0)
    assert norm > 1
    model, _ = learn(tmp_path, 1, lambda _: 0.7, trainer={"optim": "sgd"}, weight_decay=0)
    for name, weight in before.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(model.get_parameter(name), weight - 1e-2 * weight.grad)


def test_a_setting_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    for trainer in ({"bf61": True}, {"lr_scheduler_type": "zigzag"}):
        with pytest.raises(ConfigError, match=r"\[trainer\] must be settings of transformers' TrainingArguments \("):
            learn(tmp_path, 1, lambda _: 0.7, trainer=trainer)


def test_a_model_without_a_generator_has_nothing_to_compute_again(tmp_path: Path) -> None:
    learn(tmp_path, 1, lambda _: 0.7, trainer={"gradient_checkpointing": True})


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluated(
    directory: Path, figures: list[float], every: int, **settings: Any
) -> tuple[dict[int, dict[str, Tensor]], list[int]]:
    """Six steps with a judge who gives these figures, one after the other; the weights that each was given for."""
    judged: dict[int, dict[str, Tensor]] = {}
    model = Line()

    def judge(step: int) -> dict[str, float]:
        judged[step] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return {"em": figures[len(judged) - 1], "f1": 1.0}

    _, made = learn(directory, 6, lambda n: 0.1 * n, model, evaluate=judge, evaluate_every=every, **settings)
    return judged, made


@pytest.mark.parametrize(("every", "save_every"), [(2, 3), (2, 2), (1, 100), (3, 2)])
def test_the_best_weights_are_kept(tmp_path: Path, every: int, save_every: int) -> None:
    figures = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4] if every == 1 else [0.9, 0.3, 0.5]
    judged, _ = evaluated(tmp_path, figures, every, save_every=save_every)
    best = 2 if every == 1 else every
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert stored.keys() == judged[best].keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, judged[best][name])
        assert not torch.equal(tensor, judged[6][name])
    rows = [row for row in log_of(tmp_path) if "eval_em" in row]
    assert [(row["step"], row["eval_em"]) for row in rows] == list(zip(judged, figures, strict=False))
    assert all(row["eval_f1"] == 1.0 for row in rows)


def test_the_best_weights_are_kept_over_a_stop(tmp_path: Path) -> None:
    def stops(step: int) -> dict[str, float]:
        if step == 4:
            raise KilledError
        return {"em": 0.9}

    with pytest.raises(KilledError):
        learn(tmp_path, 6, lambda n: 0.1 * n, evaluate=stops, evaluate_every=2)
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    judged, made = evaluated(tmp_path, [0.3, 0.5], 2)
    assert list(judged) == [4, 6]
    assert made == [2, 3, 4, 5]
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in final.items())
    assert [row["step"] for row in log_of(tmp_path) if "eval_em" in row] == [2, 4, 6]


def test_a_figure_that_no_evaluation_gives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric of \[evaluation\] must be one of em, f1, got 'bleu'"):
        evaluated(tmp_path, [0.1], 1, metric="bleu")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_losses_and_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluated(tmp_path, [0.9, 0.3, 0.5], 2)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert {"train/loss", "train/seen", "eval/em"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("eval/em")] == pytest.approx([0.9, 0.3, 0.5])


# -------------------------------------------------------------------------------------------- memory, and precision


def reading_model(family: str) -> MemoryReading:
    generator = causal_generator(family, seed=1)
    counts = count_tokens(["the old river"], generator.tokenizer)
    model = MemoryReading(tiny_compressor(), generator, distil=1.0, states=1.0, pve=Pve(counts.importance))
    model.compressor.tower.requires_grad_(False)
    model.teach_itself()
    return model.train()


def trained_by(family: str, directory: Path, **trainer: Any) -> tuple[MemoryReading, list[int]]:
    """Two steps, and how often each layer of the generator was run with gradients."""
    model, runs = reading_model(family), [0]
    model.lm.config.hidden_dropout_prob = 0.0
    for module in model.lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layers = model.lm.model.layers if family == "llama" else model.lm.bert.encoder.layer

    def count(module: nn.Module, *_: Any) -> None:
        runs[0] += torch.is_grad_enabled()

    # Inside the layer: what surrounds it is not computed again.
    next(module for module in layers[0].modules() if isinstance(module, nn.Linear)).register_forward_pre_hook(count)
    train_stage(
        model,
        2,
        lambda number: model.batch(examples(number), random.Random(number)),
        directory,
        learning_rate=1e-3,
        trainer={"logging_steps": 1, **trainer},
    )
    return model, runs


@pytest.mark.parametrize("family", ["llama", "prefix_bert"])
def test_layers_that_are_computed_again_give_the_same(family: str, tmp_path: Path) -> None:
    plain, once = trained_by(family, tmp_path / "plain")
    again, twice = trained_by(family, tmp_path / "again", gradient_checkpointing=True)
    assert once == [2]
    assert twice == [4]  # each layer of each step, forwards and backwards
    plain_rows, rows = log_of(tmp_path / "plain"), log_of(tmp_path / "again")
    for one, other in zip(plain_rows, rows, strict=True):
        assert {k: v for k, v in other.items() if k not in ("loss", "grad_norm")} == pytest.approx(
            {k: v for k, v in one.items() if k not in ("loss", "grad_norm")}, abs=1e-3
        )
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "prefix_bert"])
def test_half_precision_trains_weights_of_full_precision(family: str, tmp_path: Path) -> None:
    model, _ = trained_by(family, tmp_path / "half", bf16=True)
    exact, _ = trained_by(family, tmp_path / "full")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for row, other in zip(log_of(tmp_path / "half"), log_of(tmp_path / "full"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert row["loss"] != other["loss"]
    moved = [
        not torch.equal(w, reading_model(family).get_parameter(n)) for n, w in model.fusion.named_parameters("fusion")
    ]
    assert any(moved)
    assert all(torch.isfinite(weight).all() for weight in exact.parameters())


def test_memory_learns_words_in_half_precision(tmp_path: Path) -> None:
    compressor, generator = tiny_compressor(), tiny_generator()
    words = generator.model.get_input_embeddings().weight
    pve = Pve(count_tokens(WORDS, generator.tokenizer).importance)
    model = LexicalAlignment(compressor, generator.fusion, words, pve=pve)
    texts = ["the old bridge", "a river to the sea"]
    batch = lexical_batch(texts, compressor, generator.tokenizer.backend_tokenizer, spelling=20, pve=pve)
    train_stage(model, 2, lambda _: batch, tmp_path, learning_rate=1e-3, trainer={"bf16": True})
    (row,) = log_of(tmp_path)
    assert row["loss"] > 0
    assert {"pve", "piece_accuracy", "spelt"} <= row.keys()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
