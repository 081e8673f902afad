"""Memory by cross-attention: the generator's layers look it up between self-attention and feed-forward.

The paper's way in (VIST, arXiv:2502.00791, appendix A.1). Memory takes no positions of the context; its keys and values
are computed once a prompt, for all layers, and every token that is read or written may look at all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from vist_rag.compression import VisualMemory
from vist_rag.config import CrossAttentionConfig, FusionConfig
from vist_rag.errors import ConfigError
from vist_rag.generation.fusion.decoder_layers import decoder_layers, self_attention, take_memory
from vist_rag.generation.fusion.soft_prompt import SoftPromptFusion, merged, side_by_side
from vist_rag.generation.prompt import MemorySegment, Prompt

if TYPE_CHECKING:
    from vist_rag.generation.generator import VistGenerator

_NORM_EPS = 1e-6


class CrossAttention(nn.Module):
    """Gated cross-attention of one layer.

    The layer's states ask, keys and values of the memory answer, and what comes out is added to the states, as much as
    the gate is open. With the output projection at zero, as it starts, nothing is added; so with the gate at zero.

    Args:
        config: Sizes of the heads.
        d_llm: Width of the states.
        d_memory: Width of what keys and values are made of.
    Source: VIST, arXiv:2502.00791, appendix A.1; the gate is Flamingo's, arXiv:2204.14198.
    """

    def __init__(self, config: CrossAttentionConfig, d_llm: int, d_memory: int) -> None:
        super().__init__()
        self.config = config
        wide, narrow = config.heads * config.d_head, config.kv_heads * config.d_head
        self.norm = nn.RMSNorm(d_llm, eps=_NORM_EPS) if config.norm else None
        self.query = nn.Linear(d_llm, wide, bias=config.bias)
        self.key = nn.Linear(d_memory, narrow, bias=config.bias)
        self.value = nn.Linear(d_memory, narrow, bias=config.bias)
        self.query_norm = nn.RMSNorm(config.d_head, eps=_NORM_EPS) if config.head_norm else None
        self.key_norm = nn.RMSNorm(config.d_head, eps=_NORM_EPS) if config.head_norm else None
        # No bias: a row without memory attends to zeros, and must get nothing.
        self.output = nn.Linear(wide, d_llm, bias=False)
        nn.init.zeros_(self.output.weight)
        self.gate = nn.Parameter(torch.ones(()))

    def keys_and_values(self, memory: Tensor) -> Tensor:
        """Keys and values of a memory: float ``[b, m, d]`` -> ``[b, 2, kv_heads, m, d_head]``."""
        split = (self.config.kv_heads, self.config.d_head)
        keys, values = self.key(memory).unflatten(-1, split), self.value(memory).unflatten(-1, split)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        return torch.stack((keys, values), dim=1).transpose(2, 3)

    def forward(self, states: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """States that have looked at memory.

        Args:
            states: After self-attention, float ``[b, t, d_llm]``.
            kv: What ``keys_and_values`` made of the memory, ``[b, 2, kv_heads, m, d_head]``.
            mask: Which latents there are, bool ``[b, m]``; one at least in each row.
        Returns:
            float ``[b, t, d_llm]``.
        """
        config = self.config
        own = states.to(self.output.weight.dtype)  # trained weights may be finer than the generator's
        asked = self.query(own if self.norm is None else self.norm(own))
        queries = asked.unflatten(-1, (config.heads, config.d_head))
        if self.query_norm is not None:
            queries = self.query_norm(queries)
        keys, values = kv.to(queries.dtype).unbind(1)
        read = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=mask[:, None, None, :].expand(-1, 1, states.shape[1], -1),
            scale=config.scale,
            enable_gqa=config.heads != config.kv_heads,
        )
        added: Tensor = self.output(read.transpose(1, 2).flatten(2))
        return states + (torch.tanh(self.gate) * added).to(states.dtype)

    @torch.no_grad()
    def start_from(self, layer: nn.Module) -> None:
        """Take queries, keys and values from a decoder layer's own self-attention.

        Where latents are narrower than states, the first rows of its keys and values are taken (as in the paper: of the
        matrix that states are multiplied by from the left); where they are wider, what is left over starts at zero.
        """
        own = self_attention(layer)
        self.query.weight.copy_(_weight(own.query))
        for ours, theirs in ((self.key, own.key), (self.value, own.value)):
            weight, width = _weight(theirs), min(ours.in_features, theirs.in_features)
            ours.weight.zero_()
            ours.weight[:, :width] = weight[:, :width]
        if self.config.bias:
            for ours, theirs in ((self.query, own.query), (self.key, own.key), (self.value, own.value)):
                ours.bias.copy_(_plain(theirs).bias)
        for norm, given in ((self.norm, own.norm), (self.query_norm, own.query_norm), (self.key_norm, own.key_norm)):
            if norm is not None and given is not None:
                norm.weight.copy_(_norm_weight(given))


class Blocks(nn.ModuleDict):
    """The cross-attention of each layer that has one, by the layer's number."""

    def read(self, layer: int, states: Tensor, memory_kv: Tensor, memory_mask: Tensor) -> Tensor:
        """States of a layer after it looked at memory; as they are where it looks at none.

        Args:
            layer: Its number.
            states: float ``[b, t, d_llm]``.
            memory_kv: Keys and values for all layers, ``[b, layers, 2, kv_heads, m, d_head]``.
            memory_mask: bool ``[b, m]``.
        """
        name = str(layer)
        if name not in self:
            return states
        block = cast(CrossAttention, self[name])
        return cast(Tensor, block(states, memory_kv[:, block.config.layers.index(layer)], memory_mask))


