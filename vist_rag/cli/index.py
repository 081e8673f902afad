"""``vist-rag index``: files -> passages with memories, in a durable index."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vist_rag.cli import upkeep
from vist_rag.cli.models import load_compressor_of, tell_of_other_memories
from vist_rag.cli.terminal import (
    Interrupted,
    JsonOption,
    ModelOption,
    command,
    count,
    emit_json,
    out,
    printable,
    progress,
    say,
    working,
)
from vist_rag.errors import ConfigError, InputError

if TYPE_CHECKING:
    from vist_rag.compression import VistCompressor
    from vist_rag.retrieval import PassageIndex
    from vist_rag.types import Passage

_BATCH = 64
"""Passages a transaction: what ctrl-C can undo."""

_LOW_COVERAGE = 0.98
_NAMED = 5  # files and passages that are named on the screen; --json names all


@dataclass
class Stored:
    """What has been stored so far: counts, and the passages that the glyph atlas covers badly (id -> coverage)."""

    passages: int
    added: int = 0
    unchanged: int = 0
    memories_made: int = 0
    memories_kept: int = 0

    def __post_init__(self) -> None:
        self.low_coverage: dict[str, float] = {}

    @property
    def done(self) -> int:
        """Passages that are safe."""
        return self.added + self.unchanged


@command
def index(
    *,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="Files (.txt .md .jsonl .html .pdf) and directories."),
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", metavar="DIR", help="The index; made where there is none.")
    ] = None,
    words: Annotated[int, typer.Option(help="Words a passage.")] = 100,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Store text and vectors only; memories are made when first read.")
    ] = False,
    memory_form: Annotated[
        str | None,
        typer.Option("--memory-form", metavar="FORM", help="How memories are stored.", show_default="as it was"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Instead: read every row and say what is not as it was written.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Instead: print rows and bytes, by kind.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Instead: make anew whatever can be.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Instead: give free space back to the disk.")] = False,
    model: ModelOption = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Who computes: this process, or workers on any number of machines.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="For ray: workers.", show_default="one a GPU, else one a CPU")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="For ray: a cluster.", show_default="this machine alone"),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For ray: leave passages, vectors and memories here, as Parquet files."),
    ] = None,
    part: Annotated[int, typer.Option(metavar="N", help="For ray: passages a Parquet file, about.")] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Read files into passages, compress each to memory, and store them.

    What is interrupted keeps every batch that was stored; the same command goes on from there. Passages that are
    stored already, with their memory, are passed over. A file that is named must be readable; one that is found in a
    directory and is not, is left out and listed.
    """
    if index is None and parquet is None:
        raise ConfigError("--index must be given (with --engine ray, --parquet will do), got neither.")
    instead = {upkeep.verify: verify, upkeep.stats: stats, upkeep.rebuild: rebuild, upkeep.compact: compact}
    if asked := [care for care, wanted in instead.items() if wanted]:
        if paths or len(asked) > 1 or index is None:
            raise ConfigError(
                "--verify, --stats, --rebuild and --compact stand alone, without files; give one of them."
            )
        asked[0](index, as_json=as_json)
        return
    if not paths:
        raise InputError("There is nothing to read; name files or directories.")
    begin = time.monotonic()
    _check_engine(engine, {"--workers": workers, "--ray-address": ray_address, "--parquet": parquet})
    if engine == "ray":
        from vist_rag.cli.bulk import Engine, index_with_ray

        how = Engine(part, workers, ray_address, parquet)
        report = index_with_ray(paths, index, words, model, memory_form, how, with_memory=not no_memory)
    elif index is not None:
        report = _index_here(paths, index, words, model, memory_form, with_memory=not no_memory)
    report["seconds"] = round(time.monotonic() - begin, 2)
    if as_json:
        emit_json(report)
    else:
        _show(report)


def _check_engine(engine: str, for_ray: Mapping[str, object]) -> None:
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine must be local or ray, got {engine!r}.")
    if engine == "local" and (idle := [name for name, value in for_ray.items() if value is not None]):
        raise ConfigError(f"{', '.join(idle)} must come with --engine ray, got --engine local; add it.")


def _index_here(
    paths: Sequence[Path], index: Path, words: int, model: str | None, memory_form: str | None, *, with_memory: bool
) -> dict[str, Any]:
    failed: list[str] = []
    with working("reading files"):
        # All at once, before anything is loaded or written: what is wrong with the files is told in seconds.
        passages = list(read_files(paths, words, failed))
    warn_of(failed)
    compressor = load_compressor_of(model) if with_memory else None
    from vist_rag.retrieval import PassageIndex

    with PassageIndex.open(index, memory_form=memory_form) as opened:
        others = tell_of_other_memories(opened, index, compressor.fingerprint) if compressor else 0
        stored = Stored(len(passages))
        try:
            with progress("compressing and storing" if compressor else "storing", len(passages)) as advance:
                store(opened, passages, compressor, stored, advance)
            if compressor is not None:
                compress_lacking(opened, compressor, stored)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"{stored.done:,} of {stored.passages:,} passages are kept in {index}; repeat the command to go on."
            ) from error
        fingerprint = compressor.fingerprint if compressor else None
        return report_of(index, opened, stored, fingerprint, others) | report_of_files(paths, failed)


