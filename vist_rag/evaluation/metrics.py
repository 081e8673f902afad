"""Answer metrics of open-domain question answering, with the field's usual normalisation.

Strings that count as answers are compared after :func:`normalize_answer`; where the answers are regular expressions
(CuratedTREC), they are compared as DrQA does. A score is 0 or 1, save F1.
"""

from __future__ import annotations

import importlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from vist_rag.errors import ConfigError, InputError, MissingDependencyError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
RESAMPLES = 2000
"""Of the bootstrap and of the permutation test."""


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces. Source: SQuAD's official evaluation script.

    One step comes before it: canonical composition (NFC). The same letter can be written as one character or as a base
    with marks behind it, which look alike and compare unequal; a tokenizer that decomposes, or a corpus typed on
    another system, would otherwise lose every accented answer. NFC joins only what Unicode calls the same text: ASCII
    stays as it is, and so do compatibility characters (``ﬁ``, full-width letters).
    """
    text = unicodedata.normalize("NFC", text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers, after normalisation."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Word overlap with the answer that fits best: harmonic mean of precision and recall, in 0..1."""
    return max((_f1(normalize_answer(prediction).split(), normalize_answer(a).split()) for a in answers), default=0.0)


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


def substring_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if one of the answers stands in the prediction, word by word, after normalisation.

    Words are what white space separates: in Chinese, Japanese or Thai running text an answer is found only where the
    text sets it off.
    """
    padded = f" {normalize_answer(prediction)} "
    return float(any(f" {normal} " in padded for normal in map(_normalized, answers) if normal))


# One answer is looked for in many passages.
@lru_cache(maxsize=65536)
def _normalized(answer: str) -> str:
    return normalize_answer(answer)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": f1,
    "substring": substring_match,
}


@lru_cache(maxsize=65536)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """An answer that is a regular expression, with DrQA's flags, composed (NFC) as predictions are.

    Raises:
        InputError: If it is no regular expression.
    """
    try:
        return re.compile(unicodedata.normalize("NFC", pattern), re.IGNORECASE | re.UNICODE | re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"answer pattern must be a regular expression, got {pattern[:60]!r} ({error}); escape its special "
            "characters, or give the answers as plain strings."
        ) from error


def regex_match(prediction: str, patterns: Sequence[str]) -> float:
    """1.0 if one of the patterns matches from the start of the prediction; nothing is normalised but white space, NFC.

    As in DrQA's ``regex_match_score``, the prediction may go on after the match. An empty prediction matches nothing,
    not even ``.*``.

    Raises:
        InputError: If a pattern is no regular expression.
    Source: facebookresearch/DrQA, drqa/reader/utils.py.
    """
    text, compiled = _ready(prediction, patterns)
    return float(any(pattern.match(text) for pattern in compiled))


def regex_substring(prediction: str, patterns: Sequence[str]) -> float:
    """1.0 if one of the patterns matches anywhere in the prediction.

    Raises:
        InputError: If a pattern is no regular expression.
    """
    text, compiled = _ready(prediction, patterns)
    return float(any(pattern.search(text) for pattern in compiled))


def _ready(prediction: str, patterns: Sequence[str]) -> tuple[str, list[re.Pattern[str]]]:
    compiled = [compile_pattern(pattern) for pattern in patterns]
    text = unicodedata.normalize("NFC", prediction).strip()
    return text, compiled if text else []


def score_answer(prediction: str, answers: Sequence[str], *, regex: bool = False) -> dict[str, float]:
    """``em``, ``f1`` and ``substring`` of one prediction.

    Args:
        prediction: What the model wrote.
        answers: What counts as right; the best one counts.
        regex: The answers are regular expressions. Then ``em`` is :func:`regex_match`, ``f1`` is the same (a pattern
            has no words to overlap with), and ``substring`` is :func:`regex_substring`.
    Raises:
        InputError: If ``regex``, and an answer is no regular expression.
    """
    if not regex:
        return {name: metric(prediction, answers) for name, metric in METRICS.items()}
    match = regex_match(prediction, answers)
    return {"em": match, "f1": match, "substring": regex_substring(prediction, answers)}


def holds_answer(text: str, answers: Sequence[str], *, regex: bool = False) -> bool:
    """Whether a passage holds one of the answers: word by word after normalisation, or anywhere for a regex.

    Raises:
        InputError: If ``regex``, and an answer is no regular expression.
    """
    return bool(regex_substring(text, answers) if regex else substring_match(text, answers))


def recall_at_k(ranks_hit: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[int, float]:
    """Share of questions with a hit among the first k passages, for each k; nan where there are no questions.

    Args:
        ranks_hit: For each question, whether each passage is a hit, best passage first. May be shorter than k: what
            was not retrieved is no hit.
        ks: Numbers of passages.
    Raises:
        ConfigError: If a k is below 1.
    """
    if low := [k for k in ks if k < 1]:
        raise ConfigError(f"k of recall@k must be 1 or more, got {low[0]}.")
    n = len(ranks_hit)
    return {k: sum(any(hits[:k]) for hits in ranks_hit) / n if n else float("nan") for k in ks}


def resilience_rate(closed: Sequence[float], with_passages: Sequence[float]) -> float | None:
    """Of the questions that are right without passages, the share that stays right with them.

    Args:
        closed: 0 or 1 for each question, answered without passages.
        with_passages: The same questions, answered with them.
    Returns:
        In 0..1; None where none was right without passages.
    Raises:
        ConfigError: If the two differ in length, or a score is neither 0 nor 1.
    Source: xRAG, arXiv:2405.13792, section 5.
    """
    return _right_among(closed, with_passages, 1.0)


def boost_rate(closed: Sequence[float], with_passages: Sequence[float]) -> float | None:
    """Of the questions that are wrong without passages, the share that becomes right with them.

    Args, raises and source are those of :func:`resilience_rate`; None where none was wrong without passages.
    """
    return _right_among(closed, with_passages, 0.0)


def _right_among(closed: Sequence[float], with_passages: Sequence[float], before: float) -> float | None:
    _check_pairs("closed", closed, "with_passages", with_passages)
    for name, scores in (("closed", closed), ("with_passages", with_passages)):
        if other := [score for score in scores if score not in (0, 1)]:
            raise ConfigError(f"{name} must hold scores of 0 or 1, got {other[0]}; use em or substring, not f1.")
    after = [score for was, score in zip(closed, with_passages, strict=True) if was == before]
    return sum(after) / len(after) if after else None


def _check_pairs(name: str, one: Sequence[float], other_name: str, other: Sequence[float]) -> None:
    if len(one) != len(other):
        raise ConfigError(
            f"{name} and {other_name} must score the same questions in the same order, got {len(one)} and {len(other)}."
        )


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; (nan, nan) where there is nothing."""
    if not len(values):
        return float("nan"), float("nan")
    rows = np.asarray(values, float)
    means = rows[np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """How much better ``a`` is than ``b`` on the same questions, and whether that can be chance.

    Args:
        a: A score for each question.
        b: The scores of what it is compared with, in the same order.
        seed: Of the bootstrap and of the permutation test.
    Returns:
        ``difference``, the mean of a - b; ``difference_95``, its 95 % percentile bootstrap interval over questions;
        ``wins`` and ``losses``, questions on which a is above and below b; ``p``, two-sided, of McNemar's exact test
        where all scores are 0 or 1, else of a permutation test that flips the signs of the differences.
    Raises:
        ConfigError: If the two differ in length, or there are no questions.
        MissingDependencyError: If scipy is not installed.
    """
    _check_pairs("a", a, "b", b)
    if not len(a):
        raise ConfigError("a and b must score at least one question, got none.")
    one, other = np.asarray(a, float), np.asarray(b, float)
    differences = one - other
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "difference": float(differences.mean()),
        "difference_95": list(bootstrap_interval(differences.tolist(), seed=seed)),
        "wins": wins,
        "losses": losses,
        "p": _p_value(differences, wins, losses, binary=bool(np.isin([one, other], (0, 1)).all()), seed=seed),
    }


def _p_value(differences: Any, wins: int, losses: int, *, binary: bool, seed: int) -> float:
    try:
        stats = importlib.import_module("scipy.stats")  # only comparisons need it
    except ImportError as error:
        raise MissingDependencyError("Testing a paired difference", "scipy", "eval") from error
    if not wins + losses:
        return 1.0
    if binary:
        return float(stats.binomtest(wins, wins + losses).pvalue)
    test = stats.permutation_test(
        (differences,),
        lambda sample, axis: sample.mean(axis),
        permutation_type="samples",  # of one sample: signs are flipped
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=64,  # resamples in memory at a time, each as long as the data set
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)
