"""The one truth about passages: one SQLite file with text, vectors and memories.

Every write is one transaction (WAL, ``synchronous=FULL``): when a method has returned, what it wrote survives a kill.
A row of a passage never changes its text or its vector: a changed text is a new row with a new number. So whatever is
derived from rows, as the FAISS cache is, follows by dropping the numbers that are gone and adding those that are new.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vist_rag.errors import InputError, StoreError
from vist_rag.retrieval.database import Database, utf8
from vist_rag.types import Passage

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE passages (
    row INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice
    id TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    text TEXT NOT NULL,
    source TEXT NOT NULL,
    metadata TEXT NOT NULL,  -- JSON
    vector BLOB NOT NULL  -- float32, little-endian
);
CREATE TABLE memories (
    passage INTEGER NOT NULL REFERENCES passages (row) ON DELETE CASCADE,
    fingerprint TEXT NOT NULL,
    n INTEGER NOT NULL,
    d INTEGER NOT NULL,
    latents BLOB NOT NULL,  -- float16, little-endian, [n, d]
    PRIMARY KEY (passage, fingerprint)
);
CREATE INDEX memories_by_fingerprint ON memories (fingerprint);
"""

_PAGE = 1024  # rows fetched at once: bounds memory and the time that a read blocks a checkpoint


class Generation(NamedTuple):
    """Which state of the rows a cache was made from.

    Attributes:
        number: Grows by one with every write that adds or removes a row.
        stamp: Random, drawn by that write: two copies of a store that went separate ways share numbers, never stamps.
    """

    number: int
    stamp: str


class Entry(NamedTuple):
    """A passage to add.

    Attributes:
        passage: The passage.
        vector: float32 ``[d]``; None where its content is known to be stored: then only what is around it is updated.
        memory: float ``[n, d]``, or None.
    """

    passage: Passage
    vector: NDArray[np.float32] | None
    memory: ArrayLike | None = None


