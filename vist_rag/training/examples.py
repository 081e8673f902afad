"""What a generator practises on: shown passages, a question, and what is to be written."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vist_rag.training.data import Question, titled
from vist_rag.types import Passage

RECONSTRUCT = "What does the document say?"
CONTINUE = "What comes after: {cue}?"


@dataclass(frozen=True)
class Example:
    """One thing to learn: what is shown (as memory or raw), what is asked, what is to be written."""

    passages: tuple[Passage, ...]
    question: str
    target: str
    raw: bool


def reconstruct_example(passage: Passage, rng: random.Random, *, words: tuple[int, int], raw: bool = False) -> Example:
    """Show a stretch of the passage; the whole of it is to be written back."""
    text = window(titled(passage.title, passage.text), rng.randint(*words), rng)
    return Example((Passage(text),), RECONSTRUCT, text, raw)


def continue_example(passage: Passage, rng: random.Random, *, words: tuple[int, int], raw: bool = False) -> Example:
    """Show a passage and a few words of it; the words after them are to be written."""
    text = window(passage.text, rng.randint(*words), rng)
    spelt = text.split()
    cue, length = rng.randint(2, 5), rng.randint(2, 10)
    at = rng.randint(0, max(0, len(spelt) - cue - length))
    question = CONTINUE.format(cue=" ".join(spelt[at : at + cue]))
    target = " ".join(spelt[at + cue : at + cue + length]) or spelt[-1]
    return Example((Passage(text, title=passage.title),), question, target, raw)


def answer_example(
    row: Question, rng: random.Random, *, words: tuple[int, int], others: Sequence[Passage] = (), raw: bool = False
) -> Example:
    """Show the passage of a question, among others where given; the answer is to be written."""
    lowered = row.context.lower()
    answer = next((a for a in row.answers if a.lower() in lowered), row.answers[0])
    text = window(row.context, rng.randint(*words), rng, keep=answer)
    shown = [Passage(text, title=row.title), *others]
    rng.shuffle(shown)
    return Example(tuple(shown), row.question, answer, raw)


def window(text: str, words: int, rng: random.Random, *, keep: str = "") -> str:
    """About ``words`` consecutive words of the text, from the start of a sentence where it fits, that hold ``keep``."""
    spans = [m.span() for m in re.finditer(r"\S+", text)]
    found = re.search(re.escape(keep.strip()), text, re.IGNORECASE) if keep.strip() else None
    if found:
        first = max(i for i, (start, _) in enumerate(spans) if start <= found.start())
        last = max(i for i, (start, _) in enumerate(spans) if start < found.end())
        words = max(words, last + 1 - first)
    if len(spans) <= words:
        return text
    if found:
        low, high = max(0, last + 1 - words), min(first, len(spans) - words)
    else:
        low, high = 0, len(spans) - words
    starts = [i for i in range(low, max(low, high) + 1) if i == 0 or text[spans[i - 1][1] - 1] in ".!?"]
    begin = rng.choice(starts) if starts else rng.randint(low, max(low, high))
    return text[spans[begin][0] : spans[min(len(spans), begin + words) - 1][1]]


class ExampleMix:
    """Draws the examples of one batch: one kind of task, windows of one length, so that little is padding.

    Args:
        stage: ``batch``, ``tasks`` (each with its ``weight`` and ``words``, the shortest and longest window), ``raw``
            (share of batches that show text instead of memory), ``distractors`` (share of batches of questions that
            show a second passage).
        texts: Plain text.
        questions: Questions with their passages.
        weights: How often each question is drawn.
    """

    def __init__(
        self, stage: dict[str, Any], texts: Sequence[Passage], questions: Sequence[Question], weights: Sequence[float]
    ) -> None:
        self.stage, self.texts, self.questions = stage, texts, questions
        total, self._cumulative = 0.0, []
        for weight in weights:
            total += weight
            self._cumulative.append(total)

    def __call__(self, rng: random.Random) -> list[Example]:
        """A batch of examples."""
        stage = self.stage
        task = rng.choices(list(stage["tasks"]), [task["weight"] for task in stage["tasks"].values()])[0]
        raw = rng.random() < stage.get("raw", 0.0)
        longest = rng.randint(*stage["tasks"][task]["words"])
        words = (max(1, longest * 2 // 3), longest)
        count = stage["batch"]
        if task == "answer":
            rows = rng.choices(self.questions, cum_weights=self._cumulative, k=count)
            return [answer_example(row, rng, words=words, others=self._others(rng, longest), raw=raw) for row in rows]
        make: Callable[..., Example] = {"reconstruct": reconstruct_example, "continue": continue_example}[task]
        passages = rng.choices(self.texts, k=count)
        return [make(passage, rng, words=words, raw=raw) for passage in passages]

    def _others(self, rng: random.Random, words: int) -> list[Passage]:
        if rng.random() >= self.stage.get("distractors", 0.0):
            return []
        other = rng.choice(self.texts)
        return [Passage(window(other.text, words, rng), title=other.title)]


def misspell(text: str, share: float, rng: random.Random) -> str:
    """The text with so many of its letters and digits, drawn by chance, replaced by others."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(rng.choice(letters) if c.isalnum() and rng.random() < share else c for c in text)
