"""Which way a reader reads what memory would not keep whole: off, on, strict; with a limit and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiny import save_tiny_checkpoint, tiny_compressor, tiny_generator
from tests.unit.test_fidelity import fidelity
from tests.unit.test_pipeline import WordEmbedder
from vist_rag import Budget, Passage, PassageIndex, Said, SearchHit, VistRAG, VistReader
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.fidelity import FIDELITY_FILE

PLAIN = Passage("The river runs from the lake to the sea.", id="plain")
HARD = Passage("The part AX-4493-QT7 of the old bridge was built in 1867.", id="hard")
HITS = [SearchHit(PLAIN, 0.9, 0), SearchHit(HARD, 0.8, 1)]
REASON = "identifier: `AX-4493-QT7` is misread in 82 % of cases; 1 of 11 words at risk"


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    compressor = tiny_compressor()
    return SimpleNamespace(
        compressor=compressor, generator=tiny_generator(), fidelity=fidelity(fingerprint=compressor.fingerprint)
    )


def reader(parts: SimpleNamespace, guard: Any = "on", **settings: Any) -> VistReader:
    return VistReader(
        parts.compressor,
        parts.generator,
        **{"fidelity": parts.fidelity, "guard": guard, "max_new_tokens": 6, **settings},
    )


def ways(reader: VistReader, budget: Budget) -> tuple[list[str], list[str], dict[str, str]]:
    plan = reader.plan(HITS, budget)
    raw, memory = ([hit.passage.id for hit in hits] for hits in (plan.raw, plan.compressed))
    return raw, memory, {one.hit.passage.id: one.reason for one in plan.guarded}


@pytest.mark.parametrize("guard", ["on", "strict"])
def test_what_memory_would_misread_is_read_as_text(parts: SimpleNamespace, guard: str) -> None:
    assert ways(reader(parts, guard), Budget(k_memory=2)) == (["hard"], ["plain"], {"hard": REASON})


def test_a_guard_that_is_off_or_knows_nothing_changes_nothing(parts: SimpleNamespace) -> None:
    for one in (reader(parts, "off"), reader(parts, fidelity=None)):
        assert ways(one, Budget(k_memory=2)) == ([], ["plain", "hard"], {})


def test_where_text_does_not_fit_memory_is_read_unless_the_guard_is_strict(parts: SimpleNamespace) -> None:
    off = reader(parts, "off")
    least = sum(off.memory_tokens(hit.passage, None) for hit in HITS)
    assert off.raw_tokens(HARD) > least  # tiny models write each letter
    budget = Budget(k_memory=2, tokens=least)
    assert ways(reader(parts, "on"), budget) == ([], ["plain", "hard"], {"hard": REASON})
    assert ways(reader(parts, "strict"), budget) == ([], ["plain"], {"hard": REASON})


def test_text_that_the_guard_asks_for_does_not_overflow_the_context(parts: SimpleNamespace) -> None:
    hits = [SearchHit(Passage(f"Part AX-4493-QT{i} of the bridge.{' The river runs.' * 30}"), 1.0, i) for i in range(4)]
    guarded, budget = reader(parts), Budget(k_memory=4, latents=8)
    assert sum(guarded.raw_tokens(hit.passage) for hit in hits) > parts.generator.context_tokens
    plan = guarded.plan(hits, budget)
    assert len(plan.raw) + len(plan.compressed) == 4
    assert plan.compressed
    assert plan.limit is None  # nobody asked for one
    taken = sum(guarded.raw_tokens(hit.passage) for hit in plan.raw)
    taken += sum(guarded.memory_tokens(h.passage, n) for h, n in zip(plan.compressed, plan.latents, strict=True))
    assert taken < parts.generator.context_tokens


def test_marks_tell_the_reason_in_the_order_of_the_hits(parts: SimpleNamespace) -> None:
    hits = [SearchHit(HARD, 0.9, 0), SearchHit(PLAIN, 0.8, 1), SearchHit(Passage("Key BX-1111-QT8."), 0.7, 2)]
    marked = reader(parts).mark(hits)
    assert [one.hit.rank for one in marked] == [0, 1, 2]
    assert [bool(one.ref) for one in marked] == [False, True, False]
    assert [bool(one.reason) for one in marked] == [True, False, True]
    assert marked[0].reason == REASON


def test_a_span_that_a_strict_guard_objects_to_is_read_as_text(parts: SimpleNamespace) -> None:
    off = reader(parts, "off")
    (mark,) = off.mark([SearchHit(HARD, 0.9, 0)])
    asked = [Said("user", off.write(HARD, mark.ref) + " question when answer")]
    told, refused, plain = (reader(parts, mode).reply(asked) for mode in ("on", "strict", "off"))
    assert told.usage.guarded == {mark.ref: REASON}
    assert told.usage.compressed_tokens == plain.usage.compressed_tokens > 0
    assert plain.usage.guarded == {}
    assert refused.usage.compressed_tokens == 0
    assert refused.usage.prompt_tokens > plain.usage.prompt_tokens


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PassageIndex]:
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index:
        index.add([PLAIN, HARD])
        yield index


def test_an_answer_tells_what_was_guarded(parts: SimpleNamespace, index: PassageIndex) -> None:
    settings: dict[str, Any] = {"fidelity": parts.fidelity, "max_new_tokens": 6}
    rag = VistRAG(index, parts.compressor, parts.generator, **settings)
    answer = rag.answer("When was the old bridge built?", budget=Budget(k_memory=2))
    assert {c.passage.id: c.mode for c in answer.citations} == {"hard": "raw", "plain": "memory"}
    assert answer.usage.guarded == {"hard": REASON}
    stream = rag.stream("When was the old bridge built?", budget=Budget(k_memory=2))
    list(stream)
    assert stream.answer is not None
    assert stream.answer.usage == answer.usage


def test_a_checkpoint_brings_its_measure(tmp_path: Path, parts: SimpleNamespace) -> None:
    directory = save_tiny_checkpoint(tmp_path / "model")
    fingerprint = VistReader.from_pretrained(directory).compressor.fingerprint
    assert VistReader.from_pretrained(directory).fidelity is None
    with pytest.raises(ConfigError, match=r"guard must be on or off .* vist-rag probe"):
        VistReader.from_pretrained(directory, guard="strict")
    fidelity(fingerprint=fingerprint).save(directory / "compressor")
    budget = Budget(k_memory=2)
    assert ways(VistReader.from_pretrained(directory), budget)[0] == ["hard"]
    assert ways(VistReader.from_pretrained(directory, guard="off"), budget)[0] == []
    fidelity(fingerprint="0" * 64).save(directory / "compressor")
    with pytest.raises(CheckpointError, match=f"must be of compressor {fingerprint[:12]}, got 000000000000"):
        VistReader.from_pretrained(directory)
    assert VistReader.from_pretrained(directory, guard="off").fidelity is None
    save_tiny_checkpoint(directory)  # other weights, perhaps
    assert not (directory / "compressor" / FIDELITY_FILE).exists()


def test_a_guard_that_nobody_knows_and_a_measure_of_another_compressor_are_refused(parts: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"guard must be one of off, on, strict, got 'maybe'"):
        reader(parts, "maybe")
    with pytest.raises(CheckpointError, match=r"fidelity must be of compressor"):
        reader(parts, fidelity=fidelity())
