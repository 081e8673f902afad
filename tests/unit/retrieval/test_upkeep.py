"""What keeps a store well: sizes, verification, mending, compaction, the cache that follows."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from vist_rag.errors import ConfigError, StoreError
from vist_rag.retrieval.index import PassageIndex
from vist_rag.types import Passage

PASSAGES = [Passage(f"passage number {i} " + "of the storm " * 40, f"p{i}") for i in range(60)]


@pytest.fixture
def index(tmp_path: Path, embedder: Any) -> Iterator[PassageIndex]:
    with PassageIndex.open(tmp_path / "index", embedder=embedder) as index:
        index.add(PASSAGES, [np.full((4, 8), i, np.float32) for i in range(60)], fingerprint="fp")
        yield index


def change(index: PassageIndex, *statements: str) -> None:
    index.close()
    with closing(sqlite3.connect(index._store.path)) as raw:
        for statement in statements:
            raw.execute(statement)
        raw.commit()


def test_sizes_count_what_is_stored(index: PassageIndex) -> None:
    index.put_memories({"elsewhere": np.ones((2, 8), np.float32)}, "two")
    sizes = index.sizes()
    assert sizes.passages == 60
    assert sizes.vector_bytes == 60 * 64 * 4
    assert sizes.text_bytes == sum(len(p.id + p.text + "{}") for p in PASSAGES)
    assert sizes.memories == (("fp", "float16", 60, 240, 60 * 64), ("two", "float16", 1, 2, 32))
    path = index._store.path
    index.compact()
    assert index.sizes().file_bytes == path.stat().st_size


def test_compaction_gives_the_room_of_what_was_deleted_back(index: PassageIndex) -> None:
    before = index.sizes().file_bytes
    index.delete([p.id for p in PASSAGES[5:]])
    assert index.sizes().free_bytes > before / 2
    assert index.sizes().file_bytes == before
    index.compact()
    assert index.sizes().free_bytes == 0
    assert index.sizes().file_bytes < before / 2
    path = index._store.path
    assert path.with_name(path.name + "-wal").stat().st_size == 0
    assert [p.id for p in index.passages()] == [p.id for p in PASSAGES[:5]]
    assert index.memories([PASSAGES[4].content], "fp")[PASSAGES[4].content][0, 0] == 4
    assert index.problems() == []


def test_a_deletion_leaves_no_trace_once_compacted(index: PassageIndex) -> None:
    index.add([Passage("a secret word: xylophone", "secret")])
    index.delete(["secret"])
    index.compact()
    index.close()
    assert all(b"xylophone" not in file.read_bytes() for file in index._store.path.parent.iterdir())


def test_a_read_only_index_is_not_compacted(index: PassageIndex, embedder: Any) -> None:
    directory = index._store.path.parent
    with PassageIndex.open(directory, embedder=embedder, read_only=True) as reader:
        for write in (reader.compact, reader.rebuild, lambda: reader.delete_memories(fingerprint="fp")):
            with pytest.raises(StoreError, match="is open read-only"):
                write()
        assert reader.problems() == []


def test_a_sound_index_has_no_problems(index: PassageIndex) -> None:
    assert index.problems() == []
    index.delete(["p3"])
    index.add([Passage("another", "p4")])
    assert index.problems() == []


@pytest.mark.parametrize("factory", ["HNSW8", "IVF2,Flat"])
def test_other_factories_have_no_problems(index: PassageIndex, embedder: Any, factory: str) -> None:
    directory = index._store.path.parent
    index.close()
    with PassageIndex.open(directory, embedder=embedder, index_factory=factory) as other:
        assert other.problems() == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE passages SET text = 'x' WHERE row = 2", "passage row 2 is not as it was written"),
        ("UPDATE passages SET vector = zeroblob(256) WHERE row = 3", "the vector of row 3 is not as it was"),
        ("UPDATE memories SET n = 5 WHERE rowid = 1", "the memory .* is not as it was written"),
        ("UPDATE passages SET id = 'q' WHERE row = 2", "passage row 2 is not"),
    ],
)
def test_damage_is_found_and_named(index: PassageIndex, embedder: Any, damage: str, problem: str) -> None:
    directory = index._store.path.parent
    change(index, damage)
    with PassageIndex.open(directory, embedder=embedder, read_only=True) as damaged:
        (found,) = damaged.problems()
    assert re.search(problem, found)


def test_a_cache_with_other_vectors_than_the_store_is_found_and_made_anew(index: PassageIndex) -> None:
    index.search("storm", 1)
    flat = faiss.downcast_index(index._cache._index.index)  # type: ignore[union-attr]
    vectors = faiss.rev_swig_ptr(flat.get_xb(), 60 * 64)
    vectors[:] = vectors[::-1].copy()
    assert index.problems() == ["passages.faiss holds 60 vectors that are not the store's"]
    index.rebuild()
    assert index.problems() == []


def test_damaged_memories_go_and_are_made_again(index: PassageIndex, embedder: Any) -> None:
    directory = index._store.path.parent
    change(index, "UPDATE memories SET latents = randomblob(64) WHERE rowid IN (1, 2)")
    with PassageIndex.open(directory, embedder=embedder) as mended:
        with pytest.raises(StoreError, match="is damaged"):
            mended.memories([PASSAGES[0].content], "fp")
        assert mended.rebuild() == 2
        assert mended.problems() == []
        assert [p.id for p in mended.passages(lacking="fp")] == ["p0", "p1"]


def test_a_cache_that_counts_other_rows_than_the_store_says_so(
    index: PassageIndex, embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = index._store.path.parent
    index.close()
    (directory / "passages.faiss").unlink()
    monkeypatch.setattr("vist_rag.retrieval.store.PassageStore.__len__", lambda self: 61)
    with (
        pytest.warns(UserWarning, match="is missing"),
        pytest.raises(StoreError, match="is damaged: 61 passages are counted and others are found"),
    ):
        PassageIndex.open(directory, embedder=embedder)


def test_following_additions_does_not_look_at_all_rows(index: PassageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.search("storm", 1)
    looked: list[int] = []
    rows = index._store.rows
    monkeypatch.setattr(index._store, "rows", lambda: looked.append(1) or rows())
    index.add([Passage("a narwhal", "n")])
    assert index.search("narwhal", 1)[0].passage.id == "n"
    assert looked == []
    index.delete(["n"])
    assert "n" not in {hit.passage.id for hit in index.search("narwhal", 5)}
    assert looked == [1]


def test_the_form_of_memories_is_remembered_and_a_wrong_one_refused(index: PassageIndex, embedder: Any) -> None:
    assert index.memory_form is None
    index.put_memories({PASSAGES[8].content: np.zeros((4, 8), np.float32)}, "fp", form="int4")  # nobody has chosen
    assert {some.form: some.memories for some in index.sizes().memories} == {"float16": 59, "int4": 1}
    with pytest.raises(ConfigError, match="form of a memory must be one of float16, int8"):
        index.set_memory_form("float1")
    directory = index._store.path.parent
    index.set_memory_form("int8")
    index.close()
    with PassageIndex.open(directory, embedder=embedder) as again:
        assert again.memory_form == "int8"
        assert again.count_lacking("fp") == 60  # in the new form
        assert again.memories([PASSAGES[7].content], "fp")[PASSAGES[7].content][0, 0] == 7  # the old is still read
        again.put_memories({PASSAGES[7].content: np.full((4, 8), 7, np.float32)}, "fp", form="int4")
        assert again.count_lacking("fp") == 59
        assert {some.form: some.memories for some in again.sizes().memories} == {"float16": 58, "int4": 1, "int8": 1}
        assert again.memories([PASSAGES[7].content], "fp")[PASSAGES[7].content][0, 0] == pytest.approx(7, abs=0.05)
