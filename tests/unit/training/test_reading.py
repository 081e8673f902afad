from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.support.causal import causal_generator
from tests.support.tiny import tiny_compressor
from vist_rag.errors import ConfigError
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.generation.fusion.soft_prompt import side_by_side
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM
from vist_rag.training.counts import count_tokens
from vist_rag.training.data import Question
from vist_rag.training.examples import (
    CONTINUE,
    RECONSTRUCT,
    Example,
    ExampleMix,
    answer_example,
    continue_example,
    misspell,
    reconstruct_example,
    window,
)
from vist_rag.training.objectives import Pve
from vist_rag.training.parts import train_only
from vist_rag.training.reading import MemoryReading, without_adapter
from vist_rag.types import Passage

TEXT = (
    "The river runs from a lake to the sea. Its old bridge was built in 1867! Who built it? Marie Curie did, with "
    "the help of many others. It stands there still, and nobody knows for how long it will."
)
PASSAGE = Passage(TEXT, title="The river")


# ----------------------------------------------------------------------------------------------------------- examples


def test_a_window_is_so_many_words_in_a_row() -> None:
    rng = random.Random(0)
    words = TEXT.split()
    for size in range(1, len(words) + 3):
        cut = window(TEXT, size, rng)
        assert cut in TEXT
        assert len(cut.split()) == min(size, len(words))
    assert len({window(TEXT, 3, rng) for _ in range(40)}) > 2


def test_a_window_begins_with_a_sentence_where_it_can() -> None:
    rng = random.Random(0)
    starts = {window(TEXT, 12, rng).split()[0] for _ in range(60)}
    assert starts == {"The", "Its", "Who", "Marie", "It"}


@pytest.mark.parametrize(
    "keep", ["1867", "marie curie", "The", "long it will.", "the help of many others", TEXT[20:149]]
)
def test_a_window_keeps_the_answer(keep: str) -> None:
    rng = random.Random(0)
    for size in (1, 2, 5, 9, 20, 50):
        for _ in range(10):
            cut = window(TEXT, size, rng, keep=keep)
            assert keep.lower() in cut.lower()
            assert len(cut.split()) <= max(size, len(keep.split()) + 1)


def test_a_window_counts_in_characters_as_they_are_written() -> None:
    """Lower case of ``İ`` is two characters long."""
    text = "İ" * 5 + " İİİ İİİ İİİ İİİ İİİ İİİ İİİ the answer is here and some more words follow after it"
    for seed in range(20):
        assert "answer" in window(text, 4, random.Random(seed), keep="answer")


def test_reconstruction_shows_what_is_to_be_written() -> None:
    for seed in range(10):
        example = reconstruct_example(PASSAGE, random.Random(seed), words=(5, 12))
        assert example.question == RECONSTRUCT
        assert example.passages[0].content == example.target
        assert example.target in PASSAGE.content
        assert 5 <= len(example.target.split()) <= 12


def test_continuation_asks_for_what_comes_after_a_cue() -> None:
    for seed in range(20):
        example = continue_example(PASSAGE, random.Random(seed), words=(15, 30))
        shown = example.passages[0]
        assert shown.title == "The river"
        cue = example.question.removeprefix(CONTINUE.partition("{")[0]).removesuffix("?")
        assert f"{cue} {example.target}" in " ".join(shown.text.split())


def test_a_question_shows_its_answer_among_others() -> None:
    row = Question("When?", ("in the year 1867", "1867"), "The river", TEXT)
    places = set()
    for seed in range(20):
        example = answer_example(
            row, random.Random(seed), words=(4, 10), others=[Passage("Another."), Passage("More.")]
        )
        assert example.target == "1867"  # the first answer that the text has
        assert len(example.passages) == 3
        place = next(i for i, p in enumerate(example.passages) if p.title == "The river")
        assert "1867" in example.passages[place].text
        places.add(place)
    assert places == {0, 1, 2}


LONG = " ".join(f"word{i}" for i in range(400))
ARTICLES = [Question("What?", (f"word{i}",), f"article {i % 4}", f"text{i} {LONG}") for i in range(12)]
TEXTS = [Passage(f"plain{i} {LONG}", title="elsewhere") for i in range(5)]


