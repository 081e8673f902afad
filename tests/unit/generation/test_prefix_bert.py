from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.tiny import tiny_generator
from vist_rag.generation.prefix_bert import CopyAttention, PrefixBertForCausalLM


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
    torch.testing.assert_close(torch.cat(steps, dim=1), full[:, padding:], atol=1e-5, rtol=1e-5)
    alone = model(input_ids=IDS, prefix_mask=PREFIX).logits
    torch.testing.assert_close(full[:, padding:], alone, atol=1e-5, rtol=1e-5)


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


def copying(queries: list[list[float]], *, answer: list[bool], mask: list[list[bool]] | None = None) -> Tensor:
    """What a pointer that compares written words with the words before each position copies from words 0 1 2 3."""
    words = torch.eye(6)
    pointer = CopyAttention(6)
    with torch.no_grad():
        for parameter in pointer.parameters():
            parameter.zero_()
        pointer.query.weight[:, 6:] = 20 * torch.eye(6)  # the word just written ...
        pointer.key.weight[:, 12:] = 20 * torch.eye(6)  # ... is looked for before each position
    embeddings = torch.cat((words[:4], torch.tensor(queries)))[None]
    count = len(queries)
    allowed = torch.tensor(mask if mask is not None else [[True] * 4] * count)
    allowed = torch.nn.functional.pad(allowed, (0, count))[None]
    seen = torch.tensor(answer)[None]
    copied: Tensor = pointer(torch.zeros_like(embeddings), embeddings, words, 5, allowed, seen, None, 0)[0]
    return copied[0].detach()


def test_a_pointer_follows_the_text_and_copies_words_that_no_training_has_seen() -> None:
    written = torch.eye(6)[[0, 1, 2]].tolist()
    assert copying(written, answer=[True] * 3).argmax(-1).tolist() == [1, 2, 3]


def test_what_is_in_the_answer_is_hardly_copied_again() -> None:
    mixed = (torch.eye(6)[0] + torch.eye(6)[2]).tolist()  # what follows 0, or what follows 2
    first, second = torch.eye(6)[1].tolist(), mixed
    fresh = copying([second], answer=[True])[0]
    assert float(fresh[1]) == pytest.approx(float(fresh[3]), rel=1e-3)
    after = copying([first, second], answer=[True, True])[1]  # 1 is written
    assert float(after[1]) == pytest.approx(0.1 * float(after[3]), rel=1e-2)
    asked = copying([first, second], answer=[False, True])[1]  # 1 was part of the question
    assert float(asked[1]) == pytest.approx(float(asked[3]), rel=1e-3)


def test_the_end_of_the_answer_is_what_is_pointed_at_where_nothing_may_be_copied() -> None:
    copied = copying([torch.eye(6)[0].tolist()], answer=[True], mask=[[False] * 4])
    assert copied.argmax(-1).tolist() == [5]
    assert float(copied.sum()) == pytest.approx(1.0, abs=1e-4)


@torch.no_grad()
def test_beams_and_sampling_work_from_embeddings(model: PrefixBertForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(IDS[:, :4])
    beams = model.generate(inputs_embeds=embeddings, max_new_tokens=5, num_beams=3, do_sample=False)
    assert 1 <= beams.shape[1] <= 5
    torch.manual_seed(0)
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=True, top_k=5).shape[1] <= 5
