"""Evaluation: the same questions answered in several ways, side by side, and what each answer costs.

- What is asked: ``task``, ``qa``, ``icl``, ``lm``; from ``datasets`` (``layouts``, ``corpora``, ``rows``, ``sources``).
- How passages are handed over: ``methods``. How answers are judged: ``metrics``.
- A run: ``harness``; what it leaves: ``results``, ``provenance``; what people see: ``report`` (``result_files``,
  ``tables``, ``plots``).
- What it costs: ``costs``, ``meters``, ``paper_costs``; in time: ``latency``.
- The bundled questions, for ``vist-rag demo``: ``demo``, ``conditions``.
"""

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
