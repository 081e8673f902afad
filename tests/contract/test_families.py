"""Every family of generators with every fusion: loaded from a directory, asked in its own template, trained."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.support.causal import FAMILIES, FUSED, TABLE, causal_generator, fused_generator
from tests.support.tiny import tiny_compressor
from tests.support.training import save_generator
from vist_rag.compression import VisualMemory
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.errors import InputError
from vist_rag.generation import MemorySegment, Message, Prompt, SoftPromptFusion, TextSegment, VistGenerator
from vist_rag.generation.prefix_cache import goes_on
from vist_rag.generation.words import embedding_scale, word_embeddings
from vist_rag.training.examples import Example
from vist_rag.training.parts import pretrained_generator, train_only
from vist_rag.training.reading import MemoryReading
from vist_rag.types import Passage

SLIDING = ("mistral", "gemma2", "gemma3")
MEMORY = VisualMemory(torch.randn(7, 16, generator=torch.Generator().manual_seed(2)), "compressor")


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FUSED, ids="-".join, scope="module")
def generator(request: pytest.FixtureRequest) -> VistGenerator:
    """Each family with each fusion that it can take."""
    return fused_generator(*request.param, seed=1)


@pytest.fixture(scope="module")
def soft(family: str) -> VistGenerator:
    return causal_generator(family, seed=1)


def asked(question: str = "question when was the bridge built answer", memory: VisualMemory = MEMORY) -> Prompt:
    return Prompt((TextSegment("the river runs to the sea document "), MemorySegment(memory), TextSegment(question)))


# ---------------------------------------------------------------------------------------------------- saved and loaded


def test_a_saved_generator_answers_the_same(tmp_path: Path, generator: VistGenerator) -> None:
    generator.model.save_pretrained(tmp_path / "generator")
    generator.tokenizer.save_pretrained(tmp_path / "generator")
    with torch.no_grad():
        for weight in generator.fusion.parameters():  # stored in bf16
            weight.copy_(weight.bfloat16())
    generator.fusion.save_pretrained(tmp_path / "fusion")
    loaded = VistGenerator.from_pretrained(tmp_path / "generator", fusion=tmp_path / "fusion", device="cpu")
    assert type(loaded.model) is type(generator.model)
    assert loaded.frame == generator.frame
    prompts = [asked(), generator.converse([Message("user", asked().segments)]), asked("who")]
    answers = generator.generate(prompts, max_new_tokens=8)
    assert loaded.generate(prompts, max_new_tokens=8) == answers
    assert any(answer.text for answer in answers)


def test_memory_is_read_alike_alone_and_beside_others(generator: VistGenerator) -> None:
    """With left padding longer than a window, and from what was kept of how prompts begin."""
    long = VisualMemory(torch.randn(60, 16, generator=torch.Generator().manual_seed(3)), "compressor")
    prompts = [asked("who"), asked(memory=long)]
    plain = VistGenerator(generator.model, generator.tokenizer, generator.fusion, prefix_cache_bytes=0)
    alone = [plain.generate([prompt], max_new_tokens=4, eos_token_id=None)[0] for prompt in prompts]
    assert plain.generate(prompts, max_new_tokens=4, eos_token_id=None) == alone
    for _ in range(2):
        for prompt, answer in zip(prompts, alone, strict=True):
            assert generator.generate([prompt], max_new_tokens=4, eos_token_id=None) == [answer]


def test_what_a_window_forgets_is_not_kept(family: str, soft: VistGenerator) -> None:
    assert goes_on(soft.model) == (family not in ("prefix_bert", *SLIDING))


# ------------------------------------------------------------------------------------------------------- chat template

SAID = [Message("system", (TextSegment("be brief"),)), Message("user", (TextSegment("who"),))]
LATER = [*SAID, Message("assistant", (TextSegment("marie"),)), Message("user", (TextSegment("when"),))]
SYSTEM, USER = "<|im_start|>system\n", "<|im_start|>user\n"
CHATML = f"{SYSTEM}be brief<|im_end|>\n{USER}who<|im_end|>\n<|im_start|>assistant\n"
TINYLLAMA = "<s><|system|>\nbe brief</s>\n<|user|>\nwho</s>\n<|assistant|>\n"
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n".format
LLAMA3 = f"<|begin_of_text|>{HEAD('system')}be brief<|eot_id|>{HEAD('user')}who<|eot_id|>{HEAD('assistant')}"
MISTRAL = "<s>[INST] be brief\n\nwho[/INST]"
GEMMA = "<bos><start_of_turn>user\nbe brief\n\nwho<end_of_turn>\n<start_of_turn>model\n"
WRITTEN = {
    "qwen2": (CHATML, f"{CHATML}marie<|im_end|>\n{USER}when<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3": (CHATML, f"{CHATML}marie<|im_end|>\n{USER}when<|im_end|>\n<|im_start|>assistant\n"),
    "tinyllama": (TINYLLAMA, f"{TINYLLAMA}marie</s>\n<|user|>\nwhen</s>\n<|assistant|>\n"),
    "llama3": (LLAMA3, f"{LLAMA3}marie<|eot_id|>{HEAD('user')}when<|eot_id|>{HEAD('assistant')}"),
    "mistral": (MISTRAL, f"{MISTRAL} marie</s>[INST] when[/INST]"),
} | dict.fromkeys(
    ("gemma", "gemma2", "gemma3"),
    (GEMMA, f"{GEMMA}marie<end_of_turn>\n<start_of_turn>user\nwhen<end_of_turn>\n<start_of_turn>model\n"),
)
"""What each says of one turn, and of two: worked out by hand."""


def ids_of(generator: VistGenerator, prompt: Prompt) -> list[int]:
    return torch.cat([part for part in generator.parts(prompt) if isinstance(part, Tensor)]).tolist()


@pytest.mark.parametrize("family", WRITTEN, indirect=True)
@pytest.mark.parametrize("turns", [0, 1])
def test_a_conversation_is_said_in_the_template(family: str, soft: VistGenerator, turns: int) -> None:
    prompt = soft.converse((SAID, LATER)[turns])
    assert prompt.framed
    written = "".join(segment.text for segment in prompt.segments if not isinstance(segment, MemorySegment))
    assert written == WRITTEN[family][turns]


def test_a_text_is_opened_once(family: str, soft: VistGenerator) -> None:
    """By the template or by the tokenizer, as a question alone and as a conversation."""
    begin = soft.tokenizer.bos_token_id
    opens = begin is not None and soft.tokenizer("who").input_ids[0] == begin
    for prompt in (Prompt(SAID[1].segments), soft.converse(SAID[1:]), soft.converse(LATER)):
        ids = ids_of(soft, prompt)
        if opens:
            assert ids[0] == begin
            assert ids.count(begin) == 1
        else:
            assert begin not in ids
    if TABLE.get(family) and TABLE[family].template:
        assert ids_of(soft, Prompt(SAID[1].segments)) == ids_of(soft, soft.converse(SAID[1:]))


def test_memory_of_the_system_is_read(generator: VistGenerator) -> None:
    answers = []
    for seed in (1, 2):
        memory = VisualMemory(torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)) * 3, "compressor")
        told = Message("system", (TextSegment("document "), MemorySegment(memory)))
        prompt = generator.converse([told, *SAID[1:]])
        assert [s.memory for s in prompt.segments if isinstance(s, MemorySegment)] == [memory]
        with generator.fusion.condition(generator, [prompt]) as inputs, torch.no_grad():
            answers.append(generator.model(**inputs).logits[0, -1])
    assert (answers[0] - answers[1]).abs().max() > 1e-2


def test_turns_that_no_template_takes_are_refused(family: str, soft: VistGenerator) -> None:
    if family not in ("mistral", "gemma", "gemma2", "gemma3"):
        pytest.skip("its template takes any turns")
    with pytest.raises(InputError, match=r"refuses messages of user, user \(user and assistant must take turns\)"):
        soft.converse([SAID[1], SAID[1]])


class Says(LogitsProcessor):
    """A model that says these tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.full_like(scores, -1e9)
        said[:, next(self.tokens)] = 0
        return said


