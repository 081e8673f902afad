"""``vist-rag inspect``: a question, answered, and what the answer was read from as a page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vist_rag.cli.answers import titled
from vist_rag.cli.ask import chosen_budget
from vist_rag.cli.models import load_rag, open_existing, tell_of_other_memories
from vist_rag.cli.terminal import JsonOption, ModelOption, command, emit_json, out, printable, working
from vist_rag.errors import ConfigError

if TYPE_CHECKING:
    from vist_rag.inspection import Inspection


@command
def inspect(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    index: Annotated[Path, typer.Option("--index", metavar="DIR", help="An index that vist-rag index made.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.html", help="Write a page that shows all of it, in one file."),
    ] = None,
    k_raw: Annotated[int | None, typer.Option(help="Best passages that are read as text.")] = None,
    k_memory: Annotated[int | None, typer.Option(help="Next passages, which are read as memory.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens that all passages may take together.")] = None,
    latents: Annotated[int | None, typer.Option(help="At most so many latents a passage.")] = None,
    guard: Annotated[str, typer.Option(metavar="off|on|strict", help="As for vist-rag ask.")] = "on",
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from memory and from raw text, and show what the answer looked at.

    The page holds the passages as they were rendered, with the attention of the answer over them, the answer in both
    ways, and what each cost. It needs no server and no network.
    """
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output must end in .html, got {output}.")
    with open_existing(index) as opened:
        rag = load_rag(model, opened, guard=guard)
        tell_of_other_memories(opened, index, rag.compressor.fingerprint)
        chosen = chosen_budget(rag, k_raw=k_raw, k_memory=k_memory, tokens=budget, latents=latents)
        with working("answering"):
            from vist_rag.inspection import inspect_answer, whole_page

            rag.answer(question, budget=chosen)  # the first answer loads the embedder, which is not to be timed
            found = inspect_answer(rag, question, budget=chosen)
    if output is not None:
        output.write_text(whole_page(found.to_dict()), encoding="utf-8")
    if as_json:
        emit_json(found.to_dict())
        return
    _summarize(found)
    if output is not None:
        out.print(printable(f"  written: {output}"), markup=False, soft_wrap=True)


def _summarize(found: Inspection) -> None:
    memory, raw = found.answer, found.raw
    out.print(printable(memory.text) or "(no answer)", style="bold", markup=False, soft_wrap=True)
    said = f"from raw text: {raw.text or '(no answer)'}" if raw else f"not read as raw text: {found.raw_error}"
    out.print(printable(f"  {said}"), markup=False, soft_wrap=True)
    for number, view in enumerate(found.passages, start=1):
        looked = "" if found.looked == "unknown" else f", {view.share:.0%} of the answer's attention"
        line = f"  [{number}] {titled(view.citation)} (read as {view.citation.mode}{looked})"
        out.print(printable(line), markup=False, soft_wrap=True)
        if words := ", ".join(f"{word.text} {word.share:.0%}" for word in view.words(4) if word.share >= 0.01):
            out.print(printable(f"      looked at: {words}"), markup=False, soft_wrap=True)
    usage, took = memory.usage, memory.timings_ms["generate"]
    cost = f"passages: {usage.compressed_tokens} tokens as they were read, {took:.0f} ms to generate"
    if raw:
        cost += f"; {raw.usage.compressed_tokens} as raw text, {raw.timings_ms['generate']:.0f} ms"
    out.print(f"  {cost}", style="dim", soft_wrap=True)
