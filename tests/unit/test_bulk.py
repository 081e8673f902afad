"""Parts of a corpus: where they are cut, how they are known, and what becomes of torn ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cli import WordEmbedder
from tests.support.tiny import save_tiny_checkpoint, tiny_compressor
from vist_rag.bulk import Part, Parts, Recipe, _Worker, cut, make_with_ray, require_ray
from vist_rag.errors import CheckpointError, ConfigError, InputError, MissingDependencyError, StoreError
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage

pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra ray")

PASSAGES = [
    Passage(f"The old bridge number {i} was built.", title=f"Bridge {i}", source=f"b.txt:{i}", metadata={"n": i})
    for i in range(200)
]
RECIPE = Recipe(WordEmbedder.name)


def made(directory: Path, passages: list[Passage], compressor: Any = None) -> tuple[Parts, list[Part]]:
    recipe = Recipe(WordEmbedder.name, None, compressor.fingerprint if compressor else "")
    parts = Parts(directory, recipe, 16)
    plan = parts.plan(passages)
    for part in plan:
        parts.make(part.key, WordEmbedder(), compressor)
    return parts, plan


def states(plan: list[Part]) -> set[str]:
    return {part.state for part in plan}


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_cut_loses_nothing_and_keeps_its_limits(size: int) -> None:
    parts = list(cut(PASSAGES, size))
    assert [passage for part in parts for passage in part] == PASSAGES
    assert all(max(1, size // 2) <= len(part) <= 2 * size for part in parts[:-1])
    assert len(parts) >= len(PASSAGES) / (2 * size)


@pytest.mark.parametrize("where", [0, 3, 100])
def test_a_change_in_a_corpus_leaves_the_parts_elsewhere_as_they_were(where: int) -> None:
    before = {RECIPE.key(part) for part in cut(PASSAGES, 8)}
    changed = [*PASSAGES[:where], Passage("Something new."), *PASSAGES[where + 1 :]]
    after = {RECIPE.key(part) for part in cut(changed, 8)}
    assert 1 <= len(after - before) <= 3
    assert len(before) > 15


def test_a_key_is_of_everything_that_a_part_holds() -> None:
    keys = {RECIPE.key([PASSAGES[0]])}
    for field, value in {"id": "x", "title": "x", "text": "x", "source": "x", "metadata": {"n": "x"}}.items():
        fields = {name: getattr(PASSAGES[0], name) for name in ("id", "title", "text", "source", "metadata")}
        keys.add(RECIPE.key([Passage(**fields | {field: value})]))
    keys.add(Recipe("another/model").key([PASSAGES[0]]))
    keys.add(Recipe(WordEmbedder.name, None, "f").key([PASSAGES[0]]))
    assert len(keys) == 8
    assert Recipe(WordEmbedder.name, "elsewhere", "").key([PASSAGES[0]]) in keys  # weights count, not where they lie


def test_a_part_holds_what_the_models_make(tmp_path: Path) -> None:
    compressor = tiny_compressor()
    odd = Passage("No \ud800 character.", title="Odd", metadata={"also": "\udfff"})
    parts, plan = made(tmp_path / "out", [*PASSAGES[:20], odd], compressor)
    rows = [row for part in plan for row in pq.read_table(parts.path(part.key), partitioning=None).to_pylist()]
    assert [row["id"] for row in rows] == [p.id for p in [*PASSAGES[:20], odd]]
    assert rows[3] | {"vector": 0, "memory": 0} == {
        "id": PASSAGES[3].id,
        "title": "Bridge 3",
        "text": PASSAGES[3].text,
        "source": "b.txt:3",
        "metadata": '{"n": 3}',
        "vector": 0,
        "memory": 0,
        "n": rows[3]["n"],
        "d": 16,
        "fingerprint": compressor.fingerprint,
        "coverage": 1.0,
    }
    assert rows[20]["text"] == "No � character."
    (memory,) = compressor.encode([PASSAGES[3].content])
    stored = np.frombuffer(rows[3]["memory"], "<f2").reshape(rows[3]["n"], 16)
    np.testing.assert_allclose(stored, memory.latents.numpy(), atol=2e-3)
    np.testing.assert_allclose(rows[3]["vector"], WordEmbedder().encode([PASSAGES[3].content])[0], atol=1e-6)


def test_an_index_takes_texts_as_they_are_and_nothing_twice(tmp_path: Path) -> None:
    compressor = tiny_compressor()
    odd = Passage("No \ud800 character.")
    corpus = [*PASSAGES[:20], odd]
    parts, plan = made(tmp_path / "out", corpus, compressor)
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder(), memory_form="float16") as index:
        assert states(parts.plan(corpus, index)) == {"kept"}
        results = [parts.merge(part, some, index, keep=True) for part, some in parts.again(plan, corpus)]
        assert sum(added for added, _ in results) == 21
        assert list(index.passages()) == corpus
        assert index.fingerprints() == {compressor.fingerprint: 21}
        assert states(parts.plan(corpus, index)) == {"held"}
        generation, changes = index._store.generation, index._store._db._connection.total_changes
        for part, some in parts.again(plan, corpus):
            assert parts.merge(part, some, index, keep=False)[0] == 0
        assert (index._store.generation, index._store._db._connection.total_changes) == (generation, changes)
        assert not any(parts.path(part.key).exists() for part in plan)
        index.delete_memories([odd.content], fingerprint=compressor.fingerprint)
        again = parts.plan(corpus, index)
        assert [part.state for part in again] == ["held"] * (len(again) - 1) + ["missing"]


def test_a_part_without_memories(tmp_path: Path) -> None:
    parts, plan = made(tmp_path / "out", PASSAGES[:4])
    assert "memory" not in pq.read_schema(parts.path(plan[0].key)).names
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index:
        (one,) = parts.again(plan, PASSAGES[:4])
        assert parts.merge(*one, index, keep=True) == (4, {})
        assert index.fingerprints() == {}


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another part", "gone"])
def test_what_is_not_whole_is_made_again(tmp_path: Path, damage: str) -> None:
    parts, plan = made(tmp_path / "out", PASSAGES[:60])
    assert states(parts.plan(PASSAGES[:60])) == {"kept"}
    path = parts.path(plan[1].key)
    data = {
        "truncated": path.read_bytes()[:-9],
        "empty": b"",
        "of another part": parts.path(plan[0].key).read_bytes(),
        "gone": None,
    }[damage]
    path.unlink() if data is None else path.write_bytes(data)
    again = parts.plan(PASSAGES[:60])
    assert [part.state for part in again[:2]] == ["kept", "missing"]
    parts.make(plan[1].key, WordEmbedder(), None)
    assert states(parts.plan(PASSAGES[:60])) == {"kept"}


def test_a_damaged_part_is_not_stored(tmp_path: Path) -> None:
    parts, plan = made(tmp_path / "out", PASSAGES[:8])
    path = parts.path(plan[0].key)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index:
        (one,) = parts.again(plan, PASSAGES[:8])
        with pytest.raises(StoreError, match="delete it, and repeat the command"):
            parts.merge(*one, index, keep=True)
        assert len(index) == 0


def test_a_corpus_that_changed_meanwhile_is_not_stored(tmp_path: Path) -> None:
    parts, plan = made(tmp_path / "out", PASSAGES[:60])
    for changed in (PASSAGES[:59], PASSAGES[:61], [*PASSAGES[:59], Passage("Something else.")], PASSAGES[1:60]):
        with pytest.raises(InputError, match="have changed since they were read"):
            list(parts.again(plan, changed))


def test_a_part_that_is_there_needs_no_models(tmp_path: Path) -> None:
    parts, plan = made(tmp_path / "out", PASSAGES[:8])
    parts.make(plan[0].key, None, None)  # type: ignore[arg-type]  # staged no more, but there
    other = Parts(tmp_path / "elsewhere", RECIPE)
    with pytest.raises(StoreError, match="must be one that all machines share"):
        other.make(plan[0].key, WordEmbedder(), None)
    make_with_ray(parts, parts.plan(PASSAGES[:8]))  # nothing is missing: Ray is not asked


def test_others_are_found_and_leftovers_removed(tmp_path: Path) -> None:
    parts, plan = made(tmp_path / "out", PASSAGES[:8])
    other, _ = made(tmp_path / "out", PASSAGES[8:16])
    assert parts.others(plan) == [p for p in other.directory.glob("part-*") if p != parts.path(plan[0].key)]
    (tmp_path / "out" / "part-x.parquet.1.tmp").write_bytes(b"torn")
    parts.plan(PASSAGES[16:24])
    parts.tidy()
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".parquet", ".parquet"]


def test_a_corpus_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from PASSAGES[:100]
        raise InputError("rows.jsonl:101 is broken")

    with pytest.raises(InputError, match="broken"):
        Parts(tmp_path / "index" / "parts", RECIPE, 16).plan(broken())
    assert list(tmp_path.iterdir()) == []
    made(tmp_path / "out", PASSAGES[:8])
    with pytest.raises(InputError, match="broken"):
        Parts(tmp_path / "out", RECIPE, 16).plan(broken())
    assert [p.suffix for p in (tmp_path / "out").iterdir()] == [".parquet"]  # what was made before stays


def test_every_machine_must_find_the_same_weights(tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    recipe = Recipe("nobody/nothing", str(checkpoint), "0" * 64)
    with pytest.raises(CheckpointError, match="must have the fingerprint 000000000000 on every machine"):
        recipe.load()
    parts = Parts(tmp_path / "out", recipe)
    (part,) = parts.plan(PASSAGES[:4])
    said = _Worker(parts.directory, recipe)({"key": np.array([part.key])})
    assert "on every machine" in said["error"][0]
    from vist_rag.checkpoint import load_compressor

    fingerprint = load_compressor(checkpoint).fingerprint
    embedder, compressor = Recipe("nobody/nothing", str(checkpoint), fingerprint).load()
    assert compressor is not None
    assert (embedder.name, compressor.fingerprint) == ("nobody/nothing", fingerprint)
    assert Recipe("nobody/nothing", str(checkpoint)).load()[1] is None


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vist-rag\[ray\]'"):
        require_ray()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vist-rag\[ray\]'"):
        Parts(tmp_path, RECIPE)


def test_numbers_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be 1 or more"):
        Parts(tmp_path, RECIPE, 0)
    with pytest.raises(ConfigError, match="workers must be 1 or more"):
        make_with_ray(Parts(tmp_path, RECIPE), [], workers=0)


def test_a_staged_row_holds_any_code_point(tmp_path: Path) -> None:
    parts = Parts(tmp_path, RECIPE)
    (part,) = parts.plan([Passage("\ud800 \x85 \u2028 a\r\nb", id="odd\u2029")])
    parts.make(part.key, WordEmbedder(), None)
    (row,) = pq.read_table(parts.path(part.key), partitioning=None).to_pylist()
    assert row["text"] == "� \x85 \u2028 a\r\nb"
    assert json.loads(row["metadata"]) == {}
