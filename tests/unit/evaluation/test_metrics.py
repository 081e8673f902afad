from __future__ import annotations

import math

import pytest

from vist_rag.evaluation import bootstrap_interval, exact_match, f1, normalize_answer, substring_match


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Old\tBridge!", "old bridge"),
        ("An apple a day", "apple day"),
        ("a.n. hour", "hour"),  # punctuation goes first, and what is left is an article
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("“quoted”", "“quoted”"),  # ASCII punctuation only, as SQuAD's script
        ("ÉCOLE Straße", "école straße"),
        ("the", ""),
        ("", ""),
        ("1,867", "1867"),
    ],
)
def test_normalisation_is_that_of_squad(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "overlap", "substring"),
    [
        ("The Old Bridge.", ["old bridge"], 1, 1, 1),
        ("the old stone bridge", ["old bridge"], 0, 0.8, 0),  # P 2/3, R 1
        ("in 1867", ["1867", "the year 1867"], 0, 2 / 3, 1),  # best alias: P 1/2, R 1
        ("Curie", ["Marie Curie", "Curie"], 1, 1, 1),
        ("marie marie curie", ["Marie Curie"], 0, 0.8, 1),  # a repeated word counts once
        ("Marie Curieux", ["Curie"], 0, 0, 0),  # words, not characters
        ("École", ["école"], 1, 1, 1),
        ("東京", ["東京"], 1, 1, 1),
        ("Ecole", ["école"], 0, 0, 0),
        ("", ["something"], 0, 0, 0),
        ("", [""], 1, 1, 0),
        ("the", ["a"], 1, 1, 0),  # nothing is left of either
        ("something", [""], 0, 0, 0),
        ("something", [], 0, 0, 0),
    ],
)
def test_metrics_by_hand(prediction: str, answers: list[str], em: float, overlap: float, substring: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(overlap)
    assert substring_match(prediction, answers) == substring


def test_interval_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)
    assert all(math.isnan(bound) for bound in bootstrap_interval([]))


def test_interval_is_that_of_the_binomial() -> None:
    low, high = bootstrap_interval([1.0] * 30 + [0.0] * 70)
    assert low == pytest.approx(0.3 - 1.96 * math.sqrt(0.3 * 0.7 / 100), abs=0.015)
    assert high == pytest.approx(0.3 + 1.96 * math.sqrt(0.3 * 0.7 / 100), abs=0.015)
    assert bootstrap_interval([1.0] * 30 + [0.0] * 70) == (low, high)  # seeded
    wide = bootstrap_interval([1.0] * 3 + [0.0] * 7)
    assert wide[1] - wide[0] > 2 * (high - low)
