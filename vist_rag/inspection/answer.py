"""What stands behind an answer: the passages that were read, and what it looked at in each."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vist_rag.budget import Budget
from vist_rag.compression import VisualMemory
from vist_rag.errors import InputError
from vist_rag.generation import MemorySegment, TextSegment, VistGenerator
from vist_rag.generation.attention import answer_attention
from vist_rag.inspection.memory import Floats, MemoryView, view_memory
from vist_rag.pipeline import Trace, VistRAG
from vist_rag.types import Answer, Citation, SearchHit

Looked = Literal["copied", "attended", "unknown"]
_SCALE = 3
"""Pixels of a picture for each pixel of a page."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a passage's ``content``, where it stands, and its share of the answer's attention."""

    text: str
    start: int
    end: int
    share: float


@dataclass(frozen=True, eq=False)
class PassageView:
    """How one passage was read, and what the answer looked at in it.

    Attributes:
        citation: The passage, how it was read, and where the answer stands in it.
        raw_tokens: Tokens that it takes as text.
        tokens: Positions that it did take, without what the template puts before a memory.
        memory: What stands behind its memory; None where it was read as text.
        positions: Share of the answer's attention on each of those positions, float32 ``[m]``.
        patches: The same on each patch, float32 ``[p * s]``: what a position has goes evenly to the latents that are
            read there, and what a latent has to the patches that it stands for. None where it was read as text.
        characters: The same on each character of ``passage.content``, float32 ``[c]``.
    """

    citation: Citation
    raw_tokens: int
    tokens: int
    memory: MemoryView | None
    positions: Floats
    patches: Floats | None
    characters: Floats

    @property
    def share(self) -> float:
        """Share of the answer's attention on this passage."""
        return float(self.positions.sum())

    def words(self, count: int | None = None) -> list[Word]:
        """Words, the ones that the answer looked at most first; at most ``count`` of them."""
        found = [
            Word(match[0], match.start(), match.end(), float(self.characters[match.start() : match.end()].sum()))
            for match in re.finditer(r"\w+", self.citation.passage.content)
        ]
        return sorted(found, key=lambda word: -word.share)[:count]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; pages are PNGs in base64.

        Raises:
            MissingDependencyError: If Pillow is not installed.
        """
        citation = self.citation
        passage = citation.passage
        return {
            "id": passage.id,
            "title": passage.title,
            "source": passage.source,
            "text": passage.text,
            "text_start": len(passage.content) - len(passage.text),
            "mode": citation.mode,
            "score": round(citation.score, 4),
            "span": citation.span,
            "raw_tokens": self.raw_tokens,
            "tokens": self.tokens,
            "share": round(self.share, 4),
            "characters": _rounded(self.characters),
            "words": [
                {"text": word.text, "start": word.start, "end": word.end, "share": round(word.share, 4)}
                for word in self.words(5)
                if word.share > 0
            ],
            "pages": [] if self.memory is None else self._pages(self.memory),
        }

    def _pages(self, memory: MemoryView) -> list[dict[str, Any]]:
        pages, patches = memory.pages, self.patches
        if pages.pixel_values.dim() != 4 or patches is None:  # pages of tokens are no pictures
            return []
        boxes, shares = pages.boxes(scale=_SCALE), patches.reshape(len(pages), -1)
        found = []
        for page in range(len(pages)):
            used = max(1, int(pages.patch_mask[page].sum()))
            bottom = int(boxes[used - 1, 1] + boxes[0, 3] + boxes[0, 1])  # the last row and the gap below it
            image = pages.to_image(page, scale=_SCALE)
            image = image.crop((0, 0, image.width, bottom))  # rows without text are left out
            file = io.BytesIO()
            image.save(file, "PNG", optimize=True)
            found.append(
                {
                    "png": base64.b64encode(file.getvalue()).decode("ascii"),
                    "width": image.width,
                    "height": image.height,
                    "boxes": boxes[:used].tolist(),
                    "attention": _rounded(shares[page, :used]),
                }
            )
        return found


@dataclass(frozen=True, eq=False)
class Inspection:
    """A question answered from memory and from the text of the same passages, with what the answer looked at.

    Attributes:
        question: What was asked.
        answer: The answer, its passages read as the budget says.
        raw: The answer where all of them are read as text; None where that is not possible.
        raw_error: Why not.
        passages: The passages that were read, best first.
        looked: How the answer's attention was told (``generation.attention``): ``copied``, ``attended``, or
            ``unknown``; then all shares are 0.
        elsewhere: Share of the answer's attention on no passage: question, template, what was written before, the end.
    """

    question: str
    answer: Answer
    raw: Answer | None
    raw_error: str
    passages: tuple[PassageView, ...]
    looked: Looked
    elsewhere: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; errors as :meth:`PassageView.to_dict`."""
        return {
            "question": self.question,
            "memory": _reading(self.answer),
            "raw": None if self.raw is None else _reading(self.raw),
            "raw_error": self.raw_error,
            "looked": self.looked,
            "elsewhere": round(self.elsewhere, 4),
            "passages": [passage.to_dict() for passage in self.passages],
        }


