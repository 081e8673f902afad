"""Spans in a text that LlamaIndex packs into prompts: where they are, and what they take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from vist_rag import Budget, Passage, SearchHit, VistReader, strip_spans

CLOSE = "<|/vist|>"
_OPEN = r"<\|vist:(?P<ref>[0-9a-f]{32}\.(?P<size>[1-9][0-9]{0,8}))\|>"
_CLOSINGS = 8
"""Closing markers that are tried for one opening: a passage may hold some itself."""


class Part(NamedTuple):
    """A piece of a text.

    Attributes:
        text: The piece, with its markers.
        size: Positions of the memory that is read in its place; 0: it is read as text.
    """

    text: str
    size: int


class SpanCounter:
    """Takes texts apart and counts the positions that they take; a span that is not honoured counts as its text.

    Args:
        reader: Who will read the texts.
    """

    def __init__(self, reader: VistReader) -> None:
        # A reader of the same models without an index: looking at a text must encode nothing.
        self._reader = VistReader(reader.compressor, reader.generator)
        self._opening = re.compile(f"(?P<head>{re.escape(reader.template.memory)})?{_OPEN}")
        # LlamaIndex counts the same texts again and again, in its event loop.
        self._is_honoured = lru_cache(maxsize=1024)(self._check)
        self._positions = lru_cache(maxsize=1024)(self._count)

    def __call__(self, text: str) -> list[int]:
        """As many numbers as the text takes positions: what LlamaIndex calls a tokenizer."""
        return [0] * sum(map(self._positions, self.parts(text)))

    def parts(self, text: str) -> Iterator[Part]:
        """Spans, each with the words that lead to it, and what is between them, in order."""
        begin = at = 0
        while opening := self._opening.search(text, at):
            at = opening.end()
            for closing in islice(re.finditer(re.escape(CLOSE), text[at:]), _CLOSINGS):
                if self._is_honoured(text[at : at + closing.start()], opening["ref"], int(opening["size"])):
                    if text[begin : opening.start()]:
                        yield Part(text[begin : opening.start()], 0)
                    begin, at = at + closing.end(), at + closing.end()
                    yield Part(text[opening.start() : begin], int(opening["size"]))
                    break
        if text[begin:]:
            yield Part(text[begin:], 0)

    def _check(self, text: str, ref: str, size: int) -> bool:
        budget = Budget(k_raw=0, k_memory=1, latents=size)
        return self._reader.mark([SearchHit(Passage(text), 0.0, 0)], budget)[0].ref == ref

    def _count(self, part: Part) -> int:
        generator = self._reader.generator
        if not part.size:
            return generator.count_tokens(strip_spans(part.text))
        opening = self._opening.match(part.text)
        head = opening["head"] if opening else ""
        return generator.count_tokens(head or "") + part.size + generator.fusion.boundary_tokens