def read_files(paths: Sequence[Path], words: int, failed: list[str]) -> Iterator[Passage]:
    """Passages; what is wrong with files that were found and cannot be read is added to ``failed``.

    Raises:
        InputError: If a file that was named cannot be read, or there is no text at all.
    """
    from vist_rag.retrieval import read_passages

    named = tuple(str(path) for path in paths if not path.is_dir())

    def on_error(error: InputError) -> None:
        if named and str(error).startswith(named):
            raise error
        failed.append(str(error))

    try:
        yield from read_passages(paths, words=words, on_error=on_error)
    except InputError as error:
        raise InputError(" ".join([str(error), *(f"Left out: {line}" for line in failed[:_NAMED])])) from error


def warn_of(failed: Sequence[str]) -> None:
    """Say which files were left out, as far as a screen has room for them."""
    for line in failed[:_NAMED]:
        say(f"warning: left out: {line}", style="yellow")


def store(
    index: PassageIndex,
    passages: Sequence[Passage],
    compressor: VistCompressor | None,
    stored: Stored,
    advance: Callable[[int], None],
) -> None:
    """Add passages batch by batch, each with its memory in one transaction; what is stored already is passed over.

    Args:
        index: Where to.
        passages: What.
        compressor: Makes the memories; None stores none.
        stored: Counts on, batch by batch.
        advance: Called with the size of each batch once it is stored.
    """
    from vist_rag.pipeline import compress

    fingerprint = compressor.fingerprint if compressor else ""
    for begin in range(0, len(passages), _BATCH):
        batch = passages[begin : begin + _BATCH]
        made: dict[str, Any] = {}
        if compressor is not None:
            known = index.memories([p.content for p in batch], fingerprint)
            lacking = [p for p in batch if p.content not in known]
            made = compress(compressor, [p.content for p in lacking]) if lacking else {}
            stored.low_coverage |= low(_coverage(compressor, lacking))
        memories = [made.get(p.content) for p in batch] if compressor else None
        form = compressor.memory_form if compressor else None
        added = index.add(batch, memories, fingerprint=fingerprint, form=form)
        stored.added += added
        stored.unchanged += len(batch) - added
        stored.memories_made += len(made)
        stored.memories_kept += len(known) if compressor else 0
        advance(len(batch))


def compress_lacking(index: PassageIndex, compressor: VistCompressor, stored: Stored) -> None:
    """Make the memories of passages that were indexed before, without one or with another compressor's."""
    from vist_rag.pipeline import encode_lacking

    lacking = index.count_lacking(compressor.fingerprint)
    if not lacking:
        return
    with progress("compressing passages that were indexed before", lacking) as advance:
        for made in encode_lacking(index, compressor):
            stored.memories_made += len(made)
            advance(len(made))


def _coverage(compressor: VistCompressor, passages: Sequence[Passage]) -> dict[str, float]:
    coverage = compressor.renderer.render([p.content for p in passages]).coverage.tolist()
    return {p.id: c for p, c in zip(passages, coverage, strict=True)}


def low(coverage: Mapping[str, float]) -> dict[str, float]:
    """Of passages by coverage, those with more characters than two in a hundred that no glyph of the atlas covers."""
    return {id_: round(c, 3) for id_, c in coverage.items() if c < _LOW_COVERAGE}


def report_of(
    directory: Path | None, index: PassageIndex | None, stored: Stored, fingerprint: str | None, others: int
) -> dict[str, Any]:
    """What was done, as ``--json`` prints it."""
    counts = asdict(stored)
    return {
        "index": str(directory) if directory else None,
        "passages": {
            "read": counts["passages"],
            "added": counts["added"],
            "unchanged": counts["unchanged"],
            "in_index": None if index is None else len(index),
        },
        "memories": {
            "fingerprint": fingerprint,
            "made": counts["memories_made"],
            "kept": counts["memories_kept"],
            "of_other_compressors": others,
        },
        "low_coverage": stored.low_coverage,
    }


def report_of_files(paths: Sequence[Path], failed: Sequence[str]) -> dict[str, Any]:
    """Which files were not read, and why."""
    from vist_rag.retrieval import find_documents

    return {"files": {"skipped": [str(path) for path in find_documents(paths).skipped], "left_out": list(failed)}}


def _show(report: dict[str, Any]) -> None:
    passages, memories, files = report["passages"], report["memories"], report["files"]
    low, skipped, left_out = report["low_coverage"], files["skipped"], files["left_out"]
    changes = f"{passages['added']:,} new or changed, {passages['unchanged']:,} as they were"
    lines = [f"{count(passages['read'], 'passage')} read, in {report['seconds']:.1f} s"]
    if report["index"]:
        lines = [
            f"{report['index']}: {count(passages['in_index'], 'passage')}; {changes}, in {report['seconds']:.1f} s"
        ]
    if memories["fingerprint"]:
        lines.append(
            f"memories: {memories['made']:,} made, {memories['kept']:,} kept, compressor {memories['fingerprint'][:12]}"
        )
    if parts := report.get("parts"):
        where = f" in {parts['directory']}" if parts["directory"] else ""
        lines.append(f"parts{where}: {parts['made']:,} made, {parts['kept']:,} kept")
    if skipped:
        lines.append(f"skipped for their extension: {count(len(skipped), 'file')}, {_some(skipped)}")
    if left_out:
        lines.append(f"left out, cannot be read: {count(len(left_out), 'file')}")
    if low:
        lines.append(
            f"hard to read for the model, which has no glyphs for over 2 % of the characters: "
            f"{count(len(low), 'passage')}, {_some(list(low))}; read them as text (--k-raw)"
        )
    for line in lines:
        out.print(printable(line), markup=False, soft_wrap=True)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
