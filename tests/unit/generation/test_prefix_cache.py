"""What is kept of how prompts begin never changes an answer, and is not read again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig

from tests.support.causal import causal_generator
from vist_rag.compression import VisualMemory
from vist_rag.errors import ConfigError, IncompatibleMemoryError
from vist_rag.generation import MemorySegment, Message, Prompt, TemplateSegment, TextSegment, VistGenerator
from vist_rag.generation.prefix_cache import PrefixCache, goes_on

CAUSAL = ("llama", "gpt2", "qwen3")
QUESTIONS = ("when was the old bridge built", "who", "the river runs from a lake to where answer")


def memory(seed: int, n: int = 9) -> VisualMemory:
    return VisualMemory(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), "abc")


def ask(question: str, *seeds: int, opening: str = "the river runs from a lake to the sea") -> Prompt:
    memories = [part for seed in seeds for part in (TextSegment("document "), MemorySegment(memory(seed)))]
    return Prompt((TextSegment(opening), *memories, TextSegment(question)))


@pytest.fixture(params=CAUSAL)
def generator(request: pytest.FixtureRequest) -> VistGenerator:
    return tried(causal_generator(request.param, seed=1))


def tried(generator: VistGenerator) -> VistGenerator:
    """Whose model was tried already, so that only prompts are counted."""
    generator.generate([Prompt((TextSegment("a"),))], max_new_tokens=1)
    return generator


def uncached(generator: VistGenerator) -> VistGenerator:
    """The same model, which keeps nothing."""
    return VistGenerator(generator.model, generator.tokenizer, generator.fusion, prefix_cache_bytes=0)


@contextmanager
def read(generator: VistGenerator) -> Iterator[list[int]]:
    """Positions of each first pass."""
    taken: list[int] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given.get("inputs_embeds") is not None:
            taken.append(given["inputs_embeds"].shape[1])

    hook = generator.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield taken
    finally:
        hook.remove()


def first_logits(generator: VistGenerator, prompts: list[Prompt]) -> Tensor:
    """What generate's first pass says of the first token, float [b, v]."""
    said: list[Tensor] = []
    hook = generator.model.register_forward_hook(lambda _, __, output: said.append(output.logits[:, -1]))
    try:
        generator.generate(prompts, max_new_tokens=1)
    finally:
        hook.remove()
    return said[-1]


def test_a_follow_up_reads_only_what_is_new(generator: VistGenerator) -> None:
    generator.generate([ask(QUESTIONS[0], 1, 2, 3)], max_new_tokens=1)
    for question in QUESTIONS:
        with read(generator) as taken:
            (answer,) = generator.generate([ask(question, 1, 2, 3)], max_new_tokens=6)
        new = len(generator.tokenize(question)) + len(generator.frame[1])
        assert taken == [new]
        assert answer == uncached(generator).generate([ask(question, 1, 2, 3)], max_new_tokens=6)[0]
        torch.testing.assert_close(
            first_logits(generator, [ask(question, 1, 2, 3)]),
            first_logits(uncached(generator), [ask(question, 1, 2, 3)]),
            atol=1e-4,
            rtol=1e-4,
        )


def test_other_passages_behind_the_same_opening_reuse_the_opening(generator: VistGenerator) -> None:
    opening = "marie curie built it "
    while generator.count_tokens(opening) < 20:  # worth keeping, with any tokenizer
        opening += opening
    generator.generate([ask(QUESTIONS[0], 1, 2, opening=opening)], max_new_tokens=1)
    prompt = ask(QUESTIONS[0], 4, 2, opening=opening)
    with read(generator) as taken:
        answers = generator.generate([prompt], max_new_tokens=6)
    before = Prompt((TextSegment(opening), TextSegment("document ")))  # the opening, up to the first memory
    assert taken == [generator.prompt_length(prompt) - generator.prompt_length(before) + len(generator.frame[1])]
    assert answers == uncached(generator).generate([prompt], max_new_tokens=6)
    with read(generator) as taken:  # and what was read on top of the opening is kept, too
        generator.generate([ask(QUESTIONS[1], 4, 2, opening=opening)], max_new_tokens=1)
    assert taken[0] < 2 * 9


