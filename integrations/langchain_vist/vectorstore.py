"""VistVectorStore: FAISS over vist-rag's store as a LangChain vector store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from langchain_vist.chat import find_reader
from langchain_vist.documents import to_document, to_passage
from langchain_vist.embeddings import LangChainEmbedder, VistEmbeddings
from vist_rag import ConfigError, Passage, PassageIndex

Filter = dict[str, Any] | Callable[[Document], bool]


class VistVectorStore(VectorStore):
    """Documents in a ``PassageIndex``: one SQLite file is the truth, FAISS a cache of it; what was added stays.

    Scores are cosines, higher is better. Metadata must be JSON. A document without an id gets a hash of its text and
    metadata, so that adding it twice is adding it once.

    Args:
        embedding: Embeds texts and questions; None: that of the index, all-MiniLM-L6-v2 for a new one.
        directory: Where the index lives; made where there is none. None: a temporary one, which goes with this object.
        index: An open index, in the place of both.
        llm: A ``ChatVist``: documents are compressed when they are added. None: when they are first read.
    Raises:
        ConfigError: If an index comes with a directory or an embedding, or ``llm`` is foreign.
        StoreError: If the index cannot be opened, or was made with another embedding.
    """

    def __init__(
        self,
        embedding: Embeddings | None = None,
        directory: str | Path | None = None,
        *,
        index: PassageIndex | None = None,
        llm: Any = None,
    ) -> None:
        if index is not None and (embedding is not None or directory is not None):
            raise ConfigError("index must come without embedding and directory, which it has; leave them out.")
        self._reader = None if llm is None else find_reader(llm)
        if llm is not None and self._reader is None:
            raise ConfigError(f"llm must be a ChatVist, got {type(llm).__name__}; leave it out.")
        self._temporary = None
        if index is None:
            if directory is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="vist-")
                directory = self._temporary.name
            index = PassageIndex.open(directory, embedder=LangChainEmbedder(embedding) if embedding else None)
        self.index = index
        self._embedding = embedding or VistEmbeddings(index.embedder)

    @property
    def embeddings(self) -> Embeddings:
        """What embeds texts and questions."""
        return self._embedding

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store of texts; other arguments as of the class."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    # ------------------------------------------------------------------------------------------------------- writing

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts; one with a known id replaces what was stored.

        Returns:
            Their ids, in order.
        Raises:
            ConfigError: If there are more or fewer metadatas or ids than texts.
            InputError: If metadata is not JSON.
        """
        texts = list(texts)
        for name, values in (("metadatas", metadatas), ("ids", ids)):
            if values is not None and len(values) != len(texts):
                raise ConfigError(f"{name} must be as many as texts ({len(texts)}), got {len(values)}.")
        metadatas, ids = metadatas or [{} for _ in texts], ids or [None for _ in texts]
        passages = [to_passage(*row) for row in zip(texts, ids, metadatas, strict=True)]
        self.index.add(passages)
        if self._reader is not None:
            self._reader.prepare(passages, index=self.index, keep=True)
        return [passage.id for passage in passages]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete by id; unknown ids are passed over.

        Raises:
            ConfigError: If there are none: to delete everything, name everything.
        """
        if ids is None:
            raise ConfigError("ids must name what is deleted, got None; give a list of ids.")
        self.index.delete(ids)
        return True

    # ------------------------------------------------------------------------------------------------------- reading

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Documents by id; unknown ids are absent."""
        return [to_document(passage) for passage in self.index.get(ids).values()]

    def similarity_search(self, query: str, k: int = 4, filter: Filter | None = None, **kwargs: Any) -> list[Document]:
        """The documents nearest to a query, best first.

        Args:
            query: A question.
            k: How many at most.
            filter: What their metadata must hold, or a function of a document; the best of those that pass are found.
            **kwargs: Not used.
        """
        return [document for document, _ in self.similarity_search_with_score(query, k, filter)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As :meth:`similarity_search`, with the cosine of each."""
        return self._search(self._embedding.embed_query(query), k, filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """As :meth:`similarity_search`, for a vector."""
        return [document for document, _ in self._search(embedding, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Of the ``fetch_k`` nearest documents, ``k`` that are near the query and far from each other."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As :meth:`max_marginal_relevance_search`, for a vector."""
        documents = self.similarity_search_by_vector(embedding, fetch_k, filter)
        vectors = self.index.vectors([document.id or "" for document in documents])
        near = [vectors[document.id or ""].tolist() for document in documents]
        chosen = maximal_marginal_relevance(np.array(embedding, np.float32), near, lambda_mult, k)
        return [documents[i] for i in chosen]

    def _search(self, vector: list[float], k: int, filter: Filter | None) -> list[tuple[Document, float]]:
        k = min(k, len(self.index))
        if not k:
            return []
        (hits,) = self.index.search_vectors([vector], k, where=_where(filter))
        return [(to_document(hit.passage), hit.score) for hit in hits]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: (1 + cosine) / 2


def _where(filter: Filter | None) -> Callable[[Passage], bool] | None:
    if filter is None:
        return None
    if callable(filter):
        return lambda passage: filter(to_document(passage))

    def holds(passage: Passage) -> bool:
        metadata = to_document(passage).metadata
        return all(key in metadata and metadata[key] == value for key, value in filter.items())

    return holds
