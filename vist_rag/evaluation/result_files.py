"""The files that ``vist-rag eval`` wrote: found, checked, and put in the order in which a report shows them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vist_rag.errors import InputError

EVAL_FORMAT, LATENCY_FORMAT = "vist-rag-eval/1", "vist-rag-latency/1"
TASKS = {"qa": "Question answering", "icl": "In-context learning", "lm": "Language modelling"}
"""By the name in a file: the heading of a report's section."""
SIZES = {
    "qa": {"top_k": "k"},
    "icl": {"n_text": "examples as text", "n_memory": "as memory"},
    "lm": {"encoded_tokens": "tokens encoded", "text_tokens": "as text"},
}
"""What sets blocks of one task and data set apart, and its heading in a table."""

Result = dict[str, Any]
Setting = tuple[float | None, float | None]
"""The rate, and the number of tokens, that a cell was asked for; either may be none."""

_FILE = re.compile(r"^(?:.*/)?([^/]+?)\.(?:jsonl?|parquet)(?:\.gz)?(?:#.*)?$")
"""A data set that is a file is called by its name alone."""
_LARGEST = 1e15
_PAIR_NUMBERS = ("rate", "tokens", "against_rate", "against_tokens", "difference", "wins", "losses", "p")


def load_results(directory: Path | str) -> list[Result]:
    """Every evaluation result of a folder, in the order in which a report shows them.

    JSON files that have no ``format`` are left out, with a warning; files of latencies are left out without one.

    Args:
        directory: Holds the files that ``vist-rag eval`` wrote.
    Returns:
        The documents, each with the name of its file as ``file``.
    Raises:
        InputError: If there is no such folder or no result in it, a file is torn or of another format, or two files
            hold the same block.
    """
    results, _ = load_all(Path(directory))
    return results


def load_all(directory: Path) -> tuple[list[Result], list[Result]]:
    """Evaluation results as :func:`load_results` gives them, and files of latencies."""
    if not directory.is_dir():
        raise InputError(f"the results must be a folder of JSON files, got {directory}, which is none.")
    found: dict[str, list[Result]] = {EVAL_FORMAT: [], LATENCY_FORMAT: []}
    foreign = []
    for path in sorted(directory.glob("*.json")):
        document = _document(path)
        if document is None:
            foreign.append(path.name)
            continue
        kind = document["format"]
        if not isinstance(kind, str) or kind not in found:
            raise InputError(
                f"{path} must have the format {' or '.join(found)}, got {kind!r}; move it elsewhere, or read it with "
                "the version of vist-rag that wrote it."
            )
        (_check_eval if kind == EVAL_FORMAT else _check_latency)(document, path)
        found[kind].append({**document, "file": path.name})
    if foreign:
        warnings.warn(f"{directory}: not results, left out: {', '.join(foreign)}", stacklevel=3)
    results = sorted(found[EVAL_FORMAT], key=_place)
    if not results:
        raise InputError(f"{directory} holds no evaluation result (*.json); write some with vist-rag eval first.")
    refuse_twins(results, lambda result: result["name"])
    return results, found[LATENCY_FORMAT]


