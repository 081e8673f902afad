"""What LlamaIndex says, in the words of a reader, and what a reader says, in the words of LlamaIndex."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, Literal, NamedTuple

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole, TextBlock

from vist_rag import InputError, Reply, Said

_ROLES: dict[MessageRole, Literal["system", "user", "assistant", "tool"]] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
    MessageRole.TOOL: "tool",
}


class Grown(NamedTuple):
    """A reply on its way."""

    text: str
    delta: str
    usage: dict[str, Any]

    def completion(self) -> CompletionResponse:
        """As a completion."""
        return CompletionResponse(text=self.text, delta=self.delta, raw=_raw(self.usage), additional_kwargs=self.usage)

    def message(self) -> ChatResponse:
        """As a message."""
        message = ChatMessage(role=MessageRole.ASSISTANT, content=self.text)
        return ChatResponse(message=message, delta=self.delta, raw=_raw(self.usage), additional_kwargs=self.usage)


def said(messages: Sequence[ChatMessage]) -> list[Said]:
    """A conversation as a reader takes it.

    Raises:
        InputError: If a message holds something other than text.
    """
    for i, message in enumerate(messages):
        for block in message.blocks:
            if not isinstance(block, TextBlock):
                raise InputError(
                    f"messages must hold text only, got a {type(block).__name__} in message {i}; leave it out, or say "
                    "in words what it shows."
                )
    return [Said(_ROLES[message.role], message.content or "") for message in messages]


def completion(reply: Reply) -> CompletionResponse:
    """A reply as a completion, with what it cost."""
    usage = usage_of(reply)
    return CompletionResponse(text=reply.text, raw=_raw(usage), additional_kwargs=usage)


def chat_response(reply: Reply) -> ChatResponse:
    """A reply as a message, with what it cost."""
    usage, message = usage_of(reply), ChatMessage(role=MessageRole.ASSISTANT, content=reply.text)
    return ChatResponse(message=message, raw=_raw(usage), additional_kwargs=usage)


def grow(stream: Any) -> Generator[Grown, None, None]:
    """The pieces of a stream of a reader's, then once more the whole of them, with what it cost."""
    text = ""
    with closing(iter(stream)) as pieces:
        for piece in pieces:
            text += piece
            yield Grown(text, piece, {})
    yield Grown(text, "", usage_of(stream.reply))


async def agrow(stream: Any) -> AsyncGenerator[Grown, None]:
    """As :func:`grow`; the event loop is free meanwhile."""
    text = ""
    async with aclosing(aiter(stream)) as pieces:
        async for piece in pieces:
            text += piece
            yield Grown(text, piece, {})
    yield Grown(text, "", usage_of(stream.reply))


def usage_of(reply: Reply) -> dict[str, Any]:
    """What a reply cost, under the names that LlamaIndex's own counters look for, and ours."""
    usage = reply.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "origin_tokens": usage.origin_tokens,
        "compressed_tokens": usage.compressed_tokens,
        "ratio": usage.ratio,
    }


def _raw(usage: dict[str, Any]) -> dict[str, Any] | None:
    return {"usage": dict(usage)} if usage else None
