"""VistEmbeddings: an embedder of vist-rag as LangChain embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from vist_rag import Embedder, SentenceTransformerEmbedder


class VistEmbeddings(Embeddings):
    """Sentence embeddings without network: all-MiniLM-L6-v2 of the extra ``offline``, or another embedder.

    Args:
        embedder: None: all-MiniLM-L6-v2.
    """

    def __init__(self, embedder: Embedder | None = None) -> None:
        self.embedder = embedder or SentenceTransformerEmbedder()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of length 1."""
        return [vector.tolist() for vector in self.embedder.encode(texts)]

    def embed_query(self, text: str) -> list[float]:
        """A vector of length 1."""
        vector: list[float] = self.embedder.encode([text], query=True)[0].tolist()
        return vector


class LangChainEmbedder:
    """LangChain embeddings as an embedder of vist-rag.

    Args:
        embeddings: What embeds.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        self.embeddings = embeddings

    @property
    def name(self) -> str:
        """Class and model: an index is tied to it."""
        model: Any = next(
            (
                value
                for field in ("model", "model_name", "model_id")
                if (value := getattr(self.embeddings, field, None))
            ),
            "",
        )
        return f"langchain:{type(self.embeddings).__name__}:{model if isinstance(model, str) else ''}"

    @property
    def dimension(self) -> int:
        """Length ``d`` of a vector."""
        return len(self.embeddings.embed_query("dimension"))

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        """Embed texts into float32 ``[n, d]``."""
        if query:
            return np.array([self.embeddings.embed_query(text) for text in texts], np.float32)
        return np.array(self.embeddings.embed_documents(list(texts)), np.float32)
