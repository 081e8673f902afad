"""An index of 100,000 passages on this machine: time and bytes to make it, time to search it and to answer from it.

    python benchmarks/scale.py --data DIR --index DIR --passages 100000 --json

``--data`` holds JSON Lines of passages (``{"id", "title", "text"}``) and ``--questions`` a file of questions; indexing
goes on where it was stopped, and its time is that of what was indexed in this run. ``--workers`` processes of one
thread each add to the index, since two threads of one process do little more than one. Where a night is not at hand,
``--fill`` stores what is missing with random vectors: times to search and to answer are those of the whole, the time to
index is then that of what was embedded. Questions are asked one by one, as a user would, from a reader that has nothing
at hand: search, memories from the store (made now where there are none), generation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from vist_rag import Budget, Passage, PassageIndex, VistRAG
from vist_rag.checkpoint import embedded_checkpoint, load_compressor
from vist_rag.cli.index import Stored, store
from vist_rag.evaluation.provenance import run_facts
from vist_rag.retrieval import read_passages

BATCH = 1024
ANSWER_LIMIT_S = 0.5


def passages_of(folder: Path, count: int) -> Iterator[Passage]:
    """The first passages of all files in a folder."""
    return islice(read_passages([folder], words=120), count)


def questions_of(file: Path, count: int) -> list[str]:
    """The first questions of a JSON Lines file."""
    import gzip

    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line in islice(lines, count)]


def work(directory: Path, passages: list[Passage], told: Any, *, memories: bool) -> None:
    """One worker: adds what is missing of its passages, with their memories where these are wanted."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    compressor = load_compressor(embedded_checkpoint()) if memories else None
    stored = Stored(len(passages))
    with PassageIndex.open(directory) as index:
        for start in range(0, len(passages), BATCH):
            store(index, passages[start : start + BATCH], compressor, stored, lambda n: told.put(("done", n)))  # type: ignore[arg-type]
    told.put(("over", (stored.added, stored.memories_made, time.process_time())))


def indexed(directory: Path, passages: list[Passage], workers: int, *, memories: bool) -> dict[str, Any]:
    """Add what is missing, with its memories; what it took."""
    with PassageIndex.open(directory) as index:
        before = len(index)
    begin, context = time.perf_counter(), multiprocessing.get_context("spawn")
    told = context.Queue()
    shares = [passages[number::workers] for number in range(workers)]
    started = [
        context.Process(target=work, args=(directory, share, told), kwargs={"memories": memories}) for share in shares
    ]
    for process in started:
        process.start()
    over: list[tuple[int, int, float]] = []
    with tqdm(total=len(passages), desc="indexing", unit=" passages", mininterval=5) as bar:
        while len(over) < workers:
            word, what = told.get()
            bar.update(what) if word == "done" else over.append(what)
    for process in started:
        process.join()
    seconds = time.perf_counter() - begin
    added, made, cpu = (sum(values) for values in zip(*over, strict=True))
    return {
        "workers": workers,
        "passages_before": before,
        "passages_indexed": added,
        "memories_made": made,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "passages_per_s": round(added / seconds, 1),
    }


def filled(directory: Path, passages: list[Passage]) -> int:
    """Store what is missing with random vectors, which no question is near to: as large and as slow to search."""
    rng, added = np.random.default_rng(0), 0
    with PassageIndex.open(directory) as index:
        width = int(index.meta["dimension"])
        for start in tqdm(range(0, len(passages), BATCH), desc="filling"):
            some = passages[start : start + BATCH]
            known = index.get([p.id for p in some])
            some = [p for p in some if p.id not in known]
            added += index.add(some, vectors=rng.normal(size=(len(some), width))) if some else 0
    known_of = directory / "random-vectors.json"  # how many earlier runs have stored
    total = added + (json.loads(known_of.read_text("utf-8")) if known_of.exists() else 0)
    known_of.write_text(json.dumps(total), "utf-8")
    return total


def times(milliseconds: list[float]) -> dict[str, float]:
    """Median and tails."""
    return {f"p{p}": round(float(np.percentile(milliseconds, p)), 1) for p in (50, 95, 99)}


def asked(rag: VistRAG, questions: list[str], budget: Budget) -> dict[str, Any]:
    """Every question once, one by one."""
    stages: dict[str, list[float]] = {}
    for question in questions[:5]:  # kernels and files are warm then
        rag.answer(question, budget=budget)
    for question in questions[5:]:
        begin = time.perf_counter()
        answer = rag.answer(question, budget=budget)
        stages.setdefault("answer", []).append((time.perf_counter() - begin) * 1000)
        for stage, spent in answer.timings_ms.items():
            stages.setdefault(stage, []).append(spent)
    return {"k_memory": budget.k_memory, **{f"{stage}_ms": times(spent) for stage, spent in stages.items()}}


def scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Index and ask."""
    passages = list(passages_of(arguments.data, arguments.passages))
    questions = questions_of(arguments.questions, arguments.asked + 5)
    if arguments.fill:
        making: dict[str, Any] = {"passages_with_random_vectors": filled(arguments.index, passages)}
    else:
        making = indexed(arguments.index, passages, arguments.workers, memories=not arguments.no_memory)
    with PassageIndex.open(arguments.index) as index:
        begin = time.perf_counter()
        index.search(questions[0], 1)
        first_search_s = time.perf_counter() - begin
    begin = time.perf_counter()
    with PassageIndex.open(arguments.index) as index:
        opening_s = time.perf_counter() - begin
        sizes = index.sizes()
        search: list[float] = []
        for number, question in enumerate(questions):
            begin = time.perf_counter()
            index.search(question, 10)
            if number >= 5:
                search.append((time.perf_counter() - begin) * 1000)
        answers = [
            # Nothing at hand: every memory is read from the store.
            asked(VistRAG.from_pretrained(None, index), questions, Budget(k_memory=k))
            for k in (1, 3)
        ]
        (memories,) = sizes.memories
        n = sizes.passages
        cache = (arguments.index / "passages.faiss").stat().st_size
    return {
        "passages": n,
        "index": {**making, "first_search_s": round(first_search_s, 2), "opening_s": round(opening_s, 2)},
        "bytes_a_passage": {
            "text": round(sizes.text_bytes / n),
            "vector": round(sizes.vector_bytes / n),
            "memory": round(memories.bytes / memories.memories),
            "store_in_all": round(sizes.file_bytes / n),
            "faiss": round(cache / n),
        },
        "memories": memories.memories,
        "memory_form": memories.form,
        "latents_a_memory": round(memories.latents / memories.memories, 1),
        "search_10_ms": times(search),
        "answers": answers,
        "answer_limit_ms": ANSWER_LIMIT_S * 1000,
        "peak_resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "held": all(row["answer_ms"]["p50"] <= ANSWER_LIMIT_S * 1000 for row in answers),
    }


def main() -> None:
    """Run it and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="file or folder of passages")
    parser.add_argument("--questions", type=Path, required=True, help="JSON Lines with a question each")
    parser.add_argument("--index", type=Path, required=True, help="the index; made where there is none")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2, help="processes that index")
    parser.add_argument("--no-memory", action="store_true", help="add no memories: they are made when they are read")
    parser.add_argument("--fill", action="store_true", help="store what is missing with random vectors: no index time")
    parser.add_argument("--asked", type=int, default=300, help="questions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = scale(arguments)
    command = (
        f"python benchmarks/scale.py --data DIR --questions FILE --index DIR --passages {arguments.passages} --json"
    )
    document = {"benchmark": "scale", **run_facts(command), **result}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
