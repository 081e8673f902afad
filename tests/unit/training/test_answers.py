"""Answers that the generator itself gives: resumed, without labels, without what it cannot read or say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.causal import causal_generator
from vist_rag.errors import InputError
from vist_rag.generation import Prompt, VistGenerator
from vist_rag.generation.prompt import TextSegment
from vist_rag.training.answers import ASK, own_answers
from vist_rag.training.data import Question
from vist_rag.types import Passage

PASSAGES = [Passage(f"the old bridge {i} by the sea", title="bridge" * (i % 2)) for i in range(7)]
QUESTIONS = [Question(f"what is {i}", ("label",), "bridge", f"bridge {i} of the river") for i in range(7)]


def text_of(prompt: Prompt) -> str:
    return "".join(segment.text for segment in prompt.segments if isinstance(segment, TextSegment))


def scripted(reply: Callable[[str], str], context_tokens: int | None = None) -> VistGenerator:
    """A generator whose answer to each prompt is known; a prompt is as long as its words."""

    def generate(prompts: Sequence[Prompt], **_: Any) -> list[Any]:
        return [SimpleNamespace(text=reply(text_of(prompt))) for prompt in prompts]

    def length(prompt: Prompt) -> int:
        return len(text_of(prompt).split())

    return cast(VistGenerator, SimpleNamespace(generate=generate, prompt_length=length, context_tokens=context_tokens))


def reply(prompt: str) -> str:
    number = next(word for word in prompt.split() if word.isdigit())
    return f"which is {number}\nand more" if prompt.endswith(ASK) else f"it is {number}\nno more"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_passage_is_asked_about_and_answered_as_text(tmp_path: Path) -> None:
    corpus = own_answers(scripted(reply), PASSAGES, tmp_path / "own.jsonl", count=5, batch_size=2)
    assert len(corpus) == 5
    numbers = {row.context.split()[3] for row in corpus}
    assert len(numbers) == 5  # none twice
    for row in corpus:
        (passage,) = (p for p in PASSAGES if p.text == row.context)
        number = row.context.split()[3]
        assert (row.question, row.answers, row.title) == (f"which is {number}", (f"it is {number}",), passage.title)


def test_no_more_rows_than_items(tmp_path: Path) -> None:
    assert len(own_answers(scripted(reply), PASSAGES, tmp_path / "own.jsonl", count=99)) == len(PASSAGES)


def test_labels_are_not_looked_at(tmp_path: Path) -> None:
    asked: list[str] = []

    def listen(prompt: str) -> str:
        asked.append(prompt)
        return reply(prompt)

    corpus = own_answers(scripted(listen), QUESTIONS, tmp_path / "own.jsonl", count=7)
    assert {row.question for row in corpus} == {row.question for row in QUESTIONS}
    assert {row.answers[0].split()[0] for row in corpus} == {"it"}
    assert len(asked) == 7  # questions are there already
    assert not any("label" in prompt for prompt in asked)
    other = [Question(row.question, ("another",), row.title, row.context) for row in QUESTIONS]
    own_answers(scripted(reply), other, tmp_path / "other.jsonl", count=7)
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "own.jsonl").read_bytes()


def test_what_has_no_question_or_no_answer_is_left_out(tmp_path: Path) -> None:
    def silent(prompt: str) -> str:
        asks = prompt.endswith(ASK)
        if " 2 " in prompt and asks:
            return ""
        return " \n and more" if " 4 " in prompt and not asks else reply(prompt)

    with pytest.warns(UserWarning, match="2 bad questions left out"):
        corpus = own_answers(scripted(silent), PASSAGES, tmp_path / "own.jsonl", count=7, batch_size=3)
    assert {row.context.split()[3] for row in corpus} == {"0", "1", "3", "5", "6"}
    assert len(rows_of(tmp_path / "own.jsonl")) == 7  # what is done is counted in rows
    with pytest.raises(InputError):
        own_answers(scripted(lambda _: ""), PASSAGES, tmp_path / "none.jsonl", count=7)


def test_what_does_not_fit_the_context_is_left_out(tmp_path: Path) -> None:
    passages = [*PASSAGES[:3], Passage("the sea 9 " * 100)]
    with pytest.warns(UserWarning, match="1 bad questions left out"):
        corpus = own_answers(scripted(reply, 100), passages, tmp_path / "own.jsonl", count=4, max_new_tokens=20)
    assert {row.context.split()[3] for row in corpus} == {"0", "1", "2"}


def test_a_run_that_was_stopped_goes_on_where_whole_rows_end(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    whole = own_answers(scripted(reply), PASSAGES, path, count=6, batch_size=2, seed=3)
    rows = [(row.question, row.answers) for row in whole]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:-20])

    def other(prompt: str) -> str:
        return f"another {reply(prompt)}"

    resumed = own_answers(scripted(other), PASSAGES, path, count=6, batch_size=2, seed=3)
    assert path.read_bytes().splitlines(keepends=True)[:4] == lines[:4]
    assert [row.context for row in resumed] == [row.context for row in whole]
    assert [(row.question, row.answers) for row in resumed][:4] == rows[:4]
    assert all(row.answers[0].startswith("another it is") for row in list(resumed)[4:])

    def never(_: str) -> str:
        raise AssertionError("all was answered before")

    assert len(own_answers(scripted(never), PASSAGES, path, count=6, seed=3)) == 6


def test_a_language_model_answers_what_it_reads(tmp_path: Path) -> None:
    generator = causal_generator("llama", seed=1)
    corpus = own_answers(generator, PASSAGES, tmp_path / "own.jsonl", count=4, max_new_tokens=12, batch_size=2)
    assert len(corpus) == 4
    assert all("\n" not in row.question + row.answers[0] for row in corpus)
    again = own_answers(generator, PASSAGES, tmp_path / "again.jsonl", count=4, max_new_tokens=12, batch_size=2)
    assert list(again) == list(corpus)
