"""Result files of ``vist-rag eval`` -> a Markdown page with plots; every figure in it comes out of these files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vist_rag.errors import InputError
from vist_rag.evaluation import plots
from vist_rag.evaluation.plots import Plot, metric_name, ordered
from vist_rag.evaluation.result_files import SIZES, TASKS, Result, load_all, load_results, refuse_twins, setting
from vist_rag.evaluation.tables import (
    block_facts,
    block_name,
    by_size,
    controls,
    first_token,
    key_values,
    label,
    latency_name,
    more_table,
    one_rate,
    paired_table,
    plain,
    rate_name,
    rate_table,
    score,
    series_over_k,
    table,
    value_text,
)

__all__ = ["load_results", "write_report"]

_HOW_TO_READ = """\
- Scores are per cent, but for those of which lower is better. Brackets hold 95 % bootstrap intervals over questions.
- Columns are the rate that was asked for: tokens of the raw text for each token given to the model. The rate that was
  met is the ratio under "more figures"; where the two differ, compare methods by the ratio or the tokens read.
- **Bold** is the best score of a column, among the methods that compress and are no control.
- Each method against `memory` at the same rate, question by question: ≈ the 95 % interval of the paired difference
  includes 0, so neither is to be called better; ↑ better than `memory`; ↓ worse; no mark: not compared. The intervals
  are not corrected for the number of comparisons.
- Closed book reads no passage. Shuffled memory is that of other passages, blank memory that of empty ones: what these
  score is not read from the passages.
