"""VistLLM: a reader as LlamaIndex's LLM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, Literal, Self

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen

from llama_index_vist.replies import agrow, chat_response, completion, grow, said
from vist_rag import ConfigError, Sampling, VistReader

DEFAULT_CONTEXT_WINDOW = 4096
"""Where neither the user nor the model says."""

_PER_CALL = ("max_tokens", "stop", "temperature", "top_p", "top_k", "seed")


class VistLLM(CustomLLM):
    """Answers prompts whose passages may come as spans, which it reads as memory.

    The weights are loaded when they are first needed, once, also where threads and event loops ask at the same time.
    Calls that come at the same time share a forward pass; streams do not.

    A stream's last response has the joined pieces as its text. A reply that is not streamed may differ in case: an
    uncased generator's answer is written as the passages write it, which is known only when it is complete.

    Attributes:
        checkpoint: Local directory or hub id; None means the embedded model.
        device: None means cuda, then mps, then cpu.
        guard: Of passages that memory would misread. ``on``: read as text; ``strict``: never as memory; ``off``: as is.
        max_tokens: Upper limit of an answer; None: the checkpoint's own.
        temperature: 0: the most likely token, always.
        top_p: Of the most likely tokens, those that have this share together.
        top_k: Of the most likely tokens, so many; None: all.
        seed: Of the sampling; None draws one.
        stop: An answer ends before any of these strings; None: the checkpoint's own.
        context_window: Positions of prompt and answer; None: the generator's own.
    """

    checkpoint: str | None = Field(default=None, description="Directory or hub id; None: the embedded model.")
    device: str | None = Field(default=None, description="None: cuda, then mps, then cpu.")
    guard: Literal["off", "on", "strict"] = Field(default="on", description="Of passages that memory would misread.")
    max_tokens: int | None = Field(default=None, description="Upper limit of an answer; None: the checkpoint's.")
    temperature: float = Field(default=0.0, description="0: the most likely token, always.")
    top_p: float = Field(default=1.0, description="Of the most likely tokens, those that have this share together.")
    top_k: int | None = Field(default=None, description="Of the most likely tokens, so many; None: all.")
    seed: int | None = Field(default=None, description="Of the sampling; None draws one.")
    stop: list[str] | None = Field(default=None, description="Strings that end an answer; None: the checkpoint's.")
    context_window: int | None = Field(default=None, description="Positions; None: the generator's own.")

    _reader: VistReader | None = PrivateAttr(default=None)
    _loading: Any = PrivateAttr(default_factory=threading.Lock)

    @classmethod
    def from_reader(cls, reader: VistReader, **fields: Any) -> Self:
        """An LLM over a reader that is loaded already; weights, index and memories are shared with it."""
        llm = cls(**fields)
        llm._reader = reader
        return llm

    @classmethod
    def class_name(cls) -> str:
        """The name in LlamaIndex's records."""
        return "VistLLM"

    def __deepcopy__(self, memo: Any = None) -> Self:
        return self.__copy__()  # weights, and the lock that guards their loading, are shared by all copies

    @property
    def reader(self) -> VistReader:
        """What reads and answers; loaded now, where it has not been needed before."""
        with self._loading:
            if self._reader is None:
                self._reader = VistReader.from_pretrained(self.checkpoint, device=self.device, guard=self.guard)
            return self._reader

    async def areader(self) -> VistReader:
        """As :attr:`reader`; the event loop is free while it loads."""
        return await asyncio.to_thread(lambda: self.reader) if self._reader is None else self._reader

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex wants to know of a model; loads it."""
        generator = self.reader.generator
        return LLMMetadata(
            context_window=self.context_window or generator.context_tokens or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens or self.reader.max_new_tokens,
            is_chat_model=bool(getattr(generator.tokenizer, "chat_template", None)),
            model_name=self._name,
        )

    @property
    def _name(self) -> str:
        return self.checkpoint or "vist-rag"

    def to_payload(self) -> dict[str, Any]:
        """What events tell of this LLM. Unlike ``metadata`` it loads nothing: events are sent from event loops."""
        return {"class_name": self.class_name(), "model_name": self._name, "max_tokens": self.max_tokens}

    # ----------------------------------------------------------------------------------------------------- answering

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt.

        Args:
            prompt: Text that may hold spans.
            formatted: Whether ``completion_to_prompt`` has been applied.
            **kwargs: ``max_tokens``, ``stop``, ``temperature``, ``top_p``, ``top_k`` and ``seed`` of this call.
        Raises:
            InputError: If there is nothing to read, or it does not fit the generator's context.
            ConfigError: If an argument is unknown or out of range.
        """
        return completion(self.reader.reply(self._prompt(prompt, formatted), **self._how(kwargs)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As :meth:`complete`; the event loop is free meanwhile."""
        reader = await self.areader()
        return completion(await reader.areply(self._prompt(prompt, formatted), **self._how(kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """As :meth:`complete`, piece by piece."""
        stream = self.reader.stream_reply(self._prompt(prompt, formatted), **self._how(kwargs))
        return (grown.completion() for grown in grow(stream))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As :meth:`stream_complete`; the event loop is free meanwhile."""
        reader = await self.areader()
        stream = reader.stream_reply(self._prompt(prompt, formatted), **self._how(kwargs))
        return (grown.completion() async for grown in agrow(stream))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; arguments and errors as :meth:`complete`, and InputError if a message is not text."""
        return chat_response(self.reader.reply(said(messages), **self._how(kwargs)))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As :meth:`chat`; the event loop is free meanwhile."""
        reader = await self.areader()
        return chat_response(await reader.areply(said(messages), **self._how(kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """As :meth:`chat`, piece by piece."""
        stream = self.reader.stream_reply(said(messages), **self._how(kwargs))
        return (grown.message() for grown in grow(stream))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As :meth:`stream_chat`; the event loop is free meanwhile."""
        reader = await self.areader()
        stream = reader.stream_reply(said(messages), **self._how(kwargs))
        return (grown.message() async for grown in agrow(stream))

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """As LlamaIndex's own, which asks for ``metadata`` in the event loop: the model is loaded before."""
        await self.areader()
        return str(await super().apredict(prompt, **prompt_args))

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """As LlamaIndex's own, which asks for ``metadata`` in the event loop: the model is loaded before."""
        await self.areader()
        return await super().astream(prompt, **prompt_args)

    def _prompt(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)

    def _how(self, given: dict[str, Any]) -> dict[str, Any]:
        """The fields, and what a call says otherwise, as a reader's arguments."""
        if unknown := sorted(set(given) - set(_PER_CALL)):
            raise ConfigError(f"A call knows {', '.join(_PER_CALL)}, got {', '.join(unknown)}; leave these out.")
        asked = {name: getattr(self, name) if given.get(name) is None else given[name] for name in _PER_CALL}
        limit, stop = asked.pop("max_tokens"), asked.pop("stop")
        return {
            "max_new_tokens": limit,
            "stop": [stop] if isinstance(stop, str) else stop,
            "sampling": Sampling(**asked),
        }
