"""Passages and questions of any size: checked once, then read from disk by index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vist_rag.errors import ConfigError, InputError
from vist_rag.retrieval.chunking import find_documents, split_text
from vist_rag.retrieval.documents import SUFFIXES, read_document
from vist_rag.training.corpus_files import Checked, Corpus, T, open_corpus
from vist_rag.training.data import Question, expand, numbered_lines, parse_row, passage_of, question_of
from vist_rag.types import Passage

ROW_SUFFIXES = (".jsonl", ".jsonl.gz")


class PassageCorpus(Corpus[Passage]):
    """Passages with text, title and id."""

    kind, fields = "passages", ("text", "title", "id")

    def _item(self, row: dict[str, Any]) -> Passage:
        return passage_of(row)


class QuestionCorpus(Corpus[Question]):
    """Questions with their passages."""

    kind, fields = "questions", ("question", "answers", "title", "context")

    def _item(self, row: dict[str, Any]) -> Question:
        return question_of(row)

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """How often each row is to be drawn against the others, float64 [n]."""
        return np.repeat(np.array(self.options["weights"], np.float64), self._rows_of_files)


def open_passages(
    data: Path,
    sources: Sequence[str],
    cache: Path,
    *,
    skip_bad: bool = False,
    characters: tuple[int, int] = (30, 1200),
) -> PassageCorpus:
    """Passages of rows ``{"text", "title"?, "id"?}``, and of texts, which are cut as for an index.

    The first call builds the corpus (one process at a time); later ones open it, while sources and options stay.

    Args:
        data: Folder that the sources are relative to.
        sources: Glob patterns: ``.jsonl``, ``.jsonl.gz``, ``.txt``, ``.md``, ``.html``, ``.pdf``, folders of these.
        cache: Where the corpus gets a folder of its own.
        skip_bad: Leave malformed rows and unreadable texts out, list them, and warn.
        characters: Length of the shortest and of the longest text; others are left out and counted.
    Raises:
        ConfigError: If the bounds are none.
        InputError: If a pattern matches nothing, a file is of another kind or torn, a row is bad, or no row is left.
        MissingDependencyError: If a PDF is read without pypdf.
    """
    low, high = characters
    if not 0 <= low <= high:
        raise ConfigError(f"characters must be the shortest and the longest length, got {characters}; try (30, 1200).")

    def read(file: Path) -> Iterator[Checked[Passage]]:
        for line, item in _rows(file, passage_of) if file.name.lower().endswith(ROW_SUFFIXES) else _chunks(file):
            yield line, None if isinstance(item, Passage) and not low <= len(item.text) <= high else item

    patterns = [sources] if isinstance(sources, str) else list(sources)
    files = find_sources(data, patterns, (*SUFFIXES, *ROW_SUFFIXES))
    return open_corpus(PassageCorpus, data, patterns, files, cache, read, skip_bad=skip_bad, characters=[low, high])


def open_questions(
    data: Path, sources: Mapping[str, float] | Sequence[str], cache: Path, *, skip_bad: bool = False
) -> QuestionCorpus:
    """Questions of rows ``{"question", "answers", "context", "title"?}``; else as :func:`open_passages`.

    Args:
        data: Folder that the sources are relative to.
        sources: Glob patterns: ``.jsonl``, ``.jsonl.gz``, folders of these. Or the weight of each: how often one of its
            rows is drawn against others. A file that several match has the weight of the last.
        cache: Where the corpus gets a folder of its own.
        skip_bad: Leave malformed rows out, list them, and warn.
    Raises:
        ConfigError: If a weight is not above 0.
        InputError: If a pattern matches nothing, a file is of another kind or torn, a row is bad, or no row is left.
    """
    if not isinstance(sources, Mapping):
        sources = dict.fromkeys([sources] if isinstance(sources, str) else sources, 1.0)
    weights: dict[Path, float] = {}
    for pattern, weight in sources.items():
        if not 0 < weight < float("inf"):
            raise ConfigError(f"weight of {pattern!r} must be above 0, got {weight}; leave out what is not wanted.")
        weights.update(dict.fromkeys(find_sources(data, [pattern], ROW_SUFFIXES), float(weight)))
    files = sorted(weights)

    def read(file: Path) -> Iterator[Checked[Question]]:
        return _rows(file, question_of)

    weights_of_files = [weights[file] for file in files]
    return open_corpus(
        QuestionCorpus, data, list(sources), files, cache, read, skip_bad=skip_bad, weights=weights_of_files
    )


def find_sources(data: Path, patterns: Sequence[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Files that match, sorted; of folders, those with the suffixes. Hidden files are left out.

    Raises:
        InputError: If a pattern matches nothing, or a file with another suffix.
    """
    files: set[Path] = set()
    for path in expand(data, patterns):
        if path.is_dir():
            found = find_documents(path)
            files.update(file for file in (*found.files, *found.skipped) if file.name.lower().endswith(suffixes))
        elif path.name.lower().endswith(suffixes):
            files.add(path)
        elif not path.name.startswith("."):
            raise InputError(f"{path} must end in {', '.join(suffixes)}; convert it, or narrow the pattern.")
    return sorted(files)


def _rows(file: Path, item_of: Callable[[dict[str, Any]], T]) -> Iterator[Checked[T]]:
    for number, line in numbered_lines(file):
        try:
            yield number, item_of(parse_row(line))
        except ValueError as error:
            yield number, error


def _chunks(file: Path) -> Iterator[Checked[Passage]]:
    try:
        document = read_document(file)
        for start, end in split_text(document.text, headings=document.headings):
            yield None, passage_of({"text": document.text[start:end], "title": document.title})
    except ValueError as error:  # InputError is one
        yield None, ValueError(str(error).removeprefix(f"{file} ").removesuffix("."))
