"""Compressors that read tokens instead of pictures: the baselines that VIST has to be compared with.

All else is equal: pages, windows, latents and memories are those of ``VistCompressor``, so that training, fusion and
evaluation take either. A page is a row of tokens, a patch is a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from vist_rag.compression.compressor import PassageCompressor
from vist_rag.compression.resampler import PerceiverResampler, WindowPooling
from vist_rag.config import ResamplerConfig
from vist_rag.errors import CheckpointError, ConfigError
from vist_rag.rendering import Pages
from vist_rag.rendering.pages import check_texts

DIGITS = 3
"""Numbers that a token id takes in a latent."""
_BASE = 128  # whole numbers up to here are exact in float16 and bfloat16


def write_ids(token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Token ids as numbers that half precision keeps: int64 ``[..., w]``, -1 for none -> ``[..., w * DIGITS]``."""
    places = torch.tensor([_BASE**i for i in range(DIGITS)], device=token_ids.device)
    return ((token_ids + 1)[..., None] // places % _BASE).flatten(-2).to(dtype)


def read_ids(numbers: Tensor) -> Tensor:
    """What ``write_ids`` wrote: ``[..., w * DIGITS]`` -> int64 ``[..., w]``."""
    places = torch.tensor([_BASE**i for i in range(DIGITS)], device=numbers.device)
    ids: Tensor = (numbers.round().long().unflatten(-1, (-1, DIGITS)) * places).sum(-1) - 1
    return ids


class TextCompressorConfig(PreTrainedConfig):
    """Config of a ``TextCompressor``.

    Attributes:
        encoder: Config of the text encoder, with its ``model_type``; None: token embeddings alone.
        embeddings: Sizes of the latter: ``tokens``, ``width``.
        resampler: Fields of ``ResamplerConfig``.
        pooled: Whether each window is pooled and projected, in the place of a Perceiver Resampler.
        page_tokens: Tokens of a full page.
        vocabulary: Bytes of the tokenizer, which the checkpoint holds.
        begin_token_id: Stands before every page that an encoder reads.
    """

    model_type = "vist_text_compressor"
    encoder: dict[str, Any] | None = None
    embeddings: dict[str, int] | None = None
    resampler: dict[str, Any] | None = None
    pooled: bool = False
    page_tokens: int = 192
    vocabulary: int = 0
    begin_token_id: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.resampler = {**asdict(ResamplerConfig(**(self.resampler or {})))}
        self.resampler["tower_layers"] = list(self.resampler["tower_layers"])
        super().__post_init__(**kwargs)


class TokenRenderer:
    """Texts to pages of token ids."""

    def __init__(self, tokenizer: Tokenizer, page_tokens: int, device: torch.device) -> None:
        self.tokenizer, self.page_tokens, self.device = tokenizer, page_tokens, device

    def render(self, texts: Sequence[str]) -> Pages:
        """Pages whose ``pixel_values`` are token ids, int64 ``[p, page_tokens]``; an empty text is one blank page.

        Raises:
            InputError: If an item is not a string.
        """
        check_texts(texts)
        rows: list[tuple[int, list[int], list[tuple[int, int]]]] = []
        encodings = self.tokenizer.encode_batch(
            [text.encode("utf-8", "replace").decode() for text in texts], add_special_tokens=False
        )
        for text_id, encoding in enumerate(encodings):
            # A token's span goes up to the next token's, so that every character is on some page.
            starts = [0, *(start for start, _ in encoding.offsets[1:]), len(texts[text_id])]
            spans = list(pairwise(starts)) if encoding.ids else []
            for begin in range(0, max(1, len(encoding.ids)), self.page_tokens):
                part = slice(begin, begin + self.page_tokens)
                rows.append((text_id, encoding.ids[part], spans[part]))
        ids = np.zeros((len(rows), self.page_tokens), np.int64)
        char_spans = np.zeros((len(rows), self.page_tokens, 2), np.int64)
        lengths = np.array([len(row) for _, row, _ in rows], np.int64)
        for page, (_, row, spans) in enumerate(rows):
            ids[page, : len(row)] = row
            char_spans[page, : len(row)] = np.array(spans, np.int64).reshape(-1, 2)
        return Pages(
            pixel_values=torch.from_numpy(ids).to(self.device),
            patch_mask=(torch.arange(self.page_tokens) < torch.from_numpy(lengths)[:, None]).to(self.device),
            char_spans=torch.from_numpy(char_spans),
            text_ids=torch.tensor([text_id for text_id, _, _ in rows], dtype=torch.long),
            coverage=torch.ones(len(texts)),
        )

    def count_patches(self, texts: Sequence[str]) -> list[int]:
        """Tokens on each page of the texts."""
        return [int(n) for n in self.render(texts).patch_mask.sum(1)]


class TextTower(nn.Module):
    """A text encoder in the vision tower's place: any Hugging Face encoder that takes ``input_ids``.

    Args:
        model: The encoder; None: token embeddings alone.
        embeddings: Number of tokens and width of the latter.
        begin_token_id: Put before every page.
    """

    def __init__(self, model: PreTrainedModel | None, embeddings: tuple[int, int], begin_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.words = nn.Embedding(*embeddings) if model is None else None
        self.begin_token_id = begin_token_id

    @property
    def width(self) -> int:
        """Width of a token's feature."""
        return int(self.words.weight.shape[1] if self.words is not None else cast(Any, self.model).config.hidden_size)

    def forward(self, token_ids: Tensor, mask: Tensor, read: Sequence[int] | None = None) -> list[Tensor]:
        """Read pages of tokens.

        Args:
            token_ids: int64 ``[p, s]``.
            mask: True where there is a token, bool ``[p, s]``.
            read: Which of these are wanted, in this order; None: all.
        Returns:
            The token embeddings, then the hidden state of each layer, each float ``[p, s', d_v]``; ``s'`` is the
            longest page of the batch.
        """
        longest = max(1, int(mask.sum(1).max()))
        token_ids, mask = token_ids[:, :longest], mask[:, :longest]
        if self.words is not None:
            return [self.words(token_ids)] * (1 if read is None else len(read))
        model = cast(PreTrainedModel, self.model)
        begun = torch.cat((token_ids.new_full((len(token_ids), 1), self.begin_token_id), token_ids), dim=1)
        attended = torch.cat((mask.new_ones(len(mask), 1), mask), dim=1)
        states = model(input_ids=begun, attention_mask=attended.long(), output_hidden_states=True).hidden_states
        words = model.get_input_embeddings()(token_ids)
        hidden = [words, *(state[:, 1:] for state in states[1:])]
        return hidden if read is None else [hidden[i] for i in read]


class TextCompressor(PassageCompressor):
    """Reads passages as tokens and keeps a few latents of each.

    With an encoder and a resampler this is CEPE* of VIST's comparison, in soft prompts; without either, a mean-pool
    compressor. The encoder is frozen. The tokenizer is part of the weights, as the glyph atlas is of VIST's.

    What a latent of ``VistCompressor`` spells has to be read off a picture; here it is known, so each latent ends with
    the ids of its tokens (``write_ids``): a baseline is to be as strong as it can be.
    """

    config_class = TextCompressorConfig
    base_model_prefix = "compressor"
    vocabulary: Tensor

    def __init__(self, config: TextCompressorConfig) -> None:
        super().__init__(config)
        if (config.encoder is None) == (config.embeddings is None) or not config.vocabulary:
            raise ConfigError(
                "TextCompressorConfig must hold an encoder or embeddings, and a vocabulary; make the model with "
                "TextCompressor.build(...)."
            )
        self.resampler_config = ResamplerConfig(**(config.resampler or {}))
        latents, tokens = self.resampler_config.latents_per_page, config.page_tokens
        if tokens % latents:
            raise ConfigError(f"latents_per_page must divide page_tokens ({tokens}), got {latents}.")
        model = None
        if config.encoder is not None:
            fields = dict(config.encoder)
            encoder = AutoConfig.for_model(fields.pop("model_type"), **fields)
            pooler = {"add_pooling_layer": False} if encoder.model_type in ("bert", "roberta") else {}
            model = AutoModel.from_config(encoder, **pooler)
            most = getattr(encoder, "max_position_embeddings", tokens + 1)
            if tokens + 1 > most:
                raise ConfigError(f"page_tokens must be {most - 1} or less (the encoder's context), got {tokens}.")
        sizes = config.embeddings or {"tokens": 1, "width": 1}
        self.tower = TextTower(model, (sizes["tokens"], sizes["width"]), config.begin_token_id)
        width = self.tower.width * len(self.resampler_config.tower_layers)
        self.resampler = (
            WindowPooling(self.resampler_config, width, tokens // latents)
            if config.pooled
            else PerceiverResampler(self.resampler_config, width, tokens)
        )
        self.register_buffer("vocabulary", torch.zeros(config.vocabulary, dtype=torch.uint8))
        self._pages: TokenRenderer | None = None
        self.register_load_state_dict_post_hook(_forget)
        self.tower.requires_grad_(False)
        self.post_init()

    @classmethod
    def build(
        cls,
        encoder: PreTrainedModel | Tensor,
        tokenizer: Tokenizer,
        *,
        begin_token_id: int = 0,
        page_tokens: int = 192,
        pooled: bool = False,
        resampler: ResamplerConfig | None = None,
    ) -> TextCompressor:
        """A compressor with a fresh resampler.

        Args:
            encoder: A text encoder, or token embeddings, float ``[v, e]``.
            tokenizer: Whose ids the encoder reads.
            begin_token_id: Put before every page that an encoder reads.
            page_tokens: Tokens of a full page; ``latents_per_page`` of the resampler must divide it.
            pooled: Pool and project each window in the place of a resampler.
            resampler: Sizes of the memory.
        Raises:
            CheckpointError: If the encoder does not bring all its weights.
            ConfigError: If the sizes do not fit each other, or a page not the encoder.
        """
        vocabulary = np.frombuffer(tokenizer.to_str().encode(), np.uint8)
        embeddings = isinstance(encoder, Tensor)
        compressor = cls(
            TextCompressorConfig(
                encoder=None if embeddings else cast(PreTrainedModel, encoder).config.to_dict(),
                embeddings={"tokens": encoder.shape[0], "width": encoder.shape[1]}
                if isinstance(encoder, Tensor)
                else None,
                resampler=asdict(resampler or ResamplerConfig()),
                pooled=pooled,
                page_tokens=page_tokens,
                vocabulary=len(vocabulary),
                begin_token_id=begin_token_id,
            )
        )
        compressor.vocabulary.copy_(torch.from_numpy(vocabulary.copy()))
        tower = cast(TextTower, compressor.tower)
        if isinstance(encoder, Tensor):
            cast(nn.Embedding, tower.words).weight.data.copy_(encoder)
        else:
            loaded = cast(PreTrainedModel, tower.model).load_state_dict(encoder.state_dict(), strict=False)
            if missing := loaded.missing_keys:  # what is left over (a pooler, a head) is not read
                raise CheckpointError(f"encoder must bring all its weights, got none for {', '.join(missing[:3])}.")
        return compressor

    @property
    def renderer(self) -> TokenRenderer:
        """Texts to pages of tokens."""
        if self._pages is None or self._pages.device != self.device:
            tokenizer = Tokenizer.from_str(self.vocabulary.cpu().numpy().tobytes().decode())
            tokenizer.no_padding()
            tokenizer.no_truncation()
            self._pages = TokenRenderer(tokenizer, self.config.page_tokens, self.device)
        return self._pages

    def forward(self, pixel_values: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compress pages.

        Args:
            pixel_values: Token ids, int64 ``[p, s]``.
            patch_mask: bool ``[p, s]``.
        Returns:
            Latents, float ``[p, n, d]``, and which of them stand for text, bool ``[p, n]``.
        """
        latents, standing = super().forward(pixel_values, patch_mask)
        shown = pixel_values.masked_fill(~patch_mask, -1)[:, : latents.shape[1] * self.window]
        return torch.cat((latents, write_ids(shown.unflatten(1, (-1, self.window)), latents.dtype)), dim=-1), standing

    @property
    def memory_width(self) -> int:
        """Width of a latent, its token ids included."""
        return super().memory_width + self.window * DIGITS

    def _settings(self) -> list[Any]:
        config = self.config
        encoder = {k: v for k, v in (config.encoder or {}).items() if k not in ("architectures", "dtype")}
        encoder = {k: v for k, v in encoder.items() if k != "transformers_version" and not k.startswith("_")}
        return [encoder, config.embeddings, config.resampler, config.pooled, config.page_tokens, config.begin_token_id]


def _forget(compressor: TextCompressor, _: Any) -> None:
    """Other weights were loaded: what was derived from the old ones is void."""
    compressor._fingerprint = None
    compressor._pages = None
