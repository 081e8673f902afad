"""What the guard is worth: questions about identifiers, numbers, tables and scripts, and about ordinary prose.

    VIST_RAG_DATA=DIR python benchmarks/guard.py --json --output benchmarks/results/guard.json

Each question is asked with the passage that answers it, read as text, as memory, and as the guard says. Hard questions
are made up (``guard_questions.py``): one seed to choose the guard's thresholds with, another to measure with. Prose is
SQuAD (development questions of ``VIST_RAG_DATA``) and the development questions of the demo corpus.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guard_questions import HardQuestion, hard_questions

from vist_rag import Budget, Passage, SearchHit, VistReader
from vist_rag.budget import Plan
from vist_rag.compression import VisualMemory
from vist_rag.evaluation import bootstrap_interval, exact_match
from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.provenance import run_facts
from vist_rag.fidelity import ENOUGH, SHARE, WORD, Fidelity, Guard, Rate, bucket_of

SEEDS = {"dev": 1, "test": 2}
HARD, PROSE, ANSWER_TOKENS = 340, 200, 48
WORDS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.9)
SHARES = (0.1, 0.25)


class Asking:
    """Answers questions from their passages, each way once.

    Args:
        readers: By their guard.
        questions: What is asked.
        answers: Where exact matches are kept; those that are known are not asked for again.
    """

    def __init__(
        self, readers: dict[str, VistReader], questions: Sequence[HardQuestion], answers: Path | None = None
    ) -> None:
        self.readers, self.questions = readers, questions
        self.reader = readers["off"]
        memories = self.reader.compressor.encode([q.passage.content for q in questions])
        self.memories = dict(zip([q.id for q in questions], memories, strict=True))
        self.answers = answers
        kept = answers.read_text("utf-8").splitlines() if answers and answers.is_file() else ()
        self.known: dict[tuple[str, str, int | None], float] = {(*key,): score for key, score in map(json.loads, kept)}

    def plans(self, guard: str, budget: Budget) -> list[Plan]:
        """How each question's passage is read."""
        return [self.readers[guard].plan([SearchHit(q.passage, 1.0, 0)], budget) for q in self.questions]

    def scores(self, plans: Sequence[Plan]) -> list[float]:
        """Exact match of each question."""
        keys = [(q.id, "raw" if p.raw else "memory" if p.compressed else "none", p.latents[0] if p.latents else None)
                for q, p in zip(self.questions, plans, strict=True)]  # fmt: skip
        new = [(key, q) for key, q in zip(keys, self.questions, strict=True) if key not in self.known]
        prompts = [self._prompt(q, how, n) for (_, how, n), q in new]
        generated = self.reader.generator.generate(
            prompts, max_new_tokens=ANSWER_TOKENS, stop=self.reader.stop, batch_size=16
        )
        for (key, q), one in zip(new, generated, strict=True):
            self.known[key] = exact_match(one.text, q.answers)
            if self.answers:
                with self.answers.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self.known[key]]) + "\n")
        return [self.known[key] for key in keys]

    def _prompt(self, q: HardQuestion, how: str, size: int | None) -> Any:
        memory: VisualMemory = self.memories[q.id]
        read = [memory if size is None else memory.coarsen(size)] if how == "memory" else []
        return self.reader.template.build(q.question, [q.passage] if how == "raw" else [], read)

    def row(self, plans: Sequence[Plan]) -> dict[str, Any]:
        """Exact match with its interval, how passages were read, and the ratio of tokens."""
        scores, reader = self.scores(plans), self.reader
        read = [q for q, p in zip(self.questions, plans, strict=True) if p.raw or p.compressed]
        origin = sum(reader.raw_tokens(q.passage) for q in read)
        taken = sum(
            sum(reader.raw_tokens(h.passage) for h in p.raw)
            + sum(reader.memory_tokens(h.passage, n) for h, n in zip(p.compressed, p.latents, strict=True))
            for p in plans
        )
        n = len(plans)
        return {
            "em": round(sum(scores) / n, 4),
            "em_95": [round(v, 4) for v in bootstrap_interval(scores)],
            "raw": round(sum(bool(p.raw) for p in plans) / n, 4),
            "left_out": round(sum(not p.raw and not p.compressed for p in plans) / n, 4),
            "ratio": round(origin / taken, 3) if taken else None,
        }


