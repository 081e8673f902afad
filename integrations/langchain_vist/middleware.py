"""VistContextMiddleware: an agent whose model reads what was retrieved as memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.documents import Document
from langchain_core.messages import AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import run_in_executor

from langchain_vist.chat import find_reader
from langchain_vist.compressor import VistDocumentCompressor
from langchain_vist.prompts import VIST_PROMPT, context
from vist_rag import Budget, PassageIndex


class VistContextMiddleware(AgentMiddleware[Any, Any]):
    """Puts documents into the prompt of an agent's model, as memory if the model can read it and as text if not.

    Only what the model is asked is changed, never the state: a checkpointer keeps plain conversations.

    Args:
        retriever: What is found for the last message of the user stands before it. None: nothing is searched.
        budget: How many documents are read which way, as of ``VistDocumentCompressor``.
        index: Where their memories may be stored.

    What tools found is read as memory too: a tool message whose ``artifact`` is a list of documents
    (``create_retriever_tool(..., response_format="content_and_artifact")``).
    """

    def __init__(
        self,
        retriever: Runnable[str, list[Document]] | None = None,
        *,
        budget: Budget | None = None,
        index: PassageIndex | None = None,
    ) -> None:
        super().__init__()
        self.retriever = retriever
        self.budget = budget
        self.index = index
        self._compressor: VistDocumentCompressor | None = None

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Ask the model with what was found."""
        return handler(self._with_context(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """As :meth:`wrap_model_call`; the event loop is free meanwhile."""
        return await handler(await run_in_executor(None, self._with_context, request))

    def _with_context(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        compressor = self._for(request.model)
        messages = list(request.messages)
        if find_reader(request.model) is not None:
            messages = [_read(message, compressor) for message in messages]
        last = next((i for i in reversed(range(len(messages))) if isinstance(messages[i], HumanMessage)), None)
        if self.retriever is not None and last is not None:
            query = str(messages[last].text)
            documents = compressor.compress_documents(self.retriever.invoke(query))
            asked = VIST_PROMPT.invoke({"query": query, "documents": documents}).to_string()
            messages[last] = messages[last].model_copy(update={"content": _with_text(messages[last].content, asked)})
        return request.override(messages=messages)

    def _for(self, model: Any) -> VistDocumentCompressor:
        """The compressor for a model, kept while the model stays, so that a foreign one is warned about once."""
        if self._compressor is None or self._compressor.llm is not model:
            self._compressor = VistDocumentCompressor(llm=model, budget=self.budget, index=self.index, best_last=True)
        return self._compressor


def _read(message: AnyMessage, compressor: VistDocumentCompressor) -> AnyMessage:
    documents = _documents(message.artifact) if isinstance(message, ToolMessage) else []
    if not documents:
        return message
    return message.model_copy(update={"content": context(compressor.compress_documents(documents))})


def _with_text(content: str | list[Any], text: str) -> str | list[Any]:
    """Content of a message with another text; pictures and the like, which other models read, stay."""
    if isinstance(content, str):
        return text
    others = [block for block in content if isinstance(block, dict) and block.get("type") != "text"]
    return [{"type": "text", "text": text}, *others]


def _documents(artifact: Any) -> list[Document]:
    """The documents of an artifact; none where it is something else. A checkpoint brings them back as dicts."""
    found = artifact if isinstance(artifact, list) else []
    if not all(isinstance(one, Document) or (isinstance(one, dict) and "page_content" in one) for one in found):
        return []
    return [one if isinstance(one, Document) else Document.model_validate(one) for one in found]
