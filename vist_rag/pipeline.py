"""From a question to an answer: read ``VistRAG.answer_batch`` and you have read the table of contents."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModel

from vist_rag.budget import Budget, Plan
from vist_rag.compression import PassageCompressor, VisualMemory
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.generation import Generation, Prompt, PromptTemplate, VistGenerator, best_device
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Answer, Citation, Passage, SearchHit, Usage

SETTINGS_FILE = "vist.json"


class VistRAG:
    """Answers questions from an index; retrieved passages reach the generator as text, as memory, or mixed.

    Args:
        index: Where passages and their memories are.
        compressor: Makes the memories that the index does not have yet.
        generator: Reads and answers. Its fusion must have been trained for this compressor.
        budget: How many passages are read which way.
        template: How passages and question become a prompt.
        max_new_tokens: Upper limit of an answer.
        stop: An answer ends before any of these strings.
    """

    def __init__(
        self,
        index: PassageIndex,
        compressor: PassageCompressor,
        generator: VistGenerator,
        *,
        budget: Budget | None = None,
        template: PromptTemplate | None = None,
        max_new_tokens: int = 32,
        stop: Sequence[str] = (),
    ) -> None:
        self.index = index
        self.compressor = compressor.eval()
        self.generator = generator
        self.budget = budget or Budget()
        self.template = template or PromptTemplate()
        self.max_new_tokens = max_new_tokens
        self.stop = tuple(stop)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None,
        index: PassageIndex,
        *,
        budget: Budget | None = None,
        device: str | None = None,
    ) -> VistRAG:
        """Load compressor, generator and fusion from one directory.

        Args:
            checkpoint: Local directory with ``compressor/``, ``generator/``, ``fusion/`` and ``vist.json``, or a hub id
                of such a directory; None means the embedded model. Pretrained models that it refers to are loaded from
                where they are.
            index: Where passages and their memories are.
            budget: None means the checkpoint's own.
            device: None means cuda, then mps, then cpu.
        Raises:
            CheckpointError: If something is missing or cannot be read, or a model that is referred to was changed.
            MissingDependencyError: If the generator has a LoRA adapter and peft is not installed.
        """
        directory = find_checkpoint(checkpoint)
        settings = read_settings(directory)
        try:
            own, template = Budget(**settings.get("budget", {})), PromptTemplate(**settings.get("template", {}))
        except (TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{directory / SETTINGS_FILE} is not of this version ({error}); restore it."
            ) from error
        return cls(
            index,
            load_compressor(directory, device=device),
            VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device=device),
            budget=budget or own,
            template=template,
            max_new_tokens=settings.get("max_new_tokens", 32),
            stop=settings.get("stop", ()),
        )

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

    def plan(self, hits: Sequence[SearchHit], budget: Budget | None = None) -> Plan:
        """How each hit is read."""

        def raw_tokens(passage: Passage) -> int:
            return self.generator.count_tokens(self.template.raw_text(passage))

        return (budget or self.budget).split(hits, raw_tokens=raw_tokens, memory_tokens=self.memory_tokens)

    def memory_tokens(self, passage: Passage, latents: int | None) -> int:
        """Positions that a passage takes as memory, known before it is encoded."""
        n = self.compressor.count_latents(passage.content)
        frame = self.generator.count_tokens(self.template.memory) + self.generator.fusion.boundary_tokens
        return int(frame + (n if latents is None else min(n, latents)))

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
        quote = next((c.quote for c in citations if c.quote), None)
        if quote and text == text.lower():
            text = quote  # an uncased generator: the passage knows how it is written
        origin = sum(self.generator.count_tokens(self.template.raw_text(hit.passage)) for hit, _ in read)
        raw = sum(self.generator.count_tokens(self.template.raw_text(hit.passage)) for hit in plan.raw)
        frame = self.generator.count_tokens(self.template.memory) + self.generator.fusion.boundary_tokens
        compressed = raw + prompt.memory_tokens + frame * len(plan.compressed)
        usage = Usage(origin, compressed, generation.prompt_tokens, generation.completion_tokens)
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


def embedded_checkpoint() -> Path:
    """Directory of the model that ships with this package."""
    return Path(__file__).parent / "assets" / "model"


def find_checkpoint(checkpoint: str | Path | None) -> Path:
    """A checkpoint's local directory: the embedded one, a path, or a hub id (downloaded).

    Raises:
        CheckpointError: If it is neither a directory nor to be had from the hub.
    """
    if checkpoint is None:
        return embedded_checkpoint()
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(checkpoint)))
    except Exception as error:  # the hub's errors have no common base class
        raise CheckpointError(
            f"checkpoint must be a local directory or a hub id, got {str(checkpoint)!r} ({error})."
        ) from error


def read_settings(directory: Path) -> dict[str, Any]:
    """``vist.json`` of a checkpoint.

    Raises:
        CheckpointError: If it is missing or no JSON object.
    """
    try:
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} must hold {SETTINGS_FILE} ({error}); restore it.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{directory / SETTINGS_FILE} must be a JSON object, got {settings!r}; restore it.")
    return settings


def load_compressor(directory: Path, *, device: str | None = None) -> PassageCompressor:
    """The compressor of a checkpoint directory, on its device: bf16 on cuda, float32 elsewhere.

    Raises:
        CheckpointError: If it cannot be read, or the tower that it refers to is missing or was changed.
    """
    place = torch.device(device) if device else best_device()
    try:
        compressor = AutoModel.from_pretrained(
            directory / "compressor", dtype=torch.bfloat16 if place.type == "cuda" else torch.float32
        )
    except CheckpointError:
        raise
    except Exception as error:  # torn safetensors, missing files and bad JSON each raise a class of their own
        raise CheckpointError(f"compressor in {directory} cannot be loaded ({error}); restore its files.") from error
    if not isinstance(compressor, PassageCompressor):
        raise CheckpointError(
            f"compressor in {directory} must be one of vist-rag's, got {type(compressor).__name__}; restore its files."
        )
    return cast(PassageCompressor, cast(Any, compressor).to(place).eval())


def find_span(answer: str, text: str) -> tuple[int, int] | None:
    """Where the words of an answer stand in a text, whatever case, accents and punctuation they are written with."""
    words = re.findall(r"\w+", _fold(answer)[0])
    if not words:
        return None
    folded, places = _fold(text)
    match = re.search(r"(?<!\w)" + r"[\W_]*".join(map(re.escape, words)) + r"(?!\w)", folded)
    if match is None:
        return None
    start, end = places[match.start()], places[match.end() - 1] + 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1  # an accent that stands by itself belongs to the letter before it
    return start, end


def _fold(text: str) -> tuple[str, list[int]]:
    """Lower case without accents, and where in ``text`` each character came from."""
    folded, places = [], []
    for i, character in enumerate(text):
        for part in unicodedata.normalize("NFD", character.lower()):
            if not unicodedata.combining(part):
                folded.append(part)
                places.append(i)
    return "".join(folded), places


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


__all__ = ["AnswerStream", "VistRAG", "compress", "embedded_checkpoint", "find_span"]
