from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.support.causal import CHATML, FAMILIES, causal_generator
from vist_rag.compression import VisualMemory
from vist_rag.errors import CheckpointError, ConfigError, IncompatibleMemoryError, InputError
from vist_rag.generation import Generation, MemorySegment, Prompt, SoftPromptFusion, TextSegment, VistGenerator
from vist_rag.generation.int8 import save_int8

PROMPTS = [
    Prompt((TextSegment("the old bridge was built in 1867 question when answer"),)),
    Prompt((TextSegment("the river runs"), MemorySegment(VisualMemory(torch.ones(4, 16), "abc")))),
    Prompt((TextSegment("marie curie"),)),
]


@pytest.fixture(params=FAMILIES, scope="module")
def generator(request: pytest.FixtureRequest) -> VistGenerator:
    return causal_generator(request.param, seed=1)


def long_answer(generator: VistGenerator) -> tuple[Prompt, str]:
    """A prompt whose answer has several different words, and that answer."""
    for prompt in PROMPTS:
        text = generator.generate([prompt], max_new_tokens=8, eos_token_id=None)[0].text
        if len(set(text)) > 5 and len(text) > 8:
            return prompt, text
    raise AssertionError("no prompt has a long answer; take another seed")


# ------------------------------------------------------------------------------------------------------------- tokens


def test_special_tokens_in_a_text_are_text(generator: VistGenerator) -> None:
    tokenizer = generator.tokenizer
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    special.pop(tokenizer.unk_token, None)
    text = f"a {' '.join(special)} [SEP] <s> </s> <|im_end|>"
    assert set(tokenizer(text).input_ids) & set(special.values())  # the tokenizer itself falls for it
    assert not set(generator.tokenize(text).tolist()) & set(special.values())
    tokenizer(text)  # and an ordinary call in between changes nothing
    assert not set(generator.tokenize(text).tolist()) & set(special.values())


def test_a_lone_surrogate_is_tokenized(generator: VistGenerator) -> None:
    assert torch.equal(generator.tokenize("the \ud800 sea"), generator.tokenize("the ? sea"))
    assert generator.count_tokens("") == 0


def test_frame_is_what_the_tokenizer_puts_before_a_text() -> None:
    assert causal_generator("prefix_bert").frame == ([2], [])
    assert causal_generator("llama").frame == ([1], [])
    assert causal_generator("gpt2").frame == ([], [])


