"""How a memory is best read at fewer positions: neighbours share one, or some latents are kept and the rest left out.

    python benchmarks/elastic.py --json

Answers the development questions of the demo corpus from their own passages at several sizes, both ways, in one run. A
model is trained on memories whose neighbours share positions, so the other way is at a disadvantage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.compression import VisualMemory
from vist_rag.evaluation import bootstrap_interval, exact_match, f1
from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.provenance import run_facts
from vist_rag.generation import PromptTemplate, VistGenerator

SIZES = (64, 32, 16, 8)


def evenly(memory: VisualMemory, size: int) -> VisualMemory:
    """Keep evenly spread latents, at most ``size`` of them."""
    n, kept = len(memory.latents), min(size, len(memory.latents))
    return VisualMemory(memory.latents[(2 * torch.arange(kept) + 1) * n // (2 * kept)], memory.fingerprint)


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory or hub id; the embedded one if left out")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.model)
    compressor = load_compressor(checkpoint)
    generator = VistGenerator.from_pretrained(checkpoint / "generator", fusion=checkpoint / "fusion")
    questions = demo_questions("dev")[: arguments.limit]
    contents = {p.id: p.content for p in demo_passages()}
    memories = compressor.encode([contents[q.passage_id] for q in questions])
    template, figures = PromptTemplate(), {}
    for name, coarsen in (("merge", VisualMemory.coarsen), ("evenly", evenly)):
        for size in SIZES:
            prompts = [
                template.build(q.question, [], [coarsen(m, size)]) for q, m in zip(questions, memories, strict=True)
            ]
            texts = [g.text for g in generator.generate(prompts, max_new_tokens=24, batch_size=16)]
            row: dict[str, object] = {}
            for metric, score in (("em", exact_match), ("f1", f1)):
                values = [score(text, q.answers) for text, q in zip(texts, questions, strict=True)]
                row[metric] = round(sum(values) / len(values), 4)
                row[f"{metric}_95"] = [round(v, 4) for v in bootstrap_interval(values)]
            figures[f"{name}@{size}"] = row
    result = {
        "benchmark": "elastic",
        "questions": len(questions),
        "figures": figures,
        **run_facts("python benchmarks/elastic.py --json"),
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        for key, row in figures.items():
            print(f"{key:14} EM {row['em']:.3f}  F1 {row['f1']:.3f}")


if __name__ == "__main__":
    main()
