from __future__ import annotations

import pytest
import torch

from vist_rag.compression import VisualMemory
from vist_rag.errors import ConfigError, ShapeError


def memory(*latents: float) -> VisualMemory:
    return VisualMemory(torch.tensor([[value, -value] for value in latents]), "abc")


def test_coarsen_averages_neighbours() -> None:
    coarse = memory(1, 3, 10, 20, 5, 7).coarsen(3)
    assert coarse.latents.tolist() == [[2, -2], [15, -15], [6, -6]]
    assert coarse.fingerprint == "abc"


def test_coarsen_leaves_most_latents_whole_where_few_have_to_go() -> None:
    assert memory(3.0, 6, 9, 12, 15).coarsen(4).latents[:, 0].tolist() == [4.5, 9, 12, 15]
    # No latent counts twice: groups of three and two.
    assert memory(3.0, 6, 9, 12, 15).coarsen(2).latents[:, 0].tolist() == [6, 13.5]


def test_coarsen_to_one_is_the_mean_and_keeps_the_dtype() -> None:
    half = VisualMemory(torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float16), "abc")
    assert half.coarsen(1).latents.dtype == torch.float16
    assert half.coarsen(1).latents.tolist() == [[3.0]]


def test_coarsen_leaves_what_is_small_enough() -> None:
    small = memory(1, 2, 3)
    assert small.coarsen(3) is small
    assert small.coarsen(64) is small


@pytest.mark.parametrize("n_latents", [1, 2, 3, 7, 12, 13])
def test_coarsen_gives_as_many_as_asked(n_latents: int) -> None:
    assert len(memory(*range(13)).coarsen(n_latents)) == n_latents


@pytest.mark.parametrize("n_latents", [0, -1])
def test_coarsen_to_nothing_is_refused(n_latents: int) -> None:
    with pytest.raises(ConfigError, match=f"n_latents must be 1 or more, got {n_latents}"):
        memory(1, 2).coarsen(n_latents)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 4, 4)])
def test_memory_is_a_matrix_of_one_or_more_latents(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"latents must be \[n, d\]"):
        VisualMemory(torch.zeros(shape), "abc")
