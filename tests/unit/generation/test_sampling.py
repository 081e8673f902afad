"""Sampling: the distribution, the seed, and that nothing global is touched."""

from __future__ import annotations

import pytest
import torch

from vist_rag.errors import ConfigError
from vist_rag.generation import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def draws(sampling: Sampling, n: int) -> torch.Tensor:
    processors = sampling.processors()
    ids = torch.zeros(n, 1, dtype=torch.long)
    return processors(ids, LOGITS.expand(n, -1).clone()).argmax(-1)


def test_tokens_are_drawn_in_the_proportion_of_the_softmax() -> None:
    n, temperature = 40_000, 0.7
    shares = torch.bincount(draws(Sampling(temperature, seed=1), n), minlength=4) / n
    wanted = (LOGITS / temperature).softmax(-1)
    assert (shares - wanted).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard errors


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    assert draws(Sampling(5.0, top_k=2, seed=1), 2000).unique().tolist() == [0, 1]
    assert draws(Sampling(1.0, top_p=0.5, seed=1), 2000).unique().tolist() == [0]


def test_a_seed_repeats_and_another_one_does_not() -> None:
    one = draws(Sampling(1.0, seed=5), 200)
    assert torch.equal(one, draws(Sampling(1.0, seed=5), 200))
    assert not torch.equal(one, draws(Sampling(1.0, seed=6), 200))
    assert not torch.equal(draws(Sampling(1.0), 200), draws(Sampling(1.0), 200))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draws(Sampling(1.0, seed=5), 10)
    draws(Sampling(1.0), 10)
    assert torch.equal(before, torch.random.get_rng_state())


def test_temperature_0_changes_nothing() -> None:
    assert len(Sampling().processors()) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"seed": -1}],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
