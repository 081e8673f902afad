"""A few hundred of the cases of ``benchmarks/fuzz.py``, and that it sees what it looks for."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import ModuleType

import pytest

from tests.support.benchmarks import load_benchmark
from vist_rag.errors import InputError


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load_benchmark("fuzz")


@pytest.mark.slow
def test_no_input_ends_in_anything_but_a_result_or_an_error_of_ours(fuzz: ModuleType) -> None:
    counts, violations, _ = fuzz.fuzz(360)
    assert violations == []
    read = {name for name, count in counts.items() if name.endswith("read") and count >= 5}
    assert read == {f"{door} read" for door in ("texts", "files", "queries", "budgets", "spans", "memories", "stores")}
    assert sum(count for name, count in counts.items() if name.endswith("refused")) >= 20


def test_another_exception_a_wrong_result_and_a_slow_case_are_seen(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def case(rng: random.Random) -> None:
        seen.append(rng.random())
        if len(seen) == 1:
            raise InputError("refused, as it may be")
        if len(seen) == 2:
            raise KeyError("unknown")
        fuzz.require(len(seen) != 3, "three is wrong")

    seen: list[float] = []
    monkeypatch.setattr(fuzz, "doors", lambda: nullcontext({"one": case}))
    counts, violations, _ = fuzz.fuzz(4, seed=7)
    assert counts == {"one refused": 1, "one read": 1}
    assert [(v.door, v.seed, v.what) for v in violations] == [
        ("one", 8, "KeyError: 'unknown'"),
        ("one", 9, "Wrong: three is wrong"),
    ]
    assert seen == [random.Random(seed).random() for seed in range(7, 11)]
    monkeypatch.setattr(fuzz, "LIMIT_S", -1.0)
    assert fuzz.fuzz(1)[1][0].what == "took 0.0 s"
