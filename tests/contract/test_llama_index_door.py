"""What each object of the LlamaIndex door must keep, on tiny models of random weights and vectors that are given."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

import llama_index_vist
from llama_index_vist import VistEmbedding, VistLLM, VistPostprocessor, VistRetriever, VistVectorStore
from tests.support.causal import causal_generator
from tests.support.llama_index import PASSAGES, SpyingReader
from tests.support.tiny import save_tiny_checkpoint, tiny_compressor, tiny_generator
from vist_rag import Budget, ConfigError, InputError, MissingDependencyError, Passage, PassageIndex, VistReader
from vist_rag import PromptTemplate as VistTemplate

MODULES = """
import json, sys
import llama_index_vist
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def loaded() -> VistReader:
    return VistReader(tiny_compressor(), tiny_generator(), max_new_tokens=6, budget=Budget(k_raw=0, k_memory=2))


@pytest.fixture
def reader(loaded: VistReader) -> SpyingReader:
    return SpyingReader.of(loaded)


@pytest.fixture
def fresh(loaded: VistReader) -> VistLLM:
    """Has no memory at hand."""
    return VistLLM.from_reader(SpyingReader.of(loaded, fresh=True))


@pytest.fixture
def llm(reader: SpyingReader) -> VistLLM:
    return VistLLM.from_reader(reader)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VistVectorStore]:
    store = VistVectorStore(tmp_path / "store")
    yield store
    store.client.close()


def scored(*nodes: Any) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=1 - i / 10) for i, node in enumerate(nodes)]


# ------------------------------------------------------------------------------------------------------------ importing


def test_the_bare_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, check=True, env=_with_door())
    assert {"torch", "transformers", "llama_index", "faiss", "numpy"}.isdisjoint(json.loads(done.stdout))


def _with_door() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(Path(llama_index_vist.__file__).parents[1])}


