"""Open-domain question answering: questions, the passages that are read for them, and how answers are judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation.datasets import QuestionRow, load_corpus, load_questions
from vist_rag.evaluation.methods import Asked, EvalModel
from vist_rag.evaluation.metrics import holds_answer, recall_at_k, score_answer
from vist_rag.evaluation.task import Reading, means, sample
from vist_rag.generation import Prompt
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage

SOURCES = ("gold", "distant", "bm25", "given", "index")
DISTANT_DEPTH = 5
"""``distant`` looks for an answer among so many passages of the BM25 list."""


class QuestionAnswering:
    """Open-domain questions, from gold passages, from those that a file lists, or from those that our index finds.

    Settings of a block: ``dataset``, ``split``, ``passages`` (one of ``SOURCES``), ``top_k``, ``corpus`` (patterns of
    passage files), ``index`` (a folder made by ``vist-rag index``; without one, the corpus is indexed), ``limit``.
    """

    metrics: tuple[str, ...] = ("em", "f1", "substring")

    def __init__(self, block: Mapping[str, Any], model: EvalModel, reading: Reading) -> None:
        self._max_new_tokens = int(block.get("max_new_tokens", model.max_new_tokens))
        source, top_k = block.get("passages", "gold"), int(block.get("top_k", 1))
        if source not in SOURCES:
            raise ConfigError(f"passages must be one of {', '.join(SOURCES)}, got {source!r}.")
        if top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {top_k}.")
        rows = load_questions(block["dataset"], split=block.get("split", "dev"), **reading.options)
        limit, seed = block.get("limit"), int(block.get("seed", 0))
        if source in ("gold", "distant"):
            # A question without such a passage is not asked, so the sample is drawn afterwards.
            found = sample(_with_one(rows, source, block, reading), limit, seed)
        else:
            found = list(self._retrieved(sample(rows, limit, seed), source, top_k, block, reading))
        if not found:
            raise InputError(f"dataset {block['dataset']} must have {source} passages, got none for any question.")
        self._rows = {row.id: row for row, _ in found}
        self.asked = [Asked(row.id, row.question, passages[:top_k]) for row, passages in found]
        self.facts = {"retrieval": _recall(found, top_k), "without_passages": len(rows) - len(found)}
        if limit is not None:
            del self.facts["without_passages"]

    def _retrieved(
        self, rows: Sequence[QuestionRow], source: str, top_k: int, block: Mapping[str, Any], reading: Reading
    ) -> Iterator[tuple[QuestionRow, tuple[Passage, ...]]]:
        if source == "index":
            with _index(block, reading) as index:
                hits = index.search_batch([row.question for row in rows], top_k)
            yield from ((row, tuple(h.passage for h in some)) for row, some in zip(rows, hits, strict=True))
        elif source == "given":
            yield from ((row, row.contexts[:top_k]) for row in rows if row.contexts)
        else:
            wanted = {id_ for row in rows for id_, _ in row.bm25[:top_k]}
            corpus = load_corpus(_patterns(block), wanted=wanted, **reading.options)
            yield from ((row, tuple(corpus[i] for i, _ in row.bm25[:top_k])) for row in rows if row.bm25)

    def adapt(self, model: EvalModel) -> EvalModel:
        """As it is."""
        return model

    def answer_tokens(self, asked: Asked) -> int:
        """What may be generated."""
        return self._max_new_tokens

    def judge(self, model: EvalModel, asked: Sequence[Asked], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Generate, and compare with the answers."""
        generations = model.generator.generate(
            prompts, max_new_tokens=self._max_new_tokens, stop=model.stop, batch_size=len(prompts)
        )
        rows = []
        for one, generation in zip(asked, generations, strict=True):
            row = self._rows[one.id]
            rows.append(
                {
                    "question": row.question,
                    "answers": list(row.answers),
                    "prediction": generation.text,
                    **score_answer(generation.text, row.answers, regex=row.regex),
                    "completion_tokens": generation.completion_tokens,
                }
            )
        return rows

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """EM, F1, substring match."""
        return means(rows, self.metrics)

    def value(self, row: Mapping[str, Any]) -> float:
        """Exact match."""
        return float(row["em"])


def _patterns(block: Mapping[str, Any]) -> list[str]:
    patterns = block.get("corpus", ["corpus/*.jsonl*"])
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _with_one(
    rows: Sequence[QuestionRow], source: str, block: Mapping[str, Any], reading: Reading
) -> list[tuple[QuestionRow, tuple[Passage, ...]]]:
    """Questions with the passage that answers them."""
    if source == "gold":
        wanted = {row.gold[0] for row in rows if row.gold and row.context is None}
        corpus = load_corpus(_patterns(block), wanted=wanted, **reading.options) if wanted else {}
        known = [row for row in rows if row.context is not None or row.gold]
        return [(row, (row.context if row.context is not None else corpus[row.gold[0]],)) for row in known]
    wanted = {id_ for row in rows for id_, _ in row.bm25[:DISTANT_DEPTH]}
    corpus = load_corpus(_patterns(block), wanted=wanted, **reading.options) if wanted else {}
    found: list[tuple[QuestionRow, tuple[Passage, ...]]] = []
    for row in rows:
        ranked = (corpus[id_] for id_, _ in row.bm25[:DISTANT_DEPTH])
        passage = next((p for p in ranked if holds_answer(p.text, row.answers, regex=row.regex)), None)
        if passage is not None:
            found.append((row, (passage,)))
    return found


def _index(block: Mapping[str, Any], reading: Reading) -> PassageIndex:
    """The index that a block names, or one of its corpus, built once and kept with the results."""
    if "index" in block:
        return PassageIndex.open(Path(block["index"]), read_only=True)
    passages = load_corpus(_patterns(block), **reading.options)
    # A corpus that changed is another index: what was found must be what the corpus holds.
    name = hashlib.sha256("\n".join(sorted(passages)).encode()).hexdigest()[:8]
    index = PassageIndex.open(reading.output / f"index-{name}")
    known = index.get(list(passages))
    lacking = [passage for id_, passage in passages.items() if id_ not in known]
    if lacking:
        reading.tell(f"indexing {len(lacking):,} passages")
        index.add(lacking)
    return index


def _recall(found: Sequence[tuple[QuestionRow, tuple[Passage, ...]]], top_k: int) -> dict[str, Any]:
    """How often a gold passage, and an answer string, is among the first k."""
    ks = sorted({1, top_k})
    answer = [[holds_answer(p.content, row.answers, regex=row.regex) for p in some] for row, some in found]
    gold = [
        [p.id in row.gold or (row.context is not None and p.text == row.context.text) for p in some]
        for row, some in found
        if row.gold or row.context is not None
    ]
    return {
        "recall": {str(k): round(v, 4) for k, v in recall_at_k(gold, ks).items()} if gold else None,
        "answer": {str(k): round(v, 4) for k, v in recall_at_k(answer, ks).items()},
    }
