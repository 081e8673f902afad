"""Scores of continuations against one full forward pass over prompt and continuation, without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.causal import FAMILIES, causal_generator
from vist_rag.compression import VisualMemory
from vist_rag.config import FusionConfig
from vist_rag.errors import ConfigError, IncompatibleMemoryError, InputError
from vist_rag.generation import MemorySegment, Prompt, SoftPromptFusion, TextSegment, VistGenerator
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM

MEMORY = VisualMemory(torch.randn(5, 16, generator=torch.Generator().manual_seed(4)), "abc")
PROMPTS = {
    "text": Prompt((TextSegment("the old bridge was built in 1867 question when answer"),)),
    "memory": Prompt((TextSegment("document "), MemorySegment(MEMORY), TextSegment("question where answer"))),
    "coarse": Prompt((TextSegment("document "), MemorySegment(MEMORY.coarsen(2)), TextSegment("question where"))),
}
LENGTHS = (3, 1, 7, 1, 2, 5)


@pytest.fixture(params=FAMILIES, scope="module")
def generator(request: pytest.FixtureRequest) -> VistGenerator:
    return causal_generator(request.param, seed=1)


@pytest.fixture(params=PROMPTS)
def prompt(request: pytest.FixtureRequest) -> Prompt:
    return PROMPTS[request.param]


def words_of(generator: VistGenerator) -> int:
    return len(generator.model.get_input_embeddings().weight)


def continuations(generator: VistGenerator, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(0, words_of(generator), (length,), generator=draw) for length in lengths]


@torch.no_grad()
def from_one_pass(generator: VistGenerator, prompt: Prompt, ids: Tensor) -> Tensor:
    """Log-probabilities of a continuation, from the logits of the positions before each of its tokens."""
    with generator.fusion.condition(generator, [prompt]) as inputs:
        before = inputs["inputs_embeds"].shape[1]
        embeds = torch.cat((inputs["inputs_embeds"], generator.model.get_input_embeddings()(ids[None])), dim=1)
        arguments: dict[str, Any] = {"attention_mask": torch.ones(1, before + len(ids), dtype=torch.long)}
        if isinstance(generator.model, PrefixBertForCausalLM):  # the prompt is read in both directions
            arguments["prefix_mask"] = torch.arange(before + len(ids))[None] < before
            arguments["shown"] = nn.functional.pad(inputs["shown"], (0, 0, 0, len(ids)), value=-1)
        logits = generator.model(inputs_embeds=embeds, use_cache=False, **arguments).logits[0]
    return logits[before - 1 : -1].log_softmax(-1)[torch.arange(len(ids)), ids]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_those_of_a_full_forward_pass(generator: VistGenerator, prompt: Prompt, batch_size: int) -> None:
    asked = continuations(generator)
    scores = generator.score(prompt, asked, batch_size=batch_size)
    same(scores, [from_one_pass(generator, prompt, ids) for ids in asked])
    assert {(row.dtype, row.device.type, row.requires_grad) for row in scores} == {(torch.float32, "cpu", False)}
    assert all((row <= 0).all() for row in scores)


def test_a_continuation_may_repeat_words_and_hold_those_of_the_prompt(generator: VistGenerator, prompt: Prompt) -> None:
    """What a copying model scores otherwise: words that it could copy, and words that it has written."""
    told = generator.tokenize("bridge was built in 1867")
    asked = [told, told[:1].repeat(4), torch.cat((told, told))]
    same(generator.score(prompt, asked), [from_one_pass(generator, prompt, ids) for ids in asked])


def test_one_token_continuations_are_all_there_is(generator: VistGenerator, prompt: Prompt) -> None:
    asked = [torch.tensor([word]) for word in range(words_of(generator))]
    scores = torch.cat(generator.score(prompt, asked))
    assert float(scores.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(scores[5]) == pytest.approx(float(from_one_pass(generator, prompt, asked[5])), abs=1e-4)


def test_continuations_of_a_token_share_its_probability(generator: VistGenerator) -> None:
    """p(a) = sum over b of p(a, b)."""
    asked = [torch.tensor([6, word]) for word in range(words_of(generator))]
    pairs = torch.stack(generator.score(PROMPTS["memory"], asked)).sum(1)
    alone = generator.score(PROMPTS["memory"], [torch.tensor([6])])[0]
    assert float(pairs.exp().sum()) == pytest.approx(float(alone.exp()), rel=1e-3)


def test_a_score_does_not_depend_on_its_neighbours(generator: VistGenerator) -> None:
    asked = continuations(generator)
    forward = generator.score(PROMPTS["memory"], asked, batch_size=4)
    backward = generator.score(PROMPTS["memory"], asked[::-1], batch_size=3)
    same(forward, backward[::-1])
    same(forward, [generator.score(PROMPTS["memory"], [ids])[0] for ids in asked])


def test_what_is_generated_greedily_is_the_likeliest_next_token() -> None:
    generator = causal_generator("prefix_bert", seed=1)
    for prompt in PROMPTS.values():
        with generator.fusion.condition(generator, [prompt]) as inputs:
            written = generator.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
        for step in range(4):
            rivals = [torch.cat((written[:step], torch.tensor([word]))) for word in range(words_of(generator))]
            totals = torch.stack([row.sum() for row in generator.score(prompt, rivals)])
            assert int(totals.argmax()) == int(written[step])


def test_memory_is_read(generator: VistGenerator) -> None:
    other = Prompt(
        (TextSegment("document "), MemorySegment(VisualMemory(-MEMORY.latents, "abc")), TextSegment("question where"))
    )
    asked = continuations(generator)
    one, two = (torch.cat(generator.score(prompt, asked)) for prompt in (PROMPTS["memory"], other))
    assert (one - two).abs().max() > 1e-2


def test_the_prompt_is_read_once(generator: VistGenerator) -> None:
    read: list[tuple[int, int]] = []

    def note(_: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        given = arguments["inputs_embeds"] if "inputs_embeds" in arguments else arguments["input_ids"]
        read.append((given.shape[0], given.shape[1]))

    handle = generator.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generator.score(PROMPTS["memory"], continuations(generator), batch_size=4)
    finally:
        handle.remove()
    assert read == [(1, generator.prompt_length(PROMPTS["memory"])), (4, 7), (2, 5)]


def test_nothing_to_score_is_no_scores(generator: VistGenerator) -> None:
    assert generator.score(PROMPTS["text"], []) == []


def test_what_cannot_be_scored_is_refused(generator: VistGenerator) -> None:
    prompt, empty = PROMPTS["text"], torch.tensor([], dtype=torch.long)
    with pytest.raises(InputError, match="continuations must have one token or more each"):
        generator.score(prompt, [torch.tensor([5]), empty])
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        generator.score(prompt, [torch.tensor([5])], batch_size=0)
    if not generator.frame[0]:  # else there is always something before
        with pytest.raises(InputError, match="prompt must hold something"):
            generator.score(Prompt(()), [torch.tensor([5])])
    bound = SoftPromptFusion(FusionConfig(16, 32, 8, fingerprint="0123456789abcdef"))
    with pytest.raises(IncompatibleMemoryError, match="got abc"):
        VistGenerator(generator.model, generator.tokenizer, bound).score(PROMPTS["memory"], [torch.tensor([5])])


def test_prompt_and_continuation_must_fit_the_context(generator: VistGenerator) -> None:
    limit = generator.context_tokens
    assert limit is not None
    prompt = Prompt((MemorySegment(VisualMemory(torch.ones(limit - 60, 16), "abc")), TextSegment("the")))
    room = limit - generator.prompt_length(prompt)
    fits, longer = continuations(generator, (room, room + 1))
    assert torch.isfinite(generator.score(prompt, [fits])[0]).all()
    with pytest.raises(InputError, match=rf"must fit {limit} positions .* got {limit - room} \+ {room + 1};"):
        generator.score(prompt, [torch.tensor([5]), longer])
