"""LlamaIndex with passages that are read as memory: an LLM, a postprocessor, a synthesizer, stores and a retriever.

Retrieved nodes keep their text. :class:`VistPostprocessor` sets their templates so that a prompt carries each passage
as a span; :class:`VistLLM` reads the span's memory in the place of its tokens. Any other LLM is given plain text.

Names are loaded when they are first used: importing this touches no model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vist_rag import MissingDependencyError

if TYPE_CHECKING:
    from llama_index_vist.embedding import VistEmbedding
    from llama_index_vist.llm import VistLLM
    from llama_index_vist.postprocessor import VistPostprocessor
    from llama_index_vist.prompts import VIST_QA_TEMPLATE, vist_prompt_helper
    from llama_index_vist.retriever import VistRetriever
    from llama_index_vist.synthesizer import VistSynthesizer
    from llama_index_vist.vector_store import VistVectorStore

__all__ = [
    "VIST_QA_TEMPLATE",
    "VistEmbedding",
    "VistLLM",
    "VistPostprocessor",
    "VistRetriever",
    "VistSynthesizer",
    "VistVectorStore",
    "vist_prompt_helper",
]

_ROOM_OF = {
    "VIST_QA_TEMPLATE": "prompts",
    "VistEmbedding": "embedding",
    "VistLLM": "llm",
    "VistPostprocessor": "postprocessor",
    "VistRetriever": "retriever",
    "VistSynthesizer": "synthesizer",
    "VistVectorStore": "vector_store",
    "vist_prompt_helper": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "llama_index":
            raise
        raise MissingDependencyError(name, "llama-index-core", "llama-index") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
