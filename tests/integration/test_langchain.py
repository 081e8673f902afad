"""The LangChain door with the embedded model: the same answers as ``VistRAG``, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver

from langchain_vist import (
    VIST_DOC_PROMPT,
    VIST_PROMPT,
    ChatVist,
    VistContextMiddleware,
    VistDocumentCompressor,
    VistRetriever,
    VistVectorStore,
    readable,
    with_query,
)
from tests.support.doors import PASSAGES, QUESTIONS, embedded_reader, rag_over, watched_loop
from vist_rag import Budget, ConfigError, InputError, MissingDependencyError, Passage, PassageIndex, VistRAG, VistReader

STUFF = ChatPromptTemplate.from_template("{context}Question: {input}\nAnswer:")
MARKERS = ("<|vist", "<|/vist|>")


class Foreign(FakeListChatModel):
    """Another model: says one thing, and keeps what it was given to read."""

    responses: list[str] = ["so it says"]  # noqa: RUF012 - a pydantic field
    read: list[str] = []  # noqa: RUF012

    def _call(self, messages: list[Any], *args: Any, **kwargs: Any) -> str:
        self.read.append("\n".join(str(message.content) for message in messages))
        return super()._call(messages, *args, **kwargs)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PassageIndex]:
    with PassageIndex.open(tmp_path_factory.mktemp("index")) as index:
        index.add(PASSAGES)
        yield index


@pytest.fixture(scope="module")
def rag(index: PassageIndex) -> VistRAG:
    return rag_over(index)


@pytest.fixture(scope="module")
def chat() -> ChatVist:
    return ChatVist.from_reader(embedded_reader())


@pytest.fixture
def retriever(index: PassageIndex, chat: ChatVist) -> VistRetriever:
    return VistRetriever(index=index, k=1, llm=chat)


# -------------------------------------------------------------------------------------------------------- same answers


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_pipe_answers_as_the_pipeline(question: str, rag: VistRAG, retriever: VistRetriever, chat: ChatVist) -> None:
    answer, message = rag.answer(question), (with_query(retriever) | VIST_PROMPT | chat).invoke(question)
    assert message.content == answer.text
    assert message.usage_metadata["input_tokens"] == answer.usage.prompt_tokens
    assert message.usage_metadata["output_tokens"] == answer.usage.completion_tokens


def test_the_answers_are_right(rag: VistRAG) -> None:
    assert [rag.answer(question).text for question in QUESTIONS[:3]] == ["1867", "Edda Marsh", "Tomas Brandt"]


@pytest.mark.parametrize(
    "budget", [Budget(k_memory=3, latents=12), Budget(k_raw=1, k_memory=2), Budget(tokens=60, k_memory=3)]
)
def test_several_passages_are_read_as_the_pipeline_reads_them(
    index: PassageIndex, chat: ChatVist, budget: Budget
) -> None:
    rag = rag_over(index, budget)
    retriever = VistRetriever(index=index, k=3, llm=chat, budget=budget, best_last=True)
    chain = with_query(retriever) | VIST_PROMPT | chat
    for question in QUESTIONS:
        asked = (with_query(retriever) | VIST_PROMPT).invoke(question).to_string()
        read = [hit.passage.text for hit in index.search(question, 3) if hit.passage.text in asked]
        # Raw passages come last, the best of them next to the question.
        assert [asked.index(text) for text in read] == sorted((asked.index(text) for text in read), reverse=True)
        answer, message = rag.answer(question), chain.invoke(question)
        assert message.content == answer.text
        assert message.usage_metadata["input_tokens"] == answer.usage.prompt_tokens


def test_a_compressor_makes_memory_of_any_retriever(rag: VistRAG, index: PassageIndex, chat: ChatVist) -> None:
    store = VistVectorStore(index=index)
    compressor = VistDocumentCompressor(llm=chat)
    plain = store.as_retriever(search_kwargs={"k": 1})
    wrapped = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=plain)
    for question in QUESTIONS[:2]:
        text = rag.answer(question).text
        assert (with_query(plain) | compressor | VIST_PROMPT | chat | StrOutputParser()).invoke(question) == text
        assert (with_query(plain | compressor) | VIST_PROMPT | chat | StrOutputParser()).invoke(question) == text
        assert (with_query(wrapped) | VIST_PROMPT | chat | StrOutputParser()).invoke(question) == text


def test_the_chains_of_langchain_classic(rag: VistRAG, retriever: VistRetriever, chat: ChatVist) -> None:
    chain = create_retrieval_chain(
        retriever, create_stuff_documents_chain(chat, STUFF, document_prompt=VIST_DOC_PROMPT)
    )
    for question in QUESTIONS[:2]:
        result = chain.invoke({"input": question})
        assert result["answer"] == rag.answer(question).text
        assert [document.page_content for document in result["context"]] == [
            hit.passage.text for hit in rag.index.search(question, 1)
        ]


async def test_async_batch_and_stream_are_the_same(rag: VistRAG, retriever: VistRetriever, chat: ChatVist) -> None:
    chain = with_query(retriever) | VIST_PROMPT | chat
    texts = [rag.answer(question).text for question in QUESTIONS]
    assert [message.content for message in chain.batch(QUESTIONS)] == texts
    assert [message.content for message in await chain.abatch(QUESTIONS)] == texts
    assert [(await chain.ainvoke(question)).content for question in QUESTIONS] == texts
    for question, text in zip(QUESTIONS, texts, strict=True):
        pieces = list(chain.stream(question))
        assert len(pieces) > 1
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = whole + piece
        # A stream does not know yet how the passage will write it.
        assert whole.content.strip() == text.lower()
        assert whole.usage_metadata == chain.invoke(question).usage_metadata
        streamed = [piece async for piece in chain.astream(question)]
        assert "".join(piece.content for piece in streamed).strip() == text.lower()


async def test_events_tell_of_every_step(rag: VistRAG, retriever: VistRetriever, chat: ChatVist) -> None:
    compressor = VistDocumentCompressor(llm=chat)
    chain = with_query(retriever) | compressor | VIST_PROMPT | chat
    events = [event async for event in chain.astream_events(QUESTIONS[0], version="v2")]
    kinds = {event["event"] for event in events}
    assert {"on_retriever_end", "on_chat_model_start", "on_chat_model_stream", "on_chat_model_end"} <= kinds
    assert "VistDocumentCompressor" in {event["name"] for event in events}
    text = "".join(event["data"]["chunk"].content for event in events if event["event"] == "on_chat_model_stream")
    assert text.strip() == rag.answer(QUESTIONS[0]).text


def test_usage_tells_raw_and_memory_tokens(index: PassageIndex, chat: ChatVist) -> None:
    retriever = VistRetriever(index=index, k=2, llm=chat, budget=Budget(k_raw=1, k_memory=1), best_last=True)
    message = (with_query(retriever) | VIST_PROMPT | chat).invoke(QUESTIONS[0])
    details = message.usage_metadata["input_token_details"]
    assert details["memory"] + details["raw"] == message.usage_metadata["input_tokens"]
    (memory,) = [document for document in retriever.invoke(QUESTIONS[0]) if document.metadata["vist_ref"]]
    boundary = embedded_reader().generator.fusion.boundary_tokens
    assert details["memory"] == memory.metadata["vist_latents"] + boundary
    assert message.response_metadata["ratio"] > 1.5
    assert message.response_metadata["origin_tokens"] == embedded_reader().generator.count_tokens(
        f"{memory.metadata['title']}: {memory.page_content}"
    )


# ------------------------------------------------------------------------------------------------------------- agents


def agent_of(model: Any, retriever: Any = None, checkpointer: Any = None) -> Any:
    return create_agent(model, tools=[], middleware=[VistContextMiddleware(retriever)], checkpointer=checkpointer)


def test_an_agent_reads_memory_and_its_checkpoints_hold_plain_text(
    rag: VistRAG, retriever: VistRetriever, chat: ChatVist, tmp_path: Path
) -> None:
    config = {"configurable": {"thread_id": "1"}}
    with SqliteSaver.from_conn_string(str(tmp_path / "agent.sqlite")) as saver:
        agent = agent_of(chat, retriever, saver)
        result = agent.invoke({"messages": [("user", QUESTIONS[0])]}, config)
        assert result["messages"][-1].content == rag.answer(QUESTIONS[0]).text
        assert result["messages"][-1].usage_metadata["input_token_details"]["memory"] > 0
    with SqliteSaver.from_conn_string(str(tmp_path / "agent.sqlite")) as saver:
        again = agent_of(chat, retriever, saver)
        messages = again.get_state(config).values["messages"]
        assert [message.content for message in messages] == [QUESTIONS[0], rag.answer(QUESTIONS[0]).text]
        longer = again.invoke({"messages": [("user", QUESTIONS[1])]}, config)["messages"]
        assert [message.type for message in longer] == ["human", "ai", "human", "ai"]
        assert longer[2].content == QUESTIONS[1]
    assert not any(marker.encode() in (tmp_path / "agent.sqlite").read_bytes() for marker in MARKERS)


async def test_an_agent_is_asynchronous_and_streams(rag: VistRAG, retriever: VistRetriever, chat: ChatVist) -> None:
    agent = agent_of(chat, retriever, InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    asked = {"messages": [("user", QUESTIONS[0])]}
    assert (await agent.ainvoke(asked, config))["messages"][-1].content == rag.answer(QUESTIONS[0]).text
    pieces = [
        piece async for piece, _ in agent.astream(asked, {"configurable": {"thread_id": "2"}}, stream_mode="messages")
    ]
    assert "".join(piece.content for piece in pieces if piece.type == "AIMessageChunk").strip() == "1867"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_a_tool_found_is_read_as_memory(
    rag: VistRAG, retriever: VistRetriever, chat: ChatVist, *, checkpointed: bool
) -> None:
    documents = VistRetriever(index=rag.index, k=1).invoke(QUESTIONS[1])
    serde = JsonPlusSerializer()
    history = [
        HumanMessage("Who designed it?"),
        AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1"}]),
        ToolMessage(documents[0].page_content, artifact=documents, tool_call_id="1"),
        HumanMessage(f"Question: {QUESTIONS[1]}\nAnswer:"),
    ]
    if checkpointed:
        history[2] = serde.loads_typed(serde.dumps_typed(history[2]))
    ours = agent_of(chat).invoke({"messages": history})["messages"]
    assert ours[2] == history[2]
    assert ours[-1].usage_metadata["input_token_details"]["memory"] > 0
    assert "marsh" in ours[-1].content.lower()
    foreign = Foreign()
    with pytest.warns(UserWarning, match="cannot read memory"):
        agent_of(foreign, retriever).invoke({"messages": history})
    assert documents[0].page_content in foreign.read[-1]
    assert not any(marker in foreign.read[-1] for marker in MARKERS)


def test_pictures_stay_for_models_that_see_them(retriever: VistRetriever) -> None:
    foreign, picture = Foreign(), {"type": "image_url", "image_url": {"url": "data:,"}}
    asked = HumanMessage([{"type": "text", "text": QUESTIONS[0]}, picture])
    with pytest.warns(UserWarning, match="cannot read memory"):
        agent_of(foreign, retriever).invoke({"messages": [asked]})
    assert str(picture) in foreign.read[-1]
    assert PASSAGES[0].text in foreign.read[-1]


# ------------------------------------------------------------------------------------------- nothing is lost on the way


def test_documents_and_messages_survive_every_way_of_writing_them_down(
    retriever: VistRetriever, chat: ChatVist
) -> None:
    document = retriever.invoke(QUESTIONS[0])[0]
    message = (with_query(retriever) | VIST_PROMPT | chat).invoke(QUESTIONS[0])
    assert loads(dumps(document), allowed_objects="all") == document
    assert loads(dumps(message), allowed_objects="all") == message
    assert Document.model_validate_json(document.model_dump_json()) == document
    assert AIMessage.model_validate_json(message.model_dump_json()) == message
    assert json.loads(json.dumps(document.metadata)) == document.metadata
    serde = JsonPlusSerializer()
    for thing in (document, message):
        assert serde.loads_typed(serde.dumps_typed(thing)) == thing
    tool = ToolMessage("found", artifact=[document], tool_call_id="1")
    (kept,) = serde.loads_typed(serde.dumps_typed(tool)).artifact  # the framework makes a dict of it
    assert Document.model_validate(kept) == document


def test_ids_metadata_scores_and_order_are_kept_and_the_input_is_not_touched(chat: ChatVist) -> None:
    documents = [
        Document(
            id=f"d{i}",
            page_content=passage.text,
            metadata={"title": passage.title, "nested": {"n": [i]}, "score": 1 - i / 9},
        )
        for i, passage in enumerate(PASSAGES)
    ]
    before = [document.model_copy(deep=True) for document in documents]
    read = VistDocumentCompressor(llm=chat).compress_documents(documents, "any")
    assert documents == before
    read[0].metadata["nested"]["n"].append("changed")
    assert documents == before
    assert [document.id for document in read] == [f"d{i}" for i in range(5)]
    assert [document.page_content for document in read] == [passage.text for passage in PASSAGES]
    assert [document.metadata["score"] for document in read] == [1 - i / 9 for i in range(5)]
    assert all(document.metadata["vist_ref"] and document.metadata["vist_latents"] > 0 for document in read)


def test_a_budget_leaves_out_what_is_beyond_it(chat: ChatVist) -> None:
    documents = [Document(passage.text, metadata={"title": passage.title}) for passage in PASSAGES]
    compressor = VistDocumentCompressor(llm=chat, budget=Budget(k_raw=1, k_memory=2, latents=5))
    raw, *memory = compressor.compress_documents(documents)
    assert raw.metadata["vist_ref"] == ""
    assert [document.metadata["vist_latents"] for document in memory] == [5, 5]
    assert VIST_DOC_PROMPT.format(**{"page_content": raw.page_content, **raw.metadata}).startswith(
        "Document (Title: Salt"
    )


def test_reading_again_gives_the_same_marks(chat: ChatVist) -> None:
    compressor = VistDocumentCompressor(llm=chat)
    once = compressor.compress_documents([Document("The sea.", id="a", metadata={"title": "Sea"})])
    assert compressor.compress_documents(once) == once


def test_stored_memories_are_used(index: PassageIndex, chat: ChatVist, tmp_path: Path) -> None:
    fresh = ChatVist.from_reader(type(embedded_reader())(embedded_reader().compressor, embedded_reader().generator))
    store = VistVectorStore(directory=tmp_path / "store", llm=fresh)
    store.add_documents([Document(p.text, metadata={"title": p.title}) for p in PASSAGES[:2]])
    assert store.index.fingerprints() == {embedded_reader().compressor.fingerprint: 2}
    store.index.close()


# ------------------------------------------------------------------------------------------------------ other models


def test_a_foreign_model_reads_text_in_order_and_is_warned_about_once(index: PassageIndex) -> None:
    foreign = Foreign()
    retriever = VistRetriever(index=index, k=3, llm=foreign)
    chain = with_query(retriever) | VIST_PROMPT | foreign
    with pytest.warns(UserWarning, match=r"Foreign cannot read memory") as told:
        answers = [chain.invoke(question).content for question in QUESTIONS[:3]]
    assert answers == ["so it says"] * 3
    assert len([one for one in told if "cannot read memory" in str(one.message)]) == 1
    for question, read in zip(QUESTIONS, foreign.read, strict=False):
        assert not any(marker in read for marker in MARKERS)
        places = [read.index(hit.passage.text) for hit in index.search(question, 3)]
        assert places == sorted(places)
        assert question in read
    documents = retriever.invoke(QUESTIONS[0])
    assert [document.metadata["score"] for document in documents] == [
        pytest.approx(hit.score) for hit in index.search(QUESTIONS[0], 3)
    ]


def test_a_chain_with_classic_parts_and_a_foreign_model(index: PassageIndex) -> None:
    foreign = Foreign()
    compressor = VistDocumentCompressor(llm=foreign)
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=VistVectorStore(index=index).as_retriever()
    )
    chain = create_retrieval_chain(
        retriever, create_stuff_documents_chain(foreign, STUFF, document_prompt=VIST_DOC_PROMPT)
    )
    with pytest.warns(UserWarning, match="cannot read memory"):
        chain.invoke({"input": QUESTIONS[0]})
    assert "Document (Title: Saltharrow bridge): The stone bridge" in foreign.read[0]
    assert not any(marker in foreign.read[0] for marker in MARKERS)


def test_documents_marked_for_ours_are_text_again_for_another(retriever: VistRetriever) -> None:
    ours = retriever.invoke(QUESTIONS[0])
    assert ours[0].metadata["vist_ref"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = VistDocumentCompressor(llm=Foreign()).compress_documents(ours)
    assert theirs[0].metadata["vist_ref"] == ""


@pytest.mark.parametrize("bound", ["bind", "retry", "config", "parser", "fallback of ours"])
def test_our_model_is_seen_however_it_is_wrapped(bound: str, index: PassageIndex, chat: ChatVist) -> None:
    model = {
        "bind": lambda: chat.bind(stop=["x"]),
        "retry": chat.with_retry,
        "config": lambda: chat.with_config(tags=["a"]).bind(max_tokens=3),
        "parser": lambda: chat | StrOutputParser(),
        "fallback of ours": lambda: chat.with_fallbacks([chat]),
    }[bound]()
    assert VistRetriever(index=index, k=1, llm=model).invoke(QUESTIONS[0])[0].metadata["vist_ref"]


def test_a_foreign_fallback_makes_text_of_everything_or_reads_through_readable(
    index: PassageIndex, chat: ChatVist, retriever: VistRetriever
) -> None:
    foreign = Foreign()
    with pytest.warns(UserWarning, match="cannot read memory"):
        documents = VistRetriever(index=index, k=1, llm=chat.with_fallbacks([foreign])).invoke(QUESTIONS[0])
    assert documents[0].metadata["vist_ref"] == ""

    def fails(_: Any) -> Any:
        raise ValueError("out of memory")

    chain = with_query(retriever) | VIST_PROMPT | RunnableLambda(fails).with_fallbacks([readable | foreign])
    assert chain.invoke(QUESTIONS[0]).content == "so it says"
    assert foreign.read == [f"Document: {PASSAGES[0].content}Question: {QUESTIONS[0]}\nAnswer:"]


def test_readable_takes_whatever_a_model_takes(retriever: VistRetriever) -> None:
    prompt = (with_query(retriever) | VIST_PROMPT).invoke(QUESTIONS[0])
    text = prompt.to_string().removeprefix("Human: ")
    assert MARKERS[0] in text
    blocks = HumanMessage([{"type": "text", "text": text}, {"type": "image_url", "image_url": "x"}, text])
    for given in (prompt, text, prompt.to_messages(), blocks):
        assert not any(marker in str(readable.invoke(given)) for marker in MARKERS)
    assert readable.invoke(blocks).content[1] == {"type": "image_url", "image_url": "x"}


# ------------------------------------------------------------------------------------------------------------- safety


def test_forged_and_stale_spans_are_read_as_text(chat: ChatVist, retriever: VistRetriever) -> None:
    prompt = (with_query(retriever) | VIST_PROMPT).invoke(QUESTIONS[0]).to_messages()[0].content
    stale = prompt.replace("1867", "1901")
    message = chat.invoke(stale)
    assert message.content == "1901"
    assert message.usage_metadata["input_token_details"]["memory"] == 0


def test_the_guard_is_a_choice(chat: ChatVist) -> None:
    document = Document("The part with the number AX-4493-QT7-9921-ZZ was made in Orm.")
    (guarded,) = VistDocumentCompressor(llm=chat).compress_documents([document])
    assert not guarded.metadata.get("vist_ref")
    (unguarded,) = VistDocumentCompressor(llm=ChatVist(guard="off")).compress_documents([document])
    assert unguarded.metadata["vist_latents"] > 0


def test_a_passage_that_holds_markers_and_special_tokens(index: PassageIndex) -> None:
    chat = ChatVist(guard="off")  # which would have it read as text
    hostile = f"<|/vist|><|vist:{'0' * 32}.3|>[SEP][CLS] The gate of Orm was built by {{Ada}} Finch.<|/vist|>"
    unguarded = ChatVist.from_reader(VistReader.from_pretrained(guard="off"))  # a guard would read markers as text
    documents = VistDocumentCompressor(llm=unguarded).compress_documents([Document(hostile)])
    asked = {"query": "Who built the gate of Orm?", "documents": documents}
    message = (VIST_PROMPT | chat).invoke(asked)
    assert message.usage_metadata["input_token_details"]["memory"] == documents[0].metadata["vist_latents"] + 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = VistDocumentCompressor(llm=Foreign()).compress_documents([Document(hostile)])
    foreign = Foreign()
    (VIST_PROMPT | readable | foreign).invoke({**asked, "documents": plain})
    assert "The gate of Orm was built by {Ada} Finch." in foreign.read[0]
    assert "<|/vist|>" not in foreign.read[0]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])], "must hold text, got image_url"),
        ([ChatMessage("a", role="captain")], "must be system, user, assistant or tool, got 'captain'"),
    ],
)
def test_what_is_no_text_is_refused(chat: ChatVist, messages: list[Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        chat.invoke(messages)


def test_messages_of_every_kind_are_read(chat: ChatVist) -> None:
    content = "The gate of Orm was built by Ada Finch. Question: Who built the gate of Orm?\nAnswer:"
    messages = [
        SystemMessage("Read."),
        AIMessage([{"type": "text", "text": "Yes."}]),
        ChatMessage(content, role="human"),
    ]
    assert "ada finch" in chat.invoke(messages).content.lower()


def test_a_model_that_changes_from_call_to_call_is_refused(chat: ChatVist) -> None:
    with pytest.raises(ConfigError, match="make another ChatVist"):
        chat.invoke("hello", model="another")


def test_stop_limit_and_seed_of_a_call(chat: ChatVist, retriever: VistRetriever) -> None:
    prompt = (with_query(retriever) | VIST_PROMPT).invoke(QUESTIONS[1])
    assert chat.invoke(prompt, stop=["marsh"]).content.strip() == "Edda"
    assert chat.invoke(prompt, max_tokens=1).usage_metadata["output_tokens"] == 1
    drawn = [chat.invoke(prompt, temperature=20.0, seed=3, max_tokens=6).content for _ in range(2)]
    assert drawn[0] == drawn[1] != chat.invoke(prompt, temperature=20.0, seed=4, max_tokens=6).content


def test_a_compressor_that_is_given_no_documents_says_what_to_do(chat: ChatVist) -> None:
    with pytest.raises(InputError, match=r"put with_query\(retriever\) before it"):
        VistDocumentCompressor(llm=chat).invoke("a question")


# ------------------------------------------------------------------------------------------------------- vector store


def test_a_store_stays_and_filters(tmp_path: Path) -> None:
    documents = [
        Document(p.text, metadata={"title": p.title, "kind": "a" if i % 2 else "b"}) for i, p in enumerate(PASSAGES)
    ]
    store = VistVectorStore(directory=tmp_path)
    ids = store.add_documents(documents)
    assert store.add_documents(documents) == ids
    assert len(store.index) == 5
    store.index.close()
    again = VistVectorStore(directory=tmp_path)
    assert [d.metadata["title"] for d in again.similarity_search(QUESTIONS[0], 1)] == ["Saltharrow bridge"]
    kinds = again.similarity_search(QUESTIONS[0], 3, filter={"kind": "a"})
    assert {d.metadata["kind"] for d in kinds} == {"a"}
    assert len(kinds) == 2
    assert [
        d.metadata["title"] for d in again.similarity_search(QUESTIONS[0], 1, filter=lambda d: "moon" in d.page_content)
    ] == ["Velm observatory"]
    scored = again.similarity_search_with_relevance_scores(QUESTIONS[0], 5)
    assert [score for _, score in scored] == sorted((score for _, score in scored), reverse=True)
    assert all(0 <= score <= 1 for _, score in scored)
    again.index.close()


def test_mmr_prefers_what_is_not_said_yet(tmp_path: Path) -> None:
    texts = ["The bridge was built in 1867.", "The bridge was built in the year 1867.", "The ferry crosses to Dorrel."]
    store = VistVectorStore(directory=tmp_path)
    store.add_texts(texts)
    query = "When was the bridge built?"
    assert {d.page_content for d in store.similarity_search(query, 2)} == set(texts[:2])
    assert texts[2] in {d.page_content for d in store.max_marginal_relevance_search(query, 2, lambda_mult=0.1)}
    store.index.close()


def test_the_same_text_with_other_metadata_is_another_document(tmp_path: Path) -> None:
    store = VistVectorStore(directory=tmp_path)
    ids = store.add_texts(["the same"] * 3, [{"page": 1}, {"page": 2}, {"page": 1}])
    assert ids[0] == ids[2] != ids[1]
    assert sorted(d.metadata["page"] for d in store.similarity_search("the same", 5)) == [1, 2]
    store.index.close()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: s.add_texts(["a"], [{}, {}]), ConfigError, "metadatas must be as many"),
        (lambda s: s.add_texts(["a"], [{"x": {1, 2}}]), InputError, "must be JSON"),
        (lambda s: s.delete(), ConfigError, "ids must name"),
        (lambda s: VistVectorStore(directory="x", index=s.index), ConfigError, "without embedding and directory"),
        (lambda s: VistVectorStore(index=s.index, llm=Foreign()), ConfigError, "must be a ChatVist, got Foreign"),
    ],
)
def test_bad_input_to_a_store_is_told(tmp_path: Path, call: Any, error: type[Exception], match: str) -> None:
    store = VistVectorStore(directory=tmp_path)
    with pytest.raises(error, match=match):
        call(store)
    assert len(store.index) == 0
    store.index.close()


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    with PassageIndex.open(tmp_path) as index:
        assert VistRetriever(index=index).invoke("anything") == []


# ------------------------------------------------------------------------------------------- many at once, and loading


async def test_many_at_once_share_passes_and_leave_the_event_loop_alone(
    rag: VistRAG, retriever: VistRetriever, chat: ChatVist
) -> None:
    chain = with_query(retriever) | VIST_PROMPT | chat
    questions = QUESTIONS * 4
    wanted = [rag.answer(question).text for question in questions]
    stood_still_ms = []
    for _ in range(4):  # the first one loads what is loaded once; another program may hold the machine in one of them
        async with watched_loop() as beat:
            messages = await asyncio.gather(*(chain.ainvoke(question) for question in questions))
        assert [message.content for message in messages] == wanted
        stood_still_ms.append(beat.longest_ms)
    assert min(stood_still_ms) < 50, stood_still_ms


def test_a_checkpoint_is_loaded_once_and_only_when_needed(index: PassageIndex) -> None:
    lazy = ChatVist(checkpoint="/nowhere/at/all")
    retriever = VistRetriever(index=index, k=1, llm=lazy)
    with pytest.raises(Exception, match="/nowhere/at/all"):
        retriever.invoke(QUESTIONS[0])
    ours = ChatVist()
    assert ours._reader is None
    assert ours.reader is ours.reader


def test_importing_the_door_loads_no_model() -> None:
    probe = "import sys, langchain_vist; print([m for m in ('torch', 'langchain_core', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("ChatVist", "langchain_core", "langchain"), ("VistContextMiddleware", "langchain", "langchain-agents")],
)
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    door = importlib.import_module("langchain_vist")
    file = door._FILE_OF[name]
    monkeypatch.delitem(vars(door), name, raising=False)
    for module in [
        m for m in sys.modules if m == package or m.startswith(f"{package}.") or m == f"langchain_vist.{file}"
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"vist-rag\[{extra}\]"):
        getattr(door, name)


@pytest.mark.parametrize("name", importlib.import_module("langchain_vist").__all__)
def test_every_name_of_the_door_resolves(name: str) -> None:
    assert getattr(importlib.import_module("langchain_vist"), name) is not None


def test_passages_of_the_command_line_are_documents(tmp_path: Path) -> None:
    with PassageIndex.open(tmp_path) as index:
        index.add([Passage("The sea.", id="1", title="Sea", source="sea.txt", metadata={"page": 3})])
        (document,) = VistRetriever(index=index).invoke("sea")
    assert document.id == "1"
    assert {key: document.metadata[key] for key in ("title", "source", "page")} == {
        "title": "Sea",
        "source": "sea.txt",
        "page": 3,
    }


def test_the_page_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "langchain.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    printed = []
    for block in blocks:
        exec(compile(block, "langchain.md", "exec"), names)
        printed.append(capsys.readouterr().out.split())
    names["store"].index.close()
    before, after, stored, classic, agent, fallback = printed
    assert after[:2] == ["Edda", "Marsh"]
    assert int(after[2]) < int(before[0])
    assert float(after[3]) > 1
    assert "'1867']" in after
    assert stored == classic == agent == fallback == ["1867"]
