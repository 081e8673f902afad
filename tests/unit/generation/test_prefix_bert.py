from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.tiny import tiny_generator
from vist_rag.generation.prefix_bert import (
    CopyAttention,
    PrefixBertConfig,
    PrefixBertForCausalLM,
    _neighbours,
    last_shown,
    ranks,
)


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


def slots(shown: list[list[int]]) -> Tensor:
    """Words of each position, int64 ``[t, s]``, with as many slots as the fullest needs."""
    most = max(1, *map(len, shown))
    return torch.tensor([row + [-1] * (most - len(row)) for row in shown])


def copying(
    shown: list[list[int]],
    written: Tensor,
    *,
    answer: list[bool] | None = None,
    mask: list[bool] | None = None,
    go_on: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Words and places, for a pointer that looks for what was written last before each word of the prompt."""
    pointer = CopyAttention(64)
    with torch.no_grad():
        for parameter in pointer.parameters():
            parameter.zero_()
        pointer.query.weight[:, 64:] = 20 * torch.eye(64)  # the word just written ...
        pointer.key.weight[:, 128:] = 20 * torch.eye(64)  # ... is looked for before each place
        pointer.go_on.fill_(go_on)
        count = len(written)
        allowed = torch.tensor([mask or [True] * len(shown)] * count)
        allowed = torch.nn.functional.pad(allowed, (0, count))[None]
        told = torch.tensor([answer or [True] * count])
        states = torch.zeros(1, len(shown) + count, 64)
        words_shown = slots(shown + [[]] * count)[None]
        copied, places = pointer(states, written[None], WORDS, END, words_shown, allowed, told, None, 0)
    return copied[0], places[0]


def test_a_pointer_follows_the_text_and_copies_words_that_no_training_has_seen() -> None:
    copied, _ = copying([[3], [9], [4], [17]], WORDS[[3, 9, 4]])
    assert copied.argmax(-1).tolist() == [9, 4, 17]


def test_a_pointer_follows_the_words_within_a_latent_and_on_to_the_next() -> None:
    copied, places = copying([[3, 9, 4], [], [17, 21]], WORDS[[3, 9, 4, 17]])
    assert copied.argmax(-1).tolist() == [9, 4, 17, 21]
    assert places.shape == (4, 7 * 3 + 1)  # three slots, because one position shows three words
    assert places.argmax(-1).tolist() == [1, 2, 2 * 3, 2 * 3 + 1]


def test_all_words_of_one_position_can_be_copied() -> None:
    """A memory at one position: however many words it spells, none is left out."""
    text = list(range(30))
    copied, places = copying([text], WORDS[text[:-1]])
    assert copied.argmax(-1).tolist() == text[1:]
    assert places.argmax(-1).tolist() == text[1:]


def test_words_of_a_position_are_counted_in_the_order_of_the_text() -> None:
    assert ranks(torch.tensor([3, 3, 0, 3, 0, 7])).tolist() == [0, 1, 0, 2, 1, 0]


def test_neighbours_are_those_of_the_same_row() -> None:
    words, rows = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 0, 0, 1, 1])
    assert _neighbours(words, rows, 0).tolist() == [5, 6, 7, 8, 9]
    assert _neighbours(words, rows, -1).tolist() == [-1, 5, 6, -1, 8]
    assert _neighbours(words, rows, 2).tolist() == [7, -1, -1, -1, -1]
    # The last one is not before the first.
    assert _neighbours(words, torch.zeros_like(rows), -2).tolist() == [-1, -1, 5, 6, 7]


def test_keys_tell_the_words_of_a_position_apart_by_their_neighbours_once_that_is_learned() -> None:
    torch.manual_seed(0)
    generator = tiny_generator().model
    assert isinstance(generator, PrefixBertForCausalLM)
    generator.copy.local = None
    states, words = torch.randn(1, 2, 32), torch.randn(60, 32)
    shown = torch.tensor([[[7, 9, 7], [9, 7, -1]]])
    plain = generator.copy._keys(states, shown, words)
    generator.tell_apart(16)
    assert torch.equal(generator.copy._keys(states, shown, words), plain)  # untaught
    assert generator.config.copy_width == 16
    torch.nn.init.normal_(generator.copy.local[2].weight)
    keys = generator.copy._keys(states, shown, words)
    # By hand: the last word of the first position, between two words on either side, one of them in the next position.
    size = words.norm(dim=-1).mean()
    near = [size * torch.nn.functional.normalize(words[i], dim=-1) for i in (7, 9, 7, 9, 7)]
    torch.testing.assert_close(keys[0, 2], plain[0, 2] + generator.copy.local(torch.cat((states[0, 0], *near))))
    assert torch.equal(keys[0, 5], plain[0, 5])  # an empty slot
    # The same words in a position of the same state, with others behind: another key.
    moved = generator.copy._keys(states, torch.tensor([[[7, 9, 7], [3, 7, -1]]]), words)
    assert torch.equal(moved[0, 0], keys[0, 0])
    assert not torch.allclose(moved[0, 1:3], keys[0, 1:3])
    # Padding on the left changes nothing.
    padded = torch.nn.functional.pad(shown, (0, 0, 3, 0), value=-1)
    shifted = generator.copy._keys(torch.nn.functional.pad(states, (0, 0, 3, 0)), padded, words)
    torch.testing.assert_close(shifted[0, 9:], keys[0])


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


# --------------------------------------------------------------------------------------------------------------- spans

TWICE = [[3], [5], [8], [1], [4], [5], [9], [2]]  # 5 stands before 8 and before 9; the question is about what follows 4


def test_the_last_word_shown_is_found_over_empty_slots() -> None:
    ids = torch.tensor([[3, -1, -1, 9, -1, 7], [-1, -1, 2, 2, -1, -1]])
    assert last_shown(ids).tolist() == [[-1, 0, 0, 0, 3, 3], [-1, -1, -1, 2, 3, 3]]


@pytest.mark.parametrize("go_on", [0.0, 1.0, 4.0, -3.0])
def test_a_copy_goes_on_behind_the_place_that_it_came_from(go_on: float) -> None:
    _, places = copying(TWICE, WORDS[[4, 5]], answer=[False, True], go_on=go_on)
    assert places.argmax(-1)[0] == 5  # what stands behind 4
    # Behind both, 5 stands: 9 has the bonus, 8 has not. All but 0.001 of it, since the pointer was sure.
    assert float((places[1, 6] / places[1, 2]).log()) == pytest.approx(go_on / 1.001, abs=1e-3)
    assert float(places[1, [2, 6]].sum()) == pytest.approx(1, abs=1e-3)


def test_a_span_goes_on_within_a_position_and_over_empty_ones() -> None:
    shown = [[4, 5, 8], [3, 4], [], [5], [9]]
    copied, places = copying(shown, WORDS[[3, 4, 5]], answer=[False, True, True], go_on=20.0)
    assert copied.argmax(-1).tolist() == [4, 5, 9]  # and not 8, which follows the other 4 and 5
    assert places.argmax(-1).tolist() == [3 + 1, 3 * 3, 4 * 3]
    without, _ = copying(shown, WORDS[[3, 4, 5]], answer=[False, True, True])
    assert float(without[2, 8]) == pytest.approx(float(without[2, 9]), rel=1e-3)


def test_nothing_goes_on_where_the_word_was_not_copied() -> None:
    written = WORDS[[4, 7]]  # the pointer was at 5, and the language model wrote something else
    with_bonus, without = (copying(TWICE, written, answer=[False, True], go_on=g)[1] for g in (50.0, 0.0))
    torch.testing.assert_close(with_bonus, without, atol=1e-6, rtol=1e-4)
    elsewhere = WORDS[[4, 3]]  # a word of the prompt, but not the one that was pointed at
    with_bonus, without = (copying(TWICE, elsewhere, answer=[False, True], go_on=g)[1] for g in (50.0, 0.0))
    torch.testing.assert_close(with_bonus, without, atol=1e-2, rtol=1e-2)


def test_words_of_the_question_are_no_copies() -> None:
    with_bonus, without = (copying(TWICE, WORDS[[4, 5]], answer=[False, False], go_on=g)[1] for g in (50.0, 0.0))
    assert torch.equal(with_bonus, without)


def test_a_span_does_not_go_on_where_copying_is_not_allowed() -> None:
    mask = [True] * 6 + [False] * 2
    copied, places = copying(TWICE, WORDS[[4, 5]], answer=[False, True], go_on=50.0, mask=mask)
    assert copied.argmax(-1)[1] == 8
    assert (places[1, 6:-1] == 0).all()


@torch.no_grad()
def test_a_new_model_goes_on_and_its_bonus_is_learned(model: PrefixBertForCausalLM) -> None:
    assert float(model.copy.go_on) == 4.0
    learning = copy.deepcopy(model)
    torch.nn.init.zeros_(learning.copy.local[2].weight)  # a new one has learned nothing of neighbours
    with torch.enable_grad():
        pointed = learning(input_ids=torch.tensor([[2, 10, 20, 30, 10, 20]]), prefix_mask=PREFIX).attentions[0]
        pointed[0, 4, 2].log().backward()  # 20, behind the 10 that was written
    assert learning.copy.go_on.grad is not None
    assert float(learning.copy.go_on.grad) > 0


class Case:
    """Prompts of two lengths that show several words a position, answers that copy spans of them, and other words."""

    def __init__(self, go_on: float = 6.0) -> None:
        self.model = copy.deepcopy(tiny_generator(seed=2).model).eval()
        with torch.no_grad():
            self.model.copy.go_on.fill_(go_on)
        first = slots([[2], [11, 12, 13], [14, 12], [], [18], [11, 17], [14, 19, 20, 21], [22], [9]])
        other = slots([[]] * 4 + [[2], [30, 31, 32, 33], [34, 31], [35], [9]])
        self.shown = torch.stack((first, other))
        self.mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
        self.answers = torch.tensor([[11, 12, 13, 40, 14, 12, 18], [34, 31, 35, 40, 30, 31, 32]])
        draw = torch.Generator().manual_seed(5)
        words = self.model.get_input_embeddings().weight.detach()
        self.embeds = words[self.shown.clamp(min=0)].mean(2) + 0.1 * torch.randn(2, 9, 32, generator=draw)

    @torch.no_grad()
    def full(self, rows: list[int], answers: Tensor, keep: int = 0) -> tuple[Tensor, Tensor]:
        """Logits and places of one pass over prompts and answers, from the last of each prompt on."""
        count = answers.shape[1]
        embeds = torch.cat((self.embeds[rows], self.model.get_input_embeddings()(answers)), dim=1)
        out = self.model(
            inputs_embeds=embeds,
            attention_mask=torch.cat((self.mask[rows], torch.ones_like(answers)), dim=1),
            prefix_mask=torch.nn.functional.pad(self.mask[rows].bool(), (0, count)),
            shown=torch.nn.functional.pad(self.shown[rows], (0, 0, 0, count), value=-1),
            use_cache=False,
            logits_to_keep=keep,
        )
        return out.logits[:, -count - 1 :], out.attentions[0][:, -count - 1 :, : 9 * 4]

    def step(self, words: Tensor | None, mask: Tensor, cache: Any = None, keep: int = 0) -> tuple[Tensor, Tensor, Any]:
        """Logits and places of the prompts (no words), or of words after what the cache holds."""
        given = {"input_ids": words} if words is not None else {"inputs_embeds": self.embeds, "shown": self.shown}
        with torch.no_grad():
            out = self.model(**given, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits, out.attentions[0][..., : 9 * 4], out.past_key_values


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("passes", [[1] * 7, [3, 1, 3], [7]])
def test_a_span_is_followed_from_pass_to_pass_as_in_one(passes: list[int]) -> None:
    case = Case()
    logits, places, cache = case.step(None, case.mask, keep=1)
    found, mask, done = [(logits, places)], case.mask, 0
    for count in passes:
        words = case.answers[:, done : done + count]
        mask, done = torch.cat((mask, torch.ones_like(words)), dim=1), done + count
        logits, places, cache = case.step(words, mask, cache)
        found.append((logits, places))
    expected = case.full([0, 1], case.answers)
    same((torch.cat([a for a, _ in found], dim=1), torch.cat([b for _, b in found], dim=1)), expected)
    assert (expected[0] - Case(go_on=0.0).full([0, 1], case.answers)[0]).abs().max() > 0.1  # the bonus is felt


def test_beams_take_along_where_they_were_pointing() -> None:
    """Rows are exchanged and doubled in mid-answer, as a beam search does."""
    case = Case()
    _, _, cache = case.step(None, case.mask, keep=1)
    mask = torch.nn.functional.pad(case.mask, (0, 1), value=1)
    _, _, cache = case.step(case.answers[:, :1], mask, cache)
    order = torch.tensor([0, 0])
    cache.reorder_cache(order)
    histories, mask = case.answers[order, :1], mask[order]
    # 12 stands behind 11, which was written, and behind 14; what follows tells where the pointer was.
    for words in (torch.tensor([[12], [12]]), torch.tensor([[13], [18]])):
        histories, mask = torch.cat((histories, words), dim=1), torch.nn.functional.pad(mask, (0, 1), value=1)
        logits, places, cache = case.step(words, mask, cache)
        expected = case.full(order.tolist(), histories)
        same((logits, places), (expected[0][:, -1:], expected[1][:, -1:]))


def test_scores_of_beams_are_those_of_full_passes() -> None:
    case = Case()
    out = case.model.generate(
        inputs_embeds=case.embeds,
        attention_mask=case.mask,
        shown=case.shown,
        max_new_tokens=6,
        min_new_tokens=6,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        suppress_tokens=[case.model.config.eos_token_id],
        return_dict_in_generate=True,
        output_scores=True,
    )
    written = out.sequences
    assert written.shape == (8, 6)
    assert len({tuple(row) for row in written.tolist()}) == 8
    logits, _ = case.full([0, 0, 0, 0, 1, 1, 1, 1], written)
    each = logits[:, :-1].log_softmax(-1).gather(2, written[..., None])[..., 0]
    torch.testing.assert_close(out.sequences_scores, each.mean(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, 8])
def test_fewer_logits_are_the_last_of_all(keep: int) -> None:
    """What was written before the positions that are kept tells what is copied there."""
    case = Case()
    logits, places = case.full([0, 1], case.answers)
    some = case.full([0, 1], case.answers, keep)
    assert some[0].shape[1] == keep
    same(some, (logits[:, -keep:], places[:, -keep:]))
    _, _, cache = case.step(None, case.mask, keep=1)
    mask = torch.nn.functional.pad(case.mask, (0, 7), value=1)
    later, pointed, _ = case.step(case.answers, mask, cache, keep=min(keep, 7))
    same((later, pointed), (logits[:, -min(keep, 7) :], places[:, -min(keep, 7) :]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_points_as_float32_does(dtype: torch.dtype) -> None:
    case = Case()
    expected = case.full([0, 1], case.answers)[1]
    case.model, case.embeds = case.model.to(dtype), case.embeds.to(dtype)
    _, places, cache = case.step(None, case.mask, keep=1)
    mask = torch.nn.functional.pad(case.mask, (0, 7), value=1)
    _, later, cache = case.step(case.answers, mask, cache)
    assert later.dtype == dtype
    assert torch.isfinite(later).all()
    torch.testing.assert_close(torch.cat((places, later), dim=1).float(), expected, atol=0.1, rtol=0.1)
    out = case.model.generate(
        inputs_embeds=case.embeds, attention_mask=case.mask, shown=case.shown, max_new_tokens=4, num_beams=2
    )
    assert len(out) == 2


@torch.no_grad()
def test_what_positions_show_is_told_beside_embeddings(model: PrefixBertForCausalLM) -> None:
    embeddings = model.get_input_embeddings()(IDS[:, :4])
    shown = IDS[:, :4, None]
    told = model(inputs_embeds=embeddings, shown=shown).logits
    torch.testing.assert_close(told, model(input_ids=IDS[:, :4]).logits)
    wide = torch.nn.functional.pad(shown, (0, 5), value=-1)  # empty slots change nothing
    torch.testing.assert_close(model(inputs_embeds=embeddings, shown=wide).logits, told)
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
    kept = cache.layers[config.num_hidden_layers].values[0, 0, :, 0].long()
    assert kept.tolist() == prompt[0].tolist()
    assert torch.isfinite(out.logits).all()
