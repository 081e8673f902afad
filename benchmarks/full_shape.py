"""Full shapes, random weights: the inputs of the paper's Table 1, time to the first token against k, a training step.

    python benchmarks/full_shape.py --device cuda --seconds 480 --output full-shape.json --plot first-token.png
    python benchmarks/full_shape.py --tiny --output /tmp/tiny.json        # the same cells, sizes for any machine

No weights are downloaded: what a pass takes depends on shapes. The tower is CLIP ViT-L/14, the resampler that of the
recipe ``paper``; the generators are TinyLlama 1.1B and Llama 3 8B. Every cell is written as soon as it is measured, and
a second run measures what the file lacks. What does not fit in memory is a cell that says so. Small cells come first.

- ``table1``: one forward pass, logits of every position, from pixels to logits.
- ``rag``: time to the first token of a question about k passages, as text (``raw``), as memory that is made now, and as
  memory that was stored and is decoded now.
- ``training``: a step of the recipe ``paper``: 4,096 tokens as memory, 512 to be told, layers computed again backwards.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_shape_models import DTYPES, FUSIONS, SEED, Models, Shape, shapes, weight_bytes
from full_shape_page import WAYS, panels, tables
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vist_rag import codec
from vist_rag.compression import VisualMemory
from vist_rag.errors import ConfigError
from vist_rag.evaluation.costs import TOKENS_PER_PAGE
from vist_rag.evaluation.latency import sample_passages
from vist_rag.evaluation.plots import first_token_against_k
from vist_rag.evaluation.provenance import run_facts
from vist_rag.generation import MemorySegment, Prompt, PromptTemplate, TextSegment
from vist_rag.training.examples import Example
from vist_rag.training.objectives import Pve
from vist_rag.training.parts import train_only
from vist_rag.training.reading import MemoryReading
from vist_rag.training.recipe import load_recipe
from vist_rag.types import Passage

RESAMPLES = 2000
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None
QUESTION = "Which month does the keeper write down in red ink?"
_CPU_ATTENTION = {  # which FlopCounterMode lacks
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


# ------------------------------------------------------------------------------------------------------- what is timed


@dataclass(frozen=True)
class Clock:
    """Runs something again and again, and says how long it took and what it held.

    Attributes:
        device: Waited for before and after each run.
        repeats: Runs that count.
        warm_up: Runs before these that do not.
    """

    device: torch.device
    repeats: int
    warm_up: int

    def measure(self, function: Callable[[], Any]) -> dict[str, Any]:
        """``ms`` (median, 95 % bootstrap interval of it, every run) and ``growth_bytes``: most over what was held.

        On a GPU that is what tensors take; on a CPU, where Linux tells, what the whole process takes.
        """
        for _ in range(self.warm_up):
            function()
        held = self._restart()
        runs = []
        for _ in range(self.repeats):
            self._wait()
            begin = time.perf_counter()
            function()
            self._wait()
            runs.append(1000 * (time.perf_counter() - begin))
        return {"ms": interval(runs), "growth_bytes": None if held is None else self._peak() - held}

    def _restart(self) -> int | None:
        """Bytes that are held now; a new peak begins. None where it is not known."""
        if self.device.type != "cuda":
            return restart_peak()
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(torch.cuda.memory_allocated(self.device))

    def _peak(self) -> int:
        """The most that was held since then."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else status("VmHWM")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def restart_peak() -> int | None:
    """Bytes that this process has in memory now; its peak is counted anew from here. None where nobody tells."""
    try:
        _LIBC.malloc_trim(0)  # what was freed and is kept would hide how much a run takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):
        return None
    return status("VmRSS")


