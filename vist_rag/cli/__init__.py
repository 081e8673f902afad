"""``vist-rag``: one file a command, each a thin call into the library."""

from __future__ import annotations

from typing import Annotated

import typer

from vist_rag.cli import ask, costs, demo, eval, index, info, inspect, probe, reindex, render, report, serve, train

app = typer.Typer(
    name="vist-rag",
    help="Answers questions over your documents, and reads most of what it retrieves as pictures: text to pages to a "
    "few latents, instead of raw tokens.",
    epilog="Begin with: vist-rag demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        from vist_rag import __version__

        typer.echo(f"vist-rag {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda wanted: _print_version(wanted=wanted), is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


for _command, _examples in (
    (demo.demo, ("vist-rag demo --questions 10", "vist-rag demo --eval --json")),
    (
        index.index,
        (
            "vist-rag index notes/ report.pdf --index my-index",
            "vist-rag index --verify --index my-index",
            "vist-rag index notes/ --index my-index --engine ray --workers 8",
        ),
    ),
    (reindex.reindex, ("vist-rag reindex --index my-index --model my-checkpoint --drop-others",)),
    (ask.ask, ("vist-rag ask 'When was the bridge built?' --index my-index --k-raw 1 --k-memory 4",)),
    (
        inspect.inspect,
        ("vist-rag inspect 'When was the bridge built?' --index my-index --k-memory 3 -o inspect.html",),
    ),
    (
        serve.serve,
        ("vist-rag serve --index my-index", "vist-rag serve --index my-index --host 0.0.0.0 --api-key-file key.txt"),
    ),
    (
        render.render,
        ("vist-rag render 'Text as the model sees it.' -o page.png", "vist-rag render - -o page.png < notes.txt"),
    ),
    (eval.evaluate, ("vist-rag eval --dataset questions.jsonl --passages index --index my-index --top-k 1,5",)),
    (costs.costs, ("vist-rag costs --paper", "vist-rag costs --measure --k 4", "vist-rag costs --passages 1M,21M")),
    (report.report, ("vist-rag report eval-results --output benchmarks.md",)),
    (train.train, ("vist-rag train embedded --data DIR --output runs/embedded",)),
    (probe.probe, ("vist-rag probe runs/mine/model --data passages",)),
    (info.info, ("vist-rag info --index my-index --json",)),
):
    # A file a command, so the file's name is the command's.
    _name = _command.__module__.rpartition(".")[2]
    app.command(_name, epilog="\n\n".join(f"Example: {example}" for example in _examples))(_command)

__all__ = ["app"]
