"""Vectors in Qdrant, memories in our index: the same answers as from our own stores, and nothing encoded twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("qdrant_client", reason="needs qdrant-client")

from langchain_core.documents import Document
from langchain_qdrant import QdrantVectorStore
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.vector_stores.qdrant import QdrantVectorStore as QdrantNodes
from qdrant_client import QdrantClient

import llama_index_vist
from langchain_vist import VIST_PROMPT, ChatVist, VistDocumentCompressor, VistEmbeddings, VistVectorStore, with_query
from llama_index_vist import VistEmbedding, VistLLM, VistPostprocessor, VistSynthesizer
from tests.support.doors import PASSAGES, QUESTIONS, embedded_reader
from tests.support.llama_index import python_blocks
from vist_rag import PassageIndex, VistReader

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "vector-databases.md"


def fresh(index: PassageIndex | None = None) -> VistReader:
    """The embedded model, with no memory at hand."""
    one = embedded_reader()
    settings = {name: getattr(one, name) for name in ("budget", "template", "max_new_tokens", "stop")}
    return VistReader(one.compressor, one.generator, index=index, **settings)


@pytest.fixture(scope="module")
def memories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PassageIndex]:
    with PassageIndex.open(tmp_path_factory.mktemp("memories")) as index:
        fresh(index).prepare(PASSAGES, keep=True, only_stored=False)
        assert len(index) == 0
        assert list(index.fingerprints().values()) == [len(PASSAGES)]
        yield index


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the compressor is asked for."""
    texts: list[str] = []
    compressor: Any = embedded_reader().compressor
    encode = compressor.encode

    def count(some: Any, **how: Any) -> Any:
        texts.extend(some)
        return encode(some, **how)

    monkeypatch.setattr(compressor, "encode", count)
    return texts


def test_langchain(memories: PassageIndex, encoded: list[str], tmp_path: Path) -> None:
    documents = [Document(p.text, metadata={"title": p.title}) for p in PASSAGES]
    qdrant = QdrantVectorStore.from_documents(
        documents, VistEmbeddings(), path=str(tmp_path / "qdrant"), collection_name="passages"
    )
    ours = VistVectorStore(directory=tmp_path / "ours")
    ours.add_documents(documents)

    def answers(store: Any, chat: ChatVist, **index: Any) -> list[tuple[str, int]]:
        retriever = store.as_retriever(search_kwargs={"k": 2})
        chain = with_query(retriever) | VistDocumentCompressor(llm=chat, **index) | VIST_PROMPT | chat
        return [(m.content, m.usage_metadata["input_tokens"]) for m in map(chain.invoke, QUESTIONS)]

    by_reader = answers(qdrant, ChatVist.from_reader(fresh(memories)))
    by_index = answers(qdrant, ChatVist.from_reader(fresh()), index=memories)
    assert encoded == []
    own = answers(ours, ChatVist.from_reader(fresh()), index=ours.index)
    assert by_reader == by_index
    assert [text for text, _ in by_reader[:3]] == ["1867", "Edda Marsh", "Tomas Brandt"]
    assert [text for text, _ in by_reader] == [text for text, _ in own]
    assert [size for _, size in by_reader] == [size for _, size in own]
    assert len(encoded) >= len(PASSAGES) - 1  # our store was given no llm: its memories are made when they are read


def test_llama_index(memories: PassageIndex, encoded: list[str], tmp_path: Path) -> None:
    def answers(store: Any, llm: VistLLM) -> list[tuple[str, list[str]]]:
        nodes = [TextNode(text=p.text, metadata={"title": p.title}) for p in PASSAGES]
        storage = StorageContext.from_defaults(vector_store=store)
        engine = VectorStoreIndex(nodes, storage_context=storage, embed_model=VistEmbedding()).as_query_engine(
            similarity_top_k=2,
            llm=llm,
            node_postprocessors=[VistPostprocessor(llm=llm)],
            response_synthesizer=VistSynthesizer(llm),
        )
        replies = [engine.query(question) for question in QUESTIONS]
        assert all(node.metadata["vist_latents"] for reply in replies for node in reply.source_nodes)
        return [(str(reply), [node.text for node in reply.source_nodes]) for reply in replies]

    qdrant = QdrantNodes(client=QdrantClient(":memory:"), collection_name="passages")
    found = answers(qdrant, VistLLM.from_reader(fresh(memories)))
    assert encoded == []
    assert [text for text, _ in found[:3]] == ["1867", "Edda Marsh", "Tomas Brandt"]
    ours = llama_index_vist.VistVectorStore(tmp_path / "ours")
    assert answers(ours, VistLLM.from_reader(fresh(ours.client))) == found
    assert encoded


def test_the_page_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoded: list[str]
) -> None:
    from vist_rag.bulk import Parts, Recipe
    from vist_rag.retrieval.embedder import DEFAULT_MODEL, SentenceTransformerEmbedder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VistReader, "from_pretrained", lambda index: fresh(index))  # loaded once for all tests
    compressor: Any = embedded_reader().compressor
    parts = Parts("parts", Recipe(DEFAULT_MODEL, None, compressor.fingerprint), 2)
    for part in parts.plan(PASSAGES[2:]):
        parts.make(part.key, SentenceTransformerEmbedder(), compressor)
    assert len(encoded) == 3
    names: dict[str, Any] = {}
    for block in python_blocks(PAGE):
        exec(compile(block, PAGE.name, "exec"), names)
    assert capsys.readouterr().out.split("\n") == ["2 0", "Edda Marsh", "1867", ""]
    assert len(encoded) == 3 + 2  # those of the page's own passages, once
    chat = ChatVist.from_reader(fresh(names["memories"]))
    retriever = names["again"].as_retriever(search_kwargs={"k": 1})
    chain = with_query(retriever) | VistDocumentCompressor(llm=chat) | VIST_PROMPT | chat
    assert chain.invoke(QUESTIONS[2]).content == "Tomas Brandt"
    assert len(encoded) == 5
    names["memories"].close()
