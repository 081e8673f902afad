"""Real questions with the passage that answers them, read as memory and as raw text, with the controls beside them.

    python benchmarks/gold_passages.py --data DIR --split dev --json

SQuAD-open and NQ-open, each question with its gold passage. Four conditions in one run: memory, raw text, closed book
(no passage), and shuffled memory (the gold passage of another question). DIR has the layout

    qa/squad_open/test.jsonl.gz, qa/nq_open/test.jsonl.gz   {"id", "question", "answers", "gold": passage id}
    corpus/*.jsonl.gz                                       {"id", "title", "text"}
    reader/squad.dev.jsonl.gz, reader/distant.dev.jsonl.gz  {"id", "question", "answers", "title", "context"}

``--split dev`` reads the last row (NQ-open: the rows of ``distant`` whose id begins with ds_nq_open); the test rows are
for one run at the end. Questions whose prompt does not fit the generator's context as raw text are left out of every
condition, and counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from vist_rag.budget import Budget
from vist_rag.compression import VistCompressor
from vist_rag.errors import ConfigError, InputError, VistError
from vist_rag.evaluation import CONDITIONS, EvalQuestion, evaluate_conditions
from vist_rag.evaluation.provenance import SEED, run_facts
from vist_rag.generation import PromptTemplate, VistGenerator
from vist_rag.pipeline import find_checkpoint, load_compressor, read_settings
from vist_rag.types import Passage

SETS = ("squad_open", "nq_open")
DEV_FILES = {"squad_open": "reader/squad.dev.jsonl.gz", "nq_open": "reader/distant.dev.jsonl.gz"}
DEV_PREFIX = {"squad_open": "", "nq_open": "ds_nq_open"}


@dataclass(frozen=True)
class Model:
    """A checkpoint and how it wants to be asked."""

    compressor: VistCompressor
    generator: VistGenerator
    template: PromptTemplate
    latents: int | None
    max_new_tokens: int
    stop: tuple[str, ...]

    @classmethod
    def load(cls, checkpoint: str | None) -> Model:
        """Read a checkpoint: a directory, a hub id, or None for the embedded one."""
        directory = find_checkpoint(checkpoint)
        settings = read_settings(directory)
        return cls(
            load_compressor(directory),
            VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion"),
            PromptTemplate(**settings.get("template", {})),
            Budget(**settings.get("budget", {})).latents,
            settings.get("max_new_tokens", 32),
            tuple(settings.get("stop", ())),
        )

    def fits(self, question: EvalQuestion) -> bool:
        """Whether the question with its passage as raw text, or as all of its memory, fits the context."""
        limit = self.generator.context_tokens
        if limit is None:
            return True
        raw = self.generator.prompt_length(self.template.build(question.question, question.passages, []))
        closed = self.generator.prompt_length(self.template.build(question.question, [], []))
        frame = self.generator.count_tokens(self.template.memory) + self.generator.fusion.boundary_tokens
        latents = sum(self.compressor.count_latents(p.content) for p in question.passages)
        memory = closed + frame + min(latents, self.latents or latents)
        return max(raw, memory) + self.max_new_tokens <= limit


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a gzipped JSON-lines file.

    Raises:
        InputError: If it is missing, torn, or no gzipped JSON lines.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as gzipped JSON lines ({error}); check --data.") from error


def read_questions(data: Path, name: str, split: str, limit: int | None) -> list[EvalQuestion]:
    """Questions with their gold passage, all or a seeded sample of ``limit``, in the order of the file."""
    if split == "dev":
        rows = [row for row in read_rows(data / DEV_FILES[name]) if str(row["id"]).startswith(DEV_PREFIX[name])]
        rows = _sample(rows, limit)
        passages = [Passage(row["context"], title=row.get("title", "")) for row in rows]
    else:
        rows = _sample([row for row in read_rows(data / "qa" / name / "test.jsonl.gz") if row.get("gold")], limit)
        by_id = read_passages(data / "corpus", {row["gold"] for row in rows})
        passages = [by_id[row["gold"]] for row in rows]
    return [
        EvalQuestion(str(row["id"]), row["question"], tuple(row["answers"]), (passage,))
        for row, passage in zip(rows, passages, strict=True)
    ]


def _sample(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(SEED).sample(range(len(rows)), limit))]


def read_passages(corpus: Path, wanted: set[str]) -> dict[str, Passage]:
    """Passages of these ids.

    Raises:
        InputError: If one is in no file.
    """
    found: dict[str, Passage] = {}
    for path in sorted(corpus.glob("*.jsonl.gz")):
        if len(found) == len(wanted):
            break
        for row in read_rows(path):
            if row["id"] in wanted:
                found[row["id"]] = Passage(row["text"], row["id"], row.get("title", ""))
    if missing := sorted(wanted - set(found)):
        raise InputError(f"{corpus} lacks {len(missing)} gold passages, such as {missing[0]}; check --data.")
    return found


def evaluate(model: Model, questions: Sequence[EvalQuestion], *, progress: bool) -> tuple[dict[str, Any], list[Any]]:
    """Figures of every condition, and their rows."""
    asked = [question for question in questions if model.fits(question)]
    if not asked:
        raise InputError(f"none of {len(questions)} questions fits the generator's context; nothing can be measured.")
    result = evaluate_conditions(
        model.compressor,
        model.generator,
        asked,
        template=model.template,
        latents=(model.latents,),
        max_new_tokens=model.max_new_tokens,
        stop=model.stop,
        progress=progress,
    )
    figures = {key.partition("@")[0]: values for key, values in result["figures"].items()}
    return {"questions": len(asked), "left_out": len(questions) - len(asked), **figures}, result["rows"]


def as_text(report: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{report['split']} questions with their gold passage, {report['latents'] or 'all'} latents a passage"]
    for name, figures in report["sets"].items():
        lines.append(f"\n{name}: {figures['questions']} questions, {figures['left_out']} left out")
        lines.append(f"  {'read as':<16} {'EM':>22} {'F1':>22} {'substring':>9} {'tokens':>7} {'ratio':>6}")
        for condition in CONDITIONS:
            row = figures[condition]
            scores = [f"{row[m]:.3f} [{row[f'{m}_95'][0]:.3f}, {row[f'{m}_95'][1]:.3f}]" for m in ("em", "f1")]
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
            lines.append(
                f"  {condition:<16} {scores[0]:>22} {scores[1]:>22} {row['substring']:>9.3f} "
                f"{row['compressed_tokens']:>7.1f} {ratio:>6}"
            )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="SQuAD-open and NQ-open with their gold passage, memory against raw.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with qa/, corpus/, reader/")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="default: dev; test once, at the end")
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="checkpoint; default: the embedded one")
    parser.add_argument("--limit", type=int, metavar="N", help="a seeded sample of N questions from each set")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON document here as well")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="write a row for each question and condition, as JSONL"
    )
    return parser.parse_args(arguments)


def command_line(options: argparse.Namespace) -> str:
    """The command as anyone can repeat it: paths of this machine are named, not given."""
    words = ["python benchmarks/gold_passages.py --data DIR", f"--split {options.split}"]
    words += ["--model MODEL"] if options.model else []
    words += [f"--limit {options.limit}"] if options.limit is not None else []
    return " ".join([*words, "--json"])


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {options.limit}.")
    for path in (options.output, options.rows):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path} must be in an existing directory; make it first.")
    # Files first: what is wrong with them is told before a model is loaded.
    questions = {name: read_questions(options.data, name, options.split, options.limit) for name in SETS}
    model = Model.load(options.model)
    report = {
        **run_facts(command_line(options)),
        "split": options.split,
        "limit": options.limit,
        "fingerprint": model.compressor.fingerprint,
        "latents": model.latents,
        "sets": {},
    }
    rows: list[dict[str, Any]] = []
    for name, asked in questions.items():
        report["sets"][name], some = evaluate(model, asked, progress=sys.stderr.isatty())
        rows += [{"set": name, **row} for row in some]
    document = json.dumps(report, indent=2, allow_nan=False)
    if options.output is not None:
        options.output.write_text(document + "\n", "utf-8")
    if options.rows is not None:
        options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(document if options.json else as_text(report))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line that says what is wrong."""
    options = parse(arguments)
    logging.disable_progress_bar()  # of loading weights
    try:
        run(options)
    except (VistError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
