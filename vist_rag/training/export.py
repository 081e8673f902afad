"""Write what was trained as one checkpoint directory that ``VistRAG.from_pretrained`` reads."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from vist_rag.checkpoint import SETTINGS_FILE
from vist_rag.compression import PassageCompressor, VistCompressor
from vist_rag.compression.referenced import check_tower
from vist_rag.compression.vision import VisionTower
from vist_rag.errors import ConfigError
from vist_rag.fidelity import FIDELITY_FILE
from vist_rag.generation import VistGenerator
from vist_rag.generation.int8 import save_int8
from vist_rag.generation.quantized import was_quantized
from vist_rag.generation.referenced import check_generator, merged, remove_reference, save_referenced
from vist_rag.references import Reference


def save_checkpoint(
    directory: str | Path,
    compressor: PassageCompressor,
    generator: VistGenerator,
    *,
    settings: dict[str, Any] | None = None,
    int8: bool = True,
    tower: Reference | None = None,
    generator_base: Reference | None = None,
) -> Path:
    """Write ``compressor/``, ``generator/``, ``fusion/`` and ``vist.json``; what is read back is what was written.

    What was trained is stored. What was not may be left out, and be referred to: it is compared with the referenced
    model first, bit for bit, and the dtype that it was trained in is kept with the reference.

    Args:
        directory: Made where it is missing.
        compressor: Stored in bf16.
        generator: Its model is stored as int8 rows, or in its own dtype; its fusion in bf16, bound to the compressor. A
            LoRA adapter is merged, but for a generator that is referred to.
        settings: ``budget``, ``template``, ``max_new_tokens``, ``stop``: what this model was trained and tuned for.
        int8: Whether to quantise a generator that is stored.
        tower: Where the weights of the compressor's vision tower are; None: in the checkpoint.
        generator_base: Where the weights of the generator are; None: in the checkpoint. Config, tokenizer and LoRA
            adapter are stored.
    Raises:
        CheckpointError: If a referenced model is missing or was changed.
        ConfigError: If a part is not what its reference says, the compressor has no vision tower, or a generator in 4
            bits has no reference.
    """
    directory = Path(directory)
    compressor.eval()
    # All that can be refused is refused before anything is written.
    if tower is not None:
        if not isinstance(compressor, VistCompressor):
            raise ConfigError(
                f"tower must be None for a compressor without a vision tower, got a {type(compressor).__name__}."
            )
        tower = check_tower(cast(VisionTower, compressor.tower).model, tower)
    if generator_base is not None:
        generator_base = check_generator(generator.model, generator_base)
    elif was_quantized(generator.model):
        raise ConfigError("generator_base must name where the weights of a generator in 4 bits are, got None.")
    _save_compressor(compressor, tower, directory / "compressor")
    _save_generator(generator, generator_base, directory / "generator", int8=int8)
    fusion = generator.fusion
    fusion.bind(compressor.fingerprint)
    fusion.save_pretrained(directory / "fusion")
    (directory / SETTINGS_FILE).write_text(json.dumps(settings or {}, indent=2) + "\n", encoding="utf-8")
    return directory


def _save_compressor(compressor: PassageCompressor, tower: Reference | None, directory: Path) -> None:
    (directory / FIDELITY_FILE).unlink(missing_ok=True)  # of what lay there before
    if tower is None:
        compressor.save_pretrained(directory)
    else:
        trained = {name: weight for name, weight in compressor.state_dict().items() if not name.startswith("tower.")}
        compressor.save_pretrained(directory, state_dict=trained)
        config = copy.deepcopy(compressor.config)
        config.tower_reference = asdict(tower)
        config.save_pretrained(directory)
    weights = directory / "model.safetensors"
    state = load_file(str(weights))
    stored = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()}
    save_file(stored, str(weights), metadata={"format": "pt"})


def _save_generator(generator: VistGenerator, base: Reference | None, directory: Path, *, int8: bool) -> None:
    if base is not None:
        save_referenced(generator.model, base, directory)
    else:
        remove_reference(directory)
        model = merged(generator.model)
        if int8:
            save_int8(model, directory)
        else:
            model.save_pretrained(directory)
    generator.tokenizer.save_pretrained(directory)
