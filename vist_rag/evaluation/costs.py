"""What a prompt costs before anything runs: FLOPs and bytes of each part, counted on tensors without storage.

Every part is built from its config on PyTorch's ``meta`` device, where a tensor has a shape and no values, and runs
once there. So any pair of an encoder and a generator can be counted without weights, GPU or download.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from vist_rag.compression.resampler import PerceiverResampler
from vist_rag.compression.vision import VisionTower, tower_config
from vist_rag.config import FusionConfig, ResamplerConfig
from vist_rag.errors import ConfigError
from vist_rag.evaluation.meters import Part, empty, on_meta, run
from vist_rag.generation import SoftPromptFusion

FUSIONS = ("soft_prompt", "cross_attention")
ATTENTION = ("fused", "eager")
TOKENS_PER_PAGE = Fraction(1024, 7)
"""The paper's: 1,024 tokens of TinyLlama take seven pages. Another tokenizer's tokens are of another length."""
CHUNK_TOKENS = 256
"""Tokens that a text encoder reads at a time. Source: CEPE, arXiv:2402.16617, as used in VIST's comparison."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one prompt costs.

    Attributes:
        parts: In the order in which they run.
        fusion: How memory enters the generator.
        encoded_tokens: Tokens that are read as memory, ``T_e`` of the paper.
        text_tokens: Tokens that are read as text, ``T_d``.
        pages: Pages that the encoded text takes; chunks, for a text encoder.
        memory_entries: Vectors that the generator reads of them: latents, or states of a text encoder.
        positions: Positions of the generator's context that the prompt takes.
        decode_flops: FLOPs of the next token.
        kv_bytes: Keys and values that the generator keeps of the prompt; with cross-attention, those of memory too.
        memory_bytes_per_passage: What is stored of a passage, once, instead of encoding it again.
        raw_kv_bytes_per_passage: Keys and values that the generator keeps of the same passage read as text.
    """

    parts: tuple[Part, ...]
    fusion: str
    encoded_tokens: int
    text_tokens: int
    pages: int
    memory_entries: int
    positions: int
    decode_flops: int
    kv_bytes: int
    memory_bytes_per_passage: int
    raw_kv_bytes_per_passage: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole forward pass, text to first token."""
        return sum(part.flops for part in self.parts)

    @property
    def stored_flops(self) -> int:
        """The same where the memory was made ahead of time: nothing but fusion and generator runs."""
        return sum(p.flops for p in self.parts if p.name in ("projector", "cross_attention", "llm"))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(part.weight_bytes for part in self.parts)

    @property
    def activation_bytes(self) -> int:
        """Peak of the part that needs most: parts run one after the other."""
        return max(part.activation_bytes for part in self.parts)

    @property
    def total_bytes(self) -> int:
        """Weights, keys and values, and peak activations together."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    def part(self, name: str) -> Part | None:
        """A part by its name; None where this prompt has none of it."""
        return next((p for p in self.parts if p.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        totals = ("flops", "stored_flops", "weight_bytes", "activation_bytes", "total_bytes")
        return {
            **asdict(self),
            "parts": [asdict(p) for p in self.parts],
            **{name: getattr(self, name) for name in totals},
        }


def count_costs(
    encoder: PreTrainedConfig | Mapping[str, Any] | None,
    generator: PreTrainedConfig,
    *,
    encoded_tokens: int,
    text_tokens: int,
    resampler: ResamplerConfig | None = None,
    fusion: str = "soft_prompt",
    projector: FusionConfig | None = None,
    passage_tokens: int | None = None,
    tokens_per_page: Fraction | float = TOKENS_PER_PAGE,
    attention: str = "fused",
    all_logits: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Costs:
    """Count one prompt's costs. Nothing is loaded, and no value is computed.

    Args:
        encoder: Config of a vision tower, or of a text encoder, which reads chunks of 256 tokens and whose every state
            is a memory entry; None only where ``encoded_tokens`` is 0.
        generator: Config of any causal LM.
        encoded_tokens: Tokens that are read as memory, ``T_e``.
        text_tokens: Tokens that are read as text, ``T_d``.
        resampler: Sizes of the resampler; None means ``ResamplerConfig()``. A text encoder has none.
        fusion: ``soft_prompt``, or ``cross_attention`` (in every decoder layer, as many key heads as query heads).
        projector: Sizes of the soft prompt's projector, and whether it spells; widths are taken from the other parts.
        passage_tokens: Tokens of a passage. Each has pages of its own; None joins all encoded text, as the paper does.
        tokens_per_page: Tokens on a full page. A page counts as full for the tower; latents are in proportion.
        attention: ``fused`` (no scores are kept, as in FlashAttention) or ``eager`` (they are). FLOPs are the same.
        all_logits: Whether the head runs on every position, as perplexity needs, or on the last, as generation does.
        dtype: Of weights, activations and stored memory.
    Raises:
        ConfigError: If a number is out of range, or the prompt does not fit learned position embeddings.
    """
    _check_sizes(encoded_tokens, text_tokens, passage_tokens, tokens_per_page)
    for name, got, allowed in (("fusion", fusion, FUSIONS), ("attention", attention, ATTENTION)):
        if got not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {got!r}.")
    # Choosing how a model attends writes to its config.
    encoder, generator = copy.deepcopy(encoder), copy.deepcopy(generator)
    parts: list[Part] = []
    pages = entries = boundaries = memory_kv = memory_decode = 0
    passage_bytes, passage = 0, min(passage_tokens or encoded_tokens, encoded_tokens)
    text = generator.get_text_config()
    if encoded_tokens:
        if encoder is None:
            raise ConfigError(f"encoder must be given to encode {encoded_tokens} tokens, got None; set them to 0.")
        counter = _Counter(encoded_tokens, passage, tokens_per_page, attention, dtype)
        encoded = counter.encode(encoder, resampler or ResamplerConfig())
        parts += encoded.parts
        pages, entries = encoded.pages, encoded.entries
        passage_bytes = encoded.passage_entries * encoded.width * dtype.itemsize
        if fusion == "soft_prompt":
            part, boundaries = counter.project(entries, encoded.width, int(text.hidden_size), projector)
        else:
            part, memory_kv, memory_decode = counter.attend(entries, encoded.width, text, text_tokens)
        parts.append(part)
    positions = text_tokens + (entries + boundaries if fusion == "soft_prompt" else 0)
    _check_context(text, positions)
    llm, kv_bytes, decode = _count_llm(generator, positions, attention, dtype, all_logits=all_logits)
    return Costs(
        parts=(*parts, llm),
        fusion=fusion,
        encoded_tokens=encoded_tokens,
        text_tokens=text_tokens,
        pages=pages,
        memory_entries=entries,
        positions=positions,
        decode_flops=decode + memory_decode,
        kv_bytes=kv_bytes + memory_kv,
        memory_bytes_per_passage=passage_bytes,
        raw_kv_bytes_per_passage=kv_bytes * passage // positions,
    )


def learned_positions(generator: PreTrainedConfig) -> int | None:
    """Positions that a generator has embeddings for; None where positions are computed, as by rotation."""
    text = generator.get_text_config()
    if getattr(text, "rope_parameters", None) or not getattr(text, "max_position_embeddings", None):
        return None
    return int(text.max_position_embeddings)


# ----------------------------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True, slots=True)
class _Encoded:
    parts: tuple[Part, ...]
    pages: int
    entries: int
    width: int
    passage_entries: int


@dataclass(frozen=True, slots=True)
class _Counter:
    """The parts before the generator, for one division of the encoded text into passages."""

    encoded_tokens: int
    passage_tokens: int
    tokens_per_page: Fraction | float
    attention: str
    dtype: torch.dtype

    def per_passage(self, count: Callable[[int], int]) -> int:
        """The sum of what ``count`` says of each passage's tokens; the last passage may be shorter."""
        whole, rest = divmod(self.encoded_tokens, self.passage_tokens)
        return whole * count(self.passage_tokens) + (count(rest) if rest else 0)

    def encode(self, encoder: PreTrainedConfig | Mapping[str, Any], resampler: ResamplerConfig) -> _Encoded:
        if isinstance(encoder, PreTrainedConfig) and not hasattr(
            getattr(encoder, "vision_config", encoder), "patch_size"
        ):
            return self._read_text(encoder)
        return self._read_pages(
            tower_config(encoder if isinstance(encoder, PreTrainedConfig) else dict(encoder)), resampler
        )

    def _read_text(self, config: PreTrainedConfig) -> _Encoded:
        length = min(CHUNK_TOKENS, self.passage_tokens)
        chunks = self.per_passage(lambda tokens: math.ceil(tokens / CHUNK_TOKENS))
        model = on_meta(lambda: AutoModel.from_config(config), self.attention, self.dtype)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # one vector for the whole text: nobody reads it
        counted = run(lambda: model(input_ids=empty(chunks, length, dtype=torch.long)), model, attention=self.attention)
        parts = (counted.part("text_encoder"),)
        return _Encoded(parts, chunks, self.encoded_tokens, int(config.hidden_size), self.passage_tokens)

    def _read_pages(self, config: PreTrainedConfig, sizes: ResamplerConfig) -> _Encoded:
        page_patches, side = (int(config.image_size) // int(config.patch_size)) ** 2, int(config.image_size)
        pages = self.per_passage(lambda tokens: math.ceil(tokens / self.tokens_per_page))

        def latents(tokens: int) -> int:
            return math.ceil(tokens * sizes.latents_per_page / self.tokens_per_page)

        tower = on_meta(lambda: VisionTower.from_config(config), self.attention, self.dtype)
        layers = sizes.tower_layers
        resampler = on_meta(
            lambda: PerceiverResampler(sizes, tower.width * len(layers), page_patches), self.attention, self.dtype
        )
        pixels, mask = (pages, int(config.num_channels), side, side), (pages, page_patches)
        seen = run(
            lambda: tower(empty(*pixels, dtype=self.dtype), empty(*mask, dtype=torch.bool)),
            tower,
            attention=self.attention,
            value=page_patches,
        )
        features = (pages, page_patches, resampler.feature_width)
        resampled = run(
            lambda: resampler(empty(*features, dtype=self.dtype), empty(*mask, dtype=torch.bool)),
            resampler,
            attention=self.attention,
        )
        rendered = Part("rendering", 0, activation_bytes=math.prod(pixels) * self.dtype.itemsize)
        return _Encoded(
            (rendered, seen.part("tower"), resampled.part("resampler")),
            pages,
            self.per_passage(latents),
            sizes.memory_width,
            latents(self.passage_tokens),
        )

    def project(self, entries: int, width: int, generator_width: int, sizes: FusionConfig | None) -> tuple[Part, int]:
        """The soft prompt, and how many positions its boundaries take."""
        sizes = replace(
            sizes or FusionConfig(width, generator_width), memory_width=width, generator_width=generator_width
        )
        fusion = on_meta(lambda: SoftPromptFusion(sizes), self.attention, self.dtype)

        def read() -> tuple[Tensor, Tensor | None]:
            latents = empty(entries, width, dtype=self.dtype)
            return fusion.meaning(latents), fusion.spelt(latents) if sizes.spelling else None

        counted = run(read, fusion, attention=self.attention)
        return counted.part("projector"), self.per_passage(lambda _: fusion.boundary_tokens)

    def attend(self, entries: int, width: int, generator: PreTrainedConfig, text_tokens: int) -> tuple[Part, int, int]:
        """Cross-attention in every decoder layer, the bytes of its keys and values, its FLOPs for one more token."""
        d, layers = int(generator.hidden_size), int(generator.num_hidden_layers)
        heads = math.gcd(d, int(generator.num_attention_heads))
        block = on_meta(lambda: CrossAttention(width, d, heads), self.attention, self.dtype)

        def read() -> Tensor:
            memory, states = empty(entries, width, dtype=self.dtype), empty(text_tokens, d, dtype=self.dtype)
            attended: Tensor = block(states, memory)
            return attended

        first = run(read, block, attention=self.attention)
        kept = empty(entries, 2 * d, dtype=self.dtype)
        after = run(lambda: block(empty(1, d, dtype=self.dtype), kept=kept), block, attention=self.attention)
        part = first.part("cross_attention", times=layers)
        return part, layers * kept.numel() * kept.element_size(), layers * after.flops


class CrossAttention(nn.Module):
    """Cross-attention of one decoder layer as the paper describes it: text attends to memory, all heads of its own.

    It has as many key and value heads as query heads, also where the decoder's self-attention shares them: that is what
    the paper's figures amount to. Only counted here, never trained.
    """

    def __init__(self, memory_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(memory_width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, states: Tensor, memory: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """States ``[t, d_llm]``; memory ``[n, d]``, or what was kept of it, ``[n, 2 * d_llm]`` -> ``[t, d_llm]``."""
        key_value = self.key_value(memory) if kept is None else kept
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]  # [1, heads, t or n, d_llm / heads]
            for part in (self.query(states), *key_value.chunk(2, dim=-1))
        )
        read = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        attended: Tensor = self.output(read)
        return attended


_counted: dict[tuple[Any, ...], tuple[Part, int, int]] = {}
"""Generators that were counted already: rows of one table share theirs."""


def _count_llm(
    config: PreTrainedConfig, positions: int, attention: str, dtype: torch.dtype, *, all_logits: bool
) -> tuple[Part, int, int]:
    """The generator's part, bytes of its keys and values, FLOPs of the next token."""
    key = (config.to_json_string(), positions, attention, dtype, all_logits)
    if key in _counted:
        return _counted[key]
    try:
        model: Any = on_meta(lambda: AutoModelForCausalLM.from_config(config), attention, dtype)
    except ValueError as error:
        raise ConfigError(f"generator must be a causal language model, got {config.model_type} ({error}).") from error
    width = model.get_input_embeddings().weight.shape[1]

    def read(length: int, cache: Any = None) -> Any:
        embeds = empty(1, length, width, dtype=dtype)
        return model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=0 if all_logits else 1)

    prefill = run(lambda: read(positions), model, attention=attention)
    cache = prefill.result.past_key_values
    kept = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    kv_bytes = sum(t.numel() * t.element_size() for t in kept)
    after = run(lambda: read(1, cache), model, attention=attention)
    # Keys and values of all layers but one are there when a layer needs most; they are told apart from what goes again.
    part = replace(prefill.part("llm"), activation_bytes=prefill.activation_bytes - kv_bytes)
    _counted[key] = part, kv_bytes, after.flops
    return _counted[key]


def _check_sizes(encoded: int, text: int, passage: int | None, tokens_per_page: Fraction | float) -> None:
    for name, got, least in (("encoded_tokens", encoded, 0), ("text_tokens", text, 1), ("passage_tokens", passage, 1)):
        if got is not None and got < least:
            raise ConfigError(f"{name} must be {least} or more, got {got}.")
    if tokens_per_page <= 0:
        raise ConfigError(f"tokens_per_page must be more than 0, got {tokens_per_page}.")


def _check_context(generator: PreTrainedConfig, positions: int) -> None:
    limit = learned_positions(generator)
    if limit is not None and positions > limit:
        raise ConfigError(
            f"the prompt must fit {limit} positions (this generator's learned embeddings), got {positions}; lower "
            "text_tokens, encoded_tokens or latents_per_page."
        )
