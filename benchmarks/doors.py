"""What the LangChain and LlamaIndex doors cost over ``VistRAG``, and what asking many at once gains.

    python benchmarks/doors.py --json

Questions of the demo corpus, answered by the embedded model from memories that are ready. Each question is asked of all
in turn, so that they share whatever the machine does meanwhile. Rounds of 16 concurrent calls alternate with rounds of
16 sequential ones, and with rounds in which an observer on the same event loop measures how long it stood still. What
was loaded is taken out of Python's garbage collection first (``gc.freeze``), as a server does: a full collection stops
all threads for 0.3 s once in some hundred questions.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from llama_index.core.query_engine import RetrieverQueryEngine

import langchain_vist
import llama_index_vist
from vist_rag import Budget, PassageIndex, VistRAG
from vist_rag.evaluation.demo import demo_passages, demo_questions
from vist_rag.evaluation.provenance import run_facts

_TICK_S = 0.001
"""How often the observer looks."""

BUDGET = Budget(k_raw=0, k_memory=1, latents=64)


def doors(rag: VistRAG) -> dict[str, tuple[Callable[[str], str], Callable[[str], Awaitable[str]]]]:
    """Each way to ask, now and asynchronously; all of them share the weights."""
    chat = langchain_vist.ChatVist.from_reader(rag)
    retriever = langchain_vist.VistRetriever(index=rag.index, k=1, llm=chat, budget=BUDGET)
    chain = langchain_vist.with_query(retriever) | langchain_vist.VIST_PROMPT | chat | StrOutputParser()
    llm = llama_index_vist.VistLLM.from_reader(rag)
    engine = RetrieverQueryEngine(
        llama_index_vist.VistRetriever(index=rag.index, similarity_top_k=1),
        llama_index_vist.VistSynthesizer(llm=llm),
        node_postprocessors=[llama_index_vist.VistPostprocessor(llm=llm, budget=BUDGET)],
    )

    async def query(question: str) -> str:
        return str(await engine.aquery(question))

    return {
        "LangChain": (chain.invoke, chain.ainvoke),
        "LlamaIndex": (lambda question: str(engine.query(question)), query),
    }


def overhead(rag: VistRAG, questions: Sequence[str]) -> dict[str, Any]:
    """Milliseconds a question of ``VistRAG`` and of each door, and how many answers are the same."""
    ways: dict[str, Callable[[str], str]] = {"VistRAG": lambda question: rag.answer(question).text}
    ways |= {name: ask for name, (ask, _) in doors(rag).items()}
    for ask in ways.values():
        ask(questions[0])
    took: dict[str, list[float]] = {name: [] for name in ways}
    same, order = dict.fromkeys(ways, 0), random.Random(0)
    for question in questions:
        wanted = rag.answer(question).text  # whoever comes first finds the same caches as whoever comes last
        for name in order.sample(list(ways), len(ways)):
            begin = time.perf_counter()
            text = ways[name](question)
            took[name].append((time.perf_counter() - begin) * 1000)
            same[name] += text == wanted
    rows = {}
    for name, times in took.items():
        ratios = [ours / rag_ms for ours, rag_ms in zip(times, took["VistRAG"], strict=True)]
        rows[name] = {
            "median_ms": round(statistics.median(times), 2),
            "ratio": round(statistics.median(times) / statistics.median(took["VistRAG"]), 4),
            "paired_ratio_median": round(statistics.median(ratios), 4),
            "paired_ratio_95": _median_95(ratios),
            "same_answers": same[name],
        }
    return rows


def _median_95(values: Sequence[float]) -> list[float]:
    """Bootstrap interval of a median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return [round(medians[50], 4), round(medians[1949], 4)]


async def together(ask: Callable[[str], Awaitable[str]], questions: Sequence[str], rounds: int) -> dict[str, Any]:
    """Questions a second, at once and one after another, and the longest time that the event loop stood still."""
    one = [await ask(question) for question in questions]
    at_once_s, in_turn_s, still_ms, same = [], [], [], True
    for _ in range(rounds):
        begin = time.perf_counter()
        for question in questions:
            await ask(question)
        in_turn_s.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        texts = await asyncio.gather(*map(ask, questions))
        at_once_s.append(time.perf_counter() - begin)
        longest = [0.0]
        observer = asyncio.create_task(
            _observe(longest)
        )  # in a round of its own: it wants its share of the interpreter
        await asyncio.sleep(0.01)
        same = same and texts == one == await asyncio.gather(*map(ask, questions))
        observer.cancel()
        still_ms.append(longest[0])
    ratios = [turn / once for turn, once in zip(in_turn_s, at_once_s, strict=True)]
    return {
        "concurrent": len(questions),
        "rounds": rounds,
        "sequential_per_s": round(len(questions) / statistics.median(in_turn_s), 2),
        "concurrent_per_s": round(len(questions) / statistics.median(at_once_s), 2),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "loop_stood_still_ms_max": round(max(still_ms), 1),
        "same_answers": same,
    }


async def _observe(longest_ms: list[float]) -> None:
    while True:
        begin = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        longest_ms[0] = max(longest_ms[0], (time.perf_counter() - begin - _TICK_S) * 1000)


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=64, help="how many for the overhead")
    parser.add_argument("--rounds", type=int, default=8, help="of 16 concurrent calls")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    questions = [q.question for q in demo_questions("dev")]
    with tempfile.TemporaryDirectory() as directory, PassageIndex.open(directory) as index:
        index.add(demo_passages())
        rag = VistRAG.from_pretrained(None, index, budget=BUDGET)
        rag.prepare(demo_passages())
        gc.collect()
        gc.freeze()
        figures: dict[str, Any] = {"overhead": overhead(rag, questions[: arguments.questions])}
        figures["together"] = {
            name: asyncio.run(together(ask, questions[:16], arguments.rounds)) for name, (_, ask) in doors(rag).items()
        }
    result = {
        "benchmark": "doors",
        "questions": min(arguments.questions, len(questions)),
        **figures,
        **run_facts("python benchmarks/doors.py --json"),
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
        return
    for name, row in figures["overhead"].items():
        low, high = row["paired_ratio_95"]
        of_rag = f"{row['paired_ratio_median']:.3f} [{low:.3f}, {high:.3f}] of VistRAG's"
        print(f"{name:12} {row['median_ms']:.0f} ms a question: {of_rag} (limit 1.10)")
    for name, row in figures["together"].items():
        still_ms = row["loop_stood_still_ms_max"]
        print(f"{name:12} 16 at once: {row['ratio_median']:.1f} times the throughput of one by one (limit 3)")
        print(f"{'':12} the event loop stood still for {still_ms:.0f} ms at most (limit 50)")


if __name__ == "__main__":
    main()
