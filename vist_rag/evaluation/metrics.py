"""Answer metrics of open-domain question answering, with the field's usual normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces. Source: SQuAD's official evaluation script."""
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
    """1.0 if one of the answers stands in the prediction, word by word, after normalisation."""
    padded = f" {normalize_answer(prediction)} "
    return float(any(f" {normalize_answer(answer)} " in padded for answer in answers if normalize_answer(answer)))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": f1,
    "substring": substring_match,
}


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; (nan, nan) where there is nothing."""
    if not len(values):
        return float("nan"), float("nan")
    rows = np.asarray(values, float)
    means = rows[np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
