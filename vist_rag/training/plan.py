"""What a recipe would train, and for how long: counted from sizes and a few batches, before anything is trained.

Pretrained parts are on PyTorch's ``meta`` device, where a weight has a shape and no values: configs and tokenizers are
all that is read of them. A checkpoint to start from, and a sentence encoder to make a generator of, are loaded as in
training: both are small.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import nn

from vist_rag.training.flops import PARTS, BatchCosts, Flops, batch_costs, part_of
from vist_rag.training.reading import MemoryReading
from vist_rag.training.rehearsal import Rehearsed, rehearse
from vist_rag.training.run import RecipeRun
from vist_rag.training.tower import TowerReading
from vist_rag.training.trainer import processes

UTILISATION = 0.4
"""Share of the rate of a large matrix product that training is taken to reach."""
DRAWS = 8
"""Batches of a stage that are looked at."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights of one part."""

    trained: int
    frozen: int


@dataclass(frozen=True, slots=True)
class Work:
    """What is read and written, in a step or in all; of tokens and pages the mean of the batches that were looked at.

    Attributes:
        batches: Over all processes.
        examples: Texts, or prompts with their targets.
        pages: Pages that are rendered.
        text_tokens: Positions of prompts that are read as text, without padding.
        memory_tokens: Positions of prompts that stand for memory; in a lexical stage, latents.
        target_tokens: Tokens to be written; in a lexical stage, word pieces that memory has to show; in a tower stage,
            pieces at the edges of patches.
    """

    batches: float
    examples: float
    pages: float
    text_tokens: float
    memory_tokens: float
    target_tokens: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device of each process, without sharding.

    Attributes:
        weights: Of the stage's model, a frozen copy that teaches and tables of word embeddings among them.
        gradients: As large as the weights that are trained.
        optimizer: Two states of each weight that is trained, as AdamW keeps them.
        activations: What waits for the backward pass of the largest batch that was looked at: an estimate
            (``training.flops``).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Speed:
    """What the device was measured to do.

    Attributes:
        device: ``cuda``, ``mps`` or ``cpu``: what training would use.
        dtype: Precision that training multiplies in.
        flops_per_second: Of a large matrix product in that precision, measured.
        utilisation: Share of it that training is taken to reach: an assumption.
        processes: How many train together.
    """

    device: str
    dtype: str
    flops_per_second: float
    utilisation: float
    processes: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage.

    Attributes:
        name: As in the recipe.
        kind: As in the recipe.
        steps: Optimizer steps.
        parameters: Of each part that is there.
        step: Work of a step.
        total: Work of all steps.
        flops: Of all steps, by part; ``teacher`` reads as text what the generator reads as memory, ``answers`` is what
            the generator writes before the stage begins.
        memory: Bytes on the device.
        checkpoint_bytes: On disk, of one checkpoint; two are kept.
        speed: Of the device.
    """

    name: str
    kind: str
    steps: int
    parameters: Mapping[str, Parameters]
    step: Work
    total: Work
    flops: Mapping[str, Flops]
    memory: Memory
    checkpoint_bytes: int
    speed: Speed

    @property
    def all_flops(self) -> Flops:
        """Of all parts."""
        return sum(self.flops.values(), Flops())

    @property
    def hours(self) -> float:
        """FLOPs over what is done in an hour. Reading data, rendering, evaluating and saving are not in it."""
        alone = self.flops.get("answers", Flops()).total  # by the first process, which the others wait for
        shared = (self.all_flops.total - alone) / self.speed.processes
        return (shared + alone) / (self.speed.flops_per_second * self.speed.utilisation) / 3600

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        sums = {"all_flops": asdict(self.all_flops), "hours": self.hours}
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}, **sums}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One run of a recipe; its name is empty where there is one alone."""

    name: str
    stages: tuple[StagePlan, ...]

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        flops = sum((stage.all_flops for stage in self.stages), Flops())
        work = Work(*(sum(getattr(s.total, name) for s in self.stages) for name in Work.__dataclass_fields__))
        total = {
            "steps": sum(stage.steps for stage in self.stages),
            "work": asdict(work),
            "flops": asdict(flops),
            "memory_bytes": max(stage.memory.total for stage in self.stages),
            "hours": self.hours,
        }
        return {"name": self.name, "stages": [stage.to_dict() for stage in self.stages], "total": total}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the output of runs that are planned and not made: nothing of it is left."""
    with TemporaryDirectory(prefix="vist-rag-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def plan_runs(runs: Sequence[RecipeRun], *, draws: int = DRAWS) -> list[RunPlan]:
    """Plan runs, which share what is read of their data; see :func:`plan_run`."""
    plans = []
    for run in runs:
        run.cache = runs[0].cache
        plans.append(plan_run(run, name=run.output.name if len(runs) > 1 else "", draws=draws))
    return plans


def plan_run(run: RecipeRun, *, name: str = "", draws: int = DRAWS) -> RunPlan:
    """What each stage of a run would train, and take.

    Data is checked as in training, into the run's ``cache``; its output is used for the vocabulary of a generator that
    is made from a sentence encoder.

    Args:
        run: Not run.
        name: Of the plan.
        draws: Batches of each stage that are looked at, the same as training would take.
    Raises:
        VistError: As training would.
    """
    known: dict[str, int] = {}
    stages = []
    for stage in run.recipe["stages"]:
        rehearsed = rehearse(run, stage)
        model = rehearsed.model
        stages.append(_plan_stage(run, stage, rehearsed, known, draws))
        trained = {n: _bytes([w]) for n, w in model.named_parameters() if w.requires_grad}
        if isinstance(model, TowerReading):
            trained = {f"compressor.{n}": size for n, size in trained.items() if n.startswith("tower.")}
        known |= {n: size for n, size in trained.items() if not n.startswith("reading.")}
    return RunPlan(name, tuple(stages))


def _plan_stage(
    run: RecipeRun, stage: Mapping[str, Any], rehearsed: Rehearsed, known: Mapping[str, int], draws: int
) -> StagePlan:
    model = rehearsed.model
    trainer = {**run.recipe.get("trainer", {}), **stage.get("trainer", {})}
    device = torch.device("cpu") if trainer.get("use_cpu") else PartialState().device
    dtype = _precision(trainer, device, model)
    steps, batches = int(stage["steps"]), run.batches(stage)
    checkpointing = any(name.endswith("_checkpointing") and bool(value) for name, value in trainer.items())
    seen = []
    for number in sorted({i * batches // draws for i in range(draws)}):
        batch, examples = rehearsed.build(number)
        seen.append(
            batch_costs(model, batch, examples=examples, value_bytes=dtype.itemsize, checkpointing=checkpointing)
        )
    flops = {**rehearsed.before, **_mean_flops(seen, batches)}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    size = _bytes(trained.values())
    own = {name for name, _ in model.named_parameters()}
    kept = sum(bytes for name, bytes in known.items() if name in own and name not in trained) + size
    weights = _bytes(model.parameters()) + _bytes(model.buffers()) + _teacher_bytes(stage, model)
    return StagePlan(
        name=stage["name"],
        kind=stage["kind"],
        steps=steps,
        parameters=_parameters(model),
        step=_work(seen, batches / steps),
        total=_work(seen, batches),
        flops=flops,
        memory=Memory(weights, size, 2 * size, int(max(one.activation_bytes for one in seen))),
        checkpoint_bytes=kept + 2 * size,
        speed=Speed(
            device.type, str(dtype).removeprefix("torch."), _matmul_rate(device.type, dtype), UTILISATION, processes()
        ),
    )


def _mean_flops(seen: Sequence[BatchCosts], batches: int) -> dict[str, Flops]:
    """FLOPs of so many batches, by part."""
    parts = dict.fromkeys(name for one in seen for name in one.flops)
    return {
        name: sum((one.flops.get(name, Flops()) for one in seen), Flops()).times(batches / len(seen)) for name in parts
    }


def _work(seen: Sequence[BatchCosts], batches: float) -> Work:
    names = ("examples", "pages", "text_tokens", "memory_tokens", "target_tokens")
    return Work(batches, *(batches * sum(getattr(one, name) for one in seen) / len(seen) for name in names))


def _parameters(model: nn.Module) -> dict[str, Parameters]:
    counts = {part: [0, 0] for part in PARTS}
    for name, weight in model.named_parameters():
        counts[part_of(name)][not weight.requires_grad] += weight.numel()
    return {part: Parameters(*both) for part, both in counts.items() if any(both)}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _teacher_bytes(stage: Mapping[str, Any], model: nn.Module) -> int:
    """Of the copy of the generator that ``MemoryReading.teach_itself`` makes."""
    if not isinstance(model, MemoryReading) or not (model.distil or model.states):
        return 0
    learns = any(w.requires_grad and "lora_" not in name for name, w in model.lm.named_parameters())
    return _bytes(model.lm.parameters()) if learns and stage.get("teacher", "start") == "start" else 0


# --------------------------------------------------------------------------------------------------------------- speed


def _precision(trainer: Mapping[str, Any], device: torch.device, model: nn.Module) -> torch.dtype:
    """What training multiplies in: that of autocast where it is on, else that of the generator."""
    if trainer.get("fp16"):
        return torch.float16
    if trainer.get("bf16", device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    lm = getattr(model, "lm", None)
    return cast(torch.dtype, lm.dtype) if lm is not None else torch.float32


@functools.cache
def _matmul_rate(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOPs a second of a large matrix product, measured for about so long."""
    size = 1024 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        left @ right
        if device != "cpu":
            torch.accelerator.synchronize()

    multiply()
    multiply()
    count, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds or not count:
        multiply()
        count += 1
    return 2 * size**3 * count / taken
