"""Synthetic result files: seeded random numbers in the shape of ``vist-rag eval``'s, measured of nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATES = (1.5, 2.3, 4.0, 8.0)
_CEILING = {
    "raw": 0.52,
    "truncated": 0.30,
    "frequency": 0.24,
    "llmlingua2": 0.36,
    "memory": 0.40,
    "memory_matched": 0.34,
    "slow_fast": 0.44,
    "mean_pool": 0.28,
    "text_encoder": 0.41,
    "text_encoder_flat": 0.38,
}


def cell(method: str, rate: float | None, em: float, *, origin: float = 150.0, **other: Any) -> dict[str, Any]:
    """One method at one rate, with an interval of six points of a hundred to either side."""
    tokens = 0.0 if method == "closed_book" else round(origin / (rate or 1), 1)
    row: dict[str, Any] = {"method": method, "rate": rate, "tokens": None, "questions": 300}
    for metric, value in (("em", em), ("f1", em + 0.08), ("substring", em + 0.05)):
        row[metric] = round(value, 4)
        row[f"{metric}_95"] = [round(max(0, value - 0.06), 4), round(min(1, value + 0.06), 4)]
    row |= {"origin_tokens": origin, "compressed_tokens": tokens, "ratio": rate and round(rate * 1.02, 2)}
    row |= {"prompt_tokens": tokens + 16.3, "completion_tokens": 4.2, "passages_read": 1.0, "ms": round(20 + tokens, 1)}
    return row | {"resilience": None, "boost": round(em, 3)} | other


def pair(method: str, rate: float, difference: float, half: float = 0.04, **other: Any) -> dict[str, Any]:
    """A paired test of a method against ``memory`` at the same rate."""
    interval = [round(difference - half, 4), round(difference + half, 4)]
    row = {"method": method, "rate": rate, "against": "memory", "against_rate": rate, "metric": "em"}
    row |= {"difference": difference, "difference_95": interval, "wins": 10, "losses": 25, "p": 0.02}
    return row | other


def block(cells: Sequence[dict[str, Any]], paired: Sequence[dict[str, Any]] = (), **other: Any) -> dict[str, Any]:
    """A block of question answering; ``other`` replaces any key."""
    return {
        "format": "vist-rag-eval/1",
        "name": "synthetic-dev-gold-k1",
        "task": "qa",
        "dataset": "synthetic",
        "split": "dev",
        "passages": "gold",
        "top_k": 1,
        "questions": 300,
        "seed": 0,
        "date": "2001-02-03T04:05:06+00:00",
        "command": "vist-rag eval synthetic --seed 0",
        "commit": "0123456789abcdef",
        "versions": {"python": "3.11.0", "torch": "2.11.0"},
        "machine": {"system": "Linux", "device": "cpu", "cores": 2},
        "models": {"memory": {"fingerprint": "f" * 64}},
        "metrics": ["em", "f1", "substring"],
        "retrieval": {"recall": {"1": 0.61, "5": 0.82}, "answer": {"1": 0.66, "5": 0.86}},
        "cells": list(cells),
        "paired": list(paired),
    } | other


def synthetic_block(top_k: int, *, passages: str = "retrieved", seed: int = 0, **other: Any) -> dict[str, Any]:
    """Every method at every rate."""
    draw = random.Random(f"{top_k} {passages} {seed}")
    origin = 150.0 * top_k
    cells = [cell("closed_book", None, 0.05, origin=origin), cell("raw", None, _CEILING["raw"], origin=origin)]
    paired = []
    for method, best in _CEILING.items():
        for rate in RATES if method != "raw" else ():
            em = best * (1.1 - 0.28 * (rate**0.5 - 1)) + draw.uniform(-0.02, 0.02)
            kept = {"memory_bytes": int(33_000 * top_k / rate)} if "memory" in method else {}
            cells.append(cell(method, rate, max(0.01, em), origin=origin * draw.uniform(0.95, 1.05), **kept))
            if method != "memory":
                paired.append(pair(method, rate, round(best - _CEILING["memory"], 4)))
    cells += [cell(m, r, 0.04 + draw.uniform(0, 0.02), origin=origin) for m in _CONTROLS for r in (2.3,)]
    name = f"synthetic-dev-{passages}-k{top_k}"
    return block(cells, paired, name=name, passages=passages, top_k=top_k) | other


_CONTROLS = ("shuffled_memory", "blank_memory")


def latency(**other: Any) -> dict[str, Any]:
    """Times to the first token."""
    points = [
        {
            "method": method,
            "k": k,
            "ttft_ms": first + each * k,
            "ttft_ms_quartiles": [first + each * k - 3, first + each * k + 4],
        }
        for method, first, each in (("raw", 20, 30), ("memory_made_now", 25, 22), ("memory_ready", 18, 11))
        for k in (1, 2, 5, 10)
    ]
    return {"format": "vist-rag-latency/1", "name": "synthetic-latency", "points": points} | other


def write(directory: Path, *results: dict[str, Any]) -> Path:
    """Each result in a file of its name."""
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        (directory / f"{result['name']}.json").write_text(json.dumps(result), "utf-8")
    return directory


def synthetic_directory(directory: Path) -> Path:
    """Three blocks of question answering in three numbers of passages and one more, two other tasks, and latencies."""
    results = [synthetic_block(1, passages="gold"), *(synthetic_block(k) for k in (1, 5, 10)), latency()]
    for dataset, accuracy in (("sst2", 0.8), ("agnews", 0.6)):
        cells = [
            {"method": method, "rate": rate, "accuracy": accuracy - less, "accuracy_95": [accuracy - less - 0.1, 0.9]}
            for method, rate, less in (("closed_book", None, 0.3), ("memory", 2.3, 0.1), ("mean_pool", 2.3, 0.15))
        ]
        name = f"icl-{dataset}"
        results.append(
            block(cells, name=name, task="icl", dataset=dataset, metrics=["accuracy"], n_text=2, n_memory=18, seeds=3)
        )
    cells = [
        {"method": "raw", "rate": None, "perplexity": 8.25, "perplexity_95": [8.0, 8.5]},
        {"method": "memory", "rate": 2.3, "perplexity": 9.5, "perplexity_95": [9.25, 9.75]},
        {"method": "mean_pool", "rate": 2.3, "perplexity": 10.5, "perplexity_95": [10.25, 10.75]},
    ]
    lm = {"task": "lm", "dataset": "arxiv", "metrics": ["perplexity"], "lower_is_better": ["perplexity"]}
    results.append(block(cells, name="lm-arxiv", encoded_tokens=1024, text_tokens=512, **lm))
    return write(directory, *results)
