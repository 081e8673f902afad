"""A BERT that generates: it reads its prompt in both directions and writes the answer from left to right.

The embedded generator is of this kind, because it starts from the weights of a sentence encoder (MiniLM), which has
only ever read in both directions. Mask and training follow UniLM's sequence-to-sequence mode (arXiv:1905.03197).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, DynamicCache
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast


class PrefixBertConfig(BertConfig):
    """Config of a ``PrefixBertForCausalLM``: BERT's, always a decoder."""

    model_type = "vist_prefix_bert"

    def __post_init__(self, **kwargs: Any) -> None:
        self.is_decoder = True
        super().__post_init__(**kwargs)


class CopyAttention(nn.Module):
    """Writes what it points at: attention from the words to be written over the *input embeddings* of the prompt.

    Output embeddings are the input embeddings, so a position that is pointed at raises the words that it looks like,
    seen in training or not; and a soft-prompt position is an input embedding like any other. Only the prompt is copied
    from, never the answer itself. Source: the pointer of arXiv:1704.04368, on embeddings in the place of token ids.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # A query is the state and the word just written; a key is the state, its word and the word before it.
        self.query = nn.Linear(2 * width, width)
        self.key = nn.Linear(3 * width, width)
        self.gain = nn.Parameter(torch.empty(width))
        self.repeat = nn.Parameter(torch.empty(width))

    def forward(
        self, states: Tensor, embeddings: Tensor, mask: Tensor, cache: Any, layer: int
    ) -> tuple[Tensor, Tensor]:
        """What is pointed at, and how strongly.

        Args:
            states: States of this pass, float ``[b, t, d]``; the last ``q`` of them are written from.
            embeddings: Their input embeddings, float ``[b, t, d]``.
            mask: Which of the ``k`` positions of the first pass, the one that reads the prompt, may be copied from by
                each of the last ``q``, bool ``[b, q, k]``.
            cache: Keeps keys and values of the first pass; None where there is none.
            layer: Its layer for them.
        Returns:
            What to add to the states, float ``[b, q, d]``, and the weights, float ``[b, q, k]``.
        """
        count = mask.shape[1]
        written = embeddings[:, -count:]
        queries = self.query(torch.cat((states[:, -count:], written), dim=-1))
        if cache is not None and cache.get_seq_length(layer):
            keys, values = cache.layers[layer].keys, cache.layers[layer].values
        else:
            before = F.pad(embeddings[:, :-1], (0, 0, 1, 0))
            keys, values = self.key(torch.cat((states, embeddings, before), dim=-1))[:, None], embeddings[:, None]
            if cache is not None:
                keys, values = cache.update(keys, values, layer)
        scores = queries @ keys[:, 0].transpose(1, 2) / queries.shape[-1] ** 0.5
        # Times the mask: who sees no position points nowhere, not everywhere.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        return self.gain * (weights @ values[:, 0]) - self.repeat * written, weights


class PrefixBertForCausalLM(BertLMHeadModel):
    """BERT with a language-model head and a prefix mask; works with ``generate`` like any causal LM."""

    config_class = PrefixBertConfig

    def __init__(self, config: PrefixBertConfig) -> None:
        super().__init__(config)
        self.copy = CopyAttention(config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token ``[b, t, v]``, the cache, and as ``attentions`` what is copied from ``[b, t, k]``.

        Args:
            input_ids: int64 ``[b, t]``, or None.
            attention_mask: True (1) where there is a token, ``[b, t]``.
            inputs_embeds: float ``[b, t, d_llm]``, instead of ``input_ids``.
            past_key_values: Cache of what was read.
            position_ids: int64 ``[b, t]``; None counts tokens, so that left padding shifts nothing.
            token_type_ids: int64 ``[b, t]``; None means 0 everywhere.
            prefix_mask: True where a position belongs to the prompt, bool ``[b, t]``; the prompt is read in both
                directions, the rest from left to right. None: all of the first forward pass is prompt.
            use_cache: Keep keys and values.
            logits_to_keep: Logits of so many last positions only; 0 means all.
            **_: What ``generate`` passes to every model.
        """
        embeddings = inputs_embeds if inputs_embeds is not None else self.get_input_embeddings()(input_ids)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = embeddings.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(len(embeddings), past + length, dtype=torch.long, device=embeddings.device)
        present = attention_mask.bool()
        if position_ids is None:
            position_ids = (present.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        cache = self._cache(past_key_values, use_cache=use_cache)
        prompt = prefix_mask.bool() if prefix_mask is not None else present
        if past:  # what the first pass read
            prompt = prompt[:, : cache.get_seq_length(self.config.num_hidden_layers)]
        own = torch.eye(past + length, dtype=torch.bool, device=embeddings.device)[None, past:]
        causal = torch.ones(length, past + length, dtype=torch.bool, device=embeddings.device).tril(past)
        both_ways = F.pad(prompt, (0, past + length - prompt.shape[1]))[:, None]
        # A padding row attends to itself: a softmax over nothing is NaN.
        seen = ((causal[None] | both_ways) & present[:, None]) | own
        states = self.bert(
            inputs_embeds=embeddings,
            attention_mask=seen[:, None],
            past_key_values=cache,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            use_cache=cache is not None,
        ).last_hidden_state
        kept = states[:, -logits_to_keep:] if logits_to_keep else states
        # A word to be copied is never the one that stands at this very position.
        copyable = (seen & both_ways & ~own)[:, -kept.shape[1] :, : prompt.shape[1]]
        copied, pointed = self.copy(states, embeddings, copyable, cache, self.config.num_hidden_layers)
        head = self.cls.predictions
        logits = head.decoder(head.transform(kept) + copied)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache, attentions=(pointed,))

    def _cache(self, cache: Any, *, use_cache: bool | None) -> Any:
        """The cache with a layer for what may be copied; None where none is kept."""
        if cache is None:
            if not use_cache:
                return None
            cache = DynamicCache(config=self.config)
        while len(cache.layers) <= self.config.num_hidden_layers:
            cache.layers.append(DynamicLayer())
        return cache

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CopyAttention):
            init.constant_(module.gain, 20.0)
            init.constant_(module.repeat, 5.0)
            # A position starts by pointing behind its own word; a latent shows several words, so at the word too.
            eye = torch.eye(len(module.gain), dtype=module.gain.dtype, device=module.gain.device)
            init.copy_(module.query.weight, torch.cat((module.query.weight[:, : len(eye)], 12 * eye), dim=1))
            init.copy_(module.key.weight, torch.cat((module.key.weight[:, : len(eye)], 6 * eye, 12 * eye), dim=1))


AutoConfig.register(PrefixBertConfig.model_type, PrefixBertConfig)
AutoModelForCausalLM.register(PrefixBertConfig, PrefixBertForCausalLM)
