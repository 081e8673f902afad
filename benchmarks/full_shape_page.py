"""What ``benchmarks/full_shape.py`` measured, for people: tables in Markdown, and the points of its plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WAYS = {"raw": "text", "memory_made_now": "memory, made now", "memory_ready": "memory, ready"}


def panels(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the plot shows: a panel for each shape and fusion, with raw text in all of them."""
    rag = [one for one in _cells(content, "rag") if not one["out_of_memory"]]
    for shape in dict.fromkeys(one["shape"] for one in rag):
        for fusion in dict.fromkeys(one["fusion"] for one in rag if one["fusion"]):
            points = [
                {
                    "method": one["way"],
                    "k": one["passages"],
                    "ttft_ms": one["ms"]["median"],
                    "ttft_ms_quartiles": [one["ms"]["low"], one["ms"]["high"]],  # of the median; drawn alike
                }
                for one in rag
                if one["shape"] == shape and one["fusion"] in (None, fusion)
            ]
            yield f"{shape}, {fusion.replace('_', ' ')}", {"points": points}


def tables(content: Mapping[str, Any]) -> str:
    """All that was measured, in Markdown; times are medians with their 95 % bootstrap interval."""
    parts = (("table1", _passes), ("rag", _first_tokens), ("training", _steps))
    return "\n\n".join(table(some) for part, table in parts if (some := _cells(content, part)))


def _passes(cells: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| model | fusion | encoded | text | ms | TFLOPs | memory, GB |", "|---|---|---|---|---|---|---|"]
    for one in cells:
        encoded, text = one["size"]
        flops = "" if one["out_of_memory"] else f"{one['flops'] / 1e12:.2f}"
        lines.append(f"| {_which(one)} | {encoded:,} | {text:,} | {_ms(one)} | {flops} | {_gb(one)} |")
    return "\n".join(lines)


def _first_tokens(cells: Sequence[Mapping[str, Any]]) -> str:
    header = "| model | fusion | passages as | k | first token, ms | tokens a second | memory, GB |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    for one in cells:
        speed = "" if one["out_of_memory"] else f"{one['tokens_per_s']:,.0f}"
        lines.append(f"| {_which(one)} | {WAYS[one['way']]} | {one['size'][0]} | {_ms(one)} | {speed} | {_gb(one)} |")
    return "\n".join(lines)


def _steps(cells: Sequence[Mapping[str, Any]]) -> str:
    header = "| model | fusion | sequence | trained | a pass, ms | a step, ms | memory, GB | GPU hours |"
    lines = [header, "|---|---|---|---|---|---|---|---|"]
    for one in cells:
        sequence = " + ".join(f"{n:,}" for n in one["size"])
        if one["out_of_memory"]:
            lines.append(f"| {_which(one)} | {sequence} | | {_ms(one)} | | | |")
            continue
        trained, step = f"{one['trained_parameters'] / 1e6:,.1f} M", f"{one['step_ms']:,.0f}"
        hours = f"{one['gpu_hours']:.2f} for {one['steps']:,} steps"
        lines.append(f"| {_which(one)} | {sequence} | {trained} | {_ms(one)} | {step} | {_gb(one)} | {hours} |")
    return "\n".join(lines)


def _cells(content: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    return [one for one in content["cells"].values() if one["part"] == part]


def _which(one: Mapping[str, Any]) -> str:
    return f"{one['shape']} | {(one['fusion'] or 'none').replace('_', ' ')}"


def _ms(one: Mapping[str, Any]) -> str:
    if one["out_of_memory"]:
        return "out of memory"
    ms = one["ms"]
    return f"{ms['median']:.1f} [{ms['low']:.1f}, {ms['high']:.1f}]"


def _gb(one: Mapping[str, Any]) -> str:
    size = one.get("memory_bytes")
    return "" if size is None else f"{size / 1e9:.2f}"
