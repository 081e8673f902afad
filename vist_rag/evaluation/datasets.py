"""Data sets of the evaluation: questions, passages, labelled texts and long texts, by name, path or hub id.

Registered names are read from the folder of the data sets: questions from ``qa/NAME/SPLIT.jsonl.gz``, labelled texts
from ``icl/NAME/SPLIT.jsonl.gz`` (or ``.jsonl``, ``.json``, ``.parquet``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from reprlib import repr as brief

from vist_rag.errors import InputError
from vist_rag.evaluation.corpora import load_corpus, load_texts
from vist_rag.evaluation.layouts import QuestionRow, flatten, question_of
from vist_rag.evaluation.rows import BadRows, MalformedRowError, Row, check_text, parse_rows, text_of
from vist_rag.evaluation.sources import find_source

__all__ = [
    "LABELLED_SETS",
    "QUESTION_ALIASES",
    "QUESTION_SETS",
    "LabelledText",
    "QuestionRow",
    "load_corpus",
    "load_labelled",
    "load_questions",
    "load_texts",
]

QUESTION_SETS = (
    "nq_open",
    "triviaqa",
    "popqa",
    "webq",
    "entityquestions",
    "curatedtrec",
    "squad_open",
    "efficientqa",
)
"""Registered open-domain question sets: their names, and their directories in ``qa/``."""

QUESTION_ALIASES = {
    "nq": "nq_open",
    "natural_questions": "nq_open",
    "trivia_qa": "triviaqa",
    "tqa": "triviaqa",
    "web_questions": "webq",
    "webquestions": "webq",
    "entity_questions": "entityquestions",
    "entityq": "entityquestions",
    "curated_trec": "curatedtrec",
    "squad": "squad_open",
}
"""What else they are called."""

LABELLED_SETS = {
    "sst2": ("sst2", "label"),
    "mr": ("mr", "label"),
    "cr": ("cr", "label"),
    "subj": ("subj", "label"),
    "agn": ("agnews_small", "label"),
    "sst5": ("sst5", "label"),
    "nlus": ("nlu_eval", "scenario"),
    "nlui": ("nlu_eval", "label"),
    "trec": ("trec", "label"),
    "tref": ("trec", "label_fine"),
    "dbp": ("dbp", "label"),
    "bank": ("banking77", "label"),
    "clin": ("clinc150", "label"),
    "agnews_small": ("agnews_small", "label"),
    "nlu_eval": ("nlu_eval", "label"),
    "banking77": ("banking77", "label"),
    "clinc150": ("clinc150", "label"),
}
"""What classification sets are called, the directory of each in ``icl/``, and the field of its labels."""


def load_questions(
    dataset: str,
    *,
    split: str = "dev",
    data: Path | None = None,
    skip_bad: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> list[QuestionRow]:
    """Questions of a data set, in any of the layouts of :mod:`vist_rag.evaluation.layouts`.

    Args:
        dataset: A name of ``QUESTION_SETS`` or ``QUESTION_ALIASES``; or a file (``.jsonl``, ``.json``, either with
            ``.gz``, ``.parquet``) or directory, here or under ``data``; or a data set on the hub, ``owner/name`` or
            ``owner/name:config``. ``#PREFIX`` behind it keeps the questions whose id begins so:
            ``reader/distant.dev.jsonl.gz#ds_nq_open``.
        split: Which questions; a file has one split only, its own. ``dev`` and ``validation`` are the same.
        data: Folder of the data sets.
        skip_bad: Leave malformed rows out.
        on_bad: Called with a message for each row that is left out; without it, each is a warning.
    Returns:
        In the order of the rows. A row without an id is called ``DATASET-000123`` by its line or row; where an id comes
        again, ``#2``, ``#3`` is put behind it.
    Raises:
        ConfigError: If there is no such data set or split.
        InputError: If a file cannot be read, a row is malformed, or there are no questions.
        MissingDependencyError: If it takes the ``datasets`` library or pyarrow, which is not installed.
    """
    name, hash_, prefix = dataset, "", ""
    if not Path(dataset).exists():
        name, hash_, prefix = dataset.partition("#")
    name = QUESTION_ALIASES.get(name.lower().replace("-", "_"), name)
    names = {known: known for known in QUESTION_SETS}
    source = find_source(name, kind="dataset", folder="qa", names=names, split=split, data=data)
    bad = BadRows(skip_bad, on_bad)
    regex = name.lower() == "curatedtrec"
    rows = flatten(source.rows(bad), bad)
    questions = list(_unique(parse_rows(rows, partial(question_of, label=source.label, regex=regex), bad)))
    kept = [question for question in questions if question.id.startswith(prefix)]
    if not kept:
        which = f" ({len(questions)} have an id that does not begin with {prefix!r})" if hash_ else ""
        raise InputError(f"dataset {dataset} must hold at least one question, got none{which}; check the file.")
    return kept


def _unique(questions: Iterator[QuestionRow]) -> Iterator[QuestionRow]:
    # TriviaQA's "rc" asks the same question of the web and of Wikipedia under one id.
    seen: Counter[str] = Counter()
    for question in questions:
        seen[question.id] += 1
        again = seen[question.id]
        yield question if again == 1 else replace(question, id=f"{question.id}#{again}")


@dataclass(frozen=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str


def load_labelled(
    source: str,
    *,
    split: str,
    data: Path | None,
    label_field: str = "label",
    skip_bad: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> list[LabelledText]:
    """Labelled texts for in-context learning, from rows ``{"text", "label"}``.

    Args:
        source: A name of ``LABELLED_SETS``, a path or a hub id, as in :func:`load_questions`.
        split: Which rows; a file has one split only, its own.
        data: Folder of the data sets.
        label_field: The field of the label. Left at its default, a registered name brings its own.
        skip_bad: Leave malformed rows out.
        on_bad: Called with a message for each row that is left out; without it, each is a warning.
    Returns:
        In the order of the rows. A label that is a number becomes its name where the data set tells it, else digits.
    Raises:
        ConfigError: If there is no such data set or split.
        InputError: If a file cannot be read, a row is malformed, or there are no rows.
        MissingDependencyError: If it takes the ``datasets`` library or pyarrow, which is not installed.
    """
    folders = {name: folder for name, (folder, _) in LABELLED_SETS.items()}
    found = find_source(source, kind="labelled dataset", folder="icl", names=folders, split=split, data=data)
    if label_field == "label":
        _, label_field = LABELLED_SETS.get(source.lower().replace("-", "_"), ("", label_field))
    bad = BadRows(skip_bad, on_bad)
    rows = list(parse_rows(found.rows(bad), partial(_labelled, field=label_field), bad))
    if not rows:
        raise InputError(f"labelled dataset {source} must hold at least one row, got none; check the file.")
    return rows


def _labelled(row: Row, *, field: str) -> LabelledText:
    label = row.values.get(field)
    if isinstance(label, int) and not isinstance(label, bool):
        if label < 0:
            raise MalformedRowError(f'have a label in "{field}", got {brief(label)}: this split keeps them secret')
        label = str(label)
    # "sentence" and "content" are what SST-2 and DBpedia call it on the hub.
    return LabelledText(text_of(row.values, "text", "sentence", "content"), check_text(label, f'a label in "{field}"'))
