"""The server of ``vist_rag.serving`` in a thread of a test, over tiny models, and clients of it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import openai
import uvicorn

from vist_rag.pipeline import VistRAG
from vist_rag.serving import create_app


@contextmanager
def serving(rag: VistRAG, **settings: Any) -> Iterator[str]:
    """The URL of a server that runs as long as the body; settings are ``create_app``'s."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(rag, **settings), log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


def client_of(url: str, key: str = "none", **settings: Any) -> openai.OpenAI:
    """OpenAI's client, which does not try again."""
    return openai.OpenAI(base_url=url, api_key=key, **{"max_retries": 0, "timeout": 60} | settings)


def asking(question: str, **more: Any) -> dict[str, Any]:
    """The arguments of a chat completion."""
    return {"model": "vist-rag", "messages": [{"role": "user", "content": question}], **more}


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and document that a body gets, which may be bytes, JSON, or an iterator of chunks."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    head = {"Content-Type": "application/json"} | (headers or {})
    connection.request("POST", f"{urlsplit(url).path}/chat/completions", raw, head)
    response = connection.getresponse()
    document = response.read()
    connection.close()
    return response.status, dict(response.headers), json.loads(document)


def until(condition: Any, seconds: float = 30) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())
