"""``vist-rag eval``: a recipe of questions, passages and methods, measured."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from vist_rag.cli.terminal import Interrupted, JsonOption, ModelOption, command, emit_json, out, progress, say, working
from vist_rag.errors import ConfigError


@command
def evaluate(
    recipe: Annotated[
        str | None, typer.Argument(help="A TOML file, or the name of a recipe that ships with the package.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Rows (.jsonl) and results (.json), a pair a block.")
    ] = Path("eval-results"),
    data: Annotated[
        Path | None, typer.Option("--data", envvar="VIST_RAG_DATA", metavar="DIR", help="Folder of the data sets.")
    ] = None,
    model: ModelOption = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=DIR", help="The checkpoint of a trained baseline; may be given several times."),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="PATTERN", help="Only blocks whose name matches.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="A seeded sample of N questions a block.")] = None,
    task: Annotated[str, typer.Option(metavar="qa|icl|lm", help="Without a recipe: what is asked.")] = "qa",
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME|FILE|HUB_ID", help="Without a recipe: the questions or texts.")
    ] = None,
    split: Annotated[str, typer.Option(help="Without a recipe: which questions.")] = "dev",
    passages: Annotated[
        str, typer.Option(metavar="gold|distant|bm25|given|index", help="Without a recipe: which passages are read.")
    ] = "gold",
    index: Annotated[
        Path | None, typer.Option("--index", metavar="DIR", help="For --passages index: made by vist-rag index.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Files of passages, {id, title, text}.", show_default="corpus/*.jsonl*"),
    ] = None,
    top_k: Annotated[str, typer.Option(metavar="K,K,...", help="Without a recipe: passages a question.")] = "1",
    methods: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Without a recipe: ways to hand the passages over.")
    ] = "closed_book,raw,truncated,frequency,memory,shuffled_memory",
    rates: Annotated[
        str, typer.Option(metavar="R,R,...", help="Without a recipe: raw tokens over tokens given.")
    ] = "1,2.3,4.6,9",
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts in one forward pass.")] = 16,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave malformed rows out, and tell which.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on questions: memory beside raw text, baselines and controls, at equal budgets.

    The same command goes on where the last one was stopped. Look at the results with vist-rag report.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be 1 or more, got {batch_size}.")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {limit}.")
    with working("loading"):
        from vist_rag.evaluation.harness import blocks_of, load_recipe, run_block
        from vist_rag.evaluation.methods import EvalModel
        from vist_rag.evaluation.task import Reading

    if (recipe is None) == (dataset is None):
        raise ConfigError("give either a recipe or --dataset, got " + ("both." if recipe else "neither."))
    if recipe is not None:
        plan = load_recipe(recipe)
    else:
        block: dict[str, Any] = {"task": task, "dataset": dataset, "split": split, "passages": passages}
        if task == "lm":
            block["texts"] = [dataset]
        block |= {"top_k": [_number("--top-k", k, int) for k in top_k.split(",")], "methods": methods.split(",")}
        plan = {"blocks": [block | {"rates": [_number("--rates", rate, float) for rate in rates.split(",")]}]}
    changes: dict[str, Any] = {} if limit is None else {"limit": limit}
    if corpus:
        changes["corpus"] = corpus
    if index is not None:
        changes["index"] = str(index)
    blocks = [block | changes for block in blocks_of(plan) if fnmatch.fnmatch(block["name"], only or "*")]
    if not blocks:
        raise ConfigError(f"--only must match a block ({', '.join(b['name'] for b in blocks_of(plan))}), got {only!r}.")
    checkpoints = {**plan.get("checkpoints", {}), **_pairs(checkpoint or [])}
    with working("loading the models"):
        main = EvalModel.load(model)
        used = {e if isinstance(e, str) else e["name"] for block in blocks for e in block.get("methods", ())}
        trained = {name: EvalModel.load(path) for name, path in checkpoints.items() if name in used}
    reading = Reading(data, output, skip_bad, say)
    written = []
    for block in blocks:
        try:
            path = run_block(
                block,
                main,
                trained,
                reading,
                command=_repeatable(recipe, block, checkpoints, model, limit),
                progress=progress,
                batch_size=batch_size,
            )
        except KeyboardInterrupt as error:
            raise Interrupted(f"the rows in {output} are kept; repeat the command to go on.") from error
        written.append(str(path))
        if not as_json:
            out.print(f"{path}", soft_wrap=True)
    if as_json:
        emit_json({"results": written})


def _number(option: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers separated by commas, got {text!r}.") from error


def _pairs(options: list[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    wrong = [option for option, (name, _, path) in zip(options, pairs, strict=True) if not name or not path]
    if wrong:
        raise ConfigError(f"--checkpoint must be METHOD=DIR, got {wrong[0]!r}.")
    return {name: path for name, _, path in pairs}


def _named(recipe: str) -> str:
    """A recipe as anyone can name it: a whole path is one of this machine."""
    return Path(recipe).name if Path(recipe).is_absolute() else recipe


def _repeatable(
    recipe: str | None, block: dict[str, Any], checkpoints: dict[str, str], model: str | None, limit: int | None
) -> str:
    """The command as anyone can repeat it: paths of this machine are named, not given."""
    words = ["vist-rag eval", _named(recipe) if recipe else f"--task {block['task']} --dataset {block['dataset']}"]
    words += ["--data DIR --output DIR", f"--only {block['name']}"]
    words += ["--model MODEL"] if model else []
    words += [f"--limit {limit}"] if limit is not None else []
    return " ".join([*words, *(f"--checkpoint {name}=DIR" for name in checkpoints)])
