"""The formula against PyTorch's own counter, on the forward and backward pass of real batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support.causal import causal_generator, fused_generator
from tests.support.tiny import ATLAS, tiny_compressor, tiny_generator, tiny_tokenizer
from tests.support.towers import TOWERS, tower_sizes
from vist_rag.checkpoint import embedded_checkpoint, load_compressor
from vist_rag.compression import PassageCompressor, TextCompressor, VistCompressor
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.generation import SoftPromptFusion, VistGenerator
from vist_rag.rendering import GlyphAtlas
from vist_rag.training.data import Question
from vist_rag.training.examples import Example, answer_example, continue_example, reconstruct_example
from vist_rag.training.flops import BatchCosts, Flops, batch_costs, part_of
from vist_rag.training.lexical import LexicalAlignment, lexical_batch
from vist_rag.training.objectives import Pve
from vist_rag.training.parts import plain, train_only
from vist_rag.training.reading import MemoryReading
from vist_rag.training.tower import TowerReading, reading_batch
from vist_rag.types import Passage

TEXT = (
    "the river runs from a lake to the sea . its old bridge was built in 1867 by marie curie . it stands there still "
    "and the lake is as old as the sea . the question is who built it"
)
LONG = " ".join([TEXT] * 5)  # two pages


def measured(model: nn.Module, batch: dict[str, Any]) -> Flops:
    model.train()
    with sdpa_kernel(SDPBackend.MATH):  # what the CPU's fused attention does is not counted by PyTorch
        with FlopCounterMode(display=False) as forward:
            loss = model(**batch)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def check(model: nn.Module, batch: dict[str, Any], *, within: float = 0.03, **options: Any) -> BatchCosts:
    costs = batch_costs(model, batch, examples=2, **options)
    told, found = sum(costs.flops.values(), Flops()), measured(model, batch)
    assert told.forward == pytest.approx(found.forward, rel=within)
    assert told.backward == pytest.approx(found.backward, rel=within)
    return costs


def examples(*, raw: bool = False) -> list[Example]:
    rng = random.Random(0)
    row = Question("who built it", ("marie curie",), "bridge", TEXT)
    return [
        reconstruct_example(Passage(TEXT), rng, words=(8, 12), raw=raw),
        continue_example(Passage(TEXT, title="bridge"), rng, words=(20, 30), raw=raw),
        answer_example(row, rng, words=(15, 30), others=[Passage(TEXT[:60])], raw=raw),
    ]


def reading(
    compressor: PassageCompressor, generator: VistGenerator, parts: Sequence[str], **options: Any
) -> MemoryReading:
    model = MemoryReading(compressor, generator, **options)
    train_only(model, parts)
    if model.distil or model.states:
        model.teach_itself()
    return model


def batch_of(model: MemoryReading, *, raw: bool = False) -> dict[str, Any]:
    return model.batch(examples(raw=raw), random.Random(0))


def pair(family: str) -> tuple[PassageCompressor, VistGenerator]:
    """A tiny pair; or the one that ships, as what an untaught one spells is noise."""
    if family.startswith("crossed "):
        return tiny_compressor(), fused_generator(family.removeprefix("crossed "), "cross_attention")
    if family != "embedded":
        return tiny_compressor(), causal_generator(family)
    directory = embedded_checkpoint()
    generator = VistGenerator.from_pretrained(directory / "generator", fusion=directory / "fusion", device="cpu")
    generator.fusion.bind("")
    return load_compressor(directory, device="cpu"), generator


PVE = Pve(torch.zeros(1000), weight=0.1, mask="random")
CASES: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
    "the frozen generator of the paper": ("llama", ("resampler", "projector"), {}),
    "with pve": ("llama", ("resampler", "projector"), {"pve": PVE}),
    "the projector alone": ("qwen3", ("projector",), {}),
    "a tower that learns": ("gpt2", ("tower", "resampler", "projector"), {}),
    "a generator that learns": ("llama", ("projector", "generator"), {}),
    "its embeddings too": ("qwen3", ("projector", "generator", "embeddings"), {}),
    "distilled": ("llama", ("resampler", "projector"), {"distil": 1.0}),
    "boundaries alone": ("gpt2", ("boundaries",), {}),
    "of few latents": ("llama", ("resampler", "projector"), {"rates": {0.25: 1.0}}),
    "cross-attention in a frozen generator": ("crossed llama", ("resampler", "projector"), {"distil": 1.0}),
    "cross-attention with pve": ("crossed qwen3", ("resampler", "projector"), {"pve": PVE}),
    "cross-attention in a generator that learns": ("crossed llama", ("projector", "generator"), {"rates": {0.25: 1.0}}),
    "one that copies": ("embedded", ("resampler", "projector"), {}),
    "one that copies, and learns": ("embedded", ("projector", "generator"), {"distil": 1.0, "states": 1.0}),
    "ideal memory": ("embedded", ("projector", "generator"), {"ideal": 1.0, "distil": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_reading_memory(case: str) -> None:
    family, parts, options = CASES[case]
    model = reading(*pair(family), parts, **options)
    costs = check(model, batch_of(model))
    assert ("teacher" in costs.flops) is bool(options.get("distil"))
    assert ("tower" in costs.flops) is not bool(options.get("ideal"))


@pytest.mark.parametrize("parts", [("generator", "boundaries", "packer"), ("packer",)])
@pytest.mark.parametrize("ideal", [0.0, 1.0])
def test_a_packer_is_counted(ideal: float, parts: tuple[str, ...]) -> None:
    compressor, generator = pair("embedded")
    config = replace(generator.fusion.config, packer_width=0)
    packers = [
        VistGenerator(generator.model, generator.tokenizer, SoftPromptFusion(replace(config, packer_width=width)))
        for width in (0, 64)
    ]
    state = {n: t for n, t in generator.fusion.state_dict().items() if not n.startswith("packer")}
    for one in packers:
        one.fusion.load_state_dict(state, strict=False)
    plain = reading(compressor, packers[0], parts, ideal=ideal)
    less = batch_costs(plain, batch_of(plain), examples=2).flops.get("projector", Flops())
    packed = reading(compressor, packers[1], parts, ideal=ideal)
    costs = check(packed, batch_of(packed))
    more = costs.flops["projector"] + Flops(0, 0)
    assert more.forward - less.forward > 0.5 * 2 * 64 * 3 * 384 * costs.memory_tokens
    assert more.backward > less.backward


@pytest.mark.parametrize("family", ["llama", "prefix_bert"])
def test_reading_text_takes_no_tower_and_no_teacher(family: str) -> None:
    model = reading(tiny_compressor(), causal_generator(family), ("projector", "generator"), distil=1.0)
    costs = check(model, batch_of(model, raw=True))
    assert set(costs.flops) == {"generator"}
    assert (costs.pages, costs.memory_tokens) == (0, 0)


def lora(generator: VistGenerator) -> VistGenerator:
    adapted: Any = get_peft_model(generator.model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    return VistGenerator(adapted, generator.tokenizer, generator.fusion)


@pytest.mark.parametrize("parts", [("resampler", "projector", "lora"), ("projector",)])
def test_adapters(parts: tuple[str, ...]) -> None:
    model = reading(tiny_compressor(), lora(causal_generator("llama")), parts, distil=1.0)
    costs = check(model, batch_of(model))
    assert costs.flops["teacher"].backward == 0


def test_layers_that_are_computed_again() -> None:
    model = reading(tiny_compressor(), causal_generator("llama"), ("resampler", "projector"))
    batch = batch_of(model)
    kept = batch_costs(model, batch, examples=3)
    model.gradient_checkpointing_enable()
    costs = check(model, batch, checkpointing=True, within=0.06)  # PyTorch leaves out what nobody needs again
    assert costs.flops["generator"].backward > kept.flops["generator"].backward
    assert costs.activation_bytes < kept.activation_bytes


def tower_of(config: Any, **sizes: Any) -> VistCompressor:
    torch.manual_seed(0)
    resampler = ResamplerConfig(**{"width": 16, "heads": 2, "layers": 2, "latents_per_page": 4} | sizes)
    return VistCompressor.build(config, GlyphAtlas.load(ATLAS), resampler=resampler)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_the_hub(kind: str, learns: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    compressor = tower_of(tower_sizes(kind, patch_size=14, side=16, **sizes))
    parts = ["resampler", "projector", *(["tower"] if learns else [])]
    model = reading(compressor, causal_generator("llama"), parts)
    check(model, batch_of(model))


def test_a_resampler_of_all_kinds_of_latents_that_reads_blank_patches() -> None:
    compressor = tiny_compressor(salience=True, spelling_width=8, mask_blank=False)
    generator = tiny_generator()
    fusion = SoftPromptFusion(FusionConfig(25, 32, hidden_width=32, spelling=20, spelling_width=8))
    generator = VistGenerator(generator.model, generator.tokenizer, fusion)
    model = reading(compressor, generator, ("resampler", "projector"))
    texts = iter([p.content for example in examples() for p in example.passages])

    def spell(latents: Tensor) -> list[str]:  # an untaught speller's noise is more to read than words are
        text, size = next(texts), len(latents)
        return [text[len(text) * i // size : len(text) * (i + 1) // size] for i in range(size)]

    fusion.spell = spell  # type: ignore[method-assign]
    check(model, batch_of(model), within=0.05)


@pytest.mark.parametrize("pooled", [False, True])
def test_compressors_that_read_tokens(pooled: bool) -> None:
    torch.manual_seed(0)
    sizes = ResamplerConfig(width=16, heads=2, layers=1, latents_per_page=8, tower_layers=(0,))
    tokenizer = plain(tiny_tokenizer().backend_tokenizer)
    compressor = TextCompressor.build(torch.randn(200, 24), tokenizer, page_tokens=24, pooled=pooled, resampler=sizes)
    fusion = SoftPromptFusion(FusionConfig(compressor.memory_width, 32, hidden_width=32, spelling_width=9, tokens=3))
    generator = tiny_generator()
    generator = VistGenerator(generator.model, generator.tokenizer, fusion)
    model = reading(compressor, generator, ("resampler", "projector"))
    costs = check(model, batch_of(model))
    assert "tower" not in costs.flops  # token embeddings do not multiply


# -------------------------------------------------------------------------------------------------- lexical and tower


@pytest.mark.parametrize("parts", [("resampler", "projector"), ("tower", "resampler", "projector")])
@pytest.mark.parametrize("heads", [False, True])
def test_a_lexical_stage(parts: tuple[str, ...], heads: bool) -> None:
    compressor, generator = tiny_compressor(), tiny_generator()
    words = generator.model.get_input_embeddings().weight.detach()
    reads = TowerReading(compressor.tower, words.clone()) if heads else None
    train_only(MemoryReading(compressor, generator), parts)
    model = LexicalAlignment(compressor, generator.fusion, words, reads)
    tokenizer = plain(generator.tokenizer.backend_tokenizer)
    batch = lexical_batch([TEXT, TEXT[:90], LONG], compressor, tokenizer, reading=heads, spelling=20)
    costs = check(model, batch)
    assert costs.pages == len(batch["pixel_values"]) == 4
    pieces = tokenizer.encode_batch([TEXT, TEXT[:90], LONG], add_special_tokens=False)
    assert costs.target_tokens == sum(len(encoding.ids) for encoding in pieces)


def test_a_tower_stage() -> None:
    compressor, generator = tiny_compressor(), tiny_generator()
    compressor.tower.requires_grad_(True)
    model = TowerReading(compressor.tower, generator.model.get_input_embeddings().weight.detach())
    batch = reading_batch([TEXT, LONG], compressor.renderer, plain(generator.tokenizer.backend_tokenizer))
    costs = check(model, batch)
    assert set(costs.flops) == {"tower", "heads"}


# ----------------------------------------------------------------------------------------------- positions and memory


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_positions_are_those_of_the_batch(rate: float) -> None:
    """What is counted, and what the generator is given."""
    model = reading(tiny_compressor(), causal_generator("llama"), ("resampler", "projector"), rates={rate: 1.0})
    batch = batch_of(model)
    costs = batch_costs(model, batch, examples=3)
    seen: list[Tensor] = []
    model.lm.register_forward_pre_hook(lambda _, __, given: seen.append(given["attention_mask"]), with_kwargs=True)
    model(**batch)
    assert costs.text_tokens + costs.memory_tokens + costs.target_tokens == int(seen[0].sum())
    assert costs.target_tokens == sum(map(len, batch["targets"]))
    latents = model.compressor.encode([p.content for example in examples() for p in example.passages])
    expected = sum(max(1, round(rate * len(memory.latents))) + 2 for memory in latents)
    assert costs.memory_tokens == expected


@pytest.mark.parametrize("parts", [("resampler", "projector"), ("projector", "generator")])
@pytest.mark.parametrize("family", ["llama", "embedded"])
def test_activations_are_about_what_autograd_keeps(family: str, parts: tuple[str, ...]) -> None:
    model = reading(*pair(family), parts).train()
    batch = batch_of(model)
    told = batch_costs(model, batch, examples=3).activation_bytes
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch)["loss"]
    assert loss.requires_grad
    found = sum(size for _, size in kept.values())
    assert 0.5 < told / found < 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("compressor.tower.model.embeddings.cls_token", "tower"),
        ("tower.model.embeddings.cls_token", "tower"),
        ("compressor.resampler.latents", "resampler"),
        ("fusion.boundaries", "projector"),
        ("lm.model.layers.0.mlp.up_proj.weight", "generator"),
        ("lm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "lora"),
        ("reading.words.weight", "heads"),
        ("characters.1.weight", "heads"),
    ],
)
def test_every_weight_has_a_part(name: str, part: str) -> None:
    assert part_of(name) == part
