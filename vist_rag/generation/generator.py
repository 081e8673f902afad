"""The noun: a Hugging Face causal LM that takes a ``Prompt``. How memory enters it is its fusion's business."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextIteratorStreamer

from vist_rag.errors import CheckpointError, ConfigError, InputError, ShapeError
from vist_rag.generation.fusion import SoftPromptFusion
from vist_rag.generation.int8 import is_int8, load_int8
from vist_rag.generation.prompt import Prompt, TextSegment

_PLACEHOLDER = "\u2042vist\u2042"


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        text: The text, stop string and special tokens removed, stripped of white space.
        prompt_tokens: Positions that the prompt took.
        completion_tokens: Tokens generated, the end-of-sequence token included.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int


class VistGenerator:
    """A causal LM that reads text and memory in one prompt.

    Args:
        model: Any Hugging Face causal LM whose ``generate`` takes ``inputs_embeds``.
        tokenizer: Its tokenizer; a chat template, where it has one, is used.
        fusion: How memory enters. None: text only.
    Raises:
        ShapeError: If the fusion was built for another width.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, fusion: SoftPromptFusion | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        width = model.get_input_embeddings().weight.shape[1]
        if fusion is not None and fusion.config.generator_width != width:
            raise ShapeError(
                f"fusion must be built for this generator's width, {width}, got {fusion.config.generator_width}; "
                "train a fusion for this generator."
            )
        self.fusion = (fusion or SoftPromptFusion.text_only(width)).to(self.device).eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        fusion: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> VistGenerator:
        """Load a generator and, where given, the fusion that was trained for it.

        Args:
            model: Hub id or local directory of a causal LM.
            fusion: Directory that ``SoftPromptFusion.save_pretrained`` wrote.
            device: None means cuda, then mps, then cpu.
            dtype: Of the weights; None means bf16 on cuda and float32 elsewhere.
        Raises:
            CheckpointError: If the model cannot be loaded.
        """
        device = torch.device(device) if device is not None else best_device()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            if is_int8(model):
                lm = load_int8(Path(model), dtype)
            else:
                lm = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"generator {model} cannot be loaded ({error}).") from error
        return cls(lm.to(device), tokenizer, SoftPromptFusion.from_pretrained(fusion) if fusion else None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Token ids that stand before and after every prompt: beginning of sequence, or the chat template's."""
        tokenizer = self.tokenizer
        if getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": _PLACEHOLDER}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            before, _, after = text.partition(_PLACEHOLDER)
            return (
                tokenizer(before, add_special_tokens=False).input_ids,
                tokenizer(after, add_special_tokens=False).input_ids,
            )
        return [i for i in tokenizer("").input_ids if i != tokenizer.eos_token_id], []

    def ids(self, token_ids: Sequence[int]) -> Tensor:
        """Token ids on the device, int64 ``[t]``."""
        return torch.tensor(list(token_ids), dtype=torch.long, device=self.device)

    def tokenize(self, text: str) -> Tensor:
        """Token ids of plain text, int64 ``[t]``; what looks like a special token in it is text."""
        encoded = self.tokenizer(_encodable(text), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return self.ids(encoded.input_ids)

    def count_tokens(self, text: str) -> int:
        """How many tokens plain text takes."""
        return len(self.tokenize(text))

    def prompt_length(self, prompt: Prompt) -> int:
        """Positions that a prompt takes, frame and boundary embeddings included."""
        before, after = self.frame
        inside = (
            self.count_tokens(s.text) if isinstance(s, TextSegment) else len(s.memory) + self.fusion.boundary_tokens
            for s in prompt.segments
        )
        return len(before) + sum(inside) + len(after)

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
            InputError: If a prompt does not fit the model's context.
        """
        if batch_size < 1 or max_new_tokens < 1:
            raise ConfigError(
                f"batch_size and max_new_tokens must be 1 or more, got {batch_size} and {max_new_tokens}."
            )
        answers: list[Generation] = []
        for begin in range(0, len(prompts), batch_size):
            some = list(prompts[begin : begin + batch_size])
            with self.fusion.condition(self, some) as inputs:
                self._check_length(inputs, max_new_tokens)
                output = self.model.generate(**inputs, **self._options(max_new_tokens, stop, options))
            lengths = inputs["attention_mask"].sum(1).tolist()
            answers += [self._generation(row, length, stop) for row, length in zip(output, lengths, strict=True)]
        return answers

    @torch.no_grad()
    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 32, stop: Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """Answer one prompt, piece by piece; the pieces joined are ``generate``'s text up to outer white space.

        Raises:
            InputError: If the prompt does not fit the model's context.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_special_tokens=True)
        failures: list[BaseException] = []
        with self.fusion.condition(self, [prompt]) as inputs:
            self._check_length(inputs, max_new_tokens)
            arguments = {**inputs, **self._options(max_new_tokens, stop, options), "streamer": streamer}

            def run() -> None:
                try:
                    with torch.no_grad():
                        self.model.generate(**arguments)
                except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
                    failures.append(error)
                    streamer.end()

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            yield from _until(streamer, stop)
            thread.join()
        if failures:
            raise failures[0]

    def _options(self, max_new_tokens: int, stop: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        chosen = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "pad_token_id": pad if pad is not None else self.tokenizer.eos_token_id,
        }
        if stop:
            chosen |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        return chosen | options

    def _check_length(self, inputs: dict[str, Any], max_new_tokens: int) -> None:
        limit, length = self.context_tokens, int(inputs["attention_mask"].shape[1])
        if limit is not None and length + max_new_tokens > limit:
            raise InputError(
                f"prompt and answer must fit {limit} positions (the generator's context), got {length} + "
                f"{max_new_tokens}; read fewer passages, fewer latents a passage, or ask a shorter question."
            )

    def _generation(self, token_ids: Tensor, prompt_tokens: int, stop: Sequence[str]) -> Generation:
        end = self.tokenizer.eos_token_id
        kept = token_ids.tolist()
        if end in kept:
            kept = kept[: kept.index(end) + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation("".join(_until(iter([text]), stop)).strip(), prompt_tokens, len(kept))


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop string, also where it spans two pieces."""
    if not stop:
        yield from pieces
        return
    held, hold = "", max(len(s) for s in stop) - 1
    for piece in pieces:
        held += piece
        ends = [at for at in (held.find(s) for s in stop) if at >= 0]
        if ends:
            yield held[: min(ends)]
            return
        if len(held) > hold:
            yield held[: len(held) - hold]
            held = held[len(held) - hold :]
    yield held


def _encodable(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, as the replacement character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def best_device() -> torch.device:
    """cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
