"""One server over HTTP: what is sent again, what is waited for, what an error says. It knows nothing about prompts."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Generator
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vist_rag.errors import ConfigError, MissingDependencyError, ServerError

if TYPE_CHECKING:
    import httpx2

LONGEST_PAUSE_S = 60.0
"""What a server may ask to be left alone for (``Retry-After``) before it is asked again."""
_LONGEST_BACKOFF_S = 8.0
_CONNECT_S = 10.0
_SHOWN = 500  # characters of what a server says


class RefusedError(ServerError):
    """A server's answer that is an error.

    Attributes:
        status: Of HTTP.
        said: The server's own words, without the key.
        pause_s: How long it asks to be left alone.
    """

    def __init__(self, where: str, status: int, said: str, pause_s: float = 0.0) -> None:
        super().__init__(f"server must answer, got {status} from {where}: {said}")
        self.status, self.said, self.pause_s = status, said, pause_s


class Connection:
    """A server that is asked by many threads, over connections that are kept.

    What fails for a moment (no connection, 429, 5xx) is sent again after a pause that doubles, and differs by chance;
    as long as the server asks for, where it does. What the server refuses (4xx), or does not finish in time, is not.

    Args:
        base_url: ``http://host:port``, with or without the ``/v1`` of OpenAI's interface.
        api_key: Sent as a bearer token; never shown.
        timeout_s: How long a server may be silent: until the whole answer, or the next piece of a stream.
        max_retries: Times that a request is sent again.
        backoff_s: The first pause.
    Raises:
        ConfigError: If the address or the key is none, or a number is out of range.
        MissingDependencyError: If httpx2 is not installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        max_retries: int = 4,
        backoff_s: float = 0.5,
    ) -> None:
        self.url = _root(base_url)
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ConfigError("api_key must be printable ASCII without spaces, got another; look for a line break.")
        if timeout_s <= 0 or max_retries < 0 or backoff_s < 0:
            raise ConfigError(
                f"timeout_s must be above 0, max_retries and backoff_s 0 or more, got {timeout_s}, {max_retries} and "
                f"{backoff_s}."
            )
        try:
            import httpx2
        except ImportError as error:
            raise MissingDependencyError("A generator on a server", "httpx2", "remote") from error
        self.timeout_s, self.max_retries, self.backoff_s = timeout_s, max_retries, backoff_s
        self._key = api_key
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # Whoever asks bounds how many do; a connection that is waited for would look like a slow server.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
            timeout=httpx2.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
        )
        # No answer was begun: the server may never have seen the request, and generating twice does no harm.
        self._passing = (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ConnectTimeout)

    @property
    def has_key(self) -> bool:
        """Whether a key is sent."""
        return self._key is not None

    def close(self) -> None:
        """Close the connections that are kept."""
        self._client.close()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, as JSON: POST with a body, GET without.

        Raises:
            RefusedError: If it answers with an error, after the last retry.
            ServerError: If it cannot be reached, is silent for too long, or answers with something else.
        """
        return self._json(self._send(path, body).text, path)

    def events(self, path: str, body: dict[str, Any]) -> Generator[Any]:
        """What the server streams, event by event; who stops listening closes the connection.

        Raises:
            RefusedError: As :meth:`ask`, also where the error comes as an event.
            ServerError: As :meth:`ask`, and if the stream breaks off. What has begun is not sent again.
        """
        import httpx2

        with closing(self._send(path, body, stream=True)) as response:
            try:
                for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        return
                    yield self._checked(self._json(event.data, path), path)
            except httpx2.HTTPError as error:
                raise ServerError(self._failed(path, "finish its answer", error)) from error
        raise ServerError(f"server must end its stream with [DONE], got an end without it from {self.url}{path}.")

    def _send(self, path: str, body: dict[str, Any] | None, *, stream: bool = False) -> httpx2.Response:
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        for pauses in range(self.max_retries):
            try:
                return self._send_once(path, content, stream=stream)
            except ServerError as error:
                asked_s = self._pause_s(error)
                if asked_s is None:
                    raise
            backoff_s = min(self.backoff_s * 2**pauses, _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)
            time.sleep(max(asked_s, backoff_s))
        return self._send_once(path, content, stream=stream)

    def _send_once(self, path: str, content: bytes | None, *, stream: bool) -> httpx2.Response:
        import httpx2

        method = "GET" if content is None else "POST"
        headers = {"Content-Type": "application/json"}
        request = self._client.build_request(method, self.url + path, content=content, headers=headers)
        try:
            response = self._client.send(request, stream=stream)
            if response.is_success:
                return response
            with closing(response):
                response.read()
        except httpx2.TimeoutException as error:
            raise ServerError(self._failed(path, f"answer within {self.timeout_s:g} s", error)) from error
        except httpx2.HTTPError as error:
            raise ServerError(self._failed(path, "be there", error)) from error
        said = self._without_key(_words(_parsed(response.text)))
        pause_s = _retry_after_s(response.headers.get("retry-after"))
        raise RefusedError(self.url + path, response.status_code, said, pause_s)

    def _pause_s(self, error: ServerError) -> float | None:
        """How long a server asks to be left alone; None where asking again would be no use."""
        if isinstance(error, RefusedError):
            return error.pause_s if error.status == 429 or error.status >= 500 else None
        return 0.0 if isinstance(error.__cause__, self._passing) else None

    def _failed(self, path: str, what: str, error: Exception) -> str:
        return (
            f"server must {what}, got {type(error).__name__} from {self.url}{path} "
            f"({self._without_key(str(error))}); start it, correct base_url, or raise timeout_s or max_retries."
        )

    def _checked(self, event: Any, path: str) -> Any:
        error = event.get("error") if isinstance(event, dict) else None
        if not error:
            return event
        code = error.get("code") if isinstance(error, dict) else None
        said = self._without_key(_words(event))
        raise RefusedError(self.url + path, code if isinstance(code, int) else 500, said)

    def _json(self, text: str, path: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            said = self._without_key(text[:_SHOWN])
            raise ServerError(f"server must answer in JSON, got {said!r} from {self.url}{path}; is it one?") from error

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[api_key]") if self._key else text


def _root(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # reading the port checks it
    except ValueError:
        named = False
    if not named or "@" in parts.netloc or parts.query or parts.fragment:
        # Not shown: a password may stand in it.
        raise ConfigError(
            "base_url must be http:// or https://, a host and a port, such as http://localhost:8000/v1, without name, "
            "password or query, got another; a key goes into api_key."
        )
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def _retry_after_s(value: str | None) -> float:
    """Seconds of a ``Retry-After`` header, which gives them as a number or as a date."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            until = parsedate_to_datetime(str(value))
        except ValueError:
            return 0.0
        seconds = (until.astimezone(UTC) - datetime.now(UTC)).total_seconds()
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _words(said: Any) -> str:
    """The message in an error: OpenAI's form, vLLM's older one, FastAPI's, or whatever came."""
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            return _words(said[name])
    return (said if isinstance(said, str) else json.dumps(said))[:_SHOWN]
