"""What becomes of files of earlier versions, of other programs, and of damaged ones."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vist_rag.errors import StoreError, VistError
from vist_rag.retrieval import schema
from vist_rag.retrieval.index import PassageIndex
from vist_rag.retrieval.store import SCHEMA_VERSION, Entry, PassageStore
from vist_rag.types import Passage

VERSION_1 = """
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
INSERT INTO meta VALUES ('generation', '7.abcdef'), ('embedder', 'hashing-64'), ('dimension', '64'),
    ('index_factory', 'Flat');
PRAGMA journal_mode = WAL;
PRAGMA application_id = 0x56495354;
PRAGMA user_version = 1;
"""
"""A file as version 1 made it, word for word."""

PASSAGES = [
    Passage("The sea is wide.", "a", "Sea", "sea.txt", {"page": 1}),
    Passage("nul \0 and \ud800 inside", "b"),
    Passage("The sea is wide.", "c", "Sea", "copy.txt"),
]


def memory(value: float) -> np.ndarray[Any, Any]:
    return np.full((2, 3), value, np.float16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "passages.sqlite"


def write_version_1(path: Path, embedder: Any) -> None:
    vectors = embedder.encode([p.content for p in PASSAGES])
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(VERSION_1)
        for p, vector in zip(PASSAGES, vectors, strict=True):
            texts = [t.encode("utf-8", "surrogatepass") for t in (p.id, p.title, p.text, p.source)]
            metadata = b'{"page": 1}' if p.metadata else b"{}"
            raw.execute(
                "INSERT INTO passages (id, title, text, source, metadata, vector) VALUES (CAST(? AS TEXT), "
                "CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), ?)",
                (*texts, metadata, vector.astype("<f4").tobytes()),
            )
        raw.execute("INSERT INTO passages VALUES (9, 'gone', '', 'gone', '', '{}', x'')")
        raw.execute("DELETE FROM passages WHERE row = 9")  # so the next number is 10
        for row, fingerprint, value in ((1, "one", 1), (1, "two", 2), (2, "one", 3)):
            raw.execute(
                "INSERT INTO memories VALUES (?, ?, 2, 3, ?)", (row, fingerprint, memory(value).astype("<f2").tobytes())
            )
        raw.commit()


def test_a_store_of_version_1_is_brought_up_to_date(path: Path, embedder: Any) -> None:
    write_version_1(path, embedder)
    with PassageStore(path) as store:
        assert list(store.passages()) == PASSAGES
        assert store.rows().tolist() == [1, 2, 3]
        assert store.meta() == {"embedder": "hashing-64", "dimension": "64", "index_factory": "Flat"}
        assert store.generation == (7, "abcdef")
        vectors = np.concatenate([v for _, v in store.vectors()])
        assert np.array_equal(vectors, embedder.encode([p.content for p in PASSAGES]))
        assert store.fingerprints() == {"one": 2, "two": 1}
        (same, odd), one = (
            (PASSAGES[0].content, PASSAGES[1].content),
            store.memories([p.content for p in PASSAGES], "one"),
        )
        assert {text: m[0, 0] for text, m in one.items()} == {same: 1, odd: 3}
        assert store.memories([same], "two")[same].tolist() == memory(2).tolist()
        assert store.problems() == []
        store.add([Entry(Passage("new", "n"), np.zeros(64, np.float32))])
        assert store.rows().tolist() == [1, 2, 3, 10]  # a number is never given twice
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        names = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert names == {"meta", "passages", "memories", "sqlite_sequence"}
    with PassageIndex.open(path.parent, embedder=embedder) as index:
        assert index.search("sea wide", 1)[0].passage.id in ("a", "c")


def test_a_store_of_version_1_is_not_touched_read_only(path: Path, embedder: Any) -> None:
    write_version_1(path, embedder)
    with pytest.raises(StoreError, match=r"schema version 1, this vist-rag reads 2; open it once for writing"):
        PassageStore(path, read_only=True)
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_migration_that_is_interrupted_leaves_the_store_as_it_was(
    path: Path, embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version_1(path, embedder)
    inserted: list[int] = []

    def interrupted(db: Any, row: int, *rest: Any) -> None:
        inserted.append(row)
        if row == 2:
            raise KeyboardInterrupt
        original(db, row, *rest)

    original = schema.insert_passage
    monkeypatch.setattr(schema, "insert_passage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PassageStore(path)
    assert inserted == [1, 2]
    monkeypatch.undo()
    with PassageStore(path) as store:
        assert list(store.passages()) == PASSAGES


def test_two_processes_that_open_an_old_store_bring_it_up_to_date_once(path: Path, embedder: Any) -> None:
    write_version_1(path, embedder)
    with PassageStore(path) as one, PassageStore(path) as two:
        assert list(one.passages()) == list(two.passages()) == PASSAGES


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE mine (x)",
        "DROP INDEX passages_by_content",
        "DROP TRIGGER memories_go_with_their_text",
        "ALTER TABLE passages ADD COLUMN mine TEXT",
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_whose_tables_were_changed_is_refused(path: Path, change: str, read_only: bool) -> None:
    PassageStore(path).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(change)
        raw.commit()
    with pytest.raises(StoreError, match="has other tables than a store of version 2"):
        PassageStore(path, read_only=read_only)


# ------------------------------------------------------------------------------------------------------------- damage

CHANGES: list[tuple[str, Callable[[PassageStore], Any]]] = [
    ("UPDATE passages SET text = 'The sea is wild.' WHERE row = 1", lambda store: store.get(["a"])),
    ("UPDATE passages SET text = CAST(text AS BLOB) WHERE row = 1", lambda store: store.get(["a"])),
    ("UPDATE passages SET source = 'x' WHERE row = 1", lambda store: list(store.passages())),
    ("UPDATE passages SET metadata = '{}' WHERE row = 1", lambda store: store.get_rows([1])),
    ("UPDATE passages SET id = 'z' WHERE row = 1", lambda store: store.get(["z"])),
    ("UPDATE passages SET row = 7 WHERE row = 1", lambda store: store.get_rows([7])),
    ("UPDATE passages SET row = 7 WHERE row = 1", lambda store: list(store.vectors())),
    ("UPDATE passages SET vector = zeroblob(256) WHERE row = 1", lambda store: list(store.vectors())),
    ("UPDATE passages SET vector = zeroblob(256) WHERE row = 1", lambda store: store.vectors_of(["a"])),
    ("UPDATE passages SET vector = 'text' WHERE row = 1", lambda store: list(store.vectors())),
    ("UPDATE memories SET latents = zeroblob(12)", lambda store: store.memories(["Sea: The sea is wide."], "fp")),
    ("UPDATE memories SET n = 3, d = 2", lambda store: store.memories(["Sea: The sea is wide."], "fp")),
    ("UPDATE memories SET form = 'other'", lambda store: store.memories(["Sea: The sea is wide."], "fp")),
    ("UPDATE meta SET value = '3.x' WHERE key = 'generation'", lambda store: store.generation),
    ("UPDATE meta SET value = 'other' WHERE key = 'embedder'", lambda store: store.meta()),
    ("DELETE FROM passages WHERE row = 2", lambda store: store.get_rows([2])),
]


@pytest.mark.parametrize(("change", "read"), CHANGES)
def test_a_value_that_was_changed_behind_our_back_is_never_read(
    path: Path, change: str, read: Callable[[PassageStore], Any]
) -> None:
    with PassageStore(path) as store:
        store.set_meta("embedder", "mine")
        store.add([Entry(p, np.ones(64, np.float32), memory(1)) for p in PASSAGES], "fp")
        assert store.problems() == []
        if "row = 7" not in change:  # which is not there yet
            read(store)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("DROP TRIGGER memories_go_with_their_text")
        raw.execute(change)
        raw.execute(schema.SCHEMA.tables[-1])
        raw.commit()
    with PassageStore(path) as store, pytest.raises(StoreError, match="is damaged"):
        read(store)


def test_whatever_byte_is_flipped_nothing_wrong_is_read(path: Path) -> None:
    stored = [Passage(f"Passage {i} " + "with words " * 30, str(i), f"T{i}", metadata={"i": i}) for i in range(40)]
    vectors = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    with PassageStore(path) as store:
        store.add([Entry(p, v, memory(i)) for i, (p, v) in enumerate(zip(stored, vectors, strict=True))], "fp")
    whole = path.read_bytes()
    expected = {p.id: p for p in stored}
    rng, refused = np.random.default_rng(1), 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        for leftover in path.parent.glob("passages.sqlite-*"):
            leftover.unlink()
        try:
            with PassageStore(path, read_only=True) as store:
                found = store.get(expected)
                assert found.items() <= expected.items()
                memories = store.memories([p.content for p in stored], "fp")
                assert all(memories[p.content][0, 0] == i for i, p in enumerate(stored) if p.content in memories)
                for rows, some in store.vectors():
                    assert np.array_equal(some, vectors[rows - 1])
                if len(found) < 40 or len(memories) < 40:
                    assert store.problems()
        except VistError:
            refused += 1
    assert refused > 100  # the rest changed what nobody reads: free space, old pages


def test_a_disk_that_is_full_says_so_and_keeps_what_is_there(path: Path) -> None:
    with PassageStore(path) as store:
        store.add([Entry(PASSAGES[0], np.ones(4, np.float32))])
        pages = store._db.value("PRAGMA page_count")
        store._db.execute(f"PRAGMA max_page_count = {pages + 2}").fetchall()
        with pytest.raises(StoreError, match="cannot grow, the disk is full; free some space and repeat"):
            store.add([Entry(Passage("x" * 100_000, "big"), np.ones(4, np.float32))])
        assert list(store.passages()) == PASSAGES[:1]
        store._db.execute("PRAGMA max_page_count = 1000000").fetchall()
        assert store.add([Entry(Passage("x" * 100_000, "big"), np.ones(4, np.float32))]) == 1


def test_the_key_of_a_text_is_its_sha256() -> None:
    assert schema.content_key("Zoë") == hashlib.sha256("Zoë".encode()).digest()
