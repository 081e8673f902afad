"""Who is let in, how many at a time, and with how large a body: decided before a request is read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vist_rag.errors import ConfigError
from vist_rag.serving.metrics import Metrics
from vist_rag.serving.refusal import Refusal

CHAT_PATH = "/v1/chat/completions"
LEFT = 499
"""The status that is counted where the client left before there was one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server allows.

    Attributes:
        max_body_bytes: Of a request.
        max_in_flight: Requests that are answered or wait for it; more are refused with 429.
        max_streams: Streams that generate at the same time, each in a pass of its own; more wait for their turn.
        timeout_s: Of one request, waiting included.
        max_tokens: What a request may ask for, at most.
        max_passages: What a request may have read, at most.
    Raises:
        ConfigError: If a number is out of range.
    """

    max_body_bytes: int = 2**20
    max_in_flight: int = 64
    max_streams: int = 4
    timeout_s: float = 60.0
    max_tokens: int = 1024
    max_passages: int = 64

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_in_flight", "max_streams", "max_tokens", "max_passages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not 0 < self.timeout_s <= 86_400:
            raise ConfigError(f"timeout_s must be above 0 and at most 86400 (a day), got {self.timeout_s}.")


class Admission:
    """Stands before an application (ASGI): checks the key, counts who is inside, and measures how it went.

    Args:
        app: What is behind it.
        api_key: Who does not send it as ``Authorization: Bearer KEY`` is refused; None: everybody is let in.
        limits: Of bodies, and of requests in flight.
        metrics: Where it is counted.
        open_paths: Asked for without a key.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, limits: Limits, metrics: Metrics, open_paths: Collection[str]
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._api_key = None if api_key is None else f"Bearer {api_key}".encode()
        self._open_paths = frozenset(open_paths)
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            if scope["path"] == CHAT_PATH:
                self._metrics.requests.labels(str(status)).inc()
                if status < 400:
                    self._metrics.seconds.observe(time.perf_counter() - begin)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._in_flight >= self._limits.max_in_flight:
            message = f"at most {self._limits.max_in_flight} requests are answered at a time; try again in a second."
            full = Refusal(
                429, message, type="rate_limit_error", code="too_many_requests", headers={"Retry-After": "1"}
            )
            await full.response()(scope, receive, send)
        else:
            self._in_flight += 1
            self._metrics.in_flight.set(self._in_flight)
            try:
                await self._app(scope, self._bounded(receive), send)
            finally:
                self._in_flight -= 1
                self._metrics.in_flight.set(self._in_flight)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        if self._api_key is not None and scope["path"] not in self._open_paths:
            given = headers.get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._api_key):
                message = "the API key must be the server's, as Authorization: Bearer KEY, got " + (
                    "another one." if given else "none."
                )
                return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        return self._too_large() if length.isdecimal() and int(length) > self._limits.max_body_bytes else None

    def _bounded(self, receive: Receive) -> Receive:
        """A body whose length was not told, or told wrong, is refused when it has grown too large."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limits.max_body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> Refusal:
        limit = self._limits.max_body_bytes
        return Refusal(413, f"body must be {limit:,} bytes or less, got more; send less.", code="body_too_large")
