"""Questions without labels: the generator asks, and answers what it reads as text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from vist_rag.generation import Prompt, PromptTemplate, VistGenerator
from vist_rag.generation.prompt import TextSegment
from vist_rag.training.corpus import QuestionCorpus, open_questions
from vist_rag.training.data import Question
from vist_rag.types import Passage

ASK = "Write one short question that the document answers.\nQuestion:"


def own_answers(
    generator: VistGenerator,
    asked: Sequence[Passage] | Sequence[Question],
    path: Path,
    *,
    count: int,
    seed: int = 0,
    max_new_tokens: int = 48,
    batch_size: int = 16,
) -> QuestionCorpus:
    """What the generator answers when it reads each passage raw: the goal of self-distillation, without labels.

    Rows are added to ``path`` batch by batch and synced; a run that was stopped goes on where they end. What the
    generator cannot read, or has nothing to say to, is left out.

    Args:
        generator: Asks, where ``asked`` are passages, and answers.
        asked: Passages, or questions with theirs; the labels of the latter are not looked at.
        path: JSON Lines, ``{"question", "answers", "context", "title"}``.
        count: How many rows; no more than there are items.
        seed: Of the order in which items are drawn.
        max_new_tokens: Upper limit of a question and of an answer.
        batch_size: Prompts in one forward pass; as many are lost by a crash at most.
    Returns:
        The rows, as a corpus.
    Raises:
        InputError: If nothing was asked and answered.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_rows(path)
    order = np.random.RandomState(seed).permutation(len(asked))[:count]  # the same in every version of numpy
    template = PromptTemplate()
    with path.open("ab") as file, tqdm(total=len(order), initial=done, desc="answering", disable=None) as bar:
        for begin in range(done, len(order), batch_size):
            items = [asked[int(i)] for i in order[begin : begin + batch_size]]
            passages = [Passage(i.context, title=i.title) if isinstance(i, Question) else i for i in items]
            if isinstance(items[0], Question):
                questions = [item.question for item in items if isinstance(item, Question)]
            else:
                prompts = [Prompt((TextSegment(template.raw_text(p)), TextSegment(ASK))) for p in passages]
                questions = _first_lines(generator, prompts, max_new_tokens)
            prompts = [template.build(q, [p], []) for q, p in zip(questions, passages, strict=True)]
            answers = _first_lines(generator, prompts, max_new_tokens)
            rows: list[dict[str, Any]] = [
                {"question": q, "answers": [a], "context": p.text, "title": p.title}
                # What is empty is kept as a row, so that rows count what is done.
                for q, a, p in zip(questions, answers, passages, strict=True)
            ]
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(rows))
    # A generator that asks or answers nothing leaves a row that is no question.
    return open_questions(path.parent, [path.name], path.parent, skip_bad=True)


def _first_lines(generator: VistGenerator, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
    """The first line of each answer, which is all that was asked for; nothing where a prompt is too long."""
    room = (generator.context_tokens or sys.maxsize) - max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if generator.prompt_length(prompt) <= room]
    some = [prompts[i] for i in fitting]
    answers = generator.generate(some, max_new_tokens=max_new_tokens, batch_size=max(1, len(some)))
    lines = [""] * len(prompts)
    for i, answer in zip(fitting, answers, strict=True):
        lines[i] = answer.text.split("\n")[0].strip()
    return lines


def _whole_rows(path: Path) -> int:
    """Rows that a stopped run wrote; what it had not finished is cut off."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content.count(b"\n")
