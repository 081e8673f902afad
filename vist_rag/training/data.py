"""Training text: JSON Lines in, batches of about equal cost out."""

from __future__ import annotations

import gzip
import json
import random
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
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number} must be a JSON object, got {line[:60]!r} ({error}).") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number} must be a JSON object, got {line[:60]!r}.")
                yield row


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
    """Reader rows ``{"question", "answers", "title", "context"}``."""
    return [
        Question(row["question"], tuple(row["answers"]), row.get("title", ""), row["context"])
        for path in paths
        for row in read_jsonl(path)
    ]


class LengthBatches(Dataset[list[int]]):
    """Indices of items in batches of about equal cost: neighbours in length, at most ``budget`` units in all.

    An epoch is a seeded shuffle; epochs follow each other until ``steps`` batches are there, so that step ``i`` is the
    same batch in every run of one recipe.
    """

    def __init__(self, lengths: Sequence[int], *, budget: int, steps: int, seed: int) -> None:
        self.batches: list[list[int]] = []
        rng = random.Random(seed)
        while len(self.batches) < steps:
            order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.random() * 8)
            epoch: list[list[int]] = [[]]
            for i in order:
                if epoch[-1] and max(lengths[i], 1) * (len(epoch[-1]) + 1) > budget:
                    epoch.append([])
                epoch[-1].append(i)
            rng.shuffle(epoch)
            self.batches += epoch
        del self.batches[steps:]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[int]:
        return self.batches[step]
