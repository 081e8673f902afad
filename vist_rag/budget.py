"""Slow-fast routing: which passages are read raw, which as memory, and at how many positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vist_rag.errors import ConfigError
from vist_rag.types import Passage, SearchHit


@dataclass(frozen=True, slots=True)
class Plan:
    """How the hits of one question are read, best first.

    Attributes:
        raw: Read as text.
        compressed: Read as memory.
        latents: Positions at most of each compressed passage; None means one for each latent of its memory.
    """

    raw: tuple[SearchHit, ...]
    compressed: tuple[SearchHit, ...]
    latents: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """Either how many passages are read which way, or how many tokens they may take together.

    Attributes:
        k_raw: The best ``k_raw`` hits are read as text.
        k_memory: The next ``k_memory`` are read as memory.
        latents: Positions at most of a passage that is read as memory; None means one for each of its latents.
        tokens: Upper limit for all passages of a prompt. Where given, as many of the ``k_raw + k_memory`` best hits as
            fit are read as memory; what is left of the budget turns the best of them raw, up to ``k_raw``.
    Raises:
        ConfigError: If a number is outside what is allowed.
    """

    k_raw: int = 0
    k_memory: int = 4
    latents: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("k_raw", "k_memory"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.k_raw + self.k_memory == 0:
            raise ConfigError("k_raw + k_memory must be 1 or more, got 0; nothing would be read.")
        for name in ("latents", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}; leave it out for no limit.")

    @property
    def top_k(self) -> int:
        """How many hits are wanted from retrieval."""
        return self.k_raw + self.k_memory

    def split(
        self,
        hits: Sequence[SearchHit],
        *,
        raw_tokens: Callable[[Passage], int],
        memory_tokens: Callable[[Passage, int | None], int],
    ) -> Plan:
        """Decide how each hit is read.

        Args:
            hits: Best first.
            raw_tokens: Tokens that a passage takes as text.
            memory_tokens: Tokens that a passage takes as memory of at most so many latents, boundaries included.
        Raises:
            ConfigError: If not even the best passage fits ``tokens`` in one latent.
        """
        if self.tokens is None:
            raw, compressed = tuple(hits[: self.k_raw]), tuple(hits[self.k_raw : self.top_k])
            return Plan(raw, compressed, (self.latents,) * len(compressed))
        return self._fit(hits[: self.top_k], self.tokens, raw_tokens, memory_tokens)

    def _fit(
        self,
        hits: Sequence[SearchHit],
        tokens: int,
        raw_tokens: Callable[[Passage], int],
        memory_tokens: Callable[[Passage, int | None], int],
    ) -> Plan:
        if not hits:
            return Plan((), (), ())
        costs: list[int] = []
        for hit in hits:
            cost = memory_tokens(hit.passage, self.latents)
            if sum(costs) + cost > tokens:
                break
            costs.append(cost)
        if not costs:
            # The best passage is too large as it is: as many latents of it as fit.
            fewest = memory_tokens(hits[0].passage, 1)
            if fewest > tokens:
                raise ConfigError(
                    f"tokens must be {fewest} or more (one latent of one passage), got {tokens}; raise the budget."
                )
            return Plan((), (hits[0],), (tokens - fewest + 1,))
        spare, k_raw = tokens - sum(costs), 0
        while k_raw < min(self.k_raw, len(costs)):
            more = raw_tokens(hits[k_raw].passage) - costs[k_raw]
            if more > spare:
                break
            spare -= more
            k_raw += 1
        compressed = tuple(hits[k_raw : len(costs)])
        return Plan(tuple(hits[:k_raw]), compressed, (self.latents,) * len(compressed))