class CrossAttentionFusion(SoftPromptFusion):
    """Memory enters by gated cross-attention in the generator's layers.

    What memory means and spells is read as for a soft prompt (or, with ``attention.direct``, the latents are taken as
    they are); it is where it goes that differs. A generator whose prompt holds no memory computes what it did before.

    Args:
        config: Widths, sizes of the heads (``attention``), and the compressor whose memories this was trained for.
    Raises:
        ConfigError: If ``attention`` is missing.
    """

    kind: ClassVar[str] = "cross_attention"
    in_context: ClassVar[bool] = False

    def __init__(self, config: FusionConfig) -> None:
        if config.attention is None:
            raise ConfigError(
                "attention must be sizes of cross-attention, got None; make the fusion with "
                "CrossAttentionFusion.for_model(model, memory_width)."
            )
        super().__init__(config)
        self.boundaries = nn.Parameter(torch.empty(0, config.generator_width))
        if config.attention.direct:
            # Nothing but PVE reads what latents mean: one layer to the width of words, where widths differ.
            self.projector = nn.Sequential(nn.Linear(config.memory_width, config.generator_width, bias=False))
        d_memory = config.memory_width if config.attention.direct else config.generator_width
        self.norm = nn.LayerNorm(d_memory)
        # Latents are read in any order, so each is told its place. Learned from 0.1: small beside a normed latent.
        self.place = nn.Parameter(torch.full((), 0.1))
        self.pointed = nn.Linear(d_memory, config.generator_width, bias=False) if config.attention.pointed else None
        if self.pointed is not None:
            nn.init.eye_(self.pointed.weight)
        self.blocks = Blocks(
            {
                str(n): CrossAttention(config.attention, config.generator_width, d_memory)
                for n in config.attention.layers
            }
        )

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        memory_width: int,
        *,
        every: int = 1,
        direct: bool = True,
        pointed: bool = False,
        reads: FusionConfig | None = None,
        fingerprint: str = "",
    ) -> CrossAttentionFusion:
        """A fresh fusion for a model, started from its self-attention: until it is trained, the model ignores memory.

        Args:
            model: A causal LM of Llama's shape of layer (Llama, Mistral, Qwen2/3, Gemma and others), or a
                ``PrefixBertForCausalLM``.
            memory_width: Width ``d`` of the latents.
            every: Cross-attention in every so-manieth layer, the last one among them.
            direct: Whether keys and values are made of latents as they are, as in the paper; else of what the projector
                makes of them.
            pointed: Whether the model may copy words that memory spells; only of a ``PrefixBertForCausalLM``, which
                copies, and not with ``direct``.
            reads: Sizes of that projector and of spelling; None: without spelling.
            fingerprint: Of the compressor that it is to be trained for; empty means any.
        Raises:
            ConfigError: If the model's layers are of another shape, ``every`` is out of range or ``pointed`` cannot be.
        """
        layers = decoder_layers(model)
        if not 1 <= every <= len(layers):
            raise ConfigError(f"every must be in 1..{len(layers)} (layers of this generator), got {every}.")
        if pointed and "memory_shown" not in signature(type(model).forward).parameters:
            raise ConfigError(
                f"pointed must be False for a generator that copies no words, got True for {type(model).__name__}."
            )
        width = cast(Tensor, model.get_input_embeddings().weight).shape[1]
        own = self_attention(layers[0])
        attention = CrossAttentionConfig(
            layers=tuple(sorted(range(len(layers) - 1, -1, -every))),
            heads=own.query.out_features // own.d_head,
            kv_heads=own.key.out_features // own.d_head,
            d_head=own.d_head,
            scale=own.scale,
            direct=direct,
            pointed=pointed,
            bias=_plain(own.query).bias is not None,
            norm=own.norm is not None,
            head_norm=own.query_norm is not None,
        )
        sizes = reads or FusionConfig(memory_width, width)
        fusion = cls(
            replace(
                sizes, memory_width=memory_width, generator_width=width, fingerprint=fingerprint, attention=attention
            )
        )
        for number in attention.layers:
            cast(CrossAttention, fusion.blocks[str(number)]).start_from(layers[number])
        return fusion

    def attach(self, model: PreTrainedModel) -> None:
        """Let the model's layers take memory.

        Raises:
            ConfigError: If they cannot, or their number or sizes are not those that this fusion was made for.
        """
        take_memory(model)
        layers, attention = decoder_layers(model), cast(CrossAttentionConfig, self.config.attention)
        own = self_attention(layers[0])
        got = (own.query.out_features // own.d_head, own.key.out_features // own.d_head, own.d_head)
        wanted = (attention.heads, attention.kv_heads, attention.d_head)
        if got != wanted or attention.layers[-1] >= len(layers):
            raise ConfigError(
                f"fusion must be made for this generator: {len(layers)} layers with {got[0]} heads, {got[1]} of keys, "
                f"{got[2]} wide; got one for layer {attention.layers[-1]}, with {wanted[0]}, {wanted[1]}, {wanted[2]}."
            )

    def match_scale(self, embeddings: Tensor) -> None:
        """As of a soft prompt, where there is a projector; memory is normed before it is read in any case."""
        if not cast(CrossAttentionConfig, self.config.attention).direct:
            super().match_scale(embeddings)

    @contextmanager
    def condition(self, generator: VistGenerator, prompts: list[Prompt], *, skip: int = 0) -> Iterator[dict[str, Any]]:
        """Keyword arguments of ``generate`` for a batch of prompts: their text as embeddings, their memory beside it.

        Args:
            generator: That they are for.
            prompts: What is asked.
            skip: Parts at the beginning of each prompt that were read already; memory is looked at all the same.
        """
        held = [[s.memory for s in prompt.segments if isinstance(s, MemorySegment)] for prompt in prompts]
        for row in held:
            for memory in row:
                self.check(memory)
        texts = [
            Prompt(tuple(s for s in prompt.segments if not isinstance(s, MemorySegment)), framed=prompt.framed)
            for prompt in prompts
        ]
        begun = generator.parts(prompts[0])[:skip] if skip else []  # the same of all
        left = skip - sum(isinstance(part, VisualMemory) for part in begun)
        with super().condition(generator, texts, skip=left) as inputs:
            yield inputs | self.memory_arguments([self._looked_at(generator, row) for row in held])

    def _looked_at(self, generator: VistGenerator, memories: Sequence[VisualMemory]) -> list[tuple[Tensor, Tensor]]:
        if memories and not cast(CrossAttentionConfig, self.config.attention).direct:
            return self.read_many(generator, [(m.latents, m.places) for m in memories])
        return [self.looked_at(generator, memory.latents, memory.places) for memory in memories]

    def looked_at(
        self, generator: VistGenerator, latents: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What keys and values of one memory are made of, float ``[m, d]``, and the tokens that it spells, ``[m, s]``.

        Args:
            generator: Whose tokens are shown.
            latents: Of the memory, float ``[n, d]``.
            places: Position of each latent, int64 ``[n]``, ascending; None: one each.
        """
        if not cast(CrossAttentionConfig, self.config.attention).direct:
            return self.read(generator, latents, places)
        like = self.norm.weight
        latents = latents.to(like.device, like.dtype)
        seen = latents if places is None else merged(latents, places.to(like.device))
        return seen, torch.full((len(seen), 1), -1, device=like.device)

    def memory_arguments(self, memories: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
        """What a model takes of the memories of a batch.

        Args:
            memories: Of each prompt, what keys and values of its memories are made of, float ``[m, d]`` each, and the
                tokens that these spell, int64 ``[m, s]`` (``looked_at``).
        Returns:
            ``memory_kv`` ``[b, layers, 2, kv_heads, m', d_head]``, ``memory_mask`` bool ``[b, m']`` and
            ``memory_blocks``; nothing where no prompt has memory. For a model that may point at memory also
            ``memory_states`` ``[b, m', d_llm]`` and ``memory_shown`` int64 ``[b, m', s]``.
        """
        none = self.norm.weight.new_zeros(0, len(self.norm.weight))
        rows = [torch.cat((none, *(seen for seen, _ in row))) for row in memories]
        longest = max(map(len, rows), default=0)
        if not longest:
            return {}
        attention = cast(CrossAttentionConfig, self.config.attention)
        length = -(-longest // attention.bucket) * attention.bucket
        batch = F.pad(pad_sequence(rows, batch_first=True), (0, 0, 0, length - longest))
        counts = torch.tensor([len(row) for row in rows], device=batch.device)
        place = torch.arange(length, device=batch.device)
        there = place < counts[:, None]
        normed = self.norm(batch) + self.place * _sinusoids(place, batch.shape[-1], batch.dtype)
        blocks = [cast(CrossAttention, self.blocks[str(number)]) for number in attention.layers]
        kv = torch.stack([block.keys_and_values(normed) for block in blocks], dim=1)
        # What is not there is zero: a row without memory looks at one zero and is told nothing.
        kv = kv * there[:, None, None, None, :, None]
        mask = there | ((place == 0) & (counts == 0)[:, None])
        given = {"memory_kv": kv, "memory_mask": mask, "memory_blocks": self.blocks}
        if self.pointed is None:
            return given
        empty = torch.full((0, 1), -1, device=batch.device)
        spelt = [side_by_side([empty, *(shown for _, shown in row)]) for row in memories]
        slots = max(shown.shape[1] for shown in spelt)
        wide = [F.pad(shown, (0, slots - shown.shape[1], 0, length - len(shown)), value=-1) for shown in spelt]
        return {**given, "memory_states": self.pointed(normed), "memory_shown": torch.stack(wide)}


def _sinusoids(places: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Places as sines and cosines: int64 ``[m]`` -> ``[m, width]``. Source: arXiv:1706.03762, section 3.5."""
    waves = torch.arange((width + 1) // 2, device=places.device)
    angles = places[:, None] * torch.exp(waves * (-2 / width * torch.log(torch.tensor(10_000.0)).item()))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width].to(dtype)


def _plain(layer: nn.Module) -> nn.Linear:
    """A linear layer, an adapter around it seen through."""
    return cast(nn.Linear, getattr(layer, "base_layer", layer))


def _weight(layer: nn.Linear) -> Tensor:
    """The matrix of a linear layer ``[out, in]``, also where it is stored in fewer bits."""
    plain = _plain(layer)
    if plain.weight.shape == (plain.out_features, plain.in_features):
        return plain.weight
    # What the layer makes of each unit vector; the bias is what it makes of none.
    like: Any = {"device": plain.weight.device, "dtype": torch.bfloat16}
    units, nothing = torch.eye(plain.in_features, **like), torch.zeros(1, plain.in_features, **like)
    return cast(Tensor, (plain(units) - plain(nothing)).T)


def _norm_weight(norm: nn.Module) -> Tensor:
    """What a family's norm multiplies by: Gemma's stores how far that is from 1."""
    # Of a vector of ones, whose root mean square is 1, a norm makes its own weight, whichever way it stores it.
    return cast(Tensor, norm(torch.ones_like(cast(Tensor, norm.weight))[None]))[0]
