"""VisualMemory: the latents of one passage, and coarser memories derived from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vist_rag.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class VisualMemory:
    """The latents of one passage.

    Attributes:
        latents: float ``[n, d]``, in reading order: each stands for a window of the rendered text.
        fingerprint: Of the compressor that made them.
        salience: How much each latent matters, float ``[n]``; None where its compressor does not say.
    """

    latents: Tensor
    fingerprint: str
    salience: Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents.dim() != 2 or len(self.latents) == 0:
            raise ShapeError(f"latents must be [n, d] with n of 1 or more, got {list(self.latents.shape)}.")

    def __len__(self) -> int:
        return len(self.latents)

    def coarsen(self, n_latents: int) -> VisualMemory:
        """A memory of at most ``n_latents`` of its latents, in reading order; itself where it is small enough.

        Those that matter most are kept, and where salience is unknown, evenly spread ones. Kept latents stay whole: an
        average of neighbours says little, because the letters of both are blurred (``benchmarks/elastic.py``).

        Raises:
            ConfigError: If ``n_latents`` is less than 1.
        """
        if n_latents < 1:
            raise ConfigError(f"n_latents must be 1 or more, got {n_latents}.")
        if n_latents >= len(self):
            return self
        kept = keep(len(self), n_latents, self.salience)
        salience = None if self.salience is None else self.salience[kept]
        return VisualMemory(self.latents[kept], self.fingerprint, salience)


def keep(n: int, size: int, salience: Tensor | None = None) -> Tensor:
    """Which ``size`` latents of ``n`` a coarser memory keeps: int64 ``[size]``, ascending."""
    if salience is None:
        return (2 * torch.arange(size) + 1) * n // (2 * size)
    order = salience.argsort(descending=True, stable=True)  # equals in reading order, on every machine
    return order[:size].sort().values
