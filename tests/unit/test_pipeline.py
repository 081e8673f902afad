from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.tiny import save_tiny_checkpoint, tiny_compressor
from vist_rag.budget import POLICIES, Budget, Policy
from vist_rag.checkpoint import find_checkpoint
from vist_rag.errors import CheckpointError, ConfigError, IncompatibleMemoryError, InputError
from vist_rag.generation import Generation
from vist_rag.pipeline import VistRAG
from vist_rag.quoting import find_span
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage

PASSAGES = [
    Passage("The old bridge was built in 1867 by Marie Curie.", title="The bridge"),
    Passage("A river runs from the lake to the sea.", title="The river"),
    Passage("Marie Curie was born by the sea, and the sea was old.", title="Marie Curie"),
    Passage("Answer the question: the document is from 1867."),
    Passage("The lake and the sea and the river. " * 8, title="Waters"),
]
QUESTION = "who built the old bridge in 1867"


class WordEmbedder:
    """A bag of hashed words: texts that share words are near each other."""

    name = "words"
    dimension = 64

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                vector[zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors


class Wrapper:
    """Stands before a compressor or a generator, and passes on whatever it does not define."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def eval(self) -> Any:
        return self


class Counting(Wrapper):
    """A compressor that keeps what it is asked to encode."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], **options: Any) -> Any:
        self.texts += texts
        return self.wrapped.encode(texts, **options)


class Saying(Wrapper):
    """A generator that says one thing."""

    def __init__(self, wrapped: Any, text: str) -> None:
        super().__init__(wrapped)
        self.text = text

    def generate(self, prompts: Sequence[Any], **_: Any) -> list[Generation]:
        return [Generation(self.text, 1, 1) for _ in prompts]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def parts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> VistRAG:
    """Loaded once: its compressor and generator are used, not its index."""
    with PassageIndex.open(tmp_path_factory.mktemp("unused"), embedder=WordEmbedder()) as index:
        return VistRAG.from_pretrained(checkpoint, index, device="cpu")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PassageIndex]:
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index:
        index.add(PASSAGES)
        yield index


@pytest.fixture
def rag(parts: VistRAG, index: PassageIndex) -> VistRAG:
    return VistRAG(index, Counting(parts.compressor), parts.generator, budget=parts.budget, max_new_tokens=4)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- answering


def test_settings_come_from_the_checkpoint(parts: VistRAG) -> None:
    assert parts.budget == Budget(k_raw=0, k_memory=2, latents=16)
    assert parts.max_new_tokens == 6
    assert parts.generator.fusion.config.fingerprint == parts.compressor.fingerprint


@pytest.mark.parametrize(
    ("budget", "modes"),
    [
        (Budget(k_raw=0, k_memory=3), ["memory"] * 3),
        (Budget(k_raw=2, k_memory=0), ["raw"] * 2),
        (Budget(k_raw=1, k_memory=2, latents=3), ["raw", "memory", "memory"]),
    ],
)
def test_an_answer_says_what_it_read_and_what_it_cost(rag: VistRAG, budget: Budget, modes: list[str]) -> None:
    answer = rag.answer(QUESTION, budget=budget)
    hits = rag.index.search(QUESTION, len(modes))
    assert [c.mode for c in answer.citations] == modes
    assert [c.passage for c in answer.citations] == [h.passage for h in hits]
    assert [c.score for c in answer.citations] == [h.score for h in hits]
    assert answer.citations[0].passage == PASSAGES[0]
    count = rag.generator.count_tokens
    raw = [count(rag.template.raw_text(h.passage)) for h in hits]
    memory = [
        count("Document: ") + 2 + min(rag.compressor.count_latents(h.passage.content), budget.latents or 999)
        for h in hits
    ]
    usage = answer.usage
    assert usage.origin_tokens == sum(raw)
    assert usage.compressed_tokens == sum(r if m == "raw" else c for m, r, c in zip(modes, raw, memory, strict=True))
    asked = count(f"Question: {QUESTION}\nAnswer:") + len(rag.generator.frame[0])
    assert usage.prompt_tokens == usage.compressed_tokens + asked
    assert 1 <= usage.completion_tokens <= 4
    assert usage.ratio == usage.origin_tokens / usage.compressed_tokens
    assert usage.budget is None
    assert set(answer.timings_ms) == {"search", "memory", "generate", "total"}
    assert answer.timings_ms["total"] >= sum(answer.timings_ms[s] for s in ("search", "memory", "generate"))
    assert answer.question == QUESTION


