"""Which words a compressor looks at: its attention by how often a word occurs, beside the room that the words take."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vist_rag.compression import PassageCompressor
from vist_rag.errors import InputError
from vist_rag.evaluation.metrics import RESAMPLES
from vist_rag.fidelity import words
from vist_rag.inspection import view_memory

LEAST = (1, 2, 10, 50, 200)
"""Occurrences with which each band begins."""


@dataclass(frozen=True)
class WordBands:
    """Words by how often they occur in a corpus, capitals or not.

    Attributes:
        counts: Occurrences of each word in small letters.
        least: Occurrences with which each band begins, ascending from 1.
    """

    counts: Mapping[str, int]
    least: tuple[int, ...] = LEAST

    @classmethod
    def of(cls, texts: Iterable[str], least: tuple[int, ...] = LEAST) -> WordBands:
        """Count the words of a corpus."""
        return cls(Counter(text[start:end].lower() for text in texts for start, end in words(text)), least)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the bands, the rarest words first: ``1``, ``2-9``, ``200+``."""
        ends = (*(begin - 1 for begin in self.least[1:]), None)
        named = (
            (f"{a}+" if b is None else str(a) if a == b else f"{a}-{b}") for a, b in zip(self.least, ends, strict=True)
        )
        return tuple(named)

    def band(self, word: str) -> str:
        """The band of a word; one that the corpus does not have is of the rarest."""
        count = self.counts.get(word.lower(), 0)
        return self.names[max(0, sum(count >= begin for begin in self.least) - 1)]


@dataclass(frozen=True, slots=True)
class BandAttention:
    """What the words of a band are given.

    Attributes:
        band: Its name.
        words: How many there were.
        attention: Their share of the attention that all words are given.
        area: Their share of the patches that all words take: what attention would be if it were spread evenly.
        ratio: ``attention / area``; above 1, the band is looked at more than its room explains.
        ratio_95: Its 95 % percentile bootstrap interval over texts.
    """

    band: str
    words: int
    attention: float
    area: float
    ratio: float
    ratio_95: tuple[float, float]


def attention_by_band(
    compressor: PassageCompressor,
    texts: Sequence[str],
    bands: WordBands,
    *,
    letters: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[BandAttention]:
    """How much of the latents' attention goes to words of each band, the rarest first.

    Attention is that of all latents of a text to its patches, the mean over layers and heads; a patch divides what it
    has evenly among its characters; a text counts by the patches that it takes. Spaces and punctuation are left out.

    Args:
        compressor: Whose resampler attends.
        texts: What is compressed.
        bands: How often words occur.
        letters: Look at words of so many characters only, the least and the most, since common words are short ones;
            None: at all.
        seed: Of the bootstrap.
    Returns:
        A row for each band that has a word in the texts.
    Raises:
        InputError: If no text has a word.
    """
    found = [_shares(compressor, text, bands, letters or (1, sys.maxsize)) for text in texts]
    attention, area, counts = (np.array([row[i] for row in found]).reshape(len(found), -1) for i in range(3))
    if not counts.sum():
        raise InputError(f"texts must hold at least one word, got {len(texts)} texts without any.")
    drawn = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    some = (attention[drawn].sum(1), area[drawn].sum(1))  # [resamples, bands] each
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may lack a rare band
        resampled = (some[0] / some[0].sum(1, keepdims=True)) / (some[1] / some[1].sum(1, keepdims=True))
    given, room = attention.sum(0) / attention.sum(), area.sum(0) / area.sum()
    rows = []
    for i, name in enumerate(bands.names):
        if not counts[:, i].sum():
            continue
        low, high = np.nanpercentile(resampled[:, i], [2.5, 97.5])
        ratio = float(given[i] / room[i])
        rows.append(
            BandAttention(
                name, int(counts[:, i].sum()), float(given[i]), float(room[i]), ratio, (float(low), float(high))
            )
        )
    return rows


def _shares(
    compressor: PassageCompressor, text: str, bands: WordBands, letters: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention, patches and number of the words of each band in one text, ``[bands]`` each."""
    view = view_memory(compressor, text)
    patches = view.pages.patch_mask.cpu().numpy().reshape(-1).astype(np.float32)
    # A text counts by its room, however much of its attention goes to the latents themselves.
    given = view.attention.sum(0)
    given, room = view.characters(given / given.sum() * patches.sum()), view.characters(patches)
    attention, area, counts = np.zeros((3, len(bands.names)))
    for start, end in words(text):
        if not letters[0] <= end - start <= letters[1]:
            continue
        i = bands.names.index(bands.band(text[start:end]))
        attention[i] += given[start:end].sum()
        area[i] += room[start:end].sum()
        counts[i] += 1
    return attention, area, counts
