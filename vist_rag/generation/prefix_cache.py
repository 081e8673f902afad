"""Keys and values of how prompts begin, so that a follow-up over the same passages reads only what is new."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from vist_rag.compression import LatentCache, VisualMemory
from vist_rag.errors import ConfigError
from vist_rag.generation.prompt import MemorySegment, Prompt, TextSegment

if TYPE_CHECKING:
    from vist_rag.generation.generator import VistGenerator

_LEAST = 16
"""Positions that are worth a lookup."""
_SAFE_OPTIONS = {"do_sample", "temperature", "top_k", "top_p", "min_p", "logits_processor", "suppress_tokens"}
_SAFE_OPTIONS |= {"eos_token_id", "pad_token_id", "min_new_tokens", "bad_words_ids"}
"""What ``generate`` may be given beside: others (beams, caches, assistants) arrange the cache in their own way."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """How all prompts of a batch begin.

    Attributes:
        key: Of the tokens, memories and weights that it comes from.
        parts: Parts of each prompt that it covers (``VistGenerator.parts``).
        length: Positions that these take.
        states: Keys and values of every layer, ``[layers, 2, heads, length, d_head]``; None: not read yet.
    """

    key: bytes
    parts: int
    length: int
    states: Tensor | None = None

    def cache(self, batch: int, model: PreTrainedModel) -> DynamicCache:
        """What ``generate`` goes on from: the prefix in each row of a batch; nothing where it is not read yet."""
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        for number, layer in enumerate(self.states if self.states is not None else ()):
            keys, values = layer[:, None].expand(-1, batch, -1, -1, -1)
            cache.update(keys, values, number)  # copies: what is kept stays as it is
        return cache


class PrefixCache:
    """Prefixes at hand, the least recently used leaving first. Thread-safe.

    Args:
        max_bytes: What they may take together, on the generator's device; 0: none are kept.
    Raises:
        ConfigError: If that is below 0.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"prefix_cache_bytes must be 0 or more, got {max_bytes}.")
        self.max_bytes = max_bytes
        self._held = LatentCache(max_bytes)
        self._reusable: bool | None = None

    def clear(self) -> None:
        """Forget all: after weights were changed in a way that PyTorch does not count (``weight.data``)."""
        self._held = LatentCache(self.max_bytes)

    def begin(
        self, generator: VistGenerator, prompts: Sequence[Prompt], options: Mapping[str, Any]
    ) -> tuple[Prefix | None, list[Prefix]]:
        """The longest prefix of all these prompts that is at hand, and those that are worth keeping once read."""
        model = generator.model
        if not self.max_bytes or model.training or generator.fusion.training or not _plain(model, options):
            return None, []
        if self._reusable is None:
            self._reusable = goes_on(model)
        if not self._reusable:
            return None, []
        common = _common(generator, prompts)
        found = None
        for prefix in reversed(common):
            if (states := self._held.get(prefix.key)) is not None:
                found = Prefix(prefix.key, prefix.parts, prefix.length, states)
                break
        known = found.parts if found is not None else 0
        worth = _ends(prompts[0]) if len(prompts) == 1 else [common[-1].parts] if common else []
        return found, [prefix for prefix in common if prefix.parts in worth and prefix.parts > known]

    def keep(self, prefixes: Sequence[Prefix], cache: DynamicCache, mask: Tensor) -> None:
        """Keep what was read of the first row of a batch.

        Args:
            prefixes: Which beginnings of it.
            cache: After ``generate``.
            mask: Of the prompts, ``[b, t]``.
        """
        places = mask[0].nonzero().squeeze(1)  # of the prompt, padding left out
        for prefix in prefixes:
            layers = [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]
            at = places[: prefix.length]
            states = torch.stack([torch.stack((keys[0, :, at], values[0, :, at])) for keys, values in layers])
            if states.nbytes <= self.max_bytes:
                self._held.put(prefix.key, states)