def test_a_batch_shares_what_all_begin_with_whatever_the_lengths(generator: VistGenerator) -> None:
    prompts = [ask(question, 1, 2) for question in QUESTIONS]
    plain = uncached(generator)
    for _ in range(2):  # first from nothing, with left padding; then from what was kept of that
        with read(generator) as taken:
            answers = generator.generate(prompts, max_new_tokens=6)
        assert answers == plain.generate(prompts, max_new_tokens=6)
        torch.testing.assert_close(first_logits(generator, prompts), first_logits(plain, prompts), atol=1e-4, rtol=1e-4)
    longest = max(len(generator.tokenize(question)) for question in QUESTIONS) + len(generator.frame[1])
    assert taken == [longest]
    (alone,) = generator.generate([prompts[1]], max_new_tokens=6)
    assert alone == plain.generate([prompts[1]], max_new_tokens=6)[0]


def test_a_batch_that_begins_differently_reads_all(generator: VistGenerator) -> None:
    prompts = [ask(QUESTIONS[0], 1, 2), ask(QUESTIONS[1], 2, 1, opening="marie curie")]
    for _ in range(2):
        with read(generator) as taken:
            answers = generator.generate(prompts, max_new_tokens=4)
        assert taken == [max(map(generator.prompt_length, prompts))]
    assert answers == uncached(generator).generate(prompts, max_new_tokens=4)


def test_what_looks_alike_is_told_apart(generator: VistGenerator) -> None:
    """Another number of positions, other latents, another order, another compressor: each is read anew."""
    latents = memory(1).latents

    def prompt(*memories: VisualMemory) -> Prompt:
        return Prompt((*(MemorySegment(one) for one in memories), TextSegment("answer")))

    given = VisualMemory(latents, "abc")
    generator.generate([prompt(given, memory(2))], max_new_tokens=1)
    other = latents.clone()
    other[-1, -1] += 1
    for some in (
        (given.coarsen(5), memory(2)),
        (VisualMemory(other, "abc"), memory(2)),
        (memory(2), given),
        (VisualMemory(latents, "another"), memory(2)),
        (VisualMemory(torch.cat((latents, memory(2).latents)), "abc"),),
    ):
        with read(generator) as taken:
            answers = generator.generate([prompt(*some)], max_new_tokens=4)
        assert taken == [generator.prompt_length(prompt(*some))]
        assert answers == uncached(generator).generate([prompt(*some)], max_new_tokens=4)


def test_conversations_reuse_their_history() -> None:
    generator = tried(causal_generator("qwen3", seed=1))
    turns = [
        Message("system", (TextSegment("the old bridge was built in 1867 by marie curie"),)),
        Message("user", (MemorySegment(memory(1)), TextSegment(QUESTIONS[0]))),
    ]
    generator.generate([generator.converse(turns)], max_new_tokens=2)
    turns += [Message("assistant", (TextSegment("by marie"),)), Message("user", (TextSegment(QUESTIONS[2]),))]
    prompt = generator.converse(turns)
    assert any(isinstance(segment, TemplateSegment) for segment in prompt.segments)
    with read(generator) as taken:
        answers = generator.generate([prompt], max_new_tokens=6)
    before = generator.prompt_length(
        Prompt(prompt.segments[: prompt.segments.index(turns[1].segments[0]) + 1], framed=True)
    )
    assert taken == [generator.prompt_length(prompt) - before]
    assert answers == uncached(generator).generate([prompt], max_new_tokens=6)


def test_streaming_and_sampling_reuse_it_too(generator: VistGenerator) -> None:
    prompt, plain = ask(QUESTIONS[0], 1, 2), uncached(generator)
    for _ in range(2):
        with read(generator) as taken:
            pieces = list(generator.stream(prompt, max_new_tokens=6))
        assert "".join(pieces).strip() == plain.generate([prompt], max_new_tokens=6)[0].text
    assert taken == [len(generator.tokenize(QUESTIONS[0])) + len(generator.frame[1])]
    drawn = []
    for one in (generator, plain):
        torch.manual_seed(5)
        drawn.append(one.generate([prompt], max_new_tokens=6, do_sample=True, temperature=1.5))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}])
def test_what_arranges_the_cache_itself_does_without(generator: VistGenerator, options: dict[str, Any]) -> None:
    prompts = [ask(QUESTIONS[0], 1, 2)]
    generator.generate(prompts, max_new_tokens=1)
    with read(generator) as taken:
        answers = generator.generate(prompts, max_new_tokens=4, **options)
    assert taken[0] == generator.prompt_length(prompts[0])
    assert answers == uncached(generator).generate(prompts, max_new_tokens=4, **options)


def change_model(generator: VistGenerator) -> None:
    with torch.no_grad():
        next(generator.model.parameters()).mul_(-1)


def change_fusion(generator: VistGenerator) -> None:
    generator.fusion.load_state_dict({name: 2 * tensor for name, tensor in generator.fusion.state_dict().items()})


