"""A vision tower that a checkpoint refers to instead of holding it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from vist_rag.errors import CheckpointError
from vist_rag.references import Reference


def load_tower(reference: Reference, config: PreTrainedConfig) -> PreTrainedModel:
    """The vision part of a referenced model; the text part of a CLIP or SigLIP is not read.

    Args:
        reference: Verified first. Its ``dtype`` is that of the result.
        config: Of the tower.
    Raises:
        CheckpointError: If the model is missing, was changed, or does not fit the config.
    """
    directory = reference.directory()
    pooler = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
    loaded: tuple[PreTrainedModel, dict[str, Any]]
    try:
        with _no_report():
            loaded = AutoModel.from_pretrained(
                str(directory),
                config=config,
                dtype=reference.dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **pooler,
            )
    except Exception as error:  # torn, or of another architecture: each raises a class of its own
        raise CheckpointError(f"tower {reference.id} cannot be loaded ({error}); restore it.") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"tower {reference.id} must bring all its weights, got none for {', '.join(missing[:3])}."
        )
    return model


def check_tower(tower: PreTrainedModel, reference: Reference) -> Reference:
    """The reference with the tower's dtype, once the tower is known to be the referenced one.

    Raises:
        CheckpointError: If the referenced model cannot be loaded.
        ConfigError: If the tower has other weights.
    """
    reference = replace(reference, dtype=str(tower.dtype).removeprefix("torch."))
    reference.check("tower", tower.state_dict(), load_tower(reference, tower.config).state_dict())
    return reference


@contextmanager
def _no_report() -> Iterator[None]:
    """Without the table of weights that were not read: a text tower is left out on purpose."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
