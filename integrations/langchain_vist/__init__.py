"""The LangChain door of vist-rag: retrieved documents are read as memory instead of text.

Names are loaded when they are first used: importing this touches no model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_vist.chat import ChatVist
    from langchain_vist.compressor import VistDocumentCompressor
    from langchain_vist.embeddings import VistEmbeddings
    from langchain_vist.middleware import VistContextMiddleware
    from langchain_vist.prompts import VIST_DOC_PROMPT, VIST_PROMPT, readable, with_query
    from langchain_vist.retriever import VistRetriever
    from langchain_vist.vectorstore import VistVectorStore

__all__ = [
    "VIST_DOC_PROMPT",
    "VIST_PROMPT",
    "ChatVist",
    "VistContextMiddleware",
    "VistDocumentCompressor",
    "VistEmbeddings",
    "VistRetriever",
    "VistVectorStore",
    "readable",
    "with_query",
]

_FILE_OF = {
    "VIST_DOC_PROMPT": "prompts",
    "VIST_PROMPT": "prompts",
    "ChatVist": "chat",
    "VistContextMiddleware": "middleware",
    "VistDocumentCompressor": "compressor",
    "VistEmbeddings": "embeddings",
    "VistRetriever": "retriever",
    "VistVectorStore": "vectorstore",
    "readable": "prompts",
    "with_query": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"langchain_vist.{_FILE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("langchain", "langchain_core"):
            raise
        from vist_rag import MissingDependencyError

        extra = "langchain" if package == "langchain_core" else "langchain-agents"
        raise MissingDependencyError(f"langchain_vist.{name}", package.replace("_", "-"), extra) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
