"""How memory enters the generator."""

from __future__ import annotations

import json
from pathlib import Path

from vist_rag.errors import CheckpointError
from vist_rag.generation.fusion.cross_attention import CrossAttentionFusion
from vist_rag.generation.fusion.decoder_layers import MEMORY_ARGUMENTS
from vist_rag.generation.fusion.soft_prompt import SoftPromptFusion

FUSIONS: dict[str, type[SoftPromptFusion]] = {kind.kind: kind for kind in (SoftPromptFusion, CrossAttentionFusion)}
"""Every fusion by its name, as a checkpoint and a recipe write it."""


def load_fusion(directory: str | Path) -> SoftPromptFusion:
    """Read what ``save_pretrained`` of any fusion wrote.

    Raises:
        CheckpointError: If a file is missing or torn, or names a fusion that there is not.
    """
    try:
        kind = json.loads((Path(directory) / "config.json").read_text())["fusion"]
        fusion = FUSIONS[kind]
    except (OSError, TypeError, ValueError, KeyError) as error:
        known = ", ".join(FUSIONS)
        raise CheckpointError(
            f"fusion in {directory} must be one of {known}, and cannot be read ({error}); restore its files."
        ) from error
    return fusion.from_pretrained(directory)


__all__ = ["FUSIONS", "MEMORY_ARGUMENTS", "CrossAttentionFusion", "SoftPromptFusion", "load_fusion"]
