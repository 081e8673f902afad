"""Where the tokens of an answer look in their prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from vist_rag.generation.generator import VistGenerator
from vist_rag.generation.prompt import Prompt

LAST_LAYERS = 4
"""Layers whose self-attention is averaged: the last ones."""

Looked = Literal["copied", "attended"]


@torch.no_grad()
def answer_attention(
    generator: VistGenerator, prompt: Prompt, token_ids: Sequence[int]
) -> tuple[Looked, Tensor] | None:
    """Where each token of an answer looks in its prompt, read in one more forward pass over prompt and answer.

    A generator that copies tells where it copies each token from (``copied``). Of any other one it is the
    self-attention at the position that the token was written from, the mean over the heads of its last
    ``LAST_LAYERS`` layers (``attended``).

    Args:
        generator: That wrote the answer.
        prompt: What it was asked.
        token_ids: What it wrote, without what ends an answer (``Generation.token_ids``).
    Returns:
        Weights, float32 ``[t, m]`` over the ``m`` positions of the prompt, on the CPU; what is missing to one went to
        the end of the answer, or to what was written before. None where it cannot be told: the model is on a server,
        memory takes no positions, or there is no answer.
    """
    model = generator.model
    if not token_ids or not generator.fusion.in_context or not isinstance(model, PreTrainedModel):
        return None
    written = generator.ids(token_ids)[None]
    with generator.fusion.condition(generator, [prompt]) as inputs:
        embeds = torch.cat((inputs["inputs_embeds"], model.get_input_embeddings()(written)), dim=1)
        length, count = inputs["inputs_embeds"].shape[1], written.shape[1]
        read: dict[str, Any] = {
            "inputs_embeds": embeds,
            "attention_mask": F.pad(inputs["attention_mask"], (0, count), value=1),
            "use_cache": False,
        }
        if "shown" in inputs:
            read["shown"] = F.pad(inputs["shown"], (0, 0, 0, count), value=-1)
            read["prefix_mask"] = F.pad(inputs["attention_mask"], (0, count), value=0).bool()
            (pointed,) = model(**read, logits_to_keep=count + 1).attentions  # [1, t + 1, positions * slots + 1]
            # A position may show several words; the last column is the end of the answer.
            places = pointed[0, :-1, :-1].unflatten(-1, (length + count, -1)).sum(-1)
            return "copied", places[:, :length].float().cpu()
        layers = [w for w in _with_eager_attention(model)(**read, output_attentions=True).attentions if w is not None]
    if not layers:
        return None
    mean = torch.stack([weights[0].float().mean(0) for weights in layers[-LAST_LAYERS:]]).mean(0)  # [m + t, m + t]
    return "attended", mean[length - 1 : -1, :length].cpu()


def _with_eager_attention(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same weights, which tells its attention: other threads go on with the first."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    twin.set_attn_implementation("eager")
    return twin


__all__ = ["LAST_LAYERS", "answer_attention"]
