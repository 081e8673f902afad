"""A generator that a checkpoint refers to instead of holding it: a reference and, with LoRA, the adapter."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from vist_rag.errors import CheckpointError, ConfigError, MissingDependencyError
from vist_rag.generation.quantized import settled, was_quantized
from vist_rag.references import Reference

REFERENCE_FILE = "reference.json"
ADAPTER = "adapter"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


# --------------------------------------------------------------------------------------------------------------- saving


def check_generator(model: PreTrainedModel, reference: Reference) -> Reference:
    """The reference with the generator's dtype, once the generator, adapter aside, is known to be the referenced one.

    Raises:
        CheckpointError: If the referenced model cannot be loaded.
        ConfigError: If the generator has other weights, or more than one adapter, or one that cannot be merged.
    """
    base = _base(model)
    weights = base.state_dict()
    if _has_adapter(model):
        name = _adapter_name(model)
        weights = {
            key.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
            for key, tensor in weights.items()
            if name not in key.split(".")
        }
    reference = replace(reference, dtype=str(base.dtype).removeprefix("torch."))
    theirs = _load_base(reference, _config(base), base.dtype).state_dict()
    if was_quantized(base):  # layers in 4 bits cannot be trained: what stands beside them is compared
        theirs = {name: tensor for name, tensor in theirs.items() if weights[name].dtype == tensor.dtype}
        weights = {name: weights[name] for name in theirs}
    reference.check("generator", weights, theirs)
    return reference


def save_referenced(model: PreTrainedModel, reference: Reference, directory: Path) -> None:
    """Write the model's config, ``reference.json`` (as ``check_generator`` gave it) and, with LoRA, ``adapter/``.

    Raises:
        ConfigError: If the reference is to this very directory.
    """
    if directory.is_dir() and Path(reference.id).is_dir() and directory.samefile(reference.id):
        raise ConfigError(f"generator_base must be another directory than the checkpoint's, got {reference.id}.")
    directory.mkdir(parents=True, exist_ok=True)
    remove_reference(directory)
    base = _base(model)
    _config(base).save_pretrained(directory)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(directory)
    adapter = _has_adapter(model)
    if adapter:
        _save_adapter(model, reference, directory / ADAPTER)
    fields = {**asdict(reference), "adapter": adapter}
    (directory / REFERENCE_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    for stored in (*directory.glob("model*.safetensors"), *directory.glob("model.safetensors.index.json")):
        stored.unlink()  # of an earlier checkpoint that was whole


def remove_reference(directory: Path) -> None:
    """Remove what ``save_referenced`` wrote into a directory that now holds something else."""
    (directory / REFERENCE_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory / ADAPTER, ignore_errors=True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy of it with its adapter merged into its weights."""
    if not _has_adapter(model):
        return model
    return cast(PreTrainedModel, copy.deepcopy(cast(Any, model)).merge_and_unload())


def _save_adapter(model: Any, reference: Reference, directory: Path) -> None:
    # Not PeftModel.save_pretrained: it asks the hub about the base, and writes a card with local paths.
    from peft import get_peft_model_state_dict

    name = _adapter_name(model)
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = reference.id, reference.revision
    config.save_pretrained(str(directory))
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()}
    save_file(stored, str(directory / _ADAPTER_WEIGHTS), metadata={"format": "pt"})


def _has_adapter(model: Any) -> bool:
    """Whether peft wraps the model; asked without importing it."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _base(model: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if _has_adapter(model) else model)


def _config(base: PreTrainedModel) -> PreTrainedConfig:
    """The config of the weights as they are stored."""
    config: PreTrainedConfig = copy.deepcopy(base.config)
    if was_quantized(base):
        del config.quantization_config
    return config


def _adapter_name(model: Any) -> str:
    names = list(model.peft_config)
    if len(names) != 1 or not hasattr(model, "merge_and_unload"):
        kinds = ", ".join(config.peft_type.value for config in model.peft_config.values())
        raise ConfigError(f"generator must have one adapter that can be merged, such as LoRA; got {kinds}.")
    return str(names[0])


# -------------------------------------------------------------------------------------------------------------- loading


def is_referenced(directory: str | Path) -> bool:
    """Whether a local directory refers to a model that is elsewhere."""
    return (Path(directory) / REFERENCE_FILE).is_file()


def load_referenced(directory: Path, dtype: torch.dtype, **fewer_bits: Any) -> PreTrainedModel:
    """Read what ``save_referenced`` wrote, as one model: the referenced weights with the adapter merged into them.

    Args:
        directory: Where it wrote.
        dtype: Of the result.
        **fewer_bits: As ``in_four_bits`` gives them.
    Raises:
        CheckpointError: If the referenced model is missing, was changed or does not fit, or the adapter is torn.
        ConfigError: If an adapter is to be merged into weights in 4 bits.
        MissingDependencyError: If there is an adapter and peft is not installed.
    """
    path = directory / REFERENCE_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it.") from error
    reference = Reference.read(fields, path)
    adapter = bool(fields.get("adapter"))
    if fewer_bits and adapter:
        raise ConfigError("quantize must be None for a generator with a LoRA adapter, which is merged, got '4bit'.")
    # float32 holds whatever is stored elsewhere exactly, so nothing was rounded.
    as_asked = reference.dtype in (None, "float32") and not adapter
    trained = dtype if as_asked else cast(torch.dtype, getattr(torch, reference.dtype or "float32"))
    config = AutoConfig.from_pretrained(directory)
    if fewer_bits:
        model = settled(_load_base(reference, config, dtype, **fewer_bits))
    else:
        model = _load_base(reference, config, trained)
        if adapter:
            _cast(model, torch.promote_types(trained, dtype))  # the sum is rounded once
            model = _merge(model, directory / ADAPTER)
        _cast(model, dtype)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _load_base(
    reference: Reference, config: PreTrainedConfig, dtype: torch.dtype, **fewer_bits: Any
) -> PreTrainedModel:
    directory = reference.directory()
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(directory), config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **fewer_bits
        )
    except Exception as error:  # torn, or of another architecture: each raises a class of its own
        raise CheckpointError(f"generator {reference.id} cannot be loaded ({error}); restore it.") from error
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"generator {reference.id} must bring all its weights, got none for {', '.join(missing[:3])}."
        )
    return model


def _merge(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingDependencyError("A generator with a LoRA adapter", "peft", "train") from error
    path = directory / _ADAPTER_WEIGHTS
    if not path.is_file():  # peft would go on to look for a pickle, and on the hub
        raise CheckpointError(f"adapter {path} is missing; restore it.")
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = set(file.keys())
        adapted = PeftModel.from_pretrained(model, str(directory))
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if stored != wanted:  # peft itself only warns
            raise CheckpointError(f"adapter {path} must fit its config, got others: {sorted(stored ^ wanted)[:3]}.")
        whole: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"adapter in {directory} cannot be read ({error}); restore its files.") from error
    return whole.requires_grad_(True)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights to another dtype, in place; buffers such as rotary frequencies keep theirs, which ``to`` would not."""
    for weight in cast(Any, model).parameters():
        weight.data = cast(Tensor, weight.data).to(dtype)
