"""``vist-rag train``: a recipe, from data to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vist_rag.cli.terminal import Interrupted, JsonOption, command, emit_json, out, printable, progress, say, working
from vist_rag.errors import ConfigError

if TYPE_CHECKING:
    from vist_rag.training.plan import RunPlan, Work


@command
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that ships with the package.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            envvar="VIST_RAG_DATA",
            metavar="DIR",
            help="Folder of the recipe's data files; not looked at where a recipe brings its own.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Checkpoints, logs and the trained model.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: stages.align.steps=100. May be repeated."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="Of a recipe that compares: these runs only.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be trained, for how long, and stop.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed rows out, and list them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Teach a compressor to a generator: what reads passages as a few latents, and what reads these.

    The same command continues where the last one was stopped, with the same losses as without a stop. Several GPUs:
    accelerate launch -m vist_rag.cli train ...
    """
    with working("loading"):
        from vist_rag.training.baselines import recipe_runs
        from vist_rag.training.recipe import load_recipe

    plan = load_recipe(recipe, changes or ())
    folder = _packaged(plan) or data
    if folder is None:
        raise ConfigError("--data must name the folder of the recipe's data files, got none.")
    if dry_run:
        _tell_plan(recipe, plan, folder, skip_bad=skip_bad, only=only, as_json=as_json)
        return
    if output is None:
        raise ConfigError("--output must name a folder for checkpoints and the trained model, got none.")
    runs = recipe_runs(plan, folder, output, skip_bad=skip_bad, judge=_judge(plan, folder), only=only)
    models = []
    try:
        for run in runs:
            models.append(run.run())
    except KeyboardInterrupt as error:
        raise Interrupted(f"the checkpoints in {output} are kept; repeat the command to go on.") from error
    if as_json:
        emit_json({"models": [str(model) for model in models]})
        return
    for model in models:
        out.print(f"The model is in {model}; give it to any command as --model {model}.", soft_wrap=True)


def _packaged(plan: Mapping[str, Any]) -> Path | None:
    """Data that ships with the package, for a recipe that trains on it."""
    from importlib.resources import files

    folder = plan.get("data", {}).get("folder")
    return None if folder is None else Path(str(files("vist_rag"))) / folder


def _judge(plan: Mapping[str, Any], data: Path) -> Any:
    """Measures parts in training by the harness, as ``[evaluation]`` says; None where it says nothing."""
    settings = plan.get("evaluation")
    if not settings:
        return None
    from vist_rag.evaluation.harness import blocks_of, run_block
    from vist_rag.evaluation.methods import EvalModel
    from vist_rag.evaluation.task import Reading
    from vist_rag.generation import PromptTemplate

    method, rate = settings.get("method", "memory"), float(settings.get("rate", 1.0))
    (block,) = blocks_of({"blocks": [{"methods": [{"name": method, "rates": [rate]}], **settings["block"]}]})

    def judge(compressor: Any, generator: Any, folder: Path) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        asked = plan.get("settings", {})
        stop = tuple(asked.get("stop", ()))
        tokens = int(asked.get("max_new_tokens", 32))
        # Weights change from one evaluation to the next: rows of another are never taken for these.
        model = EvalModel(compressor, generator, PromptTemplate(**asked.get("template", {})), tokens, stop, folder.name)
        reading = Reading(data, folder, tell=say)
        result = run_block(block, model, {}, reading, command="vist-rag train", progress=progress)
        told = json.loads(result.read_text("utf-8"))
        cell = next(cell for cell in told["cells"] if cell["method"] == method)
        return {name: float(cell[name]) for name in told["metrics"]}

    return judge


# ------------------------------------------------------------------------------------------------------------ planning


