"""What the tests of both doors share: a small index, the embedded model, an event loop that is watched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

from vist_rag import Budget, Passage, PassageIndex, VistRAG, VistReader

PASSAGES = [
    Passage(
        "The stone bridge at Saltharrow was finished in 1867, after nine years of work. It has eleven arches.",
        title="Saltharrow bridge",
    ),
    Passage(
        "The lighthouse on Cape Orrin was designed by Edda Marsh. Its lamp can be seen from thirty miles away.",
        title="Cape Orrin lighthouse",
    ),
    Passage(
        "The observatory of Velm stands on Mount Caro. Its first director was Tomas Brandt, who drew maps of the moon.",
        title="Velm observatory",
    ),
    Passage(
        "The ferry between Dunmere and the island of Dorrel crosses four times a day. The captain is Lina Sorrel.",
        title="Dorrel ferry",
    ),
    Passage(
        "Every spring the people of Pellow hold a market for seeds. The oldest stall sells beans from Tarragon valley.",
        title="Pellow seed market",
    ),
]
QUESTIONS = [
    "When was the stone bridge at Saltharrow finished?",
    "Who designed the lighthouse on Cape Orrin?",
    "Who was the first director of the observatory of Velm?",
    "Who is the captain of the ferry to Dorrel?",
]


@cache
def embedded_reader() -> VistReader:
    """The embedded model, loaded once."""
    return VistReader.from_pretrained()


def rag_over(index: PassageIndex, budget: Budget | None = None) -> VistRAG:
    """The pipeline over an index, with the weights of :func:`embedded_reader`."""
    reader = embedded_reader()
    return VistRAG(
        index,
        reader.compressor,
        reader.generator,
        budget=budget or reader.budget,
        template=reader.template,
        max_new_tokens=reader.max_new_tokens,
        stop=reader.stop,
    )


class Beat:
    """The longest time that the event loop did not turn, in milliseconds of this process's own work."""

    def __init__(self) -> None:
        self.longest_ms = 0.0


@asynccontextmanager
async def watched_loop() -> AsyncIterator[Beat]:
    """Measure how much the process works while the event loop stands still within.

    A loop that waits for a model stands still while the process works. One that the machine leaves no core does so
    as well by the clock, but no work is done meanwhile.
    """
    beat = Beat()

    async def turn() -> None:
        while True:
            begin = time.process_time()
            await asyncio.sleep(0.001)
            beat.longest_ms = max(beat.longest_ms, (time.process_time() - begin) * 1000)

    task = asyncio.create_task(turn())
    await asyncio.sleep(0.01)
    try:
        yield beat
    finally:
        task.cancel()
