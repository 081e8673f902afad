"""``vist-rag train``: a recipe, from data to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vist_rag.cli.terminal import Interrupted, command, out


@command
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that ships with the package.")],
    data: Annotated[
        Path, typer.Option("--data", envvar="VIST_RAG_DATA", metavar="DIR", help="Folder of the recipe's data files.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Checkpoints, logs and the trained model.")],
) -> None:
    """Train a compressor and a generator that reads its memory.

    The same command continues where the last one was stopped.
    """
    from vist_rag.training.recipe import RecipeRun, load_recipe

    try:
        model = RecipeRun(load_recipe(recipe), data, output).run()
    except KeyboardInterrupt as error:
        raise Interrupted(f"the checkpoints in {output} are kept; repeat the command to go on.") from error
    out.print(f"The model is in {model}; give it to any command as --model {model}.", soft_wrap=True)
