"""``vist-rag report``: result files to a Markdown page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vist_rag.cli.terminal import JsonOption, command, emit_json, out, printable, working


@command
def report(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS_DIR", help="Folder of the JSON files that vist-rag eval wrote.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR|FILE.md",
            help="The page, or a folder for benchmarks.md; pictures go to images/ beside it.",
            show_default="RESULTS_DIR",
        ),
    ] = None,
    title: Annotated[str, typer.Option(metavar="TEXT", help="The page's first heading.")] = "Benchmarks",
    as_json: JsonOption = False,
) -> None:
    """Write a Markdown page with tables and plots from evaluation results.

    Every figure comes from the files; the same files give the same page. Needs the extra eval.
    """
    with working("writing the report"):
        from vist_rag.evaluation.report import write_report

        written = write_report(results, output, title=title)
    if as_json:
        emit_json({"page": str(written[0]), "images": [str(path) for path in written[1:]]})
        return
    for path in written:
        out.print(printable(str(path)), markup=False, soft_wrap=True)
