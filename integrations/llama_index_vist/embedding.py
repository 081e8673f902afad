"""VistEmbedding: an embedder of vist-rag's as LlamaIndex's embedding model."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import PrivateAttr

from vist_rag import Embedder, SentenceTransformerEmbedder


class VistEmbedding(BaseEmbedding):
    """Embeds as an index does, without network where the extra ``offline`` is installed.

    Args:
        embedder: None: all-MiniLM-L6-v2, loaded when it is first needed.
        **settings: Of LlamaIndex's own ``BaseEmbedding``.
    """

    _embedder: Any = PrivateAttr()

    def __init__(self, embedder: Embedder | None = None, **settings: Any) -> None:
        embedder = embedder or SentenceTransformerEmbedder()
        super().__init__(**{"model_name": embedder.name} | settings)
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """The name in LlamaIndex's records."""
        return "VistEmbedding"

    def _encode(self, texts: list[str], *, query: bool = False) -> list[Embedding]:
        vectors: list[Embedding] = self._embedder.encode(texts, query=query).tolist()
        return vectors

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encode([query], query=True)[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._encode([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encode(texts)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
