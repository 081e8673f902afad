from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vist_rag.compression.resampler import PerceiverBlock, PerceiverResampler, WindowPooling
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


def test_the_attention_of_a_block_is_what_it_reads_with() -> None:
    """Its weights times its values are what the fused kernel reads."""
    torch.manual_seed(0)
    block = PerceiverBlock(width=8, heads=2, expansion=2)
    latents, features = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, True, False, False, True, True, False]])
    queries = block.norm_latents(latents[0])
    sources = torch.cat((block.norm_features(features[0]), queries))
    keys = sources @ block.key_value.weight[:8].T
    weights = block.attention(latents, features, mask)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = ((queries @ block.query.weight.T)[:, part] @ keys[:, part].T / 2).exp() * mask
        torch.testing.assert_close(weights[0, head], scores / scores.sum(1, keepdim=True))
    values = (sources @ block.key_value.weight[8:].T).unflatten(-1, (2, 4)).transpose(0, 1)
    read = latents + (weights[0] @ values).transpose(0, 1).flatten(1) @ block.output.weight.T
    torch.testing.assert_close(block(latents, features, mask), read + block.feed_forward(read))


def test_attention_is_told_layer_by_layer_and_changes_nothing(resampler: PerceiverResampler) -> None:
    features, mask = page(9, 30)
    before = resampler(features, mask)[0]
    weights = resampler.attention(features, mask)
    assert weights.shape == (2, 2, 2, 8, S + 8)  # layers, pages, heads, latents, patches and latents
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 2, 8))
    assert weights[:, 0, :, :, 9:S].abs().max() == 0  # blank patches
    assert weights[:, 0, :, :, S + 3 :].abs().max() == 0  # latents that stand for them
    assert (weights[:, 0, :, :, :9] > 0).all()
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(resampler(features, mask)[0], before)


def test_features_of_another_width_are_refused(resampler: PerceiverResampler) -> None:
    with pytest.raises(ShapeError, match=r"features must be 12 wide .* got 13"):
        resampler(torch.zeros(1, S, 13), torch.ones(1, S, dtype=torch.bool))


def test_latents_must_divide_the_page() -> None:
    with pytest.raises(ConfigError, match=r"latents_per_page must divide the patches of a page \(30\), got 8"):
        PerceiverResampler(CONFIG, WIDTH, 30)


# ------------------------------------------------------------------------------------------------------- window pooling


def pooling(window: int, width: int = WIDTH, *, plain: bool = False, **sizes: object) -> WindowPooling:
    """``plain``: gives out the pooled features as they are."""
    torch.manual_seed(0)
    config = ResamplerConfig(**{"width": 16, "heads": 2} | sizes)  # type: ignore[arg-type]
    pooled = WindowPooling(config, width, window).eval()
    if plain:
        pooled.project = nn.Identity()  # type: ignore[assignment]
    return pooled


def test_pooling_is_the_mean_of_what_is_present() -> None:
    features = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [5.0, 60.0], [7.0, 8.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True, True, True, False]])
    pooled, standing = pooling(3, 2, plain=True)(features, mask)
    assert pooled.tolist() == [[[3.0, 30.0], [7.0, 8.0]]]  # the last window holds one feature, and is it
    assert standing.tolist() == [[True, True]]
    pooled, standing = pooling(2, 2, plain=True)(features, torch.tensor([[True, False, False, False, False]]))
    assert pooled.tolist() == [[[1.0, 10.0], [0.0, 0.0], [0.0, 0.0]]]
    assert standing.tolist() == [[True, False, False]]


def test_a_window_of_one_leaves_features_by_themselves() -> None:
    features, mask = page(5, 32)
    pooled, standing = pooling(1, plain=True)(features, mask)
    assert torch.equal(pooled[mask], features[mask])
    assert torch.equal(standing, mask)


def test_pooled_windows_are_projected_one_by_one() -> None:
    pool, (features, mask) = pooling(4, salience=True, spelling_width=5), page(10, 32)
    out, standing = pool(features, mask)
    assert out.shape == (2, 8, 1 + 16 + 5)
    assert standing.tolist() == [[True] * 3 + [False] * 5, [True] * 8]
    norm, first, _, last = pool.project
    for row, window, size in ((0, 0, 4), (0, 2, 2), (1, 7, 4)):
        mean = features[row, 4 * window : 4 * window + size].mean(0)
        hidden = nn.functional.gelu(first(norm(mean)))
        torch.testing.assert_close(out[row, window], last(hidden), atol=1e-5, rtol=1e-5)
    assert first.out_features == 4 * 16


def test_pooling_alone_is_as_in_a_batch() -> None:
    pool, (features, mask) = pooling(4), page(2, 32, 17)
    together, standing = pool(features, mask)
    for i, length in enumerate((2, 32, 17)):
        alone, alone_standing = pool(features[i : i + 1, :length], mask[i : i + 1, :length])
        assert alone_standing.all()
        torch.testing.assert_close(together[i][standing[i]], alone[0], atol=1e-5, rtol=1e-5)


def test_pooling_does_not_read_what_is_absent() -> None:
    pool, (features, mask) = pooling(4), page(10)
    noisy = torch.where(mask[..., None], features, torch.full_like(features, 9.0))
    assert torch.equal(pool(features, mask)[0], pool(noisy, mask)[0])


def test_a_mean_looks_at_its_window_alike() -> None:
    pooling = WindowPooling(CONFIG, WIDTH, window=4)
    features, mask = page(6, longest=8)
    (weights,) = pooling.attention(features, mask)[0, :, 0]
    expected = torch.zeros(2, 8 + 2)
    expected[0, :4], expected[1, 4:6] = 1 / 4, 1 / 2
    assert torch.equal(weights, expected)
