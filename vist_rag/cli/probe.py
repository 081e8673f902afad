"""``vist-rag probe``: what the compressor of a checkpoint misreads, measured and kept beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vist_rag.cli.models import readable
from vist_rag.cli.terminal import JsonOption, command, emit_json, out, say, working
from vist_rag.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from vist_rag.fidelity import Fidelity


@command
def probe(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The directory of a checkpoint.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", metavar="FILE|DIR", help="Plain texts: .jsonl(.gz) .txt .md .html .pdf. May be repeated."
        ),
    ],
    texts: Annotated[int, typer.Option(help="Texts that are drawn of these.")] = 2000,
    steps: Annotated[int, typer.Option(help="Of training the reader.")] = 1200,
    seed: Annotated[int, typer.Option(help="Of what is drawn and trained.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what a compressor misreads, so that passages it would misread are read as text.

    Writes compressor/fidelity.json into the checkpoint; takes minutes on a CPU. Training does the same at its end.
    """
    for name, value in (("--texts", texts), ("--steps", steps)):
        if value < 2:
            raise ConfigError(f"{name} must be 2 or more, got {value}.")
    if not checkpoint.is_dir():
        raise CheckpointError(f"CHECKPOINT must be the directory of a checkpoint, got {checkpoint}.")
    with working("loading"), readable(str(checkpoint)):
        from vist_rag.training.probe import probe_checkpoint

    with TemporaryDirectory() as cache:
        with working("reading texts"):
            found = _texts(data, Path(cache))
        fidelity = probe_checkpoint(checkpoint, found, count=texts, steps=steps, seed=seed, tell=say)
    path = fidelity.save(checkpoint / "compressor")
    if as_json:
        emit_json({"path": str(path), **asdict(fidelity)})
    else:
        _show(fidelity, path)


def _texts(data: list[Path], cache: Path) -> list[str]:
    from vist_rag.training.corpus import open_passages

    found: list[str] = []
    for path in data:
        if not path.exists():
            raise InputError(f"--data must be a file or a folder, got {path}, which is not there.")
        corpus = open_passages(path.resolve().parent, [path.resolve().name], cache)
        found += [passage.text for passage in corpus]
    return found


def _show(fidelity: Fidelity, path: Path) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("words")
    for name in ("measured", "misread by the probe", "by the model's speller"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, rate in fidelity.probe.items():
        spelt = fidelity.speller[name] if fidelity.speller is not None else None
        table.add_row(name, f"{rate.n:,}", f"{rate.share:.1%}", f"{spelt.share:.1%}" if spelt else "-")
    out.print(table)
    out.print(f"written: {path}", markup=False, soft_wrap=True)