def measure(asking: Asking, *, limited: bool = False) -> dict[str, Any]:
    """All ways to read one set of questions; ``limited``: also where passages may take half of their raw tokens."""
    own, raw, half = Budget(k_memory=1, latents=64), Budget(k_raw=1, k_memory=0), Budget(k_memory=1, rate=0.5)
    figures = {"raw": asking.row(asking.plans("off", raw)), "memory": asking.row(asking.plans("off", own))}
    for guard in ("on", "strict"):
        figures[f"guard {guard}"] = asking.row(asking.plans(guard, own))
    for guard in ("off", "on", "strict") if limited else ():
        figures[f"guard {guard}, rate 0.5"] = asking.row(asking.plans(guard, half))
    lost = differences(asking.scores(asking.plans("on", own)), asking.scores(asking.plans("off", raw)))
    sorts: dict[str, dict[str, float]] = {}
    for name in sorted({q.sort for q in asking.questions}):
        mine = [i for i, q in enumerate(asking.questions) if q.sort == name]
        ways = {"raw": ("off", raw), "memory": ("off", own), "guard on": ("on", own)}
        scores = {way: asking.scores(asking.plans(*how)) for way, how in ways.items()}
        sorts[name] = {"n": len(mine), **{w: round(sum(s[i] for i in mine) / len(mine), 3) for w, s in scores.items()}}
    return {"questions": len(asking.questions), "figures": figures, "guard on - raw": lost, "sorts": sorts}


