"""VistRetriever: a vist-rag index as a LangChain retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr

from langchain_vist.compressor import VistDocumentCompressor
from langchain_vist.documents import plain, to_document
from vist_rag import Budget, PassageIndex, SearchHit


class VistRetriever(BaseRetriever):
    """Searches an index that ``vist-rag index`` or ``PassageIndex.add`` made; ``score`` in the metadata is the cosine.

    With ``llm`` the documents are ready to be read as memory, stored memories included; without it they are text.
    """

    index: PassageIndex
    k: int = Field(default=4, ge=1)
    """How many documents, up to the size of the index; ``invoke(query, k=3)`` for one call."""
    llm: Any = None
    """The model that will read, as of ``VistDocumentCompressor``."""
    budget: Budget | None = None
    best_last: bool = False

    _compressor: VistDocumentCompressor | None = PrivateAttr(default=None)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def model_post_init(self, context: Any) -> None:
        """Make the compressor that marks what is found."""
        super().model_post_init(context)
        if self.llm is not None:
            self._compressor = VistDocumentCompressor(
                llm=self.llm, budget=self.budget, index=self.index, best_last=self.best_last
            )

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **_: Any
    ) -> list[Document]:
        k = self._top_k(k)
        documents = _found(self.index.search(query, k) if k else [])
        return self._compressor.compress_documents(documents) if self._compressor else list(map(plain, documents))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None, **_: Any
    ) -> list[Document]:
        k = self._top_k(k)
        documents = _found(await self.index.asearch(query, k) if k else [])
        if self._compressor is None:
            return list(map(plain, documents))
        return await self._compressor.acompress_documents(documents)

    def _top_k(self, k: int | None) -> int:
        return min(self.k if k is None else k, len(self.index))


def _found(hits: Sequence[SearchHit]) -> list[Document]:
    return [to_document(hit.passage, score=hit.score) for hit in hits]
