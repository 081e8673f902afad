"""VistRetriever: an index of vist-rag's own, searched by its own embedder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_vist.llm import VistLLM
from llama_index_vist.nodes import to_node
from vist_rag import PassageIndex, SearchHit


class VistRetriever(BaseRetriever):
    """Finds the passages of an index that ``vist-rag index`` or :class:`vist_rag.PassageIndex` made.

    Args:
        index: The index, or the directory that it lives in, which is opened to be read.
        similarity_top_k: How many nodes; as many as there are where the index has fewer.
        llm: Who will read them. Where given, memories that the index holds are at hand when it reads, and others are
            made now, and kept in the index where it can be written.
        **settings: Of LlamaIndex's own ``BaseRetriever``.
    """

    def __init__(
        self,
        index: PassageIndex | str | Path,
        *,
        similarity_top_k: int = 4,
        llm: VistLLM | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.index = index if isinstance(index, PassageIndex) else PassageIndex.open(index, read_only=True)
        self.similarity_top_k = similarity_top_k
        self.llm = llm

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        top_k = self._top_k
        return self._nodes(self.index.search(query_bundle.query_str, top_k) if top_k else [])

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        top_k = self._top_k
        hits = await self.index.asearch(query_bundle.query_str, top_k) if top_k else []
        if self.llm is None or (await self.llm.areader()).at_hand([hit.passage for hit in hits]):
            return self._nodes(hits)
        return await asyncio.to_thread(self._nodes, hits)

    @property
    def _top_k(self) -> int:
        return min(self.similarity_top_k, len(self.index))

    def _nodes(self, hits: Sequence[SearchHit]) -> list[NodeWithScore]:
        if self.llm is not None:
            self.llm.reader.prepare([hit.passage for hit in hits], index=self.index)
        return [NodeWithScore(node=to_node(hit.passage), score=hit.score) for hit in hits]
