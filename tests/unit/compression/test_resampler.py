from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vist_rag.compression.resampler import PerceiverBlock, PerceiverResampler
from vist_rag.config import ResamplerConfig
from vist_rag.errors import ConfigError, ShapeError

CONFIG = ResamplerConfig(latents_per_page=8, width=16, heads=2, layers=2)
S, WIDTH = 32, 12  # patches of a page and width of their features; so four patches a latent


@pytest.fixture
def resampler() -> PerceiverResampler:
    torch.manual_seed(0)
    resampler = PerceiverResampler(CONFIG, WIDTH, S)
    with torch.no_grad():
        resampler.latents.normal_()
    return resampler.eval()


def page(*lengths: int, longest: int = S, seed: int = 1) -> tuple[Tensor, Tensor]:
    features = torch.randn(len(lengths), S, WIDTH, generator=torch.Generator().manual_seed(seed))
    return features[:, :longest], (torch.arange(longest) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize(("patches", "latents"), [(1, 1), (4, 1), (5, 2), (8, 2), (31, 8), (32, 8)])
def test_a_latent_stands_for_each_window_that_holds_text(
    resampler: PerceiverResampler, patches: int, latents: int
) -> None:
    out, standing = resampler(*page(patches))
    assert out.shape == (1, 8, 16)
    assert standing[0].tolist() == [True] * latents + [False] * (8 - latents)


def test_features_may_stop_at_the_longest_text(resampler: PerceiverResampler) -> None:
    out, standing = resampler(*page(9, 3, longest=9))
    assert out.shape == (2, 3, 16)
    assert standing.tolist() == [[True, True, True], [True, False, False]]
    whole, _ = resampler(*page(9, 3))
    torch.testing.assert_close(out[0], whole[0, :3], atol=1e-5, rtol=1e-5)


def test_alone_is_as_in_a_batch(resampler: PerceiverResampler) -> None:
    features, mask = page(2, 32, 17)
    together, standing = resampler(features, mask)
    for i, length in enumerate((2, 32, 17)):
        alone, _ = resampler(features[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(together[i][standing[i]], alone[0], atol=1e-5, rtol=1e-5)


def test_blank_patches_change_nothing(resampler: PerceiverResampler) -> None:
    features, mask = page(10)
    noisy = torch.where(mask[..., None], features, torch.full_like(features, 9.0))
    standing = resampler(features, mask)[1][0]
    assert torch.equal(resampler(features, mask)[0][0, standing], resampler(noisy, mask)[0][0, standing])


def test_every_latent_reads_the_whole_page(resampler: PerceiverResampler) -> None:
    features, mask = page(32)
    changed = features.clone()
    changed[:, -1] *= -1  # not shifted: a norm would undo that
    moved = (resampler(features, mask)[0] - resampler(changed, mask)[0]).abs().amax(-1)[0]
    assert (moved > 1e-6).all()
    assert moved.argmax() == 7  # most of all the one that stands for the patch


def test_block_is_attention_over_features_and_latents() -> None:
    """Against the formula of Flamingo, section 3.1, written out."""
    torch.manual_seed(0)
    block = PerceiverBlock(width=8, heads=2, expansion=2)
    latents, features = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, True, False, False, True, True, False]])  # five features, three latents
    queries = block.norm_latents(latents[0])
    keys_values = torch.cat((block.norm_features(features[0]), queries)) @ block.key_value.weight.T
    keys, values = keys_values[:, :8], keys_values[:, 8:]
    read = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = (queries @ block.query.weight.T)[:, head] @ keys[:, head].T / 2
        read.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values[:, head])
    expected = latents[0] + torch.cat(read, -1) @ block.output.weight.T
    expected = expected + block.feed_forward(expected)
    torch.testing.assert_close(block(latents, features, mask)[0], expected, atol=1e-5, rtol=1e-5)


def test_features_of_another_width_are_refused(resampler: PerceiverResampler) -> None:
    with pytest.raises(ShapeError, match=r"features must be 12 wide .* got 13"):
        resampler(torch.zeros(1, S, 13), torch.ones(1, S, dtype=torch.bool))


def test_latents_must_divide_the_page() -> None:
    with pytest.raises(ConfigError, match=r"latents_per_page must divide the patches of a page \(30\), got 8"):
        PerceiverResampler(CONFIG, WIDTH, 30)
