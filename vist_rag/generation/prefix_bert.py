"""A BERT that generates: it reads its prompt in both directions and writes the answer from left to right.

The embedded generator is of this kind, because it starts from the weights of a sentence encoder (MiniLM), which has
only ever read in both directions. Mask and training follow UniLM's sequence-to-sequence mode (arXiv:1905.03197).
"""

from __future__ import annotations

from typing import Any, cast

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


SLOTS = 6
"""Words that a soft-prompt position holds apart, in reading order; further ones share the last slot."""
SHARPNESS = 20.0
"""Of the cosine between what a slot shows and a word. A latent of four words is at 0.5 of each."""
REPEATED = 0.99
"""How much less likely a word is copied once it is in the answer, as a share."""
LOOKED_AT = 32
"""Slots of a prompt whose words are considered: the most strongly pointed at."""
_COS, _SIN = 0.5, 0.75**0.5


def turn(vectors: Tensor, slot: int, *, back: bool = False) -> Tensor:
    """Mark vectors, float ``[..., d]``, as the word at this place of their position, or take the mark away.

    A rotation by 60 degrees of pairs of coordinates, other pairs for each slot; the first slot is not turned. So a sum
    of several words is near each of them, and tells which came first. ``d`` must be a multiple of ``2 ** (SLOTS - 1)``.
    """
    if slot == 0:
        return vectors
    first, second = vectors.unflatten(-1, (-1, 2, 2 ** (slot - 1))).unbind(-2)
    sin = -_SIN if back else _SIN
    return torch.stack((_COS * first - sin * second, sin * first + _COS * second), dim=-2).flatten(-3)


