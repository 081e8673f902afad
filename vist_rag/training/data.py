"""Training text: JSON Lines in, batches of about equal cost out."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from torch.utils.data import Dataset

from vist_rag.errors import InputError
from vist_rag.types import Passage


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a plain or gzipped file that are not blank, each after its number, counted from 1.

    Raises:
        InputError: If the file is missing or torn.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"data file must exist, got {path}; check --data.")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read after line {number} ({error}); restore the file.") from error


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: If it is none; the message says what it must be.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested without end
        raise ValueError(f"must be a JSON object in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object in UTF-8 (it is {brief(row)})")
    return row


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        InputError: If the file is missing, or a row is no JSON object; the message names file and line.
    """
    for number, line in numbered_lines(path):
        try:
            row = parse_row(line)
        except ValueError as error:
            raise InputError(f"{path}:{number} {error}.") from error
        yield row


def expand(data: Path, patterns: Iterable[str]) -> list[Path]:
    """Files under ``data`` that match any of the glob patterns, each once, sorted.

    Raises:
        InputError: If a pattern matches nothing, or is not relative.
    """
    found: set[Path] = set()
    for pattern in patterns:
        try:
            matches = sorted(data.glob(pattern))
        except (NotImplementedError, ValueError) as error:  # absolute, or empty
            raise InputError(f"data pattern must be a glob relative to {data}, got {pattern!r} ({error}).") from error
        if not matches:
            raise InputError(f"data pattern {pattern!r} must match a file under {data}, got none; check --data.")
        found.update(matches)
    return sorted(found)


def check_text(value: object, field: str) -> str:
    """``value``, if it is a string that says something and can be written down.

    Raises:
        ValueError: If not; the message says what a row must have.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'must have text as "{field}", got {brief(value)}')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, no tokenizer takes it
        raise ValueError(f'must have valid Unicode as "{field}", got {error.reason} at {error.start}') from error
    return value


def optional_text(value: object, field: str) -> str:
    """As :func:`check_text`; what is missing or blank is empty."""
    return "" if value is None or (isinstance(value, str) and not value.strip()) else check_text(value, field)


def titled(title: str, text: str) -> str:
    """The text as it is rendered, title first; the same as ``Passage.content``."""
    return f"{title}: {text}" if title else text


@dataclass(frozen=True)
class Question:
    """A question with the passage that answers it."""

    question: str
    answers: tuple[str, ...]
    title: str
    context: str

    @property
    def content(self) -> str:
        """The passage as it is rendered; the same as ``Passage.content``."""
        return titled(self.title, self.context)


@dataclass(frozen=True)
class TextSequence:
    """A stretch of plain text: what is read as memory, and what comes next, which is to be told."""

    shown: str
    told: str

    @property
    def content(self) -> str:
        """All of it."""
        return f"{self.shown} {self.told}"


def passage_of(row: Mapping[str, Any]) -> Passage:
    """A row ``{"text", "title"?, "id"?}``.

    Raises:
        ValueError: If it has no text, or a field is no text; the message says what it must have.
    """
    id_ = row.get("id")
    id_ = str(id_) if type(id_) is int else optional_text(id_, "id")
    return Passage(check_text(row.get("text"), "text"), id_, optional_text(row.get("title"), "title"))


def question_of(row: Mapping[str, Any]) -> Question:
    """A reader row ``{"question", "answers", "context", "title"?}``.

    Raises:
        ValueError: If it lacks something, or something is no text; the message says what it must have.
    """
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers:
        raise ValueError(f'must have a list of texts as "answers", got {brief(answers)}')
    return Question(
        check_text(row.get("question"), "question"),
        tuple(check_text(answer, "answers") for answer in answers),
        optional_text(row.get("title"), "title"),
        check_text(row.get("context"), "context"),
    )


def read_questions(paths: Iterable[Path]) -> list[Question]:
    """Reader rows of files, all in memory; see :func:`question_of`.

    Raises:
        InputError: If a row is malformed; the message names file and line.
    """
    questions = []
    for path in paths:
        for number, line in numbered_lines(path):
            try:
                questions.append(question_of(parse_row(line)))
            except ValueError as error:
                raise InputError(f"{path}:{number} {error}.") from error
    return questions


class LengthBatches(Dataset[list[int]]):
    """Indices of items in batches of about equal cost: neighbours in length, padded to at most ``budget`` units in all.

    An item longer than that is a batch by itself. An epoch is a seeded shuffle; epochs follow each other until
    ``steps`` batches are there, so that step ``i`` is the same batch in every run of one recipe.

    Raises:
        InputError: If there are no items.
    """

    def __init__(self, lengths: Sequence[int], *, budget: int, steps: int, seed: int) -> None:
        if not lengths:
            raise InputError("training data must hold at least one item, got none.")
        self.batches: list[list[int]] = []
        rng = random.Random(seed)
        while len(self.batches) < steps:
            order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.random() * 8)
            epoch: list[list[int]] = [[]]
            longest = 1
            for i in order:
                longest = max(longest, lengths[i])
                if epoch[-1] and longest * (len(epoch[-1]) + 1) > budget:
                    epoch.append([])
                    longest = max(1, lengths[i])
                epoch[-1].append(i)
            rng.shuffle(epoch)
            self.batches += epoch
        del self.batches[steps:]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[int]:
        return self.batches[step]
