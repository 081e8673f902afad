"""SIGKILL at random moments of writing to an index: what was acknowledged must be there, and nothing wrong.

    python benchmarks/chaos.py --kills 500 --json

A writer adds, changes, deletes, compacts and re-encodes passages of one index, drawn from a seed, and says before and
after each call what it does. It is killed after a random time, whatever it is doing then: also while it opens the
index, builds the cache or closes. The index is then opened as any user would open it and compared with what it must
hold: all that was acknowledged, and of the call that was under way all or nothing (of re-encoding: whole batches).
Memories are numbers made from the text and the compressor's name, so a memory of another text or compressor is told.
Then the next writer goes on where this one was killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vist_rag.evaluation.provenance import run_facts
from vist_rag.pipeline import encode_lacking
from vist_rag.retrieval import GivenVectors, PassageIndex
from vist_rag.types import Passage

IDS = 400  # passages are drawn from so many ids: most are added, changed and deleted many times
WIDTH, LATENTS, DIMENSION = 32, 16, 48
COMPRESSORS = ("one", "two")
LONGEST_LIFE_S = 0.6  # a writer is killed within; opening takes it some 20 ms, a call 5 to 50 ms


def vector_of(text: str) -> np.ndarray:
    """Float32 ``[d]`` of length 1."""
    vector = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])).normal(size=DIMENSION)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def memory_of(text: str, compressor: str) -> np.ndarray:
    """float16 ``[n, d]``, unlike that of any other text or compressor."""
    seed = int.from_bytes(hashlib.sha256(f"{compressor}\0{text}".encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=(LATENTS, WIDTH)).astype(np.float16)


def fake_compressor(name: str) -> Any:
    """What ``encode_lacking`` needs of a compressor."""

    def encode(texts: list[str], **_: Any) -> list[SimpleNamespace]:
        return [SimpleNamespace(latents=torch.from_numpy(memory_of(text, name))) for text in texts]

    return SimpleNamespace(fingerprint=name, memory_form="float16", encode=encode)


@dataclass
class State:
    """What an index must hold: passages by id, and which texts have a memory of which compressor."""

    passages: dict[str, Passage] = field(default_factory=dict)
    memories: set[tuple[str, str]] = field(default_factory=set)

    def copy(self) -> State:
        """Another state that holds the same."""
        return State(dict(self.passages), set(self.memories))

    def forget(self, ids: list[str]) -> None:
        """Passages go, with the memories of their texts."""
        gone = {self.passages.pop(id_).content for id_ in ids if id_ in self.passages}
        self.memories = {(text, name) for text, name in self.memories if text not in gone}


@dataclass(frozen=True)
class Call:
    """One call of the writer, made from its number alone, so that both sides know it."""

    number: int
    what: str
    passages: tuple[Passage, ...]
    ids: tuple[str, ...]

    @classmethod
    def of(cls, number: int, seed: int) -> Call:
        """The call with this number."""
        rng = np.random.default_rng([seed, number])
        what = str(
            rng.choice(["add", "delete", "reindex", "drop", "compact", "reopen"], p=[0.5, 0.2, 0.1, 0.05, 0.1, 0.05])
        )
        ids = tuple(f"p{i}" for i in rng.choice(IDS, rng.integers(1, 120), replace=False))
        # One in three is stored as it is already, by chance; a text is never that of another id.
        words = " of the storm and the sea" * int(rng.integers(1, 60))
        passages = tuple(Passage(f"{id_} in version {rng.integers(3)}{words}", id_) for id_ in ids)
        return cls(number, what, passages, ids)

    def run(self, index: PassageIndex) -> None:
        """Do it."""
        if self.what == "add":
            texts = [passage.content for passage in self.passages]
            memories = [memory_of(text, "one") for text in texts]
            index.add(self.passages, memories, vectors=list(map(vector_of, texts)), fingerprint="one")
        elif self.what == "delete":
            index.delete(self.ids)
        elif self.what == "reindex":
            for _ in encode_lacking(index, fake_compressor("two")):
                pass
        elif self.what == "drop":
            index.delete_memories(fingerprint="two")
        elif self.what == "compact":
            index.compact()

    def after(self, state: State) -> State:
        """What the index must hold once it is done."""
        state = state.copy()
        if self.what == "add":
            state.forget([p.id for p in self.passages if state.passages.get(p.id, p).content != p.content])
            state.passages |= {passage.id: passage for passage in self.passages}
            state.memories |= {(passage.content, "one") for passage in self.passages}
        elif self.what == "delete":
            state.forget(list(self.ids))
        elif self.what == "reindex":
            state.memories |= {(passage.content, "two") for passage in state.passages.values()}
        elif self.what == "drop":
            state.memories = {(text, name) for text, name in state.memories if name != "two"}
        return state


def write(directory: str, first: int, seed: int, told: Connection) -> None:
    """The writer: opens the index and makes call after call, each told before and after."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    index = open_index(directory)
    for number in range(first, first + 1_000_000):
        call = Call.of(number, seed)
        told.send(("begins", number))
        if call.what == "reopen":
            index.close()
            index = open_index(directory)
        call.run(index)
        told.send(("done", number))


