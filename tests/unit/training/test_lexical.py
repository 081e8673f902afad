from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.support.tiny import tiny_compressor, tiny_generator, tiny_tokenizer
from vist_rag.compression import VistCompressor
from vist_rag.generation import VistGenerator
from vist_rag.training.counts import count_tokens
from vist_rag.training.lexical import LexicalAlignment, WordSalad, lexical_batch, pack, piece_salience, window_salience
from vist_rag.training.objectives import Pve
from vist_rag.training.tower import TowerReading

TEXTS = ["The old bridge was built in 1867", "the river runs from a lake to the sea", "marie curie"]


def parts() -> tuple[VistCompressor, VistGenerator, Tensor]:
    compressor, generator = tiny_compressor(), tiny_generator()
    words = generator.model.get_input_embeddings().weight
    assert isinstance(words, Tensor)
    return compressor, generator, words


def test_each_piece_belongs_to_the_latent_whose_window_shows_its_middle() -> None:
    compressor, generator, _ = parts()
    tokenizer = generator.tokenizer.backend_tokenizer
    batch = lexical_batch(TEXTS, compressor, tokenizer)
    pages = compressor.renderer.render(TEXTS)
    checked = 0
    for (page, latent), piece in zip(batch["latents"].tolist(), batch["pieces"].tolist(), strict=True):
        spans = pages.char_spans[page, latent * 4 : latent * 4 + 4]
        used = pages.patch_mask[page, latent * 4 : latent * 4 + 4]
        begin, end = int(spans[used][:, 0].min()), int(spans[used][:, 1].max())
        # The piece, as its tokenizer writes it, is in (or at a border of) what the window shows.
        spelt = tokenizer.id_to_token(piece).removeprefix("##")
        shown = TEXTS[int(pages.text_ids[page])][max(0, begin - len(spelt)) : end + len(spelt)].lower()
        assert spelt in shown
        checked += 1
    # No piece is lost: as many as the tokenizer makes.
    assert checked == sum(len(e.ids) for e in tokenizer.encode_batch(TEXTS, add_special_tokens=False))


def test_a_window_means_the_mean_of_its_pieces() -> None:
    words = torch.randn(100, 8) + 0.3
    centre, places, written = words.mean(0), torch.tensor([0, 0, 0, 2]), torch.tensor([5, 77, 5, 4])
    packed = pack(words[written], places, 3, centre)
    torch.testing.assert_close(packed, torch.stack((words[[5, 77, 5]].mean(0), centre, words[4])))


def test_rare_pieces_matter_more_and_windows_as_much_as_their_pieces() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    salience = piece_salience(tokenizer, ["the river the lake", "the the the sea"] * 20)
    the, sea, bridge = (tokenizer.token_to_id(word) for word in ("the", "sea", "bridge"))
    assert 0 <= salience[the] < salience[sea] < salience[bridge] == 1
    matter = window_salience(torch.tensor([the, sea, bridge]), torch.tensor([0, 2, 2]), 3, salience)
    torch.testing.assert_close(matter, torch.stack((salience[the], torch.tensor(0.0), salience[sea] + 1)))


