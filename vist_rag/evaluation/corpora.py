"""Passages of a corpus by id, and long texts for language modelling."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from vist_rag.errors import ConfigError, InputError
from vist_rag.evaluation.rows import SUFFIXES as ROW_SUFFIXES
from vist_rag.evaluation.rows import BadRows, MalformedRowError, Row, id_of, parse_rows, read_rows, text_of
from vist_rag.evaluation.sources import find_files
from vist_rag.retrieval.documents import read_document
from vist_rag.types import Passage

TEXT_SUFFIXES = (".txt", ".md")


def load_corpus(
    patterns: Sequence[str],
    *,
    data: Path | None,
    wanted: set[str] | None = None,
    skip_bad: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> dict[str, Passage]:
    """Passages by id, from rows ``{"id", "title", "text"}``.

    Args:
        patterns: Files, directories or globs, under ``data`` or here, such as ``corpus/*.jsonl.gz``.
        data: Folder of the data sets.
        wanted: Only these ids; reading stops where all are found. None means all.
        skip_bad: Leave malformed rows out. Of rows that are not wanted, only the id is looked at.
        on_bad: Called with a message for each row that is left out.
    Returns:
        In the order of the files.
    Raises:
        ConfigError: If the data folder is missing.
        InputError: If a pattern matches nothing, a file cannot be read, a row is malformed, two passages have one id,
            or a wanted passage is missing.
    """
    bad = BadRows(skip_bad, on_bad)
    files = find_files(patterns, data=data, kind="corpus", suffixes=ROW_SUFFIXES)
    found: dict[str, Passage] = {}

    def add(row: Row) -> None:
        id_ = id_of(row.values, "id")
        if not id_:
            raise MalformedRowError('have an "id"')
        if wanted is not None and id_ not in wanted:
            return
        title = "" if row.values.get("title") in (None, "") else text_of(row.values, "title")
        passage = Passage(text_of(row.values, "text"), id_, title)
        if found.setdefault(id_, passage) != passage:
            raise MalformedRowError(f"have an id of its own, got {id_!r}, which another passage has")

    for file in files:
        for _ in parse_rows(read_rows(file, bad), add, bad):
            if wanted is not None and len(found) == len(wanted):
                return found
    if missing := sorted((wanted or set()) - found.keys()):
        raise InputError(
            f"corpus must hold the {len(wanted or ())} passages that are asked for, {len(missing)} are missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; check {', '.join(patterns)} and --data."
        )
    return found


def load_texts(
    patterns: Sequence[str],
    *,
    data: Path | None,
    skip_bad: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> list[str]:
    """Long texts: each ``.txt`` or ``.md`` file is one; of files of rows, neighbours of one document are joined.

    Rows ``{"text"}`` belong to one document while their ``title`` stays the same, or, where they have no title, the
    part of their ``id`` before its last ``-`` or ``_``. A row without either is a text by itself. Rows are joined by a
    blank.

    Args:
        patterns: Files, directories or globs, under ``data`` or here.
        data: Folder of the data sets.
        skip_bad: Leave malformed rows and empty files out.
        on_bad: Called with a message for each that is left out.
    Returns:
        In the order of the files.
    Raises:
        ConfigError: If the data folder is missing.
        InputError: If a pattern matches nothing, a file cannot be read, a row is malformed, or there is no text.
    """
    bad = BadRows(skip_bad, on_bad)
    texts: list[str] = []
    for file in find_files(patterns, data=data, kind="texts", suffixes=(*ROW_SUFFIXES, *TEXT_SUFFIXES)):
        name = file.name.lower()
        if name.endswith(ROW_SUFFIXES):
            pieces = parse_rows(read_rows(file, bad), _piece, bad)
            texts += [" ".join(text for _, text in some) for _, some in groupby(pieces, key=lambda piece: piece[0])]
        elif name.endswith(TEXT_SUFFIXES):
            text = read_document(file).text
            if text.strip():
                texts.append(text)
            else:
                bad(str(file), "hold text, got an empty file")
        else:
            allowed = ", ".join((*TEXT_SUFFIXES, *ROW_SUFFIXES))
            raise ConfigError(f"{file} must end in one of {allowed}; convert the file or leave it out.")
    if not texts:
        raise InputError(f"{', '.join(patterns)} must hold at least one text, got none; check the files.")
    return texts


def _piece(row: Row) -> tuple[tuple[str, str | int], str]:
    """What tells the document of a row apart, and its text."""
    text = text_of(row.values, "text")
    if row.values.get("title") not in (None, ""):
        return ("title", text_of(row.values, "title")), text
    stem = re.match(r"(.+)[-_]", id_of(row.values, "id"), re.DOTALL)
    return ("id", stem[1]) if stem else ("row", row.number), text