def test_every_token_that_ends_a_turn_ends_an_answer(family: str, soft: VistGenerator) -> None:
    tokenizer = soft.tokenizer
    word = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("the"))[-1]
    ends = TABLE[family].ends if family in TABLE else ()
    for end in (tokenizer.eos_token, *ends):
        says = LogitsProcessorList([Says(word, word, tokenizer.convert_tokens_to_ids(end), word, word)])
        (answer,) = soft.generate([asked()], max_new_tokens=5, logits_processor=says, suppress_tokens=None)
        assert answer.completion_tokens == 3
        assert answer.text == tokenizer.decode([word, word]).strip()


# -------------------------------------------------------------------------------------------------- how large words are


@torch.no_grad()
def test_words_are_as_large_as_they_are_read(family: str, soft: VistGenerator) -> None:
    table = soft.model.get_input_embeddings()
    torch.testing.assert_close(word_embeddings(soft.model), table(torch.arange(len(table.weight))))
    scale = 32**0.5 if family.startswith("gemma") else 1.0
    assert float(embedding_scale(soft.model)) == pytest.approx(scale)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3"])
def test_soft_prompts_start_as_large_as_the_words_that_are_read(tmp_path: Path, family: str) -> None:
    recipe = {"generator": {"pretrained": str(save_generator(tmp_path, family))}}
    fresh = pretrained_generator(recipe, ResamplerConfig(width=16, heads=2))
    table = fresh.model.get_input_embeddings()
    read = table(torch.arange(len(table.weight))).std()
    assert float(fresh.fusion.meaning(torch.randn(200, 16)).std() / read) == pytest.approx(1, abs=0.2)
    assert float(fresh.fusion.boundaries.std() / read) == pytest.approx(1)


