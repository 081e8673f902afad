"""Where an answer ends, and how it comes out piece by piece. Both look at text, so that they agree with each other."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from vist_rag.errors import ConfigError

_LOOKAHEAD = 3
"""Decoded texts that must agree before a piece is handed out: a tokenizer joins ``don ' t`` two tokens later."""

_SLACK = 8
"""Tokens decoded before the longest stop string: those at the very start of a text may be decoded in another way."""


class StopAt(StoppingCriteria):
    """Ends each row whose text holds a stop string, and every row once ``cancelled`` is set.

    Transformers' own criterion matches tokens: it misses what decoding changes, lists the whole vocabulary in every
    call, and switches the tokenizer's treatment of special tokens under the feet of other threads.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop must be a list of strings that are not empty, got {stop!r}.")
        self.cancelled = threading.Event()
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tail = max((len(s.encode("utf-8", "replace")) for s in stop), default=0) + _SLACK

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows are at their end, bool ``[b]``; ``input_ids`` holds the generated tokens, ``[b, t]``."""
        if self.cancelled.is_set() or not self._stop:
            return torch.full((len(input_ids),), self.cancelled.is_set(), device=input_ids.device)
        texts = self._tokenizer.batch_decode(input_ids[:, -self._tail :], skip_special_tokens=True)
        return torch.tensor([holds_any(text, self._stop) for text in texts], device=input_ids.device)


class Pieces(BaseStreamer):
    """The text of a growing row of tokens: an iterator over pieces that no later token changes any more."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._texts: deque[str] = deque([""], maxlen=_LOOKAHEAD)
        self._given = 0
        self._queue: SimpleQueue[str | None] = SimpleQueue()

    def put(self, value: Tensor) -> None:
        """Take new tokens; called by ``generate``."""
        self._ids += value.flatten().tolist()
        self._texts.append(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        agreed = os.path.commonprefix(list(self._texts))  # noqa: RUF071 - characters are what is compared
        self._give(agreed.rstrip("\ufffd"))  # a character whose bytes have not all come yet

    def end(self) -> None:
        """No more tokens; called by ``generate``."""
        self._give(self._texts[-1])
        self._queue.put(None)

    def _give(self, text: str) -> None:
        if len(text) > self._given:
            self._queue.put(text[self._given :])
            self._given = len(text)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get()) is not None:
            yield piece


def holds_any(text: str, stop: Iterable[str]) -> bool:
    """Whether one of the strings stands in the text."""
    return any(s in text for s in stop)


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop string, also where it spans two pieces."""
    if not stop:
        yield from pieces
        return
    held, hold = "", max(len(s) for s in stop) - 1
    for piece in pieces:
        held += piece
        ends = [at for at in (held.find(s) for s in stop) if at >= 0]
        if ends:
            yield held[: min(ends)]
            return
        if len(held) > hold:
            yield held[: len(held) - hold]
            held = held[len(held) - hold :]
    yield held
