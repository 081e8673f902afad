"""VistReader: compressor and generator as one model that reads conversations with passages in them.

What the LangChain and LlamaIndex doors stand on. A passage comes as a span in the text (``generation/spans.py``); here
its memory is found, or made from the text that is right there, and read in its place. ``VistRAG`` is a reader that
searches.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack

import torch
from torch import Tensor

from vist_rag.batching import MicroBatcher
from vist_rag.budget import Budget, Plan
from vist_rag.checkpoint import SETTINGS_FILE, find_checkpoint, load_compressor, read_settings
from vist_rag.compression import LatentCache, PassageCompressor, VisualMemory
from vist_rag.errors import CheckpointError, ConfigError, StoreError
from vist_rag.fidelity import GUARD_MODES, Fidelity, Guard, GuardMode
from vist_rag.generation import (
    Generation,
    MemorySegment,
    Message,
    Prompt,
    PromptTemplate,
    Sampling,
    Span,
    TextSegment,
    VistGenerator,
    make_ref,
    read_spans,
    write_span,
)
from vist_rag.quoting import as_written
from vist_rag.retrieval import PassageIndex
from vist_rag.types import Passage, SearchHit, Usage

CACHE_BYTES = 256 * 2**20
"""Memories that a reader keeps at hand: about 4,000 passages of the embedded model."""

_QUESTION_TOKENS = 64
"""Of a generator's context, kept for template and question where passages are turned into text."""
_END: Any = object()


class Said(NamedTuple):
    """One message of a conversation; its text may hold spans."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str


@dataclass(frozen=True, slots=True)
class Marked:
    """How a passage is read.

    Attributes:
        hit: The passage, with score and rank.
        ref: Under which it may be read as memory; empty: it is read as text.
        size: Positions that its memory takes; 0: it is read as text.
        reason: Why memory would not have kept it whole; empty: it would, or nobody knows.
    """

    hit: SearchHit
    ref: str
    size: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reader said.

    Attributes:
        text: The answer.
        usage: ``origin_tokens``, ``compressed_tokens`` and ``guarded`` are of the passages that came as spans, text
            around them not counted; ``guarded`` by their references, as a span does not tell its passage's id.
            ``budget`` is None: a limit was met when they were marked.
    """

    text: str
    usage: Usage


class Asking(TypedDict, total=False):
    """How a conversation is answered.

    Attributes:
        max_new_tokens: Upper limit of the answer; None: the reader's own.
        stop: The answer ends before any of these strings; None: the reader's own.
        sampling: None: the most likely tokens.
    """

    max_new_tokens: int | None
    stop: Sequence[str] | None
    sampling: Sampling | None


