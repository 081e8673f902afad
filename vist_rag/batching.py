"""Calls that come at the same time are served together: one forward pass for all of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

from vist_rag.errors import ConfigError

Asked = TypeVar("Asked")
Served = TypeVar("Served")


class _Waiting(NamedTuple, Generic[Asked, Served]):
    key: Hashable
    request: Asked
    future: Future[Served]


class MicroBatcher(Generic[Asked, Served]):
    """Collects requests of any threads and event loops, and serves those that wait in one call.

    While one batch is served the next one gathers, so that nothing waits for company. Where a batch fails its requests
    are served one by one, so that each fails for itself alone.

    Args:
        serve: Answers a list of requests, in order.
        max_batch_size: Requests in one call.
        max_wait_ms: How long an idle batcher waits for company of its first request, and of each that comes meanwhile.
    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self, serve: Callable[[list[Asked]], Sequence[Served]], *, max_batch_size: int = 16, max_wait_ms: float = 2.0
    ) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size must be 1 or more, got {max_batch_size}.")
        if not 0 <= max_wait_ms <= 60_000:
            raise ConfigError(f"max_wait_ms must be in 0..60000, got {max_wait_ms}.")
        self.max_batch_size = max_batch_size
        self.max_wait_ms = max_wait_ms
        self._serve = serve
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting[Asked, Served]] = deque()
        self._working = False
        # One thread that stays: torch sets up its own threads anew for each thread that calls it.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vist-batcher")

    def submit(self, request: Asked, key: Hashable = None) -> Future[Served]:
        """Ask; requests of equal keys may share a call. Cancelling the future withdraws a request that still waits."""
        future: Future[Served] = Future()
        with self._lock:
            self._waiting.append(_Waiting(key, request, future))
            if not self._working:
                self._working = True
                self._worker.submit(self._work)
        return future

    def _work(self) -> None:
        self._gather()
        while batch := self._next():
            if asked := [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]:
                self._answer(asked)

    def _gather(self) -> None:
        """Wait for company, and on while more comes: what comes together is served together."""
        seen, patience_s = 0, self.max_wait_ms / 1000
        while seen < (waiting := len(self._waiting)) < self.max_batch_size:
            # Who has company is likely to get more, and a batch that is split takes far longer than this.
            time.sleep(patience_s if waiting == 1 else 3 * patience_s)
            seen = waiting

    def _next(self) -> list[_Waiting[Asked, Served]]:
        """The requests that are served next: those with the key of the one that waits longest."""
        with self._lock:
            if not self._waiting:
                self._working = False
                return []
            key = self._waiting[0].key
            batch = [waiting for waiting in self._waiting if waiting.key == key][: self.max_batch_size]
            taken = set(map(id, batch))
            self._waiting = deque(waiting for waiting in self._waiting if id(waiting) not in taken)
            return batch

    def _answer(self, batch: list[_Waiting[Asked, Served]]) -> None:
        try:
            answers = self._serve([waiting.request for waiting in batch])
            for waiting, answer in zip(batch, answers, strict=True):
                waiting.future.set_result(answer)
        except BaseException as error:
            left = [waiting for waiting in batch if not waiting.future.done()]
            if len(batch) == 1:
                left[0].future.set_exception(error)
                return
            for waiting in left:
                self._answer([waiting])
