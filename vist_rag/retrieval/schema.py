"""The tables of a passage store, how stores of earlier versions become stores of this one, and the checksums of rows.

SQLite notices a torn file, but not a changed byte inside a value. So every row has a CRC-32 over all of it, its own
number included: what is read is what was written, or :class:`~vist_rag.errors.StoreError`.
"""

from __future__ import annotations

import hashlib
import secrets
import zlib
from typing import Any

from tqdm.auto import tqdm

from vist_rag.errors import StoreError
from vist_rag.retrieval.database import Database, Schema, utf8
from vist_rag.types import Passage

_TABLES = (
    """CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE passages (
    row INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice
    id TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    text TEXT NOT NULL,
    source TEXT NOT NULL,
    metadata TEXT NOT NULL,  -- JSON
    content BLOB NOT NULL,  -- sha256 of what is compressed: the key of its memories
    checksum INTEGER NOT NULL,  -- of all of the above
    vector BLOB NOT NULL,  -- float32, little-endian
    vector_checksum INTEGER NOT NULL
)""",
    "CREATE INDEX passages_by_content ON passages (content)",
    """CREATE TABLE memories (
    content BLOB NOT NULL,
    fingerprint TEXT NOT NULL,
    form TEXT NOT NULL,  -- how the latents are stored
    n INTEGER NOT NULL,
    d INTEGER NOT NULL,
    latents BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (content, fingerprint)
)""",
    "CREATE INDEX memories_by_fingerprint ON memories (fingerprint, form)",
    """CREATE TRIGGER memories_go_with_their_text AFTER DELETE ON passages BEGIN
    DELETE FROM memories
    WHERE content = old.content AND NOT EXISTS (SELECT 1 FROM passages WHERE content = old.content);
END""",
)

_PAGE = 1024  # rows of an earlier version that are read at once
_SHOWN = 20_000  # rows from which on a bar is shown


def content_key(content: str) -> bytes:
    """Under which the memories of a text are kept: its sha256, 32 bytes."""
    return hashlib.sha256(utf8(content)).digest()


def checksum(*values: Any) -> int:
    """CRC-32 over the values of a row and their types, whatever types a damaged file gives them."""
    crc = 0
    for value in values:
        data = value if isinstance(value, bytes) else utf8(str(value))
        # The type, too: one flipped bit makes a text of SQLite bytes of the same content.
        crc = zlib.crc32(data, zlib.crc32(f"{type(value).__name__} {len(data)}:".encode(), crc))
    return crc


def stamped(number: int) -> str:
    """A generation as it is stored: its number and a random stamp."""
    return f"{number}.{secrets.token_hex(8)}"


def set_meta(db: Database, key: str, value: str) -> None:
    """Keep a fact; within a transaction."""
    db.execute(
        "INSERT OR REPLACE INTO meta VALUES (CAST(? AS TEXT), CAST(? AS TEXT), ?)",
        *(utf8(key), utf8(value), checksum(key, value)),
    )


def insert_passage(db: Database, row: int, passage: Passage, metadata: str, vector: bytes) -> None:
    """Write a row with its checksums; within a transaction."""
    content = content_key(passage.content)
    texts = (passage.id, passage.title, passage.text, passage.source, metadata)
    db.execute(
        "INSERT INTO passages VALUES (?, CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), "
        "CAST(? AS TEXT), ?, ?, ?, ?)",
        *(row, *map(utf8, texts), content, checksum(row, *texts, content), vector, checksum(row, vector)),
    )


def insert_memory(
    db: Database, content: bytes, fingerprint: str, form: str, shape: tuple[int, int], latents: bytes
) -> None:
    """Write a memory with its checksum in the place of an earlier one; within a transaction."""
    db.execute(
        "INSERT OR REPLACE INTO memories VALUES (?, CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?, ?)",
        *(content, utf8(fingerprint), utf8(form), *shape, latents),
        checksum(content, fingerprint, form, *shape, latents),
    )


def _first_rows(db: Database) -> None:
    set_meta(db, "generation", stamped(0))


def _from_1(db: Database) -> None:
    """Version 1 kept memories by passage and had no checksums."""
    db.execute("DROP INDEX memories_by_fingerprint")
    db.execute("ALTER TABLE passages RENAME TO passages_1")
    db.execute("ALTER TABLE memories RENAME TO memories_1")
    db.execute("ALTER TABLE meta RENAME TO meta_1")
    for statement in _TABLES:
        db.execute(statement)
    for key, value in db.execute("SELECT key, value FROM meta_1").fetchall():
        set_meta(db, key, value)
    count, after = db.value("SELECT count(*) FROM passages_1"), 0
    with tqdm(desc=f"bringing {db.path.name} up to date", total=count, unit=" passages", disable=count < _SHOWN) as bar:
        while page := db.execute(
            "SELECT row, id, title, text, source, metadata, vector FROM passages_1 WHERE row > ? ORDER BY row LIMIT ?",
            *(after, _PAGE),
        ).fetchall():
            for row, id_, title, text, source, metadata, vector in page:
                passage = Passage(text, id_, title, source)
                insert_passage(db, row, passage, metadata, vector)
                content = content_key(passage.content)
                for fingerprint, n, d, latents in db.execute(
                    "SELECT fingerprint, n, d, latents FROM memories_1 WHERE passage = ?", row
                ).fetchall():
                    insert_memory(db, content, fingerprint, "float16", (n, d), latents)
            after = page[-1][0]
            bar.update(len(page))
    # The highest number that was ever given, so that none is given twice.
    last = db.value("SELECT seq FROM sqlite_sequence WHERE name = 'passages_1'")
    if last is not None:
        db.execute("DELETE FROM sqlite_sequence WHERE name = 'passages'")
        db.execute("INSERT INTO sqlite_sequence VALUES ('passages', ?)", last)
    for table in ("memories_1", "passages_1", "meta_1"):
        db.execute(f"DROP TABLE {table}")


SCHEMA = Schema(version=2, tables=_TABLES, first_rows=_first_rows, migrations={1: _from_1})


def require_intact(db: Database, what: str, stored: Any, *values: Any) -> None:
    """Compare a row with its checksum.

    Raises:
        StoreError: If they differ.
    """
    if stored != checksum(*values):
        raise StoreError(
            f"{db.path} is damaged: {what} is not as it was written; run vist-rag index --verify, then restore the "
            "file from a copy."
        )
