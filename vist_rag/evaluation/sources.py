"""Where rows come from: files by pattern, data sets by name, path or hub id."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vist_rag.errors import ConfigError, InputError, MissingDependencyError
from vist_rag.evaluation.rows import SUFFIXES, BadRows, Row, read_rows

_SPLITS = ("dev", "validation", "valid", "val")  # one split, by the names that collections give it
_HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+:[\w.-]+|[\w.-]+/[\w.-]+")


def find_files(patterns: Sequence[str], *, data: Path | None, kind: str, suffixes: Sequence[str]) -> list[Path]:
    """Files that the patterns name, each once: in the order of the patterns, by name within one.

    A pattern is a file, a directory (its files with one of ``suffixes``), or a glob; relative ones are looked up
    under ``data`` and, where that has none, in the working directory.

    Raises:
        ConfigError: If ``data`` is given and is no directory, or there are no patterns.
        InputError: If a pattern matches nothing.
    """
    if isinstance(patterns, str) or not patterns:
        raise ConfigError(f"{kind} must be a list of one or more files or patterns, got {patterns!r}.")
    roots = [Path()] if data is None else [require_data(data, kind), Path()]
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = next(filter(None, (_matches(root, pattern, suffixes) for root in roots)), None)
        if matches is None:
            under = f"under {data}" if data is not None else "(--data, VIST_RAG_DATA: not given)"
            raise InputError(f"{kind} {pattern!r} must match a file here or {under}, got none; check the pattern.")
        found.update(dict.fromkeys(matches))
    return list(found)


def _matches(root: Path, pattern: str, suffixes: Sequence[str]) -> list[Path]:
    path = root / pattern
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.name.lower().endswith(tuple(suffixes)))
    if path.is_absolute():  # Path.glob takes relative patterns only
        root, pattern = Path(path.anchor), str(path.relative_to(path.anchor))
    return sorted(file for file in root.glob(pattern) if file.is_file())


def require_data(data: Path | None, need: str) -> Path:
    """The folder of the data sets.

    Raises:
        ConfigError: If it is not given, or is no directory.
    """
    if data is None or not data.is_dir():
        raise ConfigError(
            f"{need} needs the folder of the data sets, got {'none' if data is None else data}; give it with --data "
            "DIR or VIST_RAG_DATA."
        )
    return data


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a file, a directory, or a data set on the hub. ``label`` names rows without an id."""

    label: str
    place: Path | str
    split: str

    def rows(self, bad: BadRows) -> Iterator[Row]:
        """All rows.

        Raises:
            ConfigError: If there is no such split, or no such data set on the hub.
            InputError: As :func:`read_rows`.
            MissingDependencyError: If an optional package is needed.
        """
        if isinstance(self.place, str):
            path, _, config = self.place.partition(":")
            return self._load(path, *([config] if config else []))
        if self.place.is_file():
            return read_rows(self.place, bad)
        if (self.place / "dataset_dict.json").is_file() or (self.place / "state.json").is_file():
            return self._load(None)
        file = _split_file(self.place, self.split)
        return self._load(str(self.place)) if file is None else read_rows(file, bad)

    def _load(self, path: str | None, *config: str) -> Iterator[Row]:
        """Through the ``datasets`` library; without a path, what its ``save_to_disk`` wrote."""
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            purpose = f"Reading the directory {self.place}"
            if isinstance(self.place, str):
                purpose = f"Reading {self.place} from the hub (there is no such file or directory)"
            raise MissingDependencyError(purpose, "datasets", "eval") from error
        try:
            found = library.load_from_disk(str(self.place)) if path is None else library.load_dataset(path, *config)
        except Exception as error:  # the library and the hub raise dozens of types: not found, offline, no such config
            raise ConfigError(
                f"data set {self.place!s} must be one that the datasets library can load ({error}); check the name, "
                "its configuration (owner/name:config) and the network, or give a file."
            ) from error
        if isinstance(found, Mapping):  # split -> rows
            split = next((name for name in _names(self.split) if name in found), None)
            if split is None:
                raise ConfigError(f"split of {self.place!s} must be one of {', '.join(found)}, got {self.split!r}.")
            found = found[split]
        return self._number(found)

    def _number(self, found: Any) -> Iterator[Row]:
        features = getattr(found, "features", None) or {}
        classes = {name: feature.names for name, feature in features.items() if hasattr(feature, "names")}
        for number, values in enumerate(found, start=1):
            named = dict(values)
            for field, names in classes.items():
                if isinstance(index := values[field], int) and index >= 0:  # -1: a label that is kept secret
                    named[field] = names[index]
            yield Row(f"{self.place!s}, row {number},", number, named)


def _names(split: str) -> tuple[str, ...]:
    return (split, *(name for name in _SPLITS if name != split)) if split in _SPLITS else (split,)


def _split_file(folder: Path, split: str) -> Path | None:
    files = (folder / f"{name}{suffix}" for name in _names(split) for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def find_source(
    source: str, *, kind: str, folder: str, names: Mapping[str, str], split: str, data: Path | None
) -> Source:
    """Resolve what a user calls a data set: a registered name, then a path, then a hub id.

    Args:
        source: ``nq_open``, ``my/file.jsonl``, ``owner/name`` or ``owner/name:config``.
        kind: What it is called in messages.
        folder: Where registered ones lie under ``data``.
        names: Registered names, and the directory of each in ``folder``.
        split: Which rows; a file has one split only, its own.
        data: Folder of the data sets; relative paths are looked up there, too.
    Raises:
        ConfigError: If there is no such data set or split, or the data folder is missing.
    """
    if (name := names.get(source.lower().replace("-", "_"))) is not None:
        home = require_data(data, f"{kind} {source!r}") / folder / name
        if (file := _split_file(home, split)) is not None:
            return Source(name, file, split)
        splits = sorted({f.name.partition(".")[0] for f in home.glob("*") if f.name.lower().endswith(SUFFIXES)})
        if splits:
            raise ConfigError(f"split of {source} must be one of {', '.join(splits)} (in {home}), got {split!r}.")
        raise ConfigError(
            f"{kind} {source!r} must be in {home / split}.jsonl.gz (or .jsonl), found nothing; check --data or "
            "VIST_RAG_DATA, or give a path or a hub id."
        )
    for path in (Path(source), *([data / source] if data is not None else [])):
        if source and path.exists():
            return Source(re.sub(r"\.(jsonl?|parquet)(\.gz)?$", "", path.name, flags=re.IGNORECASE), path, split)
    if _HUB_ID.fullmatch(source) and not source.lower().endswith(SUFFIXES):
        return Source(re.sub(r"[/:]", "-", source.rpartition("/")[2]), source, split)
    raise ConfigError(
        f"{kind} must be one of {', '.join(names)}, a file or directory that exists (here or under --data), or a hub "
        f"id (owner/name, name:config), got {source!r}."
    )
