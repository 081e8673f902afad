"""Teach memory the generator's own language: a latent must look like the words of its window.

Reading memory is slow to learn when nothing in it looks like anything the generator knows. Here each soft-prompt
position is drawn towards the mean embedding of the word pieces that its window shows, and must tell them from all other
pieces of the batch. No generator runs, so a step is cheap; afterwards the generator reads memory much as it reads text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from vist_rag.compression import VistCompressor
from vist_rag.generation import SoftPromptFusion
from vist_rag.generation.fusion.soft_prompt import CHARACTERS
from vist_rag.generation.prefix_bert import SLOTS, ranks, turn
from vist_rag.rendering import Pages
from vist_rag.training.tower import TowerReading, reading_batch

CHARACTERS_NONE = len(CHARACTERS)
SCALE = 30.0
"""Of cosines, before the softmax over the pieces of the batch."""


def level(words: Tensor) -> Tensor:
    """Embeddings ``[v, d]`` at one distance from their centre: in a mean, no word drowns the others."""
    centre = words.mean(0)
    distances = (words - centre).norm(dim=-1, keepdim=True)
    levelled: Tensor = centre + (words - centre) * (distances.mean() / distances.clamp(min=1e-6))
    return levelled


def hold(embeddings: Tensor, places: Tensor, n: int, centre: Tensor) -> Tensor:
    """What a perfect memory would be: the mean of the word pieces in each window, each marked with its slot.

    Args:
        embeddings: Of the pieces in text order, ``level``, float ``[m, d]``.
        places: Window of each, int64 ``[m]``.
        n: Number of windows.
        centre: Of all words, float ``[d]``.
    Returns:
        float ``[n, d]``; the centre where a window has no piece.
    """
    slots = slots_of(places)
    turned = embeddings - centre
    for slot in range(1, SLOTS):
        here = slots == slot
        turned[here] = turn(turned[here], slot)
    sums = turned.new_zeros(n, turned.shape[1]).index_add(0, places, turned)
    counts = torch.bincount(places, minlength=n).clamp(min=1)
    return centre + sums / counts[:, None]


def slots_of(places: Tensor) -> Tensor:
    """Slot of each piece in its window, for places of pieces in text order: int64 ``[m]`` -> int64 ``[m]``."""
    return ranks(places).clamp(max=SLOTS - 1)


class LexicalAlignment(nn.Module):
    """Compressor and projector under the lexical loss.

    Args:
        compressor: Its resampler learns, and its tower where it is not frozen.
        fusion: Its projector learns.
        word_embeddings: The generator's, float ``[v, d_llm]``; not changed.
        reading: The heads that taught the tower, where it goes on learning to read beside.
    """

    word_embeddings: Tensor
    centre: Tensor

    def __init__(
        self,
        compressor: VistCompressor,
        fusion: SoftPromptFusion,
        word_embeddings: Tensor,
        reading: TowerReading | None = None,
    ) -> None:
        super().__init__()
        self.compressor, self.fusion, self.reading = compressor, fusion, reading
        self.register_buffer("word_embeddings", level(word_embeddings.detach()), persistent=False)
        self.register_buffer("centre", word_embeddings.detach().mean(0), persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor,
        latents: Tensor,
        pieces: Tensor,
        characters: Tensor | None = None,
        words: Tensor | None = None,
        spelling: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss, and the share of pieces that are the nearest ones of their slot.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            latents: For each piece of the batch, page and latent that show it, int64 ``[m, 2]``.
            pieces: Their ids, int64 ``[m]``.
            characters: For ``reading``, as ``TowerReading.forward`` takes them.
            words: The same.
            spelling: Class of each character that a latent shows, int64 ``[p, n, fusion.config.spelling]``; for a
                fusion that reads spelling.
        """
        figures: dict[str, Tensor] = {}
        if self.reading is not None and characters is not None and words is not None:
            hidden = self.compressor.tower(pixel_values, patch_mask)
            figures = self.reading.judge(hidden, patch_mask, characters, words)
            features = torch.cat([hidden[layer] for layer in self.compressor.resampler_config.tower_layers], dim=-1)
            memory, standing = self.compressor.resampler(features, patch_mask[:, : features.shape[1]])
        else:
            memory, standing = self.compressor(pixel_values, patch_mask)
        prompt = self.fusion.meaning(memory)[standing]  # [l, d_llm]
        # Position of each (page, latent) among those that stand for text.
        place = (standing.flatten().cumsum(0) - 1).view_as(standing)[latents[:, 0], latents[:, 1]]
        known, targets = pieces.unique(return_inverse=True)
        embeddings = self.word_embeddings[pieces]
        directions = F.normalize(self.word_embeddings[known] - self.centre, dim=-1)
        slots = slots_of(place)
        logits = prompt.new_zeros(len(pieces), len(known))
        for slot in range(SLOTS):
            here = slots == slot
            shown = turn(prompt[place[here]] - self.centre, slot, back=True)
            logits[here] = SCALE * F.normalize(shown, dim=-1) @ directions.T
        told = F.cross_entropy(logits, targets)

        standing_for = torch.bincount(place, minlength=len(prompt)) > 0
        ideal = hold(embeddings, place, len(prompt), self.centre)
        distance = (prompt - ideal)[standing_for].square().mean() / self.word_embeddings.var()

        spelt: Tensor | float = 0.0
        if self.fusion.speller is not None and spelling is not None:
            guesses = self.fusion.spelt(memory[standing]).flatten(0, 1)
            classes = spelling[:, : memory.shape[1]][standing].flatten()
            written = classes != CHARACTERS_NONE
            # Places without a character are half of all and easy.
            spelt = F.cross_entropy(guesses[written], classes[written])
            spelt = spelt + 0.3 * F.cross_entropy(guesses[~written], classes[~written])
            right = guesses.argmax(-1) == classes
            figures["spelt"] = right[written].float().mean().detach()
            figures["blank"] = right[~written].float().mean().detach()
        return figures | {
            "loss": spelt + distance + told + figures.get("loss", 0.0),
            "distance": distance.detach(),
            "piece_accuracy": (logits.argmax(-1) == targets).float().mean(),
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


class WordSalad:
    """Texts of words drawn one by one, so that every word piece is seen about as often as any other.

    Answers are made of rare words, and which pieces a word is made of does not depend on its neighbours: a memory that
    learns from running text alone spends most of its examples on words that it has known for long.

    Args:
        texts: Where words are found, as they stand between white space.
        tokenizer: Which pieces they are made of.
        fewest: Words that occur less often are left out: most are slips.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, *, fewest: int = 3) -> None:
        counts = Counter(word for text in texts for word in text.split())
        self.words = [word for word, count in counts.items() if count >= fewest]
        pieces = [encoding.ids for encoding in tokenizer.encode_batch(self.words, add_special_tokens=False)]
        holders = Counter(piece for ids in pieces for piece in ids)  # how many of the words hold it
        weights = (sum(1 / holders[piece] for piece in ids) / max(1, len(ids)) for ids in pieces)
        self._cumulative = list(accumulate(weights))

    def __call__(self, characters: int, rng: random.Random) -> str:
        """A text of about so many characters."""
        words = rng.choices(self.words, cum_weights=self._cumulative, k=max(1, characters // 3))
        ends = accumulate(len(word) + 1 for word in words)
        return " ".join(word for word, end in zip(words, ends, strict=True) if end <= characters + 1) or words[0]


def lexical_batch(
    texts: Sequence[str],
    compressor: VistCompressor,
    tokenizer: Tokenizer,
    *,
    reading: bool = False,
    spelling: int = 0,
) -> dict[str, Any]:
    """Pages of the texts, and which latent shows each word piece: the one whose window holds its middle.

    Args:
        texts: What is rendered.
        compressor: Its renderer and windows.
        tokenizer: The generator's.
        reading: Add what each patch shows (``reading_batch``).
        spelling: Add the characters of each latent's window, so many at most; 0 leaves them out.
    """
    pages = compressor.renderer.render(texts)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    shown_on = list(pieces_of_pages(pages, encodings, compressor.resampler.window))
    places = [np.stack((np.full(len(latents), page), latents), axis=1) for page, (_, latents) in enumerate(shown_on)]
    ids = [some for some, _ in shown_on]
    shown = reading_batch(texts, compressor.renderer, tokenizer) if reading else {}
    if spelling:
        shown["spelling"] = torch.from_numpy(_spelling(pages, texts, compressor.resampler.window, spelling))
    return shown | {
        "pixel_values": pages.pixel_values,
        "patch_mask": pages.patch_mask,
        "latents": torch.from_numpy(np.concatenate(places)),
        "pieces": torch.from_numpy(np.concatenate(ids)),
    }


def pieces_of_pages(pages: Pages, encodings: Sequence[Any], window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each page, ids of the word pieces that it shows and the latent whose window holds their middle.

    int64 ``[m]`` twice, in text order; every piece of a text is on one of its pages.
    """
    first = np.maximum.accumulate(pages.char_spans[..., 0].numpy(), axis=1)  # character of each patch, ascending
    for page, (text_id, starts) in enumerate(zip(pages.text_ids.tolist(), first, strict=True)):
        encoding = encodings[text_id]
        middles = np.array([(start + end - 1) // 2 for start, end in encoding.offsets], np.int64)
        used = int(pages.patch_mask[page].sum())
        end = int(pages.char_spans[page, max(used - 1, 0), 1])
        patch = np.searchsorted(starts[:used], middles, side="right") - 1
        here = (patch >= 0) & (middles < end)
        yield np.array(encoding.ids, np.int64)[here], patch[here] // window


def _spelling(pages: Pages, texts: Sequence[str], window: int, most: int) -> np.ndarray:
    """Class of each character by page, window and place in the window, int64 ``[p, n, most]``."""
    first = np.maximum.accumulate(pages.char_spans[..., 0].numpy(), axis=1)
    classes = np.full((len(first), -(-first.shape[1] // window), most), CHARACTERS_NONE, np.int64)
    for page, (text_id, starts) in enumerate(zip(pages.text_ids.tolist(), first, strict=True)):
        used = int(pages.patch_mask[page].sum())
        characters = np.arange(starts[0], int(pages.char_spans[page, max(used - 1, 0), 1]))
        if not used or not len(characters):
            continue
        codes = np.frombuffer(texts[text_id].encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)[characters]
        patch = np.searchsorted(starts[:used], characters, side="right") - 1
        latent, order = patch // window, np.arange(len(characters)) - np.searchsorted(patch, patch)
        # Every patch has places of its own, so that none depends on how wide the characters before it are.
        kept = order < most // window
        place = patch % window * (most // window) + order
        spelt = np.where((codes >= 32) & (codes < 127), codes - 32, CHARACTERS_NONE + 1)
        classes[page, latent[kept], place[kept]] = spelt[kept]
    return classes
