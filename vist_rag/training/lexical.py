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

from vist_rag.compression import PassageCompressor
from vist_rag.generation import SoftPromptFusion
from vist_rag.generation.fusion.soft_prompt import CHARACTERS
from vist_rag.rendering import Pages
from vist_rag.training.objectives import Pve, pooled_words
from vist_rag.training.tower import TowerReading, patch_targets

CHARACTERS_NONE = len(CHARACTERS)
SCALE = 30.0
"""Of cosines, before the softmax over the pieces of the batch."""


def pack(embeddings: Tensor, places: Tensor, n: int, centre: Tensor) -> Tensor:
    """What a perfect memory would mean: the mean of the word pieces in each window.

    Args:
        embeddings: Of the pieces, float ``[m, d]``.
        places: Window of each, int64 ``[m]``.
        n: Number of windows.
        centre: Of all words, float ``[d]``.
    Returns:
        float ``[n, d]``; the centre where a window has no piece.
    """
    sums = embeddings.new_zeros(n, embeddings.shape[1]).index_add(0, places, embeddings - centre)
    return centre + sums / torch.bincount(places, minlength=n).clamp(min=1)[:, None]


class LexicalAlignment(nn.Module):
    """Compressor and projector under the lexical loss.

    Args:
        compressor: Its resampler learns, and its tower where it is not frozen.
        fusion: Its projector learns.
        word_embeddings: The generator's, float ``[v, d_llm]``; not changed.
        reading: The heads that taught the tower, where it goes on learning to read beside.
        salience: How much each word piece matters, ``piece_salience``; for a compressor that has to tell it.
        pve: How pages are drawn towards their words as a whole, beside.
    """

    word_embeddings: Tensor
    centre: Tensor
    salience: Tensor | None

    def __init__(
        self,
        compressor: PassageCompressor,
        fusion: SoftPromptFusion,
        word_embeddings: Tensor,
        reading: TowerReading | None = None,
        salience: Tensor | None = None,
        pve: Pve | None = None,
    ) -> None:
        super().__init__()
        self.compressor, self.fusion, self.reading, self.pve = compressor, fusion, reading, pve
        self.register_buffer("word_embeddings", word_embeddings.detach(), persistent=False)
        self.register_buffer("centre", word_embeddings.detach().mean(0), persistent=False)
        self.register_buffer("salience", salience, persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor,
        latents: Tensor,
        pieces: Tensor,
        characters: Tensor | None = None,
        words: Tensor | None = None,
        spelling: Tensor | None = None,
        kept_words: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss, and the share of pieces that are nearer to their latent than all that its window does not hold.

        Args:
            pixel_values: float ``[p, c, size, size]``.
            patch_mask: bool ``[p, s]``.
            latents: For each piece of the batch, page and latent that show it, int64 ``[m, 2]``.
            pieces: Their ids, int64 ``[m]``.
            characters: For ``reading``, as ``TowerReading.forward`` takes them.
            words: The same.
            spelling: Class of each character that a latent shows, int64 ``[p, n, fusion.config.spelling]``; for a
                fusion that reads spelling.
            kept_words: Which of the pieces are not masked, bool ``[m]``; for ``pve``.
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
        cosines = F.normalize(prompt - self.centre, dim=-1) @ directions.T  # [l, known]
        held = torch.zeros_like(cosines, dtype=torch.bool)
        held[place, targets] = True
        own = F.one_hot(targets, len(known)).bool()
        logits = (SCALE * cosines[place]).masked_fill(held[place] & ~own, -torch.inf)
        told = F.cross_entropy(logits, targets)

        standing_for = torch.bincount(place, minlength=len(prompt)) > 0
        ideal = pack(embeddings, place, len(prompt), self.centre)
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
        ranked: Tensor | float = 0.0
        if self.salience is not None:
            goal = window_salience(pieces, place, len(prompt), self.salience)
            ranked = F.mse_loss(memory[standing][:, 0], goal)
            figures["salience_error"] = ranked.detach() / goal.var()
        drawn: Tensor | float = 0.0
        pages = latents[:, 0].unique().tolist()
        if self.pve is not None and kept_words is not None and len(pages) > 1:
            means = prompt.split(standing.sum(1).tolist())
            words_of = [
                pooled_words(self.word_embeddings, pieces[latents[:, 0] == p], kept_words[latents[:, 0] == p])
                for p in pages
            ]
            drawn = self.pve.loss([means[p] for p in pages], words_of)
            figures["pve"] = drawn.detach()
        return figures | {
            "loss": spelt + distance + told + ranked + drawn + figures.get("loss", 0.0),
            "distance": distance.detach(),
            "piece_accuracy": (logits.argmax(-1) == targets).float().mean(),
        }


def piece_salience(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """How much each word piece matters, float ``[v]``: the rarer in these texts, the more.

    Source: the weight ``log(|S| / (1 + count(w)))`` of VIST (arXiv:2502.00791, section 3.3), as a share of that of a
    piece that never occurs, and not below 0.
    """
    counts = torch.zeros(tokenizer.get_vocab_size())
    for begin in range(0, len(texts), 1000):
        encodings = tokenizer.encode_batch(list(texts[begin : begin + 1000]), add_special_tokens=False)
        ids = torch.tensor([piece for encoding in encodings for piece in encoding.ids], dtype=torch.long)
        counts += torch.bincount(ids, minlength=len(counts))
    total = counts.sum().clamp(min=2)
    return (torch.log(total / (1 + counts)) / torch.log(total)).clamp(min=0)


def window_salience(pieces: Tensor, places: Tensor, n: int, salience: Tensor) -> Tensor:
    """How much each window matters, float ``[n]``: the sum over its pieces.

    Args:
        pieces: int64 ``[m]``.
        places: Window of each, int64 ``[m]``.
        n: Number of windows.
        salience: Of each piece of the vocabulary, float ``[v]``.
    """
    return salience.new_zeros(n).index_add(0, places, salience[pieces])


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
    compressor: PassageCompressor,
    tokenizer: Tokenizer,
    *,
    reading: bool = False,
    spelling: int = 0,
    pve: Pve | None = None,
    rng: random.Random | None = None,
) -> dict[str, Any]:
    """Pages of the texts, and which latent shows each word piece: the one whose window holds its middle.

    Args:
        texts: What is rendered.
        compressor: Its renderer and windows.
        tokenizer: The generator's.
        reading: Add what each patch shows (``patch_targets``).
        spelling: Add the characters of each latent's window, so many at most; 0 leaves them out.
        pve: Add which pieces are not masked.
        rng: For the latter.
    """
    pages = compressor.renderer.render(texts)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    shown_on = list(pieces_of_pages(pages, encodings, compressor.window))
    places = [np.stack((np.full(len(latents), page), latents), axis=1) for page, (_, latents) in enumerate(shown_on)]
    ids = [some for some, _ in shown_on]
    shown = patch_targets(texts, pages, encodings) if reading else {}
    if spelling:
        shown["spelling"] = torch.from_numpy(_spelling(pages, texts, compressor.window, spelling))
    if pve is not None:
        chance = rng or random.Random(0)
        shown["kept_words"] = torch.cat([pve.kept(torch.from_numpy(some), chance) for some in ids if len(some)])
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
    first = _first_characters(pages)
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
    first = _first_characters(pages)
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


def _first_characters(pages: Pages) -> np.ndarray:
    """Character at which each patch begins, ascending, int64 ``[p, s]``; blank patches take the last one's."""
    return np.maximum.accumulate(pages.char_spans[..., 0].numpy(), axis=1)
