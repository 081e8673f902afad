"""Rows of JSON Lines, JSON and Parquet files, each with its place, and what happens to malformed ones.

This file does not know what a row means: that is :mod:`vist_rag.evaluation.layouts`.
"""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO, TypeVar, cast

from vist_rag.errors import InputError, MissingDependencyError

SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".parquet")
"""Ends of file names that hold rows."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object. ``where`` names it in messages; ``number`` is its line, or its row where there are no lines."""

    where: str
    number: int
    values: Mapping[str, Any]


class MalformedRowError(Exception):
    """What is wrong with a row, as what it must have; whoever reads the row adds where it is."""


@dataclass(frozen=True, slots=True)
class BadRows:
    """What to do about malformed rows: raise at the first, or leave them out and tell.

    Attributes:
        skip: Leave them out.
        report: Called with a message for each that is left out; without it, each is a warning.
    """

    skip: bool = False
    report: Callable[[str], None] | None = None

    def __call__(self, where: str, reason: object) -> None:
        """Raise, or report.

        Raises:
            InputError: If bad rows are not skipped.
        """
        message = f"{where} must {reason}"
        if not self.skip:
            raise InputError(f"{message}; mend it, or leave out what is malformed with --skip-bad.")
        if self.report is not None:
            self.report(f"{message}; left out.")
        else:
            warnings.warn(f"{message}; left out.", stacklevel=3)


def read_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """Rows of one file. A ``.json`` file holds a list, an object with a list ``data``, or JSON lines after all.

    Raises:
        InputError: If the file is missing, of another kind or torn, or a row is malformed and ``bad`` raises.
        MissingDependencyError: If it is a Parquet file and pyarrow is not installed.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path} must end in {', '.join(SUFFIXES)}; convert or rename the file.")
    if not path.is_file():
        raise InputError(f"{path} must be a file, found none; check the path.")
    if name.endswith(".parquet"):
        return _parquet(path)
    return _lines(path, bad) if name.removesuffix(".gz").endswith(".jsonl") else _document(path, bad)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, bad: BadRows) -> Iterator[Row]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    values = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
                    bad(where, f"be JSON in UTF-8 ({error})")
                    continue
                if isinstance(values, dict):
                    yield Row(where, number, values)
                else:
                    bad(where, f"be a JSON object, got {brief(values)}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read after line {number} ({error}); restore the file.") from error


def _document(path: Path, bad: BadRows) -> Iterator[Row]:
    try:
        with _open(path) as file:
            document = json.loads(file.read().decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); restore the file.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # a second row behind the first
            yield from _lines(path, bad)
            return
        raise InputError(f"{path} must be JSON in UTF-8 ({error}); mend the file.") from error
    if isinstance(document, dict):
        data = document.get("data")
        document = data if isinstance(data, list) else [document]
    if not isinstance(document, list):
        raise InputError(f"{path} must hold a JSON list of rows, got {brief(document)}; mend the file.")
    for number, values in enumerate(document, start=1):
        where = f"{path}, row {number},"
        if isinstance(values, dict):
            yield Row(where, number, values)
        else:
            bad(where, f"be a JSON object, got {brief(values)}")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError(f"Reading {path}", "pyarrow", "eval") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number},", number, values)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path} cannot be read as Parquet after row {number} ({error}); restore it.") from error


def parse_rows(rows: Iterable[Row], parse: Callable[[Row], _T], bad: BadRows) -> Iterator[_T]:
    """What ``parse`` makes of each row; those it calls malformed go to ``bad``."""
    for row in rows:
        try:
            parsed = parse(row)
        except MalformedRowError as error:
            bad(row.where, error)
        else:
            yield parsed


def text_of(values: Mapping[str, Any], *fields: str) -> str:
    """The first of the fields that is there, which must be text.

    Raises:
        MalformedRowError: If there is none, or it is no string, blank, or no Unicode text.
    """
    value = next((values[field] for field in fields if values.get(field) is not None), None)
    return check_text(value, f'a text "{fields[0]}"')


def check_text(value: object, what: str) -> str:
    """``value``, if it is a string that says something and can be written down.

    Raises:
        MalformedRowError: If not.
    """
    if not isinstance(value, str) or not value.strip():
        raise MalformedRowError(f"have {what}, got {brief(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, no tokenizer takes it
        raise MalformedRowError(f"have {what} in valid Unicode, got {error.reason} at {error.start}") from error
    return value


def id_of(values: Mapping[str, Any], *fields: str) -> str:
    """The first of the fields that is there, as a string; empty where there is none.

    Raises:
        MalformedRowError: If it is neither a string nor a whole number.
    """
    value = next((values[field] for field in fields if values.get(field) is not None), "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise MalformedRowError(f'have a string or a number as "{fields[0]}", got {brief(value)}')
    return str(value)
