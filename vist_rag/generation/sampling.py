"""Sampling with a seed of its own: the same answer in whatever company, and no global generator of random numbers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vist_rag.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0: the most likely token, always. Up to 100.
        top_p: Of the most likely tokens, those that have this share together; above 0, up to 1.
        top_k: Of the most likely tokens, so many; None: all.
        seed: 0 to 2**63 - 1; None draws one.
    Raises:
        ConfigError: If a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature must be in 0..100, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {self.top_k}; leave it out for all tokens.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in 0..2**63 - 1, got {self.seed}.")

    def processors(self) -> LogitsProcessorList:
        """For ``model.generate``, greedy: what makes the most likely token one that was drawn. Good for one call."""
        if self.temperature == 0:
            return Drawing(self)
        chain: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k is not None:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chain.append(TopPLogitsWarper(self.top_p))
        return Drawing(self, [*chain, _Gumbel(secrets.randbits(63) if self.seed is None else self.seed)])


class Drawing(LogitsProcessorList):
    """What ``Sampling.processors`` gives; a generator that is elsewhere is told ``sampling`` in the place of it."""

    def __init__(self, sampling: Sampling, chain: Sequence[LogitsProcessor] = ()) -> None:
        super().__init__(chain)
        self.sampling = sampling


class _Gumbel(LogitsProcessor):
    """Adds noise so that the largest score is a draw from the softmax (the Gumbel-max trick)."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores and noise, float ``[b, v]``."""
        # Never 0 or 1, whose noise is infinite.
        uniform = torch.rand(scores.shape, generator=self._random, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
        return scores - (-uniform.log()).log().to(scores.device, scores.dtype)
