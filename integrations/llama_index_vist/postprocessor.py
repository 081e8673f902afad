"""VistPostprocessor: has retrieved nodes read as memory."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr, SerializeAsAny
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms.llm import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from llama_index_vist.llm import VistLLM
from llama_index_vist.nodes import is_text, to_passage
from llama_index_vist.templates import as_before, written
from vist_rag import Budget, SearchHit

_dispatcher = get_dispatcher(__name__)


class VistPostprocessor(BaseNodePostprocessor):
    """Decides which nodes are read as text and which as memory, and sets their templates accordingly.

    Nodes come best first, as retrievers and rerankers give them. What is returned are copies with the same text, score
    and metadata; in a prompt each stands as the reader writes it. With an LLM that is not a :class:`VistLLM` itself,
    also with one inside another, nodes pass as they were, and a warning says so once.

    Attributes:
        llm: Who will read the nodes.
        budget: How many nodes are read which way; those beyond it are left out. None: all are read, in the way of the
            checkpoint.
        best_last: Whether the best node is the last that is returned: in a prompt it then stands next to the question,
            as in :class:`vist_rag.VistRAG`. :class:`~llama_index_vist.VistSynthesizer` sees to that itself.
    """

    llm: SerializeAsAny[LLM] = Field(description="Who will read the nodes.")
    budget: Budget | None = Field(default=None, description="How many nodes are read which way.")
    best_last: bool = Field(default=False, description="Whether the best node is the last.")

    _unwarned: Any = PrivateAttr(default_factory=threading.Lock)

    @classmethod
    def class_name(cls) -> str:
        """The name in LlamaIndex's records."""
        return "VistPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        _dispatcher.event(
            ReRankStartEvent(
                query=query_bundle,
                nodes=nodes,
                top_n=self.budget.top_k if self.budget else len(nodes),
                model_name=self.llm.to_payload().get("model_name") or self.llm.class_name(),
            )
        )
        plain = [NodeWithScore(node=as_before(one.node), score=one.score) for one in nodes]
        if isinstance(self.llm, VistLLM):
            read = self._marked(plain, self.llm)
        else:
            self._warn()
            read = plain
        _dispatcher.event(ReRankEndEvent(nodes=read))
        return read

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if isinstance(self.llm, VistLLM):
            passages = [to_passage(as_before(one.node)) for one in nodes if is_text(one.node)]
            if not (await self.llm.areader()).at_hand(passages):
                return await asyncio.to_thread(self._postprocess_nodes, nodes, query_bundle)
        return self._postprocess_nodes(nodes, query_bundle)

    def _marked(self, nodes: list[NodeWithScore], llm: VistLLM) -> list[NodeWithScore]:
        hits = [
            SearchHit(to_passage(one.node), one.score or 0.0, rank)
            for rank, one in enumerate(nodes)
            if is_text(one.node)
        ]
        marked = {one.hit.rank: one for one in llm.reader.mark(hits, self.budget)}
        read = [
            NodeWithScore(node=written(one.node, marked[rank], llm.reader), score=one.score) if rank in marked else one
            for rank, one in enumerate(nodes)
            if rank in marked or not is_text(one.node)
        ]
        return read[::-1] if self.best_last else read

    def _warn(self) -> None:
        if self._unwarned.acquire(blocking=False):  # taken once, and never given back
            warnings.warn(
                f"llm must be a VistLLM for passages to be read as memory, got {type(self.llm).__name__}; nodes pass "
                "as text. Give VistPostprocessor the VistLLM that answers, or leave it out.",
                stacklevel=3,
            )
