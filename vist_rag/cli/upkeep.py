"""What ``vist-rag index`` does to an index without reading files: look after what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from vist_rag.cli.models import open_existing
from vist_rag.cli.terminal import count, emit_json, out, printable, say, working
from vist_rag.errors import StoreError

if TYPE_CHECKING:
    from vist_rag.retrieval import Sizes

DAMAGED = 1
"""Exit code of ``--verify`` where something is wrong."""


def verify(directory: Path, *, as_json: bool) -> None:
    """Read every row and say what is not as it was written; exit code 1 where something is."""
    try:
        with open_existing(directory) as index, working("verifying"):
            passages, problems = len(index), index.problems()
    except StoreError as error:
        if not (directory / "passages.sqlite").is_file():
            raise
        passages, problems = None, [str(error)]
    if as_json:
        emit_json({"index": str(directory), "passages": passages, "problems": problems})
    else:
        for line in problems:
            out.print(printable(line), markup=False, soft_wrap=True)
        if not problems:
            line = f"{directory}: {passages:,} passages, everything is as it was written"
            out.print(printable(line), markup=False, soft_wrap=True)
    if problems:
        say(f"{count(len(problems), 'problem')}; vist-rag index --rebuild mends what is derived.", style="red")
        raise typer.Exit(DAMAGED)


def rebuild(directory: Path, *, as_json: bool) -> None:
    """Make anew what is derived from passages: SQLite's indexes, FAISS; damaged memories go."""
    with open_existing(directory) as index, working("rebuilding"):
        gone = index.rebuild()
        passages = len(index)
    if as_json:
        emit_json({"index": str(directory), "passages": passages, "damaged_memories_removed": gone})
        return
    line = f"{directory}: built anew over {count(passages, 'passage')}"
    if gone:
        line += f"; {gone:,} damaged memories are gone, vist-rag reindex makes them again"
    out.print(printable(line), markup=False, soft_wrap=True)


def compact(directory: Path, *, as_json: bool) -> None:
    """Give free space back to the disk."""
    with open_existing(directory) as index, working("compacting"):
        before = index.sizes().file_bytes
        index.compact()
        after = index.sizes().file_bytes
    if as_json:
        emit_json({"index": str(directory), "bytes_before": before, "bytes_after": after})
    else:
        line = f"{directory}: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now"
        out.print(printable(line), markup=False, soft_wrap=True)


def stats(directory: Path, *, as_json: bool) -> None:
    """Rows and bytes, by kind."""
    with open_existing(directory) as index:
        report = _stats(directory, index.sizes(), index.meta)
    if as_json:
        emit_json(report)
    else:
        _show(report)


def _stats(directory: Path, sizes: Sizes, meta: dict[str, str]) -> dict[str, Any]:
    cache = directory / "passages.faiss"
    return {
        "index": str(directory),
        "passages": sizes.passages,
        **{name: meta.get(name) for name in ("embedder", "dimension", "index_factory")},
        "bytes": {
            "text": sizes.text_bytes,
            "vectors": sizes.vector_bytes,
            "memories": sum(some.bytes for some in sizes.memories),
            "store": sizes.file_bytes,
            "free": sizes.free_bytes,
            "faiss": cache.stat().st_size if cache.is_file() else 0,
        },
        "memories": [some._asdict() for some in sizes.memories],
    }


def _show(report: dict[str, Any]) -> None:
    n, of = report["passages"], report["bytes"]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("", "bytes", "a passage")
    for name, value in of.items():
        table.add_row(name, f"{value:,}", f"{value / n:,.0f}" if n else "-")
    factory = report["index_factory"] or "none yet"
    head = f"{report['index']}: {count(n, 'passage')}, embedder {report['embedder']}, FAISS {factory}"
    out.print(printable(head), markup=False, soft_wrap=True)
    out.print(table, markup=False)
    for some in report["memories"]:
        line = (
            f"memories of compressor {some['fingerprint'][:12]}: {some['memories']:,} as {some['form']}, "
            f"{some['bytes'] / some['memories']:,.0f} bytes and {some['latents'] / some['memories']:.1f} latents each"
        )
        out.print(printable(line), markup=False, soft_wrap=True)
