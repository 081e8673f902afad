from __future__ import annotations

import pytest

from vist_rag.budget import Budget, Plan
from vist_rag.errors import ConfigError
from vist_rag.types import Passage, SearchHit

FRAME = 4
"""Positions that a memory takes beside its latents, in these tests."""


def hits(*sizes: tuple[int, int]) -> list[SearchHit]:
    """A hit for each (raw tokens, latents)."""
    return [
        SearchHit(Passage(str(i), metadata={"raw": raw, "latents": latents}), 1 - i / 10, i)
        for i, (raw, latents) in enumerate(sizes)
    ]


def raw_tokens(passage: Passage) -> int:
    return int(passage.metadata["raw"])


def memory_tokens(passage: Passage, latents: int | None) -> int:
    n = int(passage.metadata["latents"])
    return FRAME + (n if latents is None else min(n, latents))


def split(budget: Budget, found: list[SearchHit]) -> Plan:
    return budget.split(found, raw_tokens=raw_tokens, memory_tokens=memory_tokens)


def cost(plan: Plan) -> int:
    return sum(raw_tokens(h.passage) for h in plan.raw) + sum(
        memory_tokens(h.passage, n) for h, n in zip(plan.compressed, plan.latents, strict=True)
    )


def ranks(plan: Plan) -> tuple[list[int], list[int]]:
    return [h.rank for h in plan.raw], [h.rank for h in plan.compressed]


FOUND = hits((100, 40), (50, 20), (80, 30), (60, 25), (90, 35))


def test_best_are_raw_and_the_next_are_memory() -> None:
    plan = split(Budget(k_raw=2, k_memory=2, latents=8), FOUND)
    assert ranks(plan) == ([0, 1], [2, 3])
    assert plan.latents == (8, 8)


@pytest.mark.parametrize(
    ("k_raw", "k_memory", "expected"),
    [(0, 2, ([], [0, 1])), (3, 0, ([0, 1, 2], [])), (0, 9, ([], [0, 1, 2, 3, 4])), (9, 9, ([0, 1, 2, 3, 4], []))],
)
def test_routing_by_number(k_raw: int, k_memory: int, expected: tuple[list[int], list[int]]) -> None:
    plan = split(Budget(k_raw=k_raw, k_memory=k_memory), FOUND)
    assert ranks(plan) == expected
    assert plan.latents == (None,) * len(expected[1])


def test_top_k_is_what_is_wanted_from_retrieval() -> None:
    assert Budget(k_raw=2, k_memory=3).top_k == 5


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (43, ([], [0])),  # one short of the whole first memory: fewer latents of it
        (44, ([], [0])),
        (67, ([], [0])),
        (68, ([], [0, 1])),  # 44 + 24
        (101, ([], [0, 1])),
        (102, ([], [0, 1, 2])),  # + 34
        (157, ([], [0, 1, 2])),
        (158, ([0], [1, 2])),  # 56 more turn the first one raw: 100 + 24 + 34
        (183, ([0], [1, 2])),
        (184, ([0, 1], [2])),  # 26 more, the second: 100 + 50 + 34
        (10_000, ([0, 1], [2])),  # k_raw is the most that is read raw, and top_k the most that is read
    ],
)
def test_routing_by_tokens(tokens: int, expected: tuple[list[int], list[int]]) -> None:
    plan = split(Budget(k_raw=2, k_memory=1, tokens=tokens), FOUND)
    assert ranks(plan) == expected
    assert cost(plan) <= tokens


@pytest.mark.parametrize("latents", [None, 1, 7, 100])
@pytest.mark.parametrize("k_raw", [0, 1, 5])
def test_a_budget_is_never_exceeded_and_never_wasted(latents: int | None, k_raw: int) -> None:
    for tokens in range(FRAME + 1, 420):
        budget = Budget(k_raw=k_raw, k_memory=5 - k_raw, latents=latents, tokens=tokens)
        plan = split(budget, FOUND)
        assert cost(plan) <= tokens
        read = len(plan.raw) + len(plan.compressed)
        assert [h.rank for h in (*plan.raw, *plan.compressed)] == list(range(read))
        if read < 5 and not plan.raw:
            assert cost(plan) + memory_tokens(FOUND[read].passage, latents) > tokens
        if len(plan.raw) < min(k_raw, read):
            first = FOUND[len(plan.raw)].passage
            assert cost(plan) + raw_tokens(first) - memory_tokens(first, latents) > tokens


def test_a_tight_budget_takes_as_many_latents_as_fit() -> None:
    plan = split(Budget(k_memory=3, tokens=FRAME + 13), FOUND)
    assert ranks(plan) == ([], [0])
    assert plan.latents == (13,)
    assert cost(plan) == FRAME + 13


def test_a_passage_shorter_as_text_than_as_memory_is_read_raw() -> None:
    plan = split(Budget(k_raw=1, k_memory=1, tokens=60), hits((10, 40), (90, 10)))
    assert ranks(plan) == ([0], [1])


def test_a_budget_below_one_latent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens must be 5 or more \(one latent of one passage\), got 4"):
        split(Budget(tokens=4), FOUND)


def test_no_hits_need_no_tokens() -> None:
    assert split(Budget(tokens=1), []) == Plan((), (), ())
    assert split(Budget(), []) == Plan((), (), ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_raw": -1}, "k_raw must be 0 or more, got -1"),
        ({"k_memory": -2}, "k_memory must be 0 or more, got -2"),
        ({"k_raw": 0, "k_memory": 0}, r"k_raw \+ k_memory must be 1 or more, got 0"),
        ({"latents": 0}, "latents must be 1 or more, got 0"),
        ({"tokens": 0}, "tokens must be 1 or more, got 0"),
    ],
)
def test_settings_are_checked(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**fields)