@pytest.mark.parametrize("name", llama_index_vist.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(llama_index_vist, name) is not None
    assert name in dir(llama_index_vist)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'VistAgent'"):
        llama_index_vist.VistAgent  # noqa: B018


def test_a_missing_llama_index_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(llama_index_vist), "VistLLM")
    for module in [name for name in sys.modules if name.startswith("llama_index_vist.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "llama_index.core.base.llms.types", None)
    with pytest.raises(MissingDependencyError, match=r"VistLLM needs llama-index-core.*'vist-rag\[llama-index\]'"):
        llama_index_vist.VistLLM  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------- LLM


def test_what_a_call_says_goes_before_the_fields(llm: VistLLM, loaded: VistReader) -> None:
    prompt = "the old bridge"
    long = llm.complete(prompt)
    assert long.text == loaded.reply(prompt).text
    assert long.raw["usage"]["completion_tokens"] == 6  # type: ignore[index]
    assert llm.complete(prompt, max_tokens=2).raw["usage"]["completion_tokens"] == 2  # type: ignore[index]
    stop = long.text.split()[1]
    assert stop not in llm.complete(prompt, stop=stop).text
    assert llm.complete(prompt, stop=[stop]).text == llm.complete(prompt, stop=stop).text
    fields = VistLLM.from_reader(loaded, max_tokens=3, stop=[stop], temperature=5.0, seed=1)
    assert fields.complete(prompt, max_tokens=6, stop=[], temperature=0).text == long.text


def test_a_seed_repeats_a_draw(llm: VistLLM) -> None:
    draws = {llm.complete("the sea", temperature=50.0, seed=seed).text for seed in range(5)}
    assert len(draws) > 1
    again = [llm.complete("the sea", temperature=50.0, seed=3, top_k=50, top_p=0.9).text for _ in range(2)]
    assert again[0] == again[1]


def test_an_unknown_argument_is_told(llm: VistLLM) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens, stop.*got n, tools"):
        llm.complete("the sea", n=2, tools=[])
    with pytest.raises(ConfigError, match="temperature must be"):
        llm.complete("the sea", temperature=-1)


def test_a_picture_is_refused(llm: VistLLM) -> None:
    message = ChatMessage(blocks=[ImageBlock(url="http://localhost/a.png")])
    with pytest.raises(InputError, match="messages must hold text only, got a ImageBlock in message 1"):
        llm.chat([ChatMessage("the sea"), message])


async def test_all_ways_say_the_same(llm: VistLLM, loaded: VistReader) -> None:
    prompt, messages = "the old bridge", [ChatMessage("the old bridge")]
    text = loaded.reply(prompt).text
    streams = [llm.stream_complete(prompt), llm.stream_chat(messages)]
    responses: list[list[Any]] = [list(stream) for stream in streams]
    for stream in (await llm.astream_complete(prompt), await llm.astream_chat(messages)):
        responses.append([response async for response in stream])
    for response in responses:
        last = response[-1]
        whole = last.text if hasattr(last, "text") else last.message.content
        assert whole == "".join(one.delta for one in response)
        assert whole.strip() == text
        assert last.raw["usage"]["completion_tokens"] == 6
        assert [one.raw for one in response[:-1]] == [None] * (len(response) - 1)
    assert llm.chat(messages).message.content == (await llm.achat(messages)).message.content == text
    assert (await llm.acomplete(prompt)).text == text
    assert llm.chat(messages).message.role == MessageRole.ASSISTANT


def test_metadata_is_that_of_the_generator(llm: VistLLM, loaded: VistReader) -> None:
    assert llm.metadata.model_dump(include={"context_window", "num_output", "is_chat_model", "model_name"}) == {
        "context_window": 512,
        "num_output": 6,
        "is_chat_model": False,
        "model_name": "vist-rag",
    }
    other = VistLLM.from_reader(loaded, context_window=100, max_tokens=3, checkpoint="a/b").metadata
    assert (other.context_window, other.num_output, other.model_name) == (100, 3, "a/b")


def test_a_chat_template_makes_a_chat_model() -> None:
    reader = SpyingReader.of(VistReader(tiny_compressor(), causal_generator("qwen3"), max_new_tokens=4))
    chat = VistLLM.from_reader(reader)
    assert chat.metadata.is_chat_model
    messages = [ChatMessage("be brief", role="system"), ChatMessage("the sea", role="user")]
    assert chat.chat(messages).raw["usage"]["completion_tokens"] <= 4  # type: ignore[index]
    assert reader.asked == ["be brief\nthe sea"]


def test_a_checkpoint_is_loaded_when_needed(tmp_path: Path) -> None:
    checkpoint = str(save_tiny_checkpoint(tmp_path))
    llm = VistLLM(checkpoint=checkpoint, device="cpu", max_tokens=3)
    again = VistLLM.from_json(llm.to_json())
    unpickled = pickle.loads(pickle.dumps(llm))
    assert llm._reader is None
    assert llm.complete("the sea").text == again.complete("the sea").text == unpickled.complete("the sea").text
    assert copy.deepcopy(llm).reader is llm.reader


# ------------------------------------------------------------------------------------------------------- postprocessor


def test_what_is_given_stays_as_it_is(llm: VistLLM) -> None:
    nodes = scored(
        TextNode(text="the sea", metadata={"title": "T", "list": [1, {"a": 0}]}, excluded_llm_metadata_keys=["list"]),
        TextNode(text="the old bridge", text_template="<{content}>", metadata_template="{key}={value}"),
    )
    before = copy.deepcopy(nodes)
    read = VistPostprocessor(llm=llm).postprocess_nodes(nodes)
    assert nodes == before
    for one, given in zip(read, nodes, strict=True):
        added = set(one.metadata) - set(given.metadata)
        assert added == {"vist_ref", "vist_latents", "vist_before"}
        assert {key: one.metadata[key] for key in given.metadata} == given.metadata
        assert (one.text, one.score, one.node_id) == (given.text, given.score, given.node_id)
        assert one.metadata["vist_latents"] >= 1
        assert one.get_content(MetadataMode.EMBED) == one.get_content() == given.text
        assert TextNode.from_json(one.node.to_json()) == one.node
    read[0].metadata["list"].append(2)
    assert nodes[0].metadata["list"] == [1, {"a": 0}]


def test_twice_is_once(llm: VistLLM) -> None:
    nodes = scored(TextNode(text="the sea", metadata={"title": "T"}), TextNode(text="the lake"))
    post = VistPostprocessor(llm=llm)
    once = post.postprocess_nodes(nodes)
    assert post.postprocess_nodes(once) == once


def test_a_template_of_ones_own_is_kept(loaded: VistReader) -> None:
    template = VistTemplate(raw="[{title}] {text} {{x}}\n", untitled="- {text}\n", memory="Memory {0}: ")
    reader = SpyingReader.of(loaded, template=template)
    post = VistPostprocessor(llm=VistLLM.from_reader(reader), budget=Budget(k_raw=2, k_memory=1))
    nodes = scored(
        TextNode(text="the sea", metadata={"title": "{text}"}), TextNode(text="a {b}"), TextNode(text="lake")
    )
    read = post.postprocess_nodes(nodes)
    texts = [one.get_content(MetadataMode.LLM) for one in read]
    assert texts[0] == template.raw_text(Passage("the sea", title="{text}")).strip()
    assert texts[1] == "- a {b}"
    assert texts[2].startswith("Memory {0}: <|vist:")
    assert [one.metadata["vist_ref"] == "" for one in read] == [True, True, False]


def test_the_budget_leaves_nodes_out_but_no_pictures(llm: VistLLM) -> None:
    picture = ImageNode(image_url="http://localhost/a.png", text="a picture")
    several = Node(text_resource=MediaResource(text="the sea"), image_resource=MediaResource(url="http://localhost/a"))
    texts = [TextNode(text="the sea"), Node(text_resource=MediaResource(text="the lake")), TextNode(text="the bridge")]
    nodes = scored(texts[0], picture, texts[1], several, texts[2])
    read = VistPostprocessor(llm=llm, budget=Budget(k_raw=0, k_memory=2)).postprocess_nodes(nodes)
    assert [one.node_id for one in read] == [nodes[i].node_id for i in range(4)]
    assert [one.score for one in read] == [nodes[i].score for i in range(4)]
    assert read[1] == nodes[1]
    assert read[3] == nodes[3]
    assert read[2].get_content(MetadataMode.LLM).endswith("the lake<|/vist|>")


def test_a_key_of_that_name_that_is_not_ours(llm: VistLLM) -> None:
    for value in ("no json", "[]", '{"text_template": 3}', None, 7):
        nodes = scored(TextNode(text="the sea", metadata={"vist_before": value, "vist_ref": "0" * 32 + ".1"}))
        (read,) = VistPostprocessor(llm=llm).postprocess_nodes(nodes)
        assert read.get_content(MetadataMode.LLM).endswith("the sea<|/vist|>")


def test_no_nodes(llm: VistLLM) -> None:
    assert VistPostprocessor(llm=llm).postprocess_nodes([]) == []


# -------------------------------------------------------------------------------------------------------- vector store


def nodes_of_every_kind() -> list[Any]:
    source = RelatedNodeInfo(node_id="doc", metadata={"a": [1]}, hash="h")
    relationships = {NodeRelationship.SOURCE: source, NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c")]}
    return [
        TextNode(
            id_="text",
            text="the sea {x} \n",
            metadata={"title": "T", "deep": {"a": [1, None, True, "é"]}},
            relationships=relationships,
            start_char_idx=3,
            end_char_idx=9,
            text_template="{metadata_str}|{content}",
            excluded_embed_metadata_keys=["deep"],
        ),
        Node(id_="node", text_resource=MediaResource(text="the lake", mimetype="text/markdown"), metadata={"n": 1.5}),
        Document(id_="document", text="the bridge", metadata={"title": 7}),
        IndexNode(id_="index", text="the river", index_id="other"),
        ImageNode(id_="image", text="", image_url="http://localhost/a.png"),
        TextNode(id_="empty", text=""),
    ]


def embedded(nodes: list[Any]) -> list[Any]:
    vectors = np.random.default_rng(0).normal(size=(len(nodes), 8))
    return [node.model_copy(update={"embedding": vector.tolist()}) for node, vector in zip(nodes, vectors, strict=True)]


def test_nodes_come_back_as_they_were(tmp_path: Path) -> None:
    nodes = nodes_of_every_kind()
    store = VistVectorStore(tmp_path / "store")
    assert store.add(embedded(nodes)) == [node.node_id for node in nodes]
    store.client.close()
    again = VistVectorStore(tmp_path / "store")
    assert again.get_nodes() == nodes
    assert [type(node) for node in again.get_nodes()] == [type(node) for node in nodes]
    query = VectorStoreQuery(query_embedding=embedded(nodes)[2].embedding, similarity_top_k=100)
    found = again.query(query)
    assert (found.nodes[0], found.ids[0]) == (nodes[2], "document")  # type: ignore[index]
    assert found.similarities[0] == pytest.approx(1)  # type: ignore[index]
    assert len(found.nodes) == len(nodes)  # type: ignore[arg-type]
    assert again.client.get(["text"])["text"].content == "T: the sea {x} \n"
    assert again.client.get(["document"])["document"].content == "the bridge"
    json.loads(again.to_json())
    again.client.close()


def test_what_is_added_again_replaces(store: VistVectorStore) -> None:
    node = TextNode(id_="a", text="the sea", embedding=[1.0, 0.0])
    for change in ({}, {"embedding": [0.0, 1.0]}, {"metadata": {"k": 2}}, {"text": "the lake"}):
        node = node.model_copy(update=change)
        store.add([node])
        found = store.query(VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=1))
        assert found.nodes == [node.model_copy(update={"embedding": None})]
        assert found.similarities == pytest.approx([1.0])


def test_a_changed_node_keeps_no_memory_of_the_former(tmp_path: Path, fresh: VistLLM) -> None:
    store = VistVectorStore(tmp_path / "with", llm=fresh)
    store.add(
        [TextNode(id_="a", text="the sea", embedding=[1.0, 0.0]), TextNode(id_="b", text="b", embedding=[1.0, 1])]
    )
    fingerprint = fresh.reader.compressor.fingerprint
    texts = ["the sea", "b", "the old bridge"]
    before = store.client.memories(texts, fingerprint)
    store.add([TextNode(id_="a", text="the old bridge", embedding=[1.0, 0.0])])
    after = store.client.memories(texts, fingerprint)
    assert set(before) == {"the sea", "b"}
    assert set(after) == {"the old bridge", "b"}
    np.testing.assert_array_equal(before["b"], after["b"])
    store.client.close()


def test_no_embedding_is_told(store: VistVectorStore) -> None:
    with pytest.raises(InputError, match="node 'a' has none"):
        store.add([TextNode(id_="a", text="the sea")])
    with pytest.raises(InputError, match="query_embedding must be given, got None"):
        store.query(VectorStoreQuery(similarity_top_k=1))
    with pytest.raises(ConfigError, match="default or mmr, got hybrid"):
        store.query(VectorStoreQuery(query_embedding=[1.0], mode=VectorStoreQueryMode.HYBRID))
    with pytest.raises(ConfigError, match="one of directory and index"):
        VistVectorStore()


def filled(store: VistVectorStore | SimpleVectorStore) -> list[Any]:
    vectors = np.random.default_rng(1).normal(size=(8, 4))
    nodes = [
        TextNode(
            id_=f"n{i}",
            text=f"text {i}",
            embedding=vector.tolist(),
            metadata={"i": i, "even": "yes" if i % 2 == 0 else "no", "tags": ["x", f"t{i}"], "title": f"Title {i}"}
            | ({"rare": "here"} if i == 3 else {}),
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc{i % 3}")},
        )
        for i, vector in enumerate(vectors)
    ]
    store.add(nodes)
    return nodes


FILTERS = [
    ("i", FilterOperator.EQ, 3),
    ("i", FilterOperator.NE, 3),
    ("i", FilterOperator.GT, 3),
    ("i", FilterOperator.GTE, 3),
    ("i", FilterOperator.LT, 3),
    ("i", FilterOperator.LTE, 3),
    ("i", FilterOperator.IN, [1, 2]),
    ("i", FilterOperator.NIN, [1, 2]),  # codespell:ignore nin
    ("tags", FilterOperator.ANY, ["t1", "t4"]),
    ("tags", FilterOperator.ALL, ["x", "t4"]),
    ("tags", FilterOperator.CONTAINS, "t5"),
    ("title", FilterOperator.TEXT_MATCH, "Title"),
    ("title", FilterOperator.TEXT_MATCH_INSENSITIVE, "title 6"),
    ("rare", FilterOperator.IS_EMPTY, None),
    ("ref_doc_id", FilterOperator.EQ, "doc1"),
]


@pytest.mark.parametrize("condition", list(FilterCondition))
@pytest.mark.parametrize(("key", "operator", "value"), FILTERS)
def test_filters_mean_what_they_mean_to_llama_index(
    store: VistVectorStore, key: str, operator: FilterOperator, value: Any, condition: FilterCondition
) -> None:
    simple = SimpleVectorStore()
    filled(simple)
    filled(store)
    filters = MetadataFilters(
        filters=[MetadataFilter(key=key, value=value, operator=operator), MetadataFilter(key="even", value="yes")],
        condition=condition,
    )
    query = VectorStoreQuery(query_embedding=[1.0, 0, 0, 0], similarity_top_k=5, filters=filters)
    found, expected = store.query(query), simple.query(query)
    assert found.ids == expected.ids
    assert found.similarities == pytest.approx(expected.similarities, abs=1e-6)


def test_filters_may_be_nested(store: VistVectorStore) -> None:
    filled(store)
    even = MetadataFilter(key="even", value="yes")
    small = MetadataFilters(filters=[MetadataFilter(key="i", value=3, operator=FilterOperator.LT)])
    neither = MetadataFilters(filters=[even, small], condition=FilterCondition.NOT)
    either = MetadataFilters(filters=[neither, MetadataFilter(key="i", value=0)], condition=FilterCondition.OR)
    assert [node.node_id for node in store.get_nodes(filters=neither)] == ["n3", "n5", "n7"]
    assert [node.node_id for node in store.get_nodes(filters=either)] == ["n0", "n3", "n5", "n7"]
    assert len(store.get_nodes(filters=MetadataFilters(filters=[]))) == 8
    wrong = MetadataFilters(filters=[MetadataFilter(key="title", value=3, operator=FilterOperator.GT)])
    with pytest.raises(InputError, match="title > 3 cannot be applied to 'Title 0'"):
        store.get_nodes(filters=wrong)


def test_a_query_is_narrowed_and_clamped(store: VistVectorStore) -> None:
    query = VectorStoreQuery(query_embedding=[1.0, 0, 0, 0], similarity_top_k=50)
    assert store.query(query).ids == []
    nodes = filled(store)
    everything = store.query(query)
    scores = {node.node_id: node.embedding[0] / np.linalg.norm(node.embedding) for node in nodes}
    assert everything.ids == sorted(scores, key=lambda id_: -scores[id_])
    assert everything.similarities == pytest.approx([scores[id_] for id_ in everything.ids], abs=1e-6)
    query.node_ids, query.doc_ids = ["n1", "n4", "n5"], ["doc1"]
    assert set(store.query(query).ids or []) == {"n1", "n4"}
    query.node_ids, query.doc_ids = [], []
    assert store.query(query).ids == everything.ids


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0])
def test_mmr_is_that_of_llama_index(store: VistVectorStore, threshold: float) -> None:
    simple = SimpleVectorStore()
    filled(simple)
    filled(store)
    query = VectorStoreQuery(query_embedding=[0.5, -0.5, 0.5, 0.5], similarity_top_k=4, mode=VectorStoreQueryMode.MMR)
    found, expected = (one.query(query, mmr_threshold=threshold) for one in (store, simple))
    assert found.ids == expected.ids
    assert found.similarities == pytest.approx(expected.similarities, abs=1e-6)
    assert [node.node_id for node in found.nodes or []] == found.ids
    nearest = store.query(VectorStoreQuery(query_embedding=query.query_embedding, similarity_top_k=4)).ids
    assert (store.query(query, mmr_threshold=threshold, mmr_prefetch_factor=1).ids or [])[0] == (nearest or [])[0]


