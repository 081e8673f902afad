"""What a compressor keeps with every family of vision towers, and with patches of 14 and of 16 pixels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPConfig, PreTrainedModel, Siglip2Config, SiglipConfig

from tests.support.causal import causal_generator
from tests.support.tiny import ATLAS
from tests.support.towers import TOWERS, own_states, tower_model
from vist_rag.checkpoint import load_compressor
from vist_rag.compression import VistCompressor
from vist_rag.config import RendererConfig, ResamplerConfig
from vist_rag.references import Reference
from vist_rag.rendering import GlyphAtlas
from vist_rag.training.examples import Example
from vist_rag.training.parts import build_compressor, train_only
from vist_rag.training.reading import MemoryReading
from vist_rag.types import Passage

TEXTS = ["The bridge was built in 1867.", "A river runs from the lake to the sea. " * 12, ""]
SIDE = 5
TWO_TOWERS = {"clip": CLIPConfig, "siglip": SiglipConfig, "siglip2": Siglip2Config}


@pytest.fixture(params=TOWERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[14, 16])
def patch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def model(kind: str, patch: int) -> PreTrainedModel:
    """A tower as the hub has it: CLIP, SigLIP and SigLIP2 beside their text towers."""
    tower = tower_model(kind, patch_size=patch, side=SIDE)
    if kind not in TWO_TOWERS:
        return tower
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    both: PreTrainedModel = AutoModel.from_config(
        TWO_TOWERS[kind](vision_config=tower.config.to_dict(), text_config=text)
    ).eval()
    both.vision_model.load_state_dict(tower.state_dict())
    return both


def compressor_of(tower: PreTrainedModel | Path) -> VistCompressor:
    torch.manual_seed(4)
    sizes = ResamplerConfig(latents_per_page=5, width=16, heads=2, layers=1, tower_layers=(1, -1))
    return VistCompressor.build(tower, GlyphAtlas.load(ATLAS), resampler=sizes).eval()


@torch.no_grad()
def test_features_are_what_the_tower_itself_makes_of_a_page(kind: str, patch: int, model: PreTrainedModel) -> None:
    compressor = compressor_of(model)
    assert compressor.renderer_config == RendererConfig(tower_size_px=SIDE * patch, patch_size_px=patch)
    pages = compressor.renderer.render([TEXTS[1]])
    full = pages.patch_mask.all(1)
    assert full.any()
    seen = compressor.features(pages.pixel_values[full], pages.patch_mask[full])
    own = own_states(getattr(model, "vision_model", model), pages.pixel_values[full]).last_hidden_state
    torch.testing.assert_close(seen[..., 16:], own[:, -(SIDE**2) :], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pixels_of_blank_patches_change_nothing(model: PreTrainedModel) -> None:
    compressor = compressor_of(model)
    pages = compressor.renderer.render(TEXTS[:2])
    patch = compressor.renderer_config.patch_size_px
    blank = (~pages.patch_mask).view(-1, 1, SIDE, SIDE).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    assert blank.any()
    latents, standing = compressor(pages.pixel_values, pages.patch_mask)
    painted, _ = compressor(torch.where(blank, 9.0, pages.pixel_values), pages.patch_mask)
    assert torch.equal(latents[standing], painted[standing])
    for text, memory in zip(TEXTS, compressor.encode(TEXTS), strict=True):
        torch.testing.assert_close(memory.latents, compressor.encode([text])[0].latents, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_it_makes_the_same_memories(tmp_path: Path, kind: str, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path / "tower")
    compressor = compressor_of(tmp_path / "tower")
    compressor.save_pretrained(tmp_path / "whole")
    loaded = VistCompressor.from_pretrained(tmp_path / "whole")
    assert loaded.tower.model.config.model_type == getattr(model, "vision_model", model).config.model_type
    assert loaded.fingerprint == compressor.fingerprint
    for ours, theirs in zip(compressor.encode(TEXTS), loaded.encode(TEXTS), strict=True):
        assert torch.equal(ours.latents, theirs.latents)


@pytest.mark.parametrize("patch", [16], indirect=True)
def test_a_recipe_counts_it_without_its_weights(tmp_path: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(tmp_path)
    resampler = {"latents_per_page": 5, "width": 16, "heads": 2, "layers": 1, "tower_layers": [1, -1]}
    sizes = build_compressor({"tower": {"pretrained": str(tmp_path)}, "resampler": resampler}, meta=True)
    assert {weight.device.type for weight in sizes.parameters()} == {"meta"}
    wanted, got = (one.renderer.render(TEXTS) for one in (compressor_of(model), sizes))
    assert torch.equal(got.pixel_values, wanted.pixel_values)


@pytest.mark.parametrize("patch", [16], indirect=True)
def test_two_steps_of_training_move_the_resampler_and_leave_the_tower(tmp_path: Path, model: PreTrainedModel) -> None:
    pytest.importorskip("accelerate", reason="training needs the extra 'train'")
    from vist_rag.training.export import save_checkpoint
    from vist_rag.training.trainer import train_stage

    model.save_pretrained(tmp_path / "tower")
    compressor = compressor_of(tmp_path / "tower")
    reading = MemoryReading(compressor, causal_generator("llama", seed=1))
    train_only(reading, ("resampler", "projector"))
    before = {name: weight.clone() for name, weight in reading.named_parameters()}
    examples = [Example((Passage(text),), "what", "the sea", raw=False) for text in TEXTS[:2]]
    train_stage(
        reading.train(), 2, lambda n: reading.batch(examples, random.Random(n)), tmp_path / "run", learning_rate=1e-2
    )
    moved = {name for name, weight in reading.named_parameters() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in moved} >= {
        "compressor.resampler",
        "fusion.projector",
    }
    assert not {name for name in moved if name.startswith(("compressor.tower", "lm."))}
    # What was not trained is referred to, and comes back from where it is.
    reference = Reference.of(tmp_path / "tower")
    directory = save_checkpoint(tmp_path / "new", compressor, reading._generator[0], tower=reference)
    stored = AutoConfig.from_pretrained(directory / "compressor")
    assert stored.tower_reference["sha256"] == reference.sha256
    assert load_compressor(directory, device="cpu").fingerprint == compressor.fingerprint
