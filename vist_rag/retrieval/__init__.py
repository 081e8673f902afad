"""Files -> passages -> a durable index that is searched by meaning."""

from vist_rag.retrieval.chunking import find_documents, read_passages, split_text
from vist_rag.retrieval.embedder import Embedder, GivenVectors, SentenceTransformerEmbedder
from vist_rag.retrieval.index import PassageIndex
from vist_rag.retrieval.store import PassageStore, Sizes

__all__ = [
    "Embedder",
    "GivenVectors",
    "PassageIndex",
    "PassageStore",
    "SentenceTransformerEmbedder",
    "Sizes",
    "find_documents",
    "read_passages",
    "split_text",
]
