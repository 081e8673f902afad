from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.support.causal import FAMILIES, causal_generator
from vist_rag.errors import CheckpointError
from vist_rag.generation.int8 import _has_outliers, is_int8, load_int8, save_int8


@pytest.fixture(params=FAMILIES, scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return causal_generator(request.param).model


def test_weights_come_back_within_half_a_step(tmp_path: Path, model: PreTrainedModel) -> None:
    save_int8(model, tmp_path)
    assert is_int8(tmp_path)
    loaded = load_int8(tmp_path, torch.float32)
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        error = (state[name] - tensor).abs()
        if tensor.dim() == 2:
            bound = tensor.abs().amax(1, keepdim=True) / 127 / 2 + 1e-6
            assert error.max() > 0 or not tensor.any(), name
        else:
            bound = tensor.abs() * 2**-8
        assert (error <= bound).all(), name


def test_tied_weights_stay_tied(tmp_path: Path, model: PreTrainedModel) -> None:
    save_int8(model, tmp_path)
    loaded = load_int8(tmp_path, torch.float32)
    for either in (model, loaded):
        assert (either.get_input_embeddings().weight is either.get_output_embeddings().weight) == bool(
            model.all_tied_weights_keys
        )
    stored = load_file(tmp_path / "model.safetensors")
    matrices = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert sum(stored[name].numel() for name in matrices) == sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_what_is_read_twice_is_written_once_more_alike(tmp_path: Path, model: PreTrainedModel) -> None:
    save_int8(model, tmp_path / "one")
    loaded = load_int8(tmp_path / "one", torch.float32)
    save_int8(loaded, tmp_path / "two")
    again = load_int8(tmp_path / "two", torch.float32)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_settings_of_generation_come_back(tmp_path: Path) -> None:
    model = causal_generator("llama").model
    model.generation_config.eos_token_id = [2, 7]
    save_int8(model, tmp_path)
    assert load_int8(tmp_path, torch.float32).generation_config.eos_token_id == [2, 7]


def test_dtype_is_the_one_asked_for(tmp_path: Path, model: PreTrainedModel) -> None:
    save_int8(model, tmp_path)
    assert {p.dtype for p in load_int8(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_ordinary_weights_are_not_int8(tmp_path: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path)
    assert not is_int8(tmp_path)
    assert not is_int8(tmp_path / "nothing-here")
    assert not is_int8("an-organisation/a-model")
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        is_int8(tmp_path)


def tampered(directory: Path, change: Any) -> None:
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt", "storage": "int8-rows"})


def test_a_missing_or_foreign_weight_is_refused(tmp_path: Path) -> None:
    model = causal_generator("llama").model
    name = "model.layers.0.mlp.up_proj.weight"
    for change in (
        lambda stored: stored.pop(name),
        lambda stored: stored.update(stray=torch.zeros(2)),
        lambda stored: stored.update({name: torch.zeros(3, 4)}),
        lambda stored: stored.pop(name + ".row_scale"),
    ):
        save_int8(model, tmp_path)
        tampered(tmp_path, change)
        with pytest.raises(CheckpointError, match="generator in"):
            load_int8(tmp_path, torch.float32)


def test_a_matrix_ruled_by_its_diagonal_is_not_rounded_away() -> None:
    small = torch.randn(384, 384, generator=torch.Generator().manual_seed(0)) * 0.02
    assert not _has_outliers(small)
    assert _has_outliers(small + 12 * torch.eye(384))
