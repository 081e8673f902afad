"""Every method keeps its budget, and hands over what it says it does."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from tests.support.evaluation import PASSAGES, asked, tiny_model
from vist_rag.errors import ConfigError, MissingDependencyError
from vist_rag.evaluation.methods import METHODS, Asked, EvalModel, budget_of, cut, make_method, share
from vist_rag.generation import MemorySegment, TextSegment
from vist_rag.types import Passage

LOCAL = [name for name in METHODS if name != "llmlingua2"]


@pytest.fixture(scope="module")
def model() -> EvalModel:
    return tiny_model()


def text_of(prompt) -> str:
    return "".join(s.text for s in prompt.segments if isinstance(s, TextSegment))


def memories_of(prompt) -> list:
    return [s.memory for s in prompt.segments if isinstance(s, MemorySegment)]


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("budget", [12, 20, 31, 64, 1000])
@pytest.mark.parametrize("count", [1, 2])
def test_no_method_takes_more_than_its_budget(model: EvalModel, name: str, budget: int, count: int) -> None:
    questions = asked(passages=count)
    method = make_method(name, model, {}, {})
    method.prepare(questions)
    for one in questions:
        prompt = method.prompt(one.passages, one.question, budget)
        assert model.passage_tokens(prompt, one.question) <= budget
        assert text_of(prompt).endswith(f"Question: {one.question}\nAnswer:")


@pytest.mark.parametrize("name", LOCAL)
def test_below_any_budget_there_is_still_something_to_read(model: EvalModel, name: str) -> None:
    method = make_method(name, model, {}, {})
    method.prepare(asked())
    prompt = method.prompt(PASSAGES[:1], "was it?", 1)
    least = {"closed_book": 0}.get(name, 1)
    assert model.passage_tokens(prompt, "was it?") >= least


def test_raw_reads_whole_passages_with_the_best_next_to_the_question(model: EvalModel) -> None:
    method = make_method("raw", model, {}, {})
    both = sum(map(model.raw_tokens, PASSAGES[:2]))
    first, second = map(model.template.raw_text, PASSAGES[:2])
    assert text_of(method.prompt(PASSAGES[:3], "q", both)).startswith(second + first + "Question")
    assert text_of(method.prompt(PASSAGES[:3], "q", both - 1)).startswith(first + "Question")


def test_truncated_begins_the_next_passage(model: EvalModel) -> None:
    method = make_method("truncated", model, {}, {})
    budget = model.raw_tokens(PASSAGES[0]) + model.raw_tokens(PASSAGES[1]) - 5
    text = text_of(method.prompt(PASSAGES[:2], "q", budget))
    assert model.template.raw_text(PASSAGES[0]) in text
    assert "Document (Title: Marie): Marie was born by the lake" in text
    assert PASSAGES[1].text not in text


def test_a_title_that_takes_the_whole_budget_is_left_out(model: EvalModel) -> None:
    long = Passage("the bridge was built in 1867", title="the old lake " * 30)
    short = cut(model, long, 20)
    assert long.text.startswith(short.text)
    assert short.text
    assert model.raw_tokens(short) <= 20


def test_cut_keeps_the_beginning_and_fits(model: EvalModel) -> None:
    short = cut(model, PASSAGES[0], 20)
    assert PASSAGES[0].text.startswith(short.text)
    assert 0 < len(short.text) < len(PASSAGES[0].text)
    assert model.raw_tokens(short) <= 20


def test_frequency_deletion_drops_the_most_frequent_words_first(model: EvalModel) -> None:
    method = make_method("frequency", model, {}, {})
    questions = asked(4, 1)
    method.prepare(questions)
    full = model.raw_tokens(PASSAGES[0])
    kept = text_of(method.prompt(PASSAGES[:1], "q", full - 3)).split("Bridge): ")[1].split("\nQuestion")[0].split()
    gone = list(PASSAGES[0].text.split())
    for word in kept:
        gone.remove(word)  # in the passage, each as often as it was kept
    assert gone
    assert {word.lower() for word in gone} <= {"the", "to", "was", "built"}
    order = [PASSAGES[0].text.split().index(word) for word in kept if PASSAGES[0].text.split().count(word) == 1]
    assert order == sorted(order)


def test_memory_shares_latents_by_length_and_leaves_the_worst_out() -> None:
    # raw 100 and 50 tokens, budget 60 with 4 to frame each: 40 - 4 and 20 - 4
    assert share([100, 50], [99, 99], 60, 4) == [36, 16]
    # the second has 10 latents only, so the first takes what is left: 60 - 8 - 10
    assert share([100, 50], [99, 10], 60, 4) == [42, 10]
    # 9 positions hold one memory of 5 latents, not two of none
    assert share([100, 50], [99, 99], 9, 4) == [5]
    assert share([100, 50], [99, 99], 2, 4) == [1]
    assert share([100, 50], [7, 8], 1000, 4) == [7, 8]


def test_memory_of_a_small_budget_is_all_of_it_at_fewer_positions(model: EvalModel) -> None:
    method = make_method("memory", model, {}, {})
    method.prepare(asked())
    (memory,) = memories_of(method.prompt(PASSAGES[:1], "q", 4 + model.memory_frame))
    whole = model.memories[PASSAGES[0].content]
    assert len(memory) == 4 < len(whole)
    assert torch.equal(memory.latents, whole.latents)
    assert memory.latents.dtype == torch.float16


def test_slow_fast_reads_the_best_passage_raw_and_the_others_as_memory(model: EvalModel) -> None:
    method = make_method("slow_fast", model, {}, {})
    questions = asked(passages=3)
    method.prepare(questions)
    best = model.raw_tokens(PASSAGES[0])
    prompt = method.prompt(PASSAGES[:3], "q", best + 30)
    assert model.template.raw_text(PASSAGES[0]) in text_of(prompt)
    assert len(memories_of(prompt)) == 2
    tight = method.prompt(PASSAGES[:3], "q", best - 1)
    assert PASSAGES[0].text not in text_of(tight)
    assert memories_of(tight)


def test_slow_fast_reads_as_many_raw_as_it_is_told_and_as_fit(model: EvalModel) -> None:
    method = make_method("slow_fast", model, {}, {"raw": 2})
    method.prepare(asked(passages=4))
    raw = [model.raw_tokens(passage) for passage in PASSAGES]
    prompt = method.prompt(PASSAGES[:4], "q", sum(raw[:2]) + 30)
    assert all(passage.text in text_of(prompt) for passage in PASSAGES[:2])
    assert len(memories_of(prompt)) == 2
    fewer = method.prompt(PASSAGES[:4], "q", sum(raw[:2]) - 1)
    assert PASSAGES[0].text in text_of(fewer)
    assert PASSAGES[1].text not in text_of(fewer)
    assert not memories_of(method.prompt(PASSAGES[:1], "q", 10_000))
    with pytest.raises(ConfigError, match="raw of slow_fast must be 1 or more, got 0"):
        make_method("slow_fast", model, {}, {"raw": 0})


def test_joined_memory_is_one_of_all_passages_with_the_best_last(model: EvalModel) -> None:
    method = make_method("joined_memory", model, {}, {})
    questions = asked(passages=2)
    method.prepare(questions)
    one = questions[0]
    (memory,) = memories_of(method.prompt(one.passages, one.question, 10_000))
    best, next_best = one.passages
    (expected,) = model.compressor.encode([f"{next_best.content} | {best.content}"])
    torch.testing.assert_close(memory.latents, expected.latents.half())
    (coarser,) = memories_of(method.prompt(one.passages, one.question, model.memory_frame + 3))
    assert len(coarser) == 3


def test_shuffled_memory_is_that_of_another_question(model: EvalModel) -> None:
    questions = asked(passages=1)
    method = make_method("shuffled_memory", model, {}, {})
    method.prepare(questions)
    for one in questions:
        (memory,) = memories_of(method.prompt(one.passages, one.question, 1000))
        owners = [content for content, m in model.memories.items() if torch.equal(m.latents, memory.latents)]
        assert owners
        assert one.passages[0].content not in owners


def test_shuffling_one_passage_is_refused(model: EvalModel) -> None:
    one = asked(1)[0]
    with pytest.raises(ConfigError, match="different passages"):
        make_method("shuffled_memory", model, {}, {}).prepare([one, one])


@pytest.mark.parametrize("budget", [8, 30])
def test_blank_memory_is_as_large_and_says_the_same_of_every_passage(model: EvalModel, budget: int) -> None:
    questions = asked(passages=1)
    memory, blank = (make_method(name, model, {}, {}) for name in ("memory", "blank_memory"))
    for method in (memory, blank):
        method.prepare(questions)
    sizes, rows = [], []
    for one in questions:
        (real,), (empty,) = (memories_of(m.prompt(one.passages, one.question, budget)) for m in (memory, blank))
        sizes += [(len(real), len(empty)), (len(real.latents), len(empty.latents))]
        rows.append(empty.latents[0])
        assert (empty.latents == empty.latents[0]).all()
    assert all(a == b for a, b in sizes)
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_a_trained_baseline_reads_its_own_memories(model: EvalModel) -> None:
    other = tiny_model(seed=3)
    method = make_method("mean_pool", model, {"mean_pool": other}, {})
    method.prepare(asked())
    (memory,) = memories_of(method.prompt(PASSAGES[:1], "q", 100))
    assert memory.fingerprint == other.compressor.fingerprint != model.compressor.fingerprint
    with pytest.raises(ConfigError, match="mean_pool must have a checkpoint"):
        make_method("mean_pool", model, {}, {})
    with pytest.raises(ConfigError, match="method must be one of closed_book"):
        make_method("telepathy", model, {}, {})


def test_a_budget_is_the_raw_tokens_over_the_rate_and_never_more_than_fits() -> None:
    assert budget_of(2.3, None, 100, 1000) == 43
    assert budget_of(1.0, None, 100, 60) == 60
    assert budget_of(None, 25, 100, 1000) == 25
    assert budget_of(None, None, 100, 1000) == 100
    assert budget_of(9.0, None, 3, 1000) == 1


def test_llmlingua_without_its_package_names_the_extra(model: EvalModel, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(MissingDependencyError, match=r"vist-rag\[llmlingua\]"):
        make_method("llmlingua2", model, {}, {})


def test_llmlingua_is_asked_for_its_share_and_held_to_the_budget(model: EvalModel, monkeypatch) -> None:
    calls: list[tuple[list[str], float]] = []

    class PromptCompressor:
        def __init__(self, name: str, *, use_llmlingua2: bool, device_map: str) -> None:
            assert use_llmlingua2
            assert device_map == "cpu"

        def compress_prompt_llmlingua2(self, context: list[str], rate: float) -> dict[str, str]:
            calls.append((context, rate))
            return {"compressed_prompt": " ".join(context[0].split()[::2])}  # half, whatever was asked for

    package = ModuleType("llmlingua")
    package.PromptCompressor = PromptCompressor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmlingua", package)
    method = make_method("llmlingua2", model, {}, {})
    prompt = method.prompt(PASSAGES[:2], "q", 20)
    assert [context for context, _ in calls] == [[p.text] for p in PASSAGES[:2]]
    assert all(0 < rate < 1 for _, rate in calls)
    assert model.passage_tokens(prompt, "q") <= 20


def test_passages_of_one_id_and_different_texts_have_memories_of_their_own(model: EvalModel) -> None:
    method = make_method("memory", model, {})
    found = []
    for text in ("the old bridge", "marie was born by the lake and the sea"):
        passage = Passage(text, "same id")
        method.prepare([Asked("q", "q", (passage,))])
        found.append(memories_of(method.prompt([passage], "q", 1000))[0])
    alone = model.compressor.encode(["marie was born by the lake and the sea"])[0]
    assert torch.equal(found[1].latents, alone.latents.half())
    assert len(found[0]) != len(found[1])
