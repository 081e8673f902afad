"""What cross-attention adds to the contract of a fusion (``test_fusion.py``), in every family that takes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F  # noqa: N812
from transformers import GraniteConfig, GraniteForCausalLM

from tests.support.causal import FUSED, causal_generator, fused_generator, taught
from vist_rag.compression import VisualMemory
from vist_rag.config import CrossAttentionConfig, FusionConfig
from vist_rag.errors import CheckpointError, ConfigError, IncompatibleMemoryError
from vist_rag.generation import (
    CrossAttentionFusion,
    MemorySegment,
    Prompt,
    SoftPromptFusion,
    TextSegment,
    VistGenerator,
    load_fusion,
)
from vist_rag.generation.fusion.decoder_layers import decoder_layers, self_attention, take_memory

CROSSED = [family for family, fusion in FUSED if fusion == "cross_attention"]
PRE_NORM = [family for family in CROSSED if family != "prefix_bert"]
QUESTION = TextSegment("question when was the bridge built answer")
NOTHING = torch.full((1, 1), -1)  # spelt
TEXT = Prompt((TextSegment("document "), QUESTION))


@pytest.fixture(params=CROSSED, scope="module")
def generator(request: pytest.FixtureRequest) -> VistGenerator:
    return fused_generator(request.param, "cross_attention")


def memory(n: int, seed: int = 1, width: int = 16) -> VisualMemory:
    return VisualMemory(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), "compressor")


def reading(*sizes: int, seed: int = 1) -> Prompt:
    held = [MemorySegment(memory(n, seed + i)) for i, n in enumerate(sizes)]
    return Prompt((TextSegment("document "), *held, QUESTION))


@torch.no_grad()
def logits(generator: VistGenerator, *prompts: Prompt) -> Tensor:
    with generator.fusion.condition(generator, list(prompts)) as inputs:
        return generator.model(**inputs).logits


# ------------------------------------------------------------------------------------------------- the base, untouched


@pytest.mark.parametrize("family", CROSSED)
def test_a_fresh_fusion_and_a_closed_gate_leave_the_base_model_as_it_is(family: str) -> None:
    base = causal_generator(family)
    expected = logits(base, TEXT)
    fusion = CrossAttentionFusion.for_model(base.model, 16)
    crossed = VistGenerator(base.model, base.tokenizer, fusion)
    assert torch.equal(logits(crossed, reading(5)), expected)  # the memory takes no position
    taught(fusion)
    assert (logits(crossed, reading(5)) - expected).abs().max() > 1e-2
    assert torch.equal(logits(crossed, TEXT), expected)  # no memory, nothing to read
    for block in fusion.blocks.values():
        block.gate.data.zero_()
    assert torch.equal(logits(crossed, reading(5)), expected)


def test_a_model_keeps_its_weights_their_names_and_its_classes() -> None:
    base = causal_generator("llama")
    names, kinds = list(base.model.state_dict()), [type(m) for m in base.model.modules()]
    VistGenerator(base.model, base.tokenizer, CrossAttentionFusion.for_model(base.model, 16))
    assert list(base.model.state_dict()) == names
    assert [type(m) for m in base.model.modules()] == kinds


def test_two_fusions_share_a_model_and_a_copy_is_its_own() -> None:
    base = causal_generator("qwen3")
    one, other = (fused_generator("qwen3", "cross_attention").fusion for _ in range(2))
    taught(other)
    first, second = (VistGenerator(base.model, base.tokenizer, fusion) for fusion in (one, other))
    assert (logits(first, reading(4)) - logits(second, reading(4))).abs().max() > 1e-2
    assert torch.equal(logits(first, reading(4)), logits(VistGenerator(base.model, base.tokenizer, one), reading(4)))
    copied = VistGenerator(copy.deepcopy(base.model), base.tokenizer, one)
    before = logits(first, reading(4))
    copied.model.get_input_embeddings().weight.data.zero_()
    assert torch.equal(logits(first, reading(4)), before)
    assert not torch.equal(logits(copied, reading(4)), before)


# ------------------------------------------------------------------------------------------------------ where it starts


@pytest.mark.parametrize("family", CROSSED)
@pytest.mark.parametrize("width", [16, 48])
def test_queries_keys_and_values_start_from_self_attention(family: str, width: int) -> None:
    base = causal_generator(family)
    fusion = CrossAttentionFusion.for_model(base.model, width)
    layers = decoder_layers(base.model)
    assert list(fusion.blocks) == [str(n) for n in range(len(layers))]
    for block, layer in zip(fusion.blocks.values(), layers, strict=True):
        own = self_attention(layer)
        assert torch.equal(block.query.weight, own.query.weight)
        for ours, theirs in ((block.key, own.key), (block.value, own.value)):
            assert torch.equal(ours.weight[:, :32], theirs.weight[:, :width])
            assert not ours.weight[:, 32:].any()
        if own.query.bias is not None:
            assert torch.equal(block.key.bias, own.key.bias)
        states = torch.randn(3, 32)
        if own.norm is not None:
            torch.testing.assert_close(block.norm(states), own.norm(states), atol=1e-4, rtol=1e-4)
        assert not block.output.weight.any()


def test_weights_in_few_bits_are_read_through_their_layer() -> None:
    class Packed(torch.nn.Linear):
        """As a layer of bitsandbytes: its weight is stored in another shape."""

        def __init__(self, plain: torch.nn.Linear) -> None:
            super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
            self.bias = plain.bias
            self.packed = plain.weight.detach().to(torch.bfloat16)
            self.weight = torch.nn.Parameter(self.packed.flatten()[:, None], requires_grad=False)

        def forward(self, states: Tensor) -> Tensor:
            return F.linear(states, self.packed.to(states.dtype), None if self.bias is None else self.bias.to(states))

    base = causal_generator("prefix_bert")
    expected = CrossAttentionFusion.for_model(base.model, 16)
    for layer in decoder_layers(base.model):
        own = layer.attention.self
        own.query, own.key, own.value = Packed(own.query), Packed(own.key), Packed(own.value)
    found = CrossAttentionFusion.for_model(base.model, 16)
    for ours, theirs in zip(found.blocks.values(), expected.blocks.values(), strict=True):
        torch.testing.assert_close(ours.query.weight, theirs.query.weight, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(ours.key.weight, theirs.key.weight, atol=1e-2, rtol=1e-2)
        assert torch.equal(ours.value.bias, theirs.value.bias)


def test_every_second_layer_ends_with_the_last() -> None:
    base = causal_generator("llama")
    assert list(CrossAttentionFusion.for_model(base.model, 16, every=2).blocks) == ["1"]
    with pytest.raises(ConfigError, match=r"every must be in 1\.\.2 \(layers of this generator\), got 3"):
        CrossAttentionFusion.for_model(base.model, 16, every=3)


@torch.no_grad()
def test_a_layer_looks_at_memory_between_attention_and_feed_forward() -> None:
    generator = fused_generator("llama", "cross_attention")
    fusion, layer = generator.fusion, decoder_layers(generator.model)[0]
    assert isinstance(fusion, CrossAttentionFusion)
    latents = memory(5).latents
    given = fusion.memory_arguments([[(latents, NOTHING)]])
    states, core = torch.randn(1, 6, 32), generator.model.model
    angles = core.rotary_emb(states, position_ids=torch.arange(6)[None])
    mask = torch.full((6, 6), -1e9).triu(1)[None, None]
    found = layer(states, attention_mask=mask, position_embeddings=angles, **given)

    attended = states + layer.self_attn(layer.input_layernorm(states), angles, mask)[0]
    block, config = fusion.blocks["0"], fusion.config.attention
    assert config is not None
    sines = torch.stack([torch.arange(5) * 10_000 ** (-2 * wave / 16) for wave in range(8)], dim=-1)
    places = torch.stack((sines.sin(), sines.cos()), dim=-1).flatten(1)
    normed = F.layer_norm(latents, (16,)) + 0.1 * places
    queries = block.query(F.rms_norm(attended, (32,), block.norm.weight, eps=1e-6)).view(6, 4, 8)
    keys, values = block.key(normed).view(5, 2, 8), block.value(normed).view(5, 2, 8)
    heads = []
    for head in range(4):  # two of them share keys and values
        weights = (queries[:, head] @ keys[:, head // 2].T * 8**-0.5).softmax(-1)
        heads.append(weights @ values[:, head // 2])
    looked = attended + torch.tanh(torch.ones(())) * (torch.cat(heads, dim=-1) @ block.output.weight.T)
    expected = looked + layer.mlp(layer.post_attention_layernorm(looked))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- memory


@torch.no_grad()
def test_keys_and_values_are_computed_once_for_all_layers_in_buckets(generator: VistGenerator) -> None:
    fusion = generator.fusion
    with fusion.condition(generator, [reading(5, 3), TEXT, reading(70)]) as inputs:
        attention = fusion.config.attention
        assert attention is not None
        kv, mask = inputs["memory_kv"], inputs["memory_mask"]
        assert kv.shape == (3, 2, 2, attention.kv_heads, 128, 8 if attention.norm else 16)
        assert mask.sum(1).tolist() == [8, 1, 70]  # a row without memory looks at one zero
        assert not kv[1].any()
        assert not kv[0, ..., 8:, :].any()
        assert mask[0, :8].all()
    with fusion.condition(generator, [TEXT]) as inputs:
        assert not [name for name in inputs if name.startswith("memory")]


def test_memories_are_read_in_order(generator: VistGenerator) -> None:
    ahead, behind = MemorySegment(memory(4, 1)), MemorySegment(memory(4, 2))
    asked = [Prompt((first, second, QUESTION)) for first, second in ((ahead, behind), (behind, ahead))]
    assert (logits(generator, asked[0]) - logits(generator, asked[1])).abs().max() > 1e-4


def test_how_much_is_padded_changes_nothing(generator: VistGenerator) -> None:
    fusion = copy.deepcopy(generator.fusion)
    assert isinstance(fusion, CrossAttentionFusion)
    wide = VistGenerator(generator.model, generator.tokenizer, fusion)
    given = logits(wide, reading(5), reading(9))
    attention = fusion.config.attention
    assert attention is not None
    for bucket in (1, 200):
        fields = {name: getattr(attention, name) for name in CrossAttentionConfig.__slots__} | {"bucket": bucket}
        object.__setattr__(fusion.config, "attention", CrossAttentionConfig(**fields))
        torch.testing.assert_close(logits(wide, reading(5), reading(9)), given, atol=1e-4, rtol=1e-4)


def test_beams_of_a_batch_are_those_of_each_alone(generator: VistGenerator) -> None:
    prompts = [reading(3), TEXT, reading(8, 2, seed=5)]
    together = generator.generate(prompts, max_new_tokens=5, num_beams=3)
    assert together == [generator.generate([prompt], max_new_tokens=5, num_beams=3)[0] for prompt in prompts]
    if "gemma" not in generator.model.config.model_type:  # whose scaled embeddings say one thing at this size
        assert len({answer.text for answer in together}) == 3


@pytest.mark.parametrize("family", PRE_NORM)
def test_a_static_cache_gives_the_same_answers(family: str) -> None:
    generator = fused_generator(family, "cross_attention")
    prompts = [reading(3), reading(9, seed=4)]
    with generator.fusion.condition(generator, prompts) as inputs:
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        dynamic = generator.model.generate(**inputs, **options)
        static = generator.model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    assert static.tolist() == dynamic.tolist()


def test_a_stream_is_the_whole_answer_in_pieces(generator: VistGenerator) -> None:
    whole = generator.generate([reading(6)], max_new_tokens=6)[0]
    ends = []

    def told() -> Iterator[str]:
        ends.append((yield from generator.stream(reading(6), max_new_tokens=6)))

    said = list(told())
    assert ends == [whole]
    assert "".join(said).strip() == whole.text
    assert whole.prompt_tokens == generator.prompt_length(reading(6)) == generator.prompt_length(TEXT) + 6


@torch.no_grad()
def test_continuations_are_scored_with_memory_in_view(generator: VistGenerator) -> None:
    continuations = [generator.tokenize(text) for text in ("in 1867", "the river runs", "sea")]
    scores = generator.score(reading(7), continuations, batch_size=2)
    for ids, score in zip(continuations, scores, strict=True):
        with generator.fusion.condition(generator, [reading(7)]) as inputs:
            embeds = torch.cat((inputs["inputs_embeds"], generator.model.get_input_embeddings()(ids)[None]), dim=1)
            length = inputs["inputs_embeds"].shape[1]
            whole = {**inputs, "inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2])}
            if "shown" in inputs:
                whole["shown"] = F.pad(inputs["shown"], (0, 0, 0, len(ids)), value=-1)
                whole["prefix_mask"] = torch.arange(embeds.shape[1])[None] < length
            expected = generator.model(**whole).logits[0, length - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(score, expected.gather(1, ids[:, None])[:, 0], atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- prefix cache


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_kept_prefix_belongs_to_its_memories(family: str) -> None:
    generator = fused_generator(family, "cross_attention")
    long = TextSegment("the old bridge was built in 1867 by marie curie the river runs from a lake to the sea " * 2)

    def ask(seed: int, question: str) -> Prompt:
        return Prompt((long, MemorySegment(memory(5, seed)), TextSegment(question)))

    prompts = [ask(1, "when"), ask(2, "when"), ask(1, "where was the bridge"), ask(2, "where was the bridge")]
    plain = VistGenerator(generator.model, generator.tokenizer, generator.fusion, prefix_cache_bytes=0)
    expected = [plain.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert [generator.generate([prompt], max_new_tokens=5)[0] for prompt in prompts] == expected
    found, _ = generator.prefixes.begin(generator, [ask(1, "built")], {})
    assert found is not None
    assert found.length == generator.prompt_length(Prompt((long,))) - len(generator.frame[1])
    assert generator.prefixes.begin(generator, [ask(3, "built")], {})[0] is None


# ------------------------------------------------------------------------------------------------- training and tracing


@pytest.mark.parametrize("family", CROSSED)
def test_layers_may_be_computed_again_in_the_backward_pass(family: str) -> None:
    gradients = []
    for again in (False, True):
        generator = fused_generator(family, "cross_attention")
        model, fusion = generator.model.train(), generator.fusion
        assert isinstance(fusion, CrossAttentionFusion)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        latents = memory(5).latents.requires_grad_()
        given = fusion.memory_arguments([[(latents, NOTHING)]])
        model(input_ids=torch.arange(5, 12)[None], use_cache=False, **given).logits.square().sum().backward()
        block = fusion.blocks["0"]
        gradients.append([latents.grad, *(weight.grad for weight in block.parameters()), fusion.place.grad])
    for plain, anew in zip(*gradients, strict=True):
        assert plain is not None
        assert plain.any()
        torch.testing.assert_close(anew, plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_memories_of_any_length_in_a_bucket_are_compiled_once() -> None:
    generator = fused_generator("llama", "cross_attention")
    fusion, ids = generator.fusion, torch.arange(5, 12)[None]
    assert isinstance(fusion, CrossAttentionFusion)
    counter = CompileCounter()
    compiled = torch.compile(generator.model, backend=counter, fullgraph=True)
    for n in (3, 40, 64):
        given = fusion.memory_arguments([[(memory(n).latents, NOTHING)]])
        expected = generator.model(input_ids=ids, use_cache=False, **given).logits
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False, **given).logits, expected)
    assert counter.frame_count == 1


def test_hidden_states_are_still_to_be_had(generator: VistGenerator) -> None:
    with generator.fusion.condition(generator, [reading(4)]) as inputs:
        states = generator.model(**inputs, output_hidden_states=True).hidden_states
    with generator.fusion.condition(generator, [TEXT]) as inputs:
        others = generator.model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], others[0])
    assert all((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(states[1:], others[1:], strict=True))


# --------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("family", CROSSED)
def test_a_fusion_is_saved_and_loaded_beside_its_model(tmp_path: Path, family: str) -> None:
    generator = fused_generator(family, "cross_attention")
    fusion = generator.fusion
    fusion.bind("compressor")
    for weight in fusion.parameters():
        weight.data = weight.data.to(torch.bfloat16).float()  # as it is stored
    generator.model.save_pretrained(tmp_path / "generator")
    generator.tokenizer.save_pretrained(tmp_path / "generator")
    fusion.save_pretrained(tmp_path / "fusion")
    loaded = VistGenerator.from_pretrained(tmp_path / "generator", fusion=tmp_path / "fusion", device="cpu")
    assert isinstance(loaded.fusion, CrossAttentionFusion)
    assert loaded.fusion.config == fusion.config
    paths: dict[str, Any] = {"fusion": tmp_path / "fusion", "device": "cpu", "dtype": torch.bfloat16}
    half = VistGenerator.from_pretrained(tmp_path / "generator", **paths)
    assert {weight.dtype for weight in half.fusion.parameters()} == {torch.bfloat16}
    assert (logits(half, reading(5)) - logits(half, TEXT)).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded, reading(5)), logits(generator, reading(5)), atol=1e-4, rtol=1e-4)
    with pytest.raises(IncompatibleMemoryError):
        loaded.generate([Prompt((MemorySegment(VisualMemory(memory(3).latents, "another")), QUESTION))])
    with pytest.raises(CheckpointError, match="must be 'soft_prompt', got 'cross_attention'"):
        SoftPromptFusion.from_pretrained(tmp_path / "fusion")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"fusion": "telepathy"}', '{"fusion": ["soft_prompt"]}'])
def test_a_fusion_of_no_known_kind_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"fusion in .* must be one of soft_prompt, cross_attention"):
        load_fusion(tmp_path)


def test_a_model_in_half_precision_reads_a_fusion_in_full(generator: VistGenerator) -> None:
    model = copy.deepcopy(generator.model).to(torch.bfloat16)
    half = VistGenerator(model, generator.tokenizer, copy.deepcopy(generator.fusion))
    assert half.fusion.boundaries.dtype == torch.float32
    assert logits(half, reading(5)).dtype == torch.bfloat16
    assert (logits(half, reading(5)) - logits(half, TEXT)).abs().max() > 1e-2


def test_a_fusion_that_reads_what_memory_spells(generator: VistGenerator) -> None:
    sizes = FusionConfig(16, 32, hidden_width=8, spelling=4, packer_width=4)
    fusion = CrossAttentionFusion.for_model(generator.model, 16, direct=False, reads=sizes)
    taught(fusion)
    spelling = VistGenerator(generator.model, generator.tokenizer, fusion)
    fusion.spell = lambda latents: ["the", " sea"][: len(latents)]  # type: ignore[method-assign]
    sea = logits(spelling, reading(2))
    fusion.spell = lambda latents: ["the", " lake"][: len(latents)]  # type: ignore[method-assign]
    assert (logits(spelling, reading(2)) - sea).abs().max() > 1e-4


@torch.no_grad()
def test_a_word_that_only_memory_spells_can_be_copied() -> None:
    generator = fused_generator("prefix_bert", "pointed")
    fusion = generator.fusion
    assert isinstance(fusion, CrossAttentionFusion)
    sea = int(generator.tokenize("sea")[0])
    fusion.spell = lambda latents: ["sea", *[""] * (len(latents) - 1)]  # type: ignore[method-assign]
    with fusion.condition(generator, [reading(2)]) as inputs:
        read = generator.model(**inputs)
        inputs["memory_shown"] = torch.full_like(inputs["memory_shown"], -1)
        unspelt = generator.model(**inputs)
    # The slots of memory come first, those of the prompt behind, the end last.
    pointed = read.attentions[0][0, -1]
    assert len(pointed) == inputs["memory_shown"].numel() + inputs["shown"].numel() + 1
    assert pointed[0] > 0
    assert not pointed[1 : inputs["memory_shown"].numel()].any()
    gained = read.logits[0, -1, sea] - unspelt.logits[0, -1, sea]
    words = read.logits.shape[-1]
    torch.testing.assert_close(gained, (pointed[0] + 1 / words).log() - torch.tensor(1 / words).log())


@torch.no_grad()
def test_what_a_latent_spells_is_pointed_at_by_what_it_means() -> None:
    generator = fused_generator("prefix_bert", "pointed")
    fusion = generator.fusion
    assert isinstance(fusion, CrossAttentionFusion)
    for block in fusion.blocks.values():  # the layers are told nothing: what differs is what is pointed at
        block.output.weight.zero_()
    fusion.spell = lambda latents: ["sea", *[""] * (len(latents) - 1)]  # type: ignore[method-assign]
    first, second = memory(2).latents, memory(2, seed=5).latents
    pointed = {}
    for name, latents in {"a": first, "b": torch.stack((first[0], second[1])), "c": second}.items():
        prompt = Prompt((TextSegment("document "), MemorySegment(VisualMemory(latents, "compressor")), QUESTION))
        with fusion.condition(generator, [prompt]) as inputs:
            pointed[name] = generator.model(**inputs).attentions[0][0, -1]
    torch.testing.assert_close(pointed["a"], pointed["b"])  # the latent beside it spells nothing
    assert (pointed["a"][0] - pointed["c"][0]).abs() > 1e-4


def test_nothing_is_pointed_at_where_nothing_is_copied_or_spelt() -> None:
    with pytest.raises(ConfigError, match=r"pointed must be False for a generator that copies no words, got True"):
        CrossAttentionFusion.for_model(causal_generator("llama").model, 16, direct=False, pointed=True)
    with pytest.raises(ConfigError, match=r"pointed must be False where latents are read as they are"):
        CrossAttentionFusion.for_model(causal_generator("prefix_bert").model, 16, pointed=True)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_layers_of_another_shape_are_refused() -> None:
    base = causal_generator("gpt2")
    with pytest.raises(ConfigError, match=r"layers of Llama's shape .* got GPT2LMHeadModel; use fusion 'soft_prompt'"):
        CrossAttentionFusion.for_model(base.model, 16)


def test_layers_that_only_look_alike_are_refused_and_left_as_they_were() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = GraniteForCausalLM(GraniteConfig(**sizes, vocab_size=60, residual_multiplier=0.5, initializer_range=0.3))
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    with pytest.raises(ConfigError, match=r"as Llama does .* got GraniteForCausalLM"):
        take_memory(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_with_hooks_in_the_place_of_forward_is_refused() -> None:
    base = causal_generator("llama")
    layer = decoder_layers(base.model)[0]
    layer.forward = layer.forward  # as accelerate's hooks do
    with pytest.raises(ConfigError, match="device_map"):
        take_memory(base.model)


def test_a_fusion_for_another_generator_is_refused() -> None:
    llama, bert = causal_generator("llama"), causal_generator("prefix_bert")
    with pytest.raises(
        ConfigError, match=r"2 layers with 2 heads, 2 of keys, 16 wide; got one for layer 1, with 4, 2, 8"
    ):
        VistGenerator(bert.model, bert.tokenizer, CrossAttentionFusion.for_model(llama.model, 16))
    with pytest.raises(ConfigError, match="attention must be sizes of cross-attention, got None"):
        CrossAttentionFusion(FusionConfig(16, 32))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", (), "layers must be numbers of layers"),
        ("layers", (1, 0), "layers must be numbers of layers"),
        ("kv_heads", 3, r"kv_heads must be a divisor of heads \(4\), got 3"),
        ("scale", 0.0, "scale must be above 0"),
        ("bucket", 0, "bucket must be 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(field: str, value: Any, message: str) -> None:
    good: dict[str, Any] = {"layers": (0, 1), "heads": 4, "kv_heads": 2, "d_head": 8, "scale": 0.5}
    with pytest.raises(ConfigError, match=message):
        CrossAttentionConfig(**(good | {field: value}))


def test_threads_with_and_without_memory_do_not_mix(generator: VistGenerator) -> None:
    prompts = [reading(3), TEXT, reading(6, 2, seed=7), TEXT]
    alone = [generator.generate([prompt], max_new_tokens=4)[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(lambda p: generator.generate([p], max_new_tokens=4)[0], prompts * 3))
    assert at_once == alone * 3
