"""What an evaluation leaves behind: rows on disk, and the figures and paired tests that follow from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vist_rag.errors import ConfigError
from vist_rag.evaluation.metrics import boost_rate, paired_difference, resilience_rate
from vist_rag.evaluation.task import Task

FORMAT = "vist-rag-eval/1"
ROWS_FORMAT = "vist-rag-eval-rows/1"


@dataclass(frozen=True, slots=True)
class Cell:
    """A method with a setting: a rate (raw tokens over tokens given), a number of tokens, or neither."""

    method: str
    rate: float | None = None
    tokens: int | None = None

    @property
    def key(self) -> tuple[str, float | None, int | None]:
        """What tells its rows from others'."""
        return self.method, self.rate, self.tokens


def summarize(
    task: Task, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], ids: Sequence[str]
) -> dict[str, Any]:
    """Figures of each cell, and paired tests between them, from rows alone."""
    by_cell: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault((row["method"], row["rate"], row["tokens"]), {})[row["id"]] = row
    values = {cell: [task.value(by_cell[cell.key][id_]) for id_ in ids] for cell in cells}
    closed = next((values[cell] for cell in cells if cell.method == "closed_book"), None)
    figures = []
    for cell in cells:
        some = [by_cell[cell.key][id_] for id_ in ids]
        figure: dict[str, Any] = {"method": cell.method, "rate": cell.rate, "tokens": cell.tokens}
        figure |= {"questions": len(some), **task.figures(some)}
        for name in ("origin_tokens", "compressed_tokens", "prompt_tokens", "completion_tokens", "memory_bytes", "ms"):
            if name in some[0]:
                figure[name] = round(sum(row[name] for row in some) / len(some), 2)
        spent = sum(row["compressed_tokens"] for row in some)
        figure["ratio"] = round(sum(row["origin_tokens"] for row in some) / spent, 3) if spent else None
        if closed is not None and "em" in task.metrics and cell.method != "closed_book":
            figure["resilience"] = _rounded(resilience_rate(closed, values[cell]))
            figure["boost"] = _rounded(boost_rate(closed, values[cell]))
        figures.append(figure)
    pairs = [
        {
            "method": cell.method,
            "rate": cell.rate,
            "tokens": cell.tokens,
            "against": other.method,
            "against_rate": other.rate,
            "against_tokens": other.tokens,
            "metric": "nll" if task.metrics[0] == "perplexity" else task.metrics[0],
            **paired_difference(values[cell], values[other]),
        }
        for cell, other in _pairs(cells)
    ]
    return {"cells": figures, "paired": pairs}


def _pairs(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Every method against memory at the same setting; memory against raw; the controls against closed book."""
    for one, other in product(cells, cells):
        same = (one.rate, one.tokens) == (other.rate, other.tokens)
        wanted = {
            "memory": one.method != "memory" and same,
            "raw": one.method == "memory",
            "closed_book": one.method in ("shuffled_memory", "blank_memory"),
        }
        if wanted.get(other.method):
            yield one, other


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


class RowFile:
    """Rows of a block on disk: a line for the setting, then a line a row, forced out batch by batch.

    What a crash tore off is the last line at most; it is dropped, and asked again.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.path = path
        self.done: set[tuple[Any, ...]] = set()
        head = {"format": ROWS_FORMAT, "setting": json.loads(json.dumps(setting))}
        whole = self._whole_lines()
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write([head], mode="w")
            return
        found = json.loads(whole[0])
        if found != head:
            raise ConfigError(
                f"{path} must hold rows of this setting, got those of another "
                f"({_difference(found.get('setting', {}), head['setting'])}); give another --output, or remove it."
            )
        with path.open("r+b") as file:
            file.truncate(sum(map(len, whole)))
        self.done = {(r["method"], r["rate"], r["tokens"], r["id"]) for r in map(json.loads, whole[1:])}

    def _whole_lines(self) -> list[bytes]:
        if not self.path.is_file():
            return []
        return [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch, so that a crash after this loses none of it."""
        self._write(rows, mode="a")

    def _write(self, rows: Sequence[Mapping[str, Any]], *, mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return [json.loads(line) for line in self._whole_lines()[1:]]


def _difference(found: Any, wanted: Any, name: str = "setting") -> str:
    """The first place where two settings differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), key)
    return f"{name}: {found!r:.80}, not {wanted!r:.80}"
