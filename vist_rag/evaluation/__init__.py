"""Evaluation: metrics, and the same questions read in several ways, side by side."""

from vist_rag.evaluation.conditions import CONDITIONS, EvalQuestion, evaluate_conditions
from vist_rag.evaluation.metrics import bootstrap_interval, exact_match, f1, normalize_answer, substring_match

__all__ = [
    "CONDITIONS",
    "EvalQuestion",
    "bootstrap_interval",
    "evaluate_conditions",
    "exact_match",
    "f1",
    "normalize_answer",
    "substring_match",
]
