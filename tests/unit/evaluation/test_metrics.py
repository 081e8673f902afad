from __future__ import annotations

import math
import sys
import unicodedata

import pytest

from vist_rag.errors import ConfigError, InputError, MissingDependencyError
from vist_rag.evaluation.metrics import (
    boost_rate,
    bootstrap_interval,
    exact_match,
    f1,
    holds_answer,
    normalize_answer,
    paired_difference,
    recall_at_k,
    regex_match,
    regex_substring,
    resilience_rate,
    score_answer,
    substring_match,
)

COMPOSED, DECOMPOSED = "Café Zoë", unicodedata.normalize("NFD", "Café Zoë")


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
        ("?!...", ""),
        ("1,867", "1867"),
        (DECOMPOSED, "café zoë"),
        ("ﬁsh ４２", "ﬁsh ４２"),  # compatibility characters are others, not the same ones
        ("İstanbul", "i\u0307stanbul"),  # Python's lower case: a dot that combines with i stays
        ("IRMAK Iğdır", "irmak iğdır"),  # not Turkish rules: I becomes i
        ("\u00a0an\u3000answer ", "answer"),  # any white space
    ],
)
def test_normalisation_is_that_of_squad_after_composition(text: str, normal: str) -> None:
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
        (DECOMPOSED, [COMPOSED], 1, 1, 1),
        (COMPOSED, [DECOMPOSED], 1, 1, 1),
        ("at " + DECOMPOSED, ["nowhere", COMPOSED], 0, 0.8, 1),  # P 2/3, R 1
        ("İstanbul", ["I\u0307stanbul"], 1, 1, 1),
        ("ISPARTA", ["ısparta"], 0, 0, 0),  # dotless i is a letter of its own
        ("東京", ["東京"], 1, 1, 1),
        ("東京です", ["東京"], 0, 0, 0),  # running text has no words to align with
        ("首都 東京", ["東京"], 0, 2 / 3, 1),
        ("ﬁsh", ["fish"], 0, 0, 0),
        ("Ecole", ["école"], 0, 0, 0),
        ("", ["something"], 0, 0, 0),
        (" \n", ["something"], 0, 0, 0),
        ("", [""], 1, 1, 0),
        ("the", ["a"], 1, 1, 0),  # nothing is left of either
        ("?!", ["..."], 1, 1, 0),
        ("something", [""], 0, 0, 0),
        ("something", ["", "Something"], 1, 1, 1),
        ("something", [], 0, 0, 0),
    ],
)
def test_metrics_by_hand(prediction: str, answers: list[str], em: float, overlap: float, substring: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(overlap)
    assert substring_match(prediction, answers) == substring
    assert score_answer(prediction, answers) == {"em": em, "f1": pytest.approx(overlap), "substring": substring}
    assert holds_answer(prediction, answers) is bool(substring)


@pytest.mark.parametrize(
    ("prediction", "patterns", "match", "search"),
    [
        ("1867", ["1867"], 1, 1),
        ("in 1867", ["1867"], 0, 1),  # DrQA matches from the start,
        ("1867 or so", ["1867"], 1, 1),  # and the prediction may go on
        ("  1867", ["1867"], 1, 1),
        ("Mt. EVEREST", [r"(Mt\.?|Mount)\s?Everest"], 1, 1),
        ("Mount  Everest", [r"(Mt\.?|Mount)\s?Everest"], 0, 0),
        ("nothing", ["some", "no.*"], 1, 1),
        ("Nairobi\nKenya", ["^Kenya$"], 0, 1),  # ^ and $ are those of lines
        (DECOMPOSED, ["café"], 1, 1),
        (COMPOSED, [unicodedata.normalize("NFD", "café")], 1, 1),
        ("the 5", ["5"], 0, 1),  # articles stay
        ("", [".*"], 0, 0),  # who says nothing has not answered
        (" ", ["(x)?"], 0, 0),
        ("anything", [], 0, 0),
    ],
)
def test_regular_expressions_by_hand(prediction: str, patterns: list[str], match: float, search: float) -> None:
    assert regex_match(prediction, patterns) == match
    assert regex_substring(prediction, patterns) == search
    assert score_answer(prediction, patterns, regex=True) == {"em": match, "f1": match, "substring": search}
    assert holds_answer(prediction, patterns, regex=True) is bool(search)


@pytest.mark.parametrize("prediction", ["Paris", ""])
def test_a_broken_pattern_is_named(prediction: str) -> None:
    with pytest.raises(InputError, match=r"answer pattern must be a regular expression, got '\(Paris'"):
        score_answer(prediction, ["Paris", "(Paris"], regex=True)


def test_a_pattern_is_plain_text_unless_it_is_said() -> None:
    assert score_answer("Paris", ["P.*"]) == {"em": 0, "f1": 0, "substring": 0}
    assert not holds_answer("Paris", ["P.*"])


def test_recall_by_hand() -> None:
    hits = [[False, True, False], [True], [], [False, False, False, True]]
    assert recall_at_k(hits, (1, 2, 3, 4, 100)) == {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.75, 100: 0.75}
    assert recall_at_k([[True], [True, True]], [1]) == {1: 1.0}
    assert math.isnan(recall_at_k([], [5])[5])
    with pytest.raises(ConfigError, match="k of recall@k must be 1 or more, got 0"):
        recall_at_k(hits, [1, 0])


def test_resilience_and_boost_by_hand() -> None:
    closed = [1, 1, 1, 0, 0, 0, 0, 0]
    passages = [1, 1, 0, 1, 0, 0, 0, 0]
    assert resilience_rate(closed, passages) == pytest.approx(2 / 3)
    assert boost_rate(closed, passages) == pytest.approx(1 / 5)
    assert resilience_rate([0.0, 0.0], [1.0, 0.0]) is None  # none was right
    assert boost_rate([0.0, 0.0], [1.0, 0.0]) == 0.5
    assert resilience_rate([1.0], [1.0]) == 1.0
    assert boost_rate([1.0], [1.0]) is None
    assert resilience_rate([], []) is boost_rate([], []) is None


@pytest.mark.parametrize("rate", [resilience_rate, boost_rate])
def test_rates_are_of_right_and_wrong_on_the_same_questions(rate: type) -> None:
    with pytest.raises(ConfigError, match="must score the same questions in the same order, got 2 and 1"):
        rate([1, 0], [1])
    with pytest.raises(ConfigError, match=r"closed must hold scores of 0 or 1, got 0\.5; use em or substring"):
        rate([1, 0.5], [1, 1])
    with pytest.raises(ConfigError, match=r"with_passages must hold scores of 0 or 1, got 0\.8"):
        rate([1, 0], [1, 0.8])


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


def test_mcnemar_by_hand() -> None:
    pytest.importorskip("scipy")
    # Nine wins and one loss among ten questions that differ: 2 * (1 + 10) / 2^10. Where both agree does not matter.
    a = [1.0] * 9 + [0.0] + [1.0] * 20 + [0.0] * 10
    b = [0.0] * 9 + [1.0] + [1.0] * 20 + [0.0] * 10
    found = paired_difference(a, b)
    assert (found["wins"], found["losses"]) == (9, 1)
    assert found["difference"] == pytest.approx(8 / 40)
    assert found["p"] == pytest.approx(22 / 1024)
    low, high = found["difference_95"]
    sd = math.sqrt((10 / 40 - 0.2**2) / 40)
    assert low == pytest.approx(0.2 - 1.96 * sd, abs=0.03)
    assert high == pytest.approx(0.2 + 1.96 * sd, abs=0.03)
    other = paired_difference(b, a)
    assert (other["difference"], other["wins"], other["losses"]) == (-found["difference"], 1, 9)
    assert other["p"] == pytest.approx(found["p"])


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """All of ten differences up: few enough that every flip of signs is tried, and 2 of 2^10 are as far from 0."""
    pytest.importorskip("scipy")
    b = [i / 10 for i in range(10)]
    found = paired_difference([value + 0.05 for value in b], b)
    assert found["difference_95"] == [pytest.approx(0.05), pytest.approx(0.05)]
    assert found["p"] == pytest.approx(2 / 1024)
    assert (found["wins"], found["losses"]) == (10, 0)


def test_permutation_of_many_is_seeded() -> None:
    pytest.importorskip("scipy")
    a, b = [0.3, 0.7, 0.5] * 10, [0.4, 0.5, 0.5] * 10
    found = paired_difference(a, b, seed=1)
    assert found == paired_difference(a, b, seed=1)
    assert found["p"] != paired_difference(a, b, seed=2)["p"]
    assert (found["wins"], found["losses"]) == (10, 10)
    # Signs of ten differences of 0.1 and of ten of 0.2, in tenths: a variance of 10 * 1 + 10 * 4, sums two apart. They
    # sum to 10 here; the normal approximation begins one before.
    assert found["p"] == pytest.approx(math.erfc(9 / math.sqrt(50) / math.sqrt(2)), abs=0.03)


def test_no_difference_is_no_evidence() -> None:
    pytest.importorskip("scipy")
    for scores in ([1.0, 0.0], [0.5, 0.25]):
        assert paired_difference(scores, scores) == {
            "difference": 0, "difference_95": [0, 0], "wins": 0, "losses": 0, "p": 1,
        }  # fmt: skip


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a and b must score the same questions in the same order, got 1 and 2"):
        paired_difference([1], [1, 0])
    with pytest.raises(ConfigError, match="a and b must score at least one question, got none"):
        paired_difference([], [])
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingDependencyError, match=r"needs scipy, which is not installed; pip install .*\[eval\]"):
        paired_difference([1], [0])
