"""What every fusion keeps, with every family of generators."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.causal import FAMILIES, FUSED, causal_generator, fused_generator
from vist_rag.compression import VisualMemory
from vist_rag.config import FusionConfig
from vist_rag.errors import CheckpointError, ConfigError, IncompatibleMemoryError, InputError, ShapeError
from vist_rag.generation import MemorySegment, Prompt, SoftPromptFusion, TextSegment, VistGenerator
from vist_rag.generation.fusion import MEMORY_ARGUMENTS
from vist_rag.generation.fusion.soft_prompt import CHARACTER_CLASSES, merged, show, side_by_side
from vist_rag.generation.prefix_bert import PrefixBertForCausalLM

QUESTION = TextSegment("question when was the bridge built answer")


@pytest.fixture(params=FUSED, ids="-".join, scope="module")
def generator(request: pytest.FixtureRequest) -> VistGenerator:
    """Each family with each fusion that it can take."""
    return fused_generator(*request.param)


@pytest.fixture(params=FAMILIES, scope="module")
def transparent(request: pytest.FixtureRequest) -> VistGenerator:
    """A generator whose memories are token embeddings: what it reads as memory it could have read as text."""
    generator = causal_generator(request.param, memory_width=32)
    generator.fusion.projector = nn.Identity()
    generator.fusion.speller = None
    generator.fusion.boundaries = nn.Parameter(torch.empty(0, 32))

    def shown(_: VistGenerator, latents: Tensor, places: Tensor, counts: Any = None) -> Tensor:
        table = generator.model.get_input_embeddings().weight
        return show(torch.cdist(latents, table).argmin(-1), places, int(places[-1]) + 1)

    generator.fusion.shown = shown  # type: ignore[method-assign]  # a latent spells the token that it is
    return generator


def memory(n: int, seed: int = 1, width: int = 16) -> VisualMemory:
    return VisualMemory(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), "compressor")


def reading(n: int, seed: int = 1, size: int | None = None) -> Prompt:
    read = memory(n, seed).coarsen(size or n)
    return Prompt((TextSegment("document "), MemorySegment(read), QUESTION))


def embedded(generator: VistGenerator, text: str) -> VisualMemory:
    table = generator.model.get_input_embeddings()
    return VisualMemory(table(generator.tokenize(text)).detach(), "compressor")


def as_ids(generator: VistGenerator, *texts: str) -> Tensor:
    before, after = generator.frame
    parts = [generator.ids(before), *(generator.tokenize(text) for text in texts), generator.ids(after)]
    return torch.cat(parts)[None]


@torch.no_grad()
def full_logits(generator: VistGenerator, inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
    """One forward pass over prompts and answers together, without a cache: logits of the answers' tokens."""
    embeds = torch.cat((inputs["inputs_embeds"], generator.model.get_input_embeddings()(answers)), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(answers)), dim=1)
    extra: dict[str, Any] = {name: given for name, given in inputs.items() if name in MEMORY_ARGUMENTS}
    if isinstance(generator.model, PrefixBertForCausalLM):
        extra["prefix_mask"] = torch.arange(mask.shape[1]).expand_as(mask) < inputs["attention_mask"].shape[1]
        extra["shown"] = nn.functional.pad(inputs["shown"], (0, 0, 0, answers.shape[1]), value=-1)
    else:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    logits = generator.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **extra).logits
    return logits[:, inputs["attention_mask"].shape[1] - 1 : -1]


