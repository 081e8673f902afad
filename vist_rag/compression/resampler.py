"""Perceiver Resampler: many patch features -> few latents."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from vist_rag.config import ResamplerConfig
from vist_rag.errors import ConfigError, ShapeError


class PerceiverBlock(nn.Module):
    """Latents attend to features and to themselves, then a feed-forward layer; both residual, pre-norm."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_latents = nn.LayerNorm(width)
        self.norm_features = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, latents: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Latents ``[p, n, d]``, features ``[p, s, d]``, mask ``[p, s + n]`` -> latents ``[p, n, d]``."""
        q, k, v = self._heads(latents, features)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        latents = latents + self.output(read.transpose(1, 2).flatten(2))
        fed: Tensor = self.feed_forward(latents)
        return latents + fed

    def attention(self, latents: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """The weights that ``forward`` reads with, which fused attention does not tell: ``[p, heads, n, s + n]``."""
        q, k, _ = self._heads(latents, features)
        scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
        weights: Tensor = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)
        return weights

    def _heads(self, latents: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the latents, keys and values of features and latents: ``[p, heads, ..., d / heads]`` each."""
        queries = self.norm_latents(latents)
        sources = torch.cat((self.norm_features(features), queries), dim=1)  # [p, s + n, d]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(queries), *self.key_value(sources).chunk(2, dim=-1))
        )
        return q, k, v


def windows_of_text(mask: Tensor, window: int) -> Tensor:
    """Which windows hold text: bool ``[p, s]`` -> bool ``[p, n]``."""
    padded: Tensor = F.pad(mask, (0, -mask.shape[1] % window))
    standing: Tensor = padded.unflatten(1, (-1, window)).any(-1)
    return standing


class PerceiverResampler(nn.Module):
    """Compress page features into latents that each stand for a window of the strip.

    Latent ``i`` starts from a learned query plus a projection of the ``s / latents_per_page`` neighbouring patches
    that it stands for, and then attends to the whole page. So a page that holds little text needs few latents, and
    neighbours can be read together, as a coarser memory: no tower is needed.

    Args:
        config: Sizes.
        feature_width: Width of the incoming features (``d_v`` times the number of tower layers read).
        page_patches: Patches of a full page, ``s``.
    Raises:
        ConfigError: If ``latents_per_page`` does not divide ``page_patches``.
    Source: Flamingo, arXiv:2204.14198, section 3.1 (no time embedding). Starting each query from its window is this
        project's: it learns to read in minutes where free queries take hours.
    """

    def __init__(self, config: ResamplerConfig, feature_width: int, page_patches: int) -> None:
        super().__init__()
        if page_patches % config.latents_per_page:
            raise ConfigError(
                f"latents_per_page must divide the patches of a page ({page_patches}), got {config.latents_per_page}."
            )
        self.feature_width = feature_width
        self.window = page_patches // config.latents_per_page
        self.latents = nn.Parameter(torch.zeros(config.latents_per_page, config.width))
        self.norm_in = nn.LayerNorm(feature_width)
        self.project = nn.Linear(feature_width, config.width)
        self.project_window = nn.Linear(self.window * feature_width, config.width)
        self.blocks = nn.ModuleList(
            PerceiverBlock(config.width, config.heads, config.expansion) for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.project_spelling = (
            nn.Linear(self.window * feature_width, config.spelling_width) if config.spelling_width else None
        )
        self.project_salience = nn.Linear(self.window * feature_width, 1) if config.salience else None

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compress the features of each page.

        Args:
            features: Patch features, float ``[p, s, feature_width]``; ``s`` may stop at the longest text.
            mask: True where a patch holds text, bool ``[p, s]``.
        Returns:
            Latents, float ``[p, n, d]``, and which of them stand for text, bool ``[p, n]``.
        Raises:
            ShapeError: If the features' width is not the one this resampler was built for.
        """
        return self._read(features, mask)

    def attention(self, features: Tensor, mask: Tensor) -> Tensor:
        """Where each latent looks, layer by layer and head by head; arguments and errors as :meth:`forward`.

        Returns:
            Weights, float ``[layers, p, heads, n, s + n]``: first those of the patches, then those of the latents
            themselves; they sum to one.
        """
        weights: list[Tensor] = []
        self._read(features, mask, weights)
        return torch.stack(weights)

    def _read(self, features: Tensor, mask: Tensor, weights: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if features.shape[-1] != self.feature_width:
            raise ShapeError(
                f"features must be {self.feature_width} wide (tower width x layers read), got {features.shape[-1]}; "
                "use the tower that this resampler was trained with."
            )
        features = self.norm_in(features) * mask[..., None]
        padding = -features.shape[1] % self.window
        windows = F.pad(features, (0, 0, 0, padding)).unflatten(1, (-1, self.window)).flatten(2)
        latents = self.project_window(windows)  # [p, n, d]
        latents = latents + self.latents[: latents.shape[1]]
        standing = windows_of_text(mask, self.window)
        attended = torch.cat((mask, standing), dim=1)
        projected = self.project(features)
        for block in self.blocks:
            if weights is not None:
                weights.append(cast(PerceiverBlock, block).attention(latents, projected, attended))
            latents = block(latents, projected, attended)
        latents = self.norm_out(latents)
        if self.project_spelling is not None:
            latents = torch.cat((latents, self.project_spelling(windows)), dim=-1)
        if self.project_salience is not None:
            latents = torch.cat((self.project_salience(windows), latents), dim=-1)
        return latents, standing


class WindowPooling(nn.Module):
    """The mean of each window's features, projected: what stands in a resampler's place where there is none.

    Args:
        config: ``width``, ``expansion``, ``spelling_width`` and ``salience`` are read.
        feature_width: Width of the incoming features.
        window: Features that a latent stands for; 1 leaves every feature by itself.
    Source: the mean-pooled text compressor of arXiv:2512.03643, with an MLP for its projection.
    """

    def __init__(self, config: ResamplerConfig, feature_width: int, window: int) -> None:
        super().__init__()
        self.window = window
        hidden = config.expansion * config.width
        self.project = nn.Sequential(
            nn.LayerNorm(feature_width),
            nn.Linear(feature_width, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.memory_width),
        )

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[p, s, feature_width]`` and mask ``[p, s]`` -> latents ``[p, n, d]`` and which stand for text."""
        padding = -features.shape[1] % self.window
        windows = F.pad(features * mask[..., None], (0, 0, 0, padding)).unflatten(1, (-1, self.window))
        counts = F.pad(mask, (0, padding)).unflatten(1, (-1, self.window)).sum(-1)  # [p, n]
        pooled = windows.sum(2) / counts.clamp(min=1)[..., None]
        latents: Tensor = self.project(pooled)
        return latents, counts > 0

    def attention(self, features: Tensor, mask: Tensor) -> Tensor:
        """As of a resampler with one layer and one head: a mean looks at all of its window alike."""
        patches = torch.arange(mask.shape[1], device=mask.device)
        n = -(-len(patches) // self.window)
        own = patches // self.window == torch.arange(n, device=mask.device)[:, None]  # [n, s]
        weights = (own & mask[:, None]).float()  # [p, n, s]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        return F.pad(weights, (0, n))[None, :, None]
