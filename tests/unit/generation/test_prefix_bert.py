from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.tiny import tiny_generator
from vist_rag.generation.prefix_bert import SLOTS, CopyAttention, PrefixBertConfig, PrefixBertForCausalLM, ranks


@pytest.fixture(scope="module")
def model() -> PrefixBertForCausalLM:
    model = tiny_generator().model
    assert isinstance(model, PrefixBertForCausalLM)
    return model


IDS = torch.tensor([[2, 10, 20, 30, 40, 50]])
PREFIX = torch.tensor([[True, True, True, False, False, False]])  # three tokens of prompt, three of answer


@torch.no_grad()
def seen(model: PrefixBertForCausalLM, prefix: Tensor) -> list[list[bool]]:
    """Row q, column k: whether what stands at k changes the logits at q."""
    base = model(input_ids=IDS, prefix_mask=prefix).logits[0]
    columns = []
    for k in range(IDS.shape[1]):
        changed = IDS.clone()
        changed[0, k] = 60
        moved = (model(input_ids=changed, prefix_mask=prefix).logits[0] - base).abs().amax(-1)
        columns.append((moved > 1e-5).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def test_prompt_is_read_in_both_directions_and_the_answer_from_left_to_right(model: PrefixBertForCausalLM) -> None:
    y, n = True, False
    assert seen(model, PREFIX) == [
        [y, y, y, n, n, n],
        [y, y, y, n, n, n],
        [y, y, y, n, n, n],
        [y, y, y, y, n, n],
        [y, y, y, y, y, n],
        [y, y, y, y, y, y],
    ]


def test_without_a_prompt_it_is_a_causal_model(model: PrefixBertForCausalLM) -> None:
    assert seen(model, torch.zeros_like(PREFIX)) == [[k <= q for k in range(6)] for q in range(6)]


@torch.no_grad()
def test_first_pass_of_generation_is_all_prompt(model: PrefixBertForCausalLM) -> None:
    prompt = IDS[:, :4]
    told = model(input_ids=prompt, prefix_mask=torch.ones(1, 4, dtype=torch.bool)).logits
    assert torch.equal(model(input_ids=prompt).logits, told)
    causal = model(input_ids=prompt, prefix_mask=torch.zeros(1, 4, dtype=torch.bool)).logits
    assert (causal[0, :3] - told[0, :3]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_cached_decoding_equals_a_full_forward(model: PrefixBertForCausalLM, padding: int) -> None:
    ids = torch.cat((torch.zeros(1, padding, dtype=torch.long), IDS), dim=1)
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    prefix = torch.cat((torch.zeros(1, padding, dtype=torch.bool), PREFIX), dim=1)
    full = model(input_ids=ids, attention_mask=mask, prefix_mask=prefix, use_cache=False).logits
    split = padding + 3
    out = model(input_ids=ids[:, :split], attention_mask=mask[:, :split], use_cache=True)
    steps = [out.logits[:, padding:]]
    for at in range(split, ids.shape[1]):
        out = model(
            input_ids=ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=out.past_key_values
        )
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full[:, padding:], atol=1e-3, rtol=1e-4)
    alone = model(input_ids=IDS, prefix_mask=PREFIX).logits
    torch.testing.assert_close(full[:, padding:], alone, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_greedy_generation_equals_repeated_full_forwards(model: PrefixBertForCausalLM) -> None:
    prompt = IDS[:, :4]
    ids = prompt
    for _ in range(6):
        prefix = (torch.arange(ids.shape[1]) < prompt.shape[1])[None]
        ids = torch.cat((ids, model(input_ids=ids, prefix_mask=prefix).logits[:, -1:].argmax(-1)), dim=1)
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert generated.tolist() == ids.tolist()


def test_padding_does_not_make_nan(model: PrefixBertForCausalLM) -> None:
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert torch.isfinite(model(input_ids=IDS.expand(2, -1), attention_mask=mask).logits).all()


@torch.no_grad()
def test_round_trip_through_auto_classes(tmp_path: Path, model: PrefixBertForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, PrefixBertForCausalLM)
    assert loaded.config.is_decoder
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


# -------------------------------------------------------------------------------------------------------------- copying


WORDS = torch.nn.functional.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
END = 39


def copying(
    shown: list[list[int]], written: Tensor, *, answer: list[bool] | None = None, mask: list[bool] | None = None
) -> tuple[Tensor, Tensor]:
    """Words and places, for a pointer that looks for what was written last before each word of the prompt."""
    pointer = CopyAttention(64)
    with torch.no_grad():
        for parameter in pointer.parameters():
            parameter.zero_()
        pointer.query.weight[:, 64:] = 20 * torch.eye(64)  # the word just written ...
        pointer.key.weight[:, 128:] = 20 * torch.eye(64)  # ... is looked for before each place
        count = len(written)
        slots = torch.tensor([row + [-1] * (SLOTS - len(row)) for row in shown + [[]] * count])[None]
        allowed = torch.tensor([mask or [True] * len(shown)] * count)
        allowed = torch.nn.functional.pad(allowed, (0, count))[None]
        told = torch.tensor([answer or [True] * count])
        states = torch.zeros(1, len(shown) + count, 64)
        copied, places = pointer(states, written[None], WORDS, END, slots, allowed, told, None, 0)
    return copied[0], places[0]


def test_a_pointer_follows_the_text_and_copies_words_that_no_training_has_seen() -> None:
    copied, _ = copying([[3], [9], [4], [17]], WORDS[[3, 9, 4]])
    assert copied.argmax(-1).tolist() == [9, 4, 17]


def test_a_pointer_follows_the_words_within_a_latent_and_on_to_the_next() -> None:
    copied, places = copying([[3, 9, 4], [], [17, 21]], WORDS[[3, 9, 4, 17]])
    assert copied.argmax(-1).tolist() == [9, 4, 17, 21]
    assert places.shape == (4, 7 * SLOTS + 1)
    assert places.argmax(-1).tolist() == [1, 2, 2 * SLOTS, 2 * SLOTS + 1]


def test_words_of_a_position_are_counted_in_the_order_of_the_text() -> None:
    assert ranks(torch.tensor([3, 3, 0, 3, 0, 7])).tolist() == [0, 1, 0, 2, 1, 0]


def test_what_is_in_the_answer_is_hardly_copied_again() -> None:
    prompt, both = [[0], [1], [2], [3]], (WORDS[0] + WORDS[2])[None]  # what follows 0, or what follows 2
    fresh = copying(prompt, both)[0][0]
    after = copying(prompt, torch.cat((WORDS[[1]], both)))[0][1]  # 1 is written
    asked = copying(prompt, torch.cat((WORDS[[1]], both)), answer=[False, True])[0][1]  # 1 was part of the question
    assert float(after[1]) == pytest.approx(0.1 * float(fresh[1]), rel=0.05)
    assert float(after[3]) == pytest.approx(float(fresh[3]), rel=0.05)
    assert float(asked[1]) == pytest.approx(float(fresh[1]), rel=0.05)


@pytest.mark.parametrize(("shown", "mask"), [([[0], [1], [2], [3]], [False] * 4), ([[], [], [], []], [True] * 4)])
def test_where_nothing_may_be_copied_the_end_is_pointed_at(shown: list[list[int]], mask: list[bool]) -> None:
    copied, places = copying(shown, WORDS[[0]], mask=mask)
    assert copied.argmax(-1).tolist() == [END]
    assert float(copied.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float(places[0, -1]) == pytest.approx(1.0)


@torch.no_grad()
def test_what_positions_show_is_told_beside_embeddings(model: PrefixBertForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(IDS[:, :4])
    shown = torch.nn.functional.pad(IDS[:, :4, None], (0, SLOTS - 1), value=-1)
    told = model(inputs_embeds=embeddings, shown=shown).logits
    torch.testing.assert_close(told, model(input_ids=IDS[:, :4]).logits)
    assert (model(inputs_embeds=embeddings).logits - told).abs().max() > 0.1
    generated = model.generate(inputs_embeds=embeddings, shown=shown, max_new_tokens=5, do_sample=False)
    from_ids = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
    assert generated.tolist() == from_ids[:, 4:].tolist()


@torch.no_grad()
def test_beams_and_sampling_work_from_embeddings(model: PrefixBertForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(IDS[:, :4])
    beams = model.generate(inputs_embeds=embeddings, max_new_tokens=5, num_beams=3, do_sample=False)
    assert 1 <= beams.shape[1] <= 5
    torch.manual_seed(0)
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=True, top_k=5).shape[1] <= 5


@torch.no_grad()
def test_ids_pass_the_cache_unharmed_in_bf16() -> None:
    torch.manual_seed(0)
    config = PrefixBertConfig(
        vocab_size=5000,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = PrefixBertForCausalLM(config).eval().to(torch.bfloat16)
    prompt = torch.tensor([[2, 4999, 4097, 3001]])
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    out = model(input_ids=prompt[:, 1:2], past_key_values=cache)
    kept = cache.layers[config.num_hidden_layers].values[0, 0, :, 0].long().unflatten(0, (4, SLOTS))[:, 0]
    assert kept.tolist() == prompt[0].tolist()
    assert torch.isfinite(out.logits).all()
