from __future__ import annotations

import itertools

import pytest
import torch

from vist_rag.compression import VisualMemory
from vist_rag.compression.memory import keep
from vist_rag.errors import ConfigError, ShapeError


def memory(*latents: float) -> VisualMemory:
    return VisualMemory(torch.tensor([[value, -value] for value in latents]), "abc")


def test_coarsen_keeps_latents_whole_and_in_order() -> None:
    coarse = memory(1, 3, 10, 20, 5, 7).coarsen(3)
    assert coarse.latents.tolist() == [[3, -3], [20, -20], [7, -7]]
    assert coarse.fingerprint == "abc"


def test_coarsen_spreads_what_it_leaves_out() -> None:
    for n in range(1, 40):
        for size in range(1, n + 1):
            kept = keep(n, size).tolist()
            gaps = [b - a for a, b in itertools.pairwise([-1, *kept, n])]
            assert len(kept) == size
            assert min(gaps) >= 1
            assert max(gaps) <= -(-n // size) + 1


def test_coarsen_keeps_what_matters_most_in_reading_order() -> None:
    ranked = VisualMemory(torch.arange(5.0)[:, None], "abc", torch.tensor([0.1, 3.0, 0.2, 2.0, 0.2]))
    assert ranked.coarsen(2).latents.flatten().tolist() == [1, 3]
    assert ranked.coarsen(3).latents.flatten().tolist() == [1, 2, 3]  # of equals the first
    assert ranked.coarsen(3).coarsen(2).latents.flatten().tolist() == [1, 3]


def test_coarsen_keeps_the_dtype() -> None:
    half = VisualMemory(torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float16), "abc")
    assert half.coarsen(1).latents.dtype == torch.float16
    assert half.coarsen(1).latents.tolist() == [[2.0]]


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
