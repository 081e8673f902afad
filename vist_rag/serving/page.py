"""The page of the server: ask a question, and see what its answer was read from."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from vist_rag.budget import Budget, Policy
from vist_rag.inspection import inspect_answer, page_files
from vist_rag.pipeline import VistRAG
from vist_rag.serving.refusal import Json

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

_Count = Annotated[int, Field(ge=0, le=_MOST)]


class AskedBudget(BaseModel):
    """Fields of :class:`~vist_rag.budget.Budget`; what is not given is the pipeline's own."""

    model_config = ConfigDict(extra="forbid")

    k_raw: _Count | None = None
    k_memory: _Count | None = None
    latents: int | None = None
    tokens: int | None = None
    rate: float | None = None
    policy: Policy | None = None

    def over(self, own: Budget) -> Budget:
        """The pipeline's budget with what is given here; a limit takes the place of another one."""
        given = self.model_dump(exclude_none=True)
        if given.keys() & {"tokens", "rate"}:
            given = {"tokens": None, "rate": None, **given}
        return replace(own, **given)


class AskedQuestion(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(extra="forbid")

    question: str
    budget: AskedBudget = AskedBudget()


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
        async with turn:
            found = await run_in_threadpool(lambda: inspect_answer(rag, asked.question, budget=budget).to_dict())
        return Json(found, headers={"Cache-Control": "no-store"})

    return router


__all__ = ["OPEN_PATHS", "page_router"]
