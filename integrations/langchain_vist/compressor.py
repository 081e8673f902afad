"""VistDocumentCompressor: documents that a ``ChatVist`` reads as memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, PrivateAttr

from langchain_vist.chat import find_reader
from langchain_vist.documents import marked, plain, to_passage
from vist_rag import Budget, InputError, Passage, PassageIndex, SearchHit


class VistDocumentCompressor(BaseDocumentCompressor, RunnableSerializable[Any, Any]):
    """Decides which documents are read as memory and says so in their metadata; their text stays as it is.

    Works in a ``ContextualCompressionRetriever`` and in a pipe, on a list of documents (``retriever | compressor``) or
    on what ``with_query`` gives (``with_query(retriever) | compressor | VIST_PROMPT | chat``). Ids, metadata and order
    are kept, and what it is given is copied. ``vist_latents`` in the metadata is the number of positions that a
    document takes.
    """

    llm: Any
    """The model that will read: a ``ChatVist``, however bound. Any other gets readable text, and a warning says so."""
    budget: Budget | None = None
    """How many documents are read which way; those beyond are left out. None: all, as the checkpoint has it."""
    index: PassageIndex | None = None
    """Where their memories may be stored."""
    best_last: bool = False
    """Whether the best document comes last, next to the question, as in ``VistRAG``; for memory only."""

    _warned: bool = PrivateAttr(default=False)
    _loaded: bool = PrivateAttr(default=False)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def compress_documents(
        self, documents: Sequence[Document], query: str = "", callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Mark documents.

        Args:
            documents: Best first.
            query: Not used: a memory does not depend on what is asked.
            callbacks: Not used.
        Raises:
            ConfigError: If not even the best document fits the budget's ``tokens``.
        """
        reader = find_reader(self.llm)
        if reader is None:
            self._warn()
            return [plain(document) for document in documents]
        passages = list(map(_passage, documents))
        hits = [
            SearchHit(passage, _score(doc), rank)
            for rank, (passage, doc) in enumerate(zip(passages, documents, strict=True))
        ]
        read = [marked(documents[mark.hit.rank], mark) for mark in reader.mark(hits, self.budget, index=self.index)]
        return read[::-1] if self.best_last else read

    async def acompress_documents(
        self, documents: Sequence[Document], query: str = "", callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As :meth:`compress_documents`; the event loop is free while memories are made."""
        if not self._loaded:
            await run_in_executor(None, find_reader, self.llm)
            self._loaded = True
        reader = find_reader(self.llm)
        if reader is None or reader.at_hand(list(map(_passage, documents))):
            return self.compress_documents(documents, query)
        return await run_in_executor(None, self.compress_documents, documents, query)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.llm).__name__} cannot read memory: it is given the text of all documents, which are not "
                "shortened; use ChatVist to read them as memory.",
                stacklevel=3,
            )

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """A list of documents -> a list; ``{"query", "documents"}`` -> the same with these documents.

        Raises:
            InputError: If it is something else.
        """
        documents, answer = _given(input)
        return self._call_with_config(lambda _: answer(self.compress_documents(documents)), input, config)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As :meth:`invoke`; the event loop is free meanwhile."""
        documents, answer = _given(input)

        async def run(_: Any) -> Any:
            return answer(await self.acompress_documents(documents))

        return await self._acall_with_config(run, input, config)


def _given(given: Any) -> tuple[Sequence[Document], Callable[[list[Document]], Any]]:
    """The documents in what a pipe gives, and how to give them back."""
    if isinstance(given, dict) and "documents" in given:
        return given["documents"], lambda documents: {**given, "documents": documents}
    if isinstance(given, Sequence) and all(isinstance(document, Document) for document in given):
        return given, lambda documents: documents
    raise InputError(
        f"A VistDocumentCompressor must be given documents, or a dict with 'documents', got {type(given).__name__}; "
        "put with_query(retriever) before it."
    )


def _passage(document: Document) -> Passage:
    return to_passage(document.page_content, document.id, document.metadata)


def _score(document: Document) -> float:
    score = document.metadata.get("score", document.metadata.get("relevance_score", 0.0))
    return float(score) if isinstance(score, (int, float)) else 0.0
