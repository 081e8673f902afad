from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch.utils.data import Dataset

from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.training.data import LengthBatches
from vist_rag.training.examples import Example
from vist_rag.training.reading import MemoryReading
from vist_rag.training.trainer import train_stage
from vist_rag.types import Passage

pytest.importorskip("accelerate", reason="training needs the extra 'train'")

STEPS = 6
WORDS = ("river", "lake", "sea", "bridge", "curie")


class KilledError(Exception):
    """Stands for a kill: nothing is written after it."""


def fresh_model() -> MemoryReading:
    generator = tiny_generator()
    assert generator.model.config.hidden_dropout_prob > 0  # so that chance has to be the same, too
    return MemoryReading(tiny_compressor(), generator, rates={1.0: 0.5, 0.5: 0.5})


def train(directory: Path, *, killed_after: int | None = None) -> tuple[MemoryReading, list[float]]:
    """A run of the stage, from where the directory stands; the loss of each step that it made."""
    model = fresh_model()
    losses: list[float] = []

    def listen(_: Any, __: Any, outputs: dict[str, torch.Tensor]) -> None:
        if len(losses) == killed_after:
            raise KilledError
        losses.append(float(outputs["loss"].detach()))

    def build(items: list[int], step: int) -> dict[str, Any]:
        examples = [Example((Passage(f"the old {WORDS[i]}"),), "what", WORDS[i], raw=False) for i in items]
        return model.batch(examples, random.Random(step))

    indices: Dataset[list[int]] = LengthBatches([4, 4, 5, 6, 5], budget=12, steps=STEPS, seed=0)
    model.register_forward_hook(listen)
    train_stage(model, indices, build, directory, learning_rate=1e-2, save_every=2)
    return model, losses


def test_a_killed_stage_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, losses = train(tmp_path / "whole")
    assert len(losses) == STEPS
    with pytest.raises(KilledError):
        train(tmp_path / "killed", killed_after=3)
    resumed, rest = train(tmp_path / "killed")
    assert len(rest) == STEPS - 2  # step 3 had not been saved
    assert rest == losses[2:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    again = fresh_model()
    assert not torch.equal(again.fusion.boundaries, whole.fusion.boundaries)
    load_model(again, tmp_path / "killed" / "final" / "model.safetensors")
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())

    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [STEPS]
    assert log[0]["loss"] == pytest.approx(sum(losses) / STEPS, abs=1e-3)
    assert 0 <= log[0]["token_accuracy"] <= 1