def test_memory_and_raw_text_reach_the_generator_in_their_places(rag: VistRAG, parts: VistRAG) -> None:
    seen: list[Any] = []

    class Listening(Wrapper):
        def generate(self, prompts: Sequence[Any], **options: Any) -> Any:
            seen.extend(prompts)
            return self.wrapped.generate(prompts, **options)

    rag.generator = Listening(parts.generator)  # type: ignore[assignment]
    rag.answer(QUESTION, budget=Budget(k_raw=1, k_memory=2, latents=3))
    best, second, third = (h.passage for h in rag.index.search(QUESTION, 3))
    segments = seen[0].segments
    assert [type(s).__name__ for s in segments] == ["TextSegment", "MemorySegment"] * 2 + ["TextSegment"] * 2
    for place, passage in ((1, third), (3, second)):  # better passages stand nearer to the question
        expected = parts.compressor.encode([passage.content])[0].coarsen(3)
        np.testing.assert_allclose(segments[place].memory.latents, expected.latents, atol=2e-2)  # kept as float16
    assert segments[4].text == rag.template.raw_text(best)
    assert segments[5].text == f"Question: {QUESTION}\nAnswer:"


def test_a_coarser_memory_from_the_index_is_all_of_it_at_fewer_positions(rag: VistRAG) -> None:
    plan = rag.plan(rag.index.search(QUESTION, 1), Budget(k_raw=0, k_memory=1, latents=3))
    whole = rag.compressor.encode([plan.compressed[0].passage.content])[0]
    for _ in ("encoded now", "kept in the index"):
        memory = rag.memories([plan])[0][0]
        assert len(memory) == 3 < len(whole)
        assert memory.places.tolist() == whole.coarsen(3).places.tolist()
        np.testing.assert_allclose(memory.latents, whole.latents, atol=2e-2)


def test_a_batch_answers_as_one_by_one(rag: VistRAG) -> None:
    questions = [QUESTION, "where is the lake", "marie curie"]
    batch = rag.answer_batch(questions)
    for question, answer in zip(questions, batch, strict=True):
        alone = rag.answer(question)
        assert replace(answer, timings_ms={}) == replace(alone, timings_ms={})
    assert rag.answer_batch([]) == []


def test_a_stream_ends_with_the_same_answer(rag: VistRAG) -> None:
    for budget in (None, Budget(k_raw=1, k_memory=1)):
        whole = rag.answer(QUESTION, budget=budget)
        stream = rag.stream(QUESTION, budget=budget)
        assert stream.answer is None
        pieces = list(stream)
        assert "".join(pieces).strip().lower() == whole.text.lower()
        assert stream.answer is not None
        assert replace(stream.answer, timings_ms={}) == replace(whole, timings_ms={})
        assert set(stream.answer.timings_ms) == set(whole.timings_ms)


# ------------------------------------------------------------------------------------------------------------ budgets


def positions(rag: VistRAG, prompt_tokens: int) -> int:
    """What the passages took of a prompt."""
    return prompt_tokens - rag.generator.prompt_length(rag.template.build(QUESTION, [], []))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_budget_is_met_by_what_the_generator_reads(rag: VistRAG, policy: Policy) -> None:
    hits = rag.index.search(QUESTION, 5)
    everything = sum(rag.memory_tokens(hit.passage, None) for hit in hits)
    for tokens in (16, 25, 40, everything - 1, everything, 300):
        usage = rag.answer(QUESTION, budget=Budget(k_raw=2, k_memory=3, tokens=tokens, policy=policy)).usage
        assert usage.compressed_tokens == positions(rag, usage.prompt_tokens)
        assert usage.compressed_tokens == tokens or everything < usage.compressed_tokens < tokens
        assert usage.budget == tokens
    answer = rag.answer(QUESTION, budget=Budget(k_raw=2, k_memory=3, tokens=300, policy=policy))
    assert [c.mode for c in answer.citations] == ["raw", "raw", "memory", "memory", "memory"]


def test_a_rate_is_of_what_the_hits_take_as_text(rag: VistRAG) -> None:
    raw = sum(rag.raw_tokens(hit.passage) for hit in rag.index.search(QUESTION, 3))
    budget = Budget(k_memory=3, rate=0.25)
    stream = rag.stream(QUESTION, budget=budget)
    list(stream)
    assert stream.answer is not None
    for usage in (rag.answer(QUESTION, budget=budget).usage, stream.answer.usage):
        assert usage.budget == usage.compressed_tokens == raw // 4 == positions(rag, usage.prompt_tokens)


