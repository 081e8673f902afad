"""Attention by how often a word occurs: against one that looks everywhere alike, and shares added up by hand."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import tiny_compressor
from vist_rag.errors import InputError
from vist_rag.evaluation.bands import WordBands, attention_by_band
from vist_rag.fidelity import words
from vist_rag.inspection import view_memory

TEXTS = ["The old bridge of the river was built in 1867.", "The river runs from the lake to the sea.", "Marie knew it."]
BANDS = WordBands.of(TEXTS, least=(1, 2, 4))


def test_words_are_sorted_by_their_occurrences_whatever_their_capitals() -> None:
    assert BANDS.names == ("1", "2-3", "4+")
    assert [BANDS.band(word) for word in ("bridge", "River", "THE", "unheard-of")] == ["1", "2-3", "4+", "1"]


def test_attention_that_is_spread_evenly_gives_each_band_what_its_room_explains() -> None:
    compressor = tiny_compressor()
    for block in compressor.resampler.blocks:
        torch.nn.init.zeros_(block.query.weight)  # every score is 0
    rows = attention_by_band(compressor, TEXTS, BANDS)
    assert [(row.band, row.words) for row in rows] == [("1", 15), ("2-3", 2), ("4+", 5)]
    for row in rows:
        assert row.ratio == pytest.approx(1, abs=1e-5)
        assert row.ratio_95 == pytest.approx((1, 1), abs=1e-5)


def test_shares_are_those_of_the_characters_of_a_bands_words() -> None:
    compressor = tiny_compressor(seed=3)
    torch.nn.init.normal_(compressor.resampler.blocks[0].query.weight, std=3.0)
    rows = {row.band: row for row in attention_by_band(compressor, TEXTS[:1], BANDS)}
    view, text = view_memory(compressor, TEXTS[0]), TEXTS[0]
    given, room = view.characters(view.attention.sum(0)), view.characters(view.pages.patch_mask[0].float().numpy())
    everywhere = [i for start, end in words(text) for i in range(start, end)]
    the = [0, 1, 2, text.index("the"), text.index("the") + 1, text.index("the") + 2]
    assert rows["4+"].attention == pytest.approx(given[the].sum() / given[everywhere].sum(), rel=1e-5)
    assert rows["4+"].area == pytest.approx(room[the].sum() / room[everywhere].sum(), rel=1e-5)
    assert rows["4+"].ratio == pytest.approx(rows["4+"].attention / rows["4+"].area)
    assert abs(rows["4+"].ratio - 1) > 0.01
    assert sum(row.attention for row in rows.values()) == pytest.approx(1)
    assert sum(row.area for row in rows.values()) == pytest.approx(1)


def test_words_of_another_length_are_left_out() -> None:
    rows = attention_by_band(tiny_compressor(), TEXTS, BANDS, letters=(5, 6))
    assert [(row.band, row.words) for row in rows] == [("1", 3), ("2-3", 2)]  # built, Marie, bridge; river twice
    assert sum(row.attention for row in rows) == pytest.approx(1)


def test_texts_without_a_word_are_refused() -> None:
    with pytest.raises(InputError, match=r"at least one word, got 1 texts"):
        attention_by_band(tiny_compressor(), ["..."], BANDS)