@torch.no_grad()
def test_what_memory_spells_is_added_as_large_as_it_is_read(family: str) -> None:
    generator = causal_generator(family)
    fusion = SoftPromptFusion(FusionConfig(16, 32, hidden_width=32, spelling=8, packer_width=8)).eval()
    torch.nn.init.normal_(fusion.packer.write.weight)  # type: ignore[union-attr]  # which starts from nothing
    reader = VistGenerator(generator.model, generator.tokenizer, fusion)
    fusion.spell = lambda latents: ["the sea"] * len(latents)  # type: ignore[method-assign]
    soft, shown = fusion.read(reader, MEMORY.latents[:1])
    table = generator.model.get_input_embeddings()
    words = table(torch.arange(len(table.weight)))
    torch.testing.assert_close(soft[1:-1], fusion.inside(fusion.meaning(MEMORY.latents[:1]), shown[1:-1], words))


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("family", "fusion"), FUSED)
def test_memory_is_taught_to_a_frozen_generator(tmp_path: Path, family: str, fusion: str) -> None:
    pytest.importorskip("accelerate", reason="training needs the extra 'train'")
    from vist_rag.training.trainer import train_stage

    generator = fused_generator(family, fusion, seed=1)
    reading = MemoryReading(tiny_compressor(), generator, distil=0.5)
    train_only(reading, ("resampler", "projector"))
    reading.teach_itself()
    before = {name: weight.clone() for name, weight in reading.named_parameters()}
    examples = [
        Example((Passage("the old bridge was built in 1867"),), "when", "in 1867", raw=False),
        Example((Passage("a lake"), Passage("marie curie")), "who", "marie curie", raw=False),
    ]
    losses: list[float] = []
    reading.register_forward_hook(lambda _, __, output: losses.append(float(output["loss"].detach())))
    train_stage(reading.train(), 4, lambda _: reading.batch(examples, random.Random(0)), tmp_path, learning_rate=1e-2)
    moved = {name for name, weight in reading.named_parameters() if not torch.equal(weight, before[name])}
    entrance = "projector" if fusion == "soft_prompt" else "blocks"
    assert {"compressor.resampler", f"fusion.{entrance}"} <= {".".join(name.split(".")[:2]) for name in moved}
    assert not {name for name in moved if name.startswith(("compressor.tower", "lm."))}
    assert losses[-1] < losses[0]
