"""``vist-rag reindex``: memories of a new compressor, or in another form, while the index stays in use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vist_rag.cli.models import load_compressor_of, open_existing
from vist_rag.cli.terminal import Interrupted, JsonOption, ModelOption, command, emit_json, out, printable, progress


@command
def reindex(
    index: Annotated[Path, typer.Option("--index", metavar="DIR", help="The index.")],
    memory_form: Annotated[
        str | None,
        typer.Option("--memory-form", metavar="FORM", help="How memories are stored.", show_default="as it was"),
    ] = None,
    drop_others: Annotated[
        bool, typer.Option("--drop-others", help="At the end, delete the memories of other compressors.")
    ] = False,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give every passage a memory of this checkpoint's compressor, whatever others made.

    The index can be searched and written meanwhile; memories of both compressors are there side by side, and none is
    read by the wrong model. What is interrupted keeps every batch; the same command goes on from there.
    """
    begin = time.monotonic()
    with open_existing(index) as opened:
        if memory_form is not None:
            opened.set_memory_form(memory_form)
        compressor = load_compressor_of(model)
        from vist_rag.pipeline import encode_lacking

        made, dropped, lacking = 0, 0, opened.count_lacking(compressor.fingerprint)
        try:
            with progress("compressing", lacking) as advance:
                for batch in encode_lacking(opened, compressor):
                    made += len(batch)
                    advance(len(batch))
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"{made:,} of {lacking:,} memories are kept in {index}; repeat the command to go on."
            ) from (error)
        if drop_others:
            for fingerprint in opened.fingerprints():
                if fingerprint != compressor.fingerprint:
                    dropped += opened.delete_memories(fingerprint=fingerprint)
        report = {
            "index": str(index),
            "passages": len(opened),
            "fingerprint": compressor.fingerprint,
            "memory_form": opened.memory_form or compressor.memory_form,
            "made": made,
            "dropped": dropped,
            "seconds": round(time.monotonic() - begin, 2),
        }
    if as_json:
        emit_json(report)
        return
    line = f"{index}: {made:,} memories made as {report['memory_form']}, compressor {compressor.fingerprint[:12]}"
    out.print(printable(line + (f"; {dropped:,} of others deleted" if dropped else "")), markup=False, soft_wrap=True)