def mix(**stage: Any) -> ExampleMix:
    settings = {"batch": 6, "tasks": {"answer": {"weight": 1.0, "words": [30, 90]}}} | stage
    return ExampleMix(settings, TEXTS, ARTICLES, [1.0] * len(ARTICLES))


def words_of(example: Example) -> list[int]:
    return [len(passage.text.split()) for passage in example.passages]


def test_a_batch_is_of_one_length_and_the_same_for_the_same_seed() -> None:
    draw = mix(distractors=0.5, others=3, prompt_words=120, batch_words=300)
    for seed in range(20):
        batch = draw(random.Random(seed))
        assert batch == draw(random.Random(seed)) == mix(**draw.stage)(random.Random(seed))
        sizes = [size for example in batch for size in words_of(example)]
        assert max(sizes) <= -(-3 * (min(sizes) + 1) // 2)  # between two thirds and the whole of one length
    assert len({str(draw(random.Random(seed))) for seed in range(20)}) == 20


@pytest.mark.parametrize("batch_words", [1, 100, 250, 400])
def test_a_batch_shows_no_more_words_than_it_may(batch_words: int) -> None:
    sizes = set()
    for seed in range(30):
        batch = mix(batch_words=batch_words, distractors=0.5, others=2)(random.Random(seed))
        shown = sum(sum(words_of(example)) for example in batch)
        sizes.add(len(batch))
        assert shown <= batch_words or len(batch) == 1  # of one example there is always one
        assert len(batch) <= 6
    assert min(sizes) == 1
    assert (max(sizes) > 1) == (batch_words >= 100)
    assert len(mix()(random.Random(0))) == 6  # without a limit


def test_an_example_shows_no_more_words_than_it_may_whatever_stands_beside() -> None:
    counts = set()
    for seed in range(40):
        for example in mix(distractors=0.7, others=3, prompt_words=100)(random.Random(seed)):
            counts.add(len(example.passages))
            assert sum(words_of(example)) <= 100
            assert min(words_of(example)) >= 100 // 4 * 2 // 3 - 1
    assert counts == {1, 2, 3, 4}
    assert all(words_of(e) == [1, 1] for e in mix(distractors=1.0, prompt_words=1)(random.Random(0)))
    assert {len(e.passages) for seed in range(20) for e in mix(distractors=1.0)(random.Random(seed))} == {2}


def test_others_are_of_the_same_article_half_of_the_time_and_never_the_right_passage() -> None:
    draw, same, rest = mix(distractors=1.0, others=3, tasks={"answer": {"weight": 1.0, "words": [700, 700]}}), 0, 0
    for seed in range(60):
        for example in draw(random.Random(seed)):
            right = next(row for row in ARTICLES if row.answers == (example.target,))
            assert [p.text for p in example.passages].count(right.context) == 1
            for passage in example.passages:
                if passage.text == right.context:
                    assert passage.title == right.title
                elif passage.title == "elsewhere":
                    rest += 1
                else:
                    assert passage.title == right.title
                    same += 1
    assert 0.3 < same / (same + rest) < 0.6


# -------------------------------------------------------------------------------------------------------------- model

EXAMPLES = [
    Example((Passage("the old bridge was built in 1867", title="bridge"),), "when was it built", "in 1867", raw=False),
    Example((Passage("marie curie"), Passage("the lake " * 40)), "who", "marie curie by the lake", raw=False),
    Example((Passage("the river runs to the sea"),), "where", "to the sea", raw=True),
]


def model_of(family: str = "prefix_bert", **options: Any) -> MemoryReading:
    generator = causal_generator(family, seed=1)
    return MemoryReading(tiny_compressor(), generator, **options)


@pytest.mark.parametrize("family", ["prefix_bert", "llama"])
@pytest.mark.parametrize("rate", [1.0, 0.4, 0.01])
@torch.no_grad()
def test_loss_is_that_of_the_prompt_that_will_be_asked(family: str, rate: float) -> None:
    """Against compressor, template and generator as the pipeline uses them, one example at a time."""
    compressor, generator = tiny_compressor(), causal_generator(family, seed=1)
    model = MemoryReading(compressor, generator, rates={rate: 1.0}).eval()
    losses, correct, count = 0.0, 0, 0
    table = generator.model.get_input_embeddings()
    batch = model.batch(EXAMPLES, random.Random(0))
    for example in EXAMPLES:
        memories = compressor.encode([p.content for p in example.passages]) if not example.raw else []
        memories = [memory.coarsen(max(1, round(rate * len(memory)))) for memory in memories]
        raw = [p for p in example.passages if example.raw]
        # The template writes the best passage last; an example has its passages in the order of writing.
        prompt = PromptTemplate().build(example.question, raw[::-1], memories[::-1])
        target = torch.cat(
            (generator.tokenize(" " + example.target), generator.ids([generator.tokenizer.eos_token_id]))
        )
        prompt_embeds, prompt_shown = generator.fusion.embed(generator, prompt)
        embeds = torch.cat((prompt_embeds, table(target)))[None]
        prefix = (torch.arange(embeds.shape[1]) < len(prompt_embeds))[None]
        extra = {}
        if isinstance(generator.model, PrefixBertForCausalLM):
            shown = F.pad(prompt_shown, (0, 0, 0, len(target)), value=-1)
            extra = {"prefix_mask": prefix, "shown": shown[None]}
        logits = generator.model(inputs_embeds=embeds, **extra).logits[0, len(prompt_embeds) - 1 : -1]
        losses += float(F.cross_entropy(logits, target, reduction="sum"))
        correct += int((logits.argmax(-1) == target).sum())
        count += len(target)
    out = model(**batch | {"pointers": [[] for _ in EXAMPLES]})  # without the loss of pointing
    assert float(out["loss"]) == pytest.approx(losses / count, rel=1e-4)
    assert float(out["token_accuracy"]) == pytest.approx(correct / count, abs=1e-6)


def gold_of(model: MemoryReading, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places to point at for the one prompt of a batch of ideal memory, and what each position shows."""
    memories = [model._ideal_memory(*pair) for pair in zip(batch["spelt"] or [], batch["places"], strict=True)]
    (row,), (target,) = batch["segments"], batch["targets"]
    prompt = [memories[part][0] if isinstance(part, int) else part for part in row]
    shown = side_by_side([memories[part][1] if isinstance(part, int) else part[:, None] for part in row])
    shown = model._all_shown([shown], [target])
    gold = model._gold([prompt], [row], [target], batch["pointers"], batch["windows"], batch["places"], shown)
    return gold[0], shown[0].flatten()


def test_text_that_is_to_be_written_is_pointed_at() -> None:
    example = Example((Passage("a lake"), Passage("to the sea and back to the sea")), "where", "to the sea", raw=True)
    batch = model_of(ideal=1.0).batch([example], random.Random(0))
    gold, shown = gold_of(model_of(), batch)
    assert gold.sum(1).tolist() == [2, 2, 2, 1]  # both times that it occurs
    assert gold[3].nonzero().tolist() == [[len(shown)]]  # the end of the answer has a place of its own
    for token, places in zip(batch["targets"][0].tolist()[:3], gold, strict=False):
        assert set(shown[places[:-1]].tolist()) == {token}


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.01])
def test_positions_that_show_what_is_to_be_written_are_pointed_at(rate: float) -> None:
    model = model_of(ideal=1.0, rates={rate: 1.0})
    text = "the lake " * 12 + "in 1867 " + "the sea " * 12
    batch = model.batch([Example((Passage(text),), "when", "in 1867", raw=False)], random.Random(0))
    gold, shown = gold_of(model, batch)
    ((_, _, count),), (places,) = batch["windows"], batch["places"]
    assert len(places) == count
    assert int(places[-1]) + 1 == max(1, round(rate * count))
    for token, there in zip(batch["targets"][0][:-1].tolist(), gold, strict=False):
        assert shown[there[:-1]].tolist() == [token]  # at every rate: nothing is left out


def test_the_place_to_point_at_is_the_position_of_its_latent() -> None:
    model = model_of(ideal=1.0, rates={0.25: 1.0})
    text = "the lake " * 12 + "in 1867 " + "the sea " * 12
    batch = model.batch([Example((Passage(text),), "when", "in 1867", raw=False)], random.Random(0))
    gold, shown = gold_of(model, batch)
    (row,), ((pieces, windows, _),), (places,) = batch["segments"], batch["windows"], batch["places"]
    memory = next(i for i, part in enumerate(row) if isinstance(part, int))
    begin = sum(len(part) for part in row[:memory]) + 1  # the boundary comes first
    total = sum(len(part) if not isinstance(part, int) else int(places[-1]) + 3 for part in row)
    slots = len(shown) // (total + len(batch["targets"][0]))
    assert slots == int(torch.bincount(places[windows]).max())
    for token, there in zip(batch["targets"][0][:-1].tolist(), gold, strict=False):
        where = int((pieces == token).nonzero())
        place = int(places[windows[where]])
        before = int((places[windows[:where]] == place).sum())  # its slot: as many tokens share the position before it
        assert there.nonzero().flatten().tolist() == [(begin + place) * slots + before]


def test_what_is_spelt_wrong_is_not_pointed_at() -> None:
    model = model_of(ideal=1.0, slips=1.0)
    batch = model.batch([Example((Passage("in 1867 the lake"),), "when", "in 1867", raw=False)], random.Random(0))
    gold, _ = gold_of(model, batch)
    assert not gold[:-1].any()
    assert gold[-1, -1]


def test_slips_change_letters_and_digits_only() -> None:
    text = "In 1867, the old bridge - why? - was built. " * 50
    assert misspell(text, 0.0, random.Random(0)) == text
    slipped = misspell(text, 0.1, random.Random(0))
    changed = [a for a, b in zip(text, slipped, strict=True) if a != b]
    assert all(a.isalnum() for a in changed)
    assert 0.08 < len(changed) / sum(a.isalnum() for a in text) < 0.12


@torch.no_grad()
@pytest.mark.parametrize("family", ["prefix_bert", "gemma"])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.01])
def test_an_ideal_memory_means_and_spells_the_words_of_its_windows(rate: float, family: str) -> None:
    model = model_of(family, ideal=1.0, rates={rate: 1.0})
    text = "the river runs from a lake to the sea and the old bridge was built in 1867 by marie curie"
    batch = model.batch([Example((Passage(text),), "who", "marie curie", raw=False)], random.Random(0))
    (window,), (places,) = batch["spelt"], batch["places"]
    soft, shown = model._ideal_memory(window, places)
    pieces, latents, count = window
    table = model.lm.get_input_embeddings()
    words = table(torch.arange(len(table.weight)))  # as large as they are read
    assert len(soft) == len(shown) == int(places[-1]) + 3
    for place, (position, tokens) in enumerate(zip(soft[1:-1], shown[1:-1], strict=True)):
        of_latents = [pieces[latents == i] for i in range(count) if places[i] == place]
        meaning = torch.stack([words[ids].mean(0) if len(ids) else words.mean(0) for ids in of_latents]).mean(0)
        ids = torch.cat(of_latents)
        assert tokens[tokens >= 0].tolist() == ids.tolist()
        spelt = model.fusion.speller is not None and len(ids) > 0
        named = (words[ids] - words.mean(0)).mean(0) if spelt else 0.0
        torch.testing.assert_close(position, meaning + named)
    assert shown[shown >= 0].tolist() == pieces.tolist()


# ------------------------------------------------------------------------------------------------------------- teacher


def taught(model: MemoryReading, batch: dict[str, Any]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """What the teacher says of the one example of a batch, whose memory is the one of its texts."""
    (row,), (target,), (places,) = batch["segments"], batch["targets"], batch["places"]
    prompt = [torch.zeros(int(places[-1]) + 3, 32) if isinstance(part, int) else part for part in row]
    length = sum(map(len, prompt)) + len(target)
    return model._taught([prompt], [row], [target], batch["windows"], batch["places"], len(target) + 1, length)


@torch.no_grad()
@pytest.mark.parametrize("rate", [1.0, 0.4, 0.01])
def test_memory_is_taught_the_states_of_the_raw_text(rate: float) -> None:
    model = model_of(distil=1.0, states=1.0, ideal=1.0, rates={rate: 1.0})
    model.teach_itself()
    batch = model.batch(EXAMPLES[:1], random.Random(0))
    (row,), (target,), ((pieces, latents, _),), (places,) = (
        batch[name] for name in ("segments", "targets", "windows", "places")
    )
    count = int(places[-1]) + 1
    states, logits = taught(model, batch)
    length = states[0][0].shape[1]
    raw = [pieces if isinstance(part, int) else part for part in row]
    ids = torch.cat((*raw, target))[None]
    prefix = torch.arange(ids.shape[1])[None] < ids.shape[1] - len(target)
    shown = F.pad(ids[0, : -len(target), None], (0, 0, 0, len(target)), value=-1)[None]
    expected = model.lm(input_ids=ids, prefix_mask=prefix, shown=shown, output_hidden_states=True)
    torch.testing.assert_close(logits[0], expected.logits[0, -len(target) - 1 : -1])
    memory_at = next(i for i, part in enumerate(row) if isinstance(part, int))
    before = sum(map(len, raw[:memory_at]))
    for (state, there), layer in zip(states, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(state[0, :before], layer[0, :before])
        tail = length - before - count - 2
        torch.testing.assert_close(state[0, -tail:], layer[0, -tail:])
        assert not there[0, [before, before + count + 1]].any()  # the boundaries may be as they like
        for place in range(count):
            own = layer[0, before : before + len(pieces)][places[latents] == place]
            assert bool(there[0, before + 1 + place]) == (len(own) > 0)
            if len(own):
                torch.testing.assert_close(state[0, before + 1 + place], own.mean(0))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_is_the_generator_as_it_was_or_as_it_is(frozen: bool) -> None:
    model = model_of(distil=1.0, states=1.0, ideal=1.0)
    model.teach_itself(frozen=frozen)
    batch = model.batch(EXAMPLES[:1], random.Random(0))
    before = taught(model, batch)[1]
    with torch.no_grad():
        for parameter in model.lm.bert.encoder.parameters():
            parameter.mul_(1.3)
    after = taught(model, batch)[1]
    assert torch.equal(before, after) == frozen
    current = model_of(distil=1.0, states=1.0, ideal=1.0)
    current.lm.load_state_dict(model.lm.state_dict())
    current.teach_itself()
    assert torch.equal(taught(current, batch)[1], after) == (not frozen)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_forgets_nothing_and_learns_nothing_by_itself(frozen: bool) -> None:
    """Neither dropout nor a gradient: a live teacher is the model that is being trained."""
    model = model_of(distil=1.0, states=1.0, ideal=1.0).train()
    model.teach_itself(frozen=frozen)
    assert model.lm.config.hidden_dropout_prob > 0
    batch = model.batch(EXAMPLES[:1], random.Random(0))
    first, again = taught(model, batch), taught(model, batch)
    assert torch.equal(first[1], again[1])
    assert not first[1].requires_grad
    assert not any(state.requires_grad for state, _ in first[0])
    assert all(module.training for module in model.lm.modules())  # the student drops out as before
    model(**batch)["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.lm.parameters())


# ------------------------------------------------------------------------------------------------------------- lengths


def long_example(words: int, *, raw: bool = False) -> Example:
    passages = tuple(Passage("the lake " * (words // 4), title="the old bridge") for _ in range(2))
    return Example(passages, "when was the bridge built", "in 1867", raw)


def test_memory_may_show_more_words_than_text() -> None:
    draw = mix(distractors=1.0, others=3, prompt_words=60, memory_words=200, raw=0.5)
    longest = {True: 0, False: 0}
    for seed in range(60):
        for example in draw(random.Random(seed)):
            longest[example.raw] = max(longest[example.raw], sum(words_of(example)))
    assert longest[True] <= 60 < 120 < longest[False] <= 200


@pytest.mark.parametrize("ideal", [0.0, 1.0])
def test_memories_of_texts_that_would_not_fit_are_coarsened_and_have_no_teacher(ideal: float) -> None:
    model = model_of(distil=1.0, states=1.0, ideal=ideal)
    model.teach_itself()
    passages = tuple(Passage("the lake " * 200, title="bridge") for _ in range(3))
    long = Example(passages, "when was it", "in 1867", raw=False)
    batch = model.batch([long], random.Random(0))
    assert not batch["taught"]
    taken = [int(at[-1]) + 1 for at in batch["places"]]
    assert 0.9 * model._room(long) < sum(taken) <= model._room(long)
    assert max(taken) - min(taken) <= 1  # all alike
    figures = model(**batch)
    assert "apart" not in figures
    assert torch.isfinite(figures["loss"])
    assert model.batch([EXAMPLES[0]], random.Random(0))["taught"]
    # A text that fits keeps a position for every latent, and its teacher.
    short = model.batch([EXAMPLES[0]], random.Random(0))
    assert all(torch.equal(at, torch.arange(len(at))) for at in short["places"])
    assert "apart" in model(**short)


def test_memory_outside_of_the_context_keeps_its_latents() -> None:
    model = model_of()
    passages = tuple(Passage("the lake " * 400, title="bridge") for _ in range(3))
    long = Example(passages, "when was it", "in 1867", raw=False)
    assert any(int(at[-1]) + 1 < len(at) for at in model.batch([long], random.Random(0))["places"])
    model.fusion.in_context = False  # as cross-attention's is
    assert all(int(at[-1]) + 1 == len(at) for at in model.batch([long], random.Random(0))["places"])
    model.lm.config.max_position_embeddings = 20  # its text must fit all the same
    with pytest.raises(ConfigError, match=r"examples must fit 20 positions .* got 1 that do not"):
        model.batch([long], random.Random(0))


def test_what_is_too_long_to_be_read_raw_is_left_out() -> None:
    model = model_of()
    batch = model.batch([EXAMPLES[0], EXAMPLES[1], long_example(600, raw=True)], random.Random(0))
    expected = model.batch(EXAMPLES[:2], random.Random(0))
    assert len(batch["targets"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(batch["targets"], expected["targets"], strict=True))
    with pytest.raises(ConfigError, match=r"examples must fit 512 positions .* got 2 that do not; lower words"):
        model.batch([long_example(600, raw=True), long_example(700, raw=True)], random.Random(0))
    model.lm.config.max_position_embeddings = 2000
    assert len(model.batch([long_example(600, raw=True)], random.Random(0))["targets"]) == 1
    model.lm.config.max_position_embeddings = 40
    with pytest.raises(ConfigError, match=r"examples must fit 40 positions .* got 1 that do not"):
        model.batch([long_example(600)], random.Random(0))  # not even one position for each memory


def test_all_that_fits_can_be_taught() -> None:
    model = model_of(distil=1.0, states=1.0, ideal=1.0)
    model.teach_itself()
    longest = max(n for n in range(400, 600, 4) if model._fits(long_example(n)))
    for raw in (False, True):
        batch = model.batch([long_example(longest, raw=raw)], random.Random(0))
        assert torch.isfinite(model(**batch)["loss"])  # no position beyond the last


def test_a_generator_comes_nearer_to_its_teacher() -> None:
    model = model_of(distil=5.0, states=5.0, ideal=1.0)
    model.teach_itself()
    first = model(**model.batch(EXAMPLES[:2], random.Random(0)))
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        out = model(**model.batch(EXAMPLES[:2], random.Random(0)))
        out["loss"].backward()
        optimizer.step()
    assert out["apart"] < 0.7 * first["apart"]


def test_gradients_reach_resampler_fusion_and_generator() -> None:
    model = model_of()
    model.train()
    model(**model.batch(EXAMPLES, random.Random(0)))["loss"].backward()
    for part in (model.compressor.resampler, model.fusion, model.lm):
        without = [name for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
        # Rows of a look-up that no token took, and biases that a softmax ignores, have no gradient by right; the
        # speller learns in the lexical stage.
        assert not [name for name in without if not any(n in name for n in ("token_type", "key.bias", "speller"))]
    assert all(p.grad is None for p in model.compressor.tower.parameters())


def test_two_examples_are_learnt_by_heart_and_the_tower_stays() -> None:
    model = model_of()
    tower = {name: tensor.clone() for name, tensor in model.compressor.tower.state_dict().items()}
    resampler = {name: tensor.clone() for name, tensor in model.compressor.resampler.state_dict().items()}
    model.train()
    batch = model.batch(EXAMPLES[:2], random.Random(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, right = [], []
    for _ in range(40):
        out = model(**batch)
        losses.append(float(out["loss"].detach()))
        right.append(float(out["token_accuracy"]))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert right[0] < 0.5
    assert max(right[-5:]) > 0.8
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.compressor.tower.state_dict().items())
    moved = [
        not torch.equal(tensor, resampler[name]) for name, tensor in model.compressor.resampler.state_dict().items()
    ]
    assert all(moved)


def test_examples_of_text_alone_need_no_pages() -> None:
    model = model_of()
    batch = model.batch(EXAMPLES[2:], random.Random(0))
    assert len(batch["pixel_values"]) == 0
    assert torch.isfinite(model(**batch)["loss"])


def test_parts_are_the_generators_own() -> None:
    generator = causal_generator("llama")
    model = MemoryReading(tiny_compressor(), generator)
    assert isinstance(generator, VistGenerator)
    assert model.lm is generator.model
    assert model.fusion is generator.fusion
    assert {name.partition(".")[0] for name in model.state_dict()} == {"compressor", "fusion", "lm"}


# --------------------------------------------------------------------------------------- what is learned without labels

LAKES = [
    Example((Passage("the old bridge was built in 1867 by marie curie"),), "when", "in 1867", raw=False),
    Example((Passage("a river runs from the lake to the sea"),), "where", "to the sea", raw=False),
    Example((Passage("the answer to the old question and the document"),), "what", "the document", raw=False),
]


def learnt(model: MemoryReading, figure: str, *, steps: int = 30) -> list[float]:
    """A figure before each of some steps on one batch; what learns is what requires a gradient."""
    model.train()
    batch = model.batch(LAKES, random.Random(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    figures = []
    for _ in range(steps):
        out = model(**batch)
        figures.append(float(out[figure]))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    return figures


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memory_comes_to_be_read_as_its_text_is(family: str) -> None:
    model = model_of(family, distil=20.0)  # a generator of random weights believes no target
    train_only(model, ("resampler", "projector"))
    model.teach_itself()
    before = {name: weight.clone() for name, weight in model.lm.state_dict().items()}
    batch = model.batch(LAKES, random.Random(0))
    first = model.eval()(**batch)["believed"]
    learnt(model, "believed")
    assert model.eval()(**batch)["believed"] < 0.6 * first
    assert all(torch.equal(weight, before[name]) for name, weight in model.lm.state_dict().items())


def importance(model: MemoryReading) -> torch.Tensor:
    texts = [example.passages[0].content for example in LAKES] + ["the the a the"] * 9
    return count_tokens(texts, model._generator[0].tokenizer).importance


def test_memory_is_drawn_to_the_words_of_its_text() -> None:
    model = model_of("llama")
    train_only(model, ("resampler", "projector"))
    model.pve = Pve(importance(model), weight=5.0, mask="frequency")
    figures = learnt(model, "pve")
    assert figures[-1] < 0.2 * figures[0]
    first, again = model_of("llama"), model_of("llama")
    first.pve = Pve(importance(first), weight=5.0)
    batch = first.batch(LAKES, random.Random(0))
    plain = again(**again.batch(LAKES, random.Random(0)))
    drawn = first(**batch)
    torch.testing.assert_close(drawn["loss"], plain["loss"] + drawn["pve"])
    assert "pve" not in plain
    assert "pve" not in first(**first.batch(LAKES[:1], random.Random(0)))  # nothing to tell a lone text from


def test_which_words_draw_depends_on_the_mask() -> None:
    model, kept = model_of("llama"), {}
    for mode in ("none", "random", "frequency"):
        model.pve = Pve(importance(model), mask=mode, rate=0.5)
        kept[mode] = model.batch(LAKES, random.Random(0))["kept_words"]
    windows = model.batch(LAKES, random.Random(0))["windows"]
    assert all(row.all() and len(row) == len(w[0]) for row, w in zip(kept["none"], windows, strict=True))
    for mode in ("random", "frequency"):
        assert [int((~row).sum()) for row in kept[mode]] == [round(0.5 * len(row)) for row in kept[mode]]
    assert any(not torch.equal(a, b) for a, b in zip(kept["random"], kept["frequency"], strict=True))
    model.ideal = 1.0
    assert model.batch(LAKES, random.Random(0))["kept_words"] is None  # there are no latents to draw


def test_a_text_of_no_words_draws_nothing() -> None:
    model = model_of()
    model.pve = Pve(torch.zeros(200))
    odd = Example((Passage("\u200b\u200c"),), "what", "the sea", raw=False)
    assert model.batch([*LAKES, odd], random.Random(0))["kept_words"] is None
    assert torch.isfinite(model(**model.batch([*LAKES, odd], random.Random(0)))["loss"])


# ----------------------------------------------------------------------------------------------------------- adapters


def with_lora(family: str, **options: Any) -> MemoryReading:
    peft = pytest.importorskip("peft", reason="adapters need the extra 'train'")
    generator = causal_generator(family, seed=1)
    modules = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, fan_in_fan_out=family == "gpt2")
    adapted = peft.get_peft_model(generator.model, lora)
    return MemoryReading(tiny_compressor(), VistGenerator(adapted, generator.tokenizer, generator.fusion), **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fresh_adapter_changes_nothing(family: str) -> None:
    """GPT-2 counts positions from the left: padding must not shift them, with an adapter or without."""
    model, plain = with_lora(family, distil=1.0).eval(), model_of(family, distil=1.0).eval()
    for one in (model, plain):
        train_only(one, ("resampler", "projector"))
        one.teach_itself()
    batch = model.batch(EXAMPLES, random.Random(0))
    ours, theirs = model(**batch), plain(**plain.batch(EXAMPLES, random.Random(0)))
    torch.testing.assert_close(ours, theirs)


def test_adapters_alone_learn_from_the_generator_without_them() -> None:
    model = with_lora("llama", distil=1.0)
    train_only(model, ("projector", "lora"))
    model.teach_itself()
    before = {name: weight.clone() for name, weight in model.lm.state_dict().items()}
    batch = model.batch(LAKES, random.Random(0))
    teacher = taught(model, model.batch(LAKES[:1], random.Random(0)))[1]
    believed = learnt(model, "believed", steps=15)
    assert believed[-1] < 0.8 * believed[0]
    changed = {name for name, weight in model.lm.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    torch.testing.assert_close(taught(model, model.batch(LAKES[:1], random.Random(0)))[1], teacher)
    with without_adapter(model.lm), torch.no_grad():
        without = model(**batch)["loss"]
    with torch.no_grad():
        assert model(**batch)["loss"] != without


@pytest.mark.parametrize("learns", [True, False])
def test_a_lesson_leaves_adapters_as_they_were(learns: bool) -> None:
    model = with_lora("llama", distil=1.0)
    train_only(model, ("projector", "lora") if learns else ("projector",))
    model.teach_itself()
    adapters = [weight for name, weight in model.lm.named_parameters() if "lora_" in name]
    assert adapters
    for _ in range(2):  # the first pass must not change what the second one finds
        model(**model.batch(LAKES, random.Random(0)))["loss"].backward()
        assert all(weight.requires_grad == learns for weight in adapters)
        assert all((weight.grad is not None) == learns for weight in adapters)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (("tower",), ("compressor.tower.",)),
        (("resampler",), ("compressor.resampler.",)),
        (("projector",), ("fusion.",)),
        (("boundaries",), ("fusion.boundaries",)),
        (("lora",), ("lora_",)),
        (("embeddings",), ("embed_tokens",)),
        (("resampler", "boundaries"), ("compressor.resampler.", "fusion.boundaries")),
    ],
)
def test_only_the_parts_that_are_named_learn(parts: tuple[str, ...], names: tuple[str, ...]) -> None:
    model = with_lora("llama")
    train_only(model, parts)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == any(part in name for part in names), name


def test_a_generator_learns_without_its_embeddings_unless_they_are_named() -> None:
    model = model_of("llama")
    for parts in (("generator",), ("generator", "embeddings")):
        train_only(model, parts)
        learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert learning == {name for name, _ in model.named_parameters() if name.startswith("lm.")} - (
            {"lm.model.embed_tokens.weight"} if len(parts) == 1 else set()
        )
    with pytest.raises(ConfigError, match=r"lora only where \[generator.lora\] sets adapters up"):
        train_only(model, ("lora",))
