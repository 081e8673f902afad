"""From a question to an answer: read ``VistRAG.answer_batch`` and you have read the table of contents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch

from vist_rag.batching import MicroBatcher
from vist_rag.budget import Budget, Plan
from vist_rag.compression import PassageCompressor, VisualMemory
from vist_rag.fidelity import GuardMode
from vist_rag.generation import Generation, Prompt, VistGenerator
from vist_rag.quoting import as_written, find_span
from vist_rag.reader import Asking, How, Streamed, VistReader
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Answer, Citation, SearchHit, Usage


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
        self._questions: MicroBatcher[tuple[str, Budget, Asking], Answer] = MicroBatcher(
            lambda asked: self.answer_batch([one[0] for one in asked], budget=asked[0][1], **asked[0][2]),
            max_batch_size=self._batcher.max_batch_size,
            max_wait_ms=self._batcher.max_wait_ms,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        checkpoint: str | Path | None,
        index: PassageIndex,
        *,
        budget: Budget | None = None,
        device: str | None = None,
        guard: GuardMode = "on",
        generator: VistGenerator | None = None,
        quantize: str | None = None,
    ) -> Self:
        """As :meth:`VistReader.from_pretrained`, over an index."""
        return super().from_pretrained(
            checkpoint,
            index=index,
            budget=budget,
            device=device,
            guard=guard,
            generator=generator,
            quantize=quantize,
        )

    def answer(self, question: str, *, budget: Budget | None = None, **how: Unpack[Asking]) -> Answer:
        """Answer one question. Questions of several threads that come at the same time are answered together.

        Args:
            question: What is asked.
            budget: For this question; None means the pipeline's.
            **how: See :class:`~vist_rag.reader.Asking`.
        Raises:
            InputError: If the question is empty or too long, or the prompt does not fit the generator's context.
            ConfigError: If the budget asks for more passages than the index has, or a number is out of range.
            IncompatibleMemoryError: If the generator's fusion was trained for another compressor.
        """
        return self._ask(question, budget, **how).result()

    async def aanswer(self, question: str, *, budget: Budget | None = None, **how: Unpack[Asking]) -> Answer:
        """As :meth:`answer`; the event loop is free meanwhile."""
        return await asyncio.wrap_future(self._ask(question, budget, **how))

    def _ask(self, question: str, budget: Budget | None, **how: Unpack[Asking]) -> Future[Answer]:
        budget = budget or self.budget
        return self._questions.submit((question, budget, how), key=(budget, self._how(**how).key))

    def answer_batch(
        self, questions: Sequence[str], *, budget: Budget | None = None, **how: Unpack[Asking]
    ) -> list[Answer]:
        """Answer questions together: one search, one generation, one seed; errors as ``answer``."""
        return [trace.answer for trace in self.trace_batch(questions, budget=budget, **how)]

    def trace_batch(
        self,
        questions: Sequence[str],
        *,
        budget: Budget | None = None,
        plans: Sequence[Plan] | None = None,
        **how: Unpack[Asking],
    ) -> list[Trace]:
        """As ``answer_batch``, each answer with what led to it.

        Args:
            questions: What is asked.
            budget: For these questions; None means the pipeline's.
            plans: How each question's passages are read; None: what the search finds, by the budget.
            **how: See :class:`~vist_rag.reader.Asking`.
        """
        budget, clock, settled = budget or self.budget, _Clock(), self._how(**how)
        with clock("search"):
            if plans is None:
                hits = self.index.search_batch(questions, budget.top_k)
                plans = [self.plan(some, budget) for some in hits]
        with clock("memory"):
            memories = self.memories(plans)
        prompts = [
            self.template.build(question, [hit.passage for hit in plan.raw], read)
            for question, plan, read in zip(questions, plans, memories, strict=True)
        ]
        with clock("generate"):
            generations = self.generator.generate(prompts, **settled.arguments())
        timings = clock.timings_ms()
        return [
            Trace(self._answer(question, generation, plan, prompt, timings), plan, prompt, generation)
            for question, generation, plan, prompt in zip(questions, generations, plans, prompts, strict=True)
        ]

    def stream(self, question: str, *, budget: Budget | None = None, **how: Unpack[Asking]) -> AnswerStream:
        """Answer one question piece by piece; a pass of its own; errors as ``answer``."""
        return AnswerStream(self, question, budget or self.budget, self._how(**how))

    def memories(self, plans: Sequence[Plan]) -> list[list[VisualMemory]]:
        """The memories that the plans ask for, read from the index; encoded now, and kept, where they are missing."""
        read = self._latents([hit.passage.content for plan in plans for hit in plan.compressed], self.index)
        full = {text: self.compressor.memory(latents.float()) for text, latents in read.items()}
        return [
            [
                full[hit.passage.content] if n is None else full[hit.passage.content].coarsen(n)
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


@dataclass(frozen=True, slots=True)
class Trace:
    """An answer, with what led to it.

    Attributes:
        answer: The answer.
        plan: How the passages were read.
        prompt: What the generator was asked.
        generation: What it said.
    """

    answer: Answer
    plan: Plan
    prompt: Prompt
    generation: Generation


class AnswerStream(Streamed):
    """The pieces of an answer; after the last piece, ``answer`` is the whole."""

    def __init__(self, rag: VistRAG, question: str, budget: Budget, how: How) -> None:
        self.answer: Answer | None = None
        self._rag, self._question, self._how, self._clock = rag, question, how, _Clock()
        with self._clock("search"):
            self._plan = rag.plan(rag.index.search(question, budget.top_k), budget)
        with self._clock("memory"):
            memories = rag.memories([self._plan])[0]
        self._prompt = rag.template.build(question, [hit.passage for hit in self._plan.raw], memories)

    def __iter__(self) -> Generator[str, None, None]:
        rag = self._rag
        with self._clock("generate"):
            generation = yield from rag.generator.stream(self._prompt, **self._how.arguments())
        self.answer = rag._answer(self._question, generation, self._plan, self._prompt, self._clock.timings_ms())


def encode_lacking(
    index: PassageIndex, compressor: PassageCompressor, *, batch_size: int = 64
) -> Iterator[dict[str, np.ndarray]]:
    """Give every passage of an index a memory of this compressor, batch by batch, each kept before the next is made.

    Others may read and write meanwhile. What is interrupted goes on where it was: only what is missing is made.

    Args:
        index: Whose passages.
        compressor: What makes the memories.
        batch_size: Passages a transaction: what a kill can undo.
    Yields:
        The memories of each batch, float16 ``[n, d]`` by text, once they are kept.
    Raises:
        StoreError: If the index is read-only or locked.
    """
    lacking = index.passages(lacking=compressor.fingerprint)
    while batch := list(islice(lacking, batch_size)):
        made = compress(compressor, [passage.content for passage in batch])
        index.put_memories(made, compressor.fingerprint, form=compressor.memory_form, only_stored=True)
        yield made


def compress(compressor: PassageCompressor, texts: Sequence[str], *, progress: bool = False) -> dict[str, np.ndarray]:
    """Memories of texts as they are handed to an index: float16 ``[n, d]`` by text."""
    texts = list(dict.fromkeys(texts))
    memories = compressor.encode(texts, progress=progress)
    return {text: memory.latents.to(torch.float16).numpy() for text, memory in zip(texts, memories, strict=True)}


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


__all__ = ["AnswerStream", "Trace", "VistRAG", "compress", "encode_lacking"]
