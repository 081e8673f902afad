"""OpenAI's chat completions as they go over the wire: what is asked, what is answered.

Fields that are unknown here and change nothing (``user``, ``metadata``, ``store``) are passed over; those that would
change the answer are refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vist_rag.budget import Budget, Policy
from vist_rag.errors import ConfigError
from vist_rag.serving.refusal import Refusal
from vist_rag.types import Answer, Usage

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Fields that would change the answer, with the values that do not; so does None."""


class Part(BaseModel):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What one side said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """The parts in one."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Options(BaseModel):
    """How passages are read, for one request: fields of :class:`~vist_rag.budget.Budget`; None: as the server does."""

    model_config = ConfigDict(extra="forbid")

    k_raw: int | None = None
    k_memory: int | None = None
    latents: int | None = None
    tokens: int | None = None
    rate: float | None = None
    policy: Policy | None = None

    def over(self, own: Budget) -> Budget:
        """The server's own budget with what is asked for here; a limit takes the place of another one.

        Raises:
            ConfigError: If a number is out of range, or a policy has no limit to divide.
        """
        given = self.model_dump(exclude_none=True)
        if given.keys() & {"tokens", "rate"}:
            given = {"tokens": None, "rate": None, **given}
        budget = replace(own, **given)
        if "policy" in given and budget.tokens is None and budget.rate is None:
            raise ConfigError("policy must have a limit to divide, got none; give tokens or rate.")
        return budget


class StreamOptions(BaseModel):
    """Of a stream; ``include_usage``: a last event tells the usage."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """A request for a chat completion; ``vist_rag`` is ours (``extra_body`` of the client)."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    vist_rag: Options = Options()

    def check(self) -> None:
        """Refuse what would be asked for in vain.

        Raises:
            Refusal: If a field asks for what this server cannot do.
        """
        for name, allowed in _UNSUPPORTED.items():
            given = (self.model_extra or {}).get(name)
            if given is not None and given not in allowed:
                may_be = f" or {allowed[0]!r}" if allowed else ""
                message = f"{name} is not supported here, got {str(given)[:80]!r}; leave it out{may_be}."
                raise Refusal(400, message, param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options must come with stream: true; leave it out.", param="stream_options")
        if self.messages[-1].role != "user":
            role = self.messages[-1].role
            raise Refusal(400, f"messages must end with one of the user, the question, got {role}.", param="messages")
        if not self.messages[-1].text.strip():
            raise Refusal(400, "messages must end with a question, got an empty one; ask something.", param="messages")


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage with OpenAI's names; what passages took stands in ``prompt_tokens_details``."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "origin_tokens": usage.origin_tokens,
            "compressed_tokens": usage.compressed_tokens,
            "ratio": round(usage.ratio, 3),
            "budget": usage.budget,
            "guarded": dict(usage.guarded),
        },
    }


def citations_json(answer: Answer) -> list[dict[str, Any]]:
    """The passages that were read, best first."""
    return [
        {
            "id": c.passage.id,
            "title": c.passage.title,
            "source": c.passage.source,
            "score": round(c.score, 4),
            "mode": c.mode,
            "span": c.span,
            "quote": c.quote,
            "text": c.passage.text,
            "metadata": dict(c.passage.metadata),
        }
        for c in answer.citations
    ]


def completion_json(head: dict[str, Any], answer: Answer, finish_reason: str) -> dict[str, Any]:
    """A whole answer.

    Args:
        head: ``id``, ``created``, ``model``.
        answer: What is told.
        finish_reason: ``stop`` or ``length``.
    """
    message = {"role": "assistant", "content": answer.text, "refusal": None, "citations": citations_json(answer)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
    return {
        **head,
        "object": "chat.completion",
        "choices": [choice],
        "usage": usage_json(answer.usage),
        "timings_ms": {stage: round(ms, 1) for stage, ms in answer.timings_ms.items()},
    }


def chunk_json(head: dict[str, Any], delta: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
    """An event of a stream; without a delta, one that has no choices."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**head, "object": "chat.completion.chunk", "choices": [] if delta is None else [choice]}