def open_index(directory: str | Path) -> PassageIndex:
    """As any user would."""
    return PassageIndex.open(directory, embedder=GivenVectors("chaos"))


def differences(index: PassageIndex, before: State, after: State) -> tuple[State, list[str]]:
    """What the index holds, and in what that is neither of two states."""
    found = State({p.id: p for p in index.passages()})
    wrong = list(index.problems())
    if found.passages not in (before.passages, after.passages):
        lost = len(before.passages.items() - found.passages.items())
        wrong.append(f"passages are of neither state: {lost} of the acknowledged differ")
    texts = {text for text, _ in before.memories | after.memories} | {p.content for p in found.passages.values()}
    for name in COMPRESSORS:
        for text, memory in index.memories(texts, name).items():
            found.memories.add((text, name))
            if not np.array_equal(memory, memory_of(text, name)):
                wrong.append(f"the memory of {text[:20]!r} by {name} is wrong")
    # Of a call under way there may be a part (whole batches of re-encoding), but nothing that neither state has.
    if lost := (before.memories & after.memories) - found.memories:
        wrong.append(f"{len(lost)} acknowledged memories are lost")
    if extra := found.memories - (before.memories | after.memories):
        wrong.append(f"{len(extra)} memories are of neither state")
    wrong += unfound(index, found)
    return found, wrong


def unfound(index: PassageIndex, found: State) -> list[str]:
    """Whether search finds what is there: ten passages, each by its own vector."""
    some = list(found.passages.values())[:: max(1, len(found.passages) // 10)]
    if not some:
        return []
    hits = index.search_vectors(np.stack([vector_of(p.content) for p in some]), 1)
    return [f"{p.id} is not found" for p, (hit,) in zip(some, hits, strict=True) if hit.passage != p]


def run(kills: int, seed: int, directory: Path) -> dict[str, Any]:
    """Kill so many writers, and count."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__ if __name__ != "__main__" else "vist_rag.pipeline", "faiss"])
    rng, state, number = np.random.default_rng(seed), State(), 0
    failures: list[str] = []
    killed_in: Counter[str] = Counter()
    acknowledged = 0
    for kill in range(kills):
        here, there = context.Pipe(duplex=False)
        writer = context.Process(target=write, args=(str(directory), number, seed, there), daemon=True)
        writer.start()
        there.close()
        # A third of them early, while the index is opened; the clock starts when the process does.
        life = rng.uniform(0, LONGEST_LIFE_S) * rng.choice([0.2, 1.0, 1.0])
        time.sleep(life)
        os.kill(writer.pid, signal.SIGKILL)  # type: ignore[arg-type]
        writer.join()
        under_way = "opening"
        while here.poll():
            try:
                word, number = here.recv()
            except EOFError:
                break
            under_way = Call.of(number, seed).what if word == "begins" else "between calls"
            if word == "done":
                state = Call.of(number, seed).after(state)
                acknowledged += 1
                number += 1
        here.close()
        killed_in[under_way] += 1
        after = Call.of(number, seed).after(state) if under_way not in ("opening", "between calls") else state
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with open_index(directory) as index:
                    found, wrong = differences(index, state, after)
            except Exception as error:
                found, wrong = state, [f"does not open or read: {type(error).__name__}: {error}"]
        failures += [f"kill {kill} while {under_way}: {line}" for line in wrong]
        state, number = replace(found), number + 1
    return {
        "kills": kills,
        "calls_acknowledged": acknowledged,
        "killed_while": dict(killed_in.most_common()),
        "passages_at_the_end": len(state.passages),
        "failures": failures,
        "limit": "0 acknowledged passages lost, 0 wrong memories, opens without help",
    }


def main() -> None:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        result = run(arguments.kills, arguments.seed, Path(directory))
    command = f"python benchmarks/chaos.py --kills {arguments.kills} --json"
    document = {"benchmark": "chaos", **run_facts(command, seed=arguments.seed), **result}
    document["seconds"] = round(time.monotonic() - begin, 1)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
