from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from tests.support.causal import causal_generator
from tests.support.cli import WordEmbedder
from tests.support.tiny import ATLAS, TOWER, tiny_compressor, tiny_generator
from vist_rag.checkpoint import load_compressor
from vist_rag.compression import VistCompressor
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError, MissingDependencyError
from vist_rag.generation import MemorySegment, Prompt, SoftPromptFusion, TextSegment, VistGenerator
from vist_rag.pipeline import VistRAG
from vist_rag.references import Reference
from vist_rag.rendering import GlyphAtlas
from vist_rag.retrieval import PassageIndex
from vist_rag.training.export import save_checkpoint
from vist_rag.types import Passage

TEXTS = ["the old bridge was built in 1867", "a river runs from the lake to the sea"]
VISION: dict[str, Any] = {k: v for k, v in TOWER.items() if k != "model_type"} | {"image_size": 112, "num_channels": 3}
TEXT: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": 9})),
    "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": 9})),
    "siglip_vision": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "vit": lambda: ViTModel(ViTConfig(**VISION)),
}


def test_a_checkpoint_reads_back_as_one_that_fits_together(tmp_path: Path) -> None:
    compressor, generator = tiny_compressor(), tiny_generator()
    settings = {"max_new_tokens": 6, "budget": {"k_memory": 2}}
    assert save_checkpoint(tmp_path / "new", compressor, generator, settings=settings) == tmp_path / "new"
    assert json.loads((tmp_path / "new" / "vist.json").read_text()) == settings

    stored = load_file(tmp_path / "new" / "compressor" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16, torch.uint8, torch.int32}
    loaded = VistCompressor.from_pretrained(tmp_path / "new" / "compressor", dtype=torch.float32)
    assert loaded.fingerprint == compressor.fingerprint == generator.fusion.config.fingerprint
    # The weights are those of the original, to bf16; and so are the memories.
    for ours, theirs in zip(compressor.encode(["the sea"]), loaded.encode(["the sea"]), strict=True):
        torch.testing.assert_close(theirs.latents, ours.latents, atol=5e-2, rtol=5e-2)

    reader = VistGenerator.from_pretrained(
        tmp_path / "new" / "generator", fusion=tmp_path / "new" / "fusion", device="cpu"
    )
    memory = loaded.encode(["the old bridge"])[0]
    reader.fusion.check(memory)
    assert reader.generate([Prompt((MemorySegment(memory),))], max_new_tokens=2)[0].completion_tokens > 0


def test_a_generator_may_keep_its_own_precision(tmp_path: Path) -> None:
    generator = tiny_generator()
    save_checkpoint(tmp_path, tiny_compressor(), generator, int8=False)
    loaded = VistGenerator.from_pretrained(tmp_path / "generator", device="cpu")
    for name, tensor in generator.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert json.loads((tmp_path / "vist.json").read_text()) == {}


def test_a_checkpoint_without_references_mentions_none(tmp_path: Path) -> None:
    compressor, generator = tiny_compressor(), tiny_generator()
    save_checkpoint(tmp_path, compressor, generator)
    assert "tower_reference" not in (tmp_path / "compressor" / "config.json").read_text()
    stored = load_file(tmp_path / "compressor" / "model.safetensors")
    assert len(stored) == len(compressor.state_dict())
    assert any(name.startswith("tower.") for name in stored)
    generator_files = {path.name for path in (tmp_path / "generator").iterdir()}
    assert "model.safetensors" in generator_files
    assert not generator_files & {"reference.json", "adapter"}


# ------------------------------------------------------------------------------------------- references: what is read


