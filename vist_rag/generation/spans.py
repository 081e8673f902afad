"""Spans: passages in a text, marked so that a generator of ours reads their memory in the place of their tokens.

Only text survives every way through a framework, so a span carries the passage itself::

    <|vist:REF|>the passage<|/vist|>

``REF`` is a hash of the text, of the compressor's fingerprint and of the number of positions, then that number. It says
"this text may be read as memory", and grants nothing else: whoever can write a valid one has the text already. One that
is forged, cut, altered or of another compressor is not honoured, and its text is read as text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from vist_rag.errors import ConfigError

CLOSE = "<|/vist|>"
_OPEN = re.compile(r"<\|vist:([0-9a-f]{32})\.([1-9][0-9]{0,8})\|>")
_MARKER = re.compile(rf"{_OPEN.pattern}|{re.escape(CLOSE)}")
_WORK = 8
"""Characters hashed for one that is read, at most: openings that nothing closes must not cost the square of a text."""


@dataclass(frozen=True, slots=True)
class Span:
    """A passage in a text that is read as memory.

    Attributes:
        text: What was compressed: title, colon, text.
        size: Positions that it takes, 1 or more.
    """

    text: str
    size: int


def make_ref(text: str, fingerprint: str, size: int) -> str:
    """The reference under which a text may be read as memory.

    Args:
        text: What is compressed.
        fingerprint: Of the compressor.
        size: Positions that the memory takes, 1 or more.
    Raises:
        ConfigError: If ``size`` is out of range.
    """
    if not 1 <= size <= 999_999_999:
        raise ConfigError(f"size must be in 1..999999999 (positions of a memory), got {size}.")
    return f"{hashlib.sha256(_bytes(_salt(fingerprint, size) + text)).hexdigest()[:32]}.{size}"


def write_span(text: str, ref: str) -> str:
    """A text within the markers of its reference."""
    return f"<|vist:{ref}|>{text}{CLOSE}"


def read_spans(text: str, fingerprint: str) -> list[str | Span]:
    """Take a text apart into what is read as text and what is read as memory, in order.

    A span is honoured only if its reference is the hash of that very text under that fingerprint. Everything else is
    text, without the markers.
    """
    parts = (part if isinstance(part, Span) else strip_spans(part) for part in _parts(text, fingerprint))
    return [part for part in parts if part]


def strip_spans(text: str) -> str:
    """A text as any other model may read it: without markers, honoured or not."""
    bare = _MARKER.sub("", text)
    # What was around a marker may form another one; with a space in between it cannot.
    return _MARKER.sub(" ", bare)


def _parts(text: str, fingerprint: str) -> Iterator[str | Span]:
    begin = at = 0
    work = _WORK * len(text)
    while work > 0 and (opening := _OPEN.search(text, at)) is not None:
        at = done = opening.end()
        size = int(opening[2])
        sha = hashlib.sha256(_bytes(_salt(fingerprint, size)))
        closing = text.find(CLOSE, at)
        if closing < 0:
            break
        while closing >= 0 and work > 0:  # a passage may hold the closing marker itself: the hash tells which one it is
            sha.update(_bytes(text[done:closing]))
            work -= closing - done + 1
            if sha.hexdigest()[:32] == opening[1]:
                yield text[begin : opening.start()]
                yield Span(text[at:closing], size)
                begin = at = closing + len(CLOSE)
                break
            done, closing = closing, text.find(CLOSE, closing + 1)
    yield text[begin:]


def _salt(fingerprint: str, size: int) -> str:
    return f"{fingerprint}\x00{size}\x00"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
