"""The one truth about passages: one SQLite file with text, vectors and memories.

Every write is one transaction (WAL, ``synchronous=FULL``): when a method has returned, what it wrote survives a kill.
A row of a passage never changes its text or its vector: a changed text is a new row with a new number. So whatever is
derived from rows, as the FAISS cache is, follows by dropping the numbers that are gone and adding those that are new.
A memory belongs to a text, whichever passages hold it, and to the compressor that made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vist_rag import codec
from vist_rag.errors import ConfigError, InputError, StoreError
from vist_rag.retrieval.database import Database, utf8
from vist_rag.retrieval.schema import (
    SCHEMA,
    checksum,
    content_key,
    insert_memory,
    insert_passage,
    require_intact,
    set_meta,
    stamped,
)
from vist_rag.types import Passage

SCHEMA_VERSION = SCHEMA.version

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


class MemorySizes(NamedTuple):
    """Memories of one compressor in one form: their number, latents and bytes in all."""

    fingerprint: str
    form: str
    memories: int
    latents: int
    bytes: int


class Sizes(NamedTuple):
    """What a store holds.

    Attributes:
        passages: Their number.
        text_bytes: Of ids, titles, texts, sources and metadata.
        vector_bytes: Of their vectors.
        memories: By compressor and form.
        file_bytes: Of the SQLite file, what has not been written back from its log included.
        free_bytes: Of these, left by deleted rows: used again, or given back by ``compact``.
    """

    passages: int
    text_bytes: int
    vector_bytes: int
    memories: tuple[MemorySizes, ...]
    file_bytes: int
    free_bytes: int


class PassageStore:
    """Passages, their vectors and their memories in one SQLite file.

    Thread-safe; any number of processes may read while one writes. Texts may hold any code point, NUL and lone
    surrogates included: they come back as they went in.

    Args:
        path: The file; made where it is missing.
        read_only: Never write to the file; it must exist.
        timeout_s: How long to wait for another process's write.
    Raises:
        StoreError: If the file is missing (read-only), locked, damaged, not a passage store, of a newer version (or of
            an earlier one, read-only), or cannot be opened.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, timeout_s: float = 30.0) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._db = Database(self.path, schema=SCHEMA, read_only=read_only, timeout_s=timeout_s)

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
            number, stamp = self._facts()["generation"].split(".")
            return Generation(int(number), stamp)

    @property
    def last_removal(self) -> int:
        """The number of the last generation in which a row went: what came after only added rows."""
        with self._db.reading():
            return int(self._facts().get("last_removal", 0))

    def _next_generation(self, *, removed: bool) -> None:
        number = self.generation.number + 1
        set_meta(self._db, "generation", stamped(number))
        if removed:
            set_meta(self._db, "last_removal", str(number))

    def meta(self) -> dict[str, str]:
        """Facts about the store that were kept with :meth:`set_meta`."""
        with self._db.reading():
            return {key: value for key, value in self._facts().items() if key not in ("generation", "last_removal")}

    def _facts(self) -> dict[str, str]:
        facts = {}
        for key, value, stored in self._db.execute("SELECT key, value, checksum FROM meta"):
            require_intact(self._db, f"the fact {key!r}", stored, key, value)
            facts[key] = value
        return facts

    def set_meta(self, key: str, value: str) -> None:
        """Keep a fact about the store as a whole.

        Raises:
            StoreError: As :meth:`transaction`.
        """
        with self._db.transaction():
            set_meta(self._db, key, value)

    def __len__(self) -> int:
        with self._db.reading():
            return int(self._db.value("SELECT count(*) FROM passages"))

    # ----------------------------------------------------------------------------------------------------- passages

    def add(self, entries: Sequence[Entry], fingerprint: str = "", form: str = codec.DEFAULT_FORM) -> int:
        """Add passages, in one transaction.

        A passage whose id is new gets a row. One whose id is known and whose title and text are as stored only has its
        source, metadata and memory updated. One with another title or text replaces what was stored, and the memories
        of the old text go, unless another passage has the same.

        Args:
            entries: Passages with vectors and memories.
            fingerprint: Of the compressor that made the memories.
            form: How the memories are stored (:mod:`vist_rag.codec`).
        Returns:
            How many passages got a row.
        Raises:
            InputError: If metadata is not JSON, or a memory is not ``[n, d]`` or not finite in float16.
            StoreError: As :meth:`transaction`.
        """
        added, removed = 0, False
        with self._db.transaction():
            for passage, vector, memory in entries:
                row, is_new = self._updated(passage), False
                if row is None and vector is not None:
                    removed |= bool(self._delete(passage.id))
                    self._insert(passage, vector)
                    is_new = True
                # None for a row and a vector: known when it was looked up, deleted or replaced by another process
                # since; that came later.
                added += is_new
                if memory is not None and (is_new or row is not None):
                    self._put_memory(passage.content, memory, fingerprint, form)
            if added:
                self._next_generation(removed=removed)
        return added

    def _insert(self, passage: Passage, vector: NDArray[np.float32]) -> None:
        last = self._db.value("SELECT seq FROM sqlite_sequence WHERE name = 'passages'") or 0
        row = max(last, self._db.value("SELECT max(row) FROM passages") or 0) + 1
        blob = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        insert_passage(self._db, row, passage, _json(passage), blob)

    def _updated(self, passage: Passage) -> int | None:
        """The row with this id, title and text, its source and metadata brought up to date; None where there is none.

        A row that only changes these keeps its number: its vector and its memories stay what they are.
        """
        row, metadata = self._row_with_content(passage), _json(passage)
        if row is None:
            return None
        sql = _PASSAGES + "WHERE row = ?"
        stored = self._passage(self._db.execute(sql, row).fetchone())
        if (stored.source, _json(stored)) != (passage.source, metadata):
            content = content_key(passage.content)
            texts = (passage.id, passage.title, passage.text, passage.source, metadata)
            self._db.execute(
                "UPDATE passages SET source = CAST(? AS TEXT), metadata = CAST(? AS TEXT), checksum = ? WHERE row = ?",
                *(utf8(passage.source), utf8(metadata), checksum(row, *texts, content), row),
            )
        return row

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
            deleted = sum(map(self._delete, ids))
            if deleted:
                self._next_generation(removed=True)
        return deleted

    def _delete(self, id_: str) -> int:
        return self._db.execute("DELETE FROM passages WHERE id = CAST(? AS TEXT)", utf8(id_)).rowcount

    def get(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Passages by id, in the order asked; those that are not stored are absent."""
        with self._db.reading():
            rows = (self._row(_PASSAGES, id_) for id_ in ids)
            found = [self._passage(row) for row in rows if row]
        return {passage.id: passage for passage in found}

    def _row(self, select: str, id_: str) -> Any:
        """The row with an id, which comes second; None where there is none."""
        row = self._db.execute(select + "WHERE id = CAST(? AS TEXT)", utf8(id_)).fetchone()
        if row and row[1] != id_:  # a damaged index leads to another row
            require_intact(self._db, f"passage {id_!r}", None)
        return row

    def get_rows(self, rows: Iterable[int]) -> dict[int, Passage]:
        """Passages by row number.

        Raises:
            StoreError: If one is not stored: whoever asks by number has the number from this store.
        """
        found = {}
        with self._db.reading():
            for number in rows:
                row = self._db.execute(_PASSAGES + "WHERE row = ?", number).fetchone()
                if row is None:
                    raise StoreError(f"{self.path} is damaged: row {number} is missing; run vist-rag index --verify.")
                found[number] = self._passage(row)
        return found

    def _passage(self, row: Sequence[Any]) -> Passage:
        number, id_, title, text, source, metadata, _content, stored = row
        require_intact(self._db, f"passage row {number}", stored, *row[:-1])
        return Passage(text, id_, title, source, json.loads(metadata))

    def passages(self, *, lacking: str | None = None, form: str | None = None) -> Iterator[Passage]:
        """All passages in the order they were added.

        Args:
            lacking: Only those without a memory of this fingerprint.
            form: With ``lacking``, also those whose memory is stored in another form.
        """
        sql, values = _PASSAGES + "WHERE row > ? ORDER BY row LIMIT ?", []
        if lacking is not None:
            sql, values = _PASSAGES_LACKING_AFTER, [utf8(lacking), form, form]
        for page in self._pages(sql, *values):
            yield from map(self._passage, page)

    def count_lacking(self, fingerprint: str, form: str | None = None) -> int:
        """How many passages :meth:`passages` would give."""
        with self._db.reading():
            return int(self._db.value(_COUNT_LACKING, utf8(fingerprint), form, form))

    def rows(self) -> NDArray[np.int64]:
        """The numbers of all rows, int64 ``[n]``, ascending."""
        with self._db.reading():
            return np.sort(np.fromiter((row for (row,) in self._db.execute("SELECT row FROM passages")), np.int64))

    def vectors(self, *, after: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Vectors of the rows with a number above ``after``: pages of ``(int64 [b], float32 [b, d])``, ascending.

        Raises:
            StoreError: If a vector is not of the length of the others.
        """
        sql = "SELECT row, vector, vector_checksum FROM passages WHERE row > ? ORDER BY row LIMIT ?"
        for page in self._pages(sql, after=after):
            blobs = [self._vector(*row) for row in page]
            if len({len(blob) for blob in blobs}) != 1:
                raise StoreError(f"{self.path} is damaged: vectors of unequal length; restore it from a copy.")
            vectors = np.frombuffer(b"".join(blobs), "<f4").reshape(len(page), -1)
            yield np.array([row[0] for row in page], np.int64), vectors.astype(np.float32)

    def vectors_of(self, ids: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Vectors by passage id, float32 ``[d]``, in the order asked; those that are not stored are absent."""
        with self._db.reading():
            found = ((id_, self._row("SELECT row, id, vector, vector_checksum FROM passages ", id_)) for id_ in ids)
            blobs = {id_: self._vector(row[0], *row[2:]) for id_, row in found if row}
        return {id_: np.frombuffer(blob, "<f4").astype(np.float32) for id_, blob in blobs.items()}

    def _vector(self, row: int, blob: Any, stored: Any) -> bytes:
        require_intact(self._db, f"the vector of row {row}", stored, row, blob)
        return bytes(blob)

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

    def put_memories(
        self,
        memories: Mapping[str, ArrayLike],
        fingerprint: str,
        *,
        form: str = codec.DEFAULT_FORM,
        only_stored: bool = False,
    ) -> int:
        """Keep memories, in one transaction; those of the same text and fingerprint are replaced.

        Args:
            memories: float ``[n, d]`` by text (``Passage.content``). The text need not be that of a passage here.
            fingerprint: Of the compressor that made them.
            form: How they are stored (:mod:`vist_rag.codec`).
            only_stored: Pass over texts that no passage here has (any more).
        Returns:
            How many were kept.
        Raises:
            InputError: If a memory is not ``[n, d]`` or not finite in float16.
            StoreError: As :meth:`transaction`.
        """
        kept = 0
        with self._db.transaction():
            for text, memory in memories.items():
                if not only_stored or self._has_text(text):
                    self._put_memory(text, memory, fingerprint, form)
                    kept += 1
        return kept

    def _has_text(self, text: str) -> bool:
        return self._db.value("SELECT 1 FROM passages WHERE content = ?", content_key(text)) is not None

    def _put_memory(self, text: str, memory: ArrayLike, fingerprint: str, form: str) -> None:
        latents = np.asarray(memory)
        try:
            data = codec.encode(latents, form)
        except InputError as error:
            raise InputError(f"The memory of {text[:40]!r} cannot be kept: {error}") from error
        insert_memory(self._db, content_key(text), fingerprint, form, latents.shape, data)

    def memories(self, texts: Iterable[str], fingerprint: str) -> dict[str, NDArray[np.float16]]:
        """Memories by text, float16 ``[n, d]``; those that are not stored under ``fingerprint`` are absent.

        Raises:
            StoreError: If a memory is not as it was written.
        """
        sql = "SELECT form, n, d, latents, checksum FROM memories WHERE content = ? AND fingerprint = CAST(? AS TEXT)"
        found: dict[str, NDArray[np.float16]] = {}
        with self._db.reading():
            for text in texts:
                key = content_key(text)
                if row := self._db.execute(sql, key, utf8(fingerprint)).fetchone():
                    form, n, d, latents, stored = row
                    require_intact(self._db, f"the memory of {text[:40]!r}", stored, key, fingerprint, *row[:-1])
                    found[text] = codec.decode(latents, form, n, d).astype(np.float16)
        return found

    def delete_memories(self, texts: Iterable[str] | None = None, *, fingerprint: str | None = None) -> int:
        """Delete memories, in one transaction: of texts, of a compressor, or of texts by a compressor.

        Returns:
            How many were deleted.
        Raises:
            ConfigError: If neither is given.
            StoreError: As :meth:`transaction`.
        """
        if texts is None and fingerprint is None:
            raise ConfigError("texts or fingerprint must be given, got neither; name what is to go.")
        of = None if fingerprint is None else utf8(fingerprint)
        sql = "DELETE FROM memories WHERE (? IS NULL OR fingerprint = CAST(? AS TEXT)) AND (? IS NULL OR content = ?)"
        keys = [None] if texts is None else map(content_key, texts)
        with self._db.transaction():
            return sum(self._db.execute(sql, of, of, key, key).rowcount for key in keys)

    def fingerprints(self) -> dict[str, int]:
        """The fingerprints that memories are stored under, each with their number."""
        with self._db.reading():
            return dict(self._db.execute("SELECT fingerprint, count(*) FROM memories GROUP BY fingerprint"))

    # --------------------------------------------------------------------------------------------------- maintenance

    def sizes(self) -> Sizes:
        """Rows and bytes of the store, by kind."""
        with self._db.snapshot():
            passages, text, vectors = self._db.execute(
                "SELECT count(*), total(length(CAST(id || title || text || source || metadata AS BLOB))), "
                "total(length(vector)) FROM passages"
            ).fetchone()
            memories = self._db.execute(
                "SELECT fingerprint, form, count(*), sum(n), sum(length(latents)) FROM memories GROUP BY 1, 2"
            ).fetchall()
            page, free = self._db.value("PRAGMA page_size"), self._db.value("PRAGMA freelist_count")
            file = page * self._db.value("PRAGMA page_count")
        return Sizes(passages, int(text), int(vectors), tuple(MemorySizes(*row) for row in memories), file, page * free)

    def problems(self) -> list[str]:
        """What is wrong with the store: its structure, and every row against its checksum. Empty: nothing."""
        found: list[str] = []
        with self._db.reading():
            found += [line for (line,) in self._db.execute("PRAGMA integrity_check(100)") if line != "ok"]
            self._facts()
        lengths: set[int] = set()
        for page in self._pages(_PASSAGES_AND_VECTORS):
            for *passage, vector, stored in page:
                try:
                    self._passage(passage)
                    lengths.add(len(self._vector(passage[0], vector, stored)))
                except StoreError as error:
                    found.append(str(error))
        found += [
            f"the memory {content.hex()[:12]} is not as it was written" for content, _ in self._damaged_memories()
        ]
        return found

    def _damaged_memories(self) -> Iterator[tuple[bytes, int]]:
        sql = (
            "SELECT rowid, content, fingerprint, form, n, d, latents, checksum FROM memories WHERE rowid > ? "
            "ORDER BY rowid LIMIT ?"
        )
        for page in self._pages(sql):
            for rowid, *row, stored in page:
                if stored != checksum(*row):
                    yield row[0], rowid

    def mend(self) -> int:
        """Make what is derived anew: SQLite's indexes; memories that are damaged go, since they can be made again.

        Returns:
            How many memories went.
        Raises:
            StoreError: If the store is read-only or locked, or the damage goes deeper.
        """
        with self._db.transaction():
            self._db.execute("REINDEX")
            damaged = [rowid for _, rowid in self._damaged_memories()]
            for rowid in damaged:
                self._db.execute("DELETE FROM memories WHERE rowid = ?", rowid)
        return len(damaged)

    def compact(self) -> None:
        """Give what deleted rows left free back to the disk; needs as much free space as the file is large.

        Raises:
            StoreError: If the store is read-only or locked, or the disk is full.
        """
        self._db.compact()


_PASSAGES = "SELECT row, id, title, text, source, metadata, content, checksum FROM passages "
_LACKING = """
NOT EXISTS (
    SELECT 1 FROM memories
    WHERE content = passages.content AND fingerprint = CAST(? AS TEXT) AND (? IS NULL OR form = ?)
)
"""
_PASSAGES_AND_VECTORS = """
SELECT row, id, title, text, source, metadata, content, checksum, vector, vector_checksum FROM passages
WHERE row > ? ORDER BY row LIMIT ?
"""
_PASSAGES_LACKING_AFTER = _PASSAGES + "WHERE row > ? AND " + _LACKING + " ORDER BY row LIMIT ?"
_COUNT_LACKING = "SELECT count(*) FROM passages WHERE " + _LACKING  # noqa: S608  (both are constants)


def _json(passage: Passage) -> str:
    try:
        return json.dumps(dict(passage.metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"The metadata of passage {passage.id!r} is not JSON: {error}; keep to strings, finite numbers, booleans, "
            "None, lists and dicts."
        ) from error
