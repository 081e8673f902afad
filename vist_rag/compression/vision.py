"""Any Hugging Face vision tower, with the blank patches after the text left out."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from vist_rag.errors import ConfigError

_NAFLEX = "siglip2_vision_model"


def tower_config(source: str | Path | dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """The vision config of a hub id, a local path, a dict with ``model_type``, or a config.

    Raises:
        ConfigError: If it names no vision tower.
    """
    if isinstance(source, dict):
        fields = dict(source)
        kind = fields.pop("model_type", None)
        if kind is None:
            raise ConfigError("tower must name its model_type, such as 'vit' or 'clip_vision_model'; got none.")
        try:
            config = AutoConfig.for_model(kind, **fields)
        except ValueError as error:
            raise ConfigError(f"tower must be of a model_type that transformers knows, got {kind!r}.") from error
    elif isinstance(source, PreTrainedConfig):
        config = source
    else:
        config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)
    if config.model_type == _NAFLEX:
        _set_image_size(config)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ConfigError(
            f"tower must be a vision transformer with patches (ViT, CLIP, SigLIP), got {config.model_type}."
        )
    return config


def _set_image_size(config: PreTrainedConfig) -> None:
    """NaFlex says how many patches it has positions for, as a square: that is its page."""
    side = isqrt(config.num_patches)
    size = side * config.patch_size
    if side**2 != config.num_patches or getattr(config, "image_size", size) != size:
        raise ConfigError(
            f"tower must have positions for a square page, got num_patches {config.num_patches} of {config.patch_size} "
            f"pixels and image_size {getattr(config, 'image_size', None)}; give both, or num_patches alone."
        )
    config.image_size = size


class VisionTower(nn.Module):
    """Runs the parts of a ViT-shaped tower one by one, so that blank patches cost and change nothing.

    Towers of the shape *embeddings, layers, final norm* work: ViT, CLIP, SigLIP and SigLIP2 (of fixed resolution or
    NaFlex), DINOv2, and others that keep these names.

    Args:
        model: The tower; anything before the patches (CLS, registers) is kept, and always attended to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        core = self.core
        if not hasattr(core, "embeddings") or _layers(core) is None:
            raise ConfigError(
                f"tower must have embeddings and layers, as ViT, CLIP and SigLIP do; got {type(model).__name__}."
            )

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> VisionTower:
        """A tower with fresh weights."""
        extra = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
        return cls(AutoModel.from_config(config, **extra))

    @property
    def core(self) -> Any:
        """The part of the model that holds embeddings, layers and final norm."""
        return getattr(self.model, "vision_model", self.model)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, in order."""
        return _layers(self.core) or nn.ModuleList()

    @property
    def width(self) -> int:
        """Width ``d_v`` of a patch feature."""
        return int(self.model.config.hidden_size)

    def forward(self, pixel_values: Tensor, mask: Tensor, read: Sequence[int] | None = None) -> list[Tensor]:
        """Read pages.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            mask: True where a patch holds text, bool ``[p, s]``; text comes first, and every page has some.
            read: Which hidden states are wanted, negative ones counted from the end; others are not kept, and layers
                behind the last one are not run. None: all.
        Returns:
            The hidden states that are read, in that order, else from the patch embedding (first) to the last layer,
            each float ``[p, s', d_v]``; ``s'`` is the longest text of the batch in patches, special tokens removed. The
            last one is the model's own ``last_hidden_state``: after the final norm, but for CLIP, which norms its
            pooled token only.
        """
        core, last = self.core, len(self.layers)
        wanted = [i if i >= 0 else last + 1 + i for i in (range(last + 1) if read is None else read)]
        shortest, longest = (max(1, int(n)) for n in mask.sum(1).aminmax())  # asked one by one: counting answers that
        states = self.embed(pixel_values.to(self.model.dtype))
        special = states.shape[1] - mask.shape[1]
        states = states[:, : special + longest]
        is_clip = hasattr(core, "pre_layrnorm")  # the name is spelt so there
        if is_clip:
            states = core.pre_layrnorm(states)
        # Pages of one length need no mask.
        bias = _bias(mask[:, :longest], special, states.dtype) if shortest < longest else None
        hidden = {0: states}
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            output = layer(states, bias)
            states = output[0] if isinstance(output, tuple) else output
            if number in wanted:
                hidden[number] = states
        final_norm = getattr(core, "layernorm", None) or getattr(core, "post_layernorm", None)
        if final_norm is not None and not is_clip and last in hidden:
            hidden[last] = final_norm(hidden[last])
        return [hidden[number][:, special:] for number in wanted]

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches with their positions, behind what the tower puts before them.

        Args:
            pixel_values: float ``[p, c, size, size]``.
        Returns:
            float ``[p, special + s, d_v]``.
        """
        embeddings = self.core.embeddings
        if self.model.config.model_type != _NAFLEX:
            embedded: Tensor = embeddings(pixel_values)
            return embedded
        # It takes patches in the place of pages, channels last. Pages are as large as its table of positions, so there
        # is nothing to resize.
        size = embeddings.patch_size
        patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # [p, c, h, w, size, size]
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # [p, s, size * size * c]
        placed: Tensor = embeddings.patch_embedding(patches) + embeddings.position_embedding.weight
        return placed


def _bias(mask: Tensor, special: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention: bool ``[p, s]`` -> ``[p, 1, special + s, special + s]``."""
    attended = torch.cat((mask.new_ones(len(mask), special), mask), dim=1)
    bias = torch.zeros_like(attended, dtype=dtype).masked_fill(~attended, torch.finfo(dtype).min)
    return bias[:, None, None, :].expand(-1, 1, attended.shape[1], -1)


def _layers(core: nn.Module) -> nn.ModuleList | None:
    encoder = getattr(core, "encoder", None)
    return getattr(core, "layers", None) or getattr(encoder, "layers", None) or getattr(encoder, "layer", None)
