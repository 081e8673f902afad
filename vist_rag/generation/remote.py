"""A generator whose model is on a server: prompts go out as embeddings, memory among them, and text comes back."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from vist_rag.errors import CheckpointError, ConfigError, InputError, ServerError, ShapeError, VistError
from vist_rag.generation.connection import Connection, RefusedError
from vist_rag.generation.embeddings import InputEmbeddings, served_name
from vist_rag.generation.fusion import SoftPromptFusion
from vist_rag.generation.generator import Generation, VistGenerator, best_device
from vist_rag.generation.prompt import Message, Prompt
from vist_rag.generation.streaming import StopAt, until
from vist_rag.generation.wire import WIRES, Conversation, Sent, Told, Wire, drawn

_SOFT_PROMPT = "soft_prompt"
Endpoint = Literal["completions", "chat", "generate"]


class RemoteGenerator(VistGenerator):
    """A generator on a server that takes embeddings: vLLM with ``--enable-prompt-embeds``, or SGLang.

    What is here is the model's input embeddings, its tokenizer and the fusion; it is asked and answers as a
    :class:`~vist_rag.generation.generator.VistGenerator` that is loaded here. Thread-safe.

    Args:
        embeddings: Of the model that is served.
        tokenizer: Its tokenizer.
        fusion: How memory enters. None: text only.
        base_url: Of the server, such as ``http://localhost:8000/v1``.
        served_model: What the server calls the model, or the LoRA adapter that this fusion was trained with.
        endpoint: ``completions``: every position is embedded here, and is what ``VistGenerator`` reads. ``chat``:
            memory is embedded here, text and chat template are the server's. ``generate``: SGLang's own.
        api_key: Sent as a bearer token; never shown.
        context_tokens: Positions that prompt and answer may take together (``--max-model-len``); None: as the model's
            config says.
        concurrency: Prompts of one ``generate`` that are with the server at once.
        timeout_s: How long the server may be silent.
        max_retries: Times that a request is sent again after no connection, 429 or 5xx.
        backoff_s: The first pause before that; it doubles.
    Raises:
        ConfigError: If an argument is out of range, or the fusion is one whose memory no server takes.
        ShapeError: If the fusion was built for another width.
        MissingDependencyError: If httpx2 is not installed.
    """

    def __init__(
        self,
        embeddings: InputEmbeddings,
        tokenizer: Any,
        fusion: SoftPromptFusion | None = None,
        *,
        base_url: str,
        served_model: str,
        endpoint: Endpoint = "completions",
        api_key: str | None = None,
        context_tokens: int | None = None,
        concurrency: int = 16,
        timeout_s: float = 300.0,
        max_retries: int = 4,
        backoff_s: float = 0.5,
    ) -> None:
        if endpoint not in WIRES:
            raise ConfigError(f"endpoint must be one of {', '.join(WIRES)}, got {endpoint!r}.")
        for name, number in (("concurrency", concurrency), ("context_tokens", context_tokens)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be 1 or more, got {number}.")
        _check_kind(getattr(fusion, "kind", _SOFT_PROMPT))
        if endpoint == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ConfigError("endpoint must be 'completions' for a tokenizer without a chat template, got 'chat'.")
        # The methods that are inherited ask a model for its input embeddings, its config and its device.
        super().__init__(cast(PreTrainedModel, embeddings), tokenizer, fusion, prefix_cache_bytes=0)
        self.served_model, self.endpoint, self.concurrency = served_model, endpoint, concurrency
        self._context_tokens = context_tokens
        self._wire: Wire = WIRES[endpoint]()
        self._connection = Connection(
            base_url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries, backoff_s=backoff_s
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | Path,
        *,
        base_url: str,
        fusion: str | Path | None = None,
        served_model: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Self:
        """Load a model's input embeddings and tokenizer, not the model, and the fusion that was trained for it.

        Args:
            model: Hub id or local directory of a causal LM, or a checkpoint's directory that refers to one.
            base_url: Of the server.
            fusion: Directory that ``SoftPromptFusion.save_pretrained`` wrote.
            served_model: None: the name of ``model``, as a server calls what it was started with.
            device: Where prompts are embedded. None means cuda, then mps, then cpu.
            dtype: Of the embeddings that go out; None: as they are stored.
            **settings: Of this class: ``endpoint``, ``api_key``, ``context_tokens``, ``concurrency``, ``timeout_s``,
                ``max_retries``, ``backoff_s``.
        Raises:
            CheckpointError: If something is missing or cannot be read.
            ConfigError: If a setting is out of range, or the model or the fusion cannot be served elsewhere.
        """
        place = torch.device(device) if device is not None else best_device()
        read = _read_fusion(fusion) if fusion is not None else None
        embeddings = InputEmbeddings.from_pretrained(model, device=place, dtype=dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        except Exception as error:  # a torn tokenizer and bad JSON each raise a class of their own
            raise CheckpointError(f"tokenizer of {model} cannot be loaded ({error}); restore its files.") from error
        name = served_model or served_name(model)
        return cls(embeddings, tokenizer, read, base_url=base_url, served_model=name, **settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.served_model!r}, {self._connection.url!r}, endpoint={self.endpoint!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the server."""
        self._connection.close()

    @property
    def context_tokens(self) -> int | None:
        """Positions that prompt and answer may take together; None where nobody says."""
        return self._context_tokens or super().context_tokens

    def _converse(self, messages: Sequence[Message]) -> Prompt:
        prompt = super()._converse(messages)
        return Conversation(prompt.segments, prompt.framed, tuple(messages))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 32,
        stop: Sequence[str] = (),
        batch_size: int = 8,
        **options: Any,
    ) -> list[Generation]:
        """Answer prompts, several at once; answers keep their order.

        Args:
            prompts: What is asked.
            max_new_tokens: Upper limit of each answer.
            stop: An answer ends before any of these strings.
            batch_size: Prompts whose memories are read in one pass.
            **options: Of ``model.generate``: ``do_sample``, ``temperature``, ``top_p``, ``top_k``,
                ``repetition_penalty``, ``logits_processor`` (of :class:`~vist_rag.generation.sampling.Sampling`); and
                ``seed``. Greedy by default.
        Raises:
            InputError: If a prompt is empty, or does not fit the context, here or there.
            ConfigError: If a limit is less than 1, an option cannot be told, or the server is not set up for this.
            IncompatibleMemoryError: If the fusion was trained for another compressor than a memory's.
            ShapeError: If a memory is of another width than the fusion was built for, or the server's model than ours.
            ServerError: If the server cannot be reached, refuses, or breaks off.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}.")
        settings = self._settings(max_new_tokens, stop, options)
        running: deque[Future[Generation]] = deque()
        answers: list[Generation] = []
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="vist-remote")
        try:
            for begin in range(0, len(prompts), batch_size):
                for sent in self._sent(prompts[begin : begin + batch_size], max_new_tokens):
                    if len(running) == self.concurrency:  # so many are held in memory, not all of them
                        answers.append(running.popleft().result())
                    running.append(pool.submit(self._answer, sent, settings, stop))
            answers += [future.result() for future in running]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return answers

    @torch.no_grad()
    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 32, stop: Sequence[str] = (), **options: Any
    ) -> Generator[str, None, Generation]:
        """Answer one prompt, piece by piece; errors as :meth:`generate`.

        Who stops listening closes the connection, by which the server stops. As a generator function this returns the
        whole: ``generation = yield from generator.stream(prompt)``.
        """
        settings = self._settings(max_new_tokens, stop, options)
        (sent,) = self._sent([prompt], max_new_tokens)
        body, told = {**sent.body, **settings, **self._wire.streamed()}, Told()
        with self._explained(), closing(self._connection.events(self._wire.path, body)) as events:
            yield from until((self._take(event, told) for event in events), stop)
        return self._told(told, sent, stop)

    def score(self, prompt: Prompt, continuations: Sequence[Tensor], *, batch_size: int = 64) -> list[Tensor]:
        """Not to be had from a server.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "score needs a generator that is loaded here, got one on a server, which tells no probabilities of a "
            "prompt of embeddings; use VistGenerator."
        )

    def _settings(self, max_new_tokens: int, stop: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
        StopAt(self.tokenizer, stop)  # refuses what is no list of strings
        return self._wire.settings(self.served_model, max_new_tokens, stop, drawn(options))

    def _sent(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Sent]:
        sent = self._wire.sent(self, prompts)
        for one in sent:
            self._check_length({"attention_mask": torch.ones(1, one.length)}, max_new_tokens)
        return sent

    def _answer(self, sent: Sent, settings: dict[str, Any], stop: Sequence[str]) -> Generation:
        told = Told()
        with self._explained():
            self._take(self._connection.ask(self._wire.path, {**sent.body, **settings}), told)
        return self._told(told, sent, stop)

    def _take(self, answer: Any, told: Told) -> str:
        try:
            return self._wire.take(answer, told)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ServerError(
                f"server must answer as {self._wire.path} does, got {str(answer)[:200]}; is it vLLM or SGLang?"
            ) from error

    def _told(self, told: Told, sent: Sent, stop: Sequence[str]) -> Generation:
        text = "".join(until([told.text], stop))
        completion = self.count_tokens(text) if told.completion_tokens is None else told.completion_tokens
        return Generation(text.strip(), told.prompt_tokens or sent.length, completion)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What a server says, as an error that names what to do."""
        try:
            yield
        except RefusedError as refused:
            if (explanation := self._explanation(refused)) is None:
                raise
            raise explanation from refused

    def _explanation(self, refused: RefusedError) -> VistError | None:
        said, heard = refused.said, refused.said.lower()
        if refused.status in (401, 403):
            got = "another" if self._connection.has_key else "none"
            return ConfigError(f"api_key must be one that the server takes, got {got}; the server: {said}")
        if refused.status == 404:
            names = self._served_names()
            if names and self.served_model not in names:
                return ConfigError(
                    f"served_model must be one of {', '.join(names)} (which the server has), got {self.served_model!r}."
                )
            return ConfigError(
                f"base_url must be of a server with {self._wire.path}, got {self._connection.url}; the server: {said}"
            )
        for option in ("--enable-prompt-embeds", "--disable-radix-cache"):
            if option in heard:
                return ConfigError(f"server must be started with {option} to read memory; the server: {said}")
        if refused.status < 500 and "hidden" in heard and "size" in heard:
            width = self.fusion.config.generator_width
            return ShapeError(
                f"served_model must be {width} wide (as the embeddings that were loaded here), got another; load those "
                f"of the model that is served. The server: {said}"
            )
        if refused.status < 500 and any(words in heard for words in ("context length", "maximum model length")):
            return InputError(
                "prompt and answer must fit the server's context; read fewer passages, fewer latents a passage, or set "
                f"context_tokens to what the server was started with. The server: {said}"
            )
        return None

    def _served_names(self) -> list[str]:
        try:
            return [str(model["id"]) for model in self._connection.ask("/v1/models")["data"]]
        except (ServerError, KeyError, TypeError):
            return []


def _check_kind(kind: str) -> None:
    if kind != _SOFT_PROMPT:
        raise ConfigError(
            f"fusion must be {_SOFT_PROMPT!r} for a generator on a server, got {kind!r}: a server takes embeddings, "
            "and no memory for layers to look at; train a soft prompt, or load the generator with VistGenerator."
        )


def _read_fusion(directory: str | Path) -> SoftPromptFusion:
    path = Path(directory) / "config.json"
    try:
        kind = json.loads(path.read_text("utf-8"))["fusion"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it.") from error
    _check_kind(kind)
    return SoftPromptFusion.from_pretrained(directory)
