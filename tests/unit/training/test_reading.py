from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.support.causal import causal_generator
from tests.support.tiny import tiny_compressor
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.generation.prefix_bert import SLOTS, PrefixBertForCausalLM
from vist_rag.training.data import Question
from vist_rag.training.lexical import slots_of
from vist_rag.training.reading import (
    CONTINUE,
    RECONSTRUCT,
    Example,
    MemoryReading,
    answer_example,
    continue_example,
    reconstruct_example,
    window,
)
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
@torch.no_grad()
def test_loss_is_that_of_the_prompt_that_will_be_asked(family: str) -> None:
    """Against compressor, template and generator as the pipeline uses them, one example at a time."""
    compressor, generator = tiny_compressor(), causal_generator(family, seed=1)
    model = MemoryReading(compressor, generator).eval()
    losses, correct, count = 0.0, 0, 0
    table = generator.model.get_input_embeddings()
    batch = model.batch(EXAMPLES, random.Random(0))
    texts = iter(batch["windows"])
    # Training shows what a memory that spells without a slip would.
    generator.fusion.shown = lambda _, latents: model._shown(next(texts), len(latents))  # type: ignore[method-assign]
    for example in EXAMPLES:
        memories = compressor.encode([p.content for p in example.passages]) if not example.raw else []
        raw = [p for p in example.passages if example.raw]
        # The template writes the best passage last; an example has its passages in the order of writing.
        prompt = PromptTemplate().build(example.question, raw[::-1], memories[::-1])
        target = torch.cat(
            (generator.tokenize(" " + example.target), generator.ids([generator.tokenizer.eos_token_id]))
        )
        prompt_embeds = generator.fusion.embed(generator, prompt)
        embeds = torch.cat((prompt_embeds, table(target)))[None]
        prefix = (torch.arange(embeds.shape[1]) < len(prompt_embeds))[None]
        extra = {}
        if isinstance(generator.model, PrefixBertForCausalLM):
            shown = F.pad(generator.fusion.shown_by(generator, prompt), (0, 0, 0, len(target)), value=-1)
            extra = {"prefix_mask": prefix, "shown": shown[None]}
        logits = generator.model(inputs_embeds=embeds, **extra).logits[0, len(prompt_embeds) - 1 : -1]
        losses += float(F.cross_entropy(logits, target, reduction="sum"))
        correct += int((logits.argmax(-1) == target).sum())
        count += len(target)
    out = model(**batch | {"pointers": [[] for _ in EXAMPLES]})  # without the loss of pointing
    assert float(out["loss"]) == pytest.approx(losses / count, rel=1e-4)
    assert float(out["token_accuracy"]) == pytest.approx(correct / count, abs=1e-6)


def test_text_that_is_to_be_written_is_pointed_at() -> None:
    model = model_of()
    example = Example((Passage("a lake"), Passage("to the sea and back to the sea")), "where", "to the sea", raw=True)
    batch = model.batch([example], random.Random(0))
    ids = torch.cat(batch["segments"][0])
    gold = model._gold(
        [batch["segments"][0]], batch["segments"], batch["targets"], batch["pointers"], [], (4, len(ids) + 4)
    )
    written = batch["targets"][0].tolist()
    assert gold[0].sum(1).tolist() == [2, 2, 2, 1]  # both times that it occurs
    assert gold[0, 3].nonzero().tolist() == [[(len(ids) + 4) * SLOTS]]  # the end of the answer has a place of its own
    for token, places in zip(written[:3], gold[0], strict=False):
        at = places.nonzero().flatten()
        assert (at % SLOTS == 0).all()  # text has one word a position
        assert {int(ids[place]) for place in at // SLOTS} == {token}


@pytest.mark.parametrize("size", [None, 9])
def test_latents_that_show_what_is_to_be_written_are_pointed_at(size: int | None) -> None:
    model = model_of()
    text = "the lake " * 12 + "in 1867 " + "the sea " * 12
    batch = model.batch([Example((Passage(text),), "when", "in 1867", raw=False)], random.Random(0))
    latents = model.compressor.count_latents(text)
    memory = torch.zeros(2 + (size or latents), 32)
    prompt = [memory if isinstance(part, int) else part for part in batch["segments"][0]]
    targets = batch["targets"]
    length = sum(map(len, prompt)) + len(targets[0])
    gold = model._gold(
        [prompt], batch["segments"], targets, batch["pointers"], batch["windows"], (len(targets[0]), length)
    )
    memory_at = next(i for i, part in enumerate(batch["segments"][0]) if isinstance(part, int))
    before = sum(len(part) for part in prompt[:memory_at]) + 1
    # What each place shows, from the pieces of the windows.
    pieces, windows, count = batch["windows"][0]
    assert count == latents
    for token, row in zip(targets[0][:-1].tolist(), gold[0], strict=False):
        (place,) = row.nonzero().flatten().tolist()
        group, slot = place // SLOTS - before, place % SLOTS
        inside = [i for i, window in enumerate(windows.tolist()) if window * (len(memory) - 2) // count == group]
        slots = slots_of(windows)
        assert token in [int(pieces[i]) for i in inside if int(slots[i]) == slot]


def test_coarser_memory_is_practised_as_it_will_be_used() -> None:
    model = model_of(rates={0.25: 1.0})
    batch = model.batch(EXAMPLES[:1], random.Random(0))
    assert batch["rates"] == [0.25]
    with torch.no_grad():
        (prompt,) = model._memories(*(batch[name] for name in ("pixel_values", "patch_mask", "text_ids", "rates")))
    memory = model.compressor.encode([EXAMPLES[0].passages[0].content])[0]
    coarse = memory.coarsen(round(len(memory) / 4))
    torch.testing.assert_close(prompt, model.fusion.project(coarse.latents), atol=1e-5, rtol=1e-5)


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
