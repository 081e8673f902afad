"""Training text: JSON Lines in, batches of about equal cost out."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vist_rag.errors import InputError


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        InputError: If the file is missing, or a row is no JSON object; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"data file must exist, got {path}; check --data.")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):  # noqa: B007 - the messages name it
                if line.strip():
                    row = json.loads(line.decode())
                    if not isinstance(row, dict):
                        raise ValueError(f"it is {row!r:.60}")
                    yield row
        except ValueError as error:  # no JSON, no UTF-8
            raise InputError(f"{path}:{number} must be a JSON object in UTF-8 ({error}).") from error
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be read after line {number} ({error}); restore the file.") from error


def expand(data: Path, patterns: Iterable[str]) -> list[Path]:
    """Files under ``data`` that match any of the glob patterns, each once, sorted.

    Raises:
        InputError: If a pattern matches nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = sorted(data.glob(pattern))
        if not matches:
            raise InputError(f"data pattern {pattern!r} must match a file under {data}, got none; check --data.")
        found.update(matches)
    return sorted(found)


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


def read_questions(paths: Iterable[Path]) -> list[Question]:
    """Reader rows ``{"question", "answers", "title", "context"}``; the title may be missing.

    Raises:
        InputError: If a row lacks something else, or has no answer; the message names file and row.
    """
    questions = []
    for path in paths:
        for number, row in enumerate(read_jsonl(path), start=1):
            answers = row.get("answers")
            if not {"question", "context"} <= row.keys() or not isinstance(answers, list) or not answers:
                raise InputError(f"{path}, row {number}, must have a question, a context and a list of answers.")
            questions.append(Question(row["question"], tuple(answers), row.get("title", ""), row["context"]))
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
