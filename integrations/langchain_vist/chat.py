"""ChatVist: a chat model that reads spans as memory."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr

from vist_rag import ConfigError, InputError, Reply, Said, Sampling, VistReader


class ChatVist(BaseChatModel):
    """A chat model of open weights that reads passages as memory where they come as spans, and as text where not.

    Calls that come at the same time (``batch``, ``abatch``, concurrent ``ainvoke``) share a forward pass; streams do
    not. ``usage_metadata`` tells, in ``input_token_details``, the positions taken by ``memory`` and by ``raw`` text;
    ``response_metadata`` what the memories would have taken as text (``origin_tokens``) and the ``ratio``. A streamed
    answer of an uncased generator, such as the embedded one, stays in lower case; ``invoke`` writes it as the passage
    does.

    Example:
        .. code-block:: python

            chat = ChatVist()  # the embedded model
            retriever = VistRetriever(index=index, llm=chat)
            chain = with_query(retriever) | VIST_PROMPT | chat
            chain.invoke("When was the bridge built?").content

    Raises:
        CheckpointError: At the first call, if the checkpoint cannot be loaded.
    """

    checkpoint: str | None = Field(default=None, alias="model")
    """Directory or hub id of a checkpoint; None: the embedded model."""
    device: str | None = None
    """None: cuda, then mps, then cpu."""
    guard: Literal["off", "on", "strict"] = "on"
    """Passages that memory would misread: ``on``: read as text; ``strict``: never as memory; ``off``: as any other."""
    max_tokens: int | None = None
    """Upper limit of an answer; None: the checkpoint's own."""
    temperature: float = 0.0
    """0: the most likely tokens, always."""
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    """An answer ends before any of these; None: the checkpoint's own."""

    _reader: VistReader | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    model_config = ConfigDict(populate_by_name=True)

    @classmethod
    def from_reader(cls, reader: VistReader, **fields: Any) -> Self:
        """A chat model over weights that are loaded already: a ``VistReader`` or a ``VistRAG``."""
        chat = cls(**fields)
        chat._reader = reader
        return chat

    @property
    def reader(self) -> VistReader:
        """The model behind it, loaded when it is first needed."""
        with self._lock:
            if self._reader is None:
                self._reader = VistReader.from_pretrained(self.checkpoint, device=self.device, guard=self.guard)
            return self._reader

    async def _areader(self) -> VistReader:
        if self._reader is not None:
            return self._reader
        return await run_in_executor(None, lambda: self.reader)

    @property
    def _name(self) -> str:
        return self.checkpoint or "vist-rag/embedded"

    @property
    def _llm_type(self) -> str:
        return "vist-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint, "max_tokens": self.max_tokens, **self._sampling()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="vist-rag",
            ls_model_name=kwargs.get("model") or self._name,
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
        )
        if (limit := kwargs.get("max_tokens", self.max_tokens)) is not None:
            params["ls_max_tokens"] = limit
        if stop := stop or self.stop:
            params["ls_stop"] = stop
        return params

    def _sampling(self, **kwargs: Any) -> dict[str, Any]:
        return {name: kwargs.get(name, getattr(self, name)) for name in ("temperature", "top_p", "top_k", "seed")}

    def _asked(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if (model := kwargs.get("model", self.checkpoint)) != self.checkpoint:
            raise ConfigError(f"model cannot change from call to call, got {model!r}; make another ChatVist for it.")
        return {
            "max_new_tokens": kwargs.get("max_tokens", self.max_tokens),
            "stop": stop or self.stop or None,
            "sampling": Sampling(**self._sampling(**kwargs)),
        }

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(self.reader.reply(said(messages), **self._asked(stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        reader = await self._areader()
        return self._result(await reader.areply(said(messages), **self._asked(stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        stream = self.reader.stream_reply(said(messages), **self._asked(stop, kwargs))
        for piece in stream:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield self._last(stream.reply)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        reader = await self._areader()
        stream = reader.stream_reply(said(messages), **self._asked(stop, kwargs))
        async for piece in stream:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                await run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield self._last(stream.reply)

    def _result(self, reply: Reply) -> ChatResult:
        message = AIMessage(content=reply.text, **_metadata(reply, self._name))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, reply: Reply | None) -> ChatGenerationChunk:
        metadata = {} if reply is None else _metadata(reply, self._name)
        return ChatGenerationChunk(message=AIMessageChunk(content="", chunk_position="last", **metadata))


def find_reader(llm: Any) -> VistReader | None:
    """The reader behind a model, however it is bound; None for a foreign model, or where a fallback is foreign."""
    if isinstance(llm, VistReader):
        return llm
    if isinstance(llm, ChatVist):
        return llm.reader
    if isinstance(llm, RunnableBindingBase):
        return find_reader(llm.bound)
    if isinstance(llm, RunnableSequence):  # model | parser
        return find_reader(llm.first)
    if isinstance(llm, RunnableWithFallbacks):
        readers = list(map(find_reader, llm.runnables))
        return readers[0] if all(readers) else None
    return None


_ROLES: list[tuple[type[BaseMessage], str]] = [
    (SystemMessage, "system"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
    (HumanMessage, "user"),
]


def said(messages: Sequence[BaseMessage]) -> list[Said]:
    """Messages in vist-rag's words.

    Raises:
        InputError: If one holds something else than text, or is of a role that no model takes.
    """
    return [Said(_role(message), _text(message)) for message in messages]  # type: ignore[arg-type]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        role = {"human": "user", "ai": "assistant"}.get(message.role, message.role)
        if role in ("system", "user", "assistant", "tool"):
            return role
        raise InputError(f"A message's role must be system, user, assistant or tool, got {message.role!r}; change it.")
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise InputError(f"Messages must be of the system, user, assistant or a tool, got {type(message).__name__}.")


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    kinds = {"text" if isinstance(block, str) else str(block.get("type")) for block in message.content}
    if not isinstance(message, AIMessage) and (other := kinds - {"text"}):
        raise InputError(f"Messages must hold text, got {', '.join(sorted(other))}; this model reads nothing else.")
    return str(message.text)


def _metadata(reply: Reply, model_name: str) -> dict[str, Any]:
    usage = reply.usage
    tokens = UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        # The framework's own breakdown; it allows keys of a provider's.
        input_token_details={  # type: ignore[typeddict-unknown-key]
            "memory": usage.compressed_tokens,
            "raw": usage.prompt_tokens - usage.compressed_tokens,
        },
    )
    saved = {
        "origin_tokens": usage.origin_tokens,
        "compressed_tokens": usage.compressed_tokens,
        "ratio": usage.ratio,
    }
    return {
        "usage_metadata": tokens,
        "response_metadata": {"model_provider": "vist-rag", "model_name": model_name, **saved},
    }