class PassageStore:
    """Passages, their vectors and their memories in one SQLite file.

    Thread-safe; any number of processes may read while one writes. Texts may hold any code point, NUL and lone
    surrogates included: they come back as they went in.

    Args:
        path: The file; made where it is missing.
        read_only: Never write to the file; it must exist.
        timeout_s: How long to wait for another process's write.
    Raises:
        StoreError: If the file is missing (read-only), locked, damaged, not a passage store, of a newer version, or
            cannot be opened.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, timeout_s: float = 30.0) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._db = Database(
            self.path, version=SCHEMA_VERSION, create=self._create, read_only=read_only, timeout_s=timeout_s
        )

    def _create(self, db: Database) -> None:
        for statement in _SCHEMA.split(";\n"):
            db.execute(statement)
        _set_meta(db, "generation", _stamped(0))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._db.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._db.closed

    def require_writable(self) -> None:
        """Do nothing, or raise :class:`StoreError` where the store is open read-only."""
        self._db.require_writable()

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transaction(self) -> AbstractContextManager[None]:
        """One write transaction over several calls: all of them, or none where the body raises. Other writers wait.

        Raises:
            StoreError: If the store is read-only, or locked for longer than its timeout.
        """
        return self._db.transaction()

    def snapshot(self) -> AbstractContextManager[None]:
        """Reads within see one state, whatever other processes write meanwhile."""
        return self._db.snapshot()

    # -------------------------------------------------------------------------------------------------------- state

    @property
    def generation(self) -> Generation:
        """The state of the rows: what a cache of them must have been made from."""
        with self._db.reading():
            number, stamp = str(self._db.value("SELECT value FROM meta WHERE key = 'generation'")).split(".")
            return Generation(int(number), stamp)

    def _next_generation(self) -> None:
        _set_meta(self._db, "generation", _stamped(self.generation.number + 1))

    def meta(self) -> dict[str, str]:
        """Facts about the store that were kept with :meth:`set_meta`."""
        with self._db.reading():
            return dict(self._db.execute("SELECT key, value FROM meta WHERE key <> 'generation'"))

    def set_meta(self, key: str, value: str) -> None:
        """Keep a fact about the store as a whole.

        Raises:
            StoreError: As :meth:`transaction`.
        """
        with self._db.transaction():
            _set_meta(self._db, key, value)

    def __len__(self) -> int:
        with self._db.reading():
            return int(self._db.value("SELECT count(*) FROM passages"))

    # ----------------------------------------------------------------------------------------------------- passages

    def add(self, entries: Sequence[Entry], fingerprint: str = "") -> int:
        """Add passages, in one transaction.

        A passage whose id is new gets a row. One whose id is known and whose title and text are as stored only has its
        source, metadata and memory updated. One with another title or text replaces what was stored, and the memories
        of the old text go.

        Args:
            entries: Passages with vectors and memories.
            fingerprint: Of the compressor that made the memories.
        Returns:
            How many passages got a row.
        Raises:
            InputError: If metadata is not JSON, or a memory is not ``[n, d]`` or not finite in float16.
            StoreError: As :meth:`transaction`.
        """
        added = 0
        with self._db.transaction():
            for passage, vector, memory in entries:
                row, is_new = self._put_passage(passage, vector)
                added += is_new
                if memory is not None and row is not None:
                    self._put_memory(row, passage.id, memory, fingerprint)
            if added:
                self._next_generation()
        return added

    def _put_passage(self, passage: Passage, vector: NDArray[np.float32] | None) -> tuple[int | None, bool]:
        id_, title, text = utf8(passage.id), utf8(passage.title), utf8(passage.text)
        source, metadata = utf8(passage.source), _json(passage)
        row = self._row_with_content(passage)
        if row is not None:
            self._db.execute(
                "UPDATE passages SET source = CAST(? AS TEXT), metadata = CAST(? AS TEXT) "
                "WHERE row = ? AND (source, metadata) <> (CAST(? AS TEXT), CAST(? AS TEXT))",
                *(source, metadata, row, source, metadata),
            )  # the condition saves the write where nothing changed
            return row, False
        if vector is None:  # known when it was looked up, deleted or replaced by another process since: that came later
            return None, False
        self._db.execute("DELETE FROM passages WHERE id = CAST(? AS TEXT)", id_)
        blob = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        cursor = self._db.execute(
            "INSERT INTO passages (id, title, text, source, metadata, vector) "
            "VALUES (CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), ?)",
            *(id_, title, text, source, metadata, blob),
        )
        return cursor.lastrowid, True

    def _row_with_content(self, passage: Passage) -> int | None:
        sql = "SELECT row FROM passages WHERE (id, title, text) = (CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT))"
        row: int | None = self._db.value(sql, utf8(passage.id), utf8(passage.title), utf8(passage.text))
        return row

    def holds(self, passage: Passage) -> bool:
        """Whether a passage is stored with this id, title and text."""
        with self._db.reading():
            return self._row_with_content(passage) is not None

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages and their memories, in one transaction; ids that are not stored are passed over.

        Returns:
            How many were deleted.
        Raises:
            StoreError: As :meth:`transaction`.
        """
        with self._db.transaction():
            deleted = sum(
                self._db.execute("DELETE FROM passages WHERE id = CAST(? AS TEXT)", utf8(id_)).rowcount for id_ in ids
            )
            if deleted:
                self._next_generation()
        return deleted

    def get(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Passages by id, in the order asked; those that are not stored are absent."""
        sql = _PASSAGES + "WHERE id = CAST(? AS TEXT)"
        with self._db.reading():
            found = (self._db.execute(sql, utf8(id_)).fetchone() for id_ in ids)
            return {row[1]: _passage(*row[1:]) for row in found if row}

    def get_rows(self, rows: Iterable[int]) -> dict[int, Passage]:
        """Passages by row number; those that are not stored are absent."""
        with self._db.reading():
            found = (self._db.execute(_PASSAGES + "WHERE row = ?", row).fetchone() for row in rows)
            return {row[0]: _passage(*row[1:]) for row in found if row}

    def passages(self, *, lacking: str | None = None) -> Iterator[Passage]:
        """All passages in the order they were added; with ``lacking``, those without a memory of that fingerprint."""
        sql, values = _PASSAGES_AFTER, []
        if lacking is not None:
            sql, values = _PASSAGES_LACKING_AFTER, [utf8(lacking)]
        for page in self._pages(sql, *values):
            yield from (_passage(*row[1:]) for row in page)

    def rows(self) -> NDArray[np.int64]:
        """The numbers of all rows, int64 ``[n]``, ascending."""
        with self._db.reading():
            return np.sort(np.fromiter((row for (row,) in self._db.execute("SELECT row FROM passages")), np.int64))

    def vectors(self, *, after: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Vectors of the rows with a number above ``after``: pages of ``(int64 [b], float32 [b, d])``, ascending.

        Raises:
            StoreError: If a vector is not of the length of the others.
        """
        for page in self._pages("SELECT row, vector FROM passages WHERE row > ? ORDER BY row LIMIT ?", after=after):
            if len({len(vector) for _, vector in page}) != 1:
                raise StoreError(f"{self.path} is damaged: vectors of unequal length; restore it from a copy.")
            vectors = np.frombuffer(b"".join(vector for _, vector in page), "<f4").reshape(len(page), -1)
            yield np.array([row for row, _ in page], np.int64), vectors.astype(np.float32)

    def vectors_of(self, ids: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Vectors by passage id, float32 ``[d]``, in the order asked; those that are not stored are absent."""
        sql = "SELECT vector FROM passages WHERE id = CAST(? AS TEXT)"
        with self._db.reading():
            found = ((id_, self._db.value(sql, utf8(id_))) for id_ in ids)
            return {id_: np.frombuffer(blob, "<f4").astype(np.float32) for id_, blob in found if blob is not None}

    def _pages(self, sql: str, *values: object, after: int = 0) -> Iterator[list[Any]]:
        """Run ``sql``, whose first parameter is a row number and the last a limit, until nothing follows."""
        while True:
            with self._db.reading():
                page = self._db.execute(sql, after, *values, _PAGE).fetchall()
            if not page:
                return
            yield page
            after = page[-1][0]

    # ----------------------------------------------------------------------------------------------------- memories

    def put_memories(self, memories: Mapping[str, ArrayLike] | Mapping[Passage, ArrayLike], fingerprint: str) -> int:
        """Keep memories, in one transaction; those of the same fingerprint are replaced.

        Args:
            memories: float ``[n, d]`` by passage or by id. By passage is safer: the memory is kept only while the store
                holds the very text that it was made from.
            fingerprint: Of the compressor that made them.
        Returns:
            How many were kept; one whose passage is not stored (any more) is passed over.
        Raises:
            InputError: If a memory is not ``[n, d]`` or not finite in float16.
            StoreError: As :meth:`transaction`.
        """
        kept = 0
        with self._db.transaction():
            for key, memory in memories.items():
                if isinstance(key, Passage):
                    id_, row = key.id, self._row_with_content(key)
                else:
                    id_, row = key, self._db.value("SELECT row FROM passages WHERE id = CAST(? AS TEXT)", utf8(key))
                if row is not None:
                    self._put_memory(row, id_, memory, fingerprint)
                    kept += 1
        return kept

    def _put_memory(self, row: int, id_: str, memory: ArrayLike, fingerprint: str) -> None:
        latents = np.asarray(memory)
        if latents.ndim != 2 or not latents.size or not np.issubdtype(latents.dtype, np.floating):
            raise InputError(
                f"The memory of passage {id_!r} must be a float array [n, d], got {latents.dtype} "
                f"{list(latents.shape)}; give the latents of one passage."
            )
        with np.errstate(over="ignore"):  # reported below, by name
            half = np.ascontiguousarray(latents, dtype="<f2")
        if not np.isfinite(half).all():
            raise InputError(f"The memory of passage {id_!r} holds NaN or numbers beyond float16; scale the latents.")
        self._db.execute(
            "INSERT OR REPLACE INTO memories VALUES (?, CAST(? AS TEXT), ?, ?, ?)",
            *(row, utf8(fingerprint), *half.shape, half.tobytes()),
        )

    def memories(self, ids: Iterable[str], fingerprint: str) -> dict[str, NDArray[np.float16]]:
        """Memories by passage id, float16 ``[n, d]``; those that are not stored under ``fingerprint`` are absent.

        Raises:
            StoreError: If a stored memory is not of its stated shape.
        """
        sql = (
            "SELECT n, d, latents FROM memories JOIN passages ON passage = row "
            "WHERE id = CAST(? AS TEXT) AND fingerprint = CAST(? AS TEXT)"
        )
        found: dict[str, NDArray[np.float16]] = {}
        with self._db.reading():
            for id_ in ids:
                if row := self._db.execute(sql, utf8(id_), utf8(fingerprint)).fetchone():
                    n, d, latents = row
                    if not isinstance(latents, bytes) or len(latents) != 2 * n * d:
                        raise StoreError(f"{self.path} is damaged: the memory of {id_!r} is not {n} x {d} numbers.")
                    found[id_] = np.frombuffer(latents, "<f2").reshape(n, d).astype(np.float16)  # a copy, writable
        return found

    def fingerprints(self) -> dict[str, int]:
        """The fingerprints that memories are stored under, each with their number."""
        with self._db.reading():
            return dict(self._db.execute("SELECT fingerprint, count(*) FROM memories GROUP BY fingerprint"))


_PASSAGES = "SELECT row, id, title, text, source, metadata FROM passages "
_PASSAGES_AFTER = _PASSAGES + "WHERE row > ? ORDER BY row LIMIT ?"
_PASSAGES_LACKING_AFTER = """
SELECT row, id, title, text, source, metadata FROM passages
WHERE row > ? AND NOT EXISTS (SELECT 1 FROM memories WHERE passage = row AND fingerprint = CAST(? AS TEXT))
ORDER BY row LIMIT ?
"""


def _stamped(number: int) -> str:
    return f"{number}.{secrets.token_hex(8)}"


def _set_meta(db: Database, key: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (CAST(? AS TEXT), CAST(? AS TEXT))", utf8(key), utf8(value))


def _json(passage: Passage) -> bytes:
    try:
        return json.dumps(dict(passage.metadata), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"The metadata of passage {passage.id!r} is not JSON: {error}; keep to strings, finite numbers, booleans, "
            "None, lists and dicts."
        ) from error


def _passage(id_: str, title: str, text: str, source: str, metadata: str) -> Passage:
    return Passage(text, id_, title, source, json.loads(metadata))
