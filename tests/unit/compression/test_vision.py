from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPVisionConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Config,
    Siglip2VisionConfig,
    ViTConfig,
)

from tests.support.towers import SPECIAL, TOWERS, own_states, tower_model, tower_sizes
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.errors import ConfigError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 3,
}
SIDE = 4
PATCHES = SIDE**2


@pytest.fixture(params=TOWERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[14, 16])
def patch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def model(kind: str, patch: int) -> PreTrainedModel:
    return tower_model(kind, patch_size=patch, side=SIDE)


def pixels(pages: int, patch: int, seed: int = 1) -> Tensor:
    side = SIDE * patch
    return torch.randn(pages, 3, side, side, generator=torch.Generator().manual_seed(seed))


def text_mask(*lengths: int) -> Tensor:
    return torch.arange(PATCHES) < torch.tensor(lengths)[:, None]


def blank_pixels(images: Tensor, mask: Tensor, value: float) -> Tensor:
    """The images with every blank patch painted over."""
    patch = images.shape[-1] // SIDE
    blank = (~mask).view(-1, 1, SIDE, SIDE).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(blank, torch.full_like(images, value), images)


@torch.no_grad()
def test_a_full_page_gives_the_models_own_hidden_states(kind: str, model: PreTrainedModel, patch: int) -> None:
    images = pixels(2, patch)
    hidden = VisionTower(model)(images, text_mask(PATCHES, PATCHES))
    own = own_states(model, images)
    assert len(hidden) == 1 + model.config.num_hidden_layers
    assert hidden[-1].shape == (2, PATCHES, 16)
    torch.testing.assert_close(hidden[-1], own.last_hidden_state[:, SPECIAL[kind] :], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(hidden[:-1], own.hidden_states, strict=False):
        torch.testing.assert_close(ours, theirs[:, SPECIAL[kind] :], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_blank_patches_show_changes_nothing(model: PreTrainedModel, patch: int) -> None:
    mask = text_mask(5, 9)
    tower, images = VisionTower(model), pixels(2, patch)
    one, other = (tower(blank_pixels(images, mask, value), mask)[-1] for value in (0.0, 7.0))
    assert one.shape == (2, 9, 16)
    torch.testing.assert_close(one[mask[:, :9]], other[mask[:, :9]], atol=0, rtol=0)
    # The patches after the text are masked, not merely cut off: those of the shorter page stand in the batch.
    assert not torch.equal(one[0, 5:], other[0, 5:])


@torch.no_grad()
def test_a_page_is_read_alike_alone_and_beside_longer_ones(model: PreTrainedModel, patch: int) -> None:
    tower, images = VisionTower(model), pixels(3, patch)
    together = tower(images, text_mask(4, 16, 11))
    for page, length in enumerate((4, 16, 11)):
        alone = tower(images[page : page + 1], text_mask(length))
        for ours, theirs in zip(together, alone, strict=True):
            assert theirs.shape[1] == length
            torch.testing.assert_close(ours[page, :length], theirs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_patches_see_each_other(model: PreTrainedModel, patch: int) -> None:
    tower, images, mask = VisionTower(model), pixels(1, patch), text_mask(6)
    changed = images.clone()
    changed[:, :, :patch, patch : 2 * patch] += 1  # the second patch
    first = [tower(i, mask)[-1][0, 0] for i in (images, changed)]
    assert (first[0] - first[1]).abs().max() > 1e-4


def test_fresh_tower_has_no_pooler(kind: str) -> None:
    tower = VisionTower.from_config(tower_sizes(kind, patch_size=14, side=SIDE))
    assert tower.width == 16
    assert not any("pooler" in name for name, _ in tower.named_parameters())


def test_config_from_a_dict_names_its_model_type() -> None:
    config = tower_config({"model_type": "vit", **SIZES})
    assert isinstance(config, ViTConfig)
    assert config.hidden_size == 16
    with pytest.raises(ConfigError, match="model_type"):
        tower_config(SIZES)
    with pytest.raises(ConfigError, match="nonsense"):
        tower_config({"model_type": "nonsense"})


def test_config_of_a_two_tower_model_is_that_of_its_vision_tower() -> None:
    assert isinstance(tower_config(CLIPConfig(vision_config=SIZES)), CLIPVisionConfig)


@pytest.mark.parametrize("config", [BertConfig()])
def test_config_without_patches_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match="bert"):
        tower_config(config)


def test_tower_of_another_shape_is_refused() -> None:
    """DINOv3 turns its keys by where a patch stands."""
    dino = AutoModel.from_config(DINOv3ViTConfig(**SIZES))
    with pytest.raises(ConfigError, match="DINOv3ViTModel"):
        VisionTower(dino)


def test_a_page_of_naflex_is_as_large_as_its_positions() -> None:
    """Its config says how many patches there may be, and not of what sides."""
    sizes = {"patch_size": 16, "num_patches": 25}
    config = tower_config(Siglip2Config(vision_config=sizes))
    assert isinstance(config, Siglip2VisionConfig)
    assert config.image_size == 80
    stored = config.to_dict()
    assert tower_config(stored).to_dict() == stored
    with pytest.raises(ConfigError, match="got num_patches 24 of 16 pixels and image_size None"):
        tower_config(Siglip2VisionConfig(patch_size=16, num_patches=24))
    with pytest.raises(ConfigError, match="got num_patches 25 of 16 pixels and image_size 96"):
        tower_config({"model_type": "siglip2_vision_model", **sizes, "image_size": 96})


@torch.no_grad()
def test_layers_behind_the_last_that_is_read_are_not_run(model: PreTrainedModel, patch: int) -> None:
    tower, images, mask = VisionTower(model), pixels(2, patch), text_mask(5, 9)
    hidden, ran = tower(images, mask), []
    for number, layer in enumerate(tower.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    second, first = tower(images, mask, (-2, 0))
    assert torch.equal(second, hidden[1])
    assert torch.equal(first, hidden[0])
    assert ran == [0]
    (last,) = tower(images, mask, (-1,))
    assert torch.equal(last, hidden[-1])


@torch.no_grad()
def test_pages_of_one_length_are_read_without_a_mask(model: PreTrainedModel, patch: int) -> None:
    tower, images, given = VisionTower(model), pixels(2, patch), []
    tower.layers[0].register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
    same = tower(images, text_mask(7, 7))
    beside = tower(images, text_mask(7, 9))
    assert given[0] is None
    assert given[1] is not None
    torch.testing.assert_close(same[-1][0], beside[-1][0, :7], atol=1e-5, rtol=1e-5)
