"""Classes of words, rates, the file, and what the guard says about a passage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vist_rag.checkpoint import embedded_checkpoint, load_compressor
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.fidelity import FIDELITY_FILE, Fidelity, Guard, Rate, glyph_ranges, word_class, words

LATIN = ((0x20, 0x7E), (0xA0, 0x17F), (0x2010, 0x205F))
RATES = {
    "word 3-4": Rate(1000, 10),
    "word 5-8": Rate(1000, 20),
    "digits 3-4": Rate(100, 10),
    "digits 5-8": Rate(100, 30),
    "digits 9-12": Rate(10, 10),
    "identifier 9-12": Rate(200, 164),
    "code 17+": Rate(100, 100),
}


def fidelity(**changes: Any) -> Fidelity:
    fields: dict[str, Any] = {"fingerprint": "f" * 64, "recipe": {"seed": 0}, "glyphs": LATIN, "probe": RATES}
    return Fidelity(**{**fields, **changes})


# ------------------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("river", "word 5-8"),
        ("well-known", "word 9-12"),
        ("don't", "word 5-8"),
        ("A", "word 1-2"),
        ("1867", "digits 3-4"),
        ("12,345", "grouped 5-8"),
        ("$12,345.60", "amount 9-12"),
        ("2024-05-01", "amount 9-12"),
        ("1990s", "ordinal 5-8"),
        ("3rd", "ordinal 3-4"),
        ("AX-4493-QT7", "identifier 9-12"),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", "identifier 17+"),
        ("v2.1.3", "identifier 5-8"),
        ("NASA", "capitals 3-4"),
        ("U.S", "capitals 3-4"),
        ("getName", "camel case 5-8"),
        ("qXyZ", "mixed case 3-4"),
        ("run_it(x)", "code 9-12"),
        ("https://a.example/x?y=1", "code 17+"),
        ("anna@port.org", "code 13-16"),
        ("naïve", "accented 5-8"),
        ("Москва", "cyrillic 5-8"),
        ("Αθήνα", "greek 5-8"),
        ("東京", "cjk 1-2"),
        ("مدينة", "arabic 5-8"),
        ("नगर", "devanagari 3-4"),
        ("1914–1918", "symbol 9-12"),
        ("20°C", "symbol 3-4"),
        ("😀", "symbol 1-2"),
        ("µm", "symbol 1-2"),
    ],
)
def test_a_word_is_classed_by_its_characters_and_its_length(word: str, name: str) -> None:
    assert word_class(word) == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The (old) bridge, 'Sea'.", ["The", "old", "bridge", "Sea"]),
        ("a | AX-1 | - | $4.50 |", ["a", "AX-1", "$4.50"]),
        ("don’t go—now", ["don", "t", "go", "now"]),
        ("from 1914–1918 on", ["from", "1914–1918", "on"]),
        ("\n\t ... ", []),
        ("x x", ["x", "x"]),
        ("R & D = the UK's", ["R", "D", "the", "UK"]),
        ("a 2,000-year-old, 18th-century one", ["a", "2,000", "year", "old", "18th", "century", "one"]),
        ("AX-44 on 2024-05-01", ["AX-44", "on", "2024-05-01"]),
    ],
)
def test_words_stand_between_white_space_without_the_punctuation_around_them(text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in words(text)] == found


# -------------------------------------------------------------------------------------------------------------- rates


def test_a_class_has_its_own_rate_and_a_small_one_that_of_its_kind() -> None:
    known = fidelity()
    assert known.misread("AX-4493-QT7") == 0.82
    assert known.misread("1867") == 0.1
    assert known.misread("123456789") == pytest.approx(50 / 210)  # ten words of its own are too few
    assert known.misread("123456789012345678") == pytest.approx(50 / 210)


def test_what_was_never_measured_and_what_has_no_glyph_is_lost() -> None:
    known = fidelity()
    assert known.misread("Москва") == 1.0  # no glyph
    assert known.misread("naïve") == 1.0  # a glyph, but nobody measured
    assert fidelity(probe={"accented 5-8": Rate(100, 5)}).misread("naïve") == 0.05
    assert fidelity(probe={"cyrillic 5-8": Rate(100, 5)}).misread("Москва") == 1.0
    assert fidelity(probe={"cyrillic 5-8": Rate(100, 5)}, glyphs=None).misread("Москва") == 0.05
    assert known.lacking("a\u200bb\u00e9 и и") == 2  # what shows nothing lacks nothing


def test_the_spellers_rates_come_before_the_probes() -> None:
    known = fidelity(speller={"digits 3-4": Rate(100, 40)})
    assert known.misread("1867") == 0.4
    assert known.misread("river") == 1.0


def test_glyph_ranges_hold_every_code_point_and_no_other() -> None:
    assert glyph_ranges([32, 33, 34, 40, 42, 43]) == ((32, 34), (40, 40), (42, 43))
    assert glyph_ranges([]) == ()


# --------------------------------------------------------------------------------------------------------------- file


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = fidelity(speller={"word 3-4": Rate(5, 1)})
    assert known.save(tmp_path) == tmp_path / FIDELITY_FILE
    assert Fidelity.load(tmp_path, "f" * 64) == known


def test_a_compressor_that_was_never_measured_has_none(tmp_path: Path) -> None:
    assert Fidelity.load(tmp_path, "f" * 64) is None


def test_the_file_of_another_compressor_is_refused(tmp_path: Path) -> None:
    fidelity().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be of compressor aaaaaaaaaaaa, got ffffffffffff; measure anew"):
        Fidelity.load(tmp_path, "a" * 64)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"probe"', '"prove"'),
        lambda text: text.replace('"wrong"', '"bad"'),
        lambda text: text.replace('"format": 1', '"format": 2'),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = fidelity().save(tmp_path)
    path.write_text(damage(path.read_text("utf-8")), "utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Fidelity.load(tmp_path, "f" * 64)


def test_the_embedded_model_is_measured() -> None:
    directory = embedded_checkpoint()
    compressor = load_compressor(directory)
    known = Fidelity.load(directory / "compressor", compressor.fingerprint)
    assert known is not None
    assert known.glyphs == glyph_ranges(compressor.renderer.atlas.codepoints.tolist())
    assert known.speller is not None
    assert json.loads((directory / "compressor" / FIDELITY_FILE).read_text("utf-8"))["fingerprint"] == (
        compressor.fingerprint
    )
    assert known.misread("river") < 0.05 < known.misread("123456789012") < known.misread("AX-4493-QT7")


# -------------------------------------------------------------------------------------------------------------- guard


def test_a_word_over_the_threshold_is_told_with_its_kind_and_rate() -> None:
    guard = Guard(fidelity(), word=0.5)
    assert guard("Part AX-4493-QT7 and the part BX-4493-QT7 are old.") == (
        "identifier: `BX-4493-QT7` is misread in 82 % of cases; 2 of 8 words at risk"
    )
    assert Guard(fidelity(), word=0.9)("Part AX-4493-QT7 and the part BX-4493-QT7 are old.") is None


def test_many_words_that_are_a_little_uncertain_are_too_many() -> None:
    text = "12345 23456 34567 45678 river"
    assert Guard(fidelity(), word=0.5, share=0.3)(text) is None
    assert Guard(fidelity(), word=0.5, share=0.2)(text) == ("24 % of 5 words are expected to be misread")


def test_characters_without_a_glyph_are_told_first() -> None:
    guard = Guard(fidelity())
    assert guard("the river in Москва") == "32 % of characters have no glyph"
    lost = guard(f"{'the river and the sea ' * 20}и")
    assert lost == "cyrillic: `и` is misread in 100 % of cases; 1 of 101 words at risk"


def test_a_name_without_its_accent_is_still_known_and_one_without_a_glyph_is_not() -> None:
    assert Guard(fidelity())(f"{'the river and the sea ' * 2}of Dürer") is None
    assert Guard(fidelity(), share=0.05)(f"{'the river and the sea ' * 2}of Dürer") is not None
    lost = Guard(fidelity(), lacking=0.5)(f"{'the river and the sea ' * 2}of Dứrer")
    assert lost == "accented: `Dứrer` is misread in 100 % of cases; 1 of 12 words at risk"


@pytest.mark.parametrize("text", ["", " \n", "The river runs to the sea.", "Built in 1867."])
def test_ordinary_prose_is_left_alone(text: str) -> None:
    assert Guard(fidelity())(text) is None


def test_the_risk_of_a_text_is_the_sum_over_its_words() -> None:
    risk = Guard(fidelity(), word=0.3).risk("river 1867 12345 AX-4493-QT7")
    assert (risk.words, risk.at_risk, risk.worst, risk.rate) == (4, 2, "AX-4493-QT7", 0.82)
    assert risk.expected == pytest.approx(0.02 + 0.1 + 0.3 + 0.82)


def test_a_passage_is_looked_at_once() -> None:
    guard, looked = Guard(fidelity()), []
    object.__setattr__(guard, "risk", lambda text: looked.append(text) or Guard(guard.fidelity).risk(text))
    assert guard("Part AX-4493-QT7") == guard("Part AX-4493-QT7") is not None
    assert looked == ["Part AX-4493-QT7"]


@pytest.mark.parametrize("name", ["word", "share", "lacking"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_thresholds_are_shares(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be above 0"):
        Guard(fidelity(), **{name: value})