- Resilience: share of the questions right with closed book that stay right; boost: of those wrong that become right."""


def write_report(directory: Path | str, output: Path | str | None = None, *, title: str = "Benchmarks") -> list[Path]:
    """Write a Markdown page, and PNG plots in ``images/<its name>/`` beside it, from the result files of a folder.

    The same files give the same bytes. Nothing is written unless all of it could be made; each file is replaced whole.

    Args:
        directory: Holds the files that ``vist-rag eval`` wrote, and those of latencies.
        output: A file that ends in ``.md``, or a folder that gets ``benchmarks.md``; ``directory`` if left out.
        title: The page's first heading.
    Returns:
        The files written, the page first.
    Raises:
        InputError: If the results cannot be used (see :func:`load_results`), or ``output`` is another kind of file.
        MissingDependencyError: If matplotlib is not installed.
    """
    results, latencies = load_all(Path(directory))
    target = Path(directory if output is None else output)
    page = target if target.suffix == ".md" and not target.is_dir() else target / "benchmarks.md"
    if page is not target and target.exists() and not target.is_dir():
        raise InputError(f"the output must be a folder or a file that ends in .md, got {target}, another file.")
    made = _Page(f"images/{page.stem}")
    made.write(results, latencies, title)
    images = page.parent / made.folder
    written = {images / f"{name}.png": png for name, png in made.images.items()}
    # The page last: while it is an old one, its pictures may be newer, but none that it shows is missing.
    for path, content in {**written, page: ("\n".join(made.lines).rstrip() + "\n").encode()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return [page, *written]


class _Page:
    """A page while it is written: its lines, and the pictures that it shows."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.images: dict[str, bytes] = {}

    def write(self, results: Sequence[Result], latencies: Sequence[Result], title: str) -> None:
        self.add(
            f"# {plain(title)}", "Written by `vist-rag report` from the files named under [provenance](#provenance)."
        )
        self.add("## How to read", _HOW_TO_READ)
        for task, heading in TASKS.items():
            blocks = [result for result in results if result["task"] == task]
            if blocks:
                self.add(f"## {heading}")
                self.questions(blocks) if task == "qa" else self.joined(blocks, SIZES[task])
        if latencies:
            self.latencies(latencies)
        self.provenance([*results, *latencies])

    def add(self, *paragraphs: str) -> None:
        for paragraph in filter(None, paragraphs):
            self.lines += [paragraph, ""]

    def show(self, plot: Plot) -> None:
        name, n = plot.name, 2
        while name in self.images:
            name, n = f"{plot.name}-{n}", n + 1
        self.images[name] = plot.png
        self.add(f"![{plain(plot.alt)}]({self.folder}/{name}.png)")

    def fold(self, summary: str, folded: str) -> None:
        if folded:
            self.add(f"<details><summary>{summary}</summary>", folded, "</details>")

    def questions(self, blocks: Sequence[Result]) -> None:
        """Question answering: a part for each data set, in it a table for each block."""
        for dataset in dict.fromkeys(block["dataset"] for block in blocks):
            some = [block for block in blocks if block["dataset"] == dataset]
            self.add(f"### {plain(dataset)}")
            for block in some:
                self.add(f"#### {plain(f'{dataset}: {block_name(block)}')}", block_facts(block), rate_table(block))
                self.add(controls(block))
                self.fold("more figures", more_table(block))
                self.fold("paired tests", paired_table(block))
            slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")
            panels = [(block_name(block), block) for block in some]
            self.show(plots.score_against_tokens(f"score-tokens-{slug}", dataset, panels))
        series = series_over_k(blocks)
        if series:
            self.add("### Number of passages")
            of_rate = [one_rate(some) for some in series]
            named = [
                (f"{some[0]['dataset']}: {block_name(some[0], k=False)}" + (f", {rate:g}×" if rate else ""), some)
                for some, rate in zip(series, of_rate, strict=True)
            ]
            self.show(plots.score_against_k("score-k", named, of_rate))
        kept: dict[str, Result] = {}
        for block in blocks:
            told = [cell["method"] for cell in block["cells"] if plots.has_bytes(cell)]
            if len(set(told)) < len(told):  # a method at two settings: one alone is a point, and no curve
                kept.setdefault(block["dataset"], block)
        if kept:
            self.add("### Tokens and the memory kept for them", "The first block of each data set that tells.")
            panels = [(f"{dataset}: {block_name(block)}", block) for dataset, block in kept.items()]
            self.show(plots.tokens_against_bytes("tokens-bytes", panels))

    def joined(self, blocks: Sequence[Result], settings: Mapping[str, str]) -> None:
        """Blocks of a task in one table: a column for each data set, a row for each setting and method."""
        splits = {block.get("split") for block in blocks}

        def column(block: Result) -> str:
            return block["dataset"] if len(splits) == 1 else f"{block['dataset']} ({block.get('split')})"

        def sizes(block: Result) -> tuple[Any, ...]:
            return tuple(block.get(key) for key in settings)

        for metric in dict.fromkeys(block["metrics"][0] for block in blocks):
            some = [block for block in blocks if block["metrics"][0] == metric]
            refuse_twins(some, lambda block: (column(block), sizes(block)))
            columns = list(dict.fromkeys(map(column, some)))
            cells = {
                (sizes(block), cell["method"], setting(cell), column(block)): score(block, cell)
                for block in some
                for cell in block["cells"]
            }
            methods = ordered([method for _, method, _, _ in cells])
            rows = sorted(
                {key[:3] for key in cells},
                key=lambda row: ([v or 0 for v in row[0]], by_size(row[2]), methods.index(row[1])),
            )
            lines = [
                [
                    *map(value_text, where),
                    rate_name(rate),
                    label(method),
                    *(cells.get((where, method, rate, c), "") for c in columns),
                ]
                for where, method, rate in rows
            ]
            lower = ", lower is better" if metric in some[0].get("lower_is_better", ()) else ""
            name = metric_name(metric)
            self.add(f"{name[:1].upper()}{name[1:]}{lower}:")
            self.add(table([*settings.values(), "rate", "method", *map(plain, columns)], lines))
        said = [(plain(block["name"]), controls(block)) for block in blocks]
        self.add("\n".join(f"- {name}: {sentence}" for name, sentence in said if sentence))
        for block in blocks:
            self.fold(f"paired tests: {plain(block['name'])}", paired_table(block))

    def latencies(self, files: Sequence[Result]) -> None:
        self.add("## Time to the first token", "Median in milliseconds; brackets hold the quartiles.")
        for file in files:
            ks = sorted({point["k"] for point in file["points"]})
            points = {(point["method"], point["k"]): point for point in file["points"]}
            rows = [
                [label(m, plots.LATENCY), *(first_token(points.get((m, k), {})) for k in ks)]
                for m in ordered([method for method, _ in points], plots.LATENCY)
            ]
            self.add(f"### {plain(latency_name(file))}", table(["method", *(f"k = {k}" for k in ks)], rows))
        self.show(plots.first_token_against_k("first-token-k", [(latency_name(file), file) for file in files]))

    def provenance(self, files: Sequence[Result]) -> None:
        """Where every figure comes from."""
        places: dict[str, int] = {}
        rows = []
        for file in files:
            about = "; ".join(key_values(file.get(key) or {}) for key in ("machine", "versions") if file.get(key))
            place = str(places.setdefault(about, len(places) + 1)) if about else ""
            models = "; ".join(
                f"{name} {str(facts.get('fingerprint', ''))[:12]}".strip() if isinstance(facts, dict) else str(name)
                for name, facts in sorted((file.get("models") or {}).items())
            )
            values = [file.get(key) for key in ("file", "date", "commit")]
            values[2] = str(values[2] or "")[:12]
            seed = file.get("seeds") if file.get("seed") is None else file["seed"]
            command = f"`` {plain(file['command'], code=True)} ``" if file.get("command") else ""
            rows.append([*map(value_text, values), value_text(seed), plain(models), place, command])
        self.add("## Provenance", table(["file", "date", "commit", "seed", "models", "machine", "command"], rows))
        self.add("\n".join(f"- Machine {n}: {plain(about)}" for about, n in places.items()))