def test_latents_learn_how_much_they_matter() -> None:
    compressor, generator, words = parts()
    compressor = tiny_compressor(salience=True)
    generator.fusion = tiny_generator(memory_width=compressor.resampler_config.memory_width).fusion
    tokenizer = generator.tokenizer.backend_tokenizer
    model = LexicalAlignment(compressor, generator.fusion, words, salience=piece_salience(tokenizer, TEXTS))
    batch = lexical_batch(TEXTS, compressor, tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        figures = model(**batch)
        figures["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert figures["salience_error"] < 0.1
    memory, shown = compressor.encode(TEXTS[:1])[0], lexical_batch(TEXTS[:1], compressor, tokenizer)
    assert model.salience is not None
    goal = window_salience(shown["pieces"], shown["latents"][:, 1], len(memory), model.salience)
    assert torch.corrcoef(torch.stack((memory.latents[:, 0], goal)))[0, 1] > 0.9


@pytest.mark.parametrize("with_heads", [False, True])
def test_latents_learn_the_words_of_their_window(with_heads: bool) -> None:
    compressor, generator, words = parts()
    heads = TowerReading(compressor.tower, words.detach().clone()) if with_heads else None
    model = LexicalAlignment(compressor, generator.fusion, words, heads)
    compressor.tower.requires_grad_(with_heads)
    tower = {k: v.clone() for k, v in compressor.tower.state_dict().items()}
    tokenizer = generator.tokenizer.backend_tokenizer
    batch = lexical_batch(TEXTS, compressor, tokenizer, reading=with_heads, spelling=20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    recalls = []
    for _ in range(50):
        figures = model(**batch)
        figures["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        recalls.append(float(figures["piece_accuracy"]))
    assert recalls[0] < 0.5 < 0.9 < recalls[-1]
    assert figures["spelt"] > 0.9
    assert ("character_accuracy" in figures) == with_heads
    changed = any(not torch.equal(v, tower[k]) for k, v in compressor.tower.state_dict().items())
    assert changed == with_heads
    assert torch.equal(words, tiny_generator().model.get_input_embeddings().weight)


def test_the_spelling_that_is_taught_is_the_text() -> None:
    compressor, generator, _ = parts()
    texts = ["The old bridge (1867), by Marie Curie.", "illicit ilililil", "", "em\u2014dash", "runs to the sea " * 60]
    batch = lexical_batch(texts, compressor, generator.tokenizer.backend_tokenizer, spelling=20)
    pages = compressor.renderer.render(texts)
    spelt = [""] * len(texts)
    for text, classes in zip(pages.text_ids.tolist(), batch["spelling"].flatten(1).tolist(), strict=True):
        spelt[text] += "".join("?" if c > 95 else chr(32 + c) for c in classes if c != 95)
    assert spelt == [text.replace("\u2014", "?") for text in texts]


def test_salad_draws_every_piece_about_as_often() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    salad = WordSalad(["the river " * 100, "lake lake-sea lake-the " * 4, "once " * 2], tokenizer)
    rng = random.Random(0)
    counts = Counter(word for _ in range(300) for word in salad(60, rng).split())
    assert set(counts) == {"the", "river", "lake", "lake-sea", "lake-the"}  # less than three times: left out
    # 4 of 212 words in running text. Here "river" stands alone for its piece, "lake" shares it with two other words.
    assert 2 < counts["river"] / counts["lake"] < 4
    assert 1.3 < counts["river"] / counts["the"] < 3


def test_salad_is_as_long_as_asked_and_the_same_again() -> None:
    salad = WordSalad(["the old bridge was built by marie curie " * 3], tiny_tokenizer().backend_tokenizer)
    for characters in (1, 10, 200):
        text = salad(characters, random.Random(1))
        assert text == salad(characters, random.Random(1))
        assert 0 < len(text) <= max(characters, len("bridge"))
    assert len(salad(200, random.Random(1))) > 180


def test_pages_are_drawn_to_their_words() -> None:
    compressor, generator, words = parts()
    pve = Pve(count_tokens(TEXTS, generator.tokenizer).importance, weight=5.0)
    model = LexicalAlignment(compressor, generator.fusion, words, pve=pve)
    batch = lexical_batch(TEXTS, compressor, generator.tokenizer.backend_tokenizer, pve=pve, rng=random.Random(0))
    plain = LexicalAlignment(compressor, generator.fusion, words)(**batch)
    assert "pve" not in plain
    first = model(**batch)
    torch.testing.assert_close(first["loss"], plain["loss"] + first["pve"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        figures = model(**batch)
        figures["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert figures["pve"] < 0.2 * first["pve"]


def test_which_pieces_draw_depends_on_the_mask() -> None:
    compressor, generator, _ = parts()
    tokenizer, kept = generator.tokenizer.backend_tokenizer, {}
    texts = [*TEXTS, "", "\u200b"]  # a page without a word is left out
    importance = count_tokens([*TEXTS, *["the a the"] * 9], generator.tokenizer).importance
    for mode in ("none", "random", "frequency"):
        pve = Pve(importance, mask=mode)
        kept[mode] = lexical_batch(texts, compressor, tokenizer, pve=pve, rng=random.Random(0))["kept_words"]
    counts = [len(encoding.ids) for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    assert kept["none"].all()
    assert len(kept["none"]) == sum(counts)
    for mode in ("random", "frequency"):
        assert [int((~row).sum()) for row in kept[mode].split(counts)] == [round(0.5 * count) for count in counts]
    assert not torch.equal(kept["random"], kept["frequency"])


def test_heads_leave_a_tower_that_has_learned_as_it_is() -> None:
    compressor, _, words = parts()
    before = {name: weight.clone() for name, weight in compressor.tower.state_dict().items()}
    TowerReading(compressor.tower, words.detach())
    assert all(torch.equal(weight, before[name]) for name, weight in compressor.tower.state_dict().items())
    TowerReading(compressor.tower, words.detach(), fresh=True)
    changed = {name for name, weight in compressor.tower.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"model.embeddings.position_embeddings"}
