"""Spans in a text that LlamaIndex packs into prompts: where they are, and what they take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from vist_rag import Span, VistReader, make_ref, read_spans, write_span


class Part(NamedTuple):
    """A piece of a text.

    Attributes:
        text: The piece; with its markers where it is read as memory, without where it is text.
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
        self._generator = reader.generator
        self._head = reader.template.memory
        self._fingerprint = reader.compressor.fingerprint
        # LlamaIndex counts the same texts again and again, in its event loop.
        self._positions = lru_cache(maxsize=1024)(self._count)

    def __call__(self, text: str) -> list[int]:
        """As many numbers as the text takes positions: what LlamaIndex calls a tokenizer."""
        return [0] * sum(map(self._positions, self.parts(text)))

    def parts(self, text: str) -> Iterator[Part]:
        """Spans, each with the words that lead to it, and what is between them, in order."""
        before = ""
        for part in read_spans(text, self._fingerprint):
            if isinstance(part, str):
                before = part
                continue
            head = self._head if before.endswith(self._head) else ""
            if between := before.removesuffix(head):
                yield Part(between, 0)
            yield Part(head + self._written(part), part.size)
            before = ""
        if before:
            yield Part(before, 0)

    def _written(self, span: Span) -> str:
        return write_span(span.text, make_ref(span.text, self._fingerprint, span.size))

    def _count(self, part: Part) -> int:
        if not part.size:
            return self._generator.count_tokens(part.text)
        head = self._head if part.text.startswith(self._head) else ""
        return self._generator.count_tokens(head) + part.size + self._generator.fusion.boundary_tokens
