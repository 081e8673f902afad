"""``vist-rag serve``: OpenAI's own client, and those who mean it harm."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.benchmarks import load_benchmark
from tests.support.cli import WordEmbedder, failure
from tests.support.server import asking, client_of, post, serving, until
from tests.support.tiny import save_tiny_checkpoint
from vist_rag.budget import Budget
from vist_rag.generation import Sampling
from vist_rag.pipeline import VistRAG, encode_lacking
from vist_rag.reader import Said
from vist_rag.retrieval import PassageIndex
from vist_rag.serving import Limits
from vist_rag.types import Passage

PASSAGES = [
    Passage("The old bridge was built in 1867 by Marie Curie.", "p0", "The bridge", "bridge.txt", {"page": 7}),
    Passage("A river runs from the lake to the sea.", "p1", "The river"),
    Passage("Marie Curie was born by the sea, and the sea was old.", "p2", "Marie Curie"),
    Passage("Answer the question: the document is from 1867.", "p3"),
]
QUESTIONS = ["who built the old bridge", "where runs the river", "who was born by the sea", "from when is the document"]
KEY = "a-key-of-these-tests"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def rag(checkpoint: Path, directory: Path) -> Iterator[VistRAG]:
    with PassageIndex.open(directory, embedder=WordEmbedder()) as index:
        index.add(PASSAGES)
        rag = VistRAG.from_pretrained(checkpoint, index)
        for _ in encode_lacking(index, rag.compressor):
            pass
        yield rag


@pytest.fixture(scope="module")
def url(rag: VistRAG) -> Iterator[str]:
    with serving(rag, limits=Limits(max_tokens=64)) as url:
        yield url


@contextmanager
def endless(rag: VistRAG, pause_s: float) -> Iterator[list[int]]:
    """The generator takes a pause for each token, and never ends by itself. Yields a list with a place a token."""
    steps: list[int] = []

    def slow(_module: Any, _arguments: Any, output: Any) -> None:
        time.sleep(pause_s)
        steps.append(1)
        output.logits[..., rag.generator.tokenizer.eos_token_id] = -1e9

    hook = rag.generator.model.register_forward_hook(slow)
    try:
        yield steps
    finally:
        hook.remove()


def test_an_answer_is_the_library_s_with_citations_and_usage(url: str, rag: VistRAG) -> None:
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["vist-rag"]
    assert client.models.retrieve("vist-rag").owned_by == "vist-rag"
    for question in QUESTIONS:
        expected = rag.answer(question)
        given = client.chat.completions.create(**asking(question))
        message, usage = given.choices[0].message, given.usage
        assert (message.role, message.content) == ("assistant", expected.text)
        assert [(c["id"], c["mode"], c["text"]) for c in message.citations] == [
            (c.passage.id, c.mode, c.passage.text) for c in expected.citations
        ]
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            expected.usage.prompt_tokens,
            expected.usage.completion_tokens,
        )
        assert usage.prompt_tokens_details.origin_tokens == expected.usage.origin_tokens
        assert usage.prompt_tokens_details.compressed_tokens == expected.usage.compressed_tokens
        full = expected.usage.completion_tokens == rag.max_new_tokens
        assert given.choices[0].finish_reason == ("length" if full else "stop")
    first = client.chat.completions.create(**asking(QUESTIONS[0])).choices[0].message.citations[0]
    assert (first["id"], first["source"], first["metadata"]) == ("p0", "bridge.txt", {"page": 7})


async def test_asynchronous_clients_get_each_its_own_answer(url: str, rag: VistRAG) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    asked = QUESTIONS * 6
    given = await asyncio.gather(*(client.chat.completions.create(**asking(question)) for question in asked))
    expected = {question: rag.answer(question) for question in QUESTIONS}
    for question, one in zip(asked, given, strict=True):
        assert one.choices[0].message.content == expected[question].text
        assert one.choices[0].message.citations[0]["id"] == expected[question].citations[0].passage.id
    assert len({one.id for one in given}) == len(given)
    stream = await client.chat.completions.create(**asking(QUESTIONS[0], stream=True))
    pieces = [event.choices[0].delta.content async for event in stream]
    assert "".join(pieces).strip().lower() == expected[QUESTIONS[0]].text.lower()
    await client.close()


def test_a_stream_comes_in_pieces_and_ends_with_what_supports_it(url: str, rag: VistRAG) -> None:
    client = client_of(url)
    for question in QUESTIONS:
        expected = rag.answer(question)
        *events, last, usage = client.chat.completions.create(
            **asking(question, stream=True, stream_options={"include_usage": True})
        )
        joined = "".join(event.choices[0].delta.content for event in events)
        assert joined.strip().lower() == expected.text.lower()
        assert [event.choices[0].delta.role for event in (*events, last)] == ["assistant"] + [None] * len(events)
        assert last.choices[0].finish_reason in ("stop", "length")
        assert last.choices[0].delta.written == expected.text
        assert [c["id"] for c in last.choices[0].delta.citations] == [c.passage.id for c in expected.citations]
        assert usage.choices == []
        assert usage.usage.completion_tokens == expected.usage.completion_tokens
        assert len({event.id for event in (*events, last, usage)}) == 1
    assert all(event.usage is None for event in client.chat.completions.create(**asking(question, stream=True)))


@pytest.mark.parametrize("stream", [False, True])
def test_options_are_the_library_s(url: str, rag: VistRAG, stream: bool) -> None:
    client, question = client_of(url), QUESTIONS[0]
    tight = Budget(0, 2, latents=16, tokens=9, policy="by_rank")
    sampled = Sampling(temperature=1.5, top_p=0.9, seed=3)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"extra_body": {"vist_rag": {"k_raw": 1, "k_memory": 2}}}, {"budget": Budget(1, 2, latents=16)}),
        ({"extra_body": {"vist_rag": {"tokens": 9, "policy": "by_rank"}}}, {"budget": tight}),
        ({"max_tokens": 2}, {"max_new_tokens": 2}),
        ({"max_completion_tokens": 3, "max_tokens": 2}, {"max_new_tokens": 3}),
        ({"temperature": 1.5, "top_p": 0.9, "seed": 3, "max_tokens": 20}, {"sampling": sampled, "max_new_tokens": 20}),
        ({"stop": rag.answer(question).text[1:3]}, {"stop": [rag.answer(question).text[1:3]]}),
    ]
    texts = set()
    for sent, meant in cases:
        expected, given = (
            rag.answer(question, **meant),
            client.chat.completions.create(**asking(question, stream=stream, **sent)),
        )
        texts.add(expected.text)
        if stream:
            last = list(given)[-1].choices[0]
            text, citations = last.delta.written, last.delta.citations
        else:
            text, citations = given.choices[0].message.content, given.choices[0].message.citations
            assert given.usage.prompt_tokens_details.compressed_tokens == expected.usage.compressed_tokens
            assert given.usage.prompt_tokens_details.budget == expected.usage.budget
        assert text == expected.text
        assert [(c["id"], c["mode"]) for c in citations] == [(c.passage.id, c.mode) for c in expected.citations]
    assert len(texts) > 3  # the options do something


def test_a_conversation_is_read_whole_and_searched_by_its_last_question(url: str, rag: VistRAG) -> None:
    client, question = client_of(url), QUESTIONS[0]
    messages = [
        {"role": "developer", "content": "answer the question"},
        {"role": "user", "content": QUESTIONS[1]},
        {"role": "assistant", "content": "to the sea"},
        {"role": "user", "content": [{"type": "text", "text": question}]},
    ]
    options = {"extra_body": {"vist_rag": {"k_raw": 1, "k_memory": 2}}}
    given = client.chat.completions.create(model="vist-rag", messages=messages, **options)
    raw, *memories = rag.mark(rag.index.search(question, 3), Budget(1, 2, latents=16))
    shown = [rag.write(one.hit.passage, one.ref) for one in (*reversed(memories), raw)]
    last = "".join(shown) + f"Question: {question}\nAnswer:"
    said = [Said("system", "answer the question"), Said("user", QUESTIONS[1]), Said("assistant", "to the sea")]
    expected, alone = rag.reply([*said, Said("user", last)]), rag.answer(question, budget=Budget(1, 2, latents=16))
    message, usage = given.choices[0].message, given.usage
    assert message.content == expected.text
    assert usage.prompt_tokens == expected.usage.prompt_tokens > alone.usage.prompt_tokens
    assert [(c["id"], c["mode"]) for c in message.citations] == [(c.passage.id, c.mode) for c in alone.citations]
    assert usage.prompt_tokens_details.origin_tokens == alone.usage.origin_tokens
    assert usage.prompt_tokens_details.compressed_tokens == alone.usage.compressed_tokens
    *events, end = client.chat.completions.create(model="vist-rag", messages=messages, stream=True, **options)
    assert "".join(event.choices[0].delta.content for event in events).strip().lower() == expected.text.lower()
    assert end.choices[0].delta.citations == message.citations


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{not json", 400, "body must be JSON"),
        (b"[1, 2]", 400, "body must be a JSON object"),
        (b"", 400, "body must be"),
        (b"\xff\xfe", 400, "body"),
        (asking("who", n=3), 400, "n is not supported here"),
        ({**asking("who"), "model": "gpt-4"}, 404, "model must be 'vist-rag'"),
        (asking("who", max_tokens=65), 400, "max_tokens must be in 1..64, got 65"),
        (asking("who", vist_rag={"k_memory": 5}), 400, "k_raw + k_memory must be in 1..4"),
        (asking("who", vist_rag={"tokens": 9, "rate": 0.5}), 400, "tokens and rate exclude each other"),
        (asking("who", vist_rag={"policy": "by_rank"}), 400, "must have a limit to divide"),
        (asking("who", stop=[""]), 400, "stop must be a list of strings"),
        (asking("w" * 20_001), 400, "20,000"),
        (asking("the sea " * 2_000), 400, "must fit 512 positions"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_told_as_openai_does(url: str, body: Any, status: int, said: str, stream: bool) -> None:
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    got, _, document = post(url, body)
    assert got == status, document
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert said in document["error"]["message"]


def test_half_a_character_is_read_like_any_other(url: str) -> None:
    status, _, document = post(url, asking("\ud83c who built the old bridge"))
    assert (status, document["choices"][0]["message"]["citations"][0]["id"]) == (200, "p0")


def test_a_key_is_asked_for_and_never_shown(rag: VistRAG, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(rag, api_key=KEY) as url:
        assert client_of(url, KEY).chat.completions.create(**asking(QUESTIONS[0])).choices
        with pytest.raises(openai.AuthenticationError, match="the API key must be the server's"):
            client_of(url, "another").chat.completions.create(**asking(QUESTIONS[0]))
        with urllib.request.urlopen(url.replace("/v1", "/health")) as health:
            assert health.read() == b'{"status":"ok"}'
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url.replace("/v1", path))
    printed = capfd.readouterr()
    logged = "".join(record.getMessage() for record in caplog.records if not record.name.startswith(("openai", "http")))
    assert KEY not in printed.out + printed.err + logged


def test_other_hosts_are_not_served(rag: VistRAG) -> None:
    with serving(rag, allowed_hosts=["127.0.0.1"]) as url:
        request = urllib.request.Request(f"{url}/models", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
        assert urllib.request.urlopen(f"{url}/models").status == 200


def test_a_large_body_is_refused_however_it_comes(rag: VistRAG) -> None:
    with serving(rag, limits=Limits(max_body_bytes=1000)) as url:
        for body in (b" " * 10_000_000, (b" " * 600 for _ in range(3))):
            status, _, document = post(url, body)
            assert (status, document["error"]["code"]) == (413, "body_too_large")
            assert "1,000 bytes" in document["error"]["message"]
        assert post(url, asking(QUESTIONS[0]))[0] == 200


def test_who_comes_to_a_full_house_is_told_to_come_again(rag: VistRAG) -> None:
    with endless(rag, 0.05), serving(rag, limits=Limits(max_in_flight=1)) as url:
        stream = client_of(url).chat.completions.create(**asking(QUESTIONS[0], stream=True, max_tokens=300))
        assert next(iter(stream))
        status, headers, document = post(url, asking(QUESTIONS[1]))
        assert (status, headers["retry-after"], document["error"]["code"]) == (429, "1", "too_many_requests")
        stream.close()
        assert until(lambda: post(url, asking(QUESTIONS[1], max_tokens=1))[0] == 200)


def test_a_stream_leaves_the_server_free_and_stops_with_its_client(rag: VistRAG) -> None:
    with endless(rag, 0.02) as steps, serving(rag, limits=Limits(max_streams=1)) as url:
        health, metrics = (url.replace("/v1", path) for path in ("/health", "/metrics"))
        stream = client_of(url).chat.completions.create(**asking(QUESTIONS[0], stream=True, max_tokens=400))
        assert next(iter(stream))
        before = len(steps)
        assert urllib.request.urlopen(health, timeout=5).status == 200
        assert len(steps) < 400  # it was answered meanwhile
        stream.close()
        assert until(lambda: b"requests_in_flight 0.0" in urllib.request.urlopen(metrics).read())
        time.sleep(0.3)
        stopped = len(steps)
        assert before < stopped < 300
        time.sleep(0.3)
        assert len(steps) == stopped
        # The place of the one that left is free.
        assert list(client_of(url).chat.completions.create(**asking(QUESTIONS[1], stream=True, max_tokens=2)))


def test_time_runs_out_before_a_stream_and_within_it(rag: VistRAG) -> None:
    with endless(rag, 0.05) as steps, serving(rag, limits=Limits(timeout_s=1.0)) as url:
        begin = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="took longer"):
            client_of(url, max_retries=2).chat.completions.create(**asking(QUESTIONS[0], max_tokens=100))
        assert time.monotonic() - begin < 5  # the client is told not to try again
        stream = client_of(url).chat.completions.create(**asking(QUESTIONS[0], stream=True, max_tokens=400))
        seen = []
        with pytest.raises(openai.APIError, match="took longer"):
            seen += list(stream)
        assert until(lambda: len(steps) < 400)


def test_metrics_add_up_to_what_was_answered(rag: VistRAG) -> None:
    with serving(rag) as url:
        client = client_of(url)
        spent = [client.chat.completions.create(**asking(question)).usage for question in QUESTIONS]
        list(client.chat.completions.create(**asking(QUESTIONS[0], stream=True)))
        post(url, b"{")
        spent.append(spent[0])
        lines = urllib.request.urlopen(url.replace("/v1", "/metrics")).read().decode().splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(told['vist_rag_tokens_total{kind="prompt"}']) == sum(one.prompt_tokens for one in spent)
    assert float(told['vist_rag_tokens_total{kind="completion"}']) == sum(one.completion_tokens for one in spent)
    for kind in ("origin", "compressed"):
        total = sum(getattr(one.prompt_tokens_details, f"{kind}_tokens") for one in spent)
        assert float(told[f'vist_rag_tokens_total{{kind="{kind}"}}']) == total
    assert told['vist_rag_requests_total{status="200"}'] == "5.0"
    assert told['vist_rag_requests_total{status="400"}'] == "1.0"
    assert told["vist_rag_request_seconds_count"] == "5.0"
    assert told["vist_rag_first_token_seconds_count"] == "1.0"


@pytest.mark.slow
def test_under_load_and_sigterm_no_answer_is_lost_or_mixed_up(
    checkpoint: Path, directory: Path, rag: VistRAG, tmp_path: Path
) -> None:
    assert len(rag.index) == len(PASSAGES)  # with the memories
    serve = [sys.executable, "-m", "tests.support.cli", "serve", "--index", str(directory), "--model", str(checkpoint)]
    result = load_benchmark("serve_load").load(3, 6, [*serve, "--port", "0"], QUESTIONS[:2], tmp_path / "log")
    assert result["held"], result
    assert result["stop"]["exit_code"] == 0
    assert result["answers"] > 6
    assert {what.split(":")[0] for what in result["rude"]} >= {"wrong_key", "broken_json", "large_body"}


def test_without_a_key_other_machines_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIST_RAG_API_KEY", raising=False)
    said = failure("serve", "--index", tmp_path, "--host", "0.0.0.0")
    assert "--host must be an address of this machine alone" in said
    assert "--api-key-file" in said
    (tmp_path / "key").write_text("two words\n")
    assert "must hold a key of visible ASCII" in failure(
        "serve", "--index", tmp_path, "--api-key-file", tmp_path / "key"
    )
    monkeypatch.setenv("VIST_RAG_API_KEY", "")
    assert "$VIST_RAG_API_KEY must hold a key" in failure("serve", "--index", tmp_path)


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vist_rag.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'vist-rag[serve]'" in failure("serve", "--index", tmp_path)
