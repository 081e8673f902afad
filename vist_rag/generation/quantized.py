"""A frozen generator in 4 bits, by bitsandbytes: where there is no room for 16."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from vist_rag.errors import ConfigError, MissingDependencyError


def in_four_bits(quantize: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is told of ``quantize``, beside ``dtype``.

    NF4, whose scales are quantised, too. Layers multiply in ``dtype``, which embeddings, norms and output layer are in:
    soft prompts arrive as in a model that is not quantised. Source: QLoRA, arXiv:2305.14314, section 3.

    Args:
        quantize: ``"4bit"``; None: weights as they are.
        dtype: Of the products.
        device: That the model is loaded to.
    Returns:
        ``quantization_config`` and ``device_map``; nothing for None.
    Raises:
        ConfigError: If ``quantize`` is something else, or bitsandbytes cannot run on the device.
        MissingDependencyError: If bitsandbytes or accelerate is not installed.
    """
    if quantize is None:
        return {}
    if quantize != "4bit":
        raise ConfigError(f"quantize must be '4bit' or None, got {quantize!r}.")
    for package in ("accelerate", "bitsandbytes"):
        try:
            module = import_module(package)
        except ImportError as error:
            raise MissingDependencyError("quantize='4bit'", package, "bnb") from error
    runs = module.supported_torch_devices
    if device.type not in runs:
        raise ConfigError(
            f"device must be one that this bitsandbytes runs on ({', '.join(sorted(runs))}), got {device.type}; take "
            "another, or leave quantize out."
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """A model in 4 bits whose layers stay as they were loaded.

    On a CPU that multiplies in bf16, bitsandbytes 0.49 and later rearranges the weights of a layer when it is first run
    without gradients: in whatever threads run it, and it gives no gradients from then on.
    """
    for layer in cast(Any, model).modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def was_quantized(model: PreTrainedModel) -> bool:
    """Whether weights were quantised when they were loaded; not where they are stored so."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and not quantizer.pre_quantized