def status(name: str) -> int:
    """A size of this process, in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def interval(runs: Sequence[float]) -> dict[str, Any]:
    """Median of some runs and the 95 % bootstrap interval of it."""
    draws = np.random.default_rng(SEED).choice(np.asarray(runs), (RESAMPLES, len(runs)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    told = {"median": float(np.median(runs)), "low": float(low), "high": float(high)}
    return {name: round(ms, 3) for name, ms in told.items()} | {"runs": [round(ms, 3) for ms in runs]}


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in one run; the forward pass only, on whatever device."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return int(counter.get_total_flops())


def with_weights(figures: dict[str, Any], *modules: nn.Module) -> dict[str, Any]:
    """Figures with the bytes of the weights that take part, and with what these and the growth come to."""
    weights, growth = weight_bytes(*modules), figures["growth_bytes"]
    return {**figures, "weight_bytes": weights, "memory_bytes": None if growth is None else weights + growth}


# ----------------------------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Cell:
    """One thing that is measured.

    Attributes:
        part: ``table1``, ``rag`` or ``training``.
        shape: Name of the shape.
        fusion: How memory enters; None where there is none.
        way: Of ``WAYS``; empty elsewhere.
        size: ``T_e`` and ``T_d``, or k.
    """

    part: str
    shape: str
    fusion: str | None
    way: str
    size: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the file, which ``--only`` matches."""
        named = (self.part, self.shape, self.fusion or "text", self.way, "+".join(map(str, self.size)))
        return "/".join(part for part in named if part)


def cells(named: Mapping[str, Shape]) -> list[Cell]:
    """All cells: one shape after the other, of each what is quick first."""
    found = []
    for name, shape in named.items():
        of_text = [Cell("table1", name, None, "", point) for point in shape.points if not point[0]]
        found += [*of_text, *(Cell("rag", name, None, "raw", (k,)) for k in shape.ks)]
        for fusion in FUSIONS:
            found += [Cell("table1", name, fusion, "", point) for point in shape.points if point[0]]
            found += [Cell("rag", name, fusion, way, (k,)) for k in shape.ks for way in list(WAYS)[1:]]
            found.append(Cell("training", name, fusion, "", shape.sequence))
    return found


