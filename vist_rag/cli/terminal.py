"""What every command does alike: an error is one line, progress is on stderr, ``--json`` is one document on stdout."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ParamSpec, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from vist_rag.errors import VistError

BAD_INPUT, INTERRUPTED = 2, 130

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR|HUB_ID", help="Checkpoint.", show_default="the one that comes with vist-rag"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else, on stdout.")]

_P = ParamSpec("_P")
_REPORT_EVERY_S = 10.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a line that says what is kept."""


def command(function: Callable[_P, None]) -> Callable[_P, None]:
    """Make a function a command: its errors are one line on stderr and exit code 2, ctrl-C is one line and 130."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for stream in (sys.stdout, sys.stderr):
            _never_fail_to_encode(stream)
        with warnings.catch_warnings():
            _silence()
            try:
                function(*args, **kwargs)
            except BrokenPipeError:
                raise  # typer ends quietly: whoever read our output has seen enough
            except VistError as error:
                raise _failed(str(error)) from error
            except OSError as error:
                raise _failed(f"{error.filename or 'a file'}: {error.strerror or error}") from error
            except KeyboardInterrupt as error:
                say(f"interrupted: {str(error) or 'nothing was changed.'}", style="yellow")
                raise typer.Exit(INTERRUPTED) from error

    return run


def say(line: str, *, style: str = "") -> None:
    """One line on stderr."""
    err.print(printable(line), style=style, markup=False, soft_wrap=True)


def emit_json(document: Any) -> None:
    """One JSON document on stdout: ASCII, so that no terminal and no lone surrogate can spoil it."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


def printable(text: str) -> str:
    """Text for a terminal, character by character: what controls it (escape sequences, line ends) is a space."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def count(n: int, noun: str) -> str:
    """``1 page``, ``2 pages``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while the body runs; nothing where that is a file."""
    with err.status(what) if err.is_terminal else nullcontext():
        yield


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; where that is a file, a line every ten seconds. Yields what is called with each step's count."""
    if not err.is_terminal:
        yield _lines(what, total)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(what: str, total: int) -> Callable[[int], None]:
    done, last = 0, time.monotonic()
    say(f"{what}: {total:,}")

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last > _REPORT_EVERY_S:
            last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")

    return advance


def _failed(message: str) -> typer.Exit:
    say(f"error: {' '.join(message.split())}", style="red")
    return typer.Exit(BAD_INPUT)


def _never_fail_to_encode(stream: TextIO) -> None:
    """An answer with a character that the terminal does not know is printed all the same."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _silence() -> None:
    """Keep the bars and the chatter of other libraries off the terminal; show our own warnings, a line each."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # it has read the environment already
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"vist_rag(\..*)?")

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(f"warning: {' '.join(str(message).split())}", style="yellow")

    warnings.showwarning = show
