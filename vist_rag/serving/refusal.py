"""What a request is refused with: OpenAI's error object, whatever went wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from vist_rag.errors import ConfigError, InputError, ServerError, VistError

_SHOWN = 80
"""Characters of a wrong value that are told back."""


class Json(JSONResponse):
    """JSON in ASCII, so that no lone surrogate of a passage can spoil it."""

    def render(self, content: Any) -> bytes:
        """The bytes of a document."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Refusal(HTTPException):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: What is wrong, what was got, what is allowed, the remedy.
        type: OpenAI's word for the kind of error.
        param: The field that is at fault.
        code: A name for programs.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> Json:
        """As it goes over the wire."""
        return Json(self.body, self.status_code, self.headers)


def refusal_of(error: Exception) -> Refusal:
    """The refusal that an exception becomes; what nobody foresaw tells nothing of itself."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return _of_wrong_field(error.errors())
    if isinstance(error, StarletteHTTPException):
        return Refusal(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, ConfigError | InputError):
        return Refusal(400, str(error))
    if isinstance(error, TimeoutError):
        # A client that tries again at once would make it worse.
        message = "the answer took longer than the server allows; ask for fewer passages or tokens, or later."
        return Refusal(504, message, type="timeout", code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, VistError):
        return Refusal(502 if isinstance(error, ServerError) else 500, str(error), type="server_error")
    return Refusal(500, "the server failed; its log says why.", type="server_error")


def _of_wrong_field(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    first = errors[0]
    if first["type"] == "json_invalid":
        at = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return Refusal(400, f"body must be JSON, got what is none ({at}).", code="invalid_json")
    where = [part for part in first["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".") or "body"
    if first["type"] == "missing":
        return Refusal(400, f"{param} must be given, got nothing.", param=param)
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{param} is not among the fields that are known here; leave it out.", param=param)
    if param == "body":
        return Refusal(400, "body must be a JSON object, with Content-Type: application/json.", param=param)
    got = repr(first["input"])
    got = got if len(got) <= _SHOWN else f"{got[:_SHOWN]}..."
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return Refusal(400, f"{param} must be {said}, got {got}.", param=param)


def refuse_in_openai_s_way(app: FastAPI) -> None:
    """Have every error of an application leave as OpenAI's error object."""

    async def refuse(_: Request, error: Exception) -> Json:
        return refusal_of(error).response()

    for kind in (StarletteHTTPException, RequestValidationError, VistError, TimeoutError, Exception):
        app.add_exception_handler(kind, refuse)