def test_frame_keeps_a_first_token_that_also_ends_a_text() -> None:
    """OPT and Pythia-like models open every text with their end-of-sequence token."""
    generator = causal_generator("llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=generator.tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    )
    assert tokenizer("the sea").input_ids[0] == tokenizer.eos_token_id
    assert VistGenerator(generator.model, tokenizer).frame == ([tokenizer.eos_token_id], [])


def test_frame_leaves_out_what_closes_a_text() -> None:
    from tokenizers import processors

    generator = causal_generator("prefix_bert")
    closing = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    generator.tokenizer.backend_tokenizer.post_processor = closing
    assert generator.tokenizer("the sea").input_ids[-1] == 3
    assert VistGenerator(generator.model, generator.tokenizer).frame == ([2], [])


def test_chat_template_stands_around_the_whole_prompt() -> None:
    generator = causal_generator("qwen3")
    tokenizer = generator.tokenizer
    assert tokenizer.chat_template == CHATML
    before, after = generator.frame
    assert tokenizer.decode(before) == "<|im_start|>user\n"
    assert tokenizer.decode(after) == "<|im_end|>\n<|im_start|>assistant\n"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert before[0] == start
    assert after[0] == end
    frame = len(before) + len(after)
    assert generator.prompt_length(PROMPTS[1]) == frame + generator.count_tokens("the river runs") + 4 + 2


def test_a_prompt_without_anything_is_refused() -> None:
    generator = causal_generator("gpt2")
    for nothing in (Prompt(()), Prompt((TextSegment(""),))):
        with pytest.raises(InputError, match="prompt must hold something"):
            generator.generate([PROMPTS[0], nothing])
    assert generator.generate([]) == []


def test_a_prompt_beyond_the_context_is_refused(generator: VistGenerator) -> None:
    limit = generator.context_tokens
    assert limit == (512 if generator.tokenizer.eos_token == "[SEP]" else 256)
    prompt = Prompt((MemorySegment(VisualMemory(torch.ones(limit - 60, 16), "abc")), TextSegment("the")))
    length = generator.prompt_length(prompt)
    assert limit - 60 < length < limit
    generator.generate([prompt], max_new_tokens=limit - length)
    for attempt in (generator.generate, lambda p, **options: list(generator.stream(p[0], **options))):
        with pytest.raises(InputError, match=rf"must fit {limit} positions .* got {length} \+ {limit - length + 1};"):
            attempt([prompt], max_new_tokens=limit - length + 1)


# ------------------------------------------------------------------------------------------------------- stop, stream


def test_an_answer_ends_before_a_stop_string(generator: VistGenerator) -> None:
    prompt, text = long_answer(generator)
    whole = generator.generate([prompt], max_new_tokens=8, eos_token_id=None)[0]
    for begin in (1, len(text) - 4):
        stop = text[begin : begin + 3]
        stopped = generator.generate([prompt], max_new_tokens=8, eos_token_id=None, stop=["never", stop])[0]
        assert stopped.text == text[: text.index(stop)].strip()
        assert stopped.completion_tokens <= whole.completion_tokens
    early = generator.generate([prompt], max_new_tokens=8, eos_token_id=None, stop=[text[1:3]])[0]
    assert early.completion_tokens < whole.completion_tokens


def test_answers_of_a_batch_stop_and_count_by_themselves(generator: VistGenerator) -> None:
    texts = [answer.text for answer in generator.generate(PROMPTS, max_new_tokens=8)]
    parts = [text[i : i + 3] for text in texts for i in range(len(text) - 2)]
    stop = [next(part for part in parts if sum(part in text for text in texts) == 1)]
    alone = [generator.generate([prompt], max_new_tokens=8, stop=stop)[0] for prompt in PROMPTS]
    assert generator.generate(PROMPTS, max_new_tokens=8, stop=stop) == alone
    assert len({answer.completion_tokens for answer in alone}) > 1  # else nothing was padded


def test_every_end_token_of_the_model_ends_an_answer() -> None:
    generator = causal_generator("qwen3")
    prompt, _ = long_answer(generator)
    with generator.fusion.condition(generator, [prompt]) as inputs:
        ids = generator.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0].tolist()
    third = ids[2]
    generator.model.generation_config.eos_token_id = [2, third]
    ended, other = generator.generate([prompt, PROMPTS[2]], max_new_tokens=8)
    assert ended.completion_tokens == ids.index(third) + 1
    assert ended == generator.generate([prompt], max_new_tokens=8)[0]
    assert other.completion_tokens >= 1


def test_stream_is_what_generate_says(generator: VistGenerator) -> None:
    _, text = long_answer(generator)
    for prompt in PROMPTS[:2]:
        for stop in ((), (text[4:6],)):
            whole = generator.generate([prompt], max_new_tokens=8, stop=stop)[0]
            returned: list[Generation] = []

            def listen(prompt: Prompt, stop: tuple[str, ...], returned: list[Generation]) -> Iterator[str]:
                returned.append((yield from generator.stream(prompt, max_new_tokens=8, stop=stop)))

            pieces = list(listen(prompt, stop, returned))
            assert "".join(pieces).strip() == whole.text
            assert returned == [whole]


def test_who_stops_listening_stops_the_generation() -> None:
    generator = causal_generator("llama")
    prompt, _ = long_answer(generator)
    steps: list[int] = []
    handle = generator.model.register_forward_hook(lambda *_: steps.append(1))
    stream = generator.stream(prompt, max_new_tokens=200, eos_token_id=None)
    next(stream)
    stream.close()
    handle.remove()
    assert 1 <= len(steps) < 150


