"""Table 1 of the paper counted again, part by part, and what counters see of attention in ``torch.nn``.

    python benchmarks/paper_costs.py --output benchmarks/results/paper-costs.json
    python benchmarks/paper_costs.py --tables benchmarks/results/paper-costs.json

The second prints the tables of docs/explanation/costs.md. Counted on tensors without storage, but for one layer of
attention of a ViT-L/14's size, which is run: OpenCLIP's towers are made of such layers, and a counter that misses them
misses what the paper's figures lack.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from vist_rag.evaluation.meters import on_meta, run
from vist_rag.evaluation.paper_costs import RESAMPLER, SHAPES, TABLE_1, compare_with_paper, slopes
from vist_rag.evaluation.provenance import run_facts
from vist_rag.generation import CrossAttentionFusion

WIDTH, HEADS, PATCHES = 1024, 16, 257
"""Of a layer of ViT-L/14: its patches and the class token."""
_PARTS = {
    "tower": "tower",
    "resampler": "resampler",
    "text_encoder": "RoBERTa-large",
    "cross_attention": "cross-attention",
}
_KINDS = {
    "other": "MLPs and inputs",
    "projections": "projections of attention",
    "scores": "attention scores and what they weigh",
}


# --------------------------------------------------------------------------------------- what counters see of attention


def counters() -> dict[str, Any]:
    """GFLOPs of one attention layer by formula, and as three counters see it, with ``nn.MultiheadAttention``."""
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    pixels = torch.randn(1, PATCHES, WIDTH)

    def attend() -> None:
        layer(pixels, pixels, pixels, need_weights=False)

    seen: dict[str, dict[str, float]] = {}
    for mode, grad in (("inference", False), ("training", True)):
        layer.train(grad)
        with torch.set_grad_enabled(grad):
            counted = {"FlopCounterMode": _dispatched, "torch.profiler": _profiled}
            seen[mode] = {name: round(count(attend) / 1e9, 4) for name, count in counted.items()}
            seen[mode]["hooks on nn.Linear"] = round(_hooked(layer, attend) / 1e9, 4)
    projections, scores = 8 * PATCHES * WIDTH**2, 4 * PATCHES**2 * WIDTH
    return {
        "layer": f"nn.MultiheadAttention({WIDTH}, {HEADS}) on {PATCHES} positions",
        "formula": {"projections": round(projections / 1e9, 4), "scores": round(scores / 1e9, 4)},
        "seen": seen,
    }


def _dispatched(function: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def _profiled(function: Callable[[], None]) -> int:
    with profile(with_flops=True) as profiled:
        function()
    return int(sum(event.flops for event in profiled.key_averages()))


def _hooked(module: nn.Module, function: Callable[[], None]) -> int:
    found: list[int] = []

    def count(layer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        found.append(2 * inputs[0].numel() * layer.out_features)

    hooks = [part.register_forward_hook(count) for part in module.modules() if isinstance(part, nn.Linear)]
    function()
    for hook in hooks:
        hook.remove()
    return sum(found)


# -------------------------------------------------------------------------------------------------- as it is built here


def implemented() -> list[dict[str, Any]]:
    """TFLOPs of cross-attention and generator as this package runs them, for the rows of VIST.

    Keys and values have as many heads as in the generator's self-attention, four of TinyLlama's, where the paper's
    figures amount to all.
    """
    lm = on_meta(lambda: AutoModelForCausalLM.from_config(SHAPES["tinyllama-1.1b"]()), "fused", torch.float16)
    fusion = on_meta(lambda: CrossAttentionFusion.for_model(lm, RESAMPLER.width), "fused", torch.float16)
    fusion.attach(lm)
    rows = []
    for row in TABLE_1:
        if row.method == "VIST":
            latents = row.encoded_tokens * 7 * RESAMPLER.latents_per_page // 1024
            tflops = _reading(lm, fusion, latents, row.text_tokens)
            rows.append({"encoded_tokens": row.encoded_tokens, "tflops": tflops})
    return rows


def _reading(lm: Any, fusion: Any, latents: int, text: int) -> float:
    def read() -> Any:
        memory = torch.empty(latents, RESAMPLER.width, dtype=torch.float16, device="meta")
        embeds = torch.empty(1, text, lm.config.hidden_size, dtype=torch.float16, device="meta")
        return lm(
            inputs_embeds=embeds,
            use_cache=True,
            **fusion.memory_arguments([[(memory, torch.full((len(memory), 1), -1))]]),
        )

    # Eager, so that attention with a mask and with shared heads is counted, too.
    return round(run(read, nn.ModuleList((lm, fusion)), attention="eager").flops / 1e12, 4)


# ----------------------------------------------------------------------------------------------------------- the tables


def tables(result: Mapping[str, Any]) -> str:
    """The tables of docs/explanation/costs.md that are part by part, in Markdown."""
    own = built_table(result["rows"], result["implemented"])
    return "\n\n".join([*map(slope_table, result["slopes"]), counter_table(result["counters"]), own])


def slope_table(one: Mapping[str, Any]) -> str:
    """What one more image or token takes, part by part."""
    lines = [f"| {one['method']}: one more {one['unit']} | GFLOPs | in the paper's figure |", "|---|---|---|"]
    for name, gflops in one["ours"].items():
        part, kind = name.split(".")
        seen = "no" if name in one["left_out"] else "yes"
        lines.append(f"| {_PARTS[part]}: {_KINDS[kind]} | {gflops:.3f} | {seen} |")
    left = sum(gflops for name, gflops in one["ours"].items() if name in one["left_out"])
    ours = sum(one["ours"].values())
    lines += [
        f"| ours, all of it | {ours:.3f} | |",
        f"| ours, without what is left out | {ours - left:.3f} | |",
        f"| the paper | {one['paper']:.3f} ± {one['paper_error']:.3f} | |",
        f"| *not explained* | {one['paper'] - ours + left:+.3f} | |",
    ]
    return "\n".join(lines)


def counter_table(found: Mapping[str, Any]) -> str:
    """What counters see of one layer of attention."""
    projections, scores = found["formula"]["projections"], found["formula"]["scores"]
    lines = ["| one layer of attention, GFLOPs | in inference | in training |", "|---|---|---|"]
    for name in found["seen"]["inference"]:
        lines.append(f"| {name} | {found['seen']['inference'][name]:.3f} | {found['seen']['training'][name]:.3f} |")
    whole = f"{projections + scores:.3f}"
    lines.append(f"| by formula: projections {projections:.3f}, scores {scores:.3f} | {whole} | {whole} |")
    return "\n".join(lines)


def built_table(rows: Sequence[Mapping[str, Any]], built: Sequence[Mapping[str, Any]]) -> str:
    """Generator and cross-attention as the paper's figures need them, and as this package builds them."""
    lines = ["| encoded | generator, and cross-attention with all heads | as built here |", "|---|---|---|"]
    for row, own in zip([row for row in rows if row["method"] == "VIST"], built, strict=True):
        parts = row["parts_tflops"]
        paper = parts["llm"] + parts["cross_attention"]
        lines.append(f"| {row['encoded_tokens']:,} | {paper:.2f} | {own['tflops']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Count and write, or print the tables of what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="print the tables of such a file instead")
    arguments = parser.parse_args()
    if arguments.tables:
        print(tables(json.loads(arguments.tables.read_text("utf-8"))))
        return
    rows = compare_with_paper()
    result = {
        "benchmark": "paper_costs",
        **run_facts(" ".join(["python benchmarks/paper_costs.py", *sys.argv[1:]])),
        "rows": rows,
        "slopes": slopes(rows),
        "counters": counters(),
        "implemented": implemented(),
    }
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(tables(result) if arguments.output else text)


if __name__ == "__main__":
    main()
