"""The application: OpenAI's endpoints over a pipeline."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Collection
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vist_rag.pipeline import VistRAG
from vist_rag.serving.answering import Asked, answer, stream
from vist_rag.serving.events import EventStream
from vist_rag.serving.limits import CHAT_PATH, LEFT, Admission, Limits
from vist_rag.serving.metrics import Metrics
from vist_rag.serving.page import OPEN_PATHS as PAGE_PATHS
from vist_rag.serving.page import page_router
from vist_rag.serving.refusal import Json, Refusal, refuse_in_openai_s_way
from vist_rag.serving.schema import ChatRequest, chunk_json, citations_json, completion_json, usage_json
from vist_rag.types import Answer

Whole = TypeVar("Whole")

OPEN_PATHS = ("/health", *PAGE_PATHS)
"""Asked for without a key: whether the server is up, and the page itself, which shows nothing of the index."""


def create_app(
    rag: VistRAG,
    *,
    model_name: str = "vist-rag",
    api_key: str | None = None,
    limits: Limits | None = None,
    allowed_hosts: Collection[str] = ("*",),
) -> FastAPI:
    """An OpenAI-compatible server over an index, with a page at ``/`` to ask it and see what it read.

    Args:
        rag: What answers. The index stays open, and the caller closes it.
        model_name: What clients call it.
        api_key: What clients must send, for every path but ``OPEN_PATHS``; None: nothing.
        limits: What a request may take; None: the defaults of :class:`~vist_rag.serving.limits.Limits`.
        allowed_hosts: Names in the ``Host`` header that are served. A server without a key names its own, so that no
            site that a browser on this machine visits can reach it under another name.
    """
    limits, metrics = limits or Limits(), Metrics()
    app = FastAPI(
        title="vist-rag",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts)),
            Middleware(Admission, api_key=api_key, limits=limits, metrics=metrics, open_paths=OPEN_PATHS),
        ],
    )
    refuse_in_openai_s_way(app)
    app.include_router(_about(model_name, metrics))
    app.include_router(_chat(rag, model_name, limits, metrics))
    app.include_router(page_router(rag))
    return app


def _about(model_name: str, metrics: Metrics) -> APIRouter:
    router = APIRouter()
    card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "vist-rag"}

    @router.get("/health")
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.get("/metrics")
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type=metrics.content_type)

    @router.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(name, model_name)
        return Json(card)

    return router


def _chat(rag: VistRAG, model_name: str, limits: Limits, metrics: Metrics) -> APIRouter:
    router, turns = APIRouter(), asyncio.Semaphore(limits.max_streams)

    @router.post(CHAT_PATH)
    async def chat(body: ChatRequest, request: Request) -> Response:
        clock = asyncio.get_running_loop().time
        begin = clock()
        _check_model(body.model, model_name)
        asked = Asked.of(body, rag, limits)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        longest = asked.max_new_tokens(rag)
        if not body.stream:
            whole = await _while_listened(request, answer(rag, asked), limits.timeout_s)
            metrics.count(whole.usage)
            return Json(completion_json(head, whole, _finish_reason(whole, longest)))

        async def documents() -> AsyncGenerator[dict[str, Any], None]:
            told = body.stream_options is not None and bool(body.stream_options.include_usage)
            opening = {"role": "assistant"}
            async with turns, aclosing(stream(rag, asked)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Answer):
                        metrics.count(piece.usage)
                        end = {"content": "", "citations": citations_json(piece), "written": piece.text}
                        yield chunk_json(head, opening | end, _finish_reason(piece, longest))
                        if told:
                            yield chunk_json(head, None) | {"usage": usage_json(piece.usage)}
                    else:
                        yield chunk_json(head, opening | {"content": piece})
                    opening = {}

        events = documents()
        # What goes wrong before the first piece is told by the status.
        first = await _while_listened(request, anext(events), limits.timeout_s)
        metrics.first_token_seconds.observe(clock() - begin)
        return EventStream(first, events, begin + limits.timeout_s)

    return router


def _check_model(name: str, served: str) -> None:
    if name != served:
        message = f"model must be {served!r}, the one that is served here, got {name[:80]!r}."
        raise Refusal(404, message, param="model", code="model_not_found")


def _finish_reason(whole: Answer, longest: int) -> str:
    return "length" if whole.usage.completion_tokens >= longest else "stop"


async def _while_listened(request: Request, answering: Awaitable[Whole], timeout_s: float) -> Whole:
    """What is awaited, given up when the client leaves or the time is over."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(answering), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Refusal(LEFT, "the client left.") if tasks[1].done() else TimeoutError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
