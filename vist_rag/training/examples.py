"""What a generator practises on: shown passages, a question, and what is to be written."""

from __future__ import annotations

import random
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vist_rag.training.data import Question, TextSequence, titled
from vist_rag.types import Passage

RECONSTRUCT = "What does the document say?"
CONTINUE = "What comes after: {cue}?"


@dataclass(frozen=True)
class Example:
    """One thing to learn: what is shown (as memory or raw), what is asked, what is to be written.

    ``ends`` tells whether the end of the text is to be written, too: a sequence that was cut has none.
    """

    passages: tuple[Passage, ...]
    question: str
    target: str
    raw: bool
    ends: bool = True


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


def next_token_example(passage: Passage, rng: random.Random, *, words: tuple[int, int], raw: bool = False) -> Example:
    """Show the beginning of a passage, between a half and nine tenths of it; the rest is to be written."""
    spelt = window(passage.text, rng.randint(*words), rng).split()
    cut = max(1, min(len(spelt) - 1, round(len(spelt) * rng.uniform(0.5, 0.9))))
    shown = Passage(" ".join(spelt[:cut]), title=passage.title)
    return Example((shown,), "", " ".join(spelt[cut:]) or spelt[-1], raw)


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
        stage: ``batch`` (examples at most), ``batch_words`` (words shown at most; none: any number), ``tasks`` (each
            with its ``weight`` and ``words``, the shortest and longest window), ``raw`` (share of batches that show
            text instead of memory), ``distractors`` (share of batches of questions that show other passages too),
            ``others`` (how many of these at most; none: 1), ``prompt_words`` (words that one example shows at most;
            none: any number). An answer that is longer is shown whole all the same.
        texts: Plain text.
        questions: Questions with their passages.
        weights: How often each question is drawn; None means all alike.
    """

    def __init__(
        self,
        stage: Mapping[str, Any],
        texts: Sequence[Passage],
        questions: Sequence[Question] = (),
        weights: Sequence[float] | np.ndarray[Any, Any] | None = None,
    ) -> None:
        self.stage, self.texts, self.questions = stage, texts, questions
        self._cumulative = np.cumsum(np.ones(len(questions)) if weights is None else weights)
        self._of_title: dict[str, array[int]] = defaultdict(lambda: array("q"))
        if stage.get("distractors"):
            for i, row in enumerate(questions):
                self._of_title[row.title].append(i)

    def __call__(self, rng: random.Random) -> list[Example]:
        """A batch of examples."""
        stage = self.stage
        task = rng.choices(list(stage["tasks"]), [task["weight"] for task in stage["tasks"].values()])[0]
        raw = rng.random() < stage.get("raw", 0.0)
        longest = rng.randint(*stage["tasks"][task]["words"])
        others = 0
        if task == "answer" and rng.random() < stage.get("distractors", 0.0):
            others = rng.randint(1, stage.get("others", 1))
        limit = stage.get("prompt_words", longest * (1 + others))
        limit = limit if raw else stage.get("memory_words", limit)
        longest = max(1, min(longest, limit // (1 + others)))
        words = (max(1, longest * 2 // 3), longest)
        shown = longest * (1 + others)
        count = max(1, min(stage["batch"], stage.get("batch_words", stage["batch"] * shown) // shown))
        if task == "answer":
            drawn = [rng.random() * self._cumulative[-1] for _ in range(count)]
            rows = [self.questions[int(np.searchsorted(self._cumulative, at, side="right"))] for at in drawn]
            return [
                answer_example(row, rng, words=words, others=self._others(row, others, rng, words), raw=raw)
                for row in rows
            ]
        make: Callable[..., Example] = {
            "reconstruct": reconstruct_example,
            "continue": continue_example,
            "next_token": next_token_example,
        }[task]
        passages = rng.choices(self.texts, k=count)
        return [make(passage, rng, words=words, raw=raw) for passage in passages]

    def _others(self, row: Question, count: int, rng: random.Random, words: tuple[int, int]) -> list[Passage]:
        """Passages that a search might return beside the right one, half of them of its article where there are."""
        near = self._of_title[row.title] if row.title else array("q")
        others = []
        for _ in range(count):
            other = self.questions[rng.choice(near)] if near and rng.random() < 0.5 else None
            if other is not None and other.context != row.context:
                shown = Passage(other.context, title=other.title)
            else:
                shown = rng.choice(self.texts)
            others.append(Passage(window(shown.text, rng.randint(*words), rng), title=shown.title))
        return others


class SequenceMix:
    """Draws the sequences of one batch, none of them twice: the beginning is shown, what comes next is to be told.

    Args:
        sequences: All of them.
        batch: How many a batch has; fewer where there are fewer.
    """

    def __init__(self, sequences: Sequence[TextSequence], batch: int) -> None:
        self.sequences, self.batch = sequences, min(batch, len(sequences))

    def __call__(self, rng: random.Random) -> list[Example]:
        """A batch of examples."""
        drawn = [self.sequences[i] for i in rng.sample(range(len(self.sequences)), self.batch)]
        return [Example((Passage(one.shown),), "", one.told, raw=False, ends=False) for one in drawn]


def misspell(text: str, share: float, rng: random.Random) -> str:
    """The text with so many of its letters and digits, drawn by chance, replaced by others."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(rng.choice(letters) if c.isalnum() and rng.random() < share else c for c in text)
