"""What each ablation gives: evaluate the runs of ``vist-rag train ablations``, ``ablations-reading`` and ``fusions``.

python benchmarks/ablations.py --data DIR --runs DIR [--runs DIR]     evaluate, one result file a run
python benchmarks/ablations.py                                        docs/ablations.md from the result files alone
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("benchmarks/results/ablations")
PAGE = Path("docs/ablations.md")
RATES = (1.0, 2.3, 4.6, 9.0)
QUESTIONS = {"task": "qa", "dataset": "reader/squad.dev.jsonl.gz", "seed": 0, "max_new_tokens": 16}
GOLD = {**QUESTIONS, "passages": "gold", "methods": [{"name": "memory", "rates": list(RATES)}]}
RETRIEVED = {
    **QUESTIONS,
    "passages": "index",
    "corpus": ["corpus/squad_dev.jsonl.gz", "corpus/nq_gold.jsonl.gz"],
    "top_k": 3,
    "methods": [{"name": "memory", "rates": [2.3]}, {"name": "joined_memory", "rates": [2.3]}],
}
TABLES: dict[str, tuple[str, ...]] = {
    "PVE and what it masks": ("base", "pve-none", "pve-random", "pve-frequency"),
    "Latents a page": ("latents-32", "base", "latents-128"),
    "Blank patches": ("base", "blank-read"),
    "Passages rendered alone or joined": ("base", "joined"),
    "Tower frozen or not": ("base", "tower-trained"),
    "Elastic or fixed": ("base-reading", "fixed"),
    "Distilled or not": ("base-reading", "not-distilled"),
    "Soft prompt or cross-attention": (
        "soft-prompt",
        "cross-attention-pointed",
        "cross-attention-every-second-layer",
        "cross-attention",
    ),
}
PAPER = {
    "PVE and what it masks": """`base` has no PVE at all. Paper, table 5:

| mask | TriviaQA | NQ | PopQA |
|---|---|---|---|
| none | 17.14 | 6.51 | 5.72 |
| random | 24.88 | 8.35 | 10.19 |
| frequency | 25.20 | 8.71 | 11.44 |""",
    "Latents a page": """Paper, table 4:

| latents | TriviaQA | NQ | PopQA |
|---|---|---|---|
| 32 | 19.38 | 7.85 | 8.16 |
| 64 | 25.20 | 8.71 | 11.44 |
| 96 | 14.57 | 7.19 | 4.88 |
| 128 | 20.01 | 7.77 | 8.51 |

96 is not measured here: a latent stands for a whole number of the 256 patches.""",
    "Blank patches": """Paper, table 11:

| blank patches | TriviaQA | NQ | PopQA |
|---|---|---|---|
| read | 21.82 | 7.53 | 8.71 |
| masked | 25.20 | 8.71 | 11.44 |""",
    "Passages rendered alone or joined": "The paper joins all passages of a prompt, without a comparison. Joined, "
    "memory depends on the question and cannot be made ahead of time.",
    "Tower frozen or not": "The paper freezes it, without a comparison.",
    "Elastic or fixed": "Not in the paper.",
    "Distilled or not": "Not in the paper.",
    "Soft prompt or cross-attention": "Both ways in are learned afresh (`vist-rag train fusions`). The paper has "
    "cross-attention only. A soft prompt has it easier here: this generator was taught with soft prompts, and its "
    "pointer copies words from positions of the prompt; what cross-attention brings has none. `pointed` lets the pointer "
    "copy from what looked-up memory spells, too (also in every second layer); there it points at latents that have not "
    "met the question.",
}


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
    runs: Annotated[list[Path] | None, typer.Option(help="Folder of finished runs.")] = None,
    limit: Annotated[int, typer.Option(help="Questions a cell.")] = 300,
    output: Annotated[Path, typer.Option(help="Folder of the result files.")] = RESULTS,
) -> None:
    """Evaluate what was trained, then write the page from all result files there are."""
    for run in (folder for top in runs or () for folder in sorted(top.iterdir()) if (folder / "model").is_dir()):
        evaluate(run, data, output, limit)
    PAGE.write_text(page(output), encoding="utf-8")
    typer.echo(PAGE)


def evaluate(run: Path, data: Path | None, output: Path, limit: int) -> None:
    """One run: gold passages at every rate; three retrieved ones where it tells about rendering."""
    from vist_rag.cli.terminal import progress
    from vist_rag.evaluation.harness import blocks_of, run_block
    from vist_rag.evaluation.methods import EvalModel
    from vist_rag.evaluation.task import Reading

    model = EvalModel.load(run / "model")
    blocks = [GOLD | {"name": run.name}]
    if run.name in ("base", "joined"):
        blocks.append(RETRIEVED | {"name": f"{run.name}-retrieved"})
    for block in blocks_of({"blocks": blocks, "limit": limit}):
        command = "python benchmarks/ablations.py --data DIR --runs DIR"
        run_block(block, model, {}, Reading(data, output), command=command, progress=progress)


def page(results: Path) -> str:
    """The page, from result files alone."""
    found: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    lines = [
        "# Ablations",
        "",
        "One variable at a time on the embedded model, at equal steps, seeds and data: `vist-rag train ablations`,",
        "`ablations-reading` and `fusions`, measured by `benchmarks/ablations.py`, which wrote this page.",
        "Exact match in percent on SQuAD development questions with their gold passage, with 95 % bootstrap intervals.",
        "Behind each figure, how many times fewer positions it takes than the raw text. The paper's figures",
        "(arXiv:2502.00791) stand beside ours whether or not they agree: a 1.1 B generator there, 11 M here.",
    ]
    for title, names in TABLES.items():
        there = [name for name in names if name in found]
        if len(there) < 2:
            continue
        head = "| run | " + " | ".join("as made" if rate == 1 else f"{rate:g}x" for rate in RATES) + " |"
        lines += ["", f"## {title}", "", head, "|---" * (len(RATES) + 1) + "|"]
        for name in there:
            cells = {cell["rate"]: cell for cell in found[name]["cells"] if cell["method"] == "memory"}
            lines.append(f"| {name} | " + " | ".join(figure(cells[rate]) for rate in RATES) + " |")
        if names == ("base", "joined"):
            lines += ["", *retrieved(found)]
        lines += ["", PAPER[title]]
    return "\n".join(lines) + "\n"


def retrieved(found: dict[str, dict[str, Any]]) -> list[str]:
    """Three retrieved passages, each a memory of its own or all one."""
    lines = ["Three retrieved passages at 2.3x:", "", "| run | each alone | joined |", "|---|---|---|"]
    for name in ("base", "joined"):
        if result := found.get(f"{name}-retrieved"):
            cells = {cell["method"]: cell for cell in result["cells"]}
            lines.append(f"| {name} | {figure(cells['memory'])} | {figure(cells['joined_memory'])} |")
    return lines


def figure(cell: dict[str, Any]) -> str:
    """A figure with its interval, in percent, and the ratio."""
    low, high = cell["em_95"]
    return f"{100 * cell['em']:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({cell['ratio']:.1f}x)"


if __name__ == "__main__":
    typer.run(main)
