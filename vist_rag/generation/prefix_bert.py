"""A BERT that generates: it reads its prompt in both directions and writes the answer from left to right.

The embedded generator is of this kind, because it starts from the weights of a sentence encoder (MiniLM), which has
only ever read in both directions. Mask and training follow UniLM's sequence-to-sequence mode (arXiv:1905.03197).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, DynamicCache
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast


class PrefixBertConfig(BertConfig):
    """Config of a ``PrefixBertForCausalLM``: BERT's, always a decoder.

    Attributes:
        copy_width: Width of the layer that tells the words of one position apart (``CopyAttention``); 0: none.
    """

    model_type = "vist_prefix_bert"
    copy_width: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.is_decoder = True
        super().__post_init__(**kwargs)


REPEATED = 0.9
"""How much less likely a word is copied once it is in the answer, as a share."""
_NEAR = (-2, -1, 0, 1, 2)  # which words a slot's key reads: its own, and its neighbours
_EXACT = 50.0  # of the cosine between a word and itself: all others are nothing beside it


def ranks(places: Tensor) -> Tensor:
    """How many of the same place came before, for places of pieces in text order: int64 ``[m]`` -> int64 ``[m]``."""
    order = places.sort(stable=True).indices
    ordered = places[order]
    position = torch.arange(len(places), device=places.device)
    first = torch.searchsorted(ordered, ordered)
    result = torch.empty_like(places)
    result[order] = position - first
    return result


def last_shown(ids: Tensor) -> Tensor:
    """Of each slot, the last slot before it that shows a word, -1 where there is none: int64 ``[b, s]`` both."""
    place = torch.arange(ids.shape[1], device=ids.device)
    return F.pad(torch.where(ids >= 0, place, -1).cummax(1).values[:, :-1], (1, 0), value=-1)


def shown_behind(memory: Tensor, prompt: Tensor) -> Tensor:
    """What looked-up memory shows, then what the prompt does: int64 ``[b, m, s]``, ``[b, t, s']`` -> ``[b, m + t, S]``.

    ``S`` is the larger number of slots; -1 fills what is missing.
    """
    slots = max(memory.shape[-1], prompt.shape[-1])
    return torch.cat([F.pad(some, (0, slots - some.shape[-1]), value=-1) for some in (memory, prompt)], dim=1)


class Once:
    """A function of a tensor that is worked out once, until the tensor changes; anew each time where gradients flow.

    Args:
        work: The function.
    """

    def __init__(self, work: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._work = work
        self._known: tuple[weakref.ref[Tensor], int, int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The value for this tensor."""
        if torch.is_grad_enabled() and tensor.requires_grad:
            return self._work(tensor)
        known, place, version = self._known, tensor.data_ptr(), tensor._version
        if known is None or known[0]() is not tensor or known[1:3] != (place, version):
            known = weakref.ref(tensor), place, version, self._work(tensor)
            self._known = known  # whole, so that no other thread sees half of it
        return known[3]

    def __deepcopy__(self, memo: Any) -> Once:
        return Once(self._work)


class CopyAttention(nn.Module):
    """Points at where the next word stands in the prompt, or at the end of the answer.

    A position of text shows its own word, a position of memory the words that its latent spells. So a word can be
    copied whether or not training has seen it. Only the prompt is copied from, never the answer itself. Source: the
    pointer-generator of arXiv:1704.04368, as a product of experts in the place of a mixture.

    An answer is a span more often than not: the place right behind the one that the word just written was copied from
    has a bonus, ``go_on``, as large as it is sure that the word came from there.

    Args:
        width: Of a state.
        local_width: Width of a layer that reads a slot's word with its neighbours, two on either side, beside the state
            of its position: which of the words that share a position is meant. 0: no such layer.
    """

    def __init__(self, width: int, local_width: int = 0) -> None:
        super().__init__()
        self.local = _local(width, local_width) if local_width else None
        # A query is the state and the word just written; a key is the state, its word and the word before it.
        self.query = nn.Linear(2 * width, width)
        self.key = nn.Linear(3 * width, width)
        self.end = nn.Parameter(torch.empty(width))
        self.go_on = nn.Parameter(torch.empty(()))
        self.centred = Once(_centred)

    def forward(
        self,
        states: Tensor,
        written: Tensor,
        words: Tensor,
        end: int,
        shown: Tensor | None,
        mask: Tensor,
        answer: Tensor,
        cache: Any,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Which word is copied, and where from.

        Args:
            states: States of this pass, float ``[b, t, d]``; the last ``q`` of them are written from. Memory that is
                looked up may stand before them.
            written: Input embeddings of the last ``q``, float ``[b, q, d]``.
            words: Embeddings of all words, float ``[v, d]``.
            end: The word that ends an answer.
            shown: Words that each position shows, int64 ``[b, t, s]``, -1 where there are fewer. None in a later
                pass.
            mask: Which of the ``k`` positions of the first pass, the one that reads the prompt, may be copied from by
                each of the last ``q``, bool ``[b, q, k]``.
            answer: Which of the last ``q`` positions belong to the answer, bool ``[b, q]``. None of it may be missing:
                what was written before tells what is copied next.
            cache: Keeps keys and words of the first pass, what the answer holds and where was pointed at last; None
                where there is none.
            layer: Its layer for the former; the next one is for the latter.
        Returns:
            Probabilities of the words, float ``[b, q, v]``, and of the places, float ``[b, q, k * s + 1]``: the
            slots of each position in turn, then the end of the answer.
        """
        count = mask.shape[1]
        # Embeddings of one model share a direction that tells nothing.
        centre, lengths = self.centred(words)
        queries = self.query(torch.cat((states[:, -count:], written), dim=-1))
        with torch.no_grad():
            # What is in the answer already is hardly the next word.
            own = F.normalize(written - centre, dim=-1)
            repeated = (_EXACT * (own @ words.T - (own @ centre)[..., None]) / lengths).softmax(-1)
            repeated = repeated * answer[..., None]
            fresh = (1 - REPEATED * repeated).cumprod(1)
        pointed = None
        if cache is not None and cache.get_seq_length(layer):
            keys, ids = cache.layers[layer].keys, cache.layers[layer].values
            fresh = fresh * cache.layers[layer + 1].keys[:, 0]
            pointed = cache.layers[layer + 1].values[:, 0, 0]
        else:
            if shown is None:
                shown = torch.full((*states.shape[:2], 1), -1, device=states.device)
            keys, ids = self._keys(states, shown, words - centre)[:, None], shown.flatten(1)[:, None, :, None]
            if cache is not None:
                keys, ids = cache.update(keys, ids.float(), layer)  # the cache is of floats; bf16 holds no id above 256
        ids = ids[:, 0, :, 0].long()
        scores = torch.cat((queries @ keys[:, 0].transpose(1, 2), (queries @ self.end)[..., None]), dim=-1)
        scores = scores / queries.shape[-1] ** 0.5
        allowed = mask.repeat_interleave(ids.shape[1] // mask.shape[-1], dim=-1) & (ids >= 0)[:, None]
        allowed = F.pad(allowed, (0, 1), value=True)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        # A copy goes on behind the place that the word just written was copied from.
        last = last_shown(ids)
        same = repeated.gather(2, ids.clamp(min=0)[:, None].expand(-1, count, -1))
        columns = []
        for column in range(count):
            score = scores[:, column]
            if pointed is not None:
                copied_from = pointed[:, :-1] * same[:, column]
                copied_from = copied_from / (copied_from.sum(-1, keepdim=True) + 1e-3)
                next_one = copied_from.gather(1, last.clamp(min=0)) * (last >= 0)
                score = score + F.pad(self.go_on * next_one, (0, 1))
            pointed = score.softmax(-1)
            columns.append(pointed)
        weights = torch.stack(columns, 1)
        if cache is not None:
            # How fresh each word still is, and where was pointed at last: a row each, which go where the answer goes.
            cache.layers[layer + 1] = DynamicLayer()
            cache.update(fresh[:, None, -1:], weights[:, None, -1:], layer + 1)
        index = ids.clamp(min=0)[:, None].expand(-1, count, -1)
        copied = weights.new_zeros(*weights.shape[:2], len(words)).scatter_add(2, index, weights[..., :-1])
        ends = F.one_hot(torch.tensor(end, device=copied.device), len(words)).to(copied.dtype)
        return copied * fresh + weights[..., -1:] * ends, weights

    def _keys(self, states: Tensor, shown: Tensor, words: Tensor) -> Tensor:
        """Keys of all slots, float ``[b, t * s, d]``; ``words`` are centred."""
        ids = shown.flatten(1)
        there = ids >= 0
        # The word before is the last one that was shown, in this position or an earlier one.
        last = last_shown(ids)
        before = torch.where(last >= 0, ids.gather(1, last.clamp(min=0)), -1)
        size = words.norm(dim=-1).mean()
        directions = F.pad(size * F.normalize(words, dim=-1), (0, 0, 0, 1))  # the last row, -1, is nothing
        of_state, of_words = self.key.weight.split((states.shape[-1], 2 * states.shape[-1]), dim=1)
        keys = F.linear(states, of_state, self.key.bias).repeat_interleave(shown.shape[-1], dim=1)
        named = torch.cat((directions[ids[there]], directions[before[there]]), dim=-1)  # most slots are empty
        named = F.linear(named, of_words)
        if self.local is not None:
            row, slot = there.nonzero(as_tuple=True)
            near = [_neighbours(ids[there], row, offset) for offset in _NEAR]
            of_position = states[row, slot // shown.shape[-1]]
            named = named + self.local(torch.cat((of_position, *(directions[one] for one in near)), dim=-1))
        return keys.index_put((there,), named, accumulate=True)


def _local(width: int, hidden: int) -> nn.Sequential:
    """The layer that tells the words of a position apart."""
    return nn.Sequential(nn.Linear((1 + len(_NEAR)) * width, hidden), nn.GELU(), nn.Linear(hidden, width, bias=False))


def _fresh(local: nn.Sequential) -> None:
    first, last = cast(nn.Linear, local[0]), cast(nn.Linear, local[2])
    init.normal_(first.weight, std=0.05)
    init.zeros_(first.bias)
    init.zeros_(last.weight)


def _neighbours(words: Tensor, rows: Tensor, offset: int) -> Tensor:
    """Of words in order, those ``offset`` places on in the same row, -1 where there is none: int64 ``[k]`` all."""
    ours = rows.roll(-offset) == rows
    place = torch.arange(len(words), device=words.device) + offset
    return words.roll(-offset).masked_fill(~ours | (place < 0) | (place >= len(words)), -1)


def _centred(words: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the embeddings, float ``[d]``, and the distance of each from it, float ``[v]``."""
    centre = words.mean(0)
    with torch.no_grad():
        return centre, (words - centre).norm(dim=-1).clamp(min=1e-6)


class PrefixBertForCausalLM(BertLMHeadModel):
    """BERT with a language-model head and a prefix mask; works with ``generate`` like any causal LM."""

    config_class = PrefixBertConfig

    def __init__(self, config: PrefixBertConfig) -> None:
        super().__init__(config)
        self.copy = CopyAttention(config.hidden_size, config.copy_width)
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
        shown: Tensor | None = None,
        memory_kv: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_blocks: nn.Module | None = None,
        memory_states: Tensor | None = None,
        memory_shown: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
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
            shown: Words that each position shows, int64 ``[b, t, s]``, -1 where there are fewer; None means
                ``input_ids``, and where there are none, nothing can be copied.
            memory_kv: Memory that the layers look up, as ``memory_mask`` and ``memory_blocks`` are
                (``CrossAttentionFusion.memory_arguments``).
            memory_mask: Its mask.
            memory_blocks: What reads it.
            memory_states: What memory is to ``CopyAttention``, float ``[b, m, d_llm]``; its slots come first.
            memory_shown: Words that it spells, int64 ``[b, m, s]``; None: nothing of it can be copied.
            use_cache: Keep keys and values.
            logits_to_keep: Logits of so many last positions only; 0 means all.
            output_hidden_states: Return the states of every layer too, the input first.
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
            prompt = prompt[:, : cache.prompt_length]
        own = torch.eye(past + length, dtype=torch.bool, device=embeddings.device)[None, past:]
        causal = torch.ones(length, past + length, dtype=torch.bool, device=embeddings.device).tril(past)
        both_ways = F.pad(prompt, (0, past + length - prompt.shape[1]))[:, None]
        # A padding row attends to itself: a softmax over nothing is NaN.
        seen = ((causal[None] | both_ways) & present[:, None]) | own
        read = self.bert(
            inputs_embeds=embeddings,
            attention_mask=seen[:, None],
            past_key_values=cache,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            use_cache=cache is not None,
            output_hidden_states=output_hidden_states,
            memory_kv=memory_kv,
            memory_mask=memory_mask,
            memory_blocks=memory_blocks,
        )
        states = read.last_hidden_state
        kept = min(logits_to_keep or length, length)
        answer = torch.ones_like(states[..., 0], dtype=torch.bool) if past else present & ~prompt
        # What is copied depends on all of the answer so far, also where the logits of its end are enough.
        first = 0 if past else length - kept
        if prefix_mask is not None and not past:
            before = int((~answer.any(0)).long().cumprod(0).sum())  # columns before any answer
            first = min(first, max(0, before - 1))
        # A word to be copied is never the one that stands at this very position.
        copyable = (seen & both_ways & ~own)[:, first:, : prompt.shape[1]]
        head, words = self.cls.predictions, cast(Tensor, self.get_input_embeddings().weight)
        layer, end = self.config.num_hidden_layers, self.config.eos_token_id
        if shown is None and input_ids is not None:
            shown = input_ids[..., None]
        if shown is not None and not past:  # keys read their neighbours, and the answer is none
            shown = shown.masked_fill(~(present & prompt)[..., None], -1)
        sources = states
        if memory_states is not None and memory_shown is not None and memory_mask is not None:
            beside = memory_mask[:, None].expand(-1, copyable.shape[1], -1)
            copyable = torch.cat((beside, copyable), dim=-1)
            if not past:
                sources = torch.cat((memory_states.to(states.dtype), states), dim=1)
                shown = torch.full_like(states[..., :1], -1, dtype=torch.long) if shown is None else shown
                shown = shown_behind(memory_shown, shown)
        copied, pointed = self.copy(
            sources, embeddings[:, first:], words, end, shown, copyable, answer[:, first:], cache, layer
        )
        if cache is not None:
            cache.prompt_length = prompt.shape[1]
        # Both must agree on a word; a copy of nothing leaves the choice to the language model.
        logits = head.decoder(head.transform(states[:, -kept:])) + (copied[:, -kept:] + 1 / len(words)).log()
        return CausalLMOutputWithPast(
            logits=logits, past_key_values=cache, hidden_states=read.hidden_states, attentions=(pointed[:, -kept:],)
        )

    def _cache(self, cache: Any, *, use_cache: bool | None) -> Any:
        """The cache with a layer for what may be copied; None where none is kept."""
        if cache is None:
            if not use_cache:
                return None
            cache = DynamicCache(config=self.config)
        while len(cache.layers) <= self.config.num_hidden_layers + 1:
            cache.layers.append(DynamicLayer())
        return cache

    def tell_apart(self, width: int) -> None:
        """Give keys a fresh layer of this width that tells the words of a position apart; untaught it adds nothing."""
        self.config.copy_width = width
        self.copy.local = _local(self.config.hidden_size, width)
        _fresh(self.copy.local)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CopyAttention) and module.local is not None:
            _fresh(module.local)
        if isinstance(module, CopyAttention):
            init.zeros_(module.end)
            init.constant_(module.go_on, 4.0)
            # A position starts by pointing behind its own word; a latent shows several words, so at the word too.
            eye = torch.eye(len(module.end), dtype=module.end.dtype, device=module.end.device)
            init.copy_(module.query.weight, torch.cat((module.query.weight[:, : len(eye)], 12 * eye), dim=1))
            init.copy_(module.key.weight, torch.cat((module.key.weight[:, : len(eye)], 6 * eye, 12 * eye), dim=1))


AutoConfig.register(PrefixBertConfig.model_type, PrefixBertConfig)
AutoModelForCausalLM.register(PrefixBertConfig, PrefixBertForCausalLM)
