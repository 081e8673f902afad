"""Weights stored as int8 with one scale a row: a quarter of the bytes on disk, float again once loaded.

Transformers has no such storage format of its own (its 8-bit modes need a GPU library), and the embedded generator
has to fit a wheel.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from vist_rag.errors import CheckpointError

_SCALE = ".row_scale"
_KIND = "int8-rows"
_OUTLIER = 12.0  # times the root mean square of its row


def save_int8(model: PreTrainedModel, directory: Path) -> None:
    """Write the model's config, and its weights: matrices as int8 rows, the rest as bf16; tied weights once.

    A matrix whose rows are ruled by single weights, such as one that starts as an identity, stays bf16, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if tensor.dim() == 2 and not _has_outliers(tensor):
            scale = tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
            stored[name] = (tensor.float() / scale).round().to(torch.int8)
            stored[name + _SCALE] = scale
        else:
            stored[name] = tensor.to(torch.bfloat16).contiguous()
    save_file(stored, str(directory / "model.safetensors"), metadata={"format": "pt", "storage": _KIND})


def _has_outliers(matrix: Tensor) -> bool:
    """Whether many rows have a weight so large that steps of its 127th part would round the others away."""
    rows = matrix.float()
    largest, typical = rows.abs().amax(1), rows.square().mean(1).sqrt()
    return bool((largest > _OUTLIER * typical).float().mean() > 0.1)


def is_int8(directory: str | Path) -> bool:
    """Whether a local directory holds weights that ``save_int8`` wrote."""
    path = Path(directory) / "model.safetensors"
    if not path.is_file():
        return False
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("storage") == _KIND
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore the file.") from error


def load_int8(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read what ``save_int8`` wrote, as float weights.

    Raises:
        CheckpointError: If a weight is missing or of another shape.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    state: dict[str, Tensor] = {}
    try:
        with safe_open(str(directory / "model.safetensors"), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if not name.endswith(_SCALE):
                    tensor = file.get_tensor(name)
                    is_rows = tensor.dtype == torch.int8
                    state[name] = tensor.float() * file.get_tensor(name + _SCALE) if is_rows else tensor
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"generator in {directory} does not fit its config ({error}).") from error
    # Tied weights are stored once, so their second names are missing by design.
    missing = [name for name in missing if name not in (model.all_tied_weights_keys or {})]
    if missing or unexpected:
        raise CheckpointError(f"generator in {directory} must hold every weight once, got {missing=} {unexpected=}.")
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    loaded: PreTrainedModel = model
    return loaded
