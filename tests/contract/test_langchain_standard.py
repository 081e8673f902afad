"""LangChain's own standard tests, every class of them that applies to what ``langchain_vist`` offers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from langchain_vist import ChatVist, VistEmbeddings, VistRetriever, VistVectorStore
from tests.support.causal import causal_generator
from tests.support.tiny import tiny_compressor
from vist_rag import Passage, PassageIndex
from vist_rag.training.export import save_checkpoint


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny generator of random weights with a chat template: it says something whatever it is asked."""
    directory = tmp_path_factory.mktemp("chat")
    settings = {"max_new_tokens": 8}
    return save_checkpoint(directory, tiny_compressor(), causal_generator("qwen3"), settings=settings, int8=False)


class TestChatUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatVist]:
        return ChatVist

    @property
    def has_tool_calling(self) -> bool:
        return False  # nothing that these models were trained for

    @property
    def has_structured_output(self) -> bool:
        return False


class TestChatIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _checkpoint(self, chat_checkpoint: Path) -> None:
        self.checkpoint = chat_checkpoint

    @property
    def chat_model_class(self) -> type[ChatVist]:
        return ChatVist

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"checkpoint": str(self.checkpoint)}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False  # weights are loaded once; another checkpoint is another ChatVist


class TestEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[VistEmbeddings]:
        return VistEmbeddings


class TestEmbeddingsIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[VistEmbeddings]:
        return VistEmbeddings


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _index(self, tmp_path: Path) -> Iterator[None]:
        with PassageIndex.open(tmp_path) as self.index:
            self.index.add([Passage(f"The ferry number {i} crosses the strait at {i} o'clock.") for i in range(1, 6)])
            yield

    @property
    def retriever_constructor(self) -> type[VistRetriever]:
        return VistRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": self.index}

    @property
    def retriever_query_example(self) -> str:
        return "When does the ferry cross?"


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = VistVectorStore(self.get_embeddings(), tmp_path)
        yield store
        store.index.close()


class TestVectorStoreHnsw(VectorStoreIntegrationTests):
    """The same over an approximate FAISS index that cannot remove vectors."""

    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        embeddings = self.get_embeddings()
        index = PassageIndex.open(tmp_path, embedder=_embedder(embeddings), index_factory="HNSW16")
        yield VistVectorStore(index=index)
        index.close()


def _embedder(embeddings: Embeddings) -> Any:
    from langchain_vist.embeddings import LangChainEmbedder

    assert isinstance(embeddings, DeterministicFakeEmbedding)
    return LangChainEmbedder(embeddings)
