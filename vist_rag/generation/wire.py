"""Prompts as servers take them: one class for each endpoint, of vLLM and SGLang."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from vist_rag.errors import ConfigError, ServerError
from vist_rag.generation.prompt import MemorySegment, Message, Prompt, Segment, TemplateSegment, TextSegment
from vist_rag.generation.sampling import Drawing, Sampling

if TYPE_CHECKING:
    from vist_rag.generation.remote import RemoteGenerator


@dataclass(frozen=True, slots=True)
class Sent:
    """A prompt as it goes out.

    Attributes:
        body: What a request says of the prompt.
        length: Positions that it takes.
    """

    body: dict[str, Any]
    length: int


@dataclass(slots=True)
class Told:
    """What a server has told so far, of a whole answer or in pieces.

    Attributes:
        text: The answer.
        prompt_tokens: None where it was not told.
        completion_tokens: None where it was not told.
    """

    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def count(self, usage: Mapping[str, Any] | None) -> None:
        """Take the server's counts, where there are any."""
        self.prompt_tokens = (usage or {}).get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = (usage or {}).get("completion_tokens", self.completion_tokens)


@dataclass(frozen=True, slots=True)
class Conversation(Prompt):
    """A prompt that still knows its messages, for a server that writes the chat template itself."""

    messages: tuple[Message, ...] = field(default=())


class Wire(Protocol):
    """How one endpoint is asked, and how it answers."""

    path: str

    def sent(self, generator: RemoteGenerator, prompts: Sequence[Prompt]) -> list[Sent]:
        """Prompts as they go out; all memories are read in one pass."""

    def settings(self, model: str, limit: int, stop: Sequence[str], drawn: dict[str, Any]) -> dict[str, Any]:
        """What else a request says: ``drawn`` are vLLM's names."""

    def streamed(self) -> dict[str, Any]:
        """What asks for an answer in pieces."""

    def take(self, answer: Any, told: Told) -> str:
        """Add an answer, or a piece of one, to what was told; returns what is new of the text."""


class Completions:
    """vLLM's ``/v1/completions``: every position is embedded here, the chat template's too."""

    path = "/v1/completions"

    def sent(self, generator: RemoteGenerator, prompts: Sequence[Prompt]) -> list[Sent]:
        """``prompt_embeds``: the whole prompt."""
        read = generator.fusion.embed_many(generator, prompts)
        return [Sent({"prompt_embeds": encoded(rows)} if len(rows) else {}, len(rows)) for rows, _ in read]

    def settings(self, model: str, limit: int, stop: Sequence[str], drawn: dict[str, Any]) -> dict[str, Any]:
        """As OpenAI names it."""
        return {"model": model, "max_tokens": limit, **({"stop": list(stop)} if stop else {}), **drawn}

    def streamed(self) -> dict[str, Any]:
        """With the counts at the end."""
        return {"stream": True, "stream_options": {"include_usage": True}}

    def take(self, answer: Any, told: Told) -> str:
        """``choices[0]`` and ``usage``."""
        told.count(answer.get("usage"))
        new = "".join(self._text(choice) or "" for choice in answer["choices"][:1])
        told.text += new
        return new

    def _text(self, choice: Any) -> str | None:
        text: str | None = choice["text"]
        return text


class Chat(Completions):
    """vLLM's ``/v1/chat/completions``: memory is embedded here, text and chat template are the server's.

    The server reads special tokens in a text as such. What a user wrote is no such token: it is embedded here, too.
    """

    path = "/v1/chat/completions"

    def sent(self, generator: RemoteGenerator, prompts: Sequence[Prompt]) -> list[Sent]:
        """``messages``, whose content parts are text and ``prompt_embeds``."""
        conversations = [
            [(message.role, _joined(message.segments)) for message in _messages(prompt)] for prompt in prompts
        ]
        embedded = [
            Prompt((segment,), framed=True)
            for messages in conversations
            for _, segments in messages
            for segment in segments
            if not _is_plain(segment, generator)
        ]
        rows = iter(generator.fusion.embed_many(generator, embedded) if embedded else [])

        def part(segment: Segment) -> dict[str, str]:
            if _is_plain(segment, generator):
                return {"type": "text", "text": cast(TextSegment, segment).text}
            return {"type": "prompt_embeds", "data": encoded(next(rows)[0])}

        opening = {"add_special_tokens": True} if _opens(generator) else {}
        return [
            Sent(
                {
                    "messages": [{"role": role, "content": list(map(part, segments))} for role, segments in messages],
                    **opening,
                },
                generator.prompt_length(prompt),
            )
            for prompt, messages in zip(prompts, conversations, strict=True)
        ]

    def _text(self, choice: Any) -> str | None:
        said: dict[str, str | None] = choice.get("message") or choice.get("delta") or {}
        return said.get("content")


