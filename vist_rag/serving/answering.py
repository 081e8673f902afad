"""How a request is answered: a question by the pipeline, a conversation by the reader with passages put into it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar, cast

from vist_rag.budget import Budget, Plan
from vist_rag.generation import Sampling
from vist_rag.pipeline import VistRAG
from vist_rag.quoting import find_span
from vist_rag.reader import Asking, Marked, Reply, Said, Streamed
from vist_rag.serving.limits import Limits
from vist_rag.serving.refusal import Refusal
from vist_rag.serving.schema import ChatRequest
from vist_rag.types import Answer, Citation, Usage

Whole = TypeVar("Whole", Answer, Reply)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in the library's words.

    Attributes:
        question: The last message: it is searched with, and passages are put before it.
        earlier: What was said before it.
        budget: Which passages are read which way.
        how: How it is answered.
    """

    question: str
    earlier: tuple[Said, ...]
    budget: Budget
    how: Asking

    @classmethod
    def of(cls, request: ChatRequest, rag: VistRAG, limits: Limits) -> Asked:
        """Read a request.

        Raises:
            Refusal: If it asks for more than the limits allow.
            ConfigError: If a number is out of range.
        """
        request.check()
        *earlier, last = request.messages
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = cast("int | None", getattr(request, name))
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise Refusal(400, f"{name} must be in 1..{limits.max_tokens}, got {max_tokens}; lower it.", param=name)
        how = Asking(
            max_new_tokens=max_tokens,
            stop=[request.stop] if isinstance(request.stop, str) else request.stop,
            sampling=Sampling(request.temperature or 0.0, request.top_p or 1.0, seed=request.seed),
        )
        said = (Said("system" if m.role == "developer" else m.role, m.text) for m in earlier)
        return cls(last.text, tuple(one for one in said if one.text), _budget(request, rag, limits), how)

    def max_new_tokens(self, rag: VistRAG) -> int:
        """How long the answer may become."""
        return self.how.get("max_new_tokens") or rag.max_new_tokens


def _budget(request: ChatRequest, rag: VistRAG, limits: Limits) -> Budget:
    budget = request.vist_rag.over(rag.budget)
    most = min(limits.max_passages, len(rag.index))
    if request.vist_rag.model_fields_set & {"k_raw", "k_memory"} and budget.top_k > most:
        allowed = f"1..{most} (passages that may be read here)"
        message = f"k_raw + k_memory must be in {allowed}, got {budget.top_k}; lower them."
        raise Refusal(400, message, param="vist_rag")
    return budget


async def answer(rag: VistRAG, asked: Asked) -> Answer:
    """Answer a request whole; what comes at the same time shares a pass. Errors as ``VistRAG.answer``."""
    if not asked.earlier:
        return await rag.aanswer(asked.question, budget=asked.budget, **asked.how)
    conversation = await Conversation.prepare(rag, asked)
    return await conversation.answer(await rag.areply(conversation.messages, **asked.how))


async def stream(rag: VistRAG, asked: Asked) -> AsyncGenerator[str | Answer, None]:
    """Answer a request piece by piece: strings, and the whole at the end. Errors as ``VistRAG.answer``.

    Nothing blocks the event loop; who closes it stops the generation.
    """
    if asked.earlier:
        conversation = await Conversation.prepare(rag, asked)
        reply = rag.stream_reply(conversation.messages, **asked.how)
        async with _closing(reply) as pieces:
            async for piece in pieces:
                yield piece
        yield await conversation.answer(_whole(reply.reply))
    else:
        answer = await asyncio.to_thread(rag.stream, asked.question, budget=asked.budget, **asked.how)
        async with _closing(answer) as pieces:
            async for piece in pieces:
                yield piece
        yield _whole(answer.answer)


def _closing(streamed: Streamed) -> aclosing[AsyncGenerator[str, None]]:
    """The pieces, closed at once by who leaves, and not when garbage is collected: that stops the generation."""
    return aclosing(cast("AsyncGenerator[str, None]", aiter(streamed)))


def _whole(end: Whole | None) -> Whole:
    if end is None:
        raise RuntimeError("the stream ended without an answer")
    return end


@dataclass(frozen=True, slots=True)
class Conversation:
    """A question after other messages, with the passages that were found for it.

    Attributes:
        messages: What the reader reads: passages stand before the question, in the last message.
        marked: How each passage is read, best first.
        plan: The same with the limit, and what a guard left out.
        begin: When it was asked, in seconds of a clock.
    """

    rag: VistRAG
    asked: Asked
    messages: tuple[Said, ...]
    marked: Sequence[Marked]
    plan: Plan
    begin: float

    @classmethod
    async def prepare(cls, rag: VistRAG, asked: Asked) -> Conversation:
        """Search with the question and put the passages before it."""
        begin = time.perf_counter()
        hits = await rag.index.asearch(asked.question, asked.budget.top_k)
        plan = await asyncio.to_thread(rag.plan, hits, asked.budget)
        marked = await asyncio.to_thread(rag.mark, hits, asked.budget)
        last = Said("user", _with_passages(rag, asked.question, marked))
        return cls(rag, asked, (*asked.earlier, last), marked, plan, begin)

    async def answer(self, reply: Reply) -> Answer:
        """What the reader said, with what supports it and what it cost."""
        return await asyncio.to_thread(self._answer, reply)

    def _answer(self, reply: Reply) -> Answer:
        rag, text, origin, taken = self.rag, reply.text, 0, 0
        citations: list[Citation] = []
        for one in self.marked:
            passage, as_text = one.hit.passage, rag.raw_tokens(one.hit.passage)
            origin += as_text
            taken += rag.memory_tokens(passage, one.size) if one.ref else as_text
            span = find_span(text, passage.text)
            citations.append(Citation(passage, one.hit.score, "memory" if one.ref else "raw", span))
        guarded = {one.hit.passage.id: one.reason for one in self.plan.guarded}
        spent = reply.usage
        usage = Usage(origin, taken, spent.prompt_tokens, spent.completion_tokens, self.plan.limit, guarded)
        total_ms = (time.perf_counter() - self.begin) * 1000
        return Answer(self.asked.question, text, tuple(citations), usage, {"total": total_ms})


def _with_passages(rag: VistRAG, question: str, marked: Sequence[Marked]) -> str:
    """As the template builds a prompt: memories first, then passages as text, the best last."""
    template = rag.template
    memories = [one for one in marked if one.ref]
    raw = [one for one in marked if not one.ref]
    shown = "".join(rag.write(one.hit.passage, one.ref) for one in (*reversed(memories), *reversed(raw)))
    return template.instruction + shown + template.question.replace("{question}", question)
