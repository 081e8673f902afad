"""The values that travel through vist-rag. Plain frozen data: no torch, no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

ReadMode = Literal["raw", "memory"]


def _no_metadata() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that can be retrieved, compressed and cited.

    Attributes:
        text: The text as it was found. Never altered: citations point into it.
        id: Unique in an index. Left empty, it becomes a hash of title and text, so that adding the same passage
            twice is adding it once.
        title: What the passage is about; shown to the model before the text.
        source: Where it comes from (a path, a URL).
        metadata: JSON values of the user's own; kept, returned, never read.
    """

    text: str
    id: str = ""
    title: str = ""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=_no_metadata, hash=False)

    def __post_init__(self) -> None:
        if not self.id:
            digest = hashlib.sha256(f"{self.title}\x00{self.text}".encode("utf-8", "surrogatepass"))
            object.__setattr__(self, "id", digest.hexdigest()[:16])

    @property
    def content(self) -> str:
        """What is embedded, rendered and compressed: the title, a colon, the text."""
        return f"{self.title}: {self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A passage that retrieval returned, with its score (cosine similarity, higher is better) and rank (from 0)."""

    passage: Passage
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that the answer was read from.

    Attributes:
        passage: The passage, with its original text.
        score: Its retrieval score.
        mode: Whether the generator read it as raw text or as memory.
        span: Where the answer occurs in ``passage.text``, as ``(start, end)`` in characters; None where it does not.
    """

    passage: Passage
    score: float
    mode: ReadMode
    span: tuple[int, int] | None = None

    @property
    def quote(self) -> str | None:
        """The answer as the passage writes it, in its original casing; None where it does not occur."""
        return None if self.span is None else self.passage.text[self.span[0] : self.span[1]]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer cost, in positions of the generator's context.

    Attributes:
        origin_tokens: Tokens that the retrieved passages would have taken as raw text.
        compressed_tokens: Positions that they did take: raw tokens of those read raw, latents of those read as
            memory, with their boundary embeddings and the text that the template puts before each.
        prompt_tokens: Positions of the whole prompt, question and template included.
        completion_tokens: Tokens that were generated.
        budget: The limit of ``compressed_tokens`` that was in force; None where there was none.
        guarded: Passages that memory would not have kept whole, by id, each with the reason; ``Citation.mode`` tells
            how it was read all the same, and one without a citation was left out.
    """

    origin_tokens: int
    compressed_tokens: int
    prompt_tokens: int
    completion_tokens: int
    budget: int | None = None
    guarded: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def ratio(self) -> float:
        """``origin_tokens / compressed_tokens``; 1.0 where nothing was retrieved."""
        return self.origin_tokens / self.compressed_tokens if self.compressed_tokens else 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question, with what supports it and what it cost.

    Attributes:
        question: The question as it was asked.
        text: The answer; empty where the model gave none.
        citations: The passages that were read, best first.
        usage: Tokens, raw against memory.
        timings_ms: Milliseconds by stage: ``search``, ``memory``, ``generate``, ``total``.
    """

    question: str
    text: str
    citations: tuple[Citation, ...]
    usage: Usage
    timings_ms: Mapping[str, float]
