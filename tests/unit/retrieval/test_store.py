"""The store: what went in comes out, what was acknowledged stays, what is not ours is refused."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vist_rag.errors import ConfigError, InputError, StoreError
from vist_rag.retrieval.store import SCHEMA_VERSION, Entry, PassageStore
from vist_rag.types import Passage

VECTOR = np.arange(4, dtype=np.float32)
ODD_TEXTS = [
    "",
    "nul \0 inside",
    "lone \ud800 surrogate \udfff",
    "עברית 漢字 😀",
    "x" * 1_000_000,
    "'; DROP TABLE passages",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "passages.sqlite"


@pytest.fixture
def store(path: Path) -> PassageStore:
    return PassageStore(path, timeout_s=0.1)


def add(store: PassageStore, *passages: Passage, memory: Any = None) -> int:
    return store.add([Entry(p, VECTOR, memory) for p in passages], "fp")


def memory(value: float, n: int = 2, d: int = 3) -> np.ndarray[Any, Any]:
    return np.full((n, d), value, np.float32)


# ---------------------------------------------------------------------------------------------------------- passages


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_comes_back_as_it_went_in(path: Path, text: str) -> None:
    passage = Passage(
        text, f"id{text[:20]}", text[:9], text[-9:], {"key": text[:9], "list": [1, None, 0.5, {"a": True}]}
    )
    with PassageStore(path) as store:
        add(store, passage)
    with PassageStore(path) as store:
        assert store.get([passage.id]) == {passage.id: passage}
        assert list(store.passages()) == [passage]


def test_adding_a_passage_again_is_adding_it_once(store: PassageStore) -> None:
    a, b = Passage("a"), Passage("b")
    assert add(store, a, b, a) == 2
    before = store.rows().tolist(), store.generation
    assert add(store, a) == 0
    assert (store.rows().tolist(), store.generation) == before
    assert len(store) == 2


def test_a_changed_text_is_a_new_row_without_the_old_memories(store: PassageStore) -> None:
    add(store, Passage("old", "id"), Passage("other", "id2"), memory=memory(1))
    assert add(store, Passage("new", "id")) == 1
    assert store.get(["id"])["id"].text == "new"
    assert store.rows().tolist() == [2, 3]
    assert list(store.memories(["old", "new", "other"], "fp")) == ["other"]


def test_a_changed_title_counts_as_changed_text_since_both_are_compressed(store: PassageStore) -> None:
    add(store, Passage("text", "id", "title"), memory=memory(1))
    assert list(store.memories(["title: text"], "fp")) == ["title: text"]
    assert add(store, Passage("text", "id", "another")) == 1
    assert store.memories(["title: text", "another: text"], "fp") == {}


def test_changed_source_and_metadata_keep_row_and_memories(store: PassageStore) -> None:
    add(store, Passage("text", "id"), memory=memory(1))
    generation = store.generation
    moved = Passage("text", "id", "", "elsewhere", {"k": 1})
    assert store.add([Entry(moved, None)]) == 0
    assert store.get(["id"])["id"] == moved
    assert list(store.memories(["text"], "fp")) == ["text"]
    assert store.generation == generation
    assert store.problems() == []


def test_without_a_vector_nothing_is_added(store: PassageStore) -> None:
    assert store.add([Entry(Passage("text"), None)]) == 0
    assert len(store) == 0


def test_delete_takes_the_memories_along_and_never_reuses_a_row(path: Path, store: PassageStore) -> None:
    add(store, Passage("a", "a"), Passage("b", "b"), memory=memory(1))
    assert store.delete(["b", "unknown"]) == 1
    assert store.fingerprints() == {"fp": 1}
    add(store, Passage("c", "c"))
    assert store.rows().tolist() == [1, 3]
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT count(*) FROM memories").fetchone() == (1,)


@pytest.mark.parametrize("metadata", [{"k": object()}, {"k": float("nan")}, {"k": {1, 2}}])
def test_metadata_that_is_not_json_is_refused_and_the_whole_call_undone(store: PassageStore, metadata: Any) -> None:
    with pytest.raises(InputError, match="metadata of passage 'bad' is not JSON"):
        add(store, Passage("good"), Passage("bad", "bad", metadata=metadata))
    assert len(store) == 0


def test_vectors_come_in_pages_in_row_order(store: PassageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vist_rag.retrieval.store._PAGE", 4)
    store.add([Entry(Passage(str(i)), np.full(3, i, np.float32)) for i in range(10)])
    store.delete([Passage("5").id])
    pages = list(store.vectors(after=2))
    assert [rows.tolist() for rows, _ in pages] == [[3, 4, 5, 7], [8, 9, 10]]
    assert np.concatenate([v for _, v in pages])[:, 0].tolist() == [2, 3, 4, 6, 7, 8, 9]
    assert [p.text for p in store.passages()] == list("012346789")


# ---------------------------------------------------------------------------------------------------------- memories


def test_memories_are_float16_by_fingerprint(store: PassageStore) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    assert store.put_memories({"a": values}, "one") == 1
    store.put_memories({"a": memory(1)}, "two")
    store.put_memories({"a": memory(2)}, "two")
    found = store.memories(["a", "b", "gone"], "one")
    assert list(found) == ["a"]
    assert found["a"].dtype == np.float16
    assert np.array_equal(found["a"], values.astype(np.float16))
    assert store.memories(["a"], "two")["a"][0, 0] == 2
    assert store.fingerprints() == {"one": 1, "two": 1}
    found["a"][:] = 0  # a copy of the caller's own


def test_memories_are_kept_as_raw_little_endian_bytes(path: Path, store: PassageStore) -> None:
    add(store, Passage("a", "a"), memory=np.array([[1.0, -2.0]]))
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT * FROM memories").fetchone()[:-1] == (
            hashlib.sha256(b"a").digest(),
            "fp",
            "float16",
            1,
            2,
            b"\x00\x3c\x00\xc0",
        )


def test_memories_of_texts_that_no_passage_has_are_kept_unless_they_should_not(store: PassageStore) -> None:
    add(store, Passage("new", "id"))
    assert store.put_memories({"old": memory(1), "new": memory(2)}, "fp", only_stored=True) == 1
    assert list(store.memories(["old", "new"], "fp")) == ["new"]
    assert store.put_memories({"old": memory(1)}, "fp") == 1
    assert store.delete(["id"]) == 1
    assert list(store.memories(["old", "new"], "fp")) == ["old"]


def test_passages_of_one_text_share_its_memory_until_the_last_is_gone(store: PassageStore) -> None:
    add(store, Passage("same", "a"), Passage("same", "b"), memory=memory(1))
    assert store.fingerprints() == {"fp": 1}
    store.delete(["a"])
    assert list(store.memories(["same"], "fp")) == ["same"]
    add(store, Passage("another", "b"))
    assert store.memories(["same"], "fp") == {}


def test_memories_are_deleted_by_text_by_compressor_or_by_both(store: PassageStore) -> None:
    for fingerprint in ("one", "two"):
        store.put_memories({text: memory(1) for text in "abc"}, fingerprint)
    assert store.delete_memories(["a", "unknown"], fingerprint="one") == 1
    assert store.delete_memories(["b"]) == 2
    assert store.fingerprints() == {"one": 1, "two": 2}
    assert store.delete_memories(fingerprint="two") == 2
    assert store.fingerprints() == {"one": 1}
    with pytest.raises(ConfigError, match="texts or fingerprint must be given"):
        store.delete_memories()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(3, np.float32), r"must be a float array \[n, d\], got float32 \[3\]"),
        (np.zeros((0, 3), np.float32), r"got float32 \[0, 3\]"),
        (np.zeros((2, 3), np.int64), r"got int64 \[2, 3\]"),
        (np.full((2, 3), np.nan), r"must be finite in float16 \(65504 at most\)"),
        (np.full((2, 3), 1e6, np.float32), r"must be finite in float16 \(65504 at most\)"),
    ],
)
def test_a_memory_that_cannot_be_kept_is_refused(store: PassageStore, bad: Any, message: str) -> None:
    add(store, Passage("a", "a"))
    with pytest.raises(InputError, match=f"The memory of 'a' cannot be kept: .*{message}"):
        store.put_memories({"a": bad}, "fp")


def test_passages_lacking_a_memory(store: PassageStore) -> None:
    add(store, *(Passage(t, t) for t in "abc"))
    store.put_memories({"b": memory(1)}, "one")
    assert [p.id for p in store.passages(lacking="one")] == ["a", "c"]
    assert [p.id for p in store.passages(lacking="two")] == ["a", "b", "c"]


# -------------------------------------------------------------------------------------------------------- generations


def test_the_generation_grows_with_every_write_that_changes_rows(store: PassageStore) -> None:
    seen = [store.generation]
    for write in (
        lambda: add(store, Passage("a", "a")),
        lambda: add(store, Passage("changed", "a")),
        lambda: store.delete(["a"]),
    ):
        write()
        seen.append(store.generation)
    assert [g.number for g in seen] == [0, 1, 2, 3]
    assert len({g.stamp for g in seen}) == 4
    store.put_memories({"a": memory(1)}, "fp")
    store.delete(["a"])
    assert store.generation == seen[-1]


def test_copies_that_went_separate_ways_have_generations_of_their_own(path: Path, store: PassageStore) -> None:
    store.close()
    copy = path.with_name("copy.sqlite")
    copy.write_bytes(path.read_bytes())
    with PassageStore(path) as one, PassageStore(copy) as two:
        add(one, Passage("a"))
        add(two, Passage("b"))
        assert one.generation.number == two.generation.number
        assert one.generation != two.generation


# ------------------------------------------------------------------------------------------------------- transactions


def test_a_transaction_that_raises_leaves_nothing(store: PassageStore) -> None:
    def interrupted() -> None:
        with store.transaction():
            add(store, Passage("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(store) == 0
    assert add(store, Passage("b")) == 1


def test_a_snapshot_stands_still_while_another_writes(path: Path, store: PassageStore) -> None:
    with PassageStore(path) as other:
        with store.snapshot():
            assert len(store) == 0
            add(other, Passage("a"))
            assert len(store) == 0
        assert len(store) == 1


def test_threads_share_a_store(store: PassageStore) -> None:
    threads = [
        threading.Thread(target=lambda t=t: [add(store, Passage(f"{t} {i}")) for i in range(20)]) for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) == 80
    assert store.generation.number == 80


# ------------------------------------------------------------------------------------------------------------ opening


def test_durability_settings(path: Path, store: PassageStore) -> None:
    with store.transaction():
        values = [
            store._db.value(f"PRAGMA {p}") for p in ("journal_mode", "synchronous", "trusted_schema", "user_version")
        ]
    assert values == ["wal", 2, 0, SCHEMA_VERSION]


def test_a_locked_store_says_so_and_keeps_what_it_has(path: Path, store: PassageStore) -> None:
    add(store, Passage("a"))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"passages\.sqlite is locked by another process; wait"):
            add(store, Passage("b"))
        assert [p.text for p in store.passages()] == ["a"]  # reading goes on
        other.execute("ROLLBACK")
    assert add(store, Passage("b")) == 1


def raw_file(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as raw:
        for statement in statements:
            raw.execute(statement)
        raw.commit()


@pytest.mark.parametrize("read_only", [False, True])
def test_files_that_are_not_ours_are_refused_and_left_alone(path: Path, read_only: bool) -> None:
    raw_file(path, "CREATE TABLE recipes (name)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is a SQLite file of another program; choose another directory"):
        PassageStore(path, read_only=read_only)
    path.with_name("noise").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="is not a SQLite file, or its header is damaged"):
        PassageStore(path.with_name("noise"), read_only=read_only)
    assert path.read_bytes() == before


def test_a_newer_schema_is_refused(path: Path, store: PassageStore) -> None:
    store.close()
    raw_file(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match=rf"schema version {SCHEMA_VERSION + 1}, this vist-rag reads {SCHEMA_VERSION}"):
        PassageStore(path)


def test_a_damaged_store_says_so(path: Path, store: PassageStore) -> None:
    add(store, *(Passage(f"{i} " + "long text " * 200) for i in range(50)))
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xaa" * (len(data) - 4096)  # everything but the first page
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"passages\.sqlite is damaged; restore it from a copy"):
        list(PassageStore(path).passages())


def test_a_torn_memory_says_so(path: Path, store: PassageStore) -> None:
    add(store, Passage("a", "a"), memory=memory(1))
    raw_file(path, "UPDATE memories SET latents = x'00'")
    with pytest.raises(StoreError, match="the memory of 'a' is not as it was written"):
        store.memories(["a"], "fp")


def test_a_torn_vector_says_so(path: Path, store: PassageStore) -> None:
    add(store, Passage("a", "a"), Passage("b", "b"))
    raw_file(path, "UPDATE passages SET vector = x'00000000' WHERE id = 'a'")
    with pytest.raises(StoreError, match="the vector of row 1 is not as it was written"):
        list(store.vectors())


def test_an_empty_file_is_a_new_store_unless_read_only(path: Path) -> None:
    path.touch()  # what a kill at the first moment leaves
    with pytest.raises(StoreError, match="is empty; index something into it first"):
        PassageStore(path, read_only=True)
    assert len(PassageStore(path)) == 0


def test_a_missing_store_or_directory(path: Path) -> None:
    with pytest.raises(StoreError, match=r"passages\.sqlite does not exist; check the directory"):
        PassageStore(path, read_only=True)
    assert not path.exists()
    with pytest.raises(StoreError, match=r"cannot be opened; check that its directory exists"):
        PassageStore(path.parent / "no" / "where.sqlite")


def test_read_only_reads_and_refuses_to_write(path: Path, store: PassageStore) -> None:
    add(store, Passage("a", "a"))
    with PassageStore(path, read_only=True) as reader:
        assert list(reader.get(["a"])) == ["a"]
        for write in (lambda: add(reader, Passage("b")), lambda: reader.delete(["a"])):
            with pytest.raises(StoreError, match="is open read-only; open it for writing"):
                write()
        add(store, Passage("b", "b"))
        assert list(reader.get(["b"])) == ["b"]  # what the writer has added since


def test_a_directory_without_write_permission(
    path: Path, store: PassageStore, read_only_directory: Callable[[Path], AbstractContextManager[None]]
) -> None:
    add(store, Passage("a", "a"))
    with read_only_directory(path.parent), PassageStore(path, read_only=True) as reader:  # the writer still has it open
        assert list(reader.get(["a"])) == ["a"]
    store.close()
    with read_only_directory(path.parent), PassageStore(path, read_only=True) as reader:
        assert list(reader.get(["a"])) == ["a"]
        assert sorted(p.name for p in path.parent.iterdir()) == ["passages.sqlite"]


def test_writes_that_cannot_be_read_in_a_directory_without_permission_are_not_passed_over(
    tmp_path: Path, store: PassageStore, read_only_directory: Callable[[Path], AbstractContextManager[None]]
) -> None:
    add(store, Passage("a", "a"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("passages.sqlite", "passages.sqlite-wal"):  # as a kill leaves them, without the shared memory
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    with read_only_directory(copy), pytest.raises(StoreError, match="open it once where the directory is writable"):
        PassageStore(copy / "passages.sqlite", read_only=True)
    with PassageStore(copy / "passages.sqlite") as recovered:
        assert list(recovered.get(["a"])) == ["a"]


def test_a_closed_store_says_so(store: PassageStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="has been closed; open it again"):
        store.get(["a"])