@torch.no_grad()
def test_memory_of_text_embeddings_reads_as_the_text_itself(transparent: VistGenerator) -> None:
    written = set()
    for middle in ("was built in 1867 by marie", "runs from a lake to the sea"):
        texts = ("the old bridge", middle, "question when answer")
        prompt = Prompt((TextSegment(texts[0]), MemorySegment(embedded(transparent, texts[1])), TextSegment(texts[2])))
        ids = as_ids(transparent, *texts)
        with transparent.fusion.condition(transparent, [prompt]) as inputs:
            logits = transparent.model(**inputs).logits
            soft = transparent.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        torch.testing.assert_close(logits, transparent.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        hard = transparent.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert soft.tolist() == hard[:, ids.shape[1] :].tolist()
        answer = transparent.generate([prompt], max_new_tokens=8)[0]
        assert answer.text == transparent.tokenizer.decode(soft[0], skip_special_tokens=True).strip()
        assert answer.prompt_tokens == ids.shape[1] == transparent.prompt_length(prompt)
        written.add(answer.text)
    assert len(written) == 2  # not a model that says one thing whatever it reads


def test_beams_read_memory_as_they_read_text(transparent: VistGenerator) -> None:
    texts = ("the river runs", "from a lake to the sea", "question where answer")
    prompt = Prompt((TextSegment(texts[0]), MemorySegment(embedded(transparent, texts[1])), TextSegment(texts[2])))
    ids = as_ids(transparent, *texts)
    soft = transparent.generate([prompt], max_new_tokens=6, num_beams=3)[0]
    hard = transparent.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3)
    assert soft.text == transparent.tokenizer.decode(hard[0, ids.shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def test_another_memory_is_another_prompt(generator: VistGenerator) -> None:
    prompts = [reading(5, seed=1), reading(5, seed=2), Prompt((TextSegment("document "), QUESTION))]
    last = []
    for prompt in prompts:
        with generator.fusion.condition(generator, [prompt]) as inputs:
            last.append(generator.model(**inputs).logits[0, -1])
    assert (last[0] - last[1]).abs().max() > 1e-2
    assert (last[0] - last[2]).abs().max() > 1e-2


@torch.no_grad()
def test_a_batch_reads_as_one_by_one(generator: VistGenerator) -> None:
    prompts = [
        reading(9),
        Prompt((QUESTION,)),
        reading(1, seed=3),
        Prompt((TextSegment("the sea"), *reading(4).segments)),
        reading(12, seed=5, size=2),  # more slots a position than the others
    ]
    with generator.fusion.condition(generator, prompts) as inputs:
        beside = [0 if generator.fusion.in_context else p.memory_tokens for p in prompts]
        lengths = [generator.prompt_length(p) - n for p, n in zip(prompts, beside, strict=True)]
        assert inputs["attention_mask"].sum(1).tolist() == lengths
        together = generator.model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    for row, prompt in enumerate(prompts):
        with generator.fusion.condition(generator, [prompt]) as inputs:
            alone = generator.model.generate(
                **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        for ours, theirs in zip(together.logits, alone.logits, strict=False):  # alone may end sooner
            torch.testing.assert_close(ours[row], theirs[0], atol=1e-4, rtol=1e-4)
    separate = [generator.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert generator.generate(prompts, max_new_tokens=5) == separate
    assert generator.generate(prompts, max_new_tokens=5, batch_size=3) == separate


@torch.no_grad()
def test_cached_generation_equals_a_full_forward(generator: VistGenerator) -> None:
    prompts = [reading(7), reading(2, seed=4), reading(11, seed=6, size=3)]
    with generator.fusion.condition(generator, prompts) as inputs:
        out = generator.model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert out.sequences.shape == (3, 6)
        expected = full_logits(generator, inputs, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_behind_by_an_exception(generator: VistGenerator) -> None:
    before = generator.generate([reading(3)], max_new_tokens=4)
    weights = {name: tensor.clone() for name, tensor in generator.model.state_dict().items()}
    attributes = {id(m): set(vars(m)) for m in (*generator.model.modules(), *generator.fusion.modules())}
    with pytest.raises(RuntimeError, match="on purpose"), generator.fusion.condition(generator, [reading(6, seed=8)]):
        raise RuntimeError("on purpose")
    with pytest.raises(ShapeError):
        generator.generate([Prompt((MemorySegment(memory(2, width=5)),))])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in generator.model.state_dict().items())
    assert {id(m): set(vars(m)) for m in (*generator.model.modules(), *generator.fusion.modules())} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in generator.model.modules())
    assert generator.generate([reading(3)], max_new_tokens=4) == before
    assert generator.generate([Prompt((QUESTION,))]) != before


def test_a_prompt_of_nothing_is_refused(generator: VistGenerator) -> None:
    with pytest.raises(InputError, match="prompt must hold something"):
        generator.generate([Prompt((), framed=True)])
    with pytest.raises(InputError, match="prompt must hold something"):
        generator.generate([Prompt((), framed=True), reading(3)])


def test_threads_do_not_mix(generator: VistGenerator) -> None:
    prompts = [reading(n, seed=n) for n in range(1, 7)]
    alone = [generator.generate([prompt], max_new_tokens=4, stop=["zz"])[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(lambda p: generator.generate([p], max_new_tokens=4, stop=["zz"])[0], prompts * 2))
    assert at_once == alone * 2


def test_memory_of_another_compressor_is_refused(generator: VistGenerator) -> None:
    fusion = copy.deepcopy(generator.fusion)
    fusion.bind("0123456789abcdef")
    bound = VistGenerator(generator.model, generator.tokenizer, fusion)
    with pytest.raises(IncompatibleMemoryError, match=r"compressor 0123456789ab .* got compressor"):
        bound.generate([reading(3)])
    own = VisualMemory(memory(3).latents, "0123456789abcdef")
    assert bound.generate([Prompt((MemorySegment(own), QUESTION))])[0].completion_tokens > 0
    with pytest.raises(IncompatibleMemoryError):
        VistGenerator(generator.model, generator.tokenizer).generate([reading(3)])


def test_widths_must_fit(generator: VistGenerator) -> None:
    with pytest.raises(ShapeError, match="latents must be 16 wide, got 5"):
        generator.generate([Prompt((MemorySegment(memory(2, width=5)), QUESTION))])
    with pytest.raises(ShapeError, match="generator's width, 32, got 48"):
        VistGenerator(generator.model, generator.tokenizer, SoftPromptFusion(FusionConfig(16, 48)))


# ------------------------------------------------------------------------------------------------- saving and loading


def test_fusion_survives_a_round_trip(tmp_path: Any) -> None:
    fusion = SoftPromptFusion(FusionConfig(16, 32, hidden_width=8, fingerprint="abc"))
    fusion.save_pretrained(tmp_path)
    loaded = SoftPromptFusion.from_pretrained(tmp_path)
    assert loaded.config == fusion.config
    latents = memory(4).latents
    torch.testing.assert_close(loaded.meaning(latents), fusion.meaning(latents), atol=2e-2, rtol=2e-2)  # bf16
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(SoftPromptFusion.from_pretrained(tmp_path / "again").meaning(latents), loaded.meaning(latents))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b'{"fusion": "soft_pro'),
        ("config.json", b"[]"),
        ("config.json", b'"soft_prompt"'),
        ("config.json", b'{"fusion": "cross_attention"}'),
        ("config.json", b'{"fusion": "soft_prompt", "memory_width": 0, "generator_width": 32}'),
        ("config.json", b'{"fusion": "soft_prompt", "memory_width": 16, "generator_width": 32, "spin": 2}'),
        ("config.json", b'{"fusion": "soft_prompt", "memory_width": 17, "generator_width": 32, "hidden_width": 8}'),
        ("model.safetensors", None),
        ("model.safetensors", b"\x10\x00"),
    ],
)
def test_a_damaged_fusion_is_refused(tmp_path: Any, file: str, content: bytes | None) -> None:
    SoftPromptFusion(FusionConfig(16, 32, hidden_width=8)).save_pretrained(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="fusion in"):
        SoftPromptFusion.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- shared positions


def test_latents_of_a_position_mean_their_mean() -> None:
    meaning = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, -20.0], [1.0, 1.0], [1.0, 3.0], [4.0, 2.0]])
    assert merged(meaning, torch.tensor([0, 0, 1, 2, 2, 2])).tolist() == [[2, 3], [10, -20], [2, 2]]
    torch.testing.assert_close(merged(meaning, torch.zeros(6, dtype=torch.long)), torch.tensor([[20 / 6, -8 / 6]]))
    assert torch.equal(merged(meaning, torch.arange(6)), meaning)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_many_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    meaning = torch.rand(512, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean = merged(meaning, torch.zeros(512, dtype=torch.long))
    assert mean.dtype == dtype
    torch.testing.assert_close(mean[0], meaning.double().mean(0).to(dtype))


def test_tokens_of_a_place_stand_side_by_side_in_order() -> None:
    shown = show(torch.tensor([7, 8, 9, 5, 6]), torch.tensor([1, 1, 1, 3, 3]), 5)
    assert shown.tolist() == [[-1] * 3, [7, 8, 9], [-1] * 3, [5, 6, -1], [-1] * 3]
    nothing = torch.tensor([], dtype=torch.long)
    assert show(nothing, nothing, 2).tolist() == [[-1], [-1]]


def test_rows_of_slots_are_made_as_wide_as_the_widest() -> None:
    rows = [torch.tensor([[1], [2]]), torch.tensor([[3, 4, -1]])]
    assert side_by_side(rows).tolist() == [[1, -1, -1], [2, -1, -1], [3, 4, -1]]
    padded = [[[1, -1, -1], [2, -1, -1]], [[-1, -1, -1], [3, 4, -1]]]
    assert side_by_side(rows, batch=True).tolist() == padded


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_coarser_memory_means_the_mean_and_spells_all_of_it(size: int) -> None:
    generator = causal_generator("prefix_bert")
    texts = ("the old", " bridge was", " built", " in 1867", " by marie curie")
    spelling(generator, *texts)
    fusion, words = generator.fusion, generator.model.get_input_embeddings().weight
    coarse = memory(5).coarsen(size)
    soft, shown = fusion.read(generator, coarse.latents, coarse.places)
    groups = [[i for i in range(5) if i * size // 5 == place] for place in range(size)]
    assert len(soft) == len(shown) == size + 2
    assert torch.equal(soft[[0, -1]], fusion.boundaries)
    assert (shown[[0, -1]] == -1).all()
    for group, position, tokens in zip(groups, soft[1:-1], shown[1:-1], strict=True):
        expected = generator.tokenize("".join(texts[i] for i in group))
        assert tokens[tokens >= 0].tolist() == expected.tolist()
        meaning = torch.stack([fusion.meaning(coarse.latents[i]) for i in group]).mean(0)
        torch.testing.assert_close(position, meaning + words[expected].mean(0) - words.mean(0))
    assert shown[shown >= 0].tolist() == generator.tokenize("".join(texts)).tolist()


@torch.no_grad()
def test_a_memory_that_is_as_large_as_it_can_be_reads_as_it_always_did() -> None:
    generator = causal_generator("prefix_bert")
    fusion, words, latents = generator.fusion, generator.model.get_input_embeddings().weight, memory(6).latents
    soft, shown = fusion.read(generator, latents)
    assert torch.equal(soft, fusion.join(fusion.meaning(latents), shown[1:-1], words))
    told = fusion.read(generator, latents, memory(6).places)
    assert torch.equal(told[0], soft)
    assert torch.equal(told[1], shown)


@torch.no_grad()
def test_any_generator_reads_a_memory_at_any_number_of_positions(generator: VistGenerator) -> None:
    last, frame = [], generator.prompt_length(reading(1)) - 1
    for size in (9, 4, 2, 1):
        prompt = reading(9, size=size)
        with generator.fusion.condition(generator, [prompt]) as inputs:
            assert inputs["attention_mask"].shape == (1, frame + size * generator.fusion.in_context)
            last.append(generator.model(**inputs).logits[0, -1])
        answer = generator.generate([prompt], max_new_tokens=3)[0]
        assert answer.prompt_tokens == generator.prompt_length(prompt) == frame + size
    assert all((last[i] - last[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


# ------------------------------------------------------------------------------------------------------------- spelling


def spelling(generator: VistGenerator, *texts: str) -> None:
    """Make the fusion spell these texts, one a latent, whatever it is given."""
    generator.fusion.spell = lambda latents: list(texts[: len(latents)])  # type: ignore[method-assign]


def test_tokens_belong_to_the_latent_that_spells_their_middle() -> None:
    generator = causal_generator("prefix_bert")
    spelling(generator, "the bri", "dge was", " built ", "", "in 1867")
    shown = generator.fusion.shown(generator, torch.zeros(5, 16), torch.arange(5))
    assert shown.shape == (5, max((row >= 0).sum() for row in shown))  # no more slots than are needed
    spelt = [generator.tokenizer.convert_ids_to_tokens(row[row >= 0].tolist()) for row in shown]
    expected = generator.tokenizer.tokenize("the bridge was built in 1867")
    assert [token for row in spelt for token in row] == expected
    assert spelt[0][:2] == ["the", "bridge"]
    assert spelt[1] == ["was"]
    assert spelt[2] == ["built"]
    assert spelt[3] == []


@torch.no_grad()
def test_a_soft_prompt_is_what_latents_mean_and_what_they_spell() -> None:
    generator = causal_generator("prefix_bert")
    spelling(generator, "the river", "", " runs")
    fusion, words = generator.fusion, generator.model.get_input_embeddings().weight
    latents = memory(3).latents
    begin, *inside, end = fusion.read(generator, latents)[0]
    assert torch.equal(torch.stack((begin, end)), fusion.boundaries)
    the, river, runs = generator.tokenize("the river runs").tolist()
    named = [words[[the, river]].mean(0) - words.mean(0), torch.zeros(32), words[runs] - words.mean(0)]
    torch.testing.assert_close(torch.stack(inside), fusion.meaning(latents) + torch.stack(named))


def test_a_packer_tells_the_order_of_a_positions_tokens_once_that_is_learned() -> None:
    config = FusionConfig(4, 4, hidden_width=4, spelling=3, packer_width=8)
    fusion, plain = SoftPromptFusion(config), SoftPromptFusion(replace(config, packer_width=0))
    plain.load_state_dict({k: v for k, v in fusion.state_dict().items() if not k.startswith("packer")})
    words, meaning = torch.randn(9, 4), torch.zeros(3, 4)
    shown = torch.tensor([[3, 5, 7], [2, -1, -1], [-1, -1, -1]])
    swapped = shown[:, [1, 0, 2]]
    # Untrained: the plain mean, whatever the order.
    assert torch.equal(fusion.join(meaning, shown, words), plain.join(meaning, shown, words))
    assert fusion.packer is not None
    nn.init.normal_(fusion.packer.write.weight)
    joined, other = fusion.join(meaning, shown, words), fusion.join(meaning, swapped, words)
    assert not torch.allclose(joined[1], other[1])
    # By hand, at the scale of the embeddings: a position of one token, and one that spells nothing.
    unit = (words[2] - words.mean(0)) / words.std()
    hidden = nn.functional.gelu(fusion.packer.read.weight @ torch.cat((unit, torch.zeros(4))) + fusion.packer.place[0])
    torch.testing.assert_close(joined[2], unit * words.std() + fusion.packer.write.weight @ hidden * words.std())
    assert not joined[3].any()
    # Empty slots change nothing, and more tokens than places are all read.
    padded = nn.functional.pad(shown, (0, 2), value=-1)
    torch.testing.assert_close(fusion.join(meaning, padded, words), joined)
    many = torch.arange(40)[None] % 9
    assert not torch.allclose(fusion.join(meaning[:1], many, words), fusion.join(meaning[:1], many[:, :-1], words))
    joined.sum().backward()
    assert fusion.packer.read.weight.grad is not None


def test_a_packer_in_full_precision_serves_a_model_in_half() -> None:
    half = causal_generator("llama").model.to(torch.bfloat16)
    fusion = SoftPromptFusion(FusionConfig(16, 32, hidden_width=8, spelling=3, packer_width=8))
    generator = VistGenerator(half, causal_generator("llama").tokenizer, fusion)
    spelling(generator, "the river", " runs")
    assert generator.generate([Prompt((MemorySegment(memory(2)), QUESTION))])[0].completion_tokens > 0


def test_a_model_that_copies_is_told_what_text_and_memory_show() -> None:
    generator = causal_generator("prefix_bert")
    spelling(generator, "the river", " runs")
    prompt = Prompt((MemorySegment(memory(2)), TextSegment("question where")))
    with generator.fusion.condition(generator, [prompt, Prompt((TextSegment("where"),))]) as inputs:
        assert inputs["shown"].shape == (*inputs["attention_mask"].shape, 2)  # "the river"
        first = inputs["shown"][0]
        assert generator.tokenizer.decode(first[first >= 0]) == "[CLS] the river runs question where"
        assert (inputs["shown"][1][inputs["attention_mask"][1] == 0] == -1).all()
    other = causal_generator("llama")
    with other.fusion.condition(other, [Prompt((QUESTION,))]) as inputs:
        assert "shown" not in inputs


def test_a_speller_names_characters_and_leaves_out_what_is_none() -> None:
    fusion = SoftPromptFusion(FusionConfig(8, 32, spelling=4))
    assert fusion.speller is not None
    with torch.no_grad():
        last = fusion.speller[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        wanted = [ord("b") - 32, CHARACTER_CLASSES - 2, ord("7") - 32, CHARACTER_CLASSES - 1]  # b, none, 7, another
        last.bias.copy_(nn.functional.one_hot(torch.tensor(wanted), CHARACTER_CLASSES).flatten().float())
    assert fusion.spell(torch.randn(3, 8)) == ["b7"] * 3
    with pytest.raises(ConfigError, match="spelling must be 1 or more"):
        SoftPromptFusion(FusionConfig(8, 32)).spell(torch.randn(3, 8))
    with pytest.raises(ConfigError, match="spelling must be 0 or more, got -1"):
        FusionConfig(8, 32, spelling=-1)


@torch.no_grad()
def test_memories_read_in_one_pass_are_those_read_one_by_one(generator: VistGenerator) -> None:
    memories = [memory(n, seed=n).coarsen(size) for n, size in ((1, 1), (6, 6), (9, 4), (3, 2))]
    together = generator.fusion.read_many(generator, [(one.latents, one.places) for one in memories])
    for one, (soft, shown) in zip(memories, together, strict=True):
        alone, told = generator.fusion.read(generator, one.latents, one.places)
        torch.testing.assert_close(soft, alone, atol=1e-5, rtol=1e-5)
        assert shown[:, : told.shape[1]].tolist() == told.tolist()
        assert (shown[:, told.shape[1] :] == -1).all()
    prompts = [reading(4), Prompt((QUESTION,)), Prompt((*reading(5).segments[:2], *reading(3).segments))]
    for prompt, (soft, _) in zip(prompts, generator.fusion.embed_many(generator, prompts), strict=True):
        torch.testing.assert_close(soft, generator.fusion.embed(generator, prompt)[0], atol=1e-5, rtol=1e-5)
