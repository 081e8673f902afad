"""Tiny vision towers of several families, and what each makes of pixels by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

TOWERS: dict[str, type[PreTrainedConfig]] = {
    "vit": ViTConfig,
    "clip": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip2": Siglip2VisionConfig,  # NaFlex; checkpoints of fixed resolution are of the classes of SigLIP
    "dinov2": Dinov2Config,
    "dinov2_registers": Dinov2WithRegistersConfig,
}
SPECIAL = {"vit": 1, "clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_registers": 3}
"""What stands before the patches: a class token, registers."""


def tower_sizes(kind: str, *, patch_size: int, side: int, **sizes: Any) -> PreTrainedConfig:
    """The config of a tower of ``side`` times ``side`` patches."""
    fields: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3}
    fields |= {"patch_size": patch_size} | sizes
    fields |= {"num_patches": side**2} if kind == "siglip2" else {"image_size": side * patch_size}
    fields |= {"mlp_ratio": 2} if kind.startswith("dinov2") else {"intermediate_size": 32}
    fields |= {"num_register_tokens": 2} if kind == "dinov2_registers" else {}
    return TOWERS[kind](**fields)


def tower_model(kind: str, *, patch_size: int, side: int, **sizes: Any) -> PreTrainedModel:
    """A tower of random weights."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tower_sizes(kind, patch_size=patch_size, side=side, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: at 1 and 0 they would hide what is left out
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def own_states(model: PreTrainedModel, images: Tensor) -> Any:
    """What the model's own forward makes of whole images, float [p, c, size, size]."""
    given: dict[str, Tensor] = {"pixel_values": images}
    if model.config.model_type == "siglip2_vision_model":
        size = model.config.patch_size
        patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), size)) for image in images])
        side = torch.tensor([[images.shape[2] // size, images.shape[3] // size]] * len(images))
        given = {"pixel_values": patches, "spatial_shapes": side}
        given["pixel_attention_mask"] = torch.ones(patches.shape[:2], dtype=torch.long)
    return model(**given, output_hidden_states=True)
