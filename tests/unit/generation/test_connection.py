from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from vist_rag.errors import ConfigError
from vist_rag.generation.connection import LONGEST_PAUSE_S, Connection, _retry_after_s, _words


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 0), ("", 0), ("7", 7), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("soon", 0), ("9999", LONGEST_PAUSE_S)],
)
def test_how_long_a_server_asks_to_be_left_alone(value: str | None, seconds: float) -> None:
    assert _retry_after_s(value) == seconds


def test_or_until_when() -> None:
    until = datetime.now(UTC) + timedelta(seconds=30)
    assert 28 < _retry_after_s(format_datetime(until, usegmt=True)) <= 30
    assert _retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"error": {"message": "no", "code": 404}}, "no"),
        ({"object": "error", "message": "no"}, "no"),
        ({"error": "no"}, "no"),
        ({"detail": [{"loc": ["body"]}]}, '[{"loc": ["body"]}]'),
        ("<html>", "<html>"),
        ("x" * 900, "x" * 500),
    ],
)
def test_the_words_in_an_error(said: Any, words: str) -> None:
    assert _words(said) == words


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("https://host/llm/v1/", "https://host/llm"),
        ("http://[::1]:30000", "http://[::1]:30000"),
    ],
)
def test_an_address_is_taken_with_v1_or_without(given: str, root: str) -> None:
    assert Connection(given).url == root


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key must be printable ASCII") as caught:
        Connection("http://localhost", api_key=key)
    assert not key or key not in str(caught.value)