def _document(path: Path) -> Result | None:
    """What a file holds; None if it is no result."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        document = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not whole JSON ({error}); delete it, or write it again with its command."
        ) from error
    return document if isinstance(document, dict) and "format" in document else None


def _check_eval(document: Result, path: Path) -> None:
    task = document.get("task")
    if task not in TASKS:
        raise _broken(path, f"task must be one of {', '.join(TASKS)}, got {task!r}")
    document.setdefault("dataset", "texts")  # blocks of language modelling may have no data set but plain texts
    keys: dict[str, type] = {"name": str, "dataset": str, "metrics": list, "cells": list}
    if task == "qa":
        keys["top_k"] = int
    _check_keys(document, keys, path)
    document["dataset"] = _FILE.sub(r"\1", document["dataset"])
    if task == "qa" and document["top_k"] < 1:
        raise _broken(path, f"top_k must be 1 or more, got {document['top_k']}")
    metrics = document["metrics"]
    if not metrics or not all(isinstance(metric, str) for metric in metrics):
        raise _broken(path, f"metrics must name one or more, got {metrics!r}")
    if not document["cells"]:
        raise _broken(path, "cells must hold at least one, got none")
    if not isinstance(document.get("lower_is_better", []), list):
        raise _broken(path, f"lower_is_better must be a list of metrics, got {document['lower_is_better']!r}")
    intervals = [f"{metric}_95" for metric in metrics]
    numbers = ["rate", "tokens", "origin_tokens", "compressed_tokens", "ratio", "prompt_tokens", "memory_bytes"]
    numbers += ["ms", "resilience", "boost", *metrics]
    for cell in _rows(document, "cells", path):
        _check_row(cell, {"method": str}, numbers, intervals, path)
    _check_twins(document["cells"], path)
    for pair in _rows(document, "paired", path):
        needed: dict[str, type] = {"method": str, "against": str, "metric": str}
        _check_row(pair, needed, _PAIR_NUMBERS, ["difference_95"], path)
    for name in ("retrieval", "models", "versions", "machine"):
        if not isinstance(document.get(name) or {}, dict):
            raise _broken(path, f"{name} must be an object, got {document[name]!r}")
    for key in ("recall", "answer"):
        shares = (document.get("retrieval") or {}).get(key) or {}
        whole = isinstance(shares, dict) and all(k.isdecimal() for k in shares)
        if not whole or not all(share is None or _is_number(share) for share in shares.values()):
            raise _broken(path, f"retrieval.{key} must be shares by k, got {shares!r}")
    for key in SIZES[task]:
        if not _is_number(document.get(key, 0)) and document[key] is not None:
            raise _broken(path, f"{key} must be a number, got {document[key]!r}")


def _check_twins(cells: Sequence[Result], path: Path) -> None:
    seen = set()
    for cell in cells:
        one = cell["method"], *setting(cell)
        if one in seen:
            raise _broken(path, f"cells must differ in method, rate or tokens, got {cell['method']} twice at one rate")
        seen.add(one)


def _check_latency(document: Result, path: Path) -> None:
    _check_keys(document, {"points": list}, path)
    for point in _rows(document, "points", path):
        _check_row(point, {"method": str, "k": int}, ["ttft_ms"], ["ttft_ms_quartiles"], path)
        if point.get("ttft_ms") is None:
            raise _broken(path, f"each point must have ttft_ms, got {point!r}")
    if not document["points"]:
        raise _broken(path, "points must hold at least one, got none")


def _check_keys(document: Mapping[str, Any], kinds: Mapping[str, type], path: Path) -> None:
    for key, kind in kinds.items():
        if not isinstance(document.get(key), kind) or isinstance(document[key], bool):
            raise _broken(path, f"{key} must be of type {kind.__name__}, got {document.get(key)!r}")


def _check_row(
    row: Mapping[str, Any], kinds: Mapping[str, type], numbers: Iterable[str], intervals: Iterable[str], path: Path
) -> None:
    _check_keys(row, kinds, path)
    for name in numbers:
        if not _is_number(row.get(name, 0)) and row[name] is not None:
            raise _broken(path, f"{name} must be a number or null, got {row[name]!r}")
    for name in intervals:
        ends = row.get(name)
        if ends is not None and not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))):
            raise _broken(path, f"{name} must be two numbers, got {ends!r}")


def _rows(document: Result, name: str, path: Path) -> list[Result]:
    rows = document.get(name) or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _broken(path, f"{name} must be a list of objects")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; write it again with vist-rag eval.")


def setting(row: Mapping[str, Any], side: str = "") -> Setting:
    """What a cell, or one side of a paired test, was asked for."""
    return row.get(f"{side}rate"), row.get(f"{side}tokens")


def refuse_twins(results: Sequence[Result], key: Callable[[Result], Any]) -> None:
    """Raise an InputError if two results have the same key, so that none is lost without a word."""
    seen: dict[Any, str] = {}
    for result in results:
        if key(result) in seen:
            raise InputError(
                f"{result['file']} and {seen[key(result)]} must be two blocks, got {result['name']} twice; move one "
                "of them elsewhere."
            )
        seen[key(result)] = result["file"]


def _place(result: Result) -> tuple[Any, ...]:
    sizes = [result.get(key) or 0 for key in SIZES[result["task"]]]
    words = [str(result.get(key, "")) for key in ("dataset", "split", "passages")]
    return list(TASKS).index(result["task"]), *words, *sizes, result["name"]