def _tell_plan(
    recipe: str, plan: Mapping[str, Any], data: Path, *, skip_bad: bool, only: str | None, as_json: bool
) -> None:
    """Print what the runs of a recipe would train; nothing is left of what that takes."""
    from vist_rag.training.baselines import recipe_runs
    from vist_rag.training.plan import plan_runs, scratch

    with working("counting"), scratch() as output:
        plans = plan_runs(recipe_runs(plan, data, output, skip_bad=skip_bad, only=only))
    if as_json:
        runs = [one.to_dict() for one in plans]
        emit_json({"recipe": recipe, "runs": runs, "hours": sum(one.hours for one in plans)})
        return
    for one in plans:
        if one.name:
            out.print(one.name, style="bold", markup=False)
        for table in _tables(one):
            out.print(table)
    stages = [stage for one in plans for stage in one.stages]
    for speed in dict.fromkeys(stage.speed for stage in stages):
        rate = f"{_short(speed.flops_per_second, 'FLOP/s')} by a large matrix product, measured now"
        at = f"{speed.utilisation:g} of it in training, assumed"
        together = f"; {speed.processes} processes" if speed.processes > 1 else ""
        out.print(f"{speed.device}, {speed.dtype}: {rate}; {at}{together}.", soft_wrap=True)
    if len(plans) > 1:
        out.print(f"All runs: {_duration(sum(one.hours for one in plans))}.")
    out.print(_NOT_COUNTED, soft_wrap=True)


_NOT_COUNTED = (
    "Pages, tokens and FLOPs are of a few batches of each stage, scaled; activations are an estimate. Reading data, "
    "rendering, evaluating on the way and saving are not in the time. Two checkpoints of a stage are kept."
)


def _tables(plan: RunPlan) -> Iterator[Table]:
    """What is read and written, what is trained, what it takes."""
    work = _table("read and written", "steps", "batches", "examples", "pages", "text", "memory", "targets")
    for stage in plan.stages:
        work.add_row(printable(stage.name), f"{stage.steps:,}", *map(_short, _values(stage.total)))
        work.add_row("  a step", "", *map(_short, _values(stage.step)), style="dim")
    total = plan.to_dict()["total"]
    work.add_section()
    work.add_row("total", f"{total['steps']:,}", *map(_short, total["work"].values()))
    yield work

    parts = list(dict.fromkeys(part for stage in plan.stages for part in stage.parameters))
    weights = _table("parameters", "", *parts, "all")
    for stage in plan.stages:
        for row, name in (("trained", stage.name), ("frozen", "")):
            counts = [getattr(stage.parameters[part], row) if part in stage.parameters else 0 for part in parts]
            weights.add_row(printable(name), row, *(_short(n) if n else "-" for n in (*counts, sum(counts))))
    yield weights

    takes = _table("FLOPs", "forward", "backward", "of these teacher", "own answers", "time")
    for stage in plan.stages:
        beside = (stage.flops[name].total if name in stage.flops else 0 for name in ("teacher", "answers"))
        of_all = (stage.all_flops.forward, stage.all_flops.backward, *beside)
        takes.add_row(printable(stage.name), *(_short(n) if n else "-" for n in of_all), _duration(stage.hours))
    takes.add_section()
    flops = (_short(total["flops"][way]) for way in ("forward", "backward"))
    takes.add_row("total", *flops, "", "", _duration(plan.hours))
    yield takes

    memory = _table("bytes", "weights", "gradients", "AdamW", "activations", "all", "checkpoint")
    for stage in plan.stages:
        of = stage.memory
        sizes = (of.weights, of.gradients, of.optimizer, of.activations, of.total, stage.checkpoint_bytes)
        memory.add_row(printable(stage.name), *(_short(size, "B") for size in sizes))
    memory.add_section()
    memory.add_row("most", "", "", "", "", _short(total["memory_bytes"], "B"), "")
    yield memory


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(title, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _values(work: Work) -> tuple[float, ...]:
    return (work.batches, work.examples, work.pages, work.text_tokens, work.memory_tokens, work.target_tokens)


def _short(number: float, unit: str = "") -> str:
    """``12,345``, ``1.23 MB``."""
    if number < 1e5 and not unit:
        return f"{number:,.0f}"
    powers = ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""))
    power, prefix = next((one for one in powers if number >= 0.9995 * 10 ** one[0]), powers[-1])
    return f"{number / 10**power:.3g} {prefix}{unit}".strip()


def _duration(hours: float) -> str:
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{hours:,.1f} h"
