"""``vist-rag index --engine ray``: the same index, made by many workers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vist_rag.cli.index import Stored, compress_lacking, low, read_files, report_of, report_of_files, warn_of
from vist_rag.cli.models import load_compressor_of, tell_of_other_memories
from vist_rag.cli.terminal import Interrupted, count, progress, say, working
from vist_rag.errors import ConfigError

if TYPE_CHECKING:
    from vist_rag.bulk import Part, Parts
    from vist_rag.retrieval import PassageIndex
    from vist_rag.types import Passage

_PARTS = "parts"
"""Folder inside an index for parts on their way into it; gone when they are."""


class Engine(NamedTuple):
    """How Ray is asked.

    Attributes:
        part: Passages a part.
        workers: Number of workers; None: as the cluster has.
        address: Of the Ray cluster; None: this machine.
        parquet: Where the parts stay; None: in the index, until they are stored.
    """

    part: int
    workers: int | None
    address: str | None
    parquet: Path | None


def index_with_ray(
    paths: Sequence[Path],
    index: Path | None,
    words: int,
    model: str | None,
    memory_form: str | None,
    engine: Engine,
    *,
    with_memory: bool,
) -> dict[str, Any]:
    """Read files, have parts made, store them.

    Args:
        paths: Files and directories.
        index: Where to store; None: nowhere, the parts stay as Parquet.
        words: Words a passage.
        model: The checkpoint.
        memory_form: How the index stores memories; Parquet has float16.
        engine: Who makes the parts, and where they are.
        with_memory: Whether memories are made.
    Returns:
        What was done, as ``--json`` prints it.
    """
    from vist_rag.bulk import Parts, Recipe, make_with_ray, require_ray
    from vist_rag.retrieval import PassageIndex
    from vist_rag.retrieval.embedder import DEFAULT_MODEL

    require_ray()
    parquet = engine.parquet
    compressor = load_compressor_of(model) if with_memory else None
    fingerprint = compressor.fingerprint if compressor else ""
    failed: list[str] = []
    with ExitStack() as stack:
        opened, others = None, 0
        if index is not None and (index / "passages.sqlite").is_file():
            opened = stack.enter_context(PassageIndex.open(index, memory_form=memory_form))
            others = tell_of_other_memories(opened, index, fingerprint) if compressor else 0
        checkpoint = str(Path(model).absolute()) if model and Path(model).is_dir() else model
        recipe = Recipe(opened.embedder.name if opened else DEFAULT_MODEL, checkpoint, fingerprint)
        parts = Parts(parquet or _inside(index), recipe, engine.part)
        with working("reading files"):
            # With --parquet every part is wanted as a file, also where the index has its passages.
            plan = parts.plan(read_files(paths, words, failed), None if parquet else opened)
        warn_of(failed)
        stored = Stored(sum(part.passages for part in plan))
        missing = _passages(plan, "missing")
        if compressor is not None:
            stored.memories_made, stored.memories_kept = missing, stored.passages - missing
        try:
            with progress("embedding and compressing" if compressor else "embedding", stored.passages) as advance:
                advance(stored.passages - missing)
                with redirect_stdout(sys.stderr):  # where Ray tells of workers that died; stdout is for the result
                    make_with_ray(parts, plan, workers=engine.workers, address=engine.address, advance=advance)
            if index is not None:
                opened = opened or stack.enter_context(PassageIndex.open(index, memory_form=memory_form))
                # Read once more, not kept: a corpus may be larger than the memory of this machine.
                form = compressor.memory_form if compressor else None
                _merge(parts, plan, read_files(paths, words, []), opened, stored, form, keep=parquet is not None)
                if compressor is not None:
                    compress_lacking(opened, compressor, stored)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"what was made is kept in {parts.directory}, and {stored.done:,} of {stored.passages:,} passages are "
                "stored; repeat the command to go on."
            ) from error
        parts.tidy()
        report = report_of(index, opened, stored, fingerprint or None, others)
    return report | report_of_files(paths, failed) | {"parts": _report_of_parts(parts, plan, parquet)}


def _inside(index: Path | None) -> Path:
    if index is None:
        raise ConfigError("--index must be given where --parquet is not, got neither.")
    return index / _PARTS


def _passages(plan: Sequence[Part], state: str) -> int:
    return sum(part.passages for part in plan if part.state == state)


def _merge(
    parts: Parts,
    plan: Sequence[Part],
    passages: Iterable[Passage],
    index: PassageIndex,
    stored: Stored,
    form: str | None,
    *,
    keep: bool,
) -> None:
    with progress("storing", stored.passages) as advance:
        for part, some in parts.again(plan, passages):
            added, coverage = parts.merge(part, some, index, keep=keep, form=form)
            stored.added += added
            stored.unchanged += len(some) - added
            if part.state == "missing":
                stored.low_coverage |= low(coverage)
            advance(len(some))


def _report_of_parts(parts: Parts, plan: Sequence[Part], parquet: Path | None) -> dict[str, Any]:
    """Parts that stay; those of other files or models are left where they are, and said."""
    others = parts.others(plan) if parquet else []
    if others:
        say(
            f"note: {parquet} holds {count(len(others), 'part')} that are not of these files and models, such as "
            f"{others[0].name}; delete them where they are not wanted.",
            style="yellow",
        )
    states = [part.state for part in plan]
    return {
        "directory": str(parquet) if parquet else None,
        "made": states.count("missing"),
        "kept": states.count("kept"),
        "in_index": states.count("held"),
        "others": len(others),
    }