def differences(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Mean of the paired differences, with its interval."""
    values = [a - b for a, b in zip(one, other, strict=True)]
    return {"em": round(sum(values) / len(values), 4), "em_95": [round(v, 4) for v in bootstrap_interval(values)]}


def sweep(fidelity: Fidelity, hard: Asking, prose: dict[str, Asking]) -> list[dict[str, float]]:
    """Exact match and share read as text at each threshold, on development questions."""
    own, raw = Budget(k_memory=1, latents=64), Budget(k_raw=1, k_memory=0)
    sets = {"hard": hard, **prose}
    scores = {n: (a.scores(a.plans("off", raw)), a.scores(a.plans("off", own))) for n, a in sets.items()}
    rows = []
    for word in WORDS:
        for share in SHARES:
            guard, row = Guard(fidelity, word=word, share=share), {"word": word, "share": share}
            for name, asking in sets.items():
                told = [guard(q.passage.content) is not None for q in asking.questions]
                picked = [r if t else m for t, r, m in zip(told, *scores[name], strict=True)]
                row[f"{name} em"] = round(sum(picked) / len(picked), 4)
                row[f"{name} raw"] = round(sum(told) / len(told), 4)
            rows.append(row)
    return rows


def predictors(fidelity: Fidelity, hard: Asking) -> dict[str, dict[str, float]]:
    """How well each table of rates tells answers that memory loses from those that it keeps.

    Of the questions that are answered right from text, by the rate of the worst word of the answer: the area under the
    ROC curve, and the Brier score (mean squared difference of the rate and what happened; 0 is best).
    """
    own, raw = Budget(k_memory=1, latents=64), Budget(k_raw=1, k_memory=0)
    right, kept = hard.scores(hard.plans("off", raw)), hard.scores(hard.plans("off", own))
    found = {}
    for name in ("probe", "speller"):
        if getattr(fidelity, name) is None:
            continue
        table = Fidelity(fidelity.fingerprint, {}, fidelity.glyphs, getattr(fidelity, name))
        rates = [Guard(table).risk(q.answers[0]).rate for q in hard.questions]
        lost = [r for r, a, b in zip(rates, right, kept, strict=True) if a and not b]
        safe = [r for r, a, b in zip(rates, right, kept, strict=True) if a and b]
        wins = sum((a > b) + (a == b) / 2 for a in lost for b in safe)
        squares = [(1 - rate) ** 2 for rate in lost] + [rate**2 for rate in safe]
        auc, brier = wins / max(1, len(lost) * len(safe)), sum(squares) / max(1, len(squares))
        found[name] = {"auc": round(auc, 4), "brier": round(brier, 4)}
    return found


def prose_questions(reader: VistReader) -> dict[str, list[HardQuestion]]:
    """Development questions on ordinary prose, with their passages, as far as these fit the context as text."""
    by_id = {p.id: p for p in demo_passages()}
    found = {
        "demo": [HardQuestion(q.id, "prose", q.question, q.answers, by_id[q.passage_id]) for q in demo_questions("dev")]
    }
    data = os.environ.get("VIST_RAG_DATA")
    path = Path(data or ".") / "reader" / "squad.dev.jsonl.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows = random.Random(0).sample(rows, min(PROSE, len(rows)))
        found["squad"] = [
            HardQuestion(r["id"], "prose", r["question"], tuple(r["answers"]), Passage(r["context"], title=r["title"]))
            for r in rows
        ]
    return {name: [q for q in some if _fits(reader, q)] for name, some in found.items()}


def _fits(reader: VistReader, q: HardQuestion) -> bool:
    prompt = reader.template.build(q.question, [q.passage], [])
    return reader.generator.prompt_length(prompt) + ANSWER_TOKENS <= (reader.generator.context_tokens or 10**9)


def rates_table(fidelity: Fidelity) -> str:
    """What is misread of each class, in Markdown; kinds of which nothing comes back share a row."""
    lengths = list(dict.fromkeys(bucket_of(length) for length in range(1, 20)))
    kinds = sorted({name.rpartition(" ")[0] for name in fidelity.rates})
    lines = [f"| kind | {' | '.join(lengths)} |", "|---" * (len(lengths) + 1) + "|"]
    lost = []
    for kind in kinds:
        rates = [fidelity.rates.get(f"{kind} {length}", Rate(0, 0)) for length in lengths]
        if sum(rate.wrong for rate in rates) == sum(rate.n for rate in rates):
            lost.append(kind)
            continue
        cells = [f"{100 * rate.share:.0f} %" if rate.n >= ENOUGH else "" for rate in rates]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| {', '.join(lost)} |{' 100 % |' * len(lengths)}"])


def figures_table(result: Mapping[str, Any]) -> str:
    """Exact match, share read as text and ratio of each set, in Markdown."""
    lines = ["| questions | read as | exact match | as text | left out | ratio |", "|---|---|---|---|---|---|"]
    for name, one in result.items():
        for way, row in one["figures"].items() if isinstance(one, dict) and "figures" in one else ():
            low, high = row["em_95"]
            em = f"{row['em']:.3f} [{low:.3f}, {high:.3f}]"
            shares = f"{100 * row['raw']:.0f} % | {100 * row['left_out']:.0f} %"
            lines.append(f"| {name}, {one['questions']} | {way} | {em} | {shares} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def speed(guard: Guard, texts: Sequence[str]) -> dict[str, float]:
    """Milliseconds for 100 words that were never seen."""
    words = [guard.risk(text).words for text in texts]  # warms the classes of common words, as any use does
    fresh = Guard(guard.fidelity)
    begin = time.perf_counter()
    for text in texts:
        fresh(text)
    return {"ms_per_100_words": round((time.perf_counter() - begin) * 1e5 / sum(words), 4)}


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory or hub id; the embedded one if left out")
    parser.add_argument("--splits", default="dev,test", help="of the hard questions")
    parser.add_argument("--limit", type=int, help="only so many questions of each set")
    parser.add_argument("--answers", type=Path, help="keep exact matches there, and take those that are there already")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    off = VistReader.from_pretrained(arguments.model, guard="off")
    fidelity = VistReader.from_pretrained(arguments.model).fidelity
    if fidelity is None:
        parser.error("the checkpoint has no fidelity.json; run vist-rag probe")
    readers = {"off": off}
    for mode in ("on", "strict"):
        readers[mode] = VistReader(off.compressor, off.generator, template=off.template, fidelity=fidelity, guard=mode)
    answers = arguments.answers
    prose = {name: Asking(readers, some[: arguments.limit], answers) for name, some in prose_questions(off).items()}
    result: dict[str, Any] = {"benchmark": "guard", "thresholds": {"word": WORD, "share": SHARE}}
    for split in arguments.splits.split(","):
        asking = Asking(readers, hard_questions(HARD, SEEDS[split])[: arguments.limit], answers)
        result[f"hard {split}"] = measure(asking, limited=True)
        if split == "dev":
            result["sweep"] = sweep(fidelity, asking, prose)
            result["predicts"] = predictors(fidelity, asking)
    for name, asking in prose.items():
        result[f"prose {name}"] = measure(asking)
        result[f"prose {name}"].pop("sorts")
    texts = [q.passage.content for asking in prose.values() for q in asking.questions]
    result["guard"] = speed(Guard(fidelity), texts)
    result |= run_facts("VIST_RAG_DATA=DIR python benchmarks/guard.py --json --output benchmarks/results/guard.json")
    text = json.dumps(result, indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        for key, value in result.items():
            for name, row in value.get("figures", {}).items() if isinstance(value, dict) else ():
                print(
                    f"{key:14} {name:26} EM {row['em']:.3f} {row['em_95']}  raw {row['raw']:.2f}  ratio {row['ratio']}"
                )
        print(json.dumps(result.get("predicts")), json.dumps(result["guard"]))


if __name__ == "__main__":
    main()
