from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_compressor, tiny_generator
from vist_rag.compression import VistCompressor, VisualMemory
from vist_rag.errors import ConfigError
from vist_rag.evaluation import CONDITIONS, EvalQuestion, evaluate_conditions
from vist_rag.generation import Generation, MemorySegment, Prompt, TextSegment, VistGenerator
from vist_rag.types import Passage

ANSWERS = ("lake", "sea", "bridge", "curie", "river", "1867")
PASSAGES = [Passage(f"The answer is {a}. " + "a " * 3 * i, title="Title") for i, a in enumerate(ANSWERS)]
QUESTIONS = [
    EvalQuestion(str(i), f"question {i}", (answer,), (passage,))
    for i, (answer, passage) in enumerate(zip(ANSWERS, PASSAGES, strict=True))
]


@pytest.fixture(scope="module")
def compressor() -> VistCompressor:
    return tiny_compressor()


class Reader:
    """A generator that reads perfectly: it names the answer of the passage in its prompt. Keeps the prompts."""

    def __init__(self, compressor: VistCompressor) -> None:
        self._own = tiny_generator()
        self._known = compressor.encode([p.content for p in PASSAGES])
        self.prompts: list[Prompt] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def _read(self, prompt: Prompt) -> str:
        for segment in prompt.segments:
            if isinstance(segment, MemorySegment):
                return next(a for a, m in zip(ANSWERS, self._known, strict=True) if _same(segment.memory, m))
            found = [a for a, p in zip(ANSWERS, PASSAGES, strict=True) if p.text in segment.text]
            if found:
                return found[0]
        return "no idea"

    def generate(self, prompts: Sequence[Prompt], **_: Any) -> list[Generation]:
        self.prompts += prompts
        return [Generation(self._read(prompt), 10, 3) for prompt in prompts]


def _same(one: VisualMemory, other: VisualMemory) -> bool:
    return one.latents.shape == other.latents.shape and bool(torch.allclose(one.latents, other.latents, atol=1e-4))


def test_each_condition_shows_what_it_says(compressor: VistCompressor) -> None:
    reader = Reader(compressor)
    result = evaluate_conditions(compressor, reader, QUESTIONS, latents=(None, 2))  # type: ignore[arg-type]
    figures = result["figures"]
    assert list(figures) == ["memory", "memory@2", "raw", "closed_book", "shuffled_memory", "shuffled_memory@2"]
    assert {name: figure["em"] for name, figure in figures.items()} == {
        "memory": 1, "memory@2": 1, "raw": 1, "closed_book": 0, "shuffled_memory": 0, "shuffled_memory@2": 0,
    }  # fmt: skip
    assert all(figure["questions"] == 6 for figure in figures.values())
    rows = {(row["condition"], row["id"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6 * 6
    for i, answer in enumerate(ANSWERS):  # although prompts are answered in another order, by length
        assert rows["memory", str(i)]["prediction"] == rows["raw", str(i)]["prediction"] == answer
        assert rows["closed_book", str(i)]["prediction"] == "no idea"
        shuffled = rows["shuffled_memory", str(i)]["prediction"]
        assert shuffled in ANSWERS
        assert shuffled != answer
        assert rows["memory", str(i)]["answers"] == [answer]


def test_tokens_are_counted_for_each_condition(compressor: VistCompressor) -> None:
    reader = Reader(compressor)
    result = evaluate_conditions(compressor, reader, QUESTIONS, latents=(None, 2))  # type: ignore[arg-type]
    rows = {(row["condition"], row["id"]): row for row in result["rows"]}
    frame = reader.count_tokens("Document: ") + 2
    for i, passage in enumerate(PASSAGES):
        raw = reader.count_tokens(f"Document (Title: Title): {passage.text}\n")
        assert {rows[name, str(i)]["origin_tokens"] for name in ("memory", "raw", "closed_book")} == {raw}
        assert rows["raw", str(i)]["compressed_tokens"] == raw
        assert rows["closed_book", str(i)]["compressed_tokens"] == 0
        assert rows["memory", str(i)]["compressed_tokens"] == frame + compressor.count_latents(passage.content)
        assert rows["memory@2", str(i)]["compressed_tokens"] == frame + 2
    figures = result["figures"]["memory"]
    total = [sum(rows["memory", str(i)][name] for i in range(6)) for name in ("origin_tokens", "compressed_tokens")]
    assert figures["ratio"] == round(total[0] / total[1], 3)
    assert figures["origin_tokens"] == round(total[0] / 6, 1)
    assert result["figures"]["closed_book"]["ratio"] is None


def test_shuffled_memory_is_never_that_of_a_passage_that_is_asked_about(compressor: VistCompressor) -> None:
    """Two questions a passage, as in the demo corpus: whatever the shift, some would meet their own passage."""
    for count in (2, 3, 5, 6):
        some = [
            EvalQuestion(f"{i}-{j}", "question", (ANSWERS[i],), (PASSAGES[i],)) for j in range(2) for i in range(count)
        ]
        result = evaluate_conditions(compressor, Reader(compressor), some, conditions=["shuffled_memory"])  # type: ignore[arg-type]
        assert result["figures"]["shuffled_memory"]["em"] == 0


def test_tokens_of_shuffled_memory_are_those_that_are_shown(compressor: VistCompressor) -> None:
    one = EvalQuestion("one", "question", ("lake",), (PASSAGES[0],))
    two = EvalQuestion("two", "question", ("sea",), (PASSAGES[1], PASSAGES[2]))
    reader = Reader(compressor)
    result = evaluate_conditions(compressor, reader, [one, two], conditions=["shuffled_memory"], latents=(3,))  # type: ignore[arg-type]
    frame = reader.count_tokens("Document: ") + 2
    assert [row["compressed_tokens"] for row in result["rows"]] == [2 * (frame + 3), frame + 3]


def test_a_real_generator_answers() -> None:
    generator = tiny_generator()
    result = evaluate_conditions(
        tiny_compressor(), generator, QUESTIONS[:2], conditions=["memory", "raw"], latents=(4,), max_new_tokens=2
    )
    assert list(result["figures"]) == ["memory@4", "raw"]
    assert isinstance(generator, VistGenerator)
    assert len(result["rows"]) == 4


def test_what_cannot_be_measured_is_refused(compressor: VistCompressor) -> None:
    reader: Any = Reader(compressor)
    with pytest.raises(ConfigError, match=f"conditions must be among {', '.join(CONDITIONS)}, got guess"):
        evaluate_conditions(compressor, reader, QUESTIONS, conditions=["memory", "guess"])
    with pytest.raises(ConfigError, match="questions must hold at least one"):
        evaluate_conditions(compressor, reader, [])
    with pytest.raises(ConfigError, match="shuffled_memory must have questions about different passages"):
        evaluate_conditions(compressor, reader, QUESTIONS[:1], conditions=["shuffled_memory"])
    assert evaluate_conditions(compressor, reader, QUESTIONS[:1], conditions=["memory"])["figures"]["memory"]["em"] == 1
    assert reader.prompts
    assert isinstance(reader.prompts[0].segments[0], TextSegment)
