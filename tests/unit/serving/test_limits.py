"""Who is let in: decided before a request is read."""

from __future__ import annotations

from typing import Any

import pytest

from vist_rag.errors import ConfigError
from vist_rag.serving.limits import CHAT_PATH, Admission, Limits
from vist_rag.serving.metrics import Metrics
from vist_rag.serving.run import is_loopback


@pytest.mark.parametrize("name", ["max_body_bytes", "max_in_flight", "max_streams", "max_tokens", "max_passages"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be 1 or more, got 0"):
        Limits(**{name: 0})


def test_a_day_is_the_longest_time() -> None:
    with pytest.raises(ConfigError, match="timeout_s must be above 0"):
        Limits(timeout_s=0)
    with pytest.raises(ConfigError, match="86400"):
        Limits(timeout_s=1e9)


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_which_addresses_are_of_this_machine_alone(host: str, own: bool) -> None:
    assert is_loopback(host) is own


async def ask(admission: Admission, path: str = CHAT_PATH, **headers: str) -> int:
    """The status that a request gets."""
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await admission({"type": "http", "method": "POST", "path": path, "headers": raw}, receive, send)
    return statuses[0]


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def test_the_key_opens_and_nothing_else_does() -> None:
    metrics = Metrics()
    admission = Admission(behind, api_key="abc", limits=Limits(), metrics=metrics, open_paths=["/health"])
    assert await ask(admission, authorization="Bearer abc") == 200
    for wrong in ("Bearer abx", "Bearer ab", "Bearer abcd", "bearer", "abc", "Basic abc", "Bearer \xe9"):
        assert await ask(admission, authorization=wrong) == 401
    assert await ask(admission) == 401
    assert await ask(admission, "/health") == 200
    assert await ask(admission, "/health/") == 401
    told = metrics.exposition().decode()
    assert 'vist_rag_requests_total{status="401"} 8.0' in told
    assert 'vist_rag_requests_total{status="200"} 1.0' in told  # chat completions alone are counted
    assert "abc" not in told


async def test_a_failure_behind_it_is_counted_and_its_place_is_free_again() -> None:
    async def fails(*_: Any) -> None:
        raise RuntimeError("broken")

    metrics = Metrics()
    admission = Admission(fails, api_key=None, limits=Limits(max_in_flight=1), metrics=metrics, open_paths=[])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            await ask(admission)
    told = metrics.exposition().decode()
    assert 'vist_rag_requests_total{status="500"} 2.0' in told
    assert "vist_rag_requests_in_flight 0.0" in told
