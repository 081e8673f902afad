"""Exact match against the bytes that a memory is stored in.

    python benchmarks/memory_bytes.py --data DIR --json
    python benchmarks/memory_bytes.py --data DIR --json --split test --forms float16,int8,int3

Questions with the passage that answers them, answered from its memory in every stored form: encoded once, put in the
form and taken out again, read at 2.3 times fewer positions than the text has tokens (development questions at 4.6
times, too). All forms answer the same questions, so what differs is told by paired tests against float16. Beside the
forms that ship, ways that do not:

- ``row-int4``: one scale a latent, in the place of the two ends of each column;
- ``pca``: a learned basis (the principal components of 200 training passages), its coefficients in as many bits as they
  vary. Its basis would have to be kept beside the compressor.

Writes ``benchmarks/results/memory-bytes.json`` (``memory-bytes-test.json``), and for the development questions the
plot. An interrupted run goes on from ``--rows``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vist_rag.codec import FORMS, decode, encode
from vist_rag.compression import VisualMemory
from vist_rag.evaluation.datasets import load_questions
from vist_rag.evaluation.methods import EvalModel, Memory, budget_of
from vist_rag.evaluation.metrics import bootstrap_interval, paired_difference
from vist_rag.evaluation.provenance import run_facts
from vist_rag.evaluation.qa import QuestionAnswering
from vist_rag.evaluation.task import Reading, sample

Latents = NDArray[np.float32]
RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "memory-bytes.png"
RATES = (2.3, 4.6)
MAX_NEW_TOKENS = 16
BATCH = 32
VECTOR_BYTES = 4 * 384  # of a passage's embedding, float32
PAGE = (64, 513)  # a full page of the embedded model
BLOCKS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "dev": (
        {"dataset": "reader/squad.dev.jsonl.gz", "passages": "gold"},
        {"dataset": "efficientqa", "split": "dev", "passages": "distant"},
    ),
    "test": (
        {"dataset": "squad_open", "split": "test", "passages": "gold"},
        {"dataset": "nq_open", "split": "test", "passages": "gold"},
    ),
}
FORM = "int3"  # what the embedded compressor names: chosen on development questions
TRAINING = ("reader/squad.train.jsonl.gz", "reader/distant.train.jsonl.gz")


@dataclass(frozen=True)
class Form:
    """A way to store a memory.

    Attributes:
        stored: Latents ``[n, d]`` -> what comes back, and the bytes that it took.
        shipped: Whether the package has it.
    """

    stored: Callable[[Latents], tuple[Latents, int]]
    shipped: bool = False


def shipped(form: str) -> Form:
    """One of the package's own."""

    def stored(latents: Latents) -> tuple[Latents, int]:
        data = encode(latents, form)
        return decode(data, form, *latents.shape), len(data)

    return Form(stored, shipped=True)