class How(NamedTuple):
    """An :class:`Asking` with nothing left open."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling

    @property
    def key(self) -> Hashable:
        """Equal for calls that may share a pass. What is sampled is alone: a seed says the same in any company."""
        return object() if self.sampling.temperature else (self.max_new_tokens, self.stop)

    def arguments(self) -> dict[str, Any]:
        """For the generator."""
        processors = self.sampling.processors()
        return {
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop,
            **({"logits_processor": processors} if processors else {}),
        }


class _Asked(NamedTuple):
    messages: tuple[tuple[str, tuple[str | Span, ...]], ...]
    how: How

    @property
    def spans(self) -> list[Span]:
        return [part for _, parts in self.messages for part in parts if isinstance(part, Span)]


class VistReader:
    """Reads conversations whose passages come as text or as memory, and answers.

    Thread-safe. Calls that come at the same time share a forward pass (:class:`~vist_rag.batching.MicroBatcher`).

    Args:
        compressor: Makes the memories that are not at hand.
        generator: Reads and answers. Its fusion must have been trained for this compressor.
        index: Where memories may be stored already; those of its passages are kept there.
        budget: How many passages are read which way.
        template: How passages and question become a prompt.
        max_new_tokens: Upper limit of an answer.
        stop: An answer ends before any of these strings.
        max_batch_size: Calls in one forward pass.
        max_wait_ms: How long an idle reader waits for company of its first call, and of each that comes meanwhile.
        cache_bytes: Memories at hand; those that were read longest ago go first.
        fidelity: What the compressor misreads, where it was measured.
        guard: What is done with passages that memory would not keep whole, by that measure. ``on``: they are read as
            text where the limit has room for it, else as memory; ``strict``: never as memory; ``off``: nothing. Without
            a ``fidelity``, ``on`` does nothing.
    Raises:
        ConfigError: If a number is out of range, the guard is unknown, or is to be strict without a measure.
        CheckpointError: If ``fidelity`` is another compressor's.
    """

    def __init__(
        self,
        compressor: PassageCompressor,
        generator: VistGenerator,
        *,
        index: PassageIndex | None = None,
        budget: Budget | None = None,
        template: PromptTemplate | None = None,
        max_new_tokens: int = 32,
        stop: Sequence[str] = (),
        max_batch_size: int = 16,
        max_wait_ms: float = 2.0,
        cache_bytes: int = CACHE_BYTES,
        fidelity: Fidelity | None = None,
        guard: GuardMode = "on",
    ) -> None:
        if guard not in GUARD_MODES:
            raise ConfigError(f"guard must be one of {', '.join(GUARD_MODES)}, got {guard!r}.")
        if guard == "strict" and fidelity is None:
            raise ConfigError(
                "guard must be on or off where nobody measured what the compressor misreads, got 'strict'; measure: "
                "vist-rag probe CHECKPOINT --data FILES."
            )
        self.compressor = compressor.eval()
        self.generator = generator
        self.index = index
        self.budget = budget or Budget()
        self.template = template or PromptTemplate()
        self.max_new_tokens = max_new_tokens
        self.stop = tuple(stop)
        self.fidelity, self.guard = fidelity, guard
        self._warns: Guard | None = None
        if fidelity is not None and guard != "off":
            fidelity.check(self.compressor.fingerprint)
            self._warns = Guard(fidelity)
        self._cache = LatentCache(cache_bytes)
        self._batcher = MicroBatcher(self._serve, max_batch_size=max_batch_size, max_wait_ms=max_wait_ms)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        *,
        index: PassageIndex | None = None,
        budget: Budget | None = None,
        device: str | None = None,
        guard: GuardMode = "on",
        generator: VistGenerator | None = None,
        quantize: str | None = None,
    ) -> Self:
        """Load compressor, generator and fusion from one directory.

        Args:
            checkpoint: Local directory with ``compressor/``, ``generator/``, ``fusion/`` and ``vist.json``, or a hub id
                of such a directory; None means the embedded model. Pretrained models that it refers to are loaded from
                where they are.
            index: Where passages and their memories are.
            budget: None means the checkpoint's own.
            device: None means cuda, then mps, then cpu.
            guard: As above; what the compressor misreads stands in ``compressor/fidelity.json``.
            generator: In the place of the checkpoint's, such as a ``RemoteGenerator`` with the same fusion.
            quantize: ``"4bit"``: the generator's layers in 4 bits (extra ``bnb``).
        Raises:
            CheckpointError: If something is missing or cannot be read, or a model that is referred to was changed.
            ConfigError: If the guard is to be strict, and the checkpoint has no such file; if ``quantize`` cannot be.
            MissingDependencyError: If the generator has a LoRA adapter and peft is not installed, or if ``quantize`` is
                set and bitsandbytes is not.
        """
        directory = find_checkpoint(checkpoint)
        settings = read_settings(directory)
        try:
            own, template = Budget(**settings.get("budget", {})), PromptTemplate(**settings.get("template", {}))
        except (TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{directory / SETTINGS_FILE} is not of this version ({error}); restore it."
            ) from error
        compressor = load_compressor(directory, device=device)
        fidelity = None if guard == "off" else Fidelity.load(directory / "compressor", compressor.fingerprint)
        return cls(
            index=index,
            compressor=compressor,
            generator=generator
            or VistGenerator.from_pretrained(
                directory / "generator", fusion=directory / "fusion", device=device, quantize=quantize
            ),
            budget=budget or own,
            template=template,
            max_new_tokens=settings.get("max_new_tokens", 32),
            stop=settings.get("stop", ()),
            fidelity=fidelity,
            guard=guard,
        )

    # ------------------------------------------------------------------------------------------------------ planning

    def plan(self, hits: Sequence[SearchHit], budget: Budget | None = None) -> Plan:
        """How each hit is read."""
        budget = budget or self.budget
        plan, context = self._split(hits, budget), self.generator.context_tokens
        if plan.guarded and plan.limit is None and context is not None:
            room = context - self.max_new_tokens - _QUESTION_TOKENS
            read = zip(plan.compressed, plan.latents, strict=True)
            taken = sum(self.raw_tokens(hit.passage) for hit in plan.raw)
            if taken + sum(self.memory_tokens(hit.passage, n) for hit, n in read) > room > 0:
                # Text that the guard asks for must not overflow the context, which memory would have fitted.
                plan = replace(self._split(hits, replace(budget, tokens=room)), limit=None)
        return plan

    def _split(self, hits: Sequence[SearchHit], budget: Budget) -> Plan:
        return budget.split(
            hits,
            raw_tokens=self.raw_tokens,
            memory_tokens=self.memory_tokens,
            guard=lambda passage: self._reason(passage.content),
            strict=self.guard == "strict",
        )

    def _reason(self, content: str) -> str | None:
        return self._warns(content) if self._warns is not None else None

    def raw_tokens(self, passage: Passage) -> int:
        """Tokens that a passage takes as text."""
        return self.generator.count_tokens(self.template.raw_text(passage))

    def memory_tokens(self, passage: Passage, latents: int | None) -> int:
        """Positions that a passage takes as memory, known before it is encoded."""
        return self._frame_tokens + self._size(passage.content, latents)

    @property
    def _frame_tokens(self) -> int:
        """Positions around each memory."""
        return self.generator.count_tokens(self.template.memory) + self.generator.fusion.boundary_tokens

    def _size(self, content: str, latents: int | None) -> int:
        held = self._held(content)
        n: int = self.compressor.count_latents(content) if held is None else len(held)
        return n if latents is None else min(n, latents)

    def mark(
        self, hits: Sequence[SearchHit], budget: Budget | None = None, *, index: PassageIndex | None = None
    ) -> list[Marked]:
        """Decide how each hit is read, and give those that are read as memory their reference.

        Args:
            hits: Best first.
            budget: What is beyond its limits is left out. None: every hit is read, in the way of the reader's own
                budget.
            index: Where their memories may be stored; None: the reader's own.
        Returns:
            What is read, best first; a passage that a strict guard leaves out is not among it.
        Raises:
            ConfigError: If not even the best hit fits the budget's limit.
        """
        if budget is None:
            budget = replace(self.budget, k_memory=max(1, len(hits) - self.budget.k_raw), tokens=None, rate=None)
        plan = self.plan(hits, budget)
        reasons = {one.hit.rank: one.reason for one in plan.guarded}
        marked = [Marked(hit, "", 0, reasons.get(hit.rank, "")) for hit in plan.raw]
        for hit, latents in zip(plan.compressed, plan.latents, strict=True):
            size = self._size(hit.passage.content, latents)
            ref = make_ref(hit.passage.content, self.compressor.fingerprint, size)
            marked.append(Marked(hit, ref, size, reasons.get(hit.rank, "")))
        marked.sort(key=lambda one: one.hit.rank)
        if (index or self.index) is not None:  # else they are made when they are read, many at a time
            self.prepare([one.hit.passage for one in marked if one.ref], index=index)
        return marked

    def write(self, passage: Passage, ref: str) -> str:
        """A passage as it stands in a prompt: as a span where it has a reference, else as text."""
        if not ref:
            return self.template.raw_text(passage)
        return self.template.memory + write_span(passage.content, ref)

    # ------------------------------------------------------------------------------------------------------ memories

    def at_hand(self, passages: Sequence[Passage]) -> bool:
        """Whether all memories are: then :meth:`mark` takes no time, and may be called in an event loop."""
        return all(self._held(passage.content) is not None for passage in passages)

    def prepare(
        self,
        passages: Sequence[Passage],
        *,
        index: PassageIndex | None = None,
        keep: bool = False,
        only_stored: bool = True,
    ) -> None:
        """Have the memories of passages at hand: from an index, else encoded now, and kept in the index.

        Args:
            passages: What will be read.
            index: Where their memories may be stored; None: the reader's own.
            keep: Whether those that are at hand already are kept in the index, too.
            only_stored: Whether memories are kept only of texts that are passages of the index. False: also of passages
                that another database holds.
        """
        texts = [passage.content for passage in passages]
        self._latents(texts, index or self.index, keep=keep, only_stored=only_stored)

    def _latents(
        self, texts: Iterable[str], index: PassageIndex | None, *, keep: bool = False, only_stored: bool = True
    ) -> dict[str, Tensor]:
        """Latents of texts, float16 ``[n, d]``: at hand, else from the index, else encoded now and kept there."""
        texts = list(dict.fromkeys(texts))
        found = {} if keep else self._all_held(texts)
        if index is not None and (missing := [text for text in texts if text not in found]):
            for text, latents in index.memories(missing, self.compressor.fingerprint).items():
                found[text] = self._hold(text, torch.from_numpy(latents))
        if missing := [text for text in texts if text not in found]:
            made = self._encode(missing)
            if index is not None and not index.read_only:
                kept = {text: latents.numpy() for text, latents in made.items()}
                try:
                    index.put_memories(
                        kept, self.compressor.fingerprint, form=self.compressor.memory_form, only_stored=only_stored
                    )
                except StoreError as error:
                    if keep:
                        raise
                    warnings.warn(f"Memories were made and could not be kept. {error}", stacklevel=2)
            found |= made
        return found

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found = self._all_held(texts)  # looked up once more: another thread may have been faster
        if missing := [text for text in texts if text not in found]:
            for text, memory in zip(missing, self.compressor.encode(missing), strict=True):
                found[text] = self._hold(text, memory.latents.to(torch.float16))
        return found

    def _memories(self, spans: Sequence[Span]) -> dict[Span, VisualMemory]:
        read = self._latents([span.text for span in spans], self.index)
        return {span: self.compressor.memory(read[span.text].float()).coarsen(span.size) for span in spans}

    def _all_held(self, texts: Iterable[str]) -> dict[str, Tensor]:
        return {text: latents for text in texts if (latents := self._held(text)) is not None}

    def _hold(self, text: str, latents: Tensor) -> Tensor:
        self._cache.put(self._key(text), latents)
        return latents

    def _held(self, text: str) -> Tensor | None:
        return self._cache.get(self._key(text))

    def _key(self, text: str) -> bytes:
        content = f"{self.compressor.fingerprint}\x00{text}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(content).digest()

    # ----------------------------------------------------------------------------------------------------- answering

    def reply(self, messages: str | Sequence[Said], **how: Unpack[Asking]) -> Reply:
        """Answer a conversation.

        Args:
            messages: What was said, spans included; a string is one message of the user.
            **how: See :class:`Asking`.
        Raises:
            InputError: If there is nothing to read, it does not fit the generator's context, or its chat template
                refuses the messages.
            ConfigError: If a number is out of range.
            IncompatibleMemoryError: If the generator's fusion was trained for another compressor.
        """
        return self.submit(messages, **how).result()

    async def areply(self, messages: str | Sequence[Said], **how: Unpack[Asking]) -> Reply:
        """As :meth:`reply`; the event loop is free meanwhile."""
        return await asyncio.wrap_future(self.submit(messages, **how))

    def submit(self, messages: str | Sequence[Said], **how: Unpack[Asking]) -> Future[Reply]:
        """As :meth:`reply`, without waiting."""
        asked = self._asked(messages, **how)
        return self._batcher.submit(asked, asked.how.key)

    def stream_reply(self, messages: str | Sequence[Said], **how: Unpack[Asking]) -> ReplyStream:
        """As :meth:`reply`, piece by piece; a pass of its own. The stream is an iterator, also an asynchronous one."""
        return ReplyStream(self, self._asked(messages, **how))

    def _asked(self, messages: str | Sequence[Said], **how: Unpack[Asking]) -> _Asked:
        said = [Said("user", messages)] if isinstance(messages, str) else messages
        return _Asked(tuple((role, self._parts(text)) for role, text in said), self._how(**how))

    def _how(self, **how: Unpack[Asking]) -> How:
        limit, stop = how.get("max_new_tokens"), how.get("stop")
        return How(
            self.max_new_tokens if limit is None else limit,
            self.stop if stop is None else tuple(stop),
            how.get("sampling") or Sampling(),
        )

    def _parts(self, text: str) -> tuple[str | Span, ...]:
        """Text and spans; a span that a strict guard objects to is text, whoever wrote it."""
        parts = read_spans(text, self.compressor.fingerprint)
        if self.guard != "strict":
            return tuple(parts)
        return tuple(part.text if isinstance(part, Span) and self._reason(part.text) else part for part in parts)

    def _serve(self, requests: Sequence[_Asked]) -> list[Reply]:
        prompts, first = self._prompts(requests), requests[0]
        generations = self.generator.generate(prompts, batch_size=len(prompts), **first.how.arguments())
        return [self._reply(*one) for one in zip(requests, generations, strict=True)]

    def _prompts(self, requests: Sequence[_Asked]) -> list[Prompt]:
        memories = self._memories([span for asked in requests for span in asked.spans])

        def segment(part: str | Span) -> TextSegment | MemorySegment:
            return MemorySegment(memories[part]) if isinstance(part, Span) else TextSegment(part)

        return [
            self.generator.converse([Message(role, tuple(map(segment, parts))) for role, parts in asked.messages])
            for asked in requests
        ]

    def _reply(self, asked: _Asked, generation: Generation) -> Reply:
        origin = sum(self.generator.count_tokens(span.text) for span in asked.spans)
        taken = sum(span.size + self.generator.fusion.boundary_tokens for span in asked.spans)
        reasons = {
            make_ref(span.text, self.compressor.fingerprint, span.size): reason
            for span in asked.spans
            if (reason := self._reason(span.text)) is not None
        }
        usage = Usage(origin, taken, generation.prompt_tokens, generation.completion_tokens, guarded=reasons)
        texts = [part if isinstance(part, str) else part.text for _, parts in asked.messages for part in parts]
        # The passages first, and of these the best, which stands last.
        sources = [span.text for span in reversed(asked.spans)] + texts
        return Reply(as_written(generation.text, sources), usage)


class Streamed(ABC):
    """Text that comes piece by piece, as an iterator, also an asynchronous one; who stops listening stops it."""

    @abstractmethod
    def __iter__(self) -> Generator[str, None, None]:
        """The pieces, in this thread."""

    async def __aiter__(self) -> AsyncIterator[str]:
        """The pieces, made in a thread of their own."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Any]()
        left = threading.Event()

        def give(item: Any) -> None:
            if not left.is_set():
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        def run() -> None:
            source = iter(self)
            try:
                for piece in source:
                    if left.is_set():
                        break
                    give(piece)
                give(_END)
            except BaseException as error:
                give(error)
            finally:
                source.close()

        threading.Thread(target=run, name="vist-stream").start()
        try:
            while (piece := await pieces.get()) is not _END:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()


class ReplyStream(Streamed):
    """The pieces of a reply; after the last piece, ``reply`` is the whole."""

    def __init__(self, reader: VistReader, asked: _Asked) -> None:
        self.reply: Reply | None = None
        self._reader, self._asked = reader, asked

    def __iter__(self) -> Generator[str, None, None]:
        reader, asked = self._reader, self._asked
        (prompt,) = reader._prompts([asked])
        generation = yield from reader.generator.stream(prompt, **asked.how.arguments())
        self.reply = reader._reply(asked, generation)
