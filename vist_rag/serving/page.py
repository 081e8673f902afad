"""The page of the server: ask a question, and see what its answer was read from."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict

from vist_rag.errors import ConfigError
from vist_rag.inspection import inspect_answer, page_files
from vist_rag.pipeline import VistRAG
from vist_rag.serving.refusal import Json
from vist_rag.serving.schema import Options

OPEN_PATHS = ("/", "/page.css", "/page.js")
"""What a browser asks for before anybody could give a key; nothing of the index is in it."""

_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MOST = 16
"""Passages that are shown at most: each has a picture."""


class AskedQuestion(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(extra="forbid")

    question: str
    budget: Options = Options()


def page_router(rag: VistRAG) -> APIRouter:
    """``GET /``: the page and its two files. ``POST /inspect``: what it shows, as ``Inspection.to_dict`` gives it.

    Args:
        rag: What answers.
    """
    router, files = APIRouter(), page_files()
    turn = asyncio.Lock()  # one at a time: each takes two passes and a picture of every passage

    def send(name: str) -> Response:
        return Response(files[name], media_type=_TYPES[name], headers=_HEADERS)

    @router.get("/")
    async def page() -> Response:
        return send("index.html")

    @router.get("/page.css")
    async def style() -> Response:
        return send("page.css")

    @router.get("/page.js")
    async def script() -> Response:
        return send("page.js")

    @router.post("/inspect")
    async def inspect(asked: AskedQuestion) -> Response:
        budget = asked.budget.over(rag.budget)
        if budget.top_k > _MOST:
            raise ConfigError(f"k_raw + k_memory must be in 1..{_MOST} on this page, got {budget.top_k}; lower them.")
        async with turn:
            found = await run_in_threadpool(lambda: inspect_answer(rag, asked.question, budget=budget).to_dict())
        return Json(found, headers={"Cache-Control": "no-store"})

    return router


__all__ = ["OPEN_PATHS", "page_router"]
