"""Questions out of rows, in every layout that open-domain question answering uses.

A row is recognised by its fields, one by one, so that files may mix layouts:

| layout | fields |
|---|---|
| ours | ``id``, ``question``, ``answers`` [str], ``gold`` id or [id], ``bm25`` [[id, score]], ``answer_type`` "regex" |
| reader | ``id``, ``question``, ``answers`` [str], ``title``, ``context``, ``passage_id`` |
| nq_open | ``question``, ``answer`` [str] |
| trivia_qa | ``question_id``, ``question``, ``answer`` {``value``, ``aliases``, ``normalized_aliases``} |
| PopQA | ``id``, ``question``, ``possible_answers``, a JSON list of strings, as a string |
| web_questions | ``question``, ``answers`` [str] |
| EntityQuestions | ``question``, ``answers`` [str] |
| SQuAD (hub) | ``id``, ``title``, ``context``, ``question``, ``answers`` {``text`` [str]} |
| SQuAD (file) | ``title``, ``paragraphs`` [{``context``, ``qas`` [{``id``, ``question``, ``answers`` [{``text``}]}]}] |
| DPR, FiD | ``question``, ``answers`` [str], ``ctxs`` [{``id``, ``title``, ``text``, ``score``}], best first |

Other fields are not read. Blank answers are dropped, and a row that has no other is malformed: so are SQuAD 2's
questions without an answer, and splits whose answers are kept secret.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

from vist_rag.errors import InputError
from vist_rag.evaluation.metrics import compile_pattern
from vist_rag.evaluation.rows import BadRows, MalformedRowError, Row, check_text, id_of, text_of
from vist_rag.types import Passage


@dataclass(frozen=True)
class QuestionRow:
    """A question of a data set.

    Attributes:
        id: Unique in its data set.
        question: As it was asked.
        answers: What counts as right, each as good as the others.
        regex: The answers are regular expressions (CuratedTREC).
        gold: Ids of corpus passages that answer it.
        bm25: Corpus passages that BM25 found, ``(passage id, score)``, best first.
        context: The passage that comes with the question (reader and SQuAD layouts).
        contexts: Retrieved passages that come with the question (DPR and FiD layout), best first.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    regex: bool = False
    gold: tuple[str, ...] = ()
    bm25: tuple[tuple[str, float], ...] = ()
    context: Passage | None = None
    contexts: tuple[Passage, ...] = ()


def question_of(row: Row, *, label: str, regex: bool = False) -> QuestionRow:
    """The question of a row.

    Args:
        row: In one of the layouts above.
        label: A row without an id is called ``LABEL-000123`` by its number.
        regex: Its answers are regular expressions unless it says otherwise.
    Raises:
        MalformedRowError: If it lacks a question or an answer, or a field is not of its kind.
    """
    values = row.values
    question = text_of(values, "question")
    regex = values.get("answer_type") == "regex" if values.get("answer_type") is not None else regex
    answers = _answers(values)
    if regex:
        try:
            for answer in answers:
                compile_pattern(answer)
        except InputError as error:
            raise MalformedRowError(f"have regular expressions as answers: {error}") from error
    return QuestionRow(
        id=id_of(values, "id", "question_id") or f"{label}-{row.number:06d}",
        question=question,
        answers=answers,
        regex=regex,
        gold=_gold(values.get("gold")),
        bm25=_ranking(values.get("bm25")),
        context=_context(values),
        contexts=_contexts(values.get("ctxs")),
    )


def flatten(rows: Iterable[Row], bad: BadRows) -> Iterator[Row]:
    """The questions of articles in SQuAD's official nesting, each a row; other rows as they are."""
    for row in rows:
        if "paragraphs" not in row.values or "question" in row.values:
            yield row
            continue
        title = row.values.get("title")
        for i, paragraph in _numbered(row.where, "paragraphs", row.values, bad):
            for j, asked in _numbered(f"{row.where} paragraph {i},", "qas", paragraph, bad):
                where = f"{row.where} paragraph {i}, question {j},"
                yield Row(where, j, {"title": title, "context": paragraph.get("context"), **asked})


def _numbered(where: str, field: str, values: Mapping[str, Any], bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    items = values.get(field)
    if not isinstance(items, list):
        bad(where, f'have a list "{field}", got {brief(items)}')
        return
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield number, item
        else:
            bad(where, f'have objects in "{field}", got {brief(item)} as number {number}')


def _answers(values: Mapping[str, Any]) -> tuple[str, ...]:
    fields = ("answers", "answer", "possible_answers")
    field = next((name for name in fields if values.get(name) is not None), None)
    if field is None:
        raise MalformedRowError(f"have answers in one of the fields {', '.join(fields)}")
    found = values[field]
    if isinstance(found, str) and field == "possible_answers":
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise MalformedRowError(f'have a JSON list in "{field}" ({error})') from error
    if isinstance(found, dict) and "text" in found:
        found = found["text"]
    elif isinstance(found, dict):
        # The hub's test split of trivia_qa hides its answers behind this word.
        value = [] if found.get("value") in (None, "<unk>") else [found["value"]]
        found = [*value, *(found.get("aliases") or []), *(found.get("normalized_aliases") or [])]
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list):
        raise MalformedRowError(f'have a list of strings in "{field}", got {brief(found)}')
    texts: list[Any] = [item.get("text") if isinstance(item, dict) else item for item in found]
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise MalformedRowError(f'have strings in "{field}", got {brief(strange[0])}')
    answers = tuple(dict.fromkeys(check_text(text, f'text in "{field}"') for text in texts if text.strip()))
    if not answers:
        raise MalformedRowError(f'have at least one answer in "{field}", got {brief(values[field])}')
    return answers


def _gold(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(dict.fromkeys(id_of({"gold": item}, "gold") for item in items))
    if "" in ids:
        raise MalformedRowError(f'have passage ids in "gold", got {brief(value)}')
    return ids


def _ranking(value: object) -> tuple[tuple[str, float], ...]:
    if value is None:
        return ()
    what = 'have pairs of a passage id and a score in "bm25"'
    if not isinstance(value, list):
        raise MalformedRowError(f"{what}, got {brief(value)}")
    ranking = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
            raise MalformedRowError(f"{what}, got {brief(pair)}")
        score = pair[1]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise MalformedRowError(f"{what}, got {brief(pair)}")
        ranking.append((pair[0], float(score)))
    return tuple(ranking)


def _context(values: Mapping[str, Any]) -> Passage | None:
    if values.get("context") is None:
        return None
    title = _title(values)
    if isinstance(values.get("answers"), dict) or any(isinstance(a, dict) for a in values.get("answers") or []):
        title = title.replace("_", " ")  # SQuAD's titles are those of Wikipedia's addresses
    return Passage(text_of(values, "context"), id_of(values, "passage_id"), title)


def _contexts(value: object) -> tuple[Passage, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise MalformedRowError(f'have a list of passages, objects with a "text", in "ctxs", got {brief(value)}')
    return tuple(Passage(text_of(item, "text"), id_of(item, "id"), _title(item)) for item in value)


def _title(values: Mapping[str, Any]) -> str:
    title = values.get("title") or ""
    return check_text(title, 'a string as "title"') if title else ""
