"""What a request may say, and how it is told what it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from vist_rag.errors import ConfigError, InputError, ServerError, StoreError
from vist_rag.serving.refusal import Json, Refusal, refusal_of
from vist_rag.serving.schema import ChatRequest, Message, citations_json, usage_json
from vist_rag.types import Answer, Citation, Passage, Usage

GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Who?"}]}


def refused(**fields: Any) -> dict[str, Any]:
    """The error that a request with these fields is told."""
    try:
        ChatRequest(**GOOD | fields).check()
    except ValidationError as error:
        wrong = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        error_: Exception = RequestValidationError(wrong)
    except Refusal as error:
        error_ = error
    refusal = refusal_of(error_)
    assert refusal.status_code == 400
    told: dict[str, Any] = refusal.body["error"]
    assert told["type"] == "invalid_request_error"
    return told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "any"}),
        ("web_search_options", {}),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: Any) -> None:
    told = refused(**{field: value})
    assert (told["param"], told["code"]) == (field, "unsupported_parameter")
    assert told["message"].startswith(f"{field} is not supported here, got ")
    assert "leave it out" in told["message"]


def test_what_changes_nothing_is_passed_over() -> None:
    same = {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "presence_penalty": 0.0, "logit_bias": None}
    ChatRequest(**GOOD, **same, user="me", store=False, metadata={"a": "b"}, a_field_of_next_year=[1]).check()


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "got 'tool'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages", "user"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages", "ask something"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "ask something"),
        ({"temperature": 2.5}, "temperature", "got 2.5"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"vist_rag": {"k_memry": 3}}, "vist_rag.k_memry", "not among the fields"),
        ({"vist_rag": {"policy": "mine"}}, "vist_rag.policy", "got 'mine'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"seed": "x" * 500}, "seed", "..."),
    ],
)
def test_a_wrong_field_is_named_with_what_was_got(fields: dict[str, Any], param: str, said: str) -> None:
    told = refused(**fields)
    assert told["param"] == param
    assert said in told["message"]
    assert len(told["message"]) < 300


def test_an_image_is_no_question() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    assert refused(messages=[{"role": "user", "content": parts}])["param"].startswith("messages[0].content")


def test_parts_of_a_message_are_one_text() -> None:
    parts: Any = [{"type": "text", "text": "Who"}, {"type": "text", "text": "was it?"}]
    assert Message(role="user", content=parts).text == "Who\nwas it?"
    assert Message(role="assistant", content=None).text == ""


@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        (ConfigError("k_raw must be 0 or more"), 400, "invalid_request_error"),
        (InputError("query must hold something"), 400, "invalid_request_error"),
        (TimeoutError(), 504, "timeout"),
        (ServerError("vLLM is gone"), 502, "server_error"),
        (StoreError("the store is torn"), 500, "server_error"),
    ],
)
def test_errors_of_the_library_have_a_status(error: Exception, status: int, type_: str) -> None:
    refusal = refusal_of(error)
    assert (refusal.status_code, refusal.body["error"]["type"]) == (status, type_)
    assert str(error) in refusal.body["error"]["message"]


def test_what_nobody_foresaw_tells_nothing_of_itself() -> None:
    refusal = refusal_of(RuntimeError("a secret"))
    assert refusal.status_code == 500
    assert "secret" not in refusal.body["error"]["message"]


def test_citations_and_usage_hold_what_an_answer_holds() -> None:
    passage = Passage("Half a \ud83c character.", "p", "Title", "a.txt", {"page": 3})
    usage = Usage(120, 40, 70, 5, 50, {"p": "a number"})
    answer = Answer("q", "half", (Citation(passage, 0.51236, "raw", (0, 4)),), usage, {})
    (told,) = citations_json(answer)
    assert told == {
        "id": "p",
        "title": "Title",
        "source": "a.txt",
        "score": 0.5124,
        "mode": "raw",
        "span": (0, 4),
        "quote": "Half",
        "text": passage.text,
        "metadata": {"page": 3},
    }
    assert json.loads(Json(told).body)["text"] == passage.text  # a lone surrogate passes, too
    spent = usage_json(usage)
    assert (spent["prompt_tokens"], spent["completion_tokens"], spent["total_tokens"]) == (70, 5, 75)
    details = {"origin_tokens": 120, "compressed_tokens": 40, "ratio": 3.0, "budget": 50, "guarded": {"p": "a number"}}
    assert spent["prompt_tokens_details"] == details
