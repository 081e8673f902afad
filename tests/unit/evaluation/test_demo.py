"""The bundled corpus keeps its promises."""

from __future__ import annotations

import pytest

from vist_rag.errors import ConfigError
from vist_rag.evaluation import demo
from vist_rag.quoting import find_span


def test_the_corpus_is_one_passage_a_row() -> None:
    passages = demo.demo_passages()
    assert len(passages) >= 240
    assert len({p.id for p in passages}) == len(passages)
    assert all(60 <= len(p.text.split()) <= 120 and p.title for p in passages)


def test_questions_are_split_and_answered_in_their_passage() -> None:
    dev, test = demo.demo_questions("dev"), demo.demo_questions("test")
    assert min(len(dev), len(test)) >= 60
    assert not {q.id for q in dev} & {q.id for q in test}
    passages = {p.id: p for p in demo.demo_passages()}
    for question in (*dev, *test):
        assert any(find_span(answer, passages[question.passage_id].content) for answer in question.answers), question.id


def test_there_is_no_third_split() -> None:
    with pytest.raises(ConfigError, match="split must be one of dev, test, got 'train'"):
        demo.demo_questions("train")