async def test_deleting(store: VistVectorStore) -> None:
    filled(store)

    def left() -> set[int]:
        return {node.metadata["i"] for node in store.get_nodes()}

    store.delete("doc0")
    assert left() == {1, 2, 4, 5, 7}
    await store.adelete("doc1")
    assert left() == {2, 5}
    store.delete_nodes(["n2", "n99"], filters=MetadataFilters(filters=[MetadataFilter(key="i", value=9)]))
    assert left() == {2, 5}
    await store.adelete_nodes(["n2"])
    assert left() == {5}
    await store.async_add([TextNode(text="more", embedding=[1.0, 0, 0, 0], metadata={"i": 9})])
    assert {node.metadata["i"] for node in await store.aget_nodes()} == {5, 9}
    found = await store.aquery(VectorStoreQuery(query_embedding=[1.0, 0, 0, 0], similarity_top_k=1))
    assert [node.metadata["i"] for node in found.nodes or []] == [9]
    await store.aclear()
    assert store.get_nodes() == []


# ----------------------------------------------------------------------------------------------- retriever, embedding


class Letters:
    """How often each letter stands in a text."""

    name = "letters"
    dimension = 26

    def encode(self, texts: Any, *, query: bool = False) -> Any:
        return np.array(
            [[text.lower().count(chr(97 + i)) + 0.1 + query for i in range(26)] for text in texts], "float32"
        )