def _plain(model: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Whether ``generate`` goes from left to right, a row for each prompt, with the cache that it is given."""
    own = model.generation_config
    if hasattr(model, "peft_config"):  # another adapter is another model
        return False
    if getattr(own, "cache_implementation", None) or getattr(own, "use_cache", True) is False:
        return False
    return (getattr(own, "num_beams", None) or 1) == 1 and _SAFE_OPTIONS.issuperset(options)


def _common(generator: VistGenerator, prompts: Sequence[Prompt]) -> list[Prefix]:
    """What all prompts begin with, one end of a part after the other; something is left of each."""
    weights = [*generator.model.parameters(), *generator.fusion.parameters()]
    seed = repr([(w.data_ptr(), w._version) for w in weights]).encode()
    chains, lengths = [], []
    boundary, in_context = generator.fusion.boundary_tokens, generator.fusion.in_context
    for prompt in prompts:
        # Memory that stands beside the context is looked at from every position, the first one too.
        beside = b"" if in_context else b"".join(_bytes(s.memory) for s in _memories(prompt))
        sha, length, chain = hashlib.sha256(seed + beside), 0, []
        for number, part in enumerate(generator.parts(prompt), start=1):
            sha.update(_bytes(part))
            if in_context or not isinstance(part, VisualMemory):
                length += len(part) + boundary * isinstance(part, VisualMemory)
            chain.append(Prefix(sha.digest(), number, length))
        chains.append(chain)
        lengths.append(length)
    same = []
    for ends in zip(*chains, strict=False):
        if len({end.key for end in ends}) > 1:
            break
        same.append(ends[0])
    return [prefix for prefix in same if _LEAST <= prefix.length < min(lengths)]


def _memories(prompt: Prompt) -> list[MemorySegment]:
    return [segment for segment in prompt.segments if isinstance(segment, MemorySegment)]


def _ends(prompt: Prompt) -> list[int]:
    """Where it is worth keeping what was read, in parts: before the first memory, and before the last text."""
    first = 0 if prompt.framed else 1  # the frame
    texts = [isinstance(segment, TextSegment) for segment in prompt.segments]
    last = max((i for i, text in enumerate(texts) if text), default=0)
    start = next((i for i, segment in enumerate(prompt.segments) if isinstance(segment, MemorySegment)), last)
    return sorted({first + start, first + last})


def _bytes(part: Tensor | VisualMemory) -> bytes:
    """What tells a part from others, its length first, so that no two parts read as one."""
    if isinstance(part, VisualMemory):
        raw = part.latents.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        head = f"memory {part.latents.dtype} {list(part.latents.shape)} {len(part)} {part.fingerprint}"
    else:
        raw, head = part.cpu().numpy().tobytes(), f"tokens {len(part)}"
    return f"{head}\x00".encode() + raw


@torch.no_grad()
def goes_on(model: PreTrainedModel) -> bool:
    """Whether a model reads on from what it read, padding in between, as it reads the whole: tried on eight tokens.

    A model that reads its prompt in both directions does not; nor is it trusted where what a layer keeps is not every
    key and value (sliding windows, state spaces), where keys depend on how long the whole is (dynamic rotary
    embeddings), or where it is told more of a position than its embedding.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    takes = signature(model.forward).parameters
    if "shown" in takes or any(kind in repr(rope) for kind in ("dynamic", "longrope")):
        return False
    table = model.get_input_embeddings()
    embeds = table(torch.arange(8, device=model.device) % cast(Tensor, table.weight).shape[0])[None]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1]], device=model.device)
    places = (mask.cumsum(1) - 1)[:, 4:]
    try:
        whole = model(inputs_embeds=embeds).logits[0, 4:].float()
        cache = DynamicCache(config=config)
        model(inputs_embeds=embeds[:, :4], past_key_values=cache, use_cache=True)
        if not all(type(layer) is DynamicLayer and layer.get_seq_length() == 4 for layer in cache.layers):
            return False
        padded = torch.cat((torch.zeros_like(embeds[:, :2]), embeds[:, 4:]), dim=1)
        own = {"position_ids": places} if "position_ids" in takes else {}
        rest = model(inputs_embeds=padded, attention_mask=mask, past_key_values=cache, **own).logits[0, 2:].float()
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):  # no such arguments, no such cache
        return False
    close = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((rest - whole).abs().max() <= close * whole.std())
