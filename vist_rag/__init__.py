"""Retrieval-augmented generation that reads most passages as images: text, pages, a few latents, an answer.

Names are loaded when they are first used, so that ``import vist_rag`` is quick and touches no device and no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vist_rag.budget import Budget
    from vist_rag.compression import VistCompressor, VisualMemory
    from vist_rag.config import RendererConfig
    from vist_rag.errors import (
        CheckpointError,
        ConfigError,
        IncompatibleMemoryError,
        InputError,
        MissingDependencyError,
        ServerError,
        ShapeError,
        StoreError,
        VistError,
    )
    from vist_rag.generation import (
        Prompt,
        PromptTemplate,
        RemoteGenerator,
        Sampling,
        Span,
        VistGenerator,
        make_ref,
        read_spans,
        strip_spans,
        write_span,
    )
    from vist_rag.inspection import Inspection, MemoryView, inspect_answer, view_memory
    from vist_rag.pipeline import VistRAG
    from vist_rag.reader import Marked, Reply, Said, VistReader
    from vist_rag.rendering import Renderer
    from vist_rag.retrieval import Embedder, GivenVectors, PassageIndex, SentenceTransformerEmbedder
    from vist_rag.types import Answer, Citation, Passage, SearchHit, Usage

    __version__: str

__all__ = [
    "Answer",
    "Budget",
    "CheckpointError",
    "Citation",
    "ConfigError",
    "Embedder",
    "GivenVectors",
    "IncompatibleMemoryError",
    "InputError",
    "Inspection",
    "Marked",
    "MemoryView",
    "MissingDependencyError",
    "Passage",
    "PassageIndex",
    "Prompt",
    "PromptTemplate",
    "RemoteGenerator",
    "Renderer",
    "RendererConfig",
    "Reply",
    "Said",
    "Sampling",
    "SearchHit",
    "SentenceTransformerEmbedder",
    "ServerError",
    "ShapeError",
    "Span",
    "StoreError",
    "Usage",
    "VistCompressor",
    "VistError",
    "VistGenerator",
    "VistRAG",
    "VistReader",
    "VisualMemory",
    "__version__",
    "inspect_answer",
    "make_ref",
    "read_spans",
    "strip_spans",
    "view_memory",
    "write_span",
]

_ROOM_OF = {
    "Answer": "types",
    "Budget": "budget",
    "CheckpointError": "errors",
    "Citation": "types",
    "ConfigError": "errors",
    "Embedder": "retrieval",
    "GivenVectors": "retrieval",
    "IncompatibleMemoryError": "errors",
    "InputError": "errors",
    "Inspection": "inspection",
    "Marked": "reader",
    "MemoryView": "inspection",
    "MissingDependencyError": "errors",
    "Passage": "types",
    "PassageIndex": "retrieval",
    "Prompt": "generation",
    "PromptTemplate": "generation",
    "RemoteGenerator": "generation",
    "Renderer": "rendering",
    "RendererConfig": "config",
    "Reply": "reader",
    "Said": "reader",
    "Sampling": "generation",
    "SearchHit": "types",
    "SentenceTransformerEmbedder": "retrieval",
    "ServerError": "errors",
    "ShapeError": "errors",
    "Span": "generation",
    "StoreError": "errors",
    "Usage": "types",
    "VistCompressor": "compression",
    "VistError": "errors",
    "VistGenerator": "generation",
    "VistRAG": "pipeline",
    "VistReader": "reader",
    "VisualMemory": "compression",
    "inspect_answer": "inspection",
    "make_ref": "generation",
    "read_spans": "generation",
    "strip_spans": "generation",
    "view_memory": "inspection",
    "write_span": "generation",
}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vist-rag")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _ROOM_OF:
        value = getattr(import_module(f"vist_rag.{_ROOM_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
