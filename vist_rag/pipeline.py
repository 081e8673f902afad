"""From a question to an answer: read ``VistRAG.answer_batch`` and you have read the table of contents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from vist_rag.budget import Budget, Plan
from vist_rag.compression import PassageCompressor, VisualMemory
from vist_rag.fidelity import GuardMode
from vist_rag.generation import Generation, Prompt, VistGenerator
from vist_rag.quoting import as_written, find_span
from vist_rag.reader import VistReader
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Answer, Citation, Passage, SearchHit, Usage


class VistRAG(VistReader):
    """Answers questions from an index; retrieved passages reach the generator as text, as memory, or mixed.

    Args:
        index: Where passages and their memories are.
        compressor: Makes the memories that the index does not have yet.
        generator: Reads and answers. Its fusion must have been trained for this compressor.
        **settings: Of :class:`~vist_rag.reader.VistReader`: ``budget``, ``template``, ``max_new_tokens``, ``stop``,
            ``fidelity``, ``guard``.
    """

    index: PassageIndex

    def __init__(
        self,
        index: PassageIndex,
        compressor: PassageCompressor,
        generator: VistGenerator,
        **settings: Any,
    ) -> None:
        super().__init__(compressor, generator, index=index, **settings)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        checkpoint: str | Path | None,
        index: PassageIndex,
        *,
        budget: Budget | None = None,
        device: str | None = None,
        guard: GuardMode = "on",
    ) -> Self:
        """As :meth:`VistReader.from_pretrained`, over an index."""
        return super().from_pretrained(checkpoint, index=index, budget=budget, device=device, guard=guard)

    def answer(self, question: str, *, budget: Budget | None = None) -> Answer:
        """Answer one question.

        Args:
            question: What is asked.
            budget: For this question; None means the pipeline's.
        Raises:
            InputError: If the question is empty or too long, or the prompt does not fit the generator's context.
            ConfigError: If the budget asks for more passages than the index has.
            IncompatibleMemoryError: If the generator's fusion was trained for another compressor.
        """
        return self.answer_batch([question], budget=budget)[0]

    def answer_batch(self, questions: Sequence[str], *, budget: Budget | None = None) -> list[Answer]:
        """Answer questions together: one search, one generation; errors as ``answer``."""
        budget, clock = budget or self.budget, _Clock()
        with clock("search"):
            hits = self.index.search_batch(questions, budget.top_k)
            plans = [self.plan(some, budget) for some in hits]
        with clock("memory"):
            memories = self.memories(plans)
        prompts = [
            self.template.build(question, [hit.passage for hit in plan.raw], read)
            for question, plan, read in zip(questions, plans, memories, strict=True)
        ]
        with clock("generate"):
            generations = self.generator.generate(prompts, max_new_tokens=self.max_new_tokens, stop=self.stop)
        timings = clock.timings_ms()
        return [
            self._answer(question, generation, plan, prompt, timings)
            for question, generation, plan, prompt in zip(questions, generations, plans, prompts, strict=True)
        ]

    def stream(self, question: str, *, budget: Budget | None = None) -> AnswerStream:
        """Answer one question piece by piece; errors as ``answer``."""
        return AnswerStream(self, question, budget or self.budget)

    def memories(self, plans: Sequence[Plan]) -> list[list[VisualMemory]]:
        """The memories that the plans ask for, read from the index; encoded now, and kept, where they are missing."""
        fingerprint = self.compressor.fingerprint
        wanted = {hit.passage.id: hit.passage for plan in plans for hit in plan.compressed}
        stored: dict[str, np.ndarray] = dict(self.index.memories(list(wanted), fingerprint))
        missing = [passage for id_, passage in wanted.items() if id_ not in stored]
        if missing:
            made = compress(self.compressor, missing)
            stored |= made
            if not self.index.read_only:
                # By passage, not by id: nothing is kept for a text that was replaced in the meantime.
                self.index.put_memories({passage: made[passage.id] for passage in missing}, fingerprint)
        full = {id_: self.compressor.memory(torch.from_numpy(stored[id_]).float()) for id_ in wanted}
        return [
            [
                full[hit.passage.id] if n is None else full[hit.passage.id].coarsen(n)
                for hit, n in zip(plan.compressed, plan.latents, strict=True)
            ]
            for plan in plans
        ]

    def _answer(
        self,
        question: str,
        generation: Generation,
        plan: Plan,
        prompt: Prompt,
        timings_ms: Mapping[str, float],
    ) -> Answer:
        text = generation.text
        read = sorted([(hit, "raw") for hit in plan.raw] + [(hit, "memory") for hit in plan.compressed], key=_rank)
        citations = tuple(
            Citation(hit.passage, hit.score, mode, find_span(text, hit.passage.text))  # type: ignore[arg-type]
            for hit, mode in read
        )
        text = as_written(text, [hit.passage.content for hit, _ in read])
        origin = sum(self.raw_tokens(hit.passage) for hit, _ in read)
        raw = sum(self.raw_tokens(hit.passage) for hit in plan.raw)
        compressed = raw + prompt.memory_tokens + self._frame_tokens * len(plan.compressed)
        guarded = {one.hit.passage.id: one.reason for one in plan.guarded}
        usage = Usage(origin, compressed, generation.prompt_tokens, generation.completion_tokens, plan.limit, guarded)
        return Answer(question, text, citations, usage, timings_ms)


class AnswerStream:
    """The pieces of an answer, as an iterator; after the last piece, ``answer`` is the whole."""

    def __init__(self, rag: VistRAG, question: str, budget: Budget) -> None:
        self.answer: Answer | None = None
        self._rag, self._question, self._clock = rag, question, _Clock()
        with self._clock("search"):
            self._plan = rag.plan(rag.index.search(question, budget.top_k), budget)
        with self._clock("memory"):
            memories = rag.memories([self._plan])[0]
        self._prompt = rag.template.build(question, [hit.passage for hit in self._plan.raw], memories)

    def __iter__(self) -> Iterator[str]:
        rag = self._rag
        with self._clock("generate"):
            generation = yield from rag.generator.stream(self._prompt, max_new_tokens=rag.max_new_tokens, stop=rag.stop)
        self.answer = rag._answer(self._question, generation, self._plan, self._prompt, self._clock.timings_ms())


def compress(
    compressor: PassageCompressor, passages: Sequence[Passage], *, progress: bool = False
) -> dict[str, np.ndarray]:
    """Memories of passages as they are stored, by passage id: float16 ``[n, d]``."""
    memories = compressor.encode([p.content for p in passages], progress=progress)
    return {p.id: m.latents.to(torch.float16).numpy() for p, m in zip(passages, memories, strict=True)}


def _rank(read: tuple[SearchHit, str]) -> int:
    return read[0].rank


class _Clock:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._stages[stage] = (time.perf_counter() - begin) * 1000

    def timings_ms(self) -> dict[str, float]:
        return {**self._stages, "total": (time.perf_counter() - self._begin) * 1000}


__all__ = ["AnswerStream", "VistRAG", "compress"]
