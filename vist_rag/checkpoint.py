"""Where a checkpoint is, and what it says: one directory with compressor, generator, fusion and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel

from vist_rag.compression import PassageCompressor
from vist_rag.errors import CheckpointError
from vist_rag.generation import best_device

SETTINGS_FILE = "vist.json"


def embedded_checkpoint() -> Path:
    """Directory of the model that ships with this package."""
    return Path(__file__).parent / "assets" / "model"


def find_checkpoint(checkpoint: str | Path | None) -> Path:
    """A checkpoint's local directory: the embedded one, a path, or a hub id (downloaded).

    Raises:
        CheckpointError: If it is neither a directory nor to be had from the hub.
    """
    if checkpoint is None:
        return embedded_checkpoint()
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(checkpoint)))
    except Exception as error:  # the hub's errors have no common base class
        raise CheckpointError(
            f"checkpoint must be a local directory or a hub id, got {str(checkpoint)!r} ({error})."
        ) from error


def read_settings(directory: Path) -> dict[str, Any]:
    """``vist.json`` of a checkpoint.

    Raises:
        CheckpointError: If it is missing or no JSON object.
    """
    try:
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} must hold {SETTINGS_FILE} ({error}); restore it.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{directory / SETTINGS_FILE} must be a JSON object, got {settings!r}; restore it.")
    return settings


def load_compressor(directory: Path, *, device: str | None = None) -> PassageCompressor:
    """The compressor of a checkpoint directory, on its device: bf16 on cuda, float32 elsewhere.

    Raises:
        CheckpointError: If it cannot be read, or the tower that it refers to is missing or was changed.
    """
    place = torch.device(device) if device else best_device()
    try:
        compressor = AutoModel.from_pretrained(
            directory / "compressor", dtype=torch.bfloat16 if place.type == "cuda" else torch.float32
        )
    except CheckpointError:
        raise
    except Exception as error:  # torn safetensors, missing files and bad JSON each raise a class of their own
        raise CheckpointError(f"compressor in {directory} cannot be loaded ({error}); restore its files.") from error
    if not isinstance(compressor, PassageCompressor):
        raise CheckpointError(
            f"compressor in {directory} must be one of vist-rag's, got {type(compressor).__name__}; restore its files."
        )
    return cast(PassageCompressor, cast(Any, compressor).to(place).eval())
