"""Write what was trained as one checkpoint directory that ``VistRAG.from_pretrained`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vist_rag.compression import PassageCompressor
from vist_rag.generation import VistGenerator
from vist_rag.generation.int8 import save_int8
from vist_rag.pipeline import SETTINGS_FILE


def save_checkpoint(
    directory: str | Path,
    compressor: PassageCompressor,
    generator: VistGenerator,
    *,
    settings: dict[str, Any] | None = None,
    int8: bool = True,
) -> Path:
    """Write ``compressor/``, ``generator/``, ``fusion/`` and ``vist.json``; what is read back is what was written.

    Args:
        directory: Made where it is missing.
        compressor: Stored in bf16.
        generator: Its model is stored as int8 rows, or in its own dtype; its fusion in bf16, bound to the compressor.
        settings: ``budget``, ``template``, ``max_new_tokens``, ``stop``: what this model was trained and tuned for.
        int8: Whether to quantise the generator.
    """
    directory = Path(directory)
    compressor.eval().save_pretrained(directory / "compressor")
    weights = directory / "compressor" / "model.safetensors"
    state = load_file(str(weights))
    stored = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()}
    save_file(stored, str(weights), metadata={"format": "pt"})
    if int8:
        save_int8(generator.model, directory / "generator")
    else:
        generator.model.save_pretrained(directory / "generator")
    generator.tokenizer.save_pretrained(directory / "generator")
    fusion = generator.fusion
    fusion.bind(compressor.fingerprint)
    fusion.save_pretrained(directory / "fusion")
    (directory / SETTINGS_FILE).write_text(json.dumps(settings or {}, indent=2) + "\n", encoding="utf-8")
    return directory
