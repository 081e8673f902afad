"""How fast a step that trains tower and resampler is, as a share of what this machine's matrix product reaches.

    python benchmarks/training_speed.py --json

The lexical stage of the embedded recipe, tower and all, on the passages of the demo corpus: forward, backward and the
optimizer's step, timed one by one. Operations are counted by the formula of ``vist-rag train --dry-run``. A large
matrix product is timed in the same run, before and after, and the faster one is the measure; small matrices cannot
reach it: a product of the tower's own shape stands beside.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.evaluation.demo import demo_passages
from vist_rag.evaluation.provenance import run_facts
from vist_rag.generation import VistGenerator
from vist_rag.training.flops import Flops, batch_costs
from vist_rag.training.lexical import LexicalAlignment, lexical_batch
from vist_rag.training.parts import plain, train_only
from vist_rag.training.reading import MemoryReading

PASSAGES = 64  # a step
LARGE = (4096, 1024, 1024)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(work: Callable[[], Any], *, least: float = 0.5) -> float:
    """Median of a call, over half a second of them at least."""
    work()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < least:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def matmul_rate(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """GFLOP/s of ``[m, k] @ [k, n]``."""
    m, k, n = shape
    left, right = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    return 2 * m * k * n / seconds(lambda: torch.nn.functional.linear(left, right)) / 1e9


def step_rate(model: LexicalAlignment, batch: dict[str, Any], dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """GFLOP/s of a training step, and its time by part, medians in seconds."""
    told = sum(batch_costs(model, batch, examples=PASSAGES).flops.values(), Flops())
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-6)
    taken: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for number in range(steps + 1):
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(**batch)["loss"]
        read = time.perf_counter()
        loss.backward()
        learnt = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        ends = begin, read, learnt, time.perf_counter()
        if number:  # the first one warms up
            for part, start, end in zip(taken, ends[:-1], ends[1:], strict=True):
                taken[part].append(end - start)
    parts = {part: round(statistics.median(some), 4) for part, some in taken.items()}
    return {"seconds": parts, "gflop": round(told.total / 1e9, 1), "gflops": told.total / sum(parts.values()) / 1e9}


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice if left out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    directory = find_checkpoint(None)
    compressor = load_compressor(directory, device="cpu")
    generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device="cpu")
    words = cast(Tensor, generator.model.get_input_embeddings().weight)
    train_only(MemoryReading(compressor, generator), ("tower", "resampler", "projector"), generator_runs=False)
    model = LexicalAlignment(compressor, generator.fusion, words)
    model.train()
    texts = [passage.content for passage in demo_passages()]
    texts = random.Random(0).sample(texts, PASSAGES)
    tokenizer = plain(generator.tokenizer.backend_tokenizer)
    batch = lexical_batch(texts, compressor, tokenizer, reading=False, spelling=generator.fusion.config.spelling)
    tower = compressor.tower.model.config  # type: ignore[union-attr]
    own = (int(batch["patch_mask"].sum()), int(tower.hidden_size), int(tower.intermediate_size))
    measured = {}
    for name, dtype in DTYPES.items():
        before, shaped = matmul_rate(LARGE, dtype), matmul_rate(own, dtype)
        step = step_rate(model, batch, dtype, arguments.steps)
        best = max(before, matmul_rate(LARGE, dtype))
        measured[name] = {
            **step,
            "gflops": round(step["gflops"], 1),
            "matmul_gflops": round(best, 1),
            "matmul_of_the_towers_shape_gflops": round(shaped, 1),
            "share": round(step["gflops"] / best, 3),
        }
    found = {
        "benchmark": "training speed",
        **run_facts("python benchmarks/training_speed.py --json"),
        "threads": torch.get_num_threads(),
        "target": 0.6,
        "patches": own[0],
        "measured": measured,
    }
    text = json.dumps(found, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        for name, one in measured.items():
            print(f"{name}: {one['gflops']} of {one['matmul_gflops']} GFLOP/s, {one['share']:.0%} (target 60 %)")


if __name__ == "__main__":
    main()
