"""The files of a corpus: rows written once, then mapped and read by index. Where rows come from is not known here.

A corpus is a folder: ``rows.jsonl``; ``offsets.npy``, where each row begins; ``lengths.npy``; ``bad_rows.jsonl``, what
was left out; and ``corpus.json``, what it was built from. It is written beside its place, synced, and moved there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import operator
import os
import shutil
import warnings
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, SupportsIndex, TypeVar, overload

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from vist_rag.errors import InputError
from vist_rag.training.data import Question, TextSequence
from vist_rag.types import Passage

_FORMAT = 1

T = TypeVar("T", Passage, Question, TextSequence)
C = TypeVar("C", bound="Corpus[Any]")
Checked = tuple[int | None, T | ValueError | None]
"""A line's number, where there are lines, and an item, or what is wrong with it, or None: outside the bounds."""


class Corpus(Sequence[T]):
    """Rows on disk, mapped, not held in memory; a slice is a list, which is.

    Attributes:
        folder: Where it lies.
        key: Hash of the names, sizes and times of the sources, and of the options.
        options: What it was built with.
        bad: Malformed rows that were left out; ``bad_rows.jsonl`` lists them.
        outside: Passages that were left out as too short or too long.
        lengths: Characters of each passage with its title, int32 [n], mapped.

    Raises:
        InputError: If a file is missing or torn.
    """

    kind: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = json.loads((folder / "corpus.json").read_text("utf-8"))
            self.key, self.options, self._rows_of_files = facts["key"], facts["options"], facts["rows"]
            self.bad, self.outside = facts["bad"], facts["outside"]
            self.lengths: npt.NDArray[np.int32] = np.load(folder / "lengths.npy", mmap_mode="r")
            self._offsets: npt.NDArray[np.int64] = np.load(folder / "offsets.npy", mmap_mode="r")
            with (folder / "rows.jsonl").open("rb") as file:
                self._rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if not len(self._offsets) - 1 == len(self.lengths) == sum(self._rows_of_files):
                raise ValueError("rows are missing")
            if self._offsets[-1] != len(self._rows):
                raise ValueError("rows.jsonl is torn")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} must be a whole corpus ({error}); remove it to build it anew.") from error

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"index must be below {len(self)} (rows in this corpus), got {i}.")
        i %= len(self)
        return self._item(json.loads(self._rows[self._offsets[i] : self._offsets[i + 1]]))

    def __reduce__(self) -> tuple[type[Corpus[T]], tuple[Path]]:
        # A mapping does not travel to another process; its folder does.
        return type(self), (self.folder,)

    def order(self, seed: int) -> npt.NDArray[np.int64]:
        """All indices in a shuffled order, int64 [n]; ``seed`` is in 0..2**32 - 1."""
        # Of numpy's generators, only this one promises the same numbers in every version.
        return np.random.RandomState(seed).permutation(len(self)).astype(np.int64, copy=False)

    @abstractmethod
    def _item(self, row: dict[str, Any]) -> T: ...


def open_corpus(
    make: type[C],
    data: Path,
    patterns: list[str],
    files: list[Path],
    cache: Path,
    read: Callable[[Path], Iterator[Checked[Any]]],
    *,
    skip_bad: bool,
    **options: Any,
) -> C:
    """The corpus of these files as they are now, built where it is not there whole.

    Args:
        make: Its class.
        data: Folder that the patterns are relative to.
        patterns: What was asked for; each set of patterns has a folder in ``cache``.
        files: What they match.
        cache: Where corpora lie.
        read: What a file holds.
        skip_bad: Leave malformed rows out, list them, and warn.
        options: JSON values; with others, the corpus is built anew.
    Raises:
        InputError: If a row is bad, or none is left.
    """
    stats = [(file.relative_to(data).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = _hash(_FORMAT, make.kind, patterns, stats, options, skip_bad)
    folder = cache / f"{make.kind}-{_hash(patterns)[:8]}"
    try:
        corpus = make(folder)
    except InputError:
        corpus = None
    if corpus is None or corpus.key != key:
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            _build(make, unfinished, files, read, skip_bad=skip_bad, facts={"key": key, "options": options})
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        corpus = make(folder)
    if corpus.bad:
        warnings.warn(f"{corpus.bad} bad {make.kind} left out; {folder / 'bad_rows.jsonl'} lists them.", stacklevel=3)
    return corpus


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _build(
    make: type[Corpus[T]],
    folder: Path,
    files: list[Path],
    read: Callable[[Path], Iterator[Checked[T]]],
    *,
    skip_bad: bool,
    facts: dict[str, Any],
) -> None:
    offsets, lengths, rows_of_files = array("q", [0]), array("i"), []
    outside, bad, first_bad = 0, 0, []
    with (
        _synced(folder / "rows.jsonl") as rows,
        _synced(folder / "bad_rows.jsonl") as bad_rows,
        tqdm(desc=f"reading {make.kind}", unit=" rows", disable=None) as bar,
    ):
        for file in files:
            before = len(lengths)
            for line, item in read(file):
                bar.update()
                if item is None:
                    outside += 1
                elif isinstance(item, ValueError):
                    bad += 1
                    bad_rows.write(_line({"file": str(file), "line": line, "error": str(item)}))
                    if bad <= 5:
                        first_bad.append(f"\n{file}:{line} {item}" if line else f"\n{file} {item}")
                else:
                    size = rows.write(_line({field: getattr(item, field) for field in make.fields}))
                    offsets.append(offsets[-1] + size)
                    lengths.append(len(item.content))
            rows_of_files.append(len(lengths) - before)
    if bad and not skip_bad:
        more = f"\nand {bad - 5} more" if bad > 5 else ""
        raise InputError(f"{make.kind}: {bad} bad rows; mend them or use --skip-bad:{''.join(first_bad)}{more}")
    if not lengths:
        raise InputError(
            f"{make.kind} must have one row or more, got none in {len(files)} files ({bad} bad, {outside} outside "
            f"the bounds; {facts['options']}); check --data and the patterns."
        )
    for name, values in (("offsets", np.array(offsets, np.int64)), ("lengths", np.array(lengths, np.int32))):
        with _synced(folder / f"{name}.npy") as out:
            np.save(out, values)
    with _synced(folder / "corpus.json") as out:
        out.write(_line({**facts, "rows": rows_of_files, "bad": bad, "outside": outside}))


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"  # file names may need it


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, safe on disk when this ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
