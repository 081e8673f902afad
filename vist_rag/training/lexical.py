"""Teach memory the generator's own language: a latent must look like the words of its window.

Reading memory is slow to learn when nothing in it looks like anything the generator knows. Here each soft-prompt
position is drawn towards the mean embedding of the word pieces that its window shows, and must tell them from all other
pieces of the batch. No generator runs, so a step is cheap; afterwards the generator reads memory much as it reads text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from vist_rag.compression import VistCompressor
from vist_rag.generation import SoftPromptFusion
from vist_rag.rendering import Pages

SCALE = 30.0
"""Of cosines, before the softmax over the pieces of the batch."""


class LexicalAlignment(nn.Module):
    """Compressor and projector under the lexical loss.

    Args:
        compressor: Its resampler learns, and its tower where it is not frozen.
        fusion: Its projector learns.
        word_embeddings: The generator's, float ``[v, d_llm]``; not changed.
    """

    word_embeddings: Tensor
    centre: Tensor

    def __init__(self, compressor: VistCompressor, fusion: SoftPromptFusion, word_embeddings: Tensor) -> None:
        super().__init__()
        self.compressor, self.fusion = compressor, fusion
        self.register_buffer("word_embeddings", word_embeddings.detach().clone(), persistent=False)
        self.register_buffer("centre", word_embeddings.detach().mean(0), persistent=False)

    def forward(self, pixel_values: Tensor, patch_mask: Tensor, latents: Tensor, pieces: Tensor) -> dict[str, Tensor]:
        """Loss, and the share of pieces that are among the three nearest of their latent.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            latents: For each piece of the batch, page and latent that show it, int64 ``[m, 2]``.
            pieces: Their ids, int64 ``[m]``.
        """
        memory, standing = self.compressor(pixel_values, patch_mask)
        prompt = self.fusion.projector(memory)[standing]  # [l, d_llm]
        # Position of each (page, latent) among those that stand for text.
        place = (standing.flatten().cumsum(0) - 1).view_as(standing)[latents[:, 0], latents[:, 1]]
        known, targets = pieces.unique(return_inverse=True)
        embeddings = self.word_embeddings[pieces]
        directions = F.normalize(self.word_embeddings[known] - self.centre, dim=-1)
        logits = SCALE * F.normalize(prompt - self.centre, dim=-1) @ directions.T  # [l, known]
        told = logits.log_softmax(-1)[place, targets]

        counts = torch.zeros(len(prompt), device=prompt.device).index_add_(0, place, torch.ones_like(told))
        sums = torch.zeros_like(prompt).index_add_(0, place, embeddings)
        shown = counts > 0
        means = sums[shown] / counts[shown, None]
        distance = (prompt[shown] - means).square().mean() / self.word_embeddings.var()

        nearest = logits.detach().topk(min(3, logits.shape[1]), dim=-1).indices[place]
        return {
            "loss": distance - told.mean(),
            "distance": distance.detach(),
            "piece_recall": (nearest == targets[:, None]).any(-1).float().mean(),
        }


class Alternating(nn.Module):
    """Reading and lexical batches in one stage; the tower learns from the lexical ones alone, so reading stays cheap.

    Args:
        reading: Takes batches without ``pieces``.
        lexical: Takes batches with them; shares its compressor and fusion with ``reading``.
    """

    def __init__(self, reading: nn.Module, lexical: LexicalAlignment) -> None:
        super().__init__()
        self.reading, self.lexical = reading, lexical

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """What the module says that the batch is for."""
        is_lexical = "pieces" in batch
        self.lexical.compressor.tower.requires_grad_(is_lexical)
        figures: dict[str, Tensor] = (self.lexical if is_lexical else self.reading)(**batch)
        return figures


def lexical_batch(texts: Sequence[str], compressor: VistCompressor, tokenizer: Tokenizer) -> dict[str, Any]:
    """Pages of the texts, and which latent shows each word piece: the one whose window holds its middle."""
    pages = compressor.renderer.render(texts)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    places, ids = [], []
    for page, (text_id, starts) in enumerate(zip(pages.text_ids.tolist(), _window_starts(pages), strict=True)):
        encoding = encodings[text_id]
        middles = np.array([(start + end - 1) // 2 for start, end in encoding.offsets], np.int64)
        used = int(pages.patch_mask[page].sum())
        end = int(pages.char_spans[page, max(used - 1, 0), 1])
        patch = np.searchsorted(starts[:used], middles, side="right") - 1
        here = (patch >= 0) & (middles < end)
        ids.append(np.array(encoding.ids, np.int64)[here])
        places.append(np.stack((np.full(here.sum(), page), patch[here] // compressor.resampler.window), axis=1))
    return {
        "pixel_values": pages.pixel_values,
        "patch_mask": pages.patch_mask,
        "latents": torch.from_numpy(np.concatenate(places)),
        "pieces": torch.from_numpy(np.concatenate(ids)),
    }


def _window_starts(pages: Pages) -> np.ndarray:
    """First character of each patch, ascending within a page, int64 ``[p, s]``."""
    return np.maximum.accumulate(pages.char_spans[..., 0].numpy(), axis=1)
