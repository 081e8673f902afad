from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vist_rag.budget import LEAST_LATENTS, POLICIES, Budget, Guarded, Plan, Policy
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


def split(budget: Budget, found: list[SearchHit], **guarding: Any) -> Plan:
    return budget.split(found, raw_tokens=raw_tokens, memory_tokens=memory_tokens, **guarding)


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
        (45, ([], [0, 1])),  # one left over: the first gives the next enough for LEAST_LATENTS
        (68, ([], [0, 1])),  # 44 + 24
        (69, ([], [0, 1, 2])),
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
    everything = sum(memory_tokens(hit.passage, latents) for hit in FOUND)
    for tokens in range(FRAME + 1, 420):
        budget = Budget(k_raw=k_raw, k_memory=5 - k_raw, latents=latents, tokens=tokens)
        plan = split(budget, FOUND)
        assert cost(plan) <= tokens
        read = len(plan.raw) + len(plan.compressed)
        assert [h.rank for h in (*plan.raw, *plan.compressed)] == list(range(read))
        if tokens < everything:
            # A memory of one latent takes five positions: what is no multiple of five cannot be taken.
            assert cost(plan) == (tokens if latents != 1 else tokens // 5 * 5)
        elif len(plan.raw) < k_raw:
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
    assert split(Budget(tokens=1), []) == Plan((), (), (), limit=1)
    assert split(Budget(rate=0.5), []) == Plan((), (), (), limit=0)
    assert split(Budget(), []) == Plan((), (), ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_raw": -1}, "k_raw must be 0 or more, got -1"),
        ({"k_memory": -2}, "k_memory must be 0 or more, got -2"),
        ({"k_raw": 0, "k_memory": 0}, r"k_raw \+ k_memory must be 1 or more, got 0"),
        ({"latents": 0}, "latents must be 1 or more, got 0"),
        ({"tokens": 0}, "tokens must be 1 or more, got 0"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\], a share of the raw tokens, got 0\.0"),
        ({"rate": 4}, r"got 4; a ratio of 4 is a rate of 0\.25"),
        ({"rate": float("nan")}, "got nan"),
        ({"tokens": 64, "rate": 0.5}, r"tokens and rate exclude each other, got 64 and 0\.5; give one"),
        ({"policy": "best"}, "policy must be one of fixed, by_rank, by_score, got 'best'"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**fields)


# -------------------------------------------------------------------------------------------------------------- exact


@pytest.fixture(scope="module")
def benchmark_cases() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "budget.py"
    spec = importlib.util.spec_from_file_location("benchmark_budget", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_any_limit_is_met_to_the_last_position(benchmark_cases: ModuleType) -> None:
    """The cases of ``benchmarks/budget.py``, which counts in another way what can be taken."""
    rng = random.Random(1)
    for _ in range(3000):
        case = benchmark_cases.draw(rng)
        assert benchmark_cases.violations(case) == [], case


@pytest.mark.parametrize("policy", POLICIES)
def test_passages_longer_than_their_frame_take_every_limit(policy: Policy) -> None:
    rng = random.Random(2)
    for _ in range(400):
        found = hits(*((rng.randint(20, 200), rng.randint(FRAME + 1, 90)) for _ in range(rng.randint(1, 9))))
        everything = sum(memory_tokens(hit.passage, None) for hit in found)
        tokens = rng.randint(FRAME + 1, everything)
        assert cost(split(Budget(k_raw=2, k_memory=7, tokens=tokens, policy=policy), found)) == tokens


def test_what_remains_goes_to_the_next_passage() -> None:
    plan = split(Budget(tokens=68 + FRAME + 20), FOUND)
    assert (ranks(plan), plan.latents) == (([], [0, 1, 2]), (40, 20, 20))
    plan = split(Budget(tokens=68 + FRAME), FOUND)  # only the frame would fit: the one before gives LEAST_LATENTS
    assert (ranks(plan), plan.latents) == (([], [0, 1, 2]), (40, 20 - LEAST_LATENTS, LEAST_LATENTS))


# ----------------------------------------------------------------------------------------------------------- policies


def test_by_rank_divides_what_is_left_by_rank() -> None:
    found = hits(*[(400, 200)] * 3)
    plan = split(Budget(tokens=3 * (FRAME + LEAST_LATENTS) + 110, policy="by_rank"), found)
    assert plan.latents == (LEAST_LATENTS + 60, LEAST_LATENTS + 30, LEAST_LATENTS + 20)  # 110 as 6 : 3 : 2


def test_by_score_divides_what_is_left_by_the_margin() -> None:
    found = [
        SearchHit(hit.passage, score, hit.rank)
        for hit, score in zip(hits(*[(400, 200)] * 3), (0.9, 0.9, 0.8), strict=True)
    ]
    plan = split(Budget(tokens=3 * (FRAME + LEAST_LATENTS) + 100, policy="by_score"), found)
    # 100 as 1 : 1 : 1/e is 42.23, 42.23, 15.54: the largest remainder is that of the last
    assert plan.latents == (LEAST_LATENTS + 42, LEAST_LATENTS + 42, LEAST_LATENTS + 16)


@pytest.mark.parametrize("policy", ["by_rank", "by_score"])
def test_what_one_cannot_take_goes_to_the_others(policy: Policy) -> None:
    found = [SearchHit(hit.passage, 0.5, hit.rank) for hit in hits((90, 10), (400, 200), (400, 200))]
    plan = split(Budget(tokens=3 * (FRAME + LEAST_LATENTS) + 102, policy=policy), found)
    # Two of 102 fill the first; 100 are divided as 3 : 2, or equally.
    assert plan.latents == ((10, 68, 48) if policy == "by_rank" else (10, 58, 58))


@pytest.mark.parametrize("policy", ["by_rank", "by_score"])
def test_as_many_share_as_can_have_the_least(policy: Policy) -> None:
    for count in (1, 2, 3, 4):
        for more in (0, FRAME + LEAST_LATENTS - 1):
            plan = split(Budget(tokens=count * (FRAME + LEAST_LATENTS) + more, policy=policy), FOUND)
            assert ranks(plan)[1] == list(range(count))
            assert min(n or 0 for n in plan.latents) >= LEAST_LATENTS


@pytest.mark.parametrize("scores", [(1e9, 0.0, -1e9), (float("nan"),) * 3, (float("inf"), 0.0, float("-inf"))])
def test_scores_of_any_kind_divide_a_limit(scores: tuple[float, ...]) -> None:
    found = [SearchHit(hit.passage, score, hit.rank) for hit, score in zip(FOUND, scores, strict=False)]
    for tokens in range(FRAME + 1, 102):
        assert cost(split(Budget(tokens=tokens, policy="by_score"), found)) == tokens


# --------------------------------------------------------------------------------------------------------------- rate


@pytest.mark.parametrize(("rate", "limit"), [(0.5, 115), (0.29, 66), (1.0, 230), (1, 230), (0.1, 23)])
def test_a_rate_is_a_share_of_the_raw_tokens_of_what_may_be_read(rate: float, limit: int) -> None:
    plan = split(Budget(k_memory=3, rate=rate), FOUND)  # 100 + 50 + 80 as text
    assert plan == split(Budget(k_memory=3, tokens=limit), FOUND)
    assert plan.limit == limit


def test_a_rate_is_read_as_it_is_written() -> None:
    assert split(Budget(k_memory=1, rate=0.29), hits((100, 60))).limit == 29  # 0.29 * 100 is 28.999999999999996


def test_a_rate_that_leaves_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rate must allow a limit of 5 or more .* got 4 at a rate of 0\.04; raise"):
        split(Budget(k_memory=1, rate=0.04), FOUND)


def test_without_a_limit_there_is_none_to_tell() -> None:
    assert split(Budget(policy="by_rank"), FOUND) == split(Budget(), FOUND)
    assert split(Budget(), FOUND).limit is None


# -------------------------------------------------------------------------------------------------------------- guard


def objecting(*ranks: int) -> Any:
    return lambda passage: f"no {passage.text}" if int(passage.text) in ranks else None


def became(plan: Plan) -> list[tuple[int, str, str]]:
    return [(one.hit.rank, one.reason, one.read) for one in plan.guarded]


@pytest.mark.parametrize("strict", [False, True])
def test_without_a_limit_what_a_guard_objects_to_is_read_raw(strict: bool) -> None:
    plan = split(Budget(k_raw=1, k_memory=3, latents=8), FOUND, guard=objecting(0, 3, 4), strict=strict)
    assert ranks(plan) == ([0, 1, 3], [2])  # k_raw takes the best of the others; the fifth is none of the top four
    assert plan.latents == (8,)
    assert plan.guarded == (Guarded(FOUND[0], "no 0", "raw"), Guarded(FOUND[3], "no 3", "raw"))


def test_with_a_limit_text_comes_first_and_memories_share_what_is_left() -> None:
    plan = split(Budget(k_memory=3, tokens=120), FOUND, guard=objecting(2))
    assert (ranks(plan), plan.latents) == (([2], [0]), (36,))  # 80 as text, 40 for the first
    assert became(plan) == [(2, "no 2", "raw")]


@pytest.mark.parametrize(
    ("strict", "expected", "read"), [(False, ([1], [0]), "memory"), (True, ([1], [2]), "left_out")]
)
def test_text_that_does_not_fit(strict: bool, expected: tuple[list[int], list[int]], read: str) -> None:
    plan = split(Budget(k_memory=3, tokens=80), FOUND, guard=objecting(0, 1), strict=strict)  # 100 and 50 as text
    assert ranks(plan) == expected
    assert cost(plan) == 80
    assert became(plan) == [(0, "no 0", read), (1, "no 1", "raw")]


def test_where_strict_leaves_nothing_nothing_is_read() -> None:
    plan = split(Budget(k_memory=1, tokens=80), FOUND, guard=objecting(0), strict=True)
    assert ranks(plan) == ([], [])
    assert became(plan) == [(0, "no 0", "left_out")]


def test_text_may_take_all_there_is() -> None:
    plan = split(Budget(k_memory=2, tokens=53), FOUND, guard=objecting(1))
    assert ranks(plan) == ([1], [])


def test_k_raw_does_not_count_what_a_guard_objects_to() -> None:
    everything = 100 + 50 + 80 + FRAME + 25
    plan = split(Budget(k_raw=2, k_memory=2, tokens=everything), FOUND, guard=objecting(0))
    assert ranks(plan) == ([0, 1, 2], [3])
    plan = split(Budget(k_raw=2, k_memory=2, tokens=everything - 1), FOUND, guard=objecting(0))
    assert ranks(plan) == ([0, 1], [2, 3])
