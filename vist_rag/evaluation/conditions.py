"""The same questions read in several ways, side by side: memory, raw text, closed book, somebody else's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from vist_rag.compression import VistCompressor, VisualMemory
from vist_rag.errors import ConfigError
from vist_rag.evaluation.methods import strangers
from vist_rag.evaluation.metrics import METRICS, bootstrap_interval
from vist_rag.generation import MemorySegment, Prompt, PromptTemplate, VistGenerator
from vist_rag.types import Passage

CONDITIONS = ("memory", "raw", "closed_book", "shuffled_memory")


@dataclass(frozen=True)
class EvalQuestion:
    """A question, what counts as its answer, and the passages that are read for it (best first)."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]


def evaluate_conditions(
    compressor: VistCompressor,
    generator: VistGenerator,
    questions: Sequence[EvalQuestion],
    *,
    template: PromptTemplate | None = None,
    conditions: Sequence[str] = CONDITIONS,
    latents: Sequence[int | None] = (None,),
    max_new_tokens: int = 24,
    stop: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Answer every question under every condition.

    ``memory`` and ``shuffled_memory`` are measured once for each number of latents. Shuffled memory is that of another
    question's passages, none of them the right one, so that its length and kind are right and its content is not.

    Args:
        compressor: Makes the memories.
        generator: Answers.
        questions: With the passages to read.
        template: The prompt.
        conditions: Any of ``CONDITIONS``.
        latents: At most so many latents a passage; None means all.
        max_new_tokens: Upper limit of an answer.
        stop: An answer ends before any of these strings.
        progress: Show a progress bar.
    Returns:
        ``{"figures": {name: figures}, "rows": [...]}``: EM, F1 and substring match in 0..1 with 95 % bootstrap
        intervals, tokens and ratio for each condition, and a row for each question and condition.
    Raises:
        ConfigError: If a condition is unknown, there are no questions, or all of them share a passage where memory is
            to be shuffled.
    """
    unknown = set(conditions) - set(CONDITIONS)
    if unknown:
        raise ConfigError(f"conditions must be among {', '.join(CONDITIONS)}, got {', '.join(sorted(unknown))}.")
    if not questions:
        raise ConfigError("questions must hold at least one, got none.")
    template = template or PromptTemplate()
    passages = {p.id: p for q in questions for p in q.passages}
    made = compressor.encode([p.content for p in passages.values()], progress=progress)
    memories = dict(zip(passages, made, strict=True))
    others = strangers([q.passages for q in questions]) if "shuffled_memory" in conditions else []
    runs: dict[str, list[Prompt]] = {}
    for name in conditions:
        for n in latents if "memory" in name else (None,):
            key = name if n is None else f"{name}@{n}"
            shown = [questions[i] for i in others] if name == "shuffled_memory" else questions
            runs[key] = [
                _prompt(name, question.question, read.passages, memories, template, n)
                for question, read in zip(questions, shown, strict=True)
            ]
    rows: list[dict[str, Any]] = []
    figures: dict[str, dict[str, Any]] = {}
    for key, prompts in tqdm(runs.items(), desc="answering", unit=" conditions", disable=not progress):
        order = sorted(range(len(prompts)), key=lambda i: generator.prompt_length(prompts[i]))
        answered = generator.generate(
            [prompts[i] for i in order], max_new_tokens=max_new_tokens, stop=stop, batch_size=16
        )
        generations = dict(zip(order, answered, strict=True))
        some = []
        for i, question in enumerate(questions):
            scores = {metric: score(generations[i].text, question.answers) for metric, score in METRICS.items()}
            origin, compressed = _tokens(key, question, prompts[i], generator, template)
            some.append(
                {
                    "condition": key,
                    "id": question.id,
                    "question": question.question,
                    "answers": list(question.answers),
                    "prediction": generations[i].text,
                    **scores,
                    "origin_tokens": origin,
                    "compressed_tokens": compressed,
                }
            )
        figures[key] = _figures(some)
        rows += some
    return {"figures": figures, "rows": rows}


def _prompt(
    name: str,
    question: str,
    passages: Sequence[Passage],
    memories: Mapping[str, VisualMemory],
    template: PromptTemplate,
    latents: int | None,
) -> Prompt:
    if name == "raw":
        return template.build(question, passages, [])
    if name == "closed_book":
        return template.build(question, [], [])
    read = [memories[p.id] for p in passages]
    return template.build(question, [], read if latents is None else [m.coarsen(latents) for m in read])


def _tokens(
    key: str, question: EvalQuestion, prompt: Prompt, generator: VistGenerator, template: PromptTemplate
) -> tuple[int, int]:
    """Tokens of the passages as raw text, and what they took under this condition."""
    origin = sum(generator.count_tokens(template.raw_text(p)) for p in question.passages)
    if key == "closed_book":
        return origin, 0
    if key == "raw":
        return origin, origin
    frame = generator.count_tokens(template.memory) + generator.fusion.boundary_tokens
    return origin, prompt.memory_tokens + frame * sum(isinstance(s, MemorySegment) for s in prompt.segments)


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"questions": len(rows)}
    for metric in METRICS:
        values = [row[metric] for row in rows]
        low, high = bootstrap_interval(values)
        figures[metric] = round(sum(values) / max(1, len(values)), 4)
        figures[f"{metric}_95"] = [round(low, 4), round(high, 4)]
    origin, compressed = (sum(row[name] for row in rows) for name in ("origin_tokens", "compressed_tokens"))
    figures["origin_tokens"] = round(origin / max(1, len(rows)), 1)
    figures["compressed_tokens"] = round(compressed / max(1, len(rows)), 1)
    figures["ratio"] = round(origin / compressed, 3) if compressed else None
    return figures
