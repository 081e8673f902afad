from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)

from tests.support.tiny import ATLAS, TOWER, tiny_compressor
from vist_rag.checkpoint import find_checkpoint, load_compressor
from vist_rag.compression import VistCompressor, VistConfig
from vist_rag.config import RendererConfig, ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError, InputError
from vist_rag.rendering import GlyphAtlas

SHORT = "The bridge was built in 1867."
LONG = "A river runs from the lake to the sea. " * 30  # two pages
TEXTS = ["", "a", SHORT, "The old bridge " * 12, LONG, " \n\t ", "Ünïcödé ½ — 你好"]


@pytest.fixture(scope="module")
def compressor() -> VistCompressor:
    return tiny_compressor()


@pytest.fixture(scope="module")
def atlas() -> GlyphAtlas:
    return GlyphAtlas.load(ATLAS)


# ---------------------------------------------------------------------------------------------------------- encoding


def test_memories_come_in_the_order_of_the_texts(compressor: VistCompressor) -> None:
    memories = compressor.encode(TEXTS, batch_size=3)
    assert len(memories) == len(TEXTS)
    for text, memory in zip(TEXTS, memories, strict=True):
        alone = compressor.encode([text])[0]
        assert memory.fingerprint == alone.fingerprint == compressor.fingerprint
        assert memory.latents.dtype == torch.float32
        torch.testing.assert_close(memory.latents, alone.latents, atol=1e-5, rtol=1e-5)
    distinct = [memories[i].latents.mean(0) for i in (0, 1, 2, 3, 4)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(distinct) for b in distinct[:i])


def test_number_of_latents_is_known_before_encoding(compressor: VistCompressor) -> None:
    texts = [*TEXTS, *(" ".join(["word"] * n) for n in range(0, 260, 23)), "x" * 900, "W" * 256, "i" * 1195]
    counted = [compressor.count_latents(text) for text in texts]
    assert counted == [len(memory) for memory in compressor.encode(texts)]


def test_an_empty_text_has_one_latent(compressor: VistCompressor) -> None:
    empty, blank = compressor.encode(["", " \n\t "])
    assert len(empty) == len(blank) == 1
    assert torch.isfinite(empty.latents).all()
    assert torch.equal(empty.latents, blank.latents)