@torch.no_grad()
def shuffled(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """With no weight at 0 or 1, where norms and biases begin: none can be left out unnoticed."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@torch.no_grad()
def halved(module: nn.Module) -> None:
    """Weights that survive bf16: what a checkpoint stores of them is all of them."""
    for weight in module.parameters():
        weight.copy_(weight.bfloat16())


def saved_tower(directory: Path, kind: str = "clip", dtype: torch.dtype = torch.float32) -> Reference:
    torch.manual_seed(3)
    shuffled(TOWERS[kind]()).to(dtype).save_pretrained(directory)
    return Reference.of(directory)


def saved_generator(directory: Path, dtype: torch.dtype = torch.float32) -> Reference:
    generator = causal_generator("llama", seed=1)
    shuffled(generator.model).to(dtype).save_pretrained(directory)
    generator.tokenizer.save_pretrained(directory)
    return Reference.of(directory)


def fresh_compressor(tower: Reference) -> VistCompressor:
    torch.manual_seed(4)
    sizes = ResamplerConfig(width=16, heads=2, layers=1, tower_layers=(1, -1))
    compressor = VistCompressor.build(tower.id, GlyphAtlas.load(ATLAS), resampler=sizes).eval()
    halved(compressor.resampler)
    return compressor


def fresh_generator(base: Reference, dtype: torch.dtype = torch.float32) -> VistGenerator:
    torch.manual_seed(5)
    fusion = SoftPromptFusion(FusionConfig(16, 32, hidden_width=32))
    halved(fusion)
    loaded = VistGenerator.from_pretrained(base.id, device="cpu", dtype=dtype)
    return VistGenerator(loaded.model, loaded.tokenizer, fusion)


def with_adapter(generator: VistGenerator, name: str = "default", **settings: Any) -> VistGenerator:
    """The generator with a trained LoRA adapter."""
    lora = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings
    )
    model = get_peft_model(generator.model, lora, adapter_name=name)
    torch.manual_seed(6)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if f".{name}" in key:
                weight.copy_(torch.randn_like(weight) * 0.2)
    return VistGenerator(model, generator.tokenizer, generator.fusion)


def prompts(compressor: VistCompressor) -> list[Prompt]:
    one, other = compressor.encode(TEXTS)
    return [
        Prompt((TextSegment("the sea"), MemorySegment(one))),
        Prompt((MemorySegment(other), TextSegment("question"))),
    ]


@torch.no_grad()
def logits(generator: VistGenerator, asked: list[Prompt]) -> Tensor:
    with generator.fusion.condition(generator, asked) as inputs:
        return generator.model(**inputs).logits[:, -1].float()


def read(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[VistCompressor, VistGenerator]:
    compressor = load_compressor(directory, device="cpu")
    assert isinstance(compressor, VistCompressor)
    reader = VistGenerator.from_pretrained(
        directory / "generator", fusion=directory / "fusion", device="cpu", dtype=dtype
    )
    return compressor, reader


def assert_frozen(directory: Path, compressor: VistCompressor, generator: VistGenerator) -> None:
    """Tower and generator are, bit for bit, what they were before they were saved."""
    loaded, reader = read(directory)
    pairs = ((loaded.tower, compressor.tower), (reader.model, generator.model))
    for theirs, ours in pairs:
        after, before = theirs.state_dict(), ours.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def tower(tmp_path: Path) -> Reference:
    return saved_tower(tmp_path / "tower")


@pytest.fixture
def base(tmp_path: Path) -> Reference:
    return saved_generator(tmp_path / "base")


@pytest.fixture
def checkpoint(tmp_path: Path, tower: Reference, base: Reference) -> Path:
    """Of a fresh compressor and fusion over a frozen tower and generator."""
    compressor, generator = fresh_compressor(tower), fresh_generator(base)
    return save_checkpoint(tmp_path / "checkpoint", compressor, generator, tower=tower, generator_base=base)


@pytest.mark.parametrize("kind", TOWERS)
def test_frozen_parts_stay_bit_identical(tmp_path: Path, base: Reference, kind: str) -> None:
    tower = saved_tower(tmp_path / "tower", kind)
    compressor, generator = fresh_compressor(tower), fresh_generator(base)
    before = files_of(tmp_path / "tower"), files_of(tmp_path / "base")
    directory = save_checkpoint(tmp_path / "new", compressor, generator, tower=tower, generator_base=base)
    assert_frozen(directory, compressor, generator)
    assert (files_of(tmp_path / "tower"), files_of(tmp_path / "base")) == before
    for loaded in (read(directory)[0], VistCompressor.from_pretrained(directory / "compressor", dtype=torch.float32)):
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.tower.parameters())
        assert loaded.fingerprint == compressor.fingerprint == generator.fusion.config.fingerprint
        for ours, theirs in zip(compressor.encode(TEXTS), loaded.encode(TEXTS), strict=True):
            assert torch.equal(ours.latents, theirs.latents)


def test_answers_are_those_before_saving(tmp_path: Path, tower: Reference, base: Reference) -> None:
    compressor, generator = fresh_compressor(tower), fresh_generator(base)
    settings = {"max_new_tokens": 8, "budget": {"k_raw": 0, "k_memory": 2}}
    directory = tmp_path / "new"
    save_checkpoint(directory, compressor, generator, settings=settings, tower=tower, generator_base=base)
    with PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index:
        index.add([Passage(text) for text in TEXTS])
        rag = VistRAG.from_pretrained(directory, index, device="cpu")
        before = VistRAG(index, compressor, generator, budget=rag.budget, max_new_tokens=8)
        questions = ["who built the old bridge", "which river runs to the sea"]
        assert [a.text for a in rag.answer_batch(questions)] == [a.text for a in before.answer_batch(questions)]
        assert len({a.text for a in rag.answer_batch(questions)}) == 2
    _, reader = read(directory)
    assert torch.equal(logits(reader, prompts(compressor)), logits(generator, prompts(compressor)))


def test_a_checkpoint_holds_what_was_trained(checkpoint: Path, tower: Reference, base: Reference) -> None:
    stored = load_file(checkpoint / "compressor" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {
        "resampler", "atlas_ink", "atlas_advances", "atlas_codepoints", "atlas_glyph_ids"
    }  # fmt: skip
    assert not list((checkpoint / "generator").glob("**/*.safetensors"))
    config = json.loads((checkpoint / "compressor" / "config.json").read_text())
    wanted = {"id": tower.id, "revision": None, "sha256": tower.sha256, "dtype": "float32"}
    assert config["tower_reference"] == wanted
    wanted = {"id": base.id, "revision": None, "sha256": base.sha256, "dtype": "float32", "adapter": False}
    assert json.loads((checkpoint / "generator" / "reference.json").read_text()) == wanted
    assert str(Path.cwd()) not in "".join(
        p.read_text() for p in checkpoint.rglob("*.json") if p.name != "tokenizer.json"
    )


def test_config_and_tokenizer_are_the_checkpoints_own(checkpoint: Path, base: Reference) -> None:
    """The referenced directory is verified by its weights alone, so nothing else of it may matter."""
    compressor, before = read(checkpoint)
    asked = prompts(compressor)
    answers = [g.text for g in before.generate(asked, max_new_tokens=8)]
    directory = Path(base.id)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "num_key_value_heads": 4}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    (directory / "tokenizer.json").unlink()
    _, after = read(checkpoint)
    assert [g.text for g in after.generate(asked, max_new_tokens=8)] == answers
    assert after.model.generation_config.suppress_tokens == before.model.generation_config.suppress_tokens


def test_nothing_is_said_about_weights_that_are_elsewhere(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        read(checkpoint)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16])
def test_frozen_parts_are_read_as_they_were_trained(
    tmp_path: Path, tower: Reference, base: Reference, trained: torch.dtype
) -> None:
    """Stored in float32, trained in half precision: the values that training saw are the rounded ones."""
    compressor, generator = fresh_compressor(tower).to(trained), fresh_generator(base, trained)
    directory = save_checkpoint(tmp_path / "new", compressor, generator, tower=tower, generator_base=base)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = VistCompressor.from_pretrained(directory / "compressor", dtype=dtype)
        assert loaded.fingerprint == compressor.fingerprint
        _, reader = read(directory, dtype)
        for theirs, ours in ((loaded.tower, compressor.tower), (reader.model, generator.model)):
            after, before = theirs.state_dict(), ours.state_dict()
            assert {weight.dtype for weight in after.values()} == {dtype}
            assert all(torch.equal(after[name], before[name].to(dtype)) for name in before)


def test_rotary_frequencies_keep_their_precision(tmp_path: Path, tower: Reference, base: Reference) -> None:
    generator = with_adapter(fresh_generator(base))
    directory = tmp_path / "new"
    save_checkpoint(directory, fresh_compressor(tower), generator, tower=tower, generator_base=base)
    _, reader = read(directory, torch.bfloat16)
    assert {p.dtype for p in reader.model.parameters()} == {torch.bfloat16}
    wanted = dict(generator.model.get_base_model().named_buffers())["model.rotary_emb.inv_freq"]
    got = dict(reader.model.named_buffers())["model.rotary_emb.inv_freq"]
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_half_precision_on_disk_is_read_exactly(tmp_path: Path) -> None:
    """Before training a tower is float32 with the rest, whatever its files are."""
    tower = saved_tower(tmp_path / "tower", dtype=torch.float16)
    base = saved_generator(tmp_path / "base", dtype=torch.bfloat16)
    compressor, generator = fresh_compressor(tower), fresh_generator(base)
    assert next(compressor.tower.parameters()).dtype == torch.float32
    directory = save_checkpoint(tmp_path / "new", compressor, generator, tower=tower, generator_base=base)
    assert_frozen(directory, compressor, generator)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("referred", [False, True])
def test_a_tower_is_loaded_in_the_precision_that_is_asked_for(
    tmp_path: Path, base: Reference, stored: torch.dtype, *, referred: bool
) -> None:
    """Not in the one that its own config names."""
    tower = saved_tower(tmp_path / "tower", dtype=stored)
    compressor, reference = fresh_compressor(tower), tower if referred else None
    directory = save_checkpoint(tmp_path / "new", compressor, fresh_generator(base), tower=reference)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = VistCompressor.from_pretrained(directory / "compressor", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert not any(p.requires_grad for p in loaded.tower.parameters())
        assert loaded.encode(TEXTS)[0].fingerprint == compressor.fingerprint


# ------------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize(
    "settings", [{}, {"name": "mine", "use_rslora": True}, {"use_dora": True}, {"task_type": None}]
)
def test_an_adapter_is_stored_and_merged(
    tmp_path: Path, tower: Reference, base: Reference, settings: dict[str, Any]
) -> None:
    compressor, plain = fresh_compressor(tower), fresh_generator(base)
    asked = prompts(compressor)
    without = logits(plain, asked)
    generator = with_adapter(plain, **settings)
    wanted = logits(generator, asked)
    directory = save_checkpoint(tmp_path / "new", compressor, generator, tower=tower, generator_base=base)
    adapter = directory / "generator" / "adapter"
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == base.id
    assert all("lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert not list((directory / "generator").glob("*.safetensors"))
    assert torch.equal(logits(generator, asked), wanted)  # saving changed nothing

    _, reader = read(directory)
    assert type(reader.model).__name__ == "LlamaForCausalLM"
    got = logits(reader, asked)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    assert (got - without).abs().max() > 0.1
    assert [g.text for g in reader.generate(asked, max_new_tokens=8)] == [
        g.text for g in generator.generate(asked, max_new_tokens=8)
    ]
    assert all(p.requires_grad for p in reader.model.parameters())


def test_an_adapter_is_merged_with_one_rounding(tmp_path: Path, tower: Reference, base: Reference) -> None:
    """Added to weights that were already rounded, small changes would be lost."""
    generator = with_adapter(fresh_generator(base))
    directory = tmp_path / "new"
    save_checkpoint(directory, fresh_compressor(tower), generator, tower=tower, generator_base=base)
    exact, half = read(directory)[1], read(directory, torch.bfloat16)[1]
    for name, weight in exact.model.state_dict().items():
        assert torch.equal(half.model.state_dict()[name], weight.bfloat16())


def test_an_adapter_of_whole_layers_is_read_back(tmp_path: Path, tower: Reference, base: Reference) -> None:
    generator = with_adapter(fresh_generator(base), modules_to_save=["lm_head"])
    directory = tmp_path / "new"
    save_checkpoint(directory, fresh_compressor(tower), generator, tower=tower, generator_base=base)
    asked = prompts(read(directory)[0])
    torch.testing.assert_close(logits(read(directory)[1], asked), logits(generator, asked), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("int8", [False, True])
def test_a_generator_that_is_stored_whole_has_its_adapter_merged(
    tmp_path: Path, tower: Reference, base: Reference, *, int8: bool
) -> None:
    compressor, generator = fresh_compressor(tower), with_adapter(fresh_generator(base))
    asked = prompts(compressor)
    wanted = logits(generator, asked)
    directory = save_checkpoint(tmp_path / "new", compressor, generator, int8=int8)
    assert torch.equal(logits(generator, asked), wanted)
    shutil.rmtree(base.id)
    got = logits(read(directory)[1], asked)
    assert ((got - wanted).norm() / wanted.norm()) < (0.1 if int8 else 1e-4)


def test_an_adapter_without_peft_names_the_extra(
    tmp_path: Path, tower: Reference, base: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = with_adapter(fresh_generator(base))
    directory = tmp_path / "new"
    save_checkpoint(directory, fresh_compressor(tower), generator, tower=tower, generator_base=base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"LoRA adapter needs peft, .* pip install 'vist-rag\[train\]'"):
        read(directory)


def lose_a_weight(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors")


def pickled(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def torn(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def another_rank(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lose_a_weight,
        pickled,
        torn,
        another_rank,
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        lambda adapter: (adapter / "adapter_config.json").write_text("{"),
    ],
)
def test_a_damaged_adapter_is_refused(
    tmp_path: Path, tower: Reference, base: Reference, damage: Callable[[Path], object]
) -> None:
    generator = with_adapter(fresh_generator(base))
    directory = tmp_path / "new"
    save_checkpoint(directory, fresh_compressor(tower), generator, tower=tower, generator_base=base)
    damage(directory / "generator" / "adapter")
    with pytest.raises(CheckpointError, match="adapter"):
        read(directory)


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path, tower: Reference, base: Reference) -> None:
    from peft import PromptTuningConfig

    two = with_adapter(fresh_generator(base))
    two.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    virtual = fresh_generator(base)
    virtual.model = get_peft_model(virtual.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for generator, kinds in ((two, "LORA, LORA"), (virtual, "PROMPT_TUNING")):
        with pytest.raises(ConfigError, match=f"one adapter that can be merged, such as LoRA; got {kinds}"):
            save_checkpoint(tmp_path / "new", fresh_compressor(tower), generator, generator_base=base)
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------- what was trained is not left out


@torch.no_grad()
def nudge(module: nn.Module) -> None:
    weight = list(module.parameters())[-1].view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


@pytest.mark.parametrize("part", ["tower", "generator", "generator with an adapter"])
def test_a_part_that_was_trained_is_not_referred_to(
    tmp_path: Path, tower: Reference, base: Reference, part: str
) -> None:
    compressor, generator = fresh_compressor(tower), fresh_generator(base)
    nudge(compressor.tower if part == "tower" else generator.model)
    if "adapter" in part:
        generator = with_adapter(generator)
    with pytest.raises(
        ConfigError, match=rf"{part.split()[0]} must have the weights of .*, bit for bit, .* got another"
    ):
        save_checkpoint(tmp_path / "new", compressor, generator, tower=tower, generator_base=base)
    assert not (tmp_path / "new").exists()  # refused before anything is written


def test_another_model_is_not_referred_to(tmp_path: Path, tower: Reference, base: Reference) -> None:
    other = saved_tower(tmp_path / "other", "siglip")
    with pytest.raises(CheckpointError, match=f"tower {other.id} "):
        save_checkpoint(tmp_path / "new", fresh_compressor(tower), fresh_generator(base), tower=other)
    with pytest.raises(CheckpointError, match=f"generator {tower.id} "):
        save_checkpoint(tmp_path / "new", fresh_compressor(tower), fresh_generator(base), generator_base=tower)
    assert not (tmp_path / "new").exists()


def test_a_compressor_without_a_vision_tower_has_none_to_refer_to(
    tmp_path: Path, tower: Reference, base: Reference
) -> None:
    from tokenizers import Tokenizer, models

    from vist_rag.compression import TextCompressor

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "sea": 1}, unk_token="[UNK]"))
    sizes = ResamplerConfig(latents_per_page=4, width=16, heads=2, layers=1, tower_layers=(0,))
    compressor = TextCompressor.build(torch.randn(2, 8), tokenizer, pooled=True, page_tokens=32, resampler=sizes)
    with pytest.raises(ConfigError, match=r"tower must be None .* got a TextCompressor"):
        save_checkpoint(tmp_path / "new", compressor, fresh_generator(base), tower=tower)


def test_a_generator_does_not_refer_to_the_place_it_is_written_to(
    tmp_path: Path, tower: Reference, base: Reference
) -> None:
    shutil.copytree(base.id, tmp_path / "new" / "generator")
    itself = Reference.of(tmp_path / "new" / "generator")
    with pytest.raises(ConfigError, match="another directory than the checkpoint's"):
        save_checkpoint(tmp_path / "new", fresh_compressor(tower), fresh_generator(base), generator_base=itself)
    assert itself.directory()


def test_a_checkpoint_may_be_written_over_one_of_the_other_kind(
    tmp_path: Path, tower: Reference, base: Reference
) -> None:
    compressor, generator = fresh_compressor(tower), fresh_generator(base)
    asked, directory = prompts(compressor), tmp_path / "new"
    generator.fusion.bind(compressor.fingerprint)
    wanted = logits(generator, asked)
    adapted = with_adapter(fresh_generator(base))
    save_checkpoint(directory, compressor, adapted, tower=tower, generator_base=base)
    save_checkpoint(directory, compressor, generator, int8=False)
    names = {path.name for path in (directory / "generator").iterdir()}
    assert not names & {"reference.json", "adapter"}
    assert torch.equal(logits(read(directory)[1], asked), wanted)
    save_checkpoint(directory, compressor, generator, tower=tower, generator_base=base)
    assert not list((directory / "generator").glob("*.safetensors"))
    assert torch.equal(logits(read(directory)[1], asked), wanted)


def test_a_loaded_compressor_is_whole(tmp_path: Path, checkpoint: Path, tower: Reference) -> None:
    loaded, _ = read(checkpoint)
    loaded.save_pretrained(tmp_path / "whole")
    shutil.rmtree(tower.id)
    again = VistCompressor.from_pretrained(tmp_path / "whole")
    assert again.fingerprint == loaded.fingerprint
    model, info = VistCompressor.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert model.fingerprint == loaded.fingerprint
    assert not info["missing_keys"]


# ---------------------------------------------------------------------------------------------------- what was changed


@pytest.mark.parametrize("part", ["tower", "base"])
def test_a_changed_model_is_refused(
    tmp_path: Path, checkpoint: Path, tower: Reference, base: Reference, part: str
) -> None:
    reference = {"tower": tower, "base": base}[part]
    flip_last_byte(Path(reference.id) / "model.safetensors")
    got = Reference.of(reference.id).sha256
    message = rf"^model {reference.id} must .* sha256 {reference.sha256[:12]}, got {got[:12]}; restore"
    with pytest.raises(CheckpointError, match=message):
        read(checkpoint)
    with (
        PassageIndex.open(tmp_path / "index", embedder=WordEmbedder()) as index,
        pytest.raises(CheckpointError, match=message),
    ):
        VistRAG.from_pretrained(checkpoint, index, device="cpu")


@pytest.mark.parametrize("part", ["tower", "base"])
def test_a_missing_model_is_refused_and_may_have_moved(tmp_path: Path, checkpoint: Path, part: str) -> None:
    shutil.move(tmp_path / part, tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"model must be a local directory or a hub id, got '{tmp_path / part}'"):
        read(checkpoint)
    file = checkpoint / ("compressor/config.json" if part == "tower" else "generator/reference.json")
    file.write_text(file.read_text().replace(str(tmp_path / part), str(tmp_path / "moved")))
    read(checkpoint)


def test_a_pickle_is_not_referred_to(tmp_path: Path, base: Reference) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.id)
    (Path(base.id) / "model.safetensors").unlink()
    torch.save(model.state_dict(), Path(base.id) / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle is not read"):
        Reference.of(base.id)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1}'])
def test_a_torn_reference_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "generator" / "reference.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"reference\.json"):
        read(checkpoint)


def test_a_torn_reference_of_a_tower_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "compressor" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tower_reference": {"id": "x"}}))
    with pytest.raises(CheckpointError, match=r"reference in config of .*compressor"):
        read(checkpoint)


def test_a_config_that_the_referenced_model_does_not_fit_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "generator" / "config.json"
    config = json.loads(path.read_text())
    for change in ({"hidden_size": 64}, {"num_hidden_layers": 3}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="generator"):
            read(checkpoint)


def test_a_reference_knows_the_precision_of_training(tmp_path: Path, tower: Reference, base: Reference) -> None:
    """Whatever the caller's reference says: it was made before training."""
    compressor = copy.deepcopy(fresh_compressor(tower)).to(torch.bfloat16)
    said = replace(tower, dtype="float32")
    save_checkpoint(tmp_path / "new", compressor, fresh_generator(base), tower=said, generator_base=base)
    config = json.loads((tmp_path / "new" / "compressor" / "config.json").read_text())
    assert config["tower_reference"]["dtype"] == "bfloat16"
