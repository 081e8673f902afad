"""Slow-fast routing: which passages are read raw, which as memory, and at how many positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, get_args

from vist_rag.errors import ConfigError
from vist_rag.types import Passage, SearchHit

Policy = Literal["fixed", "by_rank", "by_score"]
"""How a limit is divided among the passages that are read as memory; see :class:`Budget`."""

POLICIES: tuple[Policy, ...] = get_args(Policy)

LEAST_LATENTS = 8
"""What each passage that is read is given before others get more; below that little is left of it
(``benchmarks/results/elastic.json``)."""

SCORE_TEMPERATURE = 0.1
"""Of ``by_score``: a hit whose score (a cosine) is 0.1 below the best one's has 1/e of its weight."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """A hit that a guard did not want read as memory.

    Attributes:
        hit: The hit.
        reason: What the guard said.
        read: How it is read instead; ``memory``: its text did not fit the limit; ``left_out``: neither, as asked.
    """

    hit: SearchHit
    reason: str
    read: Literal["raw", "memory", "left_out"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the hits of one question are read, best first.

    Attributes:
        raw: Read as text.
        compressed: Read as memory.
        latents: Positions at most of each compressed passage; None means one for each latent of its memory.
        limit: Tokens that all of them may take; None without a limit.
        guarded: What a guard objected to, and what became of it.
    """

    raw: tuple[SearchHit, ...]
    compressed: tuple[SearchHit, ...]
    latents: tuple[int | None, ...]
    limit: int | None = None
    guarded: tuple[Guarded, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """Either how many passages are read which way, or how many tokens they may take together.

    With a limit (``tokens`` or ``rate``), the ``top_k`` best hits are read as memory, at sizes that are known before
    anything is encoded; what is left once all of them have their full size (one position a latent, ``latents`` at most)
    turns the best of them into text. The limit is met exactly. What is taken is

    * the limit, to the last position, where all memories at full size would take as much or more;
    * all memories at full size where that is less, the best passages as text in their place while there is room, in
      order and up to ``k_raw``;
    * never more than the limit.

    It falls short of the first only where the passages that fit at full size are so short that another one would not
    fit if each of them had one position: no sizes of the best passages take the limit then, and the most that they can
    take is taken. It never happens where the best passage has more latents than the frame around it has positions.

    Attributes:
        k_raw: The best ``k_raw`` hits are read as text; with a limit, as many of them as fit.
        k_memory: The next ``k_memory`` are read as memory.
        latents: Positions at most of a passage that is read as memory; None means one for each of its latents.
        tokens: Upper limit for all passages of a prompt, in positions of the generator's context.
        rate: The same as a share of what the ``top_k`` hits take as text, in (0, 1], as LLMLingua counts: the limit is
            ``floor(rate * raw tokens)``. The rates of ``vist-rag eval`` are ratios, which is 1 over this.
        policy: How the limit is divided where it does not hold all memories at full size. Who is read is given
            ``LEAST_LATENTS`` first. ``fixed``: the best ones have their full size, the last one what remains, further
            ones are left out. The others read as many passages as fit and divide the rest, none beyond its full size,
            what one cannot take going to the others: ``by_rank`` by 1 / (rank + 1), ``by_score`` by the softmax of the
            scores at ``SCORE_TEMPERATURE``. Without a limit it changes nothing.
    Raises:
        ConfigError: If a number is outside what is allowed, the policy is unknown, or both limits are given.
    """

    k_raw: int = 0
    k_memory: int = 4
    latents: int | None = None
    tokens: int | None = None
    rate: float | None = None
    policy: Policy = "fixed"

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
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ConfigError(
                f"rate must be in (0, 1], a share of the raw tokens, got {self.rate}; a ratio of 4 is a rate of 0.25."
            )
        if self.tokens is not None and self.rate is not None:
            raise ConfigError(f"tokens and rate exclude each other, got {self.tokens} and {self.rate}; give one.")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}.")

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
        guard: Callable[[Passage], str | None] | None = None,
        strict: bool = False,
    ) -> Plan:
        """Decide how each of the ``top_k`` best hits is read.

        Args:
            hits: Best first.
            raw_tokens: Tokens that a passage takes as text.
            memory_tokens: Tokens that a passage takes as memory of at most so many latents, with the frame around it,
                which is the same for all passages.
            guard: Why a passage should not be read as memory; None where it may be. What it objects to is read as text
                and does not count for ``k_raw``: with a limit in order of rank, before memories are given any room,
                and as memory after all where its text does not fit.
            strict: What the guard objects to is left out where its text does not fit, and never read as memory.
        Raises:
            ConfigError: If not even the best passage fits the limit in one latent.
        """
        hits = hits[: self.top_k]
        limit = self._limit(hits, raw_tokens)
        reasons = {i: reason for i, hit in enumerate(hits) if guard and (reason := guard(hit.passage)) is not None}
        raw, left = list(reasons), limit
        if left is not None:
            raw, left = _fitting({i: raw_tokens(hits[i].passage) for i in reasons}, left)
        rest = [i for i in range(len(hits)) if i not in raw and not (strict and i in reasons)]
        best = [i for i in rest if i not in reasons][: self.k_raw]
        sizes: dict[int, int | None] = {i: self.latents for i in rest if i not in best}
        if left is not None and rest:
            best, sizes = self._divide(hits, rest, best, left, raw_tokens, memory_tokens)
            if not (raw or best or sizes):
                raise ConfigError(self._too_little(memory_tokens(hits[rest[0]].passage, 1), left))
        raw = sorted(raw + best)
        read: dict[int, Literal["raw", "memory"]] = {**dict.fromkeys(raw, "raw"), **dict.fromkeys(sizes, "memory")}
        return Plan(
            tuple(hits[i] for i in raw),
            tuple(hits[i] for i in sizes),
            tuple(sizes.values()),
            limit,
            tuple(Guarded(hits[i], reason, read.get(i, "left_out")) for i, reason in reasons.items()),
        )

    def _limit(self, hits: Sequence[SearchHit], raw_tokens: Callable[[Passage], int]) -> int | None:
        if self.rate is None:
            return self.tokens
        # The rate as it is written: 0.29 of 100 is 29, whatever the nearest float is.
        return math.floor(Fraction(str(self.rate)) * sum(raw_tokens(hit.passage) for hit in hits))

    def _too_little(self, least: int, limit: int) -> str:
        one = f"{least} or more (one latent of one passage), got {limit}"
        if self.rate is None:
            return f"tokens must be {one}; raise the budget."
        return f"rate must allow a limit of {one} at a rate of {self.rate}; raise the rate."

    def _divide(
        self,
        hits: Sequence[SearchHit],
        rest: Sequence[int],
        best: Sequence[int],
        left: int,
        raw_tokens: Callable[[Passage], int],
        memory_tokens: Callable[[Passage, int | None], int],
    ) -> tuple[list[int], dict[int, int | None]]:
        """Which of ``best`` are read as text, and the sizes of the others among ``rest``."""
        frame = memory_tokens(hits[rest[0]].passage, 1) - 1
        full = {i: memory_tokens(hits[i].passage, self.latents) - frame for i in rest}
        sizes = dict(zip(rest, self._sizes(list(full.values()), self._weights(hits, rest), left, frame), strict=False))
        spare, turned = left - sum(full.values()) - frame * len(full), list[int]()
        for i in best if spare >= 0 else ():
            spare -= raw_tokens(hits[i].passage) - full[i] - frame
            if spare < 0:
                break
            turned.append(i)
        return turned, {i: size for i, size in sizes.items() if i not in turned}

    def _weights(self, hits: Sequence[SearchHit], rest: Sequence[int]) -> list[float]:
        if self.policy == "by_score":
            top = max(hits[i].score for i in rest)
            # Never 0, nor undefined where scores are: what others cannot take must find a taker.
            return [math.exp(max(-50.0, (hits[i].score - top) / SCORE_TEMPERATURE)) for i in rest]
        return [1 / (i + 1) for i in rest]

    def _sizes(self, full: Sequence[int], weights: Sequence[float], limit: int, frame: int) -> list[int]:
        """Latents of each of the first passages, as many of these as are read."""
        # As few as can take the limit, or all. Fewer still where it has no place for a latent of each.
        at_full = list(accumulate(n + frame for n in full))
        count = next((count for count, total in enumerate(at_full, 1) if total >= limit), len(full))
        count = min(count, limit // (frame + 1))
        if self.policy != "fixed":
            at_least = accumulate(min(LEAST_LATENTS, n) + frame for n in full)
            count = max(count, sum(total <= limit for total in at_least))
        full = full[:count]
        room = min(sum(full), limit - frame * count)
        least = max((m for m in range(1, LEAST_LATENTS + 1) if sum(min(m, n) for n in full) <= room), default=1)
        sizes = [min(least, n) for n in full]
        caps = [n - size for n, size in zip(full, sizes, strict=True)]
        share = _in_turn if self.policy == "fixed" else _by_weight
        return [size + more for size, more in zip(sizes, share(room - sum(sizes), caps, weights), strict=True)]


def _fitting(costs: Mapping[int, int], room: int) -> tuple[list[int], int]:
    """Which fit, in turn and passing over what does not, and what is left."""
    fitting = list[int]()
    for i, cost in costs.items():
        if cost <= room:
            fitting.append(i)
            room -= cost
    return fitting, room


def _in_turn(room: int, caps: Sequence[int], _: Sequence[float]) -> list[int]:
    """The first as much as it can take, then the next."""
    before = accumulate(caps, initial=0)
    return [min(cap, max(0, room - taken)) for cap, taken in zip(caps, before, strict=False)]


def _by_weight(room: int, caps: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Shares in proportion to weights (water filling): whole numbers by largest remainder, the first in a tie.

    Args:
        room: At most the sum of ``caps``; all of it is given.
        caps: The most that each can take.
        weights: Positive.
    """
    shares, open_ = list(caps), list(range(len(caps)))
    while open_:
        total = sum(weights[i] for i in open_)
        quotas = {i: room * weights[i] / total for i in open_}
        filled = [i for i in open_ if quotas[i] >= caps[i]]
        if not filled:
            break
        room -= sum(caps[i] for i in filled)
        open_ = [i for i in open_ if i not in filled]
    for i in open_:
        shares[i] = math.floor(quotas[i])
    rest = room - sum(shares[i] for i in open_)
    for i in sorted(open_, key=lambda i: shares[i] - quotas[i])[:rest]:
        shares[i] += 1
    return shares
