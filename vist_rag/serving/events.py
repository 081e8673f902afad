"""A stream of documents as server-sent events, closed with the connection."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vist_rag.serving.refusal import refusal_of

_log = logging.getLogger("uvicorn.error")


class EventStream(StreamingResponse):
    """Documents as OpenAI streams them: ``data: JSON`` each, ``data: [DONE]`` at the end.

    What fails on the way is told as an error in the place of the end. The documents are closed whatever happens, also
    where the client has left.

    Args:
        first: The first document.
        rest: Those after it.
        deadline: On the event loop's clock, in seconds.
    """

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], deadline: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy would keep pieces back
        super().__init__(self._events(first, deadline), headers=headers, media_type="text/event-stream")
        self._rest = rest

    async def _events(self, first: dict[str, Any], deadline: float) -> AsyncIterator[bytes]:
        yield _event(first)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    document = await anext(self._rest, None)
                if document is None:
                    break
                yield _event(document)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status_code == 500:
                _log.exception("A stream broke off.")
            yield _event(refusal.body)
        else:
            yield b"data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"