def test_a_long_text_takes_several_pages_and_loses_nothing(compressor: VistCompressor) -> None:
    first, whole = compressor.encode(["word " * 100, "word " * 100 + "and a last sentence. " * 20])
    per_page = compressor.resampler_config.latents_per_page
    assert len(first) <= per_page < len(whole)
    pages = compressor.renderer.render(["word " * 100 + "and a last sentence. " * 20])
    assert len(whole) == sum(-(-int(n) // compressor.resampler.window) for n in pages.patch_mask.sum(1))
    changed = compressor.encode(["word " * 100 + "and a last sentence. " * 19 + "And an end. "])[0]
    assert torch.equal(whole.latents[:per_page], changed.latents[:per_page])  # a page is read by itself
    assert not torch.equal(whole.latents[-5:], changed.latents[-5:])


def test_memory_is_that_of_what_stands_in_the_text(compressor: VistCompressor) -> None:
    one, other = compressor.encode([SHORT, SHORT.replace("1867", "1876")])
    assert one.latents.shape == other.latents.shape
    assert (one.latents - other.latents).abs().max() > 1e-3


def test_one_string_is_not_a_list_of_texts(compressor: VistCompressor) -> None:
    with pytest.raises(InputError, match="got one string; wrap it in a list"):
        compressor.encode("not a list")
    with pytest.raises(InputError, match="bytes"):
        compressor.encode(["fine", b"not fine"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        compressor.encode([SHORT], batch_size=0)
    assert compressor.encode([]) == []


def test_progress_counts_passages(compressor: VistCompressor) -> None:
    with redirect_stderr(io.StringIO()) as shown:
        compressor.encode([SHORT] * 3, progress=True)
    assert "compressing" in shown.getvalue()
    assert "3/3" in shown.getvalue()
    with redirect_stderr(io.StringIO()) as shown:
        compressor.encode([SHORT])
    assert shown.getvalue() == ""


def test_encode_keeps_the_mode_also_after_an_error() -> None:
    compressor = tiny_compressor().train()
    compressor.encode([SHORT])
    assert compressor.training
    with pytest.raises(InputError):
        compressor.encode([None])  # type: ignore[list-item]
    assert compressor.training


def test_encode_does_not_build_a_graph(compressor: VistCompressor) -> None:
    assert not compressor.encode([SHORT])[0].latents.requires_grad


# ------------------------------------------------------------------------------------------------------- fingerprint


def changed_weight(compressor: VistCompressor) -> None:
    with torch.no_grad():
        compressor.resampler.project.weight[0, 0] += 0.5


def changed_tower(compressor: VistCompressor) -> None:
    with torch.no_grad():
        next(compressor.tower.parameters()).view(-1)[0] += 0.5


def changed_glyph(compressor: VistCompressor) -> None:
    compressor.atlas_ink[5, 5, 5] ^= 1


def changed_advance(compressor: VistCompressor) -> None:
    compressor.atlas_advances[5] += 1


@pytest.mark.parametrize("change", [changed_weight, changed_tower, changed_glyph, changed_advance])
def test_fingerprint_covers_every_weight(change: Callable[[VistCompressor], None]) -> None:
    compressor, same = tiny_compressor(), tiny_compressor()
    change(compressor)
    assert compressor.fingerprint != same.fingerprint
    assert tiny_compressor().fingerprint == same.fingerprint


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("renderer", {"normalize": "none"}),
        ("resampler", {"tower_layers": [0, -1]}),
        ("resampler", {"heads": 4}),
        ("tower", {"hidden_act": "relu"}),
        ("tower", {"num_attention_heads": 4}),
        ("tower", {"layer_norm_eps": 1e-3}),
        ("atlas", {"origin": 9}),
    ],
)
def test_fingerprint_covers_every_setting(part: str, setting: dict[str, Any]) -> None:
    """The same weights, read in another way, make other memories."""
    compressor = tiny_compressor()
    config = VistConfig(
        **{name: dict(getattr(compressor.config, name)) for name in ("renderer", "resampler", "tower", "atlas")}
    )
    getattr(config, part).update(setting)
    other = VistCompressor(config)
    other.load_state_dict(compressor.state_dict())
    assert other.fingerprint != compressor.fingerprint


def test_fingerprint_is_the_same_in_bf16_and_after_a_reload(tmp_path: Path) -> None:
    compressor = tiny_compressor()
    fingerprint = compressor.fingerprint
    assert len(fingerprint) == 64
    compressor.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = VistCompressor.from_pretrained(tmp_path, dtype=dtype)
        assert next(loaded.parameters()).dtype == dtype
        assert loaded.fingerprint == fingerprint
        loaded.save_pretrained(tmp_path / str(dtype))
        assert VistCompressor.from_pretrained(tmp_path / str(dtype)).fingerprint == fingerprint
    assert copy.deepcopy(compressor).to(torch.bfloat16).fingerprint == fingerprint


def test_fingerprint_follows_training_and_loading() -> None:
    compressor = tiny_compressor()
    weights = {name: tensor.clone() for name, tensor in compressor.state_dict().items()}
    first = compressor.fingerprint
    compressor.train()
    changed_weight(compressor)
    second = compressor.fingerprint
    changed_weight(compressor)
    third = compressor.eval().fingerprint
    assert len({first, second, third}) == 3
    assert compressor.encode([SHORT])[0].fingerprint == third
    compressor.load_state_dict(weights)
    assert compressor.fingerprint == first


def test_fingerprint_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = tiny_compressor()
    hashed = []
    state_dict = compressor.state_dict
    monkeypatch.setattr(compressor, "state_dict", lambda: hashed.append(1) or state_dict())
    for _ in range(3):
        compressor.encode([SHORT])
    assert compressor.fingerprint
    assert len(hashed) == 1


# ------------------------------------------------------------------------------------------------- saving and loading


def test_a_checkpoint_makes_the_same_memories(tmp_path: Path, compressor: VistCompressor) -> None:
    compressor.save_pretrained(tmp_path)
    for loaded in (VistCompressor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, VistCompressor)
        assert not loaded.training
        assert loaded.state_dict().keys() == compressor.state_dict().keys()
        for ours, theirs in zip(compressor.encode(TEXTS), loaded.encode(TEXTS), strict=True):
            assert torch.equal(ours.latents, theirs.latents)


def test_latents_survive_loading_on_the_meta_device(tmp_path: Path) -> None:
    compressor = tiny_compressor()
    assert 0.01 < float(compressor.resampler.latents.detach().std()) < 0.03  # not the zeros of __init__
    with torch.no_grad():
        compressor.resampler.latents.fill_(0.625)
    compressor.save_pretrained(tmp_path)
    loaded = VistCompressor.from_pretrained(tmp_path)
    assert torch.equal(loaded.resampler.latents, torch.full_like(loaded.resampler.latents, 0.625))


def test_latents_that_a_checkpoint_lacks_are_initialised(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    compressor = tiny_compressor()
    compressor.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["resampler.latents"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = VistCompressor.from_pretrained(tmp_path)
    assert 0.01 < float(loaded.resampler.latents.detach().std()) < 0.03  # not what the memory happened to hold
    assert loaded.fingerprint != compressor.fingerprint


@pytest.mark.parametrize("config", [CLIPVisionConfig, SiglipVisionConfig])
def test_other_towers_survive_a_round_trip(tmp_path: Path, atlas: GlyphAtlas, config: type[CLIPVisionConfig]) -> None:
    """Their position ids are buffers that no checkpoint holds."""
    sizes = {**TOWER, "image_size": 112, "num_channels": 3}
    del sizes["model_type"]
    torch.manual_seed(0)
    compressor = VistCompressor.build(config(**sizes), atlas, resampler=ResamplerConfig(width=16, heads=2, layers=1))
    assert compressor.renderer_config == RendererConfig(tower_size_px=112)
    compressor.eval().save_pretrained(tmp_path)
    loaded = VistCompressor.from_pretrained(tmp_path)
    for ours, theirs in zip(compressor.encode([SHORT, LONG]), loaded.encode([SHORT, LONG]), strict=True):
        assert torch.equal(ours.latents, theirs.latents)
    assert loaded.fingerprint == compressor.fingerprint


# ------------------------------------------------------------------------------------------------------------ building


def vit(**sizes: Any) -> ViTModel:
    torch.manual_seed(3)
    return ViTModel(ViTConfig(**{k: v for k, v in TOWER.items() if k != "model_type"} | sizes))


def clip() -> CLIPModel:
    torch.manual_seed(3)
    sizes = {k: v for k, v in TOWER.items() if k != "model_type"} | {"num_channels": 3}
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    return CLIPModel(CLIPConfig(vision_config=sizes, text_config=text | {"intermediate_size": 8}))


@pytest.mark.parametrize("make", [vit, clip])
@pytest.mark.parametrize("given", ["model", "path", "string"])
def test_build_takes_the_weights_of_a_pretrained_tower(
    tmp_path: Path, atlas: GlyphAtlas, make: Callable[[], PreTrainedModel], given: str
) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    tower = {"model": model, "path": tmp_path, "string": str(tmp_path)}[given]
    compressor = VistCompressor.build(tower, atlas, resampler=ResamplerConfig(width=16, heads=2, layers=1))  # type: ignore[arg-type]
    wanted = getattr(model, "vision_model", model).state_dict()
    got = compressor.tower.model.state_dict()
    assert got
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())


def test_build_refuses_a_tower_that_cannot_be_loaded(tmp_path: Path, atlas: GlyphAtlas) -> None:
    with pytest.raises(CheckpointError, match=r"tower .*no-such-tower cannot be loaded"):
        VistCompressor.build(tmp_path / "no-such-tower", atlas)
    vit().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        VistCompressor.build(str(tmp_path), atlas)


def test_build_refuses_a_tower_of_other_sizes(atlas: GlyphAtlas) -> None:
    with pytest.raises(ConfigError, match="num_channels must be the renderer's, 3, got 1"):
        VistCompressor.build(TOWER, atlas, renderer=RendererConfig())
    with pytest.raises(ConfigError, match=r"VistCompressor.build"):
        VistCompressor(VistConfig())


# -------------------------------------------------------------------------------------------------------- frozen tower


def test_only_the_resampler_learns() -> None:
    compressor = tiny_compressor().train()
    assert compressor.resampler.training
    assert not any(module.training for module in compressor.tower.modules())
    pages = compressor.renderer.render([SHORT])
    latents, _ = compressor(pages.pixel_values, pages.patch_mask)
    (latents * torch.randn(latents.shape)).sum().backward()  # a mere sum is the same whatever is normalised last
    assert all(p.grad is None for p in compressor.tower.parameters())
    without = {name for name, p in compressor.resampler.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without


def test_blank_patches_change_nothing_unless_an_ablation_reads_them() -> None:
    masked, read = tiny_compressor(), tiny_compressor(mask_blank=False)
    read.load_state_dict(masked.state_dict())
    short, filled = "the bridge", "the bridge " * 60
    alone, beside = (masked.encode([short])[0].latents, masked.encode([short, filled])[0].latents)
    torch.testing.assert_close(alone, beside)
    seen = read.encode([short])[0].latents
    assert seen.shape == alone.shape  # blank windows still have no latents
    assert (seen - alone).abs().max() > 1e-3
    assert masked.fingerprint != read.fingerprint


# -------------------------------------------------------------------------------------------------------------- speed


def test_pages_of_a_pass_are_neighbours_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor, masks = tiny_compressor(), []
    forward = compressor.forward
    monkeypatch.setattr(compressor, "forward", lambda pixels, mask: masks.append(mask) or forward(pixels, mask))
    texts = [letter * n for n in (5, 90, 40, 41, 6, 200, 39, 7) for letter in ("i", "W")]  # alike in characters only
    compressor.encode(texts, batch_size=1)
    lengths = [mask.sum(1).clamp(min=1).tolist() for mask in masks]
    assert [n for some in lengths for n in some] == sorted(compressor.renderer.count_patches(texts))
    page = masks[0].shape[1]
    assert all(len(some) * max(some) <= page for some in lengths)  # a full page's patches, not one page
    # Nothing that would fit is left for the next pass.
    assert all((len(some) + 1) * after[0] > page for some, after in pairwise(lengths))
    assert len(lengths) < len(texts) / 2


def test_long_texts_are_rendered_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor, rendered = tiny_compressor(), []
    renderer = compressor.renderer
    render = renderer.render
    monkeypatch.setattr(renderer, "render", lambda texts: rendered.append(list(texts)) or render(texts))
    monkeypatch.setattr("vist_rag.compression.compressor._RENDERED_CHARACTERS", 1000)
    monkeypatch.setattr("vist_rag.compression.compressor._RENDERED_TEXTS", 3)
    compressor.encode([LONG, *["a"] * 7, LONG, "b" * 2000])
    assert [[len(text) for text in some] for some in rendered] == [
        [1] * 3,
        [1] * 3,
        [1],
        [len(LONG)],
        [len(LONG)],
        [2000],
    ]


def test_memories_of_one_pass_and_of_many_are_the_same_to_rounding(compressor: VistCompressor) -> None:
    """Whatever shares a pass: alone, with neighbours in length, and through the plain forward of all pages."""
    pages = compressor.renderer.render(TEXTS)
    with torch.no_grad():
        latents, standing = compressor(pages.pixel_values, pages.patch_mask)
    plain = [torch.cat([latents[p][standing[p]] for p in (pages.text_ids == i).nonzero()]) for i in range(len(TEXTS))]
    for batch_size in (None, 1, 100):
        for memory, wanted in zip(compressor.encode(TEXTS, batch_size=batch_size), plain, strict=True):
            torch.testing.assert_close(memory.latents, wanted, atol=1e-5, rtol=1e-4)


def test_the_embedded_model_makes_the_memories_of_the_plain_forward() -> None:
    """Sorted, batched, without masks where pages are alike, without hidden states that nobody reads: all the same."""
    compressor = load_compressor(find_checkpoint(None), device="cpu")
    texts = ["The keeper wrote it down. " * n for n in (1, 9, 3, 9, 40, 2)]
    pages = compressor.renderer.render(texts)
    mask, kinds = pages.patch_mask, compressor.resampler_config.tower_layers
    with torch.no_grad():  # all layers of the tower, all pages at once, every one masked
        hidden = compressor.tower(pages.pixel_values, mask)
        features = torch.cat([hidden[kind] for kind in kinds], dim=-1)
        latents, standing = compressor.resampler(features, mask[:, : features.shape[1]])
    for i, memory in enumerate(compressor.encode(texts)):
        wanted = torch.cat([latents[p][standing[p]] for p in (pages.text_ids == i).nonzero()])
        torch.testing.assert_close(memory.latents, wanted, atol=2e-4, rtol=1e-3)
        assert torch.cosine_similarity(memory.latents, wanted).min() > 0.99999
