"""A BERT that generates: it reads its prompt in both directions and writes the answer from left to right.

The embedded generator is of this kind, because it starts from the weights of a sentence encoder (MiniLM), which has
only ever read in both directions. Mask and training follow UniLM's sequence-to-sequence mode (arXiv:1905.03197).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel


class PrefixBertConfig(BertConfig):  # type: ignore[misc]
    """Config of a ``PrefixBertForCausalLM``: BERT's, always a decoder."""

    model_type = "vist_prefix_bert"

    def __post_init__(self, **kwargs: Any) -> None:
        self.is_decoder = True
        super().__post_init__(**kwargs)


class PrefixBertForCausalLM(BertLMHeadModel):  # type: ignore[misc]
    """BERT with a language-model head and a prefix mask; works with ``generate`` like any causal LM."""

    config_class = PrefixBertConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``BertLMHeadModel.forward``, but for the mask.

        Args:
            input_ids: int64 ``[b, t]``, or None.
            attention_mask: True (1) where there is a token, ``[b, t]``.
            inputs_embeds: float ``[b, t, d_llm]``, instead of ``input_ids``.
            past_key_values: Cache of what was read.
            position_ids: int64 ``[b, t]``; None counts tokens, so that left padding shifts nothing.
            prefix_mask: True where a position belongs to the prompt, bool ``[b, t]``; the prompt is read in both
                directions, the rest from left to right. None: all of the first forward pass is prompt.
            **kwargs: Passed on.
        """
        given = inputs_embeds if inputs_embeds is not None else input_ids
        assert given is not None
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = given.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(len(given), past + length, dtype=torch.long, device=given.device)
        if attention_mask.dim() == 2:
            present = attention_mask.bool()
            if position_ids is None:
                position_ids = (present.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            causal = torch.ones(length, past + length, dtype=torch.bool, device=given.device).tril(past)
            seen = causal[None] | self._prompt(prefix_mask, present, past)[:, None]
            seen = seen & present[:, None]
            # A padding row attends to itself: a softmax over nothing is NaN.
            seen = seen | torch.eye(past + length, dtype=torch.bool, device=given.device)[None, past:]
            attention_mask = seen[:, None]
        return super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )

    @staticmethod
    def _prompt(prefix_mask: Tensor | None, present: Tensor, past: int) -> Tensor:
        """Which keys every query may see, bool ``[b, past + t]``."""
        if prefix_mask is not None:
            return prefix_mask.bool()
        if past == 0:
            return present
        return torch.zeros_like(present)  # one token at a time: the causal mask says it all


AutoConfig.register(PrefixBertConfig.model_type, PrefixBertConfig)
AutoModelForCausalLM.register(PrefixBertConfig, PrefixBertForCausalLM)
