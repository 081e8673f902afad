"""VistVectorStore: a PassageIndex as LlamaIndex's vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)

from llama_index_vist.filters import matches
from llama_index_vist.llm import VistLLM
from llama_index_vist.nodes import to_node, to_stored
from vist_rag import ConfigError, GivenVectors, InputError, Passage, PassageIndex

_MMR_PREFETCH_FACTOR = 4.0


class VistVectorStore(BasePydanticVectorStore):
    """Nodes with their embeddings and, where wanted, their memories, in a directory that survives the process.

    What is added is on disk when ``add`` returns; there is nothing to persist.

    Args:
        directory: Where the nodes live; made where it is missing.
        index: An index that is open, in the place of a directory.
        llm: Who will read the nodes. Where given, their memories are made when they are added, kept beside them, and at
            hand when they are found.
    Raises:
        ConfigError: If there is not one of directory and index.
        StoreError: If the directory cannot be opened, or its passages were embedded by vist-rag itself.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    directory: str | None = Field(default=None, description="Where the nodes live.")
    llm: VistLLM | None = Field(default=None, exclude=True, description="Whose memories are made ahead.")

    _index: PassageIndex = PrivateAttr()

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        index: PassageIndex | None = None,
        llm: VistLLM | None = None,
        **fields: Any,
    ) -> None:
        if (directory is None) == (index is None):
            raise ConfigError(f"Give one of directory and index, got {directory!r} and {index!r}.")
        fields |= {"directory": None if directory is None else str(directory), "llm": llm}
        super().__init__(**fields)
        self._index = index or PassageIndex.open(str(directory), embedder=GivenVectors("llama-index"))

    @classmethod
    def class_name(cls) -> str:
        """The name in LlamaIndex's records."""
        return "VistVectorStore"

    @property
    def client(self) -> PassageIndex:
        """The index."""
        return self._index

    # ------------------------------------------------------------------------------------------------------- writing

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes; one with a known id replaces the former.

        Returns:
            Their ids.
        Raises:
            InputError: If a node has no embedding.
            ShapeError: If embeddings are not finite, or not of the length of those stored.
        """
        for node in nodes:
            if node.embedding is None:
                raise InputError(f"nodes must have embeddings, node {node.node_id!r} has none; embed it before.")
        passages = [to_stored(node) for node in nodes]
        self._index.add(passages, vectors=[node.get_embedding() for node in nodes])
        if self.llm is not None:
            self.llm.reader.prepare(passages, index=self._index, keep=True)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document."""
        self._index.delete([p.id for p in self._index.passages() if p.metadata.get("ref_doc_id") == ref_doc_id])

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete nodes by id, by filter, or by both."""
        self._index.delete([passage.id for passage in self._found(node_ids, filters)])

    def clear(self) -> None:
        """Delete all nodes."""
        self._index.delete([passage.id for passage in self._index.passages()])

    # ------------------------------------------------------------------------------------------------------- reading

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes by id, in the order asked, by filter, or by both; unknown ids are absent."""
        return [to_node(passage) for passage in self._found(node_ids, filters)]

    def _found(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[Passage]:
        passages = self._index.passages() if node_ids is None else self._index.get(node_ids).values()
        return [passage for passage in passages if matches(filters, passage.metadata)]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Find the nodes nearest to an embedding, as many as there are where these are fewer than asked for.

        Args:
            query: With an embedding; mode ``default`` or ``mmr``. Filters, ``node_ids`` and ``doc_ids`` narrow it down.
            **kwargs: ``mmr_threshold`` and ``mmr_prefetch_factor``.
        Raises:
            InputError: If there is no embedding.
            ConfigError: If the mode is another one.
        """
        if query.mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
            raise ConfigError(f"mode must be default or mmr, got {query.mode.value}; this store has no other.")
        if query.mode == VectorStoreQueryMode.DEFAULT:
            return self._nearest(query, query.similarity_top_k)
        factor = float(kwargs.get("mmr_prefetch_factor") or _MMR_PREFETCH_FACTOR)
        near = self._nearest(query, int(query.similarity_top_k * max(1.0, factor)))
        return self._diverse(query, near, kwargs.get("mmr_threshold", query.mmr_threshold))

    def _nearest(self, query: VectorStoreQuery, top_k: int) -> VectorStoreQueryResult:
        if query.query_embedding is None:
            raise InputError("query_embedding must be given, got None; use an index with an embed_model.")
        if not len(self._index):
            return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
        top_k = min(top_k, len(self._index))
        (hits,) = self._index.search_vectors([query.query_embedding], top_k, where=_where(query))
        if self.llm is not None:
            self.llm.reader.prepare([hit.passage for hit in hits], index=self._index)
        return VectorStoreQueryResult(
            nodes=[to_node(hit.passage) for hit in hits],
            similarities=[hit.score for hit in hits],
            ids=[hit.passage.id for hit in hits],
        )

    def _diverse(
        self, query: VectorStoreQuery, near: VectorStoreQueryResult, threshold: float | None
    ) -> VectorStoreQueryResult:
        nodes = dict(zip(near.ids or [], near.nodes or [], strict=True))
        vectors = self._index.vectors(nodes)
        scores, ids = get_top_k_mmr_embeddings(
            query.query_embedding or [],
            [vector.tolist() for vector in vectors.values()],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(vectors),
            mmr_threshold=threshold,
        )
        return VectorStoreQueryResult(nodes=[nodes[id_] for id_ in ids], similarities=scores, ids=ids)

    # --------------------------------------------------------------------------- the same while the event loop is free

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """As :meth:`add`."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """As :meth:`delete`."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """As :meth:`delete_nodes`."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        """As :meth:`clear`."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """As :meth:`get_nodes`."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As :meth:`query`."""
        return await asyncio.to_thread(self.query, query, **kwargs)


def _where(query: VectorStoreQuery) -> Callable[[Passage], bool] | None:
    # An empty list is no list: an index asks with one for the nodes of a store that keeps their text.
    node_ids, doc_ids = set(query.node_ids or ()), set(query.doc_ids or ())
    if not (node_ids or doc_ids or query.filters):
        return None
    return lambda passage: (
        (not node_ids or passage.id in node_ids)
        and (not doc_ids or passage.metadata.get("ref_doc_id") in doc_ids)
        and matches(query.filters, passage.metadata)
    )