def test_more_passages_than_there_are_is_an_error(rag: VistRAG) -> None:
    with pytest.raises(ConfigError, match="6"):
        rag.answer(QUESTION, budget=Budget(k_raw=3, k_memory=3))
    with pytest.raises(ConfigError, match="6"):
        rag.stream(QUESTION, budget=Budget(k_raw=3, k_memory=3))


def test_a_question_that_cannot_be_asked_is_an_error(rag: VistRAG) -> None:
    for question in ("x" * 100_000, "why " * 25_000, "", "  \n"):
        with pytest.raises(InputError, match="question"):
            rag.answer(question)
        with pytest.raises(InputError, match="question"):
            rag.stream(question)
    with pytest.raises(InputError, match="must fit 512 positions"):
        rag.answer("why " * 600)
    with pytest.raises(InputError, match="must fit 512 positions"):
        list(rag.stream("why " * 600))


# ----------------------------------------------------------------------------------------------------------- memories


def test_a_memory_is_made_once_and_kept(rag: VistRAG, parts: VistRAG) -> None:
    budget = Budget(k_raw=1, k_memory=2)
    first = rag.answer(QUESTION, budget=budget)
    read = [c.passage.content for c in first.citations if c.mode == "memory"]
    assert sorted(rag.compressor.texts) == sorted(read)  # type: ignore[attr-defined]
    assert rag.index.fingerprints() == {parts.compressor.fingerprint: 2}
    second = rag.answer_batch([QUESTION, QUESTION], budget=budget)
    assert len(rag.compressor.texts) == 2  # type: ignore[attr-defined]
    assert {a.text for a in second} == {first.text}
    rag.answer(QUESTION, budget=Budget(k_memory=5, latents=1))
    assert sorted(rag.compressor.texts) == sorted(p.content for p in PASSAGES)  # type: ignore[attr-defined]


def test_a_kept_memory_is_what_is_read(rag: VistRAG, parts: VistRAG) -> None:
    budget = Budget(k_memory=1)
    best = rag.index.search(QUESTION, 1)[0].passage
    rag.index.put_memories({best.id: np.ones((3, 16), np.float16)}, parts.compressor.fingerprint)
    memory = rag.memories([rag.plan(rag.index.search(QUESTION, 1), budget)])[0][0]
    assert memory.latents.tolist() == [[1.0] * 16] * 3
    assert rag.compressor.texts == []  # type: ignore[attr-defined]


def test_a_memory_of_another_compressor_is_left_alone(rag: VistRAG, parts: VistRAG) -> None:
    strange = {p.id: np.full((3, 16), 7, np.float16) for p in PASSAGES}
    rag.index.put_memories(strange, "another compressor")
    budget = Budget(k_memory=2)
    memories = rag.memories([rag.plan(rag.index.search(QUESTION, 2), budget)])[0]
    assert all(memory.fingerprint == parts.compressor.fingerprint for memory in memories)
    assert all(float(memory.latents.max()) < 7 for memory in memories)
    assert rag.index.fingerprints() == {"another compressor": 5, parts.compressor.fingerprint: 2}
    rag.answer(QUESTION, budget=budget)
    assert len(rag.compressor.texts) == 2  # type: ignore[attr-defined]


def test_a_generator_trained_for_another_compressor_refuses(index: PassageIndex, parts: VistRAG) -> None:
    rag = VistRAG(index, tiny_compressor(seed=5), parts.generator, budget=Budget(k_memory=1))
    with pytest.raises(IncompatibleMemoryError, match=parts.compressor.fingerprint[:12]):
        rag.answer(QUESTION)
    assert rag.answer(QUESTION, budget=Budget(k_raw=1, k_memory=0)).citations  # raw text anybody can read


def test_a_read_only_index_is_answered_from(rag: VistRAG, tmp_path: Path) -> None:
    written = rag.answer(QUESTION)
    rag.index.close()
    other = tmp_path / "copy"
    with PassageIndex.open(other, embedder=WordEmbedder()) as index:
        index.add(PASSAGES)
    with PassageIndex.open(other, embedder=WordEmbedder(), read_only=True) as index:
        reader = VistRAG(index, rag.compressor, rag.generator, budget=rag.budget, max_new_tokens=4)
        assert replace(reader.answer(QUESTION), timings_ms={}) == replace(written, timings_ms={})
        assert index.fingerprints() == {}


