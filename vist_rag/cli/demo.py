"""``vist-rag demo``: the bundled corpus, indexed, compressed and asked; with ``--eval``, measured."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vist_rag.cli.answers import answer_json, best_citation, cited_sentence, titled
from vist_rag.cli.index import Stored, store
from vist_rag.cli.models import load_rag, tell_of_other_memories
from vist_rag.cli.terminal import (
    Interrupted,
    JsonOption,
    ModelOption,
    command,
    emit_json,
    out,
    printable,
    progress,
    say,
    working,
)
from vist_rag.errors import ConfigError

if TYPE_CHECKING:
    from vist_rag.evaluation.demo import DemoQuestion
    from vist_rag.pipeline import VistRAG
    from vist_rag.types import Answer

_CONDITIONS = {
    "memory": "memory",
    "raw": "raw text",
    "closed_book": "closed book",
    "shuffled_memory": "shuffled memory",
}


@command
def demo(
    questions: Annotated[int, typer.Option(metavar="N", help="How many of the development questions are asked.")] = 12,
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="DIR", help="Keep the index here.", show_default="a temporary directory"),
    ] = None,
    model: ModelOption = None,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Measure instead: every question of a split, with controls beside it.")
    ] = False,
    split: Annotated[str, typer.Option(metavar="dev|test", help="For --eval: which questions.")] = "test",
    latents: Annotated[
        str, typer.Option(metavar="N,N,...", help="For --eval: latents a passage of the elastic table.")
    ] = "64,32,16,8",
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For --eval: write a row for each question and run, as JSONL.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Index the bundled corpus, compress every passage to memory, and ask questions that are answered from memory.

    No passage is read as text. With --eval, the questions of a split are answered from memory, from raw text, with
    closed book and from the memory of other passages, found by retrieval and with the gold passage.
    """
    sizes = _sizes(latents)
    if rows is not None and not rows.absolute().parent.is_dir():
        raise ConfigError(f"--rows must be a file in an existing directory, got {rows}; make the directory first.")
    with working("loading"):
        from vist_rag.evaluation.demo import demo_questions

        asked = demo_questions(split if evaluate else "dev")
    if not evaluate and not 1 <= questions <= len(asked):
        raise ConfigError(f"--questions must be in 1..{len(asked)} (development questions), got {questions}.")
    with _indexed(index, model) as (rag, facts):
        if evaluate:
            report = _evaluate(rag, split, sizes, rows) | {"index": facts}
        else:
            report = _ask(rag, _spread(asked, questions), facts, quiet=as_json)
    if as_json:
        emit_json(report)
    elif evaluate:
        _show_evaluation(report)
    else:
        _show_summary(report)


def _sizes(latents: str) -> list[int]:
    sizes = [size.strip() for size in latents.split(",") if size.strip()]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"--latents must be numbers of 1 or more, separated by commas, got {latents!r}.")
    return [int(size) for size in sizes]


@contextmanager
def _indexed(directory: Path | None, model: str | None) -> Iterator[tuple[VistRAG, dict[str, Any]]]:
    """The pipeline over the bundled corpus, every passage compressed; and what that took."""
    with TemporaryDirectory(prefix="vist-rag-") as temporary:
        place = directory or Path(temporary, "index")
        with working("loading"):
            from vist_rag.evaluation.demo import demo_passages
            from vist_rag.retrieval import PassageIndex

            passages = demo_passages()
        with PassageIndex.open(place) as index:
            if {p.id for p in index.passages()} - {p.id for p in passages}:
                raise ConfigError(f"--index must be a new directory or a former demo's, {place} holds other passages.")
            rag = load_rag(model, index, guard="off")  # what is shown is memory
            tell_of_other_memories(index, place, rag.compressor.fingerprint)
            stored = Stored(len(passages))
            begin = time.monotonic()
            try:
                with progress("compressing and storing passages", len(passages)) as advance:
                    store(index, passages, rag.compressor, stored, advance)
                yield rag, _index_facts(rag, stored, time.monotonic() - begin)
            except KeyboardInterrupt as error:
                kept = f"{stored.done:,} of {stored.passages:,} passages are kept in {place}."
                raise Interrupted(kept if directory else "nothing is kept of a temporary index.") from error


def _index_facts(rag: VistRAG, stored: Stored, seconds: float) -> dict[str, Any]:
    return {
        "passages": len(rag.index),
        "memories_made": stored.memories_made,
        "memories_kept": stored.memories_kept,
        "seconds": round(seconds, 2),
        "fingerprint": rag.compressor.fingerprint,
    }


# ------------------------------------------------------------------------------------------------------------- asking


