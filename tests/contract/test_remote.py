"""What a generator on a server keeps: it answers as the same model does here, over every endpoint."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GemmaConfig

from tests.support.causal import CHATML, byte_level_tokenizer, causal_generator
from tests.support.serving import RefusalError, StandIn, served
from tests.support.tiny import save_tiny_checkpoint, tiny_compressor
from vist_rag import Budget, Passage, PassageIndex, Said, SearchHit, VistRAG, VistReader
from vist_rag.compression import VisualMemory
from vist_rag.config import FusionConfig
from vist_rag.errors import (
    ConfigError,
    IncompatibleMemoryError,
    InputError,
    MissingDependencyError,
    ServerError,
    ShapeError,
)
from vist_rag.generation import (
    Generation,
    MemorySegment,
    Message,
    Prompt,
    RemoteGenerator,
    Sampling,
    SoftPromptFusion,
    TextSegment,
    VistGenerator,
)

KEY = "sk-a-secret-that-no-error-may-show"
FAMILIES = ("llama", "gpt2", "qwen3", "gemma")


def gemma() -> VistGenerator:
    """A model that scales its embeddings."""
    tokenizer = byte_level_tokenizer("<eos>", eos_token="<eos>")
    config = GemmaConfig(
        vocab_size=340, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    fusion = SoftPromptFusion(FusionConfig(16, 32, hidden_width=32))
    return VistGenerator(AutoModelForCausalLM.from_config(config), tokenizer, fusion)


def save(generator: VistGenerator, directory: Path) -> Path:
    generator.model.save_pretrained(directory)
    generator.tokenizer.save_pretrained(directory)
    generator.fusion.save_pretrained(directory / "fusion")
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = gemma() if request.param == "gemma" else causal_generator(request.param)
    return save(made, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(causal_generator("qwen3"), tmp_path_factory.mktemp("qwen3"))


def load(directory: Path) -> VistGenerator:
    return VistGenerator.from_pretrained(directory, fusion=directory / "fusion", device="cpu", prefix_cache_bytes=0)


def remote(server: StandIn, directory: Path, **settings: Any) -> RemoteGenerator:
    names: dict[str, Any] = {"served_model": "tiny", "device": "cpu", "backoff_s": 0.01} | settings
    return RemoteGenerator.from_pretrained(directory, fusion=directory / "fusion", base_url=server.url, **names)


@pytest.fixture(scope="module")
def local(saved: Path) -> VistGenerator:
    return load(saved)


@pytest.fixture(scope="module")
def local_qwen(qwen: Path) -> VistGenerator:
    return load(qwen)


@pytest.fixture
def server(local: VistGenerator) -> Iterator[StandIn]:
    with served(StandIn(local)) as server:
        yield server


@pytest.fixture
def chat(local_qwen: VistGenerator) -> Iterator[StandIn]:
    with served(StandIn(local_qwen)) as server:
        yield server


def memory(n: int, seed: int = 1, width: int = 16, fingerprint: str = "compressor") -> VisualMemory:
    return VisualMemory(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), fingerprint)


def reading(seed: int, *, between: str = "") -> Prompt:
    text = TextSegment(f"{between}question when was the bridge built answer")
    return Prompt((TextSegment(f"document {between}"), MemorySegment(memory(4 + seed, seed).coarsen(4)), text))


PROMPTS = [*map(reading, range(5)), Prompt((TextSegment("who built the old bridge <s> answer"),))]


def told(generator: VistGenerator, prompt: Prompt, **how: Any) -> tuple[str, Generation]:
    """What a stream gives, and what it returns."""
    stream, pieces = generator.stream(prompt, **how), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return "".join(pieces), end.value


# ----------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("endpoint", ["completions", "generate"])
def test_the_answers_are_those_of_the_model_here(server: StandIn, saved: Path, endpoint: Any) -> None:
    generator = remote(server, saved, endpoint=endpoint)
    local = server.local.generate(PROMPTS, max_new_tokens=12, batch_size=1)
    assert generator.generate(PROMPTS, max_new_tokens=12) == local
    assert len({generation.text for generation in local}) > 3
    # Not one number was changed on the way; Gemma's scale is in them.
    wanted = [rows for rows, _ in server.local.fusion.embed_many(server.local, PROMPTS)]
    got = sorted(server.read[-len(PROMPTS) :], key=lambda rows: (len(rows), rows.sum().item()))
    for ours, theirs in zip(sorted(wanted, key=lambda rows: (len(rows), rows.sum().item())), got, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("endpoint", ["completions", "generate"])
def test_a_stop_string_ends_an_answer_where_it_does_here(server: StandIn, saved: Path, endpoint: Any) -> None:
    whole = server.local.generate(PROMPTS[:1], max_new_tokens=12)[0].text
    stop = [whole[len(whole) // 2 :][:2]]
    local = server.local.generate(PROMPTS, max_new_tokens=12, stop=stop, batch_size=1)
    generator = remote(server, saved, endpoint=endpoint)
    assert generator.generate(PROMPTS, max_new_tokens=12, stop=stop) == local
    assert local[0].text != whole
    text, generation = told(generator, PROMPTS[0], max_new_tokens=12, stop=stop)
    assert (text.strip(), generation) == (local[0].text, local[0])


@pytest.mark.parametrize("endpoint", ["completions", "chat", "generate"])
def test_a_stream_gives_the_answer_in_pieces(chat: StandIn, qwen: Path, endpoint: Any) -> None:
    generator = remote(chat, qwen, endpoint=endpoint)
    (wanted,) = generator.generate(PROMPTS[:1], max_new_tokens=12)
    text, generation = told(generator, PROMPTS[0], max_new_tokens=12)
    assert text.strip() == wanted.text
    assert generation == wanted
    assert len(list(generator.stream(PROMPTS[0], max_new_tokens=12))) > 3


def test_chat_sends_memory_as_embeddings_and_text_as_text(chat: StandIn, qwen: Path) -> None:
    generator = remote(chat, qwen, endpoint="chat")
    assert generator.generate(PROMPTS, max_new_tokens=12) == chat.local.generate(
        PROMPTS, max_new_tokens=12, batch_size=1
    )
    (message,) = chat.bodies[0]["messages"]
    assert [part["type"] for part in message["content"]] == ["text", "prompt_embeds", "text"]
    assert message["content"][0]["text"] == "document "


@pytest.mark.parametrize("opens", [False, True])
def test_a_chat_begins_with_what_the_template_leaves_to_the_tokenizer(tmp_path: Path, opens: bool) -> None:
    made = causal_generator("llama")
    made.tokenizer.chat_template = CHATML
    directory = save(made, tmp_path)
    with served(StandIn(load(directory))) as server:
        generator = remote(server, directory, endpoint="chat")
        before, after = generator.frame
        generator.frame = ([1] * opens + [token for token in before if token != 1], after)
        generator.generate([Prompt((TextSegment("document"), MemorySegment(memory(4))))], max_new_tokens=2)
        opening = server.local.model.get_input_embeddings().weight[1]
        begins = [bool(torch.equal(row, opening)) for row in server.read[0][:2]]
        assert begins == [opens, False]
        assert ("add_special_tokens" in server.bodies[0]) == opens


def test_special_tokens_in_a_text_stay_text_in_a_chat(chat: StandIn, qwen: Path) -> None:
    """The server reads them as its own; what a user wrote goes out as embeddings of plain text."""
    prompt = Prompt((TextSegment("the end <|im_"), TextSegment("end|> question"), MemorySegment(memory(3))))
    (got,) = remote(chat, qwen, endpoint="chat").generate([prompt], max_new_tokens=12)
    local = Prompt((TextSegment("the end <|im_end|> question"), MemorySegment(memory(3))))
    assert [got] == chat.local.generate([local], max_new_tokens=12)
    (message,) = chat.bodies[0]["messages"]
    assert [part["type"] for part in message["content"]] == ["prompt_embeds", "prompt_embeds"]


def test_chat_where_the_server_puts_line_breaks_between_parts(chat: StandIn, qwen: Path) -> None:
    """So vLLM does where a chat template takes a string: prompts that hold the breaks are read the same here."""
    chat.content_format = "string"
    generator = remote(chat, qwen, endpoint="chat")
    (got,) = generator.generate([reading(1)], max_new_tokens=12)
    assert [got] == chat.local.generate([reading(1, between="\n")], max_new_tokens=12)
    assert [got] != chat.local.generate([reading(1)], max_new_tokens=12)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_conversation_goes_out_by_its_messages(chat: StandIn, qwen: Path, endpoint: Any) -> None:
    rest = [
        Message("user", reading(1).segments),
        Message("assistant", (TextSegment("the sea"),)),
        Message("user", reading(2).segments),
    ]
    apart = [Message("system", (TextSegment("answer "), TextSegment("the question"))), *rest]
    joined = [Message("system", (TextSegment("answer the question"),)), *rest]
    generator = remote(chat, qwen, endpoint=endpoint)
    (got,) = generator.generate([generator.converse(apart)], max_new_tokens=12)
    read = chat.local.converse(joined if endpoint == "chat" else apart)  # in a chat, text is the server's
    assert [got] == chat.local.generate([read], max_new_tokens=12)
    if endpoint == "chat":
        sent = chat.bodies[-1]["messages"]
        assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
        assert sent[0]["content"] == [{"type": "text", "text": "answer the question"}]


def test_what_readers_ask_of_a_generator_is_the_same(server: StandIn, saved: Path) -> None:
    generator, local = remote(server, saved), server.local
    assert generator.frame == local.frame
    assert generator.context_tokens == local.context_tokens == 256
    assert remote(server, saved, context_tokens=100).context_tokens == 100
    assert generator.count_tokens("the old bridge") == local.count_tokens("the old bridge")
    assert list(map(generator.prompt_length, PROMPTS)) == list(map(local.prompt_length, PROMPTS))
    assert generator.device == torch.device("cpu")
    assert not server.bodies


PASSAGES = [Passage("The bridge was built in 1867.", title="Bridge"), Passage("The river runs to the sea.")]


class Letters:
    """Texts that share letters are near each other."""

    name = "letters"
    dimension = 26

    def encode(self, texts: Sequence[str], *, query: bool = False) -> NDArray[np.float32]:
        return np.array([[text.lower().count(letter) for letter in ascii_lowercase] for text in texts], np.float32)


def test_a_pipeline_answers_over_it(chat: StandIn, qwen: Path, tmp_path: Path) -> None:
    index = PassageIndex.open(tmp_path / "index", embedder=Letters())
    index.add(PASSAGES)
    asked = ["When was the bridge built?", "Where does the river run?"]
    budget = Budget(k_raw=1, k_memory=1)
    here, there = (
        VistRAG(index, tiny_compressor(), generator, budget=budget, max_new_tokens=8)
        for generator in (chat.local, remote(chat, qwen))
    )
    wanted, got = here.answer_batch(asked), there.answer_batch(asked)
    assert [(answer.text, answer.usage) for answer in got] == [(answer.text, answer.usage) for answer in wanted]
    assert len({answer.text for answer in got}) == 2
    stream = there.stream(asked[0])
    assert "".join(stream).strip()
    assert stream.answer is not None
    assert stream.answer.text == wanted[0].text


def test_a_checkpoint_takes_it_in_the_place_of_its_own(chat: StandIn, qwen: Path, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "checkpoint")
    index = PassageIndex.open(tmp_path / "index", embedder=Letters())
    index.add(PASSAGES)
    here, there = (
        VistRAG.from_pretrained(checkpoint, index, device="cpu", generator=generator)
        for generator in (chat.local, remote(chat, qwen))
    )
    assert there.max_new_tokens == 6  # the checkpoint's own
    assert there.answer("Where does the river run?").text == here.answer("Where does the river run?").text
    assert len(chat.bodies) == 1


def test_a_door_opens_on_it(chat: StandIn, qwen: Path) -> None:
    langchain_vist = pytest.importorskip("langchain_vist")
    here, there = (
        langchain_vist.ChatVist.from_reader(VistReader(tiny_compressor(), generator, max_new_tokens=8))
        for generator in (chat.local, remote(chat, qwen, endpoint="chat"))
    )
    assert there.invoke("the old bridge").content == here.invoke("the old bridge").content
    assert "".join(str(piece.content) for piece in there.stream("the old bridge")).strip()
    assert len(chat.bodies) == 2


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_reader_answers_over_it(chat: StandIn, qwen: Path, endpoint: Any) -> None:
    hits = [SearchHit(passage, 1.0, rank) for rank, passage in enumerate(PASSAGES, start=1)]
    replies = []
    for generator in (chat.local, remote(chat, qwen, endpoint=endpoint)):
        reader = VistReader(tiny_compressor(), generator, max_new_tokens=8)
        marked = reader.mark(hits, Budget(k_raw=0, k_memory=2))
        spans = [reader.write(one.hit.passage, one.ref) for one in marked]
        said = [Said("system", "Answer."), Said("user", "\n".join([*spans, "When was the bridge built?"]))]
        replies.append(reader.reply(said))
        stream = reader.stream_reply(said)
        assert "".join(stream).strip()
        assert stream.reply == replies[-1]
    assert replies[1] == replies[0]
    assert replies[0].text


# --------------------------------------------------------------------------------------------------------- many at once


def test_answers_keep_their_order_and_so_many_are_out_at_once(chat: StandIn, qwen: Path) -> None:
    local = chat.local.generate(PROMPTS * 2, max_new_tokens=4, batch_size=1)
    chat.trouble = [0.3, 0.0, 0.1, 0.0, 0.2]
    assert remote(chat, qwen, concurrency=3).generate(PROMPTS * 2, max_new_tokens=4, batch_size=2) == local
    assert chat.busiest == 3


def test_a_refusal_among_many_is_raised(chat: StandIn, qwen: Path) -> None:
    chat.trouble = [0.0, RefusalError(400, "no such thing")]
    with pytest.raises(ServerError, match="no such thing"):
        remote(chat, qwen).generate(PROMPTS, max_new_tokens=2)


# ------------------------------------------------------------------------------------------------------ again and again


@pytest.mark.parametrize(
    "trouble",
    [
        [RefusalError(503, "starting"), RefusalError(500, "engine")],
        ["drop", RefusalError(429, "busy", Retry_After="0")],
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_what_fails_twice_is_sent_again(chat: StandIn, qwen: Path, trouble: list[Any], streams: bool) -> None:
    generator = remote(chat, qwen)
    (wanted,) = chat.local.generate(PROMPTS[:1], max_new_tokens=6)
    chat.trouble = list(trouble)
    got = (
        told(generator, PROMPTS[0], max_new_tokens=6)[1]
        if streams
        else generator.generate(PROMPTS[:1], max_new_tokens=6)[0]
    )
    assert got == wanted
    assert len(chat.bodies) == 3
    assert chat.bodies[0] == chat.bodies[2]


def test_the_server_says_how_long_to_wait_and_pauses_double(chat: StandIn, qwen: Path) -> None:
    generator = remote(chat, qwen, backoff_s=0.1)
    chat.trouble = [RefusalError(429, "busy", Retry_After="0.5"), *[RefusalError(503, "starting")] * 2]
    generator.generate(PROMPTS[:1], max_new_tokens=2)
    asked, second, third = (after - before for before, after in pairwise(chat.times))
    assert 0.5 <= asked < 1.5
    assert 0.1 <= second < 0.2 + 0.5
    assert third >= 0.2


def test_retries_end(chat: StandIn, qwen: Path) -> None:
    chat.trouble = [RefusalError(503, "starting")] * 9
    with pytest.raises(ServerError, match=r"503 from http://127.*starting"):
        remote(chat, qwen, max_retries=2).generate(PROMPTS[:1])
    assert len(chat.bodies) == 3


def test_what_is_refused_is_not_sent_again(chat: StandIn, qwen: Path) -> None:
    chat.trouble = [RefusalError(422, "no")]
    with pytest.raises(ServerError, match="422"):
        remote(chat, qwen).generate(PROMPTS[:1])
    assert len(chat.bodies) == 1


def test_a_silent_server_is_not_waited_for(chat: StandIn, qwen: Path) -> None:
    chat.trouble = [1.0]
    with pytest.raises(ServerError, match=r"answer within 0\.2 s, got ReadTimeout"):
        remote(chat, qwen, timeout_s=0.2).generate(PROMPTS[:1])
    assert len(chat.bodies) == 1


def test_no_server(chat: StandIn, qwen: Path) -> None:
    with served(StandIn(chat.local)) as gone:
        pass
    with pytest.raises(ServerError, match=r"must be there, got ConnectError from http://127.*base_url"):
        remote(gone, qwen, max_retries=1).generate(PROMPTS[:1])


# -------------------------------------------------------------------------------------------------------------- streams


def test_who_stops_listening_stops_the_server(chat: StandIn, qwen: Path) -> None:
    chat.pause_s = 0.02
    generator = remote(chat, qwen)  # held: it is not its end that closes the connection
    stream = generator.stream(PROMPTS[0], max_new_tokens=100)
    next(stream)
    assert not chat.left.is_set()
    stream.close()
    assert chat.left.wait(5)


def test_a_stream_that_breaks_off_is_an_error(chat: StandIn, qwen: Path) -> None:
    chat.breaks_after = 2
    pieces = []
    with pytest.raises(ServerError, match=r"\[DONE\]"):
        pieces += list(remote(chat, qwen).stream(PROMPTS[0], max_new_tokens=12))
    assert len(chat.bodies) == 1


def test_a_stream_that_does_not_tell_all_from_the_beginning(qwen: Path) -> None:
    class Increments(StandIn):
        def pieces(self, body: dict[str, Any], tokens: list[int]) -> Iterator[str]:
            yield from ("the", " sea")

    with served(Increments(load(qwen))) as server, pytest.raises(ServerError, match="incremental-streaming-output"):
        list(remote(server, qwen, endpoint="generate").stream(PROMPTS[0]))


@pytest.mark.parametrize("endpoint", ["completions", "chat", "generate"])
def test_a_line_separator_in_an_answer_is_none_of_the_stream(qwen: Path, endpoint: Any) -> None:
    class Says(StandIn):
        def text(self, body: dict[str, Any], tokens: list[int]) -> str:
            return "one\u2028two\x85three\rfour\n\nfive"[: 8 * len(tokens)]

    with served(Says(load(qwen))) as server:
        generator = remote(server, qwen, endpoint=endpoint)
        text, generation = told(generator, PROMPTS[0], max_new_tokens=9)
        assert text == generation.text == "one\u2028two\x85three\rfour\n\nfive"


# --------------------------------------------------------------------------------------------------- what an error says


@pytest.mark.parametrize(
    ("endpoint", "flag"),
    [
        ("completions", "--enable-prompt-embeds"),
        ("chat", "--enable-prompt-embeds"),
        ("generate", "--disable-radix-cache"),
    ],
)
def test_a_server_that_takes_no_embeddings(chat: StandIn, qwen: Path, endpoint: Any, flag: str) -> None:
    chat.flags.clear()
    with pytest.raises(ConfigError, match=f"must be started with {flag}"):
        remote(chat, qwen, endpoint=endpoint).generate(PROMPTS[:1])


def test_a_model_that_the_server_does_not_have(chat: StandIn, qwen: Path) -> None:
    with pytest.raises(ConfigError, match=r"served_model must be one of tiny .* got 'large'"):
        remote(chat, qwen, served_model="large").generate(PROMPTS[:1])
    with pytest.raises(ConfigError, match=f"got '{qwen}'"):  # as a server names what it was started with
        remote(chat, qwen, served_model=None).generate(PROMPTS[:1])


def test_an_address_that_is_no_such_server(chat: StandIn, qwen: Path) -> None:
    chat.url = chat.url.replace("/v1", "/elsewhere/v1/")
    with pytest.raises(ConfigError, match=r"base_url must be of a server with /v1/completions, got http.*/elsewhere;"):
        remote(chat, qwen).generate(PROMPTS[:1])


def test_another_model_than_the_one_that_is_served(chat: StandIn, tmp_path: Path) -> None:
    wide = causal_generator("llama")
    wide.model.config.hidden_size = 64
    model = AutoModelForCausalLM.from_config(wide.model.config)
    other = save(VistGenerator(model, wide.tokenizer, SoftPromptFusion(FusionConfig(16, 64))), tmp_path)
    with pytest.raises(ShapeError, match="served_model must be 64 wide"):
        remote(chat, other).generate(PROMPTS[:1])


def test_a_prompt_that_does_not_fit(chat: StandIn, qwen: Path) -> None:
    generator = remote(chat, qwen)
    with pytest.raises(InputError, match=r"must fit 256 positions .* 300; read fewer passages"):
        generator.generate(PROMPTS[:1], max_new_tokens=300)
    assert not chat.bodies
    chat.context = 60
    with pytest.raises(InputError, match=r"fit the server's context; .*set context_tokens .*length is 60"):
        generator.generate(PROMPTS[:1], max_new_tokens=50)


@pytest.mark.parametrize(("key", "got"), [(None, "none"), ("sk-wrong", "another")])
def test_a_key_that_the_server_does_not_take(chat: StandIn, qwen: Path, key: str | None, got: str) -> None:
    chat.api_key = KEY
    with pytest.raises(ConfigError, match=f"api_key must be one that the server takes, got {got}; "):
        remote(chat, qwen, api_key=key).generate(PROMPTS[:1])


def test_the_key_goes_to_the_server_and_nowhere_else(chat: StandIn, qwen: Path) -> None:
    chat.api_key = KEY
    generator = remote(chat, qwen, api_key=KEY)
    assert generator.generate(PROMPTS[:1], max_new_tokens=2) == chat.local.generate(PROMPTS[:1], max_new_tokens=2)
    assert KEY not in repr(generator) + repr(vars(generator)) + repr(vars(generator._connection._client))
    # An error of the stand-in repeats what it got.
    for takes, trouble in (("another", []), (KEY, [RefusalError(500, f"key {KEY}")]), (KEY, ["drop"])):
        chat.api_key, chat.trouble = takes, list(trouble)
        with pytest.raises((ConfigError, ServerError)) as caught:
            remote(chat, qwen, api_key=KEY, max_retries=0).generate(PROMPTS[:1])
        assert KEY not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        remote(chat, qwen, api_key=f"{KEY}\n")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://me:secret@host/v1", "http://host:x/"]
)
def test_an_address_that_is_none(chat: StandIn, qwen: Path, url: str) -> None:
    chat.url = url
    with pytest.raises(ConfigError, match="base_url must be http") as caught:
        remote(chat, qwen)
    assert "secret" not in str(caught.value)


def test_settings_out_of_range(chat: StandIn, qwen: Path) -> None:
    for settings in (
        {"concurrency": 0},
        {"context_tokens": 0},
        {"endpoint": "v2"},
        {"max_retries": -1},
        {"timeout_s": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            remote(chat, qwen, **settings)
    generator = remote(chat, qwen)
    for how in ({"max_new_tokens": 0}, {"stop": "text"}, {"batch_size": 0}, {"num_beams": 2}):
        with pytest.raises(ConfigError, match=next(iter(how))):
            generator.generate(PROMPTS[:1], **how)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must hold something"):
        generator.generate([Prompt((TextSegment(""),), framed=True)])
    with pytest.raises(ConfigError, match="VistGenerator"):
        generator.score(PROMPTS[0], [])
    assert not chat.bodies


def test_memories_of_another_compressor_do_not_go_out(chat: StandIn, qwen: Path) -> None:
    for endpoint in ("completions", "chat", "generate"):
        generator = remote(chat, qwen, endpoint=endpoint)
        generator.fusion.bind("the compressor")
        with pytest.raises(IncompatibleMemoryError):
            generator.generate(PROMPTS[:1])
    assert not chat.bodies


def test_what_no_server_can_do_is_refused_at_once(chat: StandIn, qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"fusion": "cross_attention"}')
    with pytest.raises(ConfigError, match=r"fusion must be 'soft_prompt' .* got 'cross_attention'"):
        RemoteGenerator.from_pretrained(qwen, base_url=chat.url, fusion=tmp_path)

    class CrossAttention(SoftPromptFusion):
        kind = "cross_attention"

    local = remote(chat, qwen)
    with pytest.raises(ConfigError, match="got 'cross_attention'"):
        RemoteGenerator(
            local.model,  # type: ignore[arg-type]
            local.tokenizer,
            CrossAttention(local.fusion.config),
            base_url=chat.url,
            served_model="tiny",
        )
    bert = save(causal_generator("prefix_bert"), tmp_path / "bert")
    with pytest.raises(ConfigError, match="got a PrefixBertForCausalLM"):
        remote(chat, bert)
    llama = save(causal_generator("llama"), tmp_path / "llama")
    with pytest.raises(ConfigError, match="without a chat template, got 'chat'"):
        remote(chat, llama, endpoint="chat")
    generator = remote(chat, qwen, endpoint="chat")
    with pytest.raises(ConfigError, match="use converse of this generator"):
        generator.generate([chat.local.converse([Message("user", reading(1).segments)])])


# -------------------------------------------------------------------------------------------------------------- drawing


def test_how_an_answer_is_drawn_is_told_to_the_server(chat: StandIn, qwen: Path) -> None:
    how = Sampling(temperature=0.7, top_p=0.9, top_k=5, seed=11)
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 11}
    generator = remote(chat, qwen)
    generator.generate(PROMPTS[:1], max_new_tokens=2, logits_processor=how.processors())
    generator.generate(PROMPTS[:1], max_new_tokens=2, do_sample=True, **wanted)
    generator.generate(PROMPTS[:1], max_new_tokens=2, repetition_penalty=1.2, temperature=0.7)
    remote(chat, qwen, endpoint="generate").generate(
        PROMPTS[:1], max_new_tokens=2, logits_processor=how.processors(), stop=["x"]
    )
    first, second, greedy, native = chat.bodies
    assert wanted.items() <= first.items()
    assert wanted.items() <= second.items()
    assert (greedy["temperature"], greedy["repetition_penalty"]) == (0, 1.2)
    assert native["sampling_params"] == {
        "max_new_tokens": 2, "stop": ["x"], "no_stop_trim": True,
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "sampling_seed": 11,
    }  # fmt: skip


def test_httpx2_is_an_extra(chat: StandIn, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingDependencyError, match=r"httpx2.*pip install 'vist-rag\[remote\]'"):
        remote(chat, qwen)