def test_no_memory_is_kept_for_a_text_that_was_replaced_meanwhile(rag: VistRAG, parts: VistRAG) -> None:
    best = rag.index.search(QUESTION, 1)[0].passage
    newer = Passage("Something else altogether.", id=best.id)

    class Slow(Wrapper):
        def encode(self, texts: Sequence[str], **options: Any) -> Any:
            rag.index.add([newer])
            return self.wrapped.encode(texts, **options)

    rag.compressor = Slow(parts.compressor)  # type: ignore[assignment]
    assert rag.answer(QUESTION, budget=Budget(k_memory=1)).citations[0].passage == best
    assert rag.index.memories([best.id], parts.compressor.fingerprint) == {}


# ---------------------------------------------------------------------------------------------------------- citations


@pytest.mark.parametrize(
    ("answer", "text", "quote"),
    [
        ("marie curie", "By Marie CURIE, in 1867.", "Marie CURIE"),
        ("Marie Curie", "marie curie", "marie curie"),
        ("jose garcia", "It was José García!", "José García"),
        ("José", "the name jose", "jose"),
        ("jose", "Jose\u0301 came", "Jose\u0301"),  # an accent that stands by itself goes with its letter
        ("don t", "I don't know", "don't"),
        ("don't", "I don’t know", "don’t"),
        ("3. 5 million", "about 3.5 million people", "3.5 million"),
        ("u . s . a .", "in the U.S.A. today", "U.S.A"),
        ("new york", "New\n  York", "New\n  York"),
        ("straße", "Die Straße.", "Straße"),
        ("istanbul", "in İstanbul now", "İstanbul"),
        ("sea", "The sea, the SEA", "sea"),
        ("東京", "これは 東京 です", "東京"),
        ("art", "a party of artists", None),  # whole words only
        ("curie", "", None),
        ("...", "wait... what", None),
        ("", "anything", None),
        ("(a+b)*", "see (a+b)* there", "a+b"),
    ],
)
def test_an_answer_is_found_as_the_passage_writes_it(answer: str, text: str, quote: str | None) -> None:
    span = find_span(answer, text)
    assert (span and text[slice(*span)]) == quote


def test_citations_point_to_the_answer_in_the_original_text(rag: VistRAG) -> None:
    rag.generator = Saying(rag.generator, "marie curie")  # type: ignore[assignment]
    answer = rag.answer(QUESTION, budget=Budget(k_raw=1, k_memory=4))
    quotes = {c.passage.title: c.quote for c in answer.citations}
    assert quotes == {
        "The bridge": "Marie Curie", "The river": None, "Marie Curie": "Marie Curie", "": None, "Waters": None,
    }  # fmt: skip
    assert all(c.span is None or c.passage.text[slice(*c.span)] == c.quote for c in answer.citations)
    assert answer.text == "Marie Curie"  # the model has no capitals; the passage has
    rag.generator = Saying(rag.generator, "MARIE curie")  # type: ignore[assignment]
    assert rag.answer(QUESTION).text == "MARIE curie"
    rag.generator = Saying(rag.generator, "nobody knows")  # type: ignore[assignment]
    assert rag.answer(QUESTION).text == "nobody knows"


# -------------------------------------------------------------------------------------------------------- checkpoints


def unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def halve(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (unlink("vist.json"), "vist.json"),
        (write("vist.json", b'{"budget": '), "vist.json"),
        (write("vist.json", b"[]"), "vist.json"),
        (write("vist.json", b'{"budget": {"k_rau": 1}}'), "vist.json"),
        (write("vist.json", b'{"budget": {"k_raw": -1}}'), "vist.json"),
        (write("vist.json", b'{"template": 3}'), "vist.json"),
        (unlink("compressor/config.json"), "compressor"),
        (write("compressor/config.json", b'{"model_type": "bert"}'), "compressor"),
        (halve("compressor/model.safetensors"), "compressor"),
        (unlink("compressor/model.safetensors"), "compressor"),
        (halve("generator/model.safetensors"), "generator"),
        (lambda directory: shutil.rmtree(directory / "fusion"), "fusion"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, checkpoint: Path, index: PassageIndex, damage: Callable[[Path], object], named: str
) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(directory)
    with pytest.raises(CheckpointError, match=named):
        VistRAG.from_pretrained(directory, index, device="cpu")


def test_a_checkpoint_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"local directory or a hub id, got '.*nowhere'"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_without_settings_has_the_defaults(tmp_path: Path, checkpoint: Path, index: PassageIndex) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "plain")
    (directory / "vist.json").write_text(json.dumps({}))
    rag = VistRAG.from_pretrained(directory, index, device="cpu", budget=Budget(k_memory=1))
    assert rag.budget == Budget(k_memory=1)
    assert rag.max_new_tokens == 32
    assert VistRAG.from_pretrained(directory, index, device="cpu").budget == Budget()