def test_an_error_while_streaming_reaches_the_reader(generator: VistGenerator) -> None:
    with pytest.raises(ValueError, match="streamer"):
        list(generator.stream(PROMPTS[0], num_beams=2))
    assert list(generator.stream(PROMPTS[0], max_new_tokens=2))


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"batch_size": 0}, {"stop": "\n"}, {"stop": [""]}])
def test_limits_are_checked(options: dict[str, object]) -> None:
    generator = causal_generator("gpt2")
    with pytest.raises(ConfigError, match=next(iter(options))):
        generator.generate(PROMPTS, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ loading


def saved(generator: VistGenerator, directory: Path, *, int8: bool) -> Path:
    if int8:
        save_int8(generator.model, directory / "generator")
    else:
        generator.model.save_pretrained(directory / "generator")
    generator.tokenizer.save_pretrained(directory / "generator")
    generator.fusion.save_pretrained(directory / "fusion")
    return directory


def test_an_ordinary_directory_loads(tmp_path: Path, generator: VistGenerator) -> None:
    saved(generator, tmp_path, int8=False)
    loaded = VistGenerator.from_pretrained(tmp_path / "generator", device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.frame == generator.frame
    raw = PROMPTS[::2]
    assert loaded.generate(raw, max_new_tokens=4) == generator.generate(raw, max_new_tokens=4)
    with pytest.raises(IncompatibleMemoryError):
        loaded.generate(PROMPTS)
    half = VistGenerator.from_pretrained(tmp_path / "generator", device="cpu", dtype=torch.bfloat16)
    assert half.generate(raw, max_new_tokens=2)[0].completion_tokens > 0


def test_fusion_and_int8_weights_load(tmp_path: Path, generator: VistGenerator) -> None:
    saved(generator, tmp_path, int8=True)
    loaded = VistGenerator.from_pretrained(tmp_path / "generator", fusion=tmp_path / "fusion", device="cpu")
    assert loaded.fusion.config == generator.fusion.config
    with generator.fusion.condition(generator, PROMPTS) as inputs, torch.no_grad():
        logits = generator.model(**inputs).logits[:, -1]
    with loaded.fusion.condition(loaded, PROMPTS) as inputs, torch.no_grad():
        close = loaded.model(**inputs).logits[:, -1]
    assert ((close - logits).norm() / logits.norm()) < 0.1
    assert not torch.equal(close, logits)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    "damage",
    [
        "model.safetensors: gone",
        "model.safetensors: torn",
        "model.safetensors: empty",
        "config.json: gone",
        "config.json: torn",
        "config.json: another",
        "tokenizer.json: torn",
        "tokenizer_config.json: torn",
        "everything: gone",
    ],
)
def test_a_damaged_generator_is_refused(tmp_path: Path, damage: str, *, int8: bool) -> None:
    directory = saved(causal_generator("llama"), tmp_path, int8=int8) / "generator"
    name, _, kind = damage.partition(": ")
    path = directory / name
    if name == "everything":
        directory = tmp_path / "nothing-here"
    elif kind == "gone":
        path.unlink()
    elif kind == "another":
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"hidden_size": 64}))
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if kind == "torn" else 0])
    with pytest.raises(CheckpointError, match="generator"):
        VistGenerator.from_pretrained(directory, device="cpu")


def test_a_damaged_fusion_is_named(tmp_path: Path) -> None:
    saved(causal_generator("llama"), tmp_path, int8=False)
    (tmp_path / "fusion" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="fusion in"):
        VistGenerator.from_pretrained(tmp_path / "generator", fusion=tmp_path / "fusion", device="cpu")


def test_generator_is_ready_to_use_after_training() -> None:
    generator = causal_generator("prefix_bert")
    generator.model.train()
    generator.fusion.train()
    again = VistGenerator(generator.model, generator.tokenizer, generator.fusion)
    assert not any(m.training for m in (*again.model.modules(), *again.fusion.modules()))
    assert isinstance(again.fusion, SoftPromptFusion)
