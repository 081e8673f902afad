"""The bundled corpus and its questions, and how well a pipeline answers them from found and from gold passages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from vist_rag.budget import Plan
from vist_rag.compression import VistCompressor, VisualMemory
from vist_rag.errors import ConfigError
from vist_rag.evaluation.conditions import CONDITIONS, EvalQuestion, evaluate_conditions
from vist_rag.pipeline import VistRAG
from vist_rag.retrieval import read_passages
from vist_rag.types import Passage, SearchHit

SPLITS = ("dev", "test")
RUNS = 7
"""Runs over the questions that :func:`evaluate_demo` makes, besides one for each size of ``latents``."""

_DEMO = Path(__file__).parents[1] / "assets" / "demo"


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question on the bundled corpus; ``passage_id`` names the one passage that answers it."""

    id: str
    question: str
    answers: tuple[str, ...]
    passage_id: str
    split: str


def demo_passages() -> list[Passage]:
    """The bundled corpus: subjects of the world, and the handbook of a made-up company."""
    return list(read_passages(sorted(_DEMO.glob("passages_*.jsonl"))))


def demo_questions(split: str) -> list[DemoQuestion]:
    """The questions of one split: ``dev`` to look at, ``test`` to measure with.

    Raises:
        ConfigError: If there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    lines = [line for path in sorted(_DEMO.glob("questions_*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    questions = [DemoQuestion(**{**row, "answers": tuple(row["answers"])}) for row in map(json.loads, lines)]
    return [question for question in questions if question.split == split]


def evaluate_demo(
    rag: VistRAG, split: str = "test", *, latents: Sequence[int] = (), advance: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Answer the bundled questions in several ways.

    ``open_domain``: the passages are the best hits of the index, as many as the pipeline's budget reads.
    ``gold_passage``: the one passage that answers the question. ``elastic``: the open-domain questions from memory of
    at most so many latents a passage. Memories are read from the index, as answering reads them. Raw text that does
    not fit the generator's context is left out from the worst passage on; ``passages_read`` tells.

    Args:
        rag: Over an index that holds :func:`demo_passages`.
        split: ``dev`` or ``test``.
        latents: Sizes for ``elastic``.
        advance: Called with 1 after each of the ``RUNS + len(latents)`` runs.
    Returns:
        ``questions``, ``top_k``, ``latents``, ``recall`` by k, the three groups of figures, and ``rows``.
    Raises:
        ConfigError: If there is no such split, or the index has fewer passages than the budget reads.
    """
    questions = demo_questions(split)
    top_k, own = rag.budget.top_k, rag.budget.latents
    hits = rag.index.search_batch([q.question for q in questions], top_k)
    found = [[hit.passage for hit in some] for some in hits]
    gold = rag.index.get(q.passage_id for q in questions)
    missing = sorted({q.passage_id for q in questions} - set(gold))
    if missing:
        raise ConfigError(
            f"the index must hold the bundled corpus, {len(missing)} passages are missing; index it first."
        )
    open_domain = [EvalQuestion(q.id, q.question, q.answers, tuple(p)) for q, p in zip(questions, found, strict=True)]
    with_gold = [replace(q, passages=(gold[d.passage_id],)) for q, d in zip(open_domain, questions, strict=True)]
    reader = _Reader(rag, [*open_domain, *with_gold], advance or (lambda _: None))
    groups: dict[str, dict[str, Any]] = {
        "open_domain": {name: reader.read("open_domain", name, open_domain, own) for name in CONDITIONS},
        # Without passages the two groups ask the same.
        "gold_passage": {
            name: reader.read("gold_passage", name, with_gold, own) for name in CONDITIONS if name != "closed_book"
        },
        "elastic": {str(n): reader.read("elastic", "memory", open_domain, n) for n in latents},
    }
    ids = [[p.id for p in some] for some in found]
    recall = {
        str(k): round(sum(q.passage_id in some[:k] for q, some in zip(questions, ids, strict=True)) / len(questions), 4)
        for k in range(1, top_k + 1)
    }
    facts = {"split": split, "questions": len(questions), "top_k": top_k, "latents": own, "recall": recall}
    return {**facts, **groups, "rows": reader.rows}


class _Reader:
    """Runs :func:`evaluate_conditions` on memories from the index, and collects the rows."""

    def __init__(self, rag: VistRAG, questions: Sequence[EvalQuestion], advance: Callable[[int], None]) -> None:
        self.rag = rag
        self.advance = advance
        self.rows: list[dict[str, Any]] = []
        passages = {p.id: p for q in questions for p in q.passages}
        hits = tuple(SearchHit(p, 0.0, rank) for rank, p in enumerate(passages.values()))
        memories = rag.memories([Plan((), hits, (None,) * len(hits))])[0]
        self._memories = _StoredMemories({p.content: m for p, m in zip(passages.values(), memories, strict=True)})

    def read(
        self, group: str, condition: str, questions: Sequence[EvalQuestion], latents: int | None
    ) -> dict[str, Any]:
        """Figures of one condition."""
        rag = self.rag
        if condition == "raw":
            questions = [replace(q, passages=self._fitting(q)) for q in questions]
        result = evaluate_conditions(
            cast(VistCompressor, self._memories),
            rag.generator,
            questions,
            template=rag.template,
            conditions=(condition,),
            latents=(latents,),
            max_new_tokens=rag.max_new_tokens,
            stop=rag.stop,
        )
        self.rows += [{"group": group, **row} for row in result["rows"]]
        (figures,) = result["figures"].values()
        if condition == "raw":
            figures["passages_read"] = round(sum(len(q.passages) for q in questions) / len(questions), 2)
        self.advance(1)
        return cast(dict[str, Any], figures)

    def _fitting(self, question: EvalQuestion) -> tuple[Passage, ...]:
        rag, passages = self.rag, question.passages
        limit = rag.generator.context_tokens
        while passages and limit is not None:
            prompt = rag.template.build(question.question, passages, [])
            if rag.generator.prompt_length(prompt) + rag.max_new_tokens <= limit:
                break
            passages = passages[:-1]
        return passages


class _StoredMemories:
    """Stands where a compressor is asked to encode, and gives what was stored."""

    def __init__(self, by_content: Mapping[str, VisualMemory]) -> None:
        self._by_content = by_content

    def encode(self, texts: Sequence[str], **_: object) -> list[VisualMemory]:
        return [self._by_content[text] for text in texts]
