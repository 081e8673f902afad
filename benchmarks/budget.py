"""Whether a budget is met to the last position, and how it is best divided.

    python benchmarks/budget.py --cases 10000 --json     # random cases, and real answers of the embedded model
    python benchmarks/budget.py --quality --json         # the same, and exact match under each policy

A case is a budget and hits drawn at random: lengths, scores, policies, limits in tokens and as rates, objections of a
guard. What a plan takes is compared with what can be taken, which is counted here in another way: by trying every
number of passages. Of real answers, what is compared are the positions that the generator was given. The policies are
measured on the development questions of the demo corpus, three retrieved passages each.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from vist_rag import Budget, Passage, PassageIndex, SearchHit, VistRAG
from vist_rag.budget import POLICIES, Plan
from vist_rag.errors import ConfigError
from vist_rag.evaluation import bootstrap_interval, exact_match
from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.metrics import paired_difference
from vist_rag.evaluation.provenance import run_facts

OUTPUT = Path(__file__).parent / "results" / "budget-exact.json"
QUALITY_TOKENS = (64, 128)
QUALITY_TOP_K = 3


@dataclass(frozen=True)
class Case:
    """A budget and the hits that it is for.

    Attributes:
        budget: How they are to be read.
        raw: Tokens of each passage as text.
        latents: Latents of each.
        scores: Best first.
        frame: Positions around each memory.
        guarded: Places of the passages that a guard objects to.
        strict: Whether these are never read as memory.
    """

    budget: Budget
    raw: tuple[int, ...]
    latents: tuple[int, ...]
    scores: tuple[float, ...]
    frame: int
    guarded: frozenset[int] = frozenset()
    strict: bool = False

    def split(self) -> Plan:
        """What the budget decides."""
        hits = [SearchHit(Passage("", id=str(i)), score, i) for i, score in enumerate(self.scores)]
        return self.budget.split(
            hits,
            raw_tokens=lambda passage: self.raw[int(passage.id)],
            memory_tokens=lambda passage, n: self.frame + min(self.latents[int(passage.id)], n or 10**9),
            guard=(lambda passage: "why" if int(passage.id) in self.guarded else None) if self.guarded else None,
            strict=self.strict,
        )

    def limit(self) -> int | None:
        """Tokens that the passages may take."""
        rate, top_k = self.budget.rate, self.budget.top_k
        return self.budget.tokens if rate is None else int(Decimal(repr(rate)) * sum(self.raw[:top_k]))

    def full(self) -> list[int]:
        """Latents of each passage at its full size."""
        return [min(n, self.budget.latents or n) for n in self.latents[: self.budget.top_k]]


def draw(rng: random.Random) -> Case:
    """A case, now and then of passages that are shorter than what frames them."""
    count, longest = rng.randint(0, 12), rng.choice((3, 12, 60, 300))
    latents = tuple(rng.randint(1, longest) for _ in range(count))
    raw = tuple(max(1, round(n * rng.uniform(0.5, 5))) for n in latents)
    spread = rng.choice((0.0, 0.01, 0.2, 30.0))
    scores = tuple(sorted((rng.gauss(0.5, spread) for _ in range(count)), reverse=True))
    k_raw = rng.choice((0, 0, 1, 2, 12))
    limit: dict[str, Any] = {}
    if (kind := rng.random()) < 0.6:
        limit = {"tokens": rng.randint(1, max(1, rng.choice((sum(raw), sum(latents), 20)) * 5 // 4))}
    elif kind < 0.95:
        limit = {"rate": rng.choice((round(rng.uniform(0.01, 1), 2), rng.uniform(1e-3, 1), 1.0))}
    budget = Budget(
        k_raw=k_raw,
        k_memory=rng.randint(int(k_raw == 0), 12),
        latents=rng.choice((None, None, None, 1, 8, 64)),
        policy=rng.choice(POLICIES),
        **limit,
    )
    guarded = frozenset(i for i in range(count) if rng.random() < 0.3) if rng.random() < 0.4 else frozenset()
    return Case(budget, raw, latents, scores, rng.randint(1, 6), guarded, rng.random() < 0.5)


def room_for(case: Case) -> tuple[set[int], list[int], int | None]:
    """Objected passages that are read as text, those that may be memory, and the positions that are left for these."""
    left, texts, others = case.limit(), set[int](), list[int]()
    for i in range(min(len(case.raw), case.budget.top_k)):
        if i in case.guarded and (left is None or case.raw[i] <= left):
            texts.add(i)
            left = None if left is None else left - case.raw[i]
        elif i not in case.guarded or not case.strict:
            others.append(i)
    return texts, others, left


def can_take(case: Case, others: Sequence[int], left: int) -> int:
    """The most that ``others`` can take of what is left: every number of them is tried."""
    full = [case.full()[i] + case.frame for i in others]
    if sum(full) > left:
        fits = [count for count in range(len(full) + 1) if count * (case.frame + 1) <= left]
        return max(min(left, sum(full[:count])) for count in fits)
    most = sum(full)
    for i in [i for i in others if i not in case.guarded][: case.budget.k_raw]:
        full[others.index(i)] = case.raw[i]
        if sum(full) > left:
            break
        most = sum(full)
    return most


def violations(case: Case) -> list[str]:
    """What is wrong with the plan of a case; nothing, as a rule."""
    texts, others, left = room_for(case)
    nothing_fits = left is not None and bool(others) and not texts and left <= case.frame
    try:
        plan = case.split()
    except ConfigError:
        return [] if nothing_fits else ["refused"]
    if nothing_fits:
        return ["not refused"]
    full, raw, memory = case.full(), [hit.rank for hit in plan.raw], [hit.rank for hit in plan.compressed]
    sizes = [full[i] if n is None else min(n, full[i]) for i, n in zip(memory, plan.latents, strict=True)]
    turned = [i for i in raw if i not in texts]
    wrong = {
        "differs when asked again": plan != case.split(),
        "limit": plan.limit != case.limit(),
        "order": raw != sorted(raw) or memory != sorted(memory) or bool(set(raw) & set(memory)),
        "not the best": sorted([*turned, *memory]) != others[: len(turned) + len(memory)],
        "guarded as text": not texts <= set(raw) or bool(set(turned) & case.guarded),
        "guarded as memory": case.strict and bool(set(memory) & case.guarded),
        "what became of guarded": {one.hit.rank: one.read for one in plan.guarded}
        != {
            i: "raw" if i in raw else "memory" if i in memory else "left_out"
            for i in sorted(case.guarded)
            if i < case.budget.top_k
        },
        "too many as text": len(turned) > case.budget.k_raw,
        "size": not all(1 <= size <= full[i] for size, i in zip(sizes, memory, strict=True)),
    }
    if left is None:
        wrong["not all are read"] = len(raw) + len(memory) != len(full) or sizes != [full[i] for i in memory]
    else:
        taken = sum(case.raw[i] for i in raw) + sum(sizes) + case.frame * len(memory)
        used = taken - sum(case.raw[i] for i in texts)
        everything = sum(full[i] + case.frame for i in others)
        wrong["exceeded"] = taken > (case.limit() or 0)
        wrong["not exact"] = used != can_take(case, others, left)
        reachable = others and full[others[0]] > case.frame and case.frame < left < everything
        wrong["not the limit"] = bool(reachable) and used != left
    return [name for name, is_so in wrong.items() if is_so]


def check(cases: int, seed: int = 0) -> dict[str, Any]:
    """Violations among random cases, and how the limits were met."""
    rng, found, met = random.Random(seed), Counter[str](), Counter[str]()
    for _ in range(cases):
        case = draw(rng)
        found.update(violations(case))
        met[_met(case)] += 1
    return {"cases": cases, "violations": sum(found.values()), "kinds": dict(found), "limits": dict(met)}


def _met(case: Case) -> str:
    texts, others, left = room_for(case)
    if left is None:
        return "none"
    if not others or (left <= case.frame and texts):
        return "only text is read"
    if left <= case.frame:
        return "refused: too little for one latent"
    most = sum(case.full()[i] + case.frame for i in others)
    if most <= left:
        return "holds all memories at full size"
    return "met exactly" if can_take(case, others, left) == left else "no sizes take it: passages shorter than frames"


def check_answers(rag: VistRAG, questions: Sequence[str], answers: int, seed: int = 0) -> dict[str, Any]:
    """Violations among real answers: positions that the generator was given, against those that were planned."""
    rng, found, taken = random.Random(seed), Counter[str](), 0
    for _ in range(answers):
        question = rng.choice(questions)
        limit = {"tokens": rng.randint(6, 400)} if rng.random() < 0.5 else {"rate": round(rng.uniform(0.02, 0.5), 3)}
        budget = Budget(k_raw=rng.randint(0, 2), k_memory=rng.randint(1, 3), policy=rng.choice(POLICIES), **limit)
        hits = rag.index.search(question, budget.top_k)
        case = _case(rag, hits, budget)
        try:
            plan = rag.plan(hits, budget)
        except ConfigError:
            found["refused"] += (case.limit() or 0) > case.frame
            continue
        planned = sum(rag.raw_tokens(hit.passage) for hit in plan.raw) + sum(
            rag.memory_tokens(hit.passage, n) for hit, n in zip(plan.compressed, plan.latents, strict=True)
        )
        usage = rag.answer(question, budget=budget).usage
        asked = rag.generator.prompt_length(rag.template.build(question, [], []))
        found["usage is not what was planned"] += usage.compressed_tokens != planned
        found["prompt is not what was planned"] += usage.prompt_tokens != planned + asked
        found["not exact"] += planned != can_take(case, range(len(hits)), case.limit() or 0)
        found["limit is not told"] += usage.budget != case.limit()
        taken += usage.compressed_tokens
    return {"answers": answers, "violations": sum(found.values()), "kinds": dict(+found), "positions": taken}


def _case(rag: VistRAG, hits: Sequence[SearchHit], budget: Budget) -> Case:
    frame = rag.memory_tokens(hits[0].passage, 1) - 1
    return Case(
        budget,
        tuple(rag.raw_tokens(hit.passage) for hit in hits),
        tuple(rag.compressor.count_latents(hit.passage.content) for hit in hits),
        tuple(hit.score for hit in hits),
        frame,
    )


def quality(rag: VistRAG) -> dict[str, Any]:
    """Exact match on the development questions under each policy, with paired differences from ``fixed``."""
    questions = demo_questions("dev")
    table: dict[str, Any] = {"questions": len(questions), "split": "dev", "top_k": QUALITY_TOP_K}
    for tokens in QUALITY_TOKENS:
        scores: dict[str, list[float]] = {}
        rows: dict[str, Any] = {}
        for policy in POLICIES:
            budget = Budget(k_raw=0, k_memory=QUALITY_TOP_K, tokens=tokens, policy=policy)
            answers = rag.answer_batch([q.question for q in questions], budget=budget)
            scores[policy] = [exact_match(a.text, q.answers) for a, q in zip(answers, questions, strict=True)]
            rows[policy] = {
                "em": round(sum(scores[policy]) / len(questions), 4),
                "em_95": [round(v, 4) for v in bootstrap_interval(scores[policy])],
                "passages_read": round(sum(len(a.citations) for a in answers) / len(answers), 2),
                "compressed_tokens": round(sum(a.usage.compressed_tokens for a in answers) / len(answers), 2),
                "minus_fixed": paired_difference(scores[policy], scores["fixed"]),
            }
        table[f"tokens_{tokens}"] = rows
    return table


def main() -> None:
    """Check, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="random cases")
    parser.add_argument("--answers", type=int, default=200, help="real answers of the embedded model")
    parser.add_argument("--quality", action="store_true", help="measure the policies, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON is written")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"planned": check(arguments.cases)}
    with tempfile.TemporaryDirectory() as directory, PassageIndex.open(directory) as index:
        index.add(demo_passages())
        rag = VistRAG.from_pretrained(None, index, guard="off")
        figures["answered"] = check_answers(rag, [q.question for q in demo_questions("dev")], arguments.answers)
        if arguments.quality:
            figures["quality"] = quality(rag)
    total = figures["planned"]["violations"] + figures["answered"]["violations"]
    command = f"python benchmarks/budget.py --cases {arguments.cases}{' --quality' * arguments.quality} --json"
    result = {"benchmark": "budget", "violations": total, **figures, **run_facts(command)}
    text = json.dumps(result, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else f"violations = {total}")


if __name__ == "__main__":
    main()