class CopyAttention(nn.Module):
    """Points at where the next word stands in the prompt, or at the end of the answer.

    What a position shows is told from its *input embedding* alone: the words whose embeddings it is near. So a word can
    be copied whether or not training has seen it, and a latent, which holds several words in its slots, offers each of
    them. Only the prompt is copied from, never the answer itself. Source: the pointer-generator of arXiv:1704.04368, on
    embeddings in the place of token ids, and as a product of experts in the place of a mixture.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # A query is the state and the word just written; a key is the state, its word and the word before it.
        self.query = nn.Linear(2 * width, width)
        self.key = nn.Linear(3 * width, width)
        self.end = nn.Parameter(torch.empty(width))

    def forward(
        self,
        states: Tensor,
        embeddings: Tensor,
        words: Tensor,
        end: int,
        mask: Tensor,
        answer: Tensor,
        cache: Any,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Which word is copied, and where from.

        Args:
            states: States of this pass, float ``[b, t, d]``; the last ``q`` of them are written from.
            embeddings: Their input embeddings, float ``[b, t, d]``.
            words: Embeddings of all words, float ``[v, d]``.
            end: The word that ends an answer.
            mask: Which of the ``k`` positions of the first pass, the one that reads the prompt, may be copied from by
                each of the last ``q``, bool ``[b, q, k]``.
            answer: Which of the last ``q`` positions belong to the answer, bool ``[b, q]``.
            cache: Keeps keys and slots of the first pass, and the answer so far; None where there is none.
            layer: Its layer for the former; the next one is for the latter.
        Returns:
            Probabilities of the words, float ``[b, q, v]``, and of the places, float ``[b, q, k * SLOTS + 1]``: the
            slots of each position in turn, then the end of the answer.
        """
        count = mask.shape[1]
        written = embeddings[:, -count:]
        centre = words.mean(0)  # embeddings of one model share a direction that tells nothing
        queries = self.query(torch.cat((states[:, -count:], written), dim=-1))
        if cache is not None and cache.get_seq_length(layer):
            keys, slots = cache.layers[layer].keys, cache.layers[layer].values
            written = cache.update(written[:, None], written[:, None], layer + 1)[0][:, 0]
            answer = F.pad(answer, (written.shape[1] - count, 0), value=True)
        else:
            keys, slots = self._slots(states, embeddings - centre, size=(words - centre).norm(dim=-1).mean())
            keys, slots = keys[:, None], slots[:, None]
            if cache is not None:
                keys, slots = cache.update(keys, slots, layer)
        keys = torch.cat((keys[:, 0], self.end.expand(len(keys), 1, -1)), dim=1)
        scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
        allowed = F.pad(mask.repeat_interleave(SLOTS, dim=-1), (0, 1), value=True)
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)

        # The answer is written from its own words and from the last position of the prompt.
        writes = answer[:, -count:] | F.pad(answer[:, -count:], (0, 1))[:, 1:]
        pointing = weights[..., :-1].detach() * (writes | ~writes.any(1, keepdim=True))[..., None]
        strongest = pointing.amax(1).topk(min(LOOKED_AT, slots.shape[2]), dim=-1).indices  # [b, n]
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        with torch.no_grad():
            directions = F.normalize(words - centre, dim=-1)
            shown = (SHARPNESS * slots[:, 0][rows, strongest] @ directions.T).softmax(-1)  # [b, n, v]
            repeated = (SHARPNESS * F.normalize(written - centre, dim=-1) @ directions.T).softmax(-1)
            # What a latent shows and is in the answer already is hardly the next word.
            fresh = torch.log1p(-REPEATED * repeated * answer[..., None]).cumsum(1).exp()[:, -count:]
        looked_at = weights.gather(2, strongest[:, None].expand(-1, count, -1))
        copied = (looked_at @ shown.to(weights.dtype)) * fresh
        ends = F.one_hot(torch.tensor(end, device=copied.device), len(words)).to(copied.dtype)
        return copied + weights[..., -1:] * ends, weights

    def _slots(self, states: Tensor, embeddings: Tensor, *, size: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and directions of all slots, float ``[b, k * SLOTS, d]`` twice, of states and centred embeddings."""
        directions = [F.normalize(turn(embeddings, slot, back=True), dim=-1) for slot in range(SLOTS)]
        last = F.pad(F.normalize(embeddings[:, :-1], dim=-1), (0, 0, 1, 0))
        slots = torch.stack(directions, dim=2)
        before = torch.stack([last, *directions[:-1]], dim=2)
        of_state, of_words = self.key.weight.split((states.shape[-1], 2 * states.shape[-1]), dim=1)
        keys = F.linear(states, of_state, self.key.bias)[:, :, None]
        keys = keys + F.linear(size * torch.cat((slots, before), dim=-1), of_words)
        return keys.flatten(1, 2), slots.flatten(1, 2)


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
        """Logits of the next token ``[b, t, v]``, the cache, and as ``attentions`` what is copied (``CopyAttention``).

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
            prompt = prompt[:, : cache.get_seq_length(self.config.num_hidden_layers) // SLOTS]
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
        head, words = self.cls.predictions, cast(Tensor, self.get_input_embeddings().weight)
        layer, end = self.config.num_hidden_layers, self.config.eos_token_id
        answer = torch.ones_like(kept[..., 0], dtype=torch.bool) if past else (present & ~prompt)[:, -kept.shape[1] :]
        copied, pointed = self.copy(states, embeddings, words, end, copyable, answer, cache, layer)
        # Both must agree on a word; a copy of nothing leaves the choice to the language model.
        logits = head.decoder(head.transform(kept)) + (copied + 1 / len(words)).log()
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache, attentions=(pointed,))

    def _cache(self, cache: Any, *, use_cache: bool | None) -> Any:
        """The cache with a layer for what may be copied; None where none is kept."""
        if cache is None:
            if not use_cache:
                return None
            cache = DynamicCache(config=self.config)
        while len(cache.layers) <= self.config.num_hidden_layers + 1:
            cache.layers.append(DynamicLayer())
        return cache

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CopyAttention):
            init.zeros_(module.end)
            # A position starts by pointing behind its own word; a latent shows several words, so at the word too.
            eye = torch.eye(len(module.end), dtype=module.end.dtype, device=module.end.device)
            init.copy_(module.query.weight, torch.cat((module.query.weight[:, : len(eye)], 12 * eye), dim=1))
            init.copy_(module.key.weight, torch.cat((module.key.weight[:, : len(eye)], 6 * eye, 12 * eye), dim=1))


AutoConfig.register(PrefixBertConfig.model_type, PrefixBertConfig)
AutoModelForCausalLM.register(PrefixBertConfig, PrefixBertForCausalLM)
