"""VisualMemory: the latents of one passage, read at as many positions as there is room for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vist_rag.errors import ConfigError, ShapeError

PASSAGE_GAP = " | "
"""Between passages that share a strip: white space of any length is one space there."""


@dataclass(frozen=True, eq=False)
class VisualMemory:
    """The latents of one passage.

    Attributes:
        latents: float ``[n, d]``, in reading order: each stands for a window of the rendered text.
        fingerprint: Of the compressor that made them.
        size: Positions that it takes in a prompt, 1 to n; None means one for each latent.
    """

    latents: Tensor
    fingerprint: str
    size: int | None = None

    def __post_init__(self) -> None:
        if self.latents.dim() != 2 or len(self.latents) == 0:
            raise ShapeError(f"latents must be [n, d] with n of 1 or more, got {list(self.latents.shape)}.")
        if self.size is not None and not 1 <= self.size <= len(self.latents):
            raise ConfigError(f"size must be in 1..{len(self.latents)} (latents of this memory), got {self.size}.")

    def __len__(self) -> int:
        return self.size or len(self.latents)

    @property
    def places(self) -> Tensor:
        """Position at which each latent is read, int64 ``[n]``, ascending: neighbours share one."""
        return places(len(self.latents), len(self))

    def coarsen(self, size: int) -> VisualMemory:
        """The same memory at ``size`` positions at most; itself where it is small enough.

        Neighbours are read together: the generator is given the mean of what they mean and all that they spell. No
        tower is needed, and nothing is left out (``benchmarks/elastic.py``).

        Raises:
            ConfigError: If ``size`` is less than 1.
        """
        if size < 1:
            raise ConfigError(f"size must be 1 or more, got {size}.")
        return self if size >= len(self) else replace(self, size=size)


def places(n: int, size: int) -> Tensor:
    """Position of each of ``n`` latents among ``size``: int64 ``[n]``, ascending, groups as equal as can be."""
    return torch.arange(n) * size // n
