"""The micro-batcher: who shares a call, who fails, who waits."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import wait

import pytest

from vist_rag.batching import MicroBatcher
from vist_rag.errors import ConfigError


class Doubling:
    """Serves numbers; keeps the batches; stands still until ``go`` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, numbers: list[int]) -> Sequence[int]:
        self.batches.append(list(numbers))
        self.go.wait(10)
        if any(number < 0 for number in numbers):
            raise ValueError(f"below zero: {numbers}")
        return [2 * number for number in numbers]


def test_each_gets_its_own_answer() -> None:
    batcher = MicroBatcher(Doubling())
    futures = [batcher.submit(i) for i in range(50)]
    assert [future.result(10) for future in futures] == [2 * i for i in range(50)]


def test_what_comes_while_a_batch_is_served_shares_the_next() -> None:
    serve = Doubling()
    serve.go.clear()
    batcher = MicroBatcher(serve, max_batch_size=4, max_wait_ms=0)
    first = batcher.submit(0)
    while not serve.batches:
        pass
    later = [batcher.submit(i) for i in range(1, 7)]
    serve.go.set()
    wait([first, *later], 10)
    assert serve.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_only_equal_keys_share_a_call_and_nobody_is_overtaken_for_ever() -> None:
    serve = Doubling()
    serve.go.clear()
    batcher = MicroBatcher(serve, max_wait_ms=0)
    futures = [batcher.submit(0)]
    while not serve.batches:
        pass
    futures += [batcher.submit(i, key=i % 2) for i in range(1, 7)]
    serve.go.set()
    wait(futures, 10)
    assert serve.batches == [[0], [1, 3, 5], [2, 4, 6]]


def test_each_fails_for_itself_alone() -> None:
    serve = Doubling()
    batcher = MicroBatcher(serve, max_wait_ms=50)
    futures = [batcher.submit(number) for number in (1, -2, 3)]
    assert futures[0].result(10) == 2
    with pytest.raises(ValueError, match=r"below zero: \[-2\]"):
        futures[1].result(10)
    assert futures[2].result(10) == 6
    assert batcher.submit(4).result(10) == 8  # and it goes on


def test_too_few_answers_are_an_error_and_not_a_hang() -> None:
    batcher = MicroBatcher[int, int](lambda numbers: [])
    with pytest.raises(ValueError, match="shorter"):
        batcher.submit(1).result(10)


def test_a_cancelled_request_is_not_served() -> None:
    serve = Doubling()
    serve.go.clear()
    batcher = MicroBatcher(serve, max_wait_ms=0)
    first = batcher.submit(0)
    while not serve.batches:
        pass
    second, third = batcher.submit(1), batcher.submit(2)
    assert second.cancel()
    serve.go.set()
    assert third.result(10) == 4
    assert first.result(10) == 0
    assert serve.batches == [[0], [2]]


def test_many_threads_at_once() -> None:
    batcher = MicroBatcher(Doubling(), max_batch_size=5)
    answers: dict[int, int] = {}

    def ask(i: int) -> None:
        answers[i] = batcher.submit(i).result(20)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {i: 2 * i for i in range(64)}


def test_an_idle_batcher_is_free_to_go() -> None:
    batcher = MicroBatcher(Doubling())
    batcher.submit(1).result(10)
    gone = weakref.ref(batcher)
    del batcher
    gc.collect()
    deadline = threading.Event()
    for _ in range(100):
        if gone() is None:
            break
        deadline.wait(0.02)
        gc.collect()
    assert gone() is None


@pytest.mark.parametrize("wrong", [{"max_batch_size": 0}, {"max_wait_ms": -1}, {"max_wait_ms": float("nan")}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MicroBatcher(Doubling(), **wrong)  # type: ignore[arg-type]
