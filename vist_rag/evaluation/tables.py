"""Parts of a report: a block of results -> Markdown tables, and sentences that say what its figures say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vist_rag.evaluation.plots import METHODS, Style, main_metric, metric_name, ordered, style
from vist_rag.evaluation.result_files import Result, Setting, setting

CONTROLS = ("shuffled_memory", "blank_memory")
PLOT_RATE = 2.3
"""The rate of the plots over k, where it was measured."""

_TESTED_AS = {"perplexity": "nll"}
"""Metrics that no single answer has: their paired test is on what each answer has, per token in nats."""
_VERDICTS = {"≈": ", paired difference may be 0", "↑": ", better in the paired test", "↓": ", worse in the paired test"}
_NO_RIVALS = ("closed_book", "raw", *CONTROLS)


def block_name(block: Result, *, k: bool = True) -> str:
    """What sets a block apart from others of its data set."""
    parts = [block.get("split"), f"{block['passages']} passages" if block.get("passages") else ""]
    return ", ".join(str(part) for part in [*parts, f"k = {block['top_k']}" if k else ""] if part)


def block_facts(block: Result) -> str:
    """How many questions, and what retrieval found."""
    facts = [f"{block['questions']:,} questions."] if isinstance(block.get("questions"), int) else []
    for key, what in (("recall", "Gold passage"), ("answer", "An answer string")):
        shares = (block.get("retrieval") or {}).get(key) or {}
        known = sorted((int(k), share) for k, share in shares.items() if share is not None)
        if known:
            listed = ", ".join(f"{k}: {100 * share:.1f}" for k, share in known)
            facts.append(f"{what} among the first k retrieved (per cent), by k: {listed}.")
    return " ".join(facts)


def rate_table(block: Result) -> str:
    """Methods down, rates across; the main metric."""
    settings = sorted({setting(cell) for cell in block["cells"]}, key=by_size)
    cells = {(cell["method"], setting(cell)): score(block, cell) for cell in block["cells"]}
    rows = [[label(m), *(cells.get((m, asked), "") for asked in settings)] for m in ordered([m for m, _ in cells])]
    metric, _ = main_metric(block)
    return table([metric_name(metric), *(rate_name(s) or "no rate" for s in settings)], rows)


def score(block: Result, cell: Result) -> str:
    """The main metric with its interval, bold where best, and how it compares with ``memory`` at the same rate."""
    metric, _ = main_metric(block)
    if cell.get(metric) is None:
        return ""
    shown = _number(block, metric, cell[metric])
    rivals = [
        other[metric]
        for other in block["cells"]
        if setting(other) == setting(cell) and other["method"] not in _NO_RIVALS and other.get(metric) is not None
    ]
    best = (min if metric in block.get("lower_is_better", ()) else max)(rivals, default=None)
    if len(rivals) > 1 and cell["method"] not in _NO_RIVALS and cell[metric] == best:
        shown = f"**{shown}**"
    mark = _compared(block, cell, {**cell, "method": "memory"})
    return " ".join(filter(None, (shown, _interval(block, cell, metric), mark)))


def _compared(block: Result, cell: Result, other: Result) -> str:
    """How a cell compares with another in the paired test of the main metric: ≈ ↑ ↓, or nothing if there is none."""
    metric, _ = main_metric(block)
    ours, theirs = ((c["method"], setting(c)) for c in (cell, other))
    for pair in block.get("paired") or ():
        sides = (pair["method"], setting(pair)), (pair["against"], setting(pair, "against_"))
        tested = pair["metric"] in (metric, _TESTED_AS.get(metric)) and pair.get("difference_95")
        if tested and sides in ((ours, theirs), (theirs, ours)) and ours != theirs:
            low, high = pair["difference_95"]
            if low <= 0 <= high:
                return "≈"
            higher = (low > 0) == (sides[0] == ours)
            return "↓" if higher == (metric in block.get("lower_is_better", ())) else "↑"
    return ""


def controls(block: Result) -> str:
    """Whether the controls fall to closed book, and whether anything is better than raw text: what the figures say."""
    metric, _ = main_metric(block)
    cells = [cell for cell in block["cells"] if cell.get(metric) is not None]
    closed = next((cell for cell in cells if cell["method"] == "closed_book"), None)
    said = []
    if closed is None or not closed.get(f"{metric}_95"):
        if any(cell["method"] in CONTROLS for cell in cells):
            said.append("Controls: this block has no interval of closed book to hold them against.")
        return " ".join([*said, _ceiling(block, cells)]).strip()
    low, high = closed[f"{metric}_95"]
    for control in CONTROLS:
        places: dict[str, list[str]] = {"within": [], "above": [], "below": []}
        for cell in cells:
            if cell["method"] == control:
                place = "below" if cell[metric] < low else "above" if cell[metric] > high else "within"
                places[place].append(_score_at(block, cell) + _VERDICTS.get(_compared(block, cell, closed), ""))
        found = ", ".join(f"{place} it ({'; '.join(some)})" for place, some in places.items() if some)
        if found:
            said.append(f"{label(control)} is {found}")
    shown = f"{_number(block, metric, closed[metric])} {_interval(block, closed, metric)}"
    sentence = f"Controls, and the interval of closed book, {shown}: {'; '.join(said)}." if said else ""
    return f"{sentence} {_ceiling(block, cells)}".strip()


def _ceiling(block: Result, cells: Sequence[Result]) -> str:
    """What is better than raw text."""
    metric, _ = main_metric(block)
    sign = -1 if metric in block.get("lower_is_better", ()) else 1
    raw = max((cell for cell in cells if cell["method"] == "raw"), key=lambda cell: sign * cell[metric], default=None)
    if raw is None:
        return ""
    better = [
        f"{label(cell['method'])} ({_score_at(block, cell)}"
        f"{_VERDICTS.get(_compared(block, cell, raw), ', no paired test')})"
        for cell in cells
        if sign * cell[metric] > sign * raw[metric]
    ]
    shown = _number(block, metric, raw[metric])
    if not better:
        return f"Nothing is better than raw text ({shown})."
    return f"Better than raw text ({shown}): {'; '.join(better)}."


def _score_at(block: Result, cell: Result) -> str:
    metric, rate = main_metric(block)[0], rate_name(setting(cell))
    return _number(block, metric, cell[metric]) + (f" at {rate}" if rate else "")


def more_table(block: Result) -> str:
    """The other metrics, tokens and times; a column that no cell fills is left out."""

    def scaled(key: str, factor: float, decimals: int) -> Callable[[Result], str]:
        return lambda cell: "" if cell.get(key) is None else f"{factor * cell[key]:,.{decimals}f}"

    def scored(metric: str) -> Callable[[Result], str]:
        return lambda cell: "" if cell.get(metric) is None else _number(block, metric, cell[metric])

    columns: dict[str, Callable[[Result], str]] = {metric_name(m): scored(m) for m in block["metrics"][1:]}
    columns |= {"tokens read": scaled("compressed_tokens", 1, 1), "ratio": scaled("ratio", 1, 2)}
    columns |= {"prompt tokens": scaled("prompt_tokens", 1, 1), "memory (kB)": scaled("memory_bytes", 0.001, 1)}
    columns |= {"ms": scaled("ms", 1, 1), "resilience": scaled("resilience", 100, 1), "boost": scaled("boost", 100, 1)}
    kept = {name: show for name, show in columns.items() if any(show(cell) for cell in block["cells"])}
    methods = ordered([cell["method"] for cell in block["cells"]])
    cells = sorted(block["cells"], key=lambda cell: (methods.index(cell["method"]), by_size(setting(cell))))
    rows = [[label(c["method"]), rate_name(setting(c)), *(show(c) for show in kept.values())] for c in cells]
    return table(["method", "rate", *map(plain, kept)], rows) if kept else ""


def paired_table(block: Result) -> str:
    """Every paired test; differences are method minus the other."""
    pairs = block.get("paired") or []
    places = ordered([method for pair in pairs for method in (pair["method"], pair["against"])])
    metrics = list(dict.fromkeys([*block["metrics"], *sorted(pair["metric"] for pair in pairs)]))

    def place(pair: Result) -> tuple[Any, ...]:
        sides = places.index(pair["against"]), metrics.index(pair["metric"]), places.index(pair["method"])
        return *sides, by_size(setting(pair)), by_size(setting(pair, "against_"))

    rows = []
    for pair in sorted(pairs, key=place):
        metric, p = pair["metric"], pair.get("p")
        ends = ", ".join(_number(block, metric, end, "+") for end in pair.get("difference_95") or ())
        rows.append(
            [
                metric_name(metric),
                f"{label(pair['method'])} {rate_name(setting(pair))}".strip(),
                f"{label(pair['against'])} {rate_name(setting(pair, 'against_'))}".strip(),
                "" if pair.get("difference") is None else _number(block, metric, pair["difference"], "+"),
                f"[{ends}]" if ends else "",
                value_text(pair.get("wins")),
                value_text(pair.get("losses")),
                "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
            ]
        )
    return table(["metric", "method", "against", "difference", "95 %", "wins", "losses", "p"], rows) if rows else ""


def series_over_k(blocks: Sequence[Result]) -> list[list[Result]]:
    """Blocks that differ in ``top_k`` alone, by it."""
    groups: dict[str, list[Result]] = {}
    for block in blocks:
        alike = [block.get(key) for key in ("dataset", "split", "passages", "questions", "seed", "metrics", "models")]
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(block)
    return [g for g in groups.values() if len({block["top_k"] for block in g}) == len(g) > 1]


def one_rate(blocks: Sequence[Result]) -> float | None:
    """``PLOT_RATE`` if it was measured; else the rate that most cells have, the lowest of them."""
    rates = [cell["rate"] for block in blocks for cell in block["cells"] if cell.get("rate")]
    return PLOT_RATE if PLOT_RATE in rates else max(sorted(set(rates)), key=rates.count, default=None)


# --------------------------------------------------------------------------------------------------- numbers and words


def by_size(asked: Setting) -> tuple[float, float]:
    """Order of settings; none comes first."""
    return asked[0] or 0, asked[1] or 0


def rate_name(asked: Setting) -> str:
    """``2.3×``, ``64 tokens``, or nothing."""
    rate, tokens = asked
    parts = "" if rate is None else f"{rate:g}×", "" if tokens is None else f"{tokens:g} tokens"
    return ", ".join(filter(None, parts))


def _number(block: Result, metric: str, value: float, sign: str = "") -> str:
    """In per cent, or as it is where lower is better; never a minus zero."""
    if metric in _TESTED_AS.values():
        shown = f"{value:{sign}.3f}"
    elif metric in block.get("lower_is_better", ()):
        shown = f"{value:{sign}.2f}"
    else:
        shown = f"{100 * value:{sign}.1f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown


def _interval(block: Result, cell: Result, metric: str) -> str:
    ends = cell.get(f"{metric}_95")
    return f"[{_number(block, metric, ends[0])}, {_number(block, metric, ends[1])}]" if ends else ""


def first_token(point: Mapping[str, Any]) -> str:
    """A median with its quartiles."""
    if not point:
        return ""
    quartiles = point.get("ttft_ms_quartiles")
    return f"{point['ttft_ms']:.1f}" + (f" [{quartiles[0]:.1f}, {quartiles[1]:.1f}]" if quartiles else "")


def latency_name(file: Result) -> str:
    """What a file of latencies is called."""
    return str(file.get("name") or Path(file["file"]).stem)


def label(method: str, known: Mapping[str, Style] = METHODS) -> str:
    """How a method is called."""
    return plain(style(method, known=known).label)


def key_values(facts: Mapping[str, Any]) -> str:
    """``key value, key value``."""
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def value_text(value: Any) -> str:
    """A value from a file; nothing for null."""
    return "" if value is None else plain(str(value))


def plain(text: str, *, code: bool = False) -> str:
    """Words from a file as plain words in Markdown: they can make no markup, no cell and no line."""
    line = " ".join(text.split())
    return line.replace("|", "\\|").replace("``", "` `") if code else re.sub(r"([\\`*|<>\[\]])", r"\\\1", line)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
