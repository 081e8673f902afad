"""What the tests of the LlamaIndex door share: passages of their own, and LLMs and readers that keep what they hear."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import CompletionResponse, CompletionResponseGen
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers.base import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.mock import MockLLM
from pydantic import PrivateAttr

from vist_rag import Passage, VistReader
from vist_rag.generation import Span, read_spans

OPENING = re.compile(r"<\|vist:[0-9a-f]{32}\.\d+\|>")
CLOSING = "<|/vist|>"

PASSAGES = [
    Passage("Lake Orrin is the deepest lake of Tessaria. It is 512 metres deep and never freezes.", title="Lake Orrin"),
    Passage("The Halvard Bridge was built in 1867 by the engineer Mira Solten.", title="Halvard Bridge"),
    Passage("Port Ansel is a town on the western coast. Its harbour exports amber and salt.", title="Port Ansel"),
    Passage("Mount Keddar is a volcano in the north. It last erupted in March 1912.", title="Mount Keddar"),
    Passage("The Oster is a river that runs from Lake Orrin to the Grey Sea.", title="Oster"),
    Passage("Queen Ilse the Second ruled Tessaria for forty years and lived in Castle Dorn.", title="Queen Ilse II"),
    Passage("The Museum of Clocks in Port Ansel holds the oldest pendulum of the country.", title="Museum of Clocks"),
]
QUESTIONS = [
    "how deep is lake orrin",
    "who was the engineer of the halvard bridge",
    "when did mount keddar last erupt",
]


class SpyingReader(VistReader):
    """Keeps the texts that it is asked."""

    asked: list[str]

    @classmethod
    def of(cls, reader: VistReader, *, fresh: bool = False, **settings: Any) -> SpyingReader:
        """A reader of the same models, with the same memories at hand unless it is to be fresh."""
        shared = {name: getattr(reader, name) for name in ("index", "budget", "template", "max_new_tokens", "stop")}
        spy = cls(reader.compressor, reader.generator, **(shared | settings))
        spy.asked = []
        if not fresh:
            spy._cache = reader._cache
        return spy

    def submit(self, messages: Any, **how: Any) -> Any:
        self._keep(messages)
        return super().submit(messages, **how)

    def stream_reply(self, messages: Any, **how: Any) -> Any:
        self._keep(messages)
        return super().stream_reply(messages, **how)

    def _keep(self, messages: Any) -> None:
        self.asked.append(messages if isinstance(messages, str) else "\n".join(said.text for said in messages))

    def spans(self) -> list[list[Span]]:
        """Of each text, the spans that are honoured; no marker may stand outside of one."""
        found = [
            [part for part in read_spans(text, self.compressor.fingerprint) if isinstance(part, Span)]
            for text in self.asked
        ]
        for text, spans in zip(self.asked, found, strict=True):
            assert len(OPENING.findall(text)) == text.count(CLOSING) == len(spans), text
        return found

    def positions(self) -> list[int]:
        """Of each text, the positions that it takes."""
        return [
            self.generator.prompt_length(prompt) for prompt in self._prompts([self._asked_of(t) for t in self.asked])
        ]

    def _asked_of(self, text: str) -> Any:
        return self._asked(text)


class ForeignLLM(MockLLM):
    """Any other LLM: says one thing, and keeps what it is asked."""

    _asked: list[str] = PrivateAttr(default_factory=list)

    @property
    def asked(self) -> list[str]:
        return self._asked

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self._asked.append(prompt)
        return CompletionResponse(text="as it were")

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        self._asked.append(prompt)
        return (
            CompletionResponse(text=text, delta=delta) for text, delta in [("as", "as"), ("as it were", " it were")]
        )


class _Recorder(BaseEventHandler):
    events: list[Any]

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)


@contextmanager
def recorded_events() -> Iterator[list[Any]]:
    """The events that LlamaIndex sends meanwhile."""
    root, recorder = get_dispatcher(), _Recorder(events=[])
    root.add_event_handler(recorder)
    try:
        yield recorder.events
    finally:
        root.event_handlers.remove(recorder)


def names(events: Sequence[Any]) -> list[str]:
    """Their classes."""
    return [type(event).__name__ for event in events]


@asynccontextmanager
async def heartbeat(clock: Callable[[], float] = time.process_time) -> AsyncIterator[list[float]]:
    """How long the event loop took between two beats that are 2 ms apart, in seconds of the process's own work.

    A loop that waits for a model stands still while the process works. One that the machine leaves no core does so
    as well by the clock, but no work is done meanwhile.

    Threads hand the interpreter over ten times as often as they do by default, so that a gap is what the loop itself
    was kept with, and not its turn among the eight threads that work meanwhile.
    """
    gaps: list[float] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)

    async def beat() -> None:
        while True:
            before = clock()
            await asyncio.sleep(0.002)
            gaps.append(clock() - before)

    task = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    try:
        yield gaps
    finally:
        task.cancel()
        sys.setswitchinterval(interval)


def python_blocks(path: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