class Generate:
    """SGLang's ``/generate``: every position is embedded here, and sent as numbers."""

    path = "/generate"

    def sent(self, generator: RemoteGenerator, prompts: Sequence[Prompt]) -> list[Sent]:
        """``input_embeds``: the whole prompt."""
        read = generator.fusion.embed_many(generator, prompts)
        return [Sent({"input_embeds": rows.float().tolist()}, len(rows)) for rows, _ in read]

    def settings(self, model: str, limit: int, stop: Sequence[str], drawn: dict[str, Any]) -> dict[str, Any]:
        """As SGLang names it; it serves one model, whose name is not said."""
        named = {("sampling_seed" if name == "seed" else name): value for name, value in drawn.items()}
        # Not trimmed there: the beginning of a stop string would have been streamed before the whole of it was known.
        ends = {"stop": list(stop), "no_stop_trim": True} if stop else {}
        return {"sampling_params": {"max_new_tokens": limit, **ends, **named}}

    def streamed(self) -> dict[str, Any]:
        """Each event tells the text from its beginning."""
        return {"stream": True}

    def take(self, answer: Any, told: Told) -> str:
        """``text`` and ``meta_info``."""
        told.count(answer.get("meta_info"))
        text: str = answer["text"]
        if not text.startswith(told.text):
            raise ServerError(
                f"server must tell an answer from its beginning in every event, got {text[:40]!r} after "
                f"{told.text[:40]!r}; start SGLang without --incremental-streaming-output."
            )
        new, told.text = text[len(told.text) :], text
        return new


WIRES: dict[str, type[Wire]] = {"completions": Completions, "chat": Chat, "generate": Generate}


def encoded(embeds: Tensor) -> str:
    """Embeddings ``[t, d_llm]`` as vLLM takes them: base64 of what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous().clone(), buffer)  # a view would bring all of its storage
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def drawn(options: Mapping[str, Any]) -> dict[str, Any]:
    """How a server draws its answer, from options of ``model.generate``; greedy by default.

    Raises:
        ConfigError: If a server cannot be told an option.
    """
    known = {"do_sample", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "logits_processor"}
    rest = dict(options)
    processors = rest.pop("logits_processor", None)
    if set(options) - known or not isinstance(processors, Drawing | None):
        raise ConfigError(
            f"options must be of {', '.join(sorted(known))} (the last as Sampling.processors gives it), got "
            f"{', '.join(sorted(options))}; a server is told no others."
        )
    if isinstance(processors, Drawing):
        return rest | _sampled(processors.sampling)
    if not rest.pop("do_sample", False):
        return {**{name: rest[name] for name in rest if name == "repetition_penalty"}, "temperature": 0.0}
    return {"temperature": 1.0, **{name: value for name, value in rest.items() if value is not None}}


def _sampled(sampling: Sampling) -> dict[str, Any]:
    return {name: value for name, value in asdict(sampling).items() if value is not None}


def _messages(prompt: Prompt) -> tuple[Message, ...]:
    if isinstance(prompt, Conversation):
        return prompt.messages
    if prompt.framed or any(isinstance(segment, TemplateSegment) for segment in prompt.segments):
        raise ConfigError(
            "prompt must be without the chat template's own text for endpoint 'chat', where the server writes it, got "
            "some; use converse of this generator, or endpoint='completions'."
        )
    return (Message("user", prompt.segments),)


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Segments with neighbouring texts as one: what a server puts between parts does not belong between these."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, MemorySegment):
            joined.append(segment)
        elif joined and isinstance(joined[-1], TextSegment):
            joined[-1] = TextSegment(joined[-1].text + segment.text)
        elif segment.text:
            joined.append(TextSegment(segment.text))
    return joined


def _opens(generator: RemoteGenerator) -> bool:
    """Whether the tokenizer's beginning of sequence stands before a chat template that does not write it itself."""
    tokenizer, mark = generator.tokenizer, "\u2042"
    chat = [{"role": "user", "content": mark}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).partition(mark)[0]
    return bool(generator.frame[0] != tokenizer(written, add_special_tokens=False).input_ids)


def _is_plain(segment: Segment, generator: RemoteGenerator) -> bool:
    """Whether a segment is text without special tokens."""
    if isinstance(segment, MemorySegment):
        return False
    as_text, as_template = (generator.encoding(segment.text, template=special) for special in (False, True))
    return bool(as_text.input_ids == as_template.input_ids)
