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
    """

    latents: Tensor
    fingerprint: str

    def __post_init__(self) -> None:
        if self.latents.dim() != 2 or len(self.latents) == 0:
            raise ShapeError(f"latents must be [n, d] with n of 1 or more, got {list(self.latents.shape)}.")

    def __len__(self) -> int:
        return len(self.latents)

    def coarsen(self, n_latents: int) -> VisualMemory:
        """A memory of at most ``n_latents`` latents, made by averaging neighbours; itself where it is small enough.

        Raises:
            ConfigError: If ``n_latents`` is less than 1.
        """
        if n_latents < 1:
            raise ConfigError(f"n_latents must be 1 or more, got {n_latents}.")
        if n_latents >= len(self):
            return self
        return VisualMemory(merge_neighbours(self.latents, n_latents), self.fingerprint)


def merge_neighbours(latents: Tensor, n_latents: int) -> Tensor:
    """Average neighbouring latents, ``[n, d]`` -> ``[n_latents, d]``.

    Each latent counts once: groups of neighbours that differ by one in size at most, spread evenly over the text. So
    where few have to go, most stay as they are.
    """
    n = len(latents)
    group = torch.arange(n, device=latents.device) * n_latents // n
    sums = torch.zeros(n_latents, latents.shape[1], device=latents.device).index_add(0, group, latents.float())
    merged: Tensor = sums / torch.bincount(group, minlength=n_latents)[:, None]
    return merged.to(latents.dtype)


def coarsest_first(n: int) -> list[int]:
    """Sizes worth offering for a memory of ``n`` latents: 1, 2, 4, ... and ``n``."""
    return sorted({*(2**k for k in range(n.bit_length()) if 2**k < n), n})


def stack(memories: list[VisualMemory]) -> tuple[Tensor, Tensor]:
    """Pad memories to one batch: latents ``[b, n, d]`` and mask, bool ``[b, n]``."""
    batch = torch.nn.utils.rnn.pad_sequence([m.latents for m in memories], batch_first=True)
    lengths = torch.tensor([len(m) for m in memories], device=batch.device)
    return batch, torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]
