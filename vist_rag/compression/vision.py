"""Any Hugging Face vision tower, with the blank patches after the text left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from vist_rag.errors import ConfigError


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
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise ConfigError(
            f"tower must be a vision transformer with patches (ViT, CLIP, SigLIP), got {config.model_type}."
        )
    return config


class VisionTower(nn.Module):
    """Runs the parts of a ViT-shaped tower one by one, so that blank patches cost and change nothing.

    Towers of the shape *embeddings, layers, final norm* work: ViT, CLIP, SigLIP, SigLIP2 of fixed resolution, DINO-like
    models that keep these names.

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

    def forward(self, pixel_values: Tensor, mask: Tensor) -> list[Tensor]:
        """Read pages.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            mask: True where a patch holds text, bool ``[p, s]``; text comes first, and every page has some.
        Returns:
            Hidden states from the patch embedding (first) to the last layer, each float ``[p, s', d_v]``; ``s'`` is the
            longest text of the batch in patches, special tokens removed. The last one is the model's own
            ``last_hidden_state``: after the final norm, but for CLIP, which norms its pooled token only.
        """
        core = self.core
        longest = max(1, int(mask.sum(1).max()))
        states = core.embeddings(pixel_values.to(self.model.dtype))
        special = states.shape[1] - mask.shape[1]
        states = states[:, : special + longest]
        is_clip = hasattr(core, "pre_layrnorm")  # the name is spelt so there
        if is_clip:
            states = core.pre_layrnorm(states)
        attended = torch.cat((mask.new_ones(len(mask), special), mask[:, :longest]), dim=1)
        bias = torch.zeros_like(attended, dtype=states.dtype).masked_fill(~attended, torch.finfo(states.dtype).min)
        bias = bias[:, None, None, :].expand(-1, 1, states.shape[1], -1)
        hidden = [states]
        for layer in self.layers:
            output = layer(hidden[-1], bias)
            hidden.append(output[0] if isinstance(output, tuple) else output)
        final_norm = getattr(core, "layernorm", None) or getattr(core, "post_layernorm", None)
        if final_norm is not None and not is_clip:
            hidden[-1] = final_norm(hidden[-1])
        return [h[:, special:] for h in hidden]


def _layers(core: nn.Module) -> nn.ModuleList | None:
    return getattr(core, "layers", None) or getattr(getattr(core, "encoder", None), "layers", None)
