"""``vist-rag ask``: a question, answered from an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vist_rag.cli.answers import answer_json, cited_sentence, titled, usage_line
from vist_rag.cli.models import load_rag, open_existing, tell_of_other_memories
from vist_rag.cli.terminal import JsonOption, ModelOption, command, emit_json, out, printable
from vist_rag.errors import ConfigError

if TYPE_CHECKING:
    from vist_rag.budget import Budget
    from vist_rag.pipeline import VistRAG
    from vist_rag.types import Answer


@command
def ask(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    index: Annotated[Path, typer.Option("--index", metavar="DIR", help="An index that vist-rag index made.")],
    k_raw: Annotated[int | None, typer.Option(help="Best passages that are read as text.")] = None,
    k_memory: Annotated[int | None, typer.Option(help="Next passages, which are read as memory.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens that all passages may take together.")] = None,
    rate: Annotated[float | None, typer.Option(help="The same, as a share of their tokens as text, in (0, 1].")] = None,
    policy: Annotated[
        str | None, typer.Option(help="How the budget is divided among memories: fixed, by_rank or by_score.")
    ] = None,
    latents: Annotated[int | None, typer.Option(help="At most so many latents a passage.")] = None,
    guard: Annotated[
        str,
        typer.Option(
            metavar="off|on|strict",
            help="Read as text what memory would misread, where the budget allows; strict: never as memory.",
        ),
    ] = "on",
    model: ModelOption = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is generated.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from an index, with the passages that it was read from.

    What is not given is as the checkpoint was trained for.
    """
    if stream and as_json:
        raise ConfigError(
            "--stream and --json exclude each other: one document cannot be printed bit by bit; give one."
        )
    with open_existing(index) as opened:
        rag = load_rag(model, opened, guard=guard)
        tell_of_other_memories(opened, index, rag.compressor.fingerprint)
        chosen = chosen_budget(
            rag, k_raw=k_raw, k_memory=k_memory, tokens=budget, rate=rate, policy=policy, latents=latents
        )
        answer = _stream(rag, question, chosen) if stream else rag.answer(question, budget=chosen)
    if as_json:
        emit_json(answer_json(answer))
        return
    if not stream:
        out.print(printable(answer.text) or "(no answer)", style="bold", markup=False, soft_wrap=True)
    _show_support(answer)


def chosen_budget(rag: VistRAG, **asked: Any) -> Budget:
    """The checkpoint's budget with what was asked for; numbers that were not asked for fit the index.

    Args:
        rag: Whose budget.
        **asked: Fields of :class:`~vist_rag.budget.Budget`; None: not asked for.
    Raises:
        ConfigError: If a field is out of range, both limits are given, or a policy without any.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if given.keys() & {"tokens", "rate"}:
        given = {"tokens": None, "rate": None, **given}
    chosen = replace(rag.budget, **given)
    if "policy" in given and chosen.tokens is None and chosen.rate is None:
        raise ConfigError("--policy must have a limit to divide, got none; give --budget or --rate.")
    k_raw, k_memory = asked.get("k_raw"), asked.get("k_memory")
    size = len(rag.index)
    if chosen.top_k > size > 0:
        if k_memory is None:
            chosen = replace(chosen, k_memory=max(0, size - chosen.k_raw) or int(chosen.k_raw == 0))
        if k_raw is None and chosen.top_k > size:
            chosen = replace(chosen, k_raw=max(0, size - chosen.k_memory))
    return chosen


def _stream(rag: VistRAG, question: str, budget: Budget) -> Answer:
    pieces = rag.stream(question, budget=budget)
    for piece in pieces:
        out.print(printable(piece), style="bold", markup=False, soft_wrap=True, end="")
    out.print()
    if pieces.answer is None:
        raise RuntimeError("the stream ended without an answer")
    return pieces.answer


def _show_support(answer: Answer) -> None:
    for number, citation in enumerate(answer.citations, start=1):
        passage = citation.passage
        source = f", {passage.source}" if passage.source and passage.source != titled(citation) else ""
        line = f"  [{number}] {titled(citation)} (read as {citation.mode}, score {citation.score:.2f}{source})"
        out.print(printable(line), markup=False, soft_wrap=True)
        if reason := answer.usage.guarded.get(passage.id):
            but = ", but its text did not fit" if citation.mode == "memory" else ""
            out.print(printable(f"      guard: {reason}{but}"), style="yellow", markup=False, soft_wrap=True)
        if citation.span is not None:
            out.print("      ", cited_sentence(citation), soft_wrap=True)
    cited = {citation.passage.id for citation in answer.citations}
    for id_, reason in answer.usage.guarded.items():
        if id_ not in cited:
            line = f"  left out: {id_}: {reason}; its text did not fit"
            out.print(printable(line), style="yellow", markup=False, soft_wrap=True)
    out.print(f"  {usage_line(answer.usage, answer.timings_ms['total'])}", style="dim", soft_wrap=True)