def _spread(questions: Sequence[DemoQuestion], n: int) -> list[DemoQuestion]:
    """``n`` questions at equal distances, so that every part of the corpus has its share; the same ones each time."""
    return [questions[(2 * i + 1) * len(questions) // (2 * n)] for i in range(n)]


def _ask(rag: VistRAG, questions: Sequence[DemoQuestion], facts: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    from vist_rag.evaluation import exact_match, f1

    top_k = min(rag.budget.top_k, len(rag.index))
    rag.budget = replace(rag.budget, k_raw=0, k_memory=top_k, tokens=None, rate=None)
    if not quiet:
        out.print(
            f"{facts['passages']} passages indexed, {facts['memories_made']} compressed to memory in "
            f"{facts['seconds']:.1f} s. Each question is answered from the memory of {top_k}; none is read as text.\n"
        )
    with working("warming up"):
        rag.answer(questions[0].question)  # loads and allocates what later questions find ready
    asked = []
    for number, question in enumerate(questions, start=1):
        answer = rag.answer(question.question)
        right = bool(exact_match(answer.text, question.answers))
        asked.append(
            {
                **answer_json(answer),
                "id": question.id,
                "expected": list(question.answers),
                "right": right,
                "f1": round(f1(answer.text, question.answers), 4),
                "gold_retrieved": question.passage_id in [c.passage.id for c in answer.citations],
            }
        )
        if not quiet:
            _show_answer(number, question, answer, right=right)
    return {"index": facts, "questions": asked, "summary": _summary(asked, top_k)}


def _summary(asked: Sequence[dict[str, Any]], top_k: int) -> dict[str, Any]:
    origin = sum(row["usage"]["origin_tokens"] for row in asked)
    compressed = sum(row["usage"]["compressed_tokens"] for row in asked)
    return {
        "questions": len(asked),
        "right": sum(row["right"] for row in asked),
        "gold_retrieved": sum(row["gold_retrieved"] for row in asked),
        "passages_read": top_k,
        "origin_tokens": round(origin / len(asked), 1),
        "compressed_tokens": round(compressed / len(asked), 1),
        "ratio": round(origin / compressed, 3),
        "median_ms": round(statistics.median(row["timings_ms"]["total"] for row in asked), 1),
    }


def _show_answer(number: int, question: DemoQuestion, answer: Answer, *, right: bool) -> None:
    out.print(f"{number}. {printable(question.question)}", style="bold", markup=False, soft_wrap=True)
    verdict = Text(" right", "green") if right else Text(f" wrong, expected: {question.answers[0]}", "red")
    out.print("  ", Text(printable(answer.text) or "(no answer)"), verdict, sep="", soft_wrap=True)
    citation = best_citation(answer)
    if citation is not None:
        out.print(Text(f"  {titled(citation)}: ", "dim"), cited_sentence(citation), sep="", soft_wrap=True)
    else:
        out.print("  the answer stands in none of the passages that were read", style="dim", soft_wrap=True)
    usage = answer.usage
    line = f"  {usage.origin_tokens} tokens raw, {usage.compressed_tokens} as memory, ratio {usage.ratio:.2f}"
    out.print(f"{line}; {answer.timings_ms['total']:.0f} ms\n", style="dim", soft_wrap=True)


def _show_summary(report: dict[str, Any]) -> None:
    summary = report["summary"]
    table = Table("", "", title="Answered from memory only", show_header=False, title_justify="left")
    for name, value in (
        ("right answers", f"{summary['right']} of {summary['questions']}"),
        ("gold passage retrieved", f"{summary['gold_retrieved']} of {summary['questions']}"),
        ("passages read", f"{summary['passages_read']} a question, none as text"),
        ("tokens raw", f"{summary['origin_tokens']:.0f} a question"),
        ("tokens as memory", f"{summary['compressed_tokens']:.0f} a question"),
        ("ratio", f"{summary['ratio']:.2f}"),
        ("time", f"{summary['median_ms']:.0f} ms a question (median)"),
    ):
        table.add_row(name, value)
    out.print(table)


# ---------------------------------------------------------------------------------------------------------- measuring


def _evaluate(rag: VistRAG, split: str, sizes: Sequence[int], rows: Path | None) -> dict[str, Any]:
    from vist_rag.evaluation.demo import RUNS, evaluate_demo
    from vist_rag.evaluation.provenance import run_facts

    # From memory only: what the checkpoint would read raw is read as memory too.
    rag.budget = replace(rag.budget, k_raw=0, k_memory=min(rag.budget.top_k, len(rag.index)), tokens=None, rate=None)
    begin = time.monotonic()
    with progress("answering under each condition", RUNS + len(sizes)) as advance:
        result = evaluate_demo(rag, split, latents=sizes, advance=advance)
    some = result.pop("rows")
    if rows is not None:
        rows.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
        say(f"{len(some):,} rows written to {rows}")
    command_line = shlex.join(
        ["vist-rag", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])]
    )
    return {**run_facts(command_line), **result, "seconds": round(time.monotonic() - begin, 1)}


def _show_evaluation(report: dict[str, Any]) -> None:
    top_k, latents = report["top_k"], report["latents"]
    out.print(
        f"{report['questions']} {report['split']} questions; {top_k} passages a question, "
        f"{f'at most {latents}' if latents else 'all'} latents a passage; gold passage among the first "
        + ", ".join(f"{k}: {share:.1%}" for k, share in report["recall"].items())
    )
    for group, title in (("open_domain", "Passages found by retrieval"), ("gold_passage", "The gold passage")):
        named = {name: report[group][key] for key, name in _CONDITIONS.items() if key in report[group]}
        out.print(_table(title, "read as", named))
    if report["elastic"]:
        out.print(_table("Passages found by retrieval, from memory", "latents a passage", report["elastic"]))
    out.print(
        "Per cent, in brackets 95 % bootstrap intervals over questions. Shuffled: the memory of other passages.",
        style="dim",
    )


def _table(title: str, first: str, figures: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        first,
        "EM",
        "F1",
        "substring",
        "tokens",
        "ratio",
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for name, row in figures.items():
        em, f1 = (
            Text(f"{row[m]:.1%} [{row[f'{m}_95'][0]:.0%}, {row[f'{m}_95'][1]:.0%}]".replace("%", ""))
            for m in ("em", "f1")
        )
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        table.add_row(name, em, f1, f"{100 * row['substring']:.1f}", f"{row['compressed_tokens']:.0f}", ratio)
    return table