async def test_a_retriever_gives_what_the_index_finds(tmp_path: Path, fresh: VistLLM) -> None:
    with PassageIndex.open(tmp_path / "index", embedder=Letters()) as index:
        retriever = VistRetriever(index, similarity_top_k=50, llm=fresh)
        assert retriever.retrieve("anything") == []
        index.add([*PASSAGES, Passage("the sea", id="s", source="sea.txt", metadata={"page": 3})])
        found = retriever.retrieve("the sea")
        hits = index.search("the sea", len(PASSAGES) + 1)
        assert [(one.node_id, one.score) for one in found] == [(hit.passage.id, hit.score) for hit in hits]
        (sea,) = [one.node for one in found if one.node_id == "s"]
        assert sea == TextNode(id_="s", text="the sea", metadata={"page": 3, "source": "sea.txt"})
        assert {one.metadata.get("title") for one in found} == {None, *(passage.title for passage in PASSAGES)}
        assert await retriever.aretrieve("the sea") == found
        assert index.fingerprints() == {fresh.reader.compressor.fingerprint: len(PASSAGES) + 1}
        with pytest.raises(InputError, match="The question is empty"):
            retriever.retrieve(" ")


def test_a_store_over_an_index_of_another_making(tmp_path: Path) -> None:
    with PassageIndex.open(tmp_path / "index", embedder=Letters()) as index:
        index.add(PASSAGES)
        store = VistVectorStore(index=index)
        embedding = VistEmbedding(Letters())
        query = VectorStoreQuery(query_embedding=embedding.get_query_embedding("the sea"), similarity_top_k=2)
        assert store.query(query).ids == [hit.passage.id for hit in index.search("the sea", 2)]


async def test_an_embedding_is_that_of_its_embedder() -> None:
    embedding, letters = VistEmbedding(Letters()), Letters()
    assert embedding.model_name == "letters"
    texts = ["the sea", "the lake"]
    assert embedding.get_text_embedding_batch(texts) == letters.encode(texts).tolist()
    assert await embedding.aget_text_embedding_batch(texts) == letters.encode(texts).tolist()
    assert await embedding.aget_text_embedding("a") == embedding.get_text_embedding("a")
    assert embedding.get_query_embedding("a") == letters.encode(["a"], query=True)[0].tolist()
    assert await embedding.aget_query_embedding("a") == embedding.get_query_embedding("a")
