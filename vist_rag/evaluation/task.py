"""What is asked, and how an answer is judged: what every task of the evaluation has.

How the passages reach the prompt is a method's business (``methods.py``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vist_rag.evaluation.methods import Asked, EvalModel
from vist_rag.evaluation.metrics import bootstrap_interval
from vist_rag.generation import Prompt, PromptTemplate

PLAIN = PromptTemplate(raw="{text}\n", untitled="{text}\n", memory="", question="{question}")
"""Text as it is, for tasks that frame it themselves."""


@dataclass(frozen=True)
class Reading:
    """Where a task finds its data.

    Attributes:
        data: Folder of the data sets.
        output: Folder of the results; an index that has to be built is kept there.
        skip_bad: Leave malformed rows out, and tell.
        tell: Takes a line for people.
    """

    data: Path | None
    output: Path
    skip_bad: bool = False
    tell: Callable[[str], None] = print

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every loader."""
        return {"data": self.data, "skip_bad": self.skip_bad, "on_bad": self.tell}


class Task(Protocol):
    """What is asked, and how an answer is judged.

    Attributes:
        asked: With the passages to read.
        metrics: What rows are judged by, the main one first.
        facts: Written into the result as they are.
    """

    asked: list[Asked]
    metrics: tuple[str, ...]
    facts: dict[str, Any]

    def adapt(self, model: EvalModel) -> EvalModel:
        """The model as this task wants to ask it."""

    def answer_tokens(self, asked: Asked) -> int:
        """Positions to keep free for what comes after the prompt."""

    def judge(self, model: EvalModel, asked: Sequence[Asked], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Answer prompts, and score the answers."""

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Means of the metrics with their intervals."""

    def value(self, row: Mapping[str, Any]) -> float:
        """The main metric of one row, for paired tests."""


def sample(rows: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """All rows, or a seeded sample of ``limit`` in their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def means(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval of each metric."""
    figures: dict[str, Any] = {}
    for metric in metrics:
        values = [row[metric] for row in rows]
        figures[metric] = round(sum(values) / len(values), 4)
        figures[f"{metric}_95"] = [round(bound, 4) for bound in bootstrap_interval(values)]
    return figures