@pytest.mark.parametrize("change", [change_model, change_fusion])
def test_other_weights_read_anew(generator: VistGenerator, change: Any) -> None:
    prompt = ask(QUESTIONS[0], 1, 2)
    generator.generate([prompt], max_new_tokens=6)
    change(generator)
    wanted = uncached(generator).generate([prompt], max_new_tokens=6)
    torch.testing.assert_close(first_logits(generator, [prompt]), first_logits(uncached(generator), [prompt]))
    assert generator.generate([prompt], max_new_tokens=6) == wanted


def test_nothing_is_kept_while_it_trains(generator: VistGenerator) -> None:
    prompt = ask(QUESTIONS[0], 1, 2)
    generator.fusion.train()
    for _ in range(2):
        with read(generator) as taken:
            generator.generate([prompt], max_new_tokens=1)
        assert taken == [generator.prompt_length(prompt)]


def test_a_memory_is_checked_also_where_it_was_read_before(generator: VistGenerator) -> None:
    prompt = ask(QUESTIONS[0], 1, 2)
    generator.generate([prompt], max_new_tokens=1)
    generator.fusion.bind("another")
    with pytest.raises(IncompatibleMemoryError):
        generator.generate([prompt], max_new_tokens=1)


def test_a_failure_leaves_nothing_behind(generator: VistGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, generate = ask(QUESTIONS[0], 1, 2), generator.model.generate

    def fails(**arguments: Any) -> Tensor:
        generate(**arguments)
        arguments["past_key_values"].layers[0].keys.zero_()
        raise RuntimeError("on purpose")

    monkeypatch.setattr(generator.model, "generate", fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        generator.generate([prompt], max_new_tokens=4)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(generator.stream(prompt, max_new_tokens=4))
    monkeypatch.undo()
    assert generator.generate([prompt], max_new_tokens=4) == uncached(generator).generate([prompt], max_new_tokens=4)


def test_calls_at_the_same_time_do_not_disturb_each_other(generator: VistGenerator) -> None:
    prompts = [ask(question, *seeds) for question in QUESTIONS for seeds in ((1, 2), (1, 3), (2, 1))] * 2
    wanted = [uncached(generator).generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert [one for (one,) in pool.map(lambda p: generator.generate([p], max_new_tokens=5), prompts)] == wanted


def test_what_is_kept_is_bounded(generator: VistGenerator) -> None:
    prompt = ask(QUESTIONS[0], 1, 2)
    small = tried(VistGenerator(generator.model, generator.tokenizer, generator.fusion, prefix_cache_bytes=2000))
    for _ in range(2):
        with read(small) as taken:
            small.generate([prompt], max_new_tokens=1)
        assert taken == [small.prompt_length(prompt)]
    # A prefix that is too large is not kept, and drives out none that fits.
    fits = Prompt((MemorySegment(memory(1, 20)), TextSegment("who")))
    states = 2 * 2 * 22 * 4 * 32  # layers, keys and values, positions, bytes, width
    room = tried(VistGenerator(generator.model, generator.tokenizer, generator.fusion, prefix_cache_bytes=2 * states))
    for some in (fits, Prompt((MemorySegment(memory(2, 90)), TextSegment("who")))):
        room.generate([some], max_new_tokens=1)
    with read(room) as taken:
        room.generate([fits], max_new_tokens=1)
    assert taken == [len(room.tokenize("who")) + len(room.frame[1])]
    with pytest.raises(ConfigError, match="prefix_cache_bytes must be 0 or more, got -1"):
        PrefixCache(-1)
    generator.generate([prompt], max_new_tokens=1)
    generator.prefixes.clear()
    with read(generator) as taken:
        generator.generate([prompt], max_new_tokens=1)
    assert taken == [generator.prompt_length(prompt)]


def test_it_is_off_for_models_that_do_not_read_on(generator: VistGenerator) -> None:
    """Both directions (the embedded model's kind), sliding windows, keys that depend on the whole."""
    assert goes_on(generator.model)
    assert not goes_on(causal_generator("prefix_bert").model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(**sizes, intermediate_size=32, vocab_size=64, sliding_window=None)
    assert goes_on(AutoModelForCausalLM.from_config(config).eval())
    config.sliding_window = 16
    assert not goes_on(AutoModelForCausalLM.from_config(config).eval())
    config.sliding_window = None
    both_ways = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for layer in both_ways.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, **kw: forward(*args, **(kw | {"attention_mask": None}))
        layer.self_attn.is_causal = False
    assert not goes_on(both_ways)
