from __future__ import annotations

import pytest
import torch

from vist_rag.compression import VisualMemory
from vist_rag.errors import ConfigError, ShapeError


def memory(*latents: float, size: int | None = None) -> VisualMemory:
    return VisualMemory(torch.tensor([[value, -value] for value in latents]), "abc", size)


def test_a_memory_takes_a_position_for_each_latent() -> None:
    whole = memory(1, 3, 10)
    assert len(whole) == 3
    assert whole.places.tolist() == [0, 1, 2]
    assert whole.places.dtype == torch.long


def test_a_coarser_memory_keeps_all_latents_and_neighbours_share_a_position() -> None:
    whole = memory(1, 3, 10, 20, 5)
    coarse = whole.coarsen(2)
    assert coarse.latents is whole.latents
    assert coarse.fingerprint == "abc"
    assert len(coarse) == 2
    assert coarse.places.tolist() == [0, 0, 0, 1, 1]
    assert whole.coarsen(1).places.tolist() == [0] * 5
    assert len(whole) == 5  # as it was


def test_every_position_has_as_many_latents_as_any_other_give_or_take_one() -> None:
    for n in range(1, 40):
        for size in range(1, n + 1):
            coarse = memory(*range(n)).coarsen(size)
            places = coarse.places
            counts = torch.bincount(places)
            assert len(coarse) == len(counts) == size
            assert places.tolist() == sorted(places.tolist())
            assert counts.min() >= 1
            assert counts.max() - counts.min() <= 1


def test_coarsening_twice_is_coarsening_once() -> None:
    whole = memory(*range(13))
    assert whole.coarsen(6).coarsen(4).places.tolist() == whole.coarsen(4).places.tolist()
    assert len(whole.coarsen(4).coarsen(6)) == 4  # at most so many


def test_coarsen_leaves_what_is_small_enough() -> None:
    small = memory(1, 2, 3)
    assert small.coarsen(3) is small
    assert small.coarsen(64) is small


@pytest.mark.parametrize("size", [0, -1])
def test_coarsen_to_nothing_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size must be 1 or more, got {size}"):
        memory(1, 2).coarsen(size)


@pytest.mark.parametrize("size", [0, -1, 4])
def test_a_size_that_the_latents_cannot_fill_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"size must be in 1..3 \(latents of this memory\), got {size}\."):
        memory(1, 2, 3, size=size)
    assert len(memory(1, 2, 3, size=3)) == 3


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 4, 4)])
def test_memory_is_a_matrix_of_one_or_more_latents(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"latents must be \[n, d\]"):
        VisualMemory(torch.zeros(shape), "abc")
