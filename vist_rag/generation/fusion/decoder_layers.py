"""Decoder layers that take memory: between self-attention and feed-forward, whatever the family.

A model stays what it is: its classes, its weights and their names. Its layers are given a ``forward`` that does the
same as before and, where it is called with memory, lets the blocks of a fusion read it in between. Memory comes as
arguments and nowhere else, so that threads, beams and exceptions cannot mix it up, and any number of fusions may share
a model.

Two shapes of layer are known, by the names of their parts: the pre-norm layer of Llama, Mistral, Qwen and Gemma (with
or without the second pair of norms of Gemma 2 and 3), and BERT's. What carries these names and computes something else
is found out by trying, and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vist_rag.errors import ConfigError

MEMORY_ARGUMENTS = ("memory_kv", "memory_mask", "memory_blocks", "memory_states", "memory_shown")
"""What a model's ``forward`` takes beside its own: see ``CrossAttentionFusion.condition``."""
_PRE_NORM = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_POST_NORM = ("attention", "intermediate", "output")
_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The parts of a layer's self-attention that cross-attention starts from.

    Attributes:
        query: Projection of the states, ``[heads * d_head, d_llm]``.
        key: Projection of keys, ``[kv_heads * d_head, d_llm]``.
        value: Projection of values, the same shape.
        norm: What the states go through before; None where a layer norms after.
        query_norm: What each head's queries go through; None in most families.
        key_norm: The same of keys.
        d_head: Width of a head.
        scale: What scores are multiplied by.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    norm: nn.Module | None
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    d_head: int
    scale: float


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, adapters around it seen through.

    Raises:
        ConfigError: If they are of neither shape.
    """
    inner: Any = _inside_adapters(model)
    core = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    layers = getattr(core, "layers", None)
    if layers is None:
        layers = getattr(getattr(getattr(inner, "bert", None), "encoder", None), "layer", None)
    if layers is None or not len(layers) or not all(_is_pre_norm(layer) or _is_post_norm(layer) for layer in layers):
        raise ConfigError(
            "generator must have decoder layers of Llama's shape (input_layernorm, self_attn, "
            f"post_attention_layernorm, mlp) for cross-attention, got {type(inner).__name__}; use fusion 'soft_prompt'."
        )
    return cast(nn.ModuleList, layers)


def self_attention(layer: nn.Module) -> SelfAttention:
    """What cross-attention in a layer starts from."""
    one = cast(Any, layer)
    if _is_pre_norm(layer):
        own = one.self_attn
        return SelfAttention(
            own.q_proj, own.k_proj, own.v_proj, one.input_layernorm, getattr(own, "q_norm", None),
            getattr(own, "k_norm", None), int(own.head_dim), float(own.scaling),
        )  # fmt: skip
    own = one.attention.self
    width = int(own.attention_head_size)
    return SelfAttention(own.query, own.key, own.value, None, None, None, width, width**-0.5)


def take_memory(model: PreTrainedModel) -> None:
    """Let a causal LM take memory in its layers; without memory it computes what it did before. Twice is once.

    Raises:
        ConfigError: If its layers are of another shape, compute something else than their names say, or carry hooks
            that stand in for their ``forward`` (accelerate's ``device_map``).
    """
    lm, layers = cast(Any, _inside_adapters(model)), decoder_layers(model)
    if _takes_memory(layers[0]):
        return
    if any("forward" in vars(module) for module in (lm, *layers)):
        raise ConfigError(
            "generator must be on one device for cross-attention, got one whose layers carry hooks (device_map); "
            "load it without device_map, or use fusion 'soft_prompt'."
        )
    before = _probe(lm)
    for layer in layers:
        layer.forward = MethodType(_pre_norm_forward if _is_pre_norm(layer) else _post_norm_forward, layer)
    lm.forward = MethodType(_declared(type(lm)), lm)
    after = _probe(lm)
    if before is not None and after is not None and not torch.allclose(before, after, atol=1e-5, rtol=1e-4):
        for module in (lm, *layers):
            del module.forward
        raise ConfigError(
            f"generator must compute its layers as Llama does for cross-attention, got {type(lm).__name__}, which "
            "does something else between them; use fusion 'soft_prompt'."
        )


def _pre_norm_forward(
    self: Any,
    hidden_states: Tensor,
    *,
    memory_kv: Tensor | None = None,
    memory_mask: Tensor | None = None,
    memory_blocks: Any = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    sandwich = hasattr(self, "pre_feedforward_layernorm")  # Gemma 2 and 3 norm what is added, too
    if sandwich:
        hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = residual + hidden_states
    if memory_kv is not None:
        hidden_states = memory_blocks.read(self.self_attn.layer_idx, hidden_states, memory_kv, memory_mask)
    residual = hidden_states
    before_mlp = self.pre_feedforward_layernorm if sandwich else self.post_attention_layernorm
    hidden_states = self.mlp(before_mlp(hidden_states))
    if sandwich:
        hidden_states = self.post_feedforward_layernorm(hidden_states)
    return residual + hidden_states


def _post_norm_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,  # always None: our memory is not an encoder's
    *,
    past_key_values: Any = None,
    encoder_attention_mask: Tensor | None = None,
    memory_kv: Tensor | None = None,
    memory_mask: Tensor | None = None,
    memory_blocks: Any = None,
    **kwargs: Any,
) -> Tensor:
    hidden_states = self.attention(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)[0]
    if memory_kv is not None:
        number = self.attention.self.layer_idx
        hidden_states = memory_blocks.read(number, hidden_states, memory_kv, memory_mask)
    return cast(Tensor, self.feed_forward_chunk(hidden_states))


def _declared(kind: type[nn.Module]) -> Any:
    """The ``forward`` of a class, with memory among its arguments: ``generate`` refuses what is not declared."""
    own = kind.forward
    parameters = list(signature(own).parameters.values())
    known = {parameter.name for parameter in parameters}
    new = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in MEMORY_ARGUMENTS if name not in known]
    at = len(parameters) - (parameters[-1].kind is Parameter.VAR_KEYWORD)

    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    cast(Any, forward).__signature__ = signature(own).replace(parameters=[*parameters[:at], *new, *parameters[at:]])
    return forward


@torch.no_grad()
def _probe(lm: Any) -> Tensor | None:
    """Logits of a few tokens; None on the meta device, where there are none."""
    if lm.device.type == "meta":
        return None
    with _evaluating(lm):
        ids = torch.arange(_PROBE_TOKENS, device=lm.device)[None] % lm.get_input_embeddings().weight.shape[0]
        return cast(Tensor, lm(input_ids=ids, use_cache=False).logits).float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _inside_adapters(model: nn.Module) -> nn.Module:
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def _is_pre_norm(layer: nn.Module) -> bool:
    own = getattr(layer, "self_attn", None)
    return all(hasattr(layer, name) for name in _PRE_NORM) and all(
        hasattr(own, name) for name in ("q_proj", "k_proj", "v_proj", "head_dim", "scaling")
    )


def _is_post_norm(layer: nn.Module) -> bool:
    return all(hasattr(layer, name) for name in _POST_NORM) and hasattr(getattr(layer, "attention", None), "self")


def _takes_memory(layer: nn.Module) -> bool:
    own = vars(layer).get("forward")
    return getattr(own, "__func__", None) in (_pre_norm_forward, _post_norm_forward)
