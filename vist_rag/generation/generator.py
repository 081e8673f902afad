"""The noun: a Hugging Face causal LM that takes a ``Prompt``. How memory enters it is its fusion's business."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StoppingCriteriaList

from vist_rag.compression import VisualMemory
from vist_rag.errors import CheckpointError, ConfigError, InputError, ShapeError, VistError
from vist_rag.generation.fusion import MEMORY_ARGUMENTS, SoftPromptFusion, load_fusion
from vist_rag.generation.int8 import is_int8, load_int8
from vist_rag.generation.prefix_cache import PrefixCache
from vist_rag.generation.prompt import MemorySegment, Message, Prompt, Segment, TemplateSegment, TextSegment
from vist_rag.generation.quantized import in_four_bits, settled
from vist_rag.generation.referenced import is_referenced, load_referenced
from vist_rag.generation.streaming import Pieces, StopAt, holds_any, until

PREFIX_CACHE_BYTES = 256 * 2**20
"""Keys and values that a generator keeps: 2,300 positions of Qwen3-0.6B in bf16."""
_PLACEHOLDER = "\u2042vist\u2042"


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        text: The text, stop string and special tokens removed, stripped of white space.
        prompt_tokens: Positions that the prompt took; latents count where they take none, too.
        completion_tokens: Tokens generated, the end-of-sequence token included.
        token_ids: Of the answer, without what ends it; empty where a server does not tell them.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class VistGenerator:
    """A causal LM that reads text and memory in one prompt.

    Args:
        model: Any Hugging Face causal LM whose ``generate`` takes ``inputs_embeds``.
        tokenizer: Its tokenizer; a chat template, where it has one, is used.
        fusion: How memory enters (``CrossAttentionFusion`` too: it lets the model's layers take memory). None: text
            only.
        prefix_cache_bytes: What is kept of how prompts begin, for those that begin alike; on the model's device. 0:
            nothing. A model that reads its prompt in both directions, as the embedded one, keeps nothing.

    Attributes:
        frame: Token ids that stand before and after every prompt: beginning of sequence, or the chat template's.

        prefixes: What is kept of how prompts begin.

    Raises:
        ShapeError: If the fusion was built for another width.
        ConfigError: If ``prefix_cache_bytes`` is below 0, or the model's layers cannot take memory by this fusion.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        fusion: SoftPromptFusion | None = None,
        *,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.frame = _frame(tokenizer)
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self._tokenizing = threading.Lock()
        width = cast(Tensor, model.get_input_embeddings().weight).shape[1]
        if fusion is not None and fusion.config.generator_width != width:
            raise ShapeError(
                f"fusion must be built for this generator's width, {width}, got {fusion.config.generator_width}; "
                "train a fusion for this generator."
            )
        self.fusion = (fusion or SoftPromptFusion.text_only(width)).to(self.device).eval()
        self.fusion.attach(model)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        fusion: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> VistGenerator:
        """Load a generator and, where given, the fusion that was trained for it.

        Args:
            model: Hub id or local directory of a causal LM, or a checkpoint's directory that refers to one.
            fusion: Directory that a fusion's ``save_pretrained`` wrote.
            device: None means cuda, then mps, then cpu.
            dtype: Of the weights; None means bf16 on cuda and where ``quantize`` is set, and float32 elsewhere.
            quantize: ``"4bit"``: layers in 4 bits, which multiply in ``dtype`` (extra ``bnb``); they cannot be trained.
            prefix_cache_bytes: What is kept of how prompts begin.
        Raises:
            CheckpointError: If the model cannot be loaded, or the one that is referred to is missing or was changed.
            ConfigError: If ``quantize`` is unknown, or cannot be had on this device or of this checkpoint.
            MissingDependencyError: If it has a LoRA adapter and peft is not installed, or if ``quantize`` is set and
                bitsandbytes is not.
        """
        device = torch.device(device) if device is not None else best_device()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" or quantize else torch.float32)
        fewer_bits = in_four_bits(quantize, dtype, device)
        try:
            if is_referenced(model):
                lm = load_referenced(Path(model), dtype, **fewer_bits)
            elif is_int8(model):
                if fewer_bits:
                    raise ConfigError("quantize must be None for weights that are stored as int8 rows, got '4bit'.")
                lm = load_int8(Path(model), dtype)
            else:
                lm = settled(AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, **fewer_bits))
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        except VistError:
            raise
        except Exception as error:  # torn weights, a torn tokenizer and bad JSON each raise a class of their own
            raise CheckpointError(f"generator {model} cannot be loaded ({error}); restore its files.") from error
        read = load_fusion(fusion) if fusion else None
        if read is not None and not read.in_context:
            read = read.to(dtype)  # every layer multiplies by it
        return cls(cast(Any, lm).to(device), tokenizer, read, prefix_cache_bytes=prefix_cache_bytes)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def ids(self, token_ids: Sequence[int]) -> Tensor:
        """Token ids on the device, int64 ``[t]``."""
        return torch.tensor(list(token_ids), dtype=torch.long, device=self.device)

    def tokenize(self, text: str) -> Tensor:
        """Token ids of plain text, int64 ``[t]``; what looks like a special token in it is text."""
        return self.ids(self.encoding(text).input_ids)

    def encoding(self, text: str, *, template: bool = False, offsets: bool = False) -> Any:
        """What the tokenizer makes of a text.

        Args:
            text: The text.
            template: Whether special tokens in it count; else they are text like any other.
            offsets: Whether to give ``offset_mapping``.
        """
        # One thread at a time: a fast tokenizer is switched from one way of reading special tokens to the other, and
        # would read another thread's text in the wrong one.
        with self._tokenizing:
            return self.tokenizer(
                _encodable(text),
                add_special_tokens=False,
                split_special_tokens=not template,
                return_offsets_mapping=offsets,
                verbose=False,
            )

    def count_tokens(self, text: str) -> int:
        """How many tokens plain text takes."""
        return len(self.tokenize(text))

    def parts(self, prompt: Prompt) -> list[Tensor | VisualMemory]:
        """A prompt with its frame, in reading order: token ids, int64 ``[t]``, and memories."""
        inside = [s.memory if isinstance(s, MemorySegment) else self._segment_ids(s) for s in prompt.segments]
        if prompt.framed:
            return inside
        before, after = self.frame
        return [self.ids(before), *inside, self.ids(after)]

    def _segment_ids(self, segment: TextSegment | TemplateSegment) -> Tensor:
        return self.ids(self.encoding(segment.text, template=isinstance(segment, TemplateSegment)).input_ids)

    def prompt_length(self, prompt: Prompt) -> int:
        """What the generator reads of a prompt, in positions: text, latents, frame and boundary embeddings."""
        boundary = self.fusion.boundary_tokens
        return sum(len(part) + boundary * isinstance(part, VisualMemory) for part in self.parts(prompt))

    def converse(self, messages: Sequence[Message]) -> Prompt:
        """A conversation as a prompt, in the words of the chat template; without one, message after message.

        Where the template takes no ``system`` or ``tool`` messages, these are said by the user.

        Raises:
            InputError: If there is no message, or the template refuses them.
        """
        if not messages:
            raise InputError("messages must be one or more, got none; ask something.")
        if not getattr(self.tokenizer, "chat_template", None):
            between = TextSegment("\n\n")
            joined = [part for message in messages for part in (between, *message.segments)]
            return Prompt(tuple(joined[1:]))
        try:
            return self._converse(messages)
        except InputError:
            if not {"system", "tool"} & {message.role for message in messages}:
                raise
            return self._converse(_said_by_user(messages))

    def _converse(self, messages: Sequence[Message]) -> Prompt:
        marks = [f"{_PLACEHOLDER}{i}{_PLACEHOLDER}" for i in range(len(messages))]
        chat = [{"role": m.role, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        try:
            text = _in_template(self.tokenizer, chat)
        except Exception as error:  # Jinja's own, or what a template raises
            roles = ", ".join(message.role for message in messages)
            raise InputError(f"The generator's chat template refuses messages of {roles} ({error}).") from error
        pieces = re.split(f"{_PLACEHOLDER}(\\d+){_PLACEHOLDER}", text)
        if missing := set(map(str, range(len(messages)))) - set(pieces[1::2]):
            raise InputError(f"The generator's chat template leaves out messages {', '.join(sorted(missing))}.")
        segments: list[Segment] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                segments += messages[int(piece)].segments
            elif piece:
                segments.append(TemplateSegment(piece))
        return Prompt(tuple(segments), framed=True)

    @property
    def context_tokens(self) -> int | None:
        """Positions that prompt and answer may take together; None where the model does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

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
        """Answer prompts, in batches.

        Args:
            prompts: What is asked.
            max_new_tokens: Upper limit of each answer.
            stop: An answer ends before any of these strings.
            batch_size: Prompts in one forward pass.
            **options: Passed to ``model.generate`` (``do_sample=True``, ``num_beams=4``...); greedy by default.
        Raises:
            InputError: If a prompt is empty, or does not fit the model's context.
            ConfigError: If a limit is less than 1, or a stop string is empty.
            IncompatibleMemoryError: If the fusion was trained for another compressor than a memory's.
            ShapeError: If a memory is of another width than the fusion was built for.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}.")
        stop_at = StopAt(self.tokenizer, stop)
        answers: list[Generation] = []
        for begin in range(0, len(prompts), batch_size):
            some = list(prompts[begin : begin + batch_size])
            with self._read(some, options) as inputs:
                self._check_length(inputs, max_new_tokens)
                output = self.model.generate(**inputs, **self._options(max_new_tokens, stop_at, options))
            lengths = self._lengths(some, inputs["attention_mask"])
            answers += [self._generation(row, length, stop) for row, length in zip(output, lengths, strict=True)]
        return answers

    @torch.no_grad()
    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 32, stop: Sequence[str] = (), **options: Any
    ) -> Generator[str, None, Generation]:
        """Answer one prompt, piece by piece; the pieces joined are ``generate``'s text up to outer white space.

        Who stops listening stops the generation. As a generator function this returns the whole:
        ``generation = yield from generator.stream(prompt)``.

        Raises:
            InputError: If the prompt is empty, or does not fit the model's context.
        """
        pieces, stop_at = Pieces(self.tokenizer), StopAt(self.tokenizer, stop)
        outputs: list[Tensor] = []
        failures: list[BaseException] = []
        with self._read([prompt], options) as inputs:
            self._check_length(inputs, max_new_tokens)
            arguments = {**inputs, **self._options(max_new_tokens, stop_at, options), "streamer": pieces}

            def run() -> None:
                try:
                    with torch.no_grad():
                        outputs.append(self.model.generate(**arguments))
                except BaseException as error:
                    failures.append(error)
                    pieces.end()

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            try:
                yield from until(pieces, stop)
            finally:
                stop_at.cancelled.set()
                thread.join()
            if failures:
                raise failures[0]
        return self._generation(outputs[0][0], self._lengths([prompt], inputs["attention_mask"])[0], stop)

    def _lengths(self, prompts: Sequence[Prompt], mask: Tensor) -> list[int]:
        """What was read of each prompt, in positions, memory that takes none included."""
        beside = [0 if self.fusion.in_context else prompt.memory_tokens for prompt in prompts]
        return [int(length) + n for length, n in zip(mask.sum(1).tolist(), beside, strict=True)]

    @contextmanager
    def _read(self, prompts: list[Prompt], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What ``generate`` is given of prompts; how they begin is taken from what was read before, and kept."""
        found, wanted = self.prefixes.begin(self, prompts, options)
        with self.fusion.condition(self, prompts, skip=found.parts if found else 0) as inputs:
            if found is not None:
                # Where the prefix stands nothing is read: generate takes what comes behind.
                inputs["inputs_embeds"] = F.pad(inputs["inputs_embeds"], (0, 0, found.length, 0))
                inputs["attention_mask"] = F.pad(inputs["attention_mask"], (found.length, 0), value=1)
                inputs["past_key_values"] = found.cache(len(prompts), self.model)
            elif wanted:
                inputs["past_key_values"] = wanted[0].cache(len(prompts), self.model)
            yield inputs
            if wanted:
                self.prefixes.keep(wanted, inputs["past_key_values"], inputs["attention_mask"])

    @torch.no_grad()
    def score(self, prompt: Prompt, continuations: Sequence[Tensor], *, batch_size: int = 64) -> list[Tensor]:
        """How likely each continuation of a prompt is; the prompt is read once.

        Args:
            prompt: What comes before.
            continuations: Token ids, int64 ``[t]`` each, ``t`` of 1 or more.
            batch_size: Continuations in one forward pass.
        Returns:
            Of each continuation, the natural logarithm of the probability of its tokens, float ``[t]``, on the CPU.
        Raises:
            InputError: If the prompt or a continuation is empty, or they do not fit the model's context.
            ConfigError: If ``batch_size`` is less than 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}.")
        if any(len(ids) == 0 for ids in continuations):
            raise InputError("continuations must have one token or more each, got an empty one; leave it out.")
        scores: list[Tensor] = []
        with self.fusion.condition(self, [prompt]) as inputs:
            self._check_length(inputs, max(map(len, continuations), default=0))
            read = self.model(**inputs, use_cache=True)
        first = read.logits[0, -1].float().log_softmax(-1)
        for begin in range(0, len(continuations), batch_size):
            some = [ids.to(self.device) for ids in continuations[begin : begin + batch_size]]
            if max(map(len, some)) == 1:  # the prompt tells all
                scores += [first[ids].cpu() for ids in some]
                continue
            cache = copy.deepcopy(read.past_key_values)
            cache.batch_repeat_interleave(len(some))
            token_ids = pad_sequence(some, batch_first=True)
            there = pad_sequence([torch.ones_like(ids) for ids in some], batch_first=True)
            mask = torch.cat((inputs["attention_mask"].expand(len(some), -1), there), dim=1)
            memory = {
                name: given.expand(len(some), *given.shape[1:]) if isinstance(given, Tensor) else given
                for name, given in inputs.items()
                if name in MEMORY_ARGUMENTS
            }
            logits = self.model(input_ids=token_ids, attention_mask=mask, past_key_values=cache, **memory).logits
            later = logits.float().log_softmax(-1)
            scores += [
                torch.cat((first[ids[:1]], row[:-1].gather(1, ids[1:, None])[:, 0])).cpu()
                for ids, row in ((ids, row[: len(ids)]) for ids, row in zip(some, later, strict=True))
            ]
        return scores

    @property
    def _end_ids(self) -> list[int]:
        """Tokens that end an answer: the model's own (chat models have several) and the tokenizer's."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        found = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        return sorted(found - {None})

    def _options(self, max_new_tokens: int, stop_at: StopAt, options: dict[str, Any]) -> dict[str, Any]:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}.")
        pad, ends = self.tokenizer.pad_token_id, self._end_ids
        return {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": ends or None,
            "pad_token_id": pad if pad is not None else next(iter(ends), 0),
            "stopping_criteria": StoppingCriteriaList([stop_at]),
        } | options

    def _check_length(self, inputs: dict[str, Any], max_new_tokens: int) -> None:
        if not inputs["attention_mask"].any(1).all():
            raise InputError("prompt must hold something, got one without tokens and without memory; ask something.")
        limit, length = self.context_tokens, int(inputs["attention_mask"].shape[1])
        if limit is not None and length + max_new_tokens > limit:
            raise InputError(
                f"prompt and answer must fit {limit} positions (the generator's context), got {length} + "
                f"{max_new_tokens}; read fewer passages, fewer latents a passage, or ask a shorter question."
            )

    def _generation(self, token_ids: Tensor, prompt_tokens: int, stop: Sequence[str]) -> Generation:
        ends, kept = self._end_ids, token_ids.tolist()
        kept = kept[: next((i for i, token in enumerate(kept, start=1) if token in ends), len(kept))]
        # What ended at a stop string is padded to the longest answer of its batch.
        while stop and holds_any(self._decode(kept[:-1]), stop):
            kept.pop()
        text = "".join(until([self._decode(kept)], stop))
        written = tuple(token for token in kept if token not in ends)
        return Generation(text.strip(), prompt_tokens, len(kept), written)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    if getattr(tokenizer, "chat_template", None):
        text = _in_template(tokenizer, [{"role": "user", "content": _PLACEHOLDER}])
        before, _, after = text.partition(_PLACEHOLDER)
        return (
            tokenizer(before, add_special_tokens=False).input_ids,
            tokenizer(after, add_special_tokens=False).input_ids,
        )
    return _opening(tokenizer), []


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = takewhile(lambda pair: pair[1], zip(encoded.input_ids, encoded.special_tokens_mask, strict=True))
    return [token for token, _ in special]


def _in_template(tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """A conversation in the words of the chat template, to be tokenized without special tokens of the tokenizer's own.

    Some templates write the beginning of sequence (Gemma, Llama-3), others leave it to the tokenizer (TinyLlama): it
    stands there once.
    """
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    opening = "".join(tokenizer.convert_ids_to_tokens(_opening(tokenizer)))
    return text if text.lstrip().startswith(opening) else opening + text


def _said_by_user(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one side as one message, with ``system`` and ``tool`` on the user's side."""
    said: list[Message] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        if said and said[-1].role == role:
            said[-1] = Message(role, (*said[-1].segments, TextSegment("\n\n"), *message.segments))
        else:
            said.append(Message(role, message.segments))
    return said


def _encodable(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, as the replacement character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def best_device() -> torch.device:
    """cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