def forward_pass(models: Models, cell: Cell, clock: Clock) -> dict[str, Any]:
    """A pass of Table 1: the tower looks at pages, the generator reads what is left of them, and text."""
    encoded, text = cell.size
    generator = models.generator(cell.fusion)
    spare = sum(map(len, generator.frame))
    told = TextSegment(" ".join(["the"] * (text - spare)))
    parts = [models.lm] if cell.fusion is None else [models.lm, models.compressor, generator.fusion]
    pages, latents = -(-encoded // TOKENS_PER_PAGE), 0
    if encoded:
        config: Any = models.shape.tower
        sides = (int(pages), config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(*sides, device=models.device, dtype=models.dtype)
        mask = torch.ones(int(pages), (config.image_size // config.patch_size) ** 2, device=models.device).bool()
        latents = round(encoded * models.shape.resampler.latents_per_page / TOKENS_PER_PAGE)

    @torch.no_grad()
    def run() -> None:
        segments: list[Any] = [told]
        if encoded:
            read = models.compressor(pixels, mask)[0].flatten(0, 1)[:latents]
            segments.insert(0, MemorySegment(VisualMemory(read, "")))
        with generator.fusion.condition(generator, [Prompt(tuple(segments))]) as inputs:
            generator.model(**inputs, use_cache=True)

    figures = {"flops": count_flops(run), "pages": int(pages), "latents": latents}
    return with_weights({**figures, **clock.measure(run)}, *parts)


def first_token(models: Models, cell: Cell, clock: Clock, form: str) -> dict[str, Any]:
    """The time to the first token of a question about k passages."""
    passages, template = sample_passages(cell.size[0], models.shape.words), PromptTemplate()
    generator = models.generator(cell.fusion)
    texts = [passage.content for passage in passages]
    raw = template.build(QUESTION, passages, [])
    tokens = generator.prompt_length(raw)
    figures: dict[str, Any] = {"passages": len(passages), "raw_tokens": tokens}

    def answer(prompt: Prompt) -> None:
        generator.generate([prompt], max_new_tokens=1)

    if cell.way == "raw":
        figures |= {"prompt_tokens": tokens} | with_weights(clock.measure(lambda: answer(raw)), models.lm)
    elif cell.way == "memory_made_now":
        made = clock.measure(lambda: answer(template.build(QUESTION, [], models.compressor.encode(texts))))
        figures |= with_weights(made, models.lm, generator.fusion, models.compressor)
    else:
        memories = [memory.latents.numpy() for memory in models.compressor.encode(texts)]
        stored = [(codec.encode(latents, form), *latents.shape) for latents in memories]

        def decoded() -> list[VisualMemory]:
            return [VisualMemory(torch.from_numpy(codec.decode(data, form, n, d).copy()), "") for data, n, d in stored]

        made = clock.measure(lambda: answer(template.build(QUESTION, [], decoded())))
        figures |= with_weights(made, models.lm, generator.fusion)
        figures |= {"form": form, "stored_bytes": sum(len(data) for data, *_ in stored)}
        figures |= {"prompt_tokens": generator.prompt_length(template.build(QUESTION, [], decoded()))}
    return {**figures, "tokens_per_s": round(1000 * tokens / figures["ms"]["median"], 1)}


def training_step(models: Models, cell: Cell, clock: Clock) -> dict[str, Any]:
    """A pass forward and backward, and a step of AdamW, as the recipe ``paper`` trains: what learns is in float32."""
    recipe = load_recipe("paper")
    (stage,) = recipe["stages"]
    accumulate, steps = int(recipe["trainer"]["gradient_accumulation_steps"]), int(stage["steps"])
    generator = models.generator(cell.fusion)
    compressor = models.compressor
    for part in (compressor, generator.fusion):
        part.float()
    rng = random.Random(SEED)
    importance = torch.zeros(max(generator.tokenizer.get_vocab().values()) + 1)
    model = MemoryReading(compressor, generator, pve=Pve(importance, **stage["pve"]))
    train_only(model, stage["train"])
    model.activation_checkpointing_enable()
    model.train()
    examples = [_sequence(models, cell.size, number) for number in range(models.shape.batch)]
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)

    def run() -> None:
        with torch.autocast(models.device.type, torch.bfloat16, enabled=models.device.type == "cuda"):
            loss = model(**model.batch(examples, rng))["loss"]
        loss.backward()

    def learn() -> None:
        optimizer.step()

    batch = model.batch(examples, rng)
    try:
        both = with_weights(clock.measure(run), models.lm, model)
        stepped = clock.measure(learn)
        prepared = clock.measure(lambda: model.batch(examples, rng))
    finally:  # the parts are used again
        optimizer.zero_grad()
        model.eval()
        disable = getattr(models.lm, "activation_checkpointing_disable", None)
        (disable or models.lm.gradient_checkpointing_disable)()
        compressor.to(models.dtype)
        generator.fusion.to(models.dtype)
    step_ms = accumulate * both["ms"]["median"] + stepped["ms"]["median"]
    gradients = sum(weight.nbytes for weight in learning)
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    held = both.pop("memory_bytes")
    return {
        **both,
        "gradient_bytes": gradients,
        "optimizer_bytes": states,
        "memory_bytes": None if held is None else held + gradients + states,
        "sequences": len(examples),
        "pages": len(batch["patch_mask"]),
        "target_tokens": sum(map(len, batch["targets"])),
        "trained_parameters": sum(weight.numel() for weight in learning),
        "preparing_ms": prepared["ms"],
        "optimizer_ms": stepped["ms"],
        "gradient_accumulation_steps": accumulate,
        "step_ms": round(step_ms, 1),
        "steps": steps,
        "gpu_hours": round(steps * step_ms / 3.6e6, 3),
    }


def _sequence(models: Models, sizes: tuple[int, ...], number: int) -> Example:
    """A sequence whose memory takes as many pages as so many tokens do in the paper, and tokens to be told."""
    pages = -(-sizes[0] // TOKENS_PER_PAGE)
    words = sample_passages(1, 1000)[0].text.split()
    words = words[number:] + words[:number]
    patches = sum(models.compressor.renderer.count_patches([" ".join(words)]))
    config: Any = models.shape.tower
    wanted = int(len(words) * (pages - 0.5) * (config.image_size // config.patch_size) ** 2 / patches)
    shown = " ".join((words * (wanted // len(words) + 1))[:wanted])
    return Example((Passage(shown),), "", " ".join(["the"] * sizes[1]), raw=False, ends=False)


# ------------------------------------------------------------------------------------------------------------- the file


class Results:
    """The JSON file: written whole after every cell, in one move.

    Args:
        path: Where it is; what it holds already is kept.
        facts: What was run, and where.
        setting: What must be the same for cells to stand side by side.
    Raises:
        ConfigError: If the file is of another setting.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], setting: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"benchmark": "full_shape", **facts, "setting": dict(setting), "cells": {}}
        if path.is_file():
            before = json.loads(path.read_text("utf-8"))
            if before.get("setting") != json.loads(json.dumps(setting)):
                raise ConfigError(
                    f"{path} must be of this setting to go on, got {before.get('setting')}; give another --output."
                )
            self.content["cells"] = before["cells"]

    def add(self, cell: Cell, figures: Mapping[str, Any]) -> None:
        """Keep a cell."""
        told = {"part": cell.part, "shape": cell.shape, "fusion": cell.fusion, "way": cell.way, "size": list(cell.size)}
        self.content["cells"][cell.key] = told | dict(figures)
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)


def measured(cell: Cell, models: Models, clock: Clock, form: str) -> dict[str, Any]:
    """The figures of a cell, or that it does not fit in memory."""
    begin = time.monotonic()
    try:
        if cell.part == "table1":
            figures = forward_pass(models, cell, clock)
        elif cell.part == "rag":
            figures = first_token(models, cell, clock, form)
        else:
            figures = training_step(models, cell, clock)
    except (torch.OutOfMemoryError, MemoryError) as error:
        figures = {"out_of_memory": True, "error": str(error).splitlines()[0] if str(error) else "out of memory"}
    # Outside of the handler, so that nothing holds on to what the failed pass had made.
    gc.collect()
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"out_of_memory": False, **figures, "seconds": round(time.monotonic() - begin, 1)}


def run(
    results: Results, named: Mapping[str, Shape], wanted: Sequence[Cell], place: tuple[torch.device, torch.dtype],
    clock: Clock, *, form: str, seconds: float,
) -> None:  # fmt: skip
    """Measure the cells that the file lacks, until the time is over."""
    begin, models, current = time.monotonic(), None, ""
    for cell in wanted:
        if cell.key in results.content["cells"]:
            continue
        if time.monotonic() - begin > seconds:
            print(f"stopped after {seconds:g} s; repeat the command to go on at {cell.key}", file=sys.stderr)
            return
        if models is None or current != cell.shape:
            models = None  # one shape at a time is held
            gc.collect()
            models, current = Models(named[cell.shape], *place), cell.shape
        figures = measured(cell, models, clock, form)
        results.add(cell, figures)
        told = "out of memory" if figures["out_of_memory"] else f"{figures['ms']['median']:.2f} ms"
        print(f"{cell.key}: {told}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON; an unfinished one is gone on with")
    parser.add_argument("--device", default=None, help="default: cuda, then cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for any machine")
    parser.add_argument("--only", default="*", help="cells whose name matches, such as 'rag/tinyllama*'")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each cell that count")
    parser.add_argument("--warm-up", type=int, default=2, help="runs before these that do not count")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--form", default=codec.DEFAULT_FORM, choices=list(codec.FORMS), help="of a stored memory")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--plot", type=Path, help="a PNG of the time to the first token against k")
    parser.add_argument("--page", type=Path, help="tables in Markdown")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    facts = run_facts(" ".join(["python benchmarks/full_shape.py", *(sys.argv[1:] if argv is None else argv)]), SEED)
    setting = {
        "tiny": arguments.tiny, "device": device.type, "card": facts["machine"]["device"], "seed": SEED,
        "repeats": arguments.repeats, "warm_up": arguments.warm_up, "dtype": arguments.dtype, "form": arguments.form,
        "torch": facts["versions"]["torch"], "transformers": facts["versions"]["transformers"],
    }  # fmt: skip
    named = shapes(tiny=arguments.tiny)
    try:
        results = Results(arguments.output, facts, setting)
    except ConfigError as error:
        parser.error(str(error))
    wanted = [cell for cell in cells(named) if fnmatch.fnmatch(cell.key, arguments.only)]
    clock = Clock(device, arguments.repeats, arguments.warm_up)
    run(
        results, named, wanted, (device, DTYPES[arguments.dtype]), clock, form=arguments.form, seconds=arguments.seconds
    )
    if arguments.plot and (shown := list(panels(results.content))):
        arguments.plot.write_bytes(first_token_against_k(arguments.plot.stem, shown).png)
    if arguments.page:
        arguments.page.write_text(tables(results.content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
