"""``vist-rag train``: a recipe, from data to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vist_rag.cli.terminal import Interrupted, JsonOption, command, emit_json, out, progress, say, working
from vist_rag.errors import ConfigError


@command
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that ships with the package.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", envvar="VIST_RAG_DATA", metavar="DIR", help="Folder of the recipe's data files."),
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
    folder = data or _packaged(plan)
    if folder is None:
        raise ConfigError("--data must name the folder of the recipe's data files, got none.")
    if output is None and not dry_run:
        raise ConfigError("--output must name a folder for checkpoints and the trained model, got none.")
    target = output or Path("dry-run")
    runs = recipe_runs(plan, folder, target, skip_bad=skip_bad, judge=_judge(plan, folder), only=only)
    if dry_run:
        _tell_plan(runs, as_json=as_json)
        return
    models = []
    try:
        for run in runs:
            models.append(run.run())
    except KeyboardInterrupt as error:
        raise Interrupted(f"the checkpoints in {target} are kept; repeat the command to go on.") from error
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


def _tell_plan(runs: list[Any], *, as_json: bool) -> None:
    raise NotImplementedError
