"""In-context learning: classification from demonstrations, some read as text and the others as passages."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation.datasets import LabelledText, load_labelled
from vist_rag.evaluation.methods import Asked, EvalModel
from vist_rag.evaluation.task import PLAIN, Reading, means, sample
from vist_rag.generation import Prompt
from vist_rag.types import Passage


class InContextLearning:
    """Classification from demonstrations, some of them as text and the others as passages.

    Settings of a block: ``dataset``, ``split`` (of what is classified), ``n_text`` and ``n_memory`` demonstrations,
    ``seeds`` (each draws its own demonstrations and texts), ``limit`` texts a seed, ``passage_words``.
    """

    metrics: tuple[str, ...] = ("accuracy",)

    def __init__(self, block: Mapping[str, Any], reading: Reading) -> None:
        n_text, n_memory = int(block.get("n_text", 2)), int(block.get("n_memory", 18))
        if n_text < 0 or n_memory < 1:
            raise ConfigError(f"n_text must be 0 or more and n_memory 1 or more, got {n_text} and {n_memory}.")
        seeds = [int(seed) for seed in block.get("seeds", (42, 43, 44))]
        train, texts = (
            load_labelled(block["dataset"], split=split, **reading.options)
            for split in (block.get("train_split", "train"), block.get("split", "test"))
        )
        self.labels = sorted({row.label for row in train})
        words = int(block.get("passage_words", 90))
        self.asked: list[Asked] = []
        self._labels: dict[str, str] = {}
        for seed in seeds:
            demonstrations = balanced(train, n_text + n_memory, seed)
            passages = tuple(_joined([_demonstration(row) for row in demonstrations[n_text:]], words))
            shown = "".join(_demonstration(row) for row in demonstrations[:n_text])
            for number, row in enumerate(sample(texts, block.get("limit", 250), seed)):
                id_ = f"{seed}-{number:04}"
                self.asked.append(Asked(id_, f"{shown}Text: {row.text}\nLabel:", passages))
                self._labels[id_] = row.label
        self.facts = {"n_text": n_text, "n_memory": n_memory, "seeds": seeds, "labels": len(self.labels)}

    def adapt(self, model: EvalModel) -> EvalModel:
        """Demonstrations frame themselves."""
        return replace(model, template=PLAIN)

    def answer_tokens(self, asked: Asked) -> int:
        """Room for a label."""
        return 16

    def judge(self, model: EvalModel, asked: Sequence[Asked], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The label that is most likely as a whole."""
        ids = [model.generator.tokenize(f" {label.replace('_', ' ')}") for label in self.labels]
        rows = []
        for one, prompt in zip(asked, prompts, strict=True):
            scores = [float(tokens.sum()) for tokens in model.generator.score(prompt, ids)]
            best = self.labels[max(range(len(scores)), key=scores.__getitem__)]
            label = self._labels[one.id]
            rows.append({"label": label, "prediction": best, "accuracy": float(best == label)})
        return rows

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy."""
        return means(rows, self.metrics)

    def value(self, row: Mapping[str, Any]) -> float:
        """Right or wrong."""
        return float(row["accuracy"])


def balanced(rows: Sequence[LabelledText], n: int, seed: int) -> list[LabelledText]:
    """``n`` demonstrations, of every label as many as of any other, give or take one, in random order.

    Raises:
        InputError: If there are fewer rows.
    """
    if n > len(rows):
        raise InputError(f"n_text + n_memory must be at most the {len(rows)} training rows, got {n}.")
    rng = random.Random(seed)
    by_label: dict[str, list[LabelledText]] = defaultdict(list)
    for row in rng.sample(list(rows), len(rows)):
        by_label[row.label].append(row)
    drawn: list[LabelledText] = []
    while len(drawn) < n:
        labels = [label for label, some in sorted(by_label.items()) if some]
        for label in rng.sample(labels, len(labels))[: n - len(drawn)]:
            drawn.append(by_label[label].pop())
    return rng.sample(drawn, n)


def _demonstration(row: LabelledText) -> str:
    return f"Text: {row.text}\nLabel: {row.label.replace('_', ' ')}\n"


def _joined(texts: Sequence[str], words: int) -> list[Passage]:
    """Texts as passages of about so many words."""
    parts: list[list[str]] = [[]]
    for text in texts:
        if parts[-1] and len(" ".join((*parts[-1], text)).split()) > words:
            parts.append([])
        parts[-1].append(text)
    return [Passage("".join(part)) for part in parts]
