"""Many who ask while another process writes: right answers, no lock error, memory that does not grow.

    python benchmarks/soak.py --seconds 60 --json

32 threads ask one ``VistRAG`` the development questions of the demo corpus, over an index that a second process adds to
and deletes from all the time, with memories, compacting now and then. What it adds is far from every question, so each
answer is known beforehand. Every fourth thread asks passages that have just been stored and have no memory yet, so that
the one that reads writes, too. The resident memory of the asking process is read every second, once all is warm.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vist_rag import Budget, Passage, PassageIndex, VistRAG
from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.provenance import run_facts

BATCH, KEPT = 64, 10  # passages the writer adds at once, and how many such batches stay before they are deleted
BUDGET = Budget(k_memory=1)
GROWTH_LIMIT = 0.05


def write(directory: str, vectors: list[np.ndarray], width: int, stop: Any, told: Any) -> None:
    """The writer: adds a batch, deletes an old one, compacts every fiftieth time."""
    batches = 0
    try:
        with PassageIndex.open(directory) as index:
            rng = np.random.default_rng(0)
            while not stop.is_set():
                passages = [
                    Passage(f"written {batches} {i} " + "and on " * 60, f"w{batches}-{i}") for i in range(BATCH)
                ]
                latents = [rng.normal(size=(20, width)).astype(np.float32) for _ in passages]
                some = [vectors[i] for i in rng.integers(0, len(vectors), BATCH)]
                index.add(passages, latents, vectors=some, fingerprint="another")
                if batches >= KEPT:
                    index.delete([f"w{batches - KEPT}-{i}" for i in range(BATCH)])
                if batches % 50 == 49:
                    index.compact()
                batches += 1
        told.put((batches, ""))
    except Exception:
        told.put((batches, traceback.format_exc()))


def far_vectors(near: np.ndarray, count: int) -> list[np.ndarray]:
    """Vectors that no question is near to: the part of random ones that lies outside the span of all questions."""
    basis = np.linalg.svd(near.astype(np.float64), full_matrices=True)[2]
    outside = basis[np.linalg.matrix_rank(near) :]
    if not len(outside):
        outside = basis[-32:]
    draws = np.random.default_rng(1).normal(size=(count, len(outside))) @ outside
    return list((draws / np.linalg.norm(draws, axis=1, keepdims=True)).astype(np.float32))


def soak(seconds: float, askers: int, count: int, directory: Path) -> dict[str, Any]:
    """Ask and write for so long."""
    asked = demo_questions("dev")[:count]
    questions, gold = [q.question for q in asked], {q.passage_id for q in asked}
    index = PassageIndex.open(directory)
    # A few questions need their passages alone.
    index.add([p for p in demo_passages() if p.id in gold] if count < 50 else demo_passages())
    rag = VistRAG.from_pretrained(None, index, budget=BUDGET)
    rag.prepare(list(index.passages()))
    expected = {question: answer.text for question, answer in zip(questions, rag.answer_batch(questions), strict=True)}
    context = multiprocessing.get_context("spawn")
    stop, told = context.Event(), context.Queue()
    near = index.embedder.encode(questions, query=True)
    arguments = (str(directory), far_vectors(near, 64), rag.compressor.memory_width, stop, told)
    writer = context.Process(target=write, args=arguments, daemon=True)

    wrong: list[str] = []
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    over = threading.Event()

    def ask(number: int) -> None:
        rng, count = np.random.default_rng(number), 0
        while not over.is_set():
            question, begin = questions[rng.integers(len(questions))], time.perf_counter()
            count += 1
            try:
                answer = rag.answer(question)
                if number % 4 == 0:  # a passage that nobody has read: its memory is made and stored now
                    fresh = Passage(f"{answer.citations[0].passage.text} Read by {number} as {count}.", f"a{number}")
                    index.add([fresh], vectors=[arguments[1][number]])
                    rag.prepare([fresh])
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"] += 1
                continue
            latencies.append(time.perf_counter() - begin)
            if answer.text != expected[question]:
                wrong.append(f"{question}: {answer.text!r}, not {expected[question]!r}")

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(askers)]
    writer.start()
    for thread in threads:
        thread.start()
    resident = watched(seconds)
    over.set()
    for thread in threads:
        thread.join()
    stop.set()
    batches, failure = told.get(timeout=60)
    writer.join()
    problems = index.problems()
    index.close()
    early, late = np.median(resident[: len(resident) // 3]), np.median(resident[-len(resident) // 3 :])
    return {
        "seconds": seconds,
        "askers": askers,
        "questions": len(questions),
        "answers": len(latencies),
        "wrong_answers": wrong,
        "errors": dict(errors),
        "writer_batches": batches,
        "writer_error": failure,
        "problems_afterwards": problems,
        "latency_ms": {f"p{p}": round(float(np.percentile(latencies, p)) * 1000, 1) for p in (50, 95, 99)},
        "resident_mb": {"first_third": round(early / 1e6, 1), "last_third": round(late / 1e6, 1)},
        "growth": round(float(late / early - 1), 4),
        "growth_limit": GROWTH_LIMIT,
        "held": not (wrong or errors or failure or problems) and bool(late / early - 1 <= GROWTH_LIMIT),
    }


def watched(seconds: float) -> list[int]:
    """Resident memory of this process, bytes, every second but those of the first fifth, when caches fill."""
    process, begin, seen = psutil.Process(), time.monotonic(), []
    while (passed := time.monotonic() - begin) < seconds:
        time.sleep(min(1.0, seconds / 20))
        if passed > seconds / 5:
            seen.append(process.memory_info().rss)
    return seen


def main() -> None:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--askers", type=int, default=32)
    parser.add_argument("--questions", type=int, default=1000, help="ask no more than so many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = soak(arguments.seconds, arguments.askers, arguments.questions, Path(directory))
    document = {"benchmark": "soak", **run_facts("python benchmarks/soak.py --seconds 60 --json"), **result}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    raise SystemExit(not result["held"])


if __name__ == "__main__":
    main()
