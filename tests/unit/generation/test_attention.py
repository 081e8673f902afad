"""Where an answer looks: against what the model tells while it generates, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tests.support.causal import causal_generator, fused_generator
from vist_rag.compression import VisualMemory
from vist_rag.generation import MemorySegment, Prompt, TextSegment, VistGenerator
from vist_rag.generation.attention import LAST_LAYERS, answer_attention

MEMORY = VisualMemory(torch.randn(5, 16, generator=torch.Generator().manual_seed(4)), "abc")
PROMPT = Prompt((TextSegment("document "), MemorySegment(MEMORY), TextSegment("the old bridge question where answer")))


def step_by_step(generator: VistGenerator, *, eager: bool = False) -> tuple[tuple[int, ...], list[tuple[Tensor, ...]]]:
    """The tokens of an answer, and the attentions of each step, as ``generate`` returns them."""
    if eager:
        generator.model.set_attn_implementation("eager")
    with torch.no_grad(), generator.fusion.condition(generator, [PROMPT]) as inputs:
        output = generator.model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0,
            output_attentions=True, return_dict_in_generate=True,
        )  # fmt: skip
    return tuple(output.sequences[0].tolist()), output.attentions


def test_a_copied_token_is_told_from_where_it_was_copied() -> None:
    generator = causal_generator("prefix_bert", seed=1)
    ids, steps = step_by_step(generator)
    found = answer_attention(generator, PROMPT, ids)
    assert found is not None
    kind, weights = found
    length = generator.prompt_length(PROMPT)
    assert (kind, weights.shape) == ("copied", (5, length))
    for row, (pointed,) in zip(weights, steps, strict=True):
        slots = pointed[0, -1, :-1].reshape(length, -1)
        torch.testing.assert_close(row, slots.sum(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(row.sum() + pointed[0, -1, -1], torch.tensor(1.0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_other_models_tell_their_self_attention(family: str) -> None:
    generator = causal_generator(family, seed=1)
    before = generator.model.config._attn_implementation
    assert before != "eager"
    ids, _ = step_by_step(generator)
    found = answer_attention(generator, PROMPT, ids)
    assert generator.model.config._attn_implementation == before
    assert found is not None
    kind, weights = found
    length = generator.prompt_length(PROMPT)
    assert (kind, weights.shape) == ("attended", (5, length))
    again, steps = step_by_step(generator, eager=True)
    assert again == ids
    for step, (row, layers) in enumerate(zip(weights, steps, strict=True)):
        heads = [layer[0, :, -1].mean(0) for layer in layers[-LAST_LAYERS:]]
        # The cache of a sliding window holds its last positions only.
        mean = torch.stack([F.pad(head, (length + step - len(head), 0)) for head in heads]).mean(0)
        torch.testing.assert_close(row, mean[:length], atol=1e-4, rtol=1e-3)


def test_what_cannot_be_told_is_not() -> None:
    assert answer_attention(causal_generator("llama"), PROMPT, ()) is None
    assert answer_attention(fused_generator("llama", "cross_attention"), PROMPT, (5, 6)) is None  # no positions