def inspect_answer(rag: VistRAG, question: str, *, budget: Budget | None = None) -> Inspection:
    """Answer a question as ``rag.answer`` does, once more from raw text, and look at what was read.

    Args:
        rag: The pipeline.
        question: What is asked.
        budget: For this question; None means the pipeline's.
    Raises:
        InputError, ConfigError, IncompatibleMemoryError: As ``rag.answer``.
    """
    (trace,) = rag.trace_batch([question], budget=budget)
    raw, raw_error = _raw(rag, trace)
    found = answer_attention(rag.generator, trace.prompt, trace.generation.token_ids)
    looked: Looked = "unknown"
    weights = np.zeros(rag.generator.prompt_length(trace.prompt), np.float32)
    if found is not None:
        looked, weights = found[0], found[1].mean(0).numpy()
    passages = _views(rag, trace, weights)
    elsewhere = 1 - sum(view.share for view in passages) if found is not None else 0.0
    return Inspection(question, trace.answer, raw, raw_error, passages, looked, elsewhere)


def _raw(rag: VistRAG, trace: Trace) -> tuple[Answer | None, str]:
    """The answer to the same question from the text of the same passages; else why there is none."""
    hits = sorted((*trace.plan.raw, *trace.plan.compressed), key=lambda hit: hit.rank)
    plan = replace(trace.plan, raw=tuple(hits), compressed=(), latents=(), limit=None, guarded=())
    try:
        return rag.trace_batch([trace.answer.question], plans=[plan])[0].answer, ""
    except InputError as error:  # text may be longer than the context that memory fits
        return None, str(error)


def _views(rag: VistRAG, trace: Trace, weights: Floats) -> tuple[PassageView, ...]:
    """Weights of the prompt's positions ``[m]``, passage by passage."""
    places = _places(rag.generator, trace)
    views = []
    for citation in trace.answer.citations:
        hit, begin, segment = places[citation.passage.id]
        content, raw_tokens = hit.passage.content, rag.raw_tokens(hit.passage)
        if isinstance(segment, VisualMemory):
            positions = weights[begin : begin + len(segment)]
            memory = view_memory(rag.compressor, content)
            patches = _patches(segment, memory, positions)
            view = PassageView(
                citation, raw_tokens, len(segment), memory, positions, patches, memory.characters(patches)
            )
        else:
            positions = weights[begin : begin + raw_tokens]
            characters = _characters(rag.generator, hit, segment, positions)
            view = PassageView(citation, raw_tokens, raw_tokens, None, positions, None, characters)
        views.append(view)
    return tuple(views)


def _places(generator: VistGenerator, trace: Trace) -> Mapping[str, tuple[SearchHit, int, VisualMemory | str]]:
    """Where each passage begins in the prompt, by its id, and what of it stands there: its memory, or its text."""
    plan, segments = trace.plan, trace.prompt.segments
    memories = iter(reversed(plan.compressed))
    # The template puts memories first, then texts, the best last, and the question.
    texts = dict(zip(range(len(segments) - 1 - len(plan.raw), len(segments) - 1), reversed(plan.raw), strict=True))
    parts = generator.parts(trace.prompt)
    begin = 0 if trace.prompt.framed else len(parts[0])
    first = len(generator.fusion.boundaries[:1])
    found: dict[str, tuple[SearchHit, int, VisualMemory | str]] = {}
    for number, (segment, part) in enumerate(zip(segments, parts if trace.prompt.framed else parts[1:-1], strict=True)):
        if isinstance(segment, MemorySegment):
            hit = next(memories)
            found[hit.passage.id] = hit, begin + first, segment.memory
            begin += len(part) + generator.fusion.boundary_tokens
            continue
        if number in texts and isinstance(segment, TextSegment):
            found[texts[number].passage.id] = texts[number], begin, segment.text
        begin += len(part)
    return found


def _patches(memory: VisualMemory, view: MemoryView, positions: Floats) -> Floats:
    """Weights of positions ``[m]`` as weights of patches ``[p * s]``."""
    places = memory.places.numpy()
    latents = positions[places] / np.bincount(places)[places]  # [n]
    patches: Floats = latents.astype(np.float32) @ view.windows
    return patches


def _characters(generator: VistGenerator, hit: SearchHit, text: str, positions: Floats) -> Floats:
    """Weights of the tokens of a passage's text in the prompt as weights of the characters of its content."""
    passage = hit.passage
    weights = np.zeros(len(text), np.float32)
    offsets = generator.encoding(text, offsets=True).offset_mapping
    for weight, (start, end) in zip(positions.tolist(), offsets, strict=True):
        weights[start:end] += weight / max(1, end - start)
    # What the template writes around title and text is not the passage's.
    content = np.zeros(len(passage.content), np.float32)
    body = text.rfind(passage.text)
    content[len(content) - len(passage.text) :] = weights[body : body + len(passage.text)]
    if passage.title and (title := text.find(passage.title)) >= 0:
        content[: len(passage.title)] = weights[title : title + len(passage.title)]
    return content


def _reading(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "answer": answer.text,
        "passage_tokens": usage.compressed_tokens,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "ratio": round(usage.ratio, 3),
        "guarded": dict(usage.guarded),
        "timings_ms": {stage: round(ms, 1) for stage, ms in answer.timings_ms.items()},
    }


def _rounded(weights: Floats) -> list[float]:
    rounded: list[float] = np.round(weights.astype(float), 5).tolist()
    return rounded