def scaled(bits: int) -> Form:
    """Whole numbers of ``bits`` bits times one scale, float16, for each latent.

    The scale is the best of fifteen: what is largest may be cut.
    """
    top = 2 ** (bits - 1) - 1

    def stored(latents: Latents) -> tuple[Latents, int]:
        largest = np.maximum(np.abs(latents).max(1, keepdims=True), 1e-6)
        steps = [(largest * share / top).astype(np.float16).astype(np.float32) for share in np.arange(20, 5, -1) / 20]
        tried = [np.clip(np.rint(latents / step), -top, top) * step for step in steps]
        best = np.argmin([((one - latents) ** 2).sum(1) for one in tried], axis=0)
        taken = -(-latents.size * bits // 8) + 2 * len(latents)
        return np.stack(tried)[best, np.arange(len(latents))], taken

    return Form(stored)


def principal(training: Sequence[Latents], distortion: float) -> Form:
    """Transform coding: principal components of columns scaled alike, each in the bits that leave ``distortion``.

    Uniform steps over the range in which they do best for a normal distribution; components below the distortion go.
    """
    rows = np.concatenate(training).astype(np.float64)
    mean, spread = rows.mean(0), rows.std(0)
    variance, basis = np.linalg.eigh(np.cov(((rows - mean) / spread).T))
    variance = variance.clip(1e-9)
    bits = np.ceil(0.5 * np.log2(variance / distortion)).clip(0, 8).astype(int)
    kept = bits > 0
    basis, deviation, bits = basis[:, kept], np.sqrt(variance[kept]), bits[kept]
    top = 2.0**bits - 1
    reach = np.array([0.8, 1.5, 2.3, 2.9, 3.4, 3.9, 4.3, 4.7])[bits - 1]  # in standard deviations

    def stored(latents: Latents) -> tuple[Latents, int]:
        coefficients = (latents - mean) / spread @ basis / deviation
        steps = np.rint((coefficients.clip(-reach, reach) + reach) / (2 * reach) * top)
        found = (steps / top * 2 * reach - reach) * deviation @ basis.T * spread + mean
        return found.astype(np.float32), -(-len(latents) * int(bits.sum()) // 8)

    return Form(stored)


def training_latents(model: EvalModel, data: Path) -> list[Latents]:
    """Memories of 100 passages of each training file."""
    contents: list[str] = []
    for name in TRAINING:
        known = {q.context.content for q in load_questions(name, data=data) if q.context is not None}
        contents += sample(sorted(known), 100, 0)
    return [memory.latents.numpy() for memory in model.compressor.encode(contents)]


def forms_of(names: Sequence[str] | None, model: EvalModel, data: Path) -> dict[str, Form]:
    """The forms asked for, or all of them; the basis is learned only where it is needed."""
    forms = {name: shipped(name) for name in FORMS}
    forms["row-int4"] = scaled(4)
    if names is None or "pca" in names:
        forms["pca"] = principal(training_latents(model, data), 0.08)
    return forms if names is None else {name: forms[name] for name in names}


def answered(
    model: EvalModel, tasks: Sequence[QuestionAnswering], latents: Mapping[str, Latents], rate: float
) -> list[float]:
    """EM of each question of each task, read from these latents."""
    memories = {c: VisualMemory(torch.from_numpy(x), model.compressor.fingerprint) for c, x in latents.items()}
    method, scores = Memory(replace(model, memories=memories)), []
    for task in tasks:
        prompts = []
        for one in task.asked:
            closed = model.generator.prompt_length(model.closed(one.question))
            room = (model.generator.context_tokens or 10**9) - closed - MAX_NEW_TOKENS
            raw = sum(model.raw_tokens(p) for p in one.passages)
            prompts.append(method.prompt(one.passages, one.question, budget_of(rate, None, raw, room)))
        # Prompts of about one length share a batch.
        order = sorted(range(len(prompts)), key=lambda i: model.generator.prompt_length(prompts[i]))
        found: dict[int, float] = {}
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            rows = task.judge(model, [task.asked[i] for i in some], [prompts[i] for i in some])
            found |= {i: row["em"] for i, row in zip(some, rows, strict=True)}
        scores += [found[i] for i in range(len(prompts))]
    return scores


def microseconds(work: Callable[[], object], seconds: float = 0.3) -> float:
    """The fastest of as many calls as fit."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return round(best * 1e6, 1)


def speed(form: str) -> dict[str, float]:
    """Microseconds for a full page of the embedded model."""
    latents = np.random.default_rng(0).normal(size=PAGE).astype(np.float32)
    data = encode(latents, form)
    return {
        "encode_us": microseconds(lambda: encode(latents, form)),
        "decode_us": microseconds(lambda: decode(data, form, *PAGE)),
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures as docs/explanation/memory-size.md shows them."""
    lines = ["| form | read at | EM | against float16 [95 %] | KiB a passage | with vector and text |"]
    lines.append("|---|---|---|---|---|---|")
    for cell in result["cells"]:
        test = cell["against_float16"]
        low, high = (f"{100 * bound:+.1f}" for bound in test["difference_95"])
        against = "" if cell["form"] == "float16" else f"{100 * test['difference']:+.1f} [{low}, {high}]"
        kept, total = cell["memory_bytes"] / 1024, cell["total_bytes"] / 1024
        lines.append(
            f"| `{cell['form']}` | {cell['rate']}x | {100 * cell['em']:.1f} | {against} | {kept:.1f} | {total:.1f} |"
        )
    return "\n".join(lines)


def plot(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """EM against bytes a passage, a line of shipped forms for each rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.4), dpi=200, layout="constrained")
    for rate, colour, marker in zip(RATES, ("#0072b2", "#d55e00"), "os", strict=True):
        for kept, line in ((True, "-"), (False, "none")):
            some = sorted(
                (c["memory_bytes"] / 1024, 100 * c["em"], [100 * v for v in c["em_95"]], c["form"])
                for c in cells
                if c["rate"] == rate and c["shipped"] is kept
            )
            if not some:
                continue
            x, y = [s[0] for s in some], [s[1] for s in some]
            error = [[s[1] - s[2][0] for s in some], [s[2][1] - s[1] for s in some]]
            axes.errorbar(
                x, y, yerr=error, color=colour, marker=marker, linestyle=line, linewidth=1.6, elinewidth=0.7,
                markerfacecolor=colour if kept else "white",
                label=f"read at {rate}x" + ("" if kept else ", not shipped"),
            )  # fmt: skip
            if rate == RATES[0]:
                for a, b, _, name in some:
                    offset, side = ((5, 10), "left") if kept else ((0, -36), "center")
                    axes.annotate(name, (a, b), offset, textcoords="offset points", fontsize=8.5, ha=side)
    axes.axvline(16, color="#6b6b6b", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="memory of a passage (KiB, mean)", ylabel="EM (%)")
    axes.set_xticks([4, 8, 16, 32, 64], labels=["4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Measure; write the result and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--split", choices=BLOCKS, default="dev")
    parser.add_argument("--forms", type=lambda names: names.split(","), help="only these, float16 among them")
    parser.add_argument("--limit", type=int, help="only so many questions of each set")
    parser.add_argument("--rows", type=Path, help="keep the scores of each cell there, and do not make those again")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    model = EvalModel.load(None)
    settings = {"limit": arguments.limit, "max_new_tokens": MAX_NEW_TOKENS}
    reading = Reading(arguments.data, RESULTS)
    tasks = [QuestionAnswering({**block, **settings}, model, reading) for block in BLOCKS[arguments.split]]
    passages = {p.content: p for task in tasks for one in task.asked for p in one.passages}
    model.remember(list(passages.values()))
    latents = {content: model.memories[content].latents.float().numpy() for content in passages}
    count = sum(len(task.asked) for task in tasks)
    text_bytes = float(np.mean([len(content.encode()) for content in passages]))
    forms = forms_of(arguments.forms, model, arguments.data)
    done = _kept(arguments.rows, count)
    cells: list[dict[str, Any]] = []
    for rate in RATES if arguments.split == "dev" else RATES[:1]:
        for name, form in forms.items():
            if rate > RATES[0] and name not in ("float16", FORM):
                continue
            stored = {content: form.stored(x) for content, x in latents.items()}
            if (name, rate) not in done:
                done[name, rate] = answered(model, tasks, {c: x for c, (x, _) in stored.items()}, rate)
                if arguments.rows:
                    with arguments.rows.open("a", encoding="utf-8") as rows:
                        rows.write(json.dumps({"form": name, "rate": rate, "em": done[name, rate]}) + "\n")
            em, taken = done[name, rate], [size for _, size in stored.values()]
            cells.append(
                {
                    "form": name,
                    "rate": rate,
                    "shipped": form.shipped,
                    "em": round(float(np.mean(em)), 4),
                    "em_95": [round(v, 4) for v in bootstrap_interval(em)],
                    "against_float16": paired_difference(em, done["float16", rate]),
                    "memory_bytes": round(float(np.mean(taken)), 1),
                    "memory_bytes_95th": float(np.percentile(taken, 95)),
                    "page_bytes": form.stored(np.random.default_rng(0).normal(size=PAGE).astype(np.float32))[1],
                    "total_bytes": round(float(np.mean(taken)) + VECTOR_BYTES + text_bytes, 1),
                }
            )
            _tell(cells[-1])
    result = {
        "benchmark": "memory-bytes",
        "split": arguments.split,
        "questions": count,
        "passages": len(passages),
        "latents": round(float(np.mean([len(x) for x in latents.values()])), 2),
        "text_bytes": round(text_bytes, 1),
        "vector_bytes": VECTOR_BYTES,
        "default": FORM,
        "cells": cells,
        "speed": {name: speed(name) for name in forms if forms[name].shipped},
        **run_facts(_command(arguments)),
    }
    text = json.dumps(result, indent=1)
    name = "memory-bytes.json" if arguments.split == "dev" else f"memory-bytes-{arguments.split}.json"
    (RESULTS / name).write_text(text + "\n", encoding="utf-8")
    if arguments.split == "dev":
        plot(cells, PLOT)
    if arguments.json:
        print(text)


def _kept(path: Path | None, count: int) -> dict[tuple[str, float], list[float]]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {(row["form"], row["rate"]): row["em"] for row in rows if len(row["em"]) == count}


def _tell(cell: Mapping[str, Any]) -> None:
    test = cell["against_float16"]
    low, high = test["difference_95"]
    print(
        f"{cell['rate']}x {cell['form']:11} EM {100 * cell['em']:.1f}  {100 * test['difference']:+.2f} "
        f"[{100 * low:+.2f}, {100 * high:+.2f}]  {cell['memory_bytes'] / 1024:.1f} KiB",
        flush=True,
    )


def _command(arguments: argparse.Namespace) -> str:
    command = "python benchmarks/memory_bytes.py --data DIR --json"
    if arguments.split != "dev":
        command += f" --split {arguments.split}"
    if arguments.forms:
        command += f" --forms {','.join(arguments.forms)}"
    return command + (f" --limit {arguments.limit}" if arguments.limit else "")


if __name__ == "__main__":
    main()
