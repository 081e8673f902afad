"""What stands behind the latents of a memory: the pages that were rendered, and where each latent looked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vist_rag.compression import PassageCompressor
from vist_rag.rendering import Pages

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class MemoryView:
    """What stands behind the latents of one text. Patches of all its pages are counted in one row, ``p * s``.

    Attributes:
        text: The text.
        pages: Its pages; ``pages.to_image(page)`` is a picture, ``pages.char_spans`` the characters of each patch.
        page_of: Which page each latent is of, int64 ``[n]``.
        windows: The patches that each latent stands for, as shares, float32 ``[n, p * s]``; each row sums to one. A
            latent starts from them, and what it spells is read from them alone.
        attention: What share of its attention each latent gives each patch of its page, the mean over the layers and
            heads of the resampler, float32 ``[n, p * s]``.
        to_latents: The rest, which goes to the latents themselves, float32 ``[n]``.
    """

    text: str
    pages: Pages
    page_of: NDArray[np.int64]
    windows: Floats
    attention: Floats
    to_latents: Floats

    def characters(self, patches: Floats) -> Floats:
        """Weights of patches, float ``[..., p * s]``, as weights of characters, ``[..., c]``.

        What a patch has is divided evenly among the characters that it shows.
        """
        weights = np.zeros((*patches.shape[:-1], len(self.text)), np.float32)
        for patch, (start, end) in enumerate(self.pages.char_spans.reshape(-1, 2).tolist()):
            if end > start:
                weights[..., start:end] += patches[..., patch, None] / (end - start)
        return weights


def view_memory(compressor: PassageCompressor, text: str) -> MemoryView:
    """Look inside the memory of a text.

    Args:
        compressor: That makes it.
        text: The text.
    Raises:
        InputError: If it is not a string.
    """
    pages = compressor.renderer.render([text])
    s, window = pages.patch_mask.shape[1], compressor.window
    page_of: list[NDArray[np.int64]] = []
    windows: list[Floats] = []
    attention: list[Floats] = []
    to_latents: list[Floats] = []
    for page in range(len(pages)):
        weights = compressor.attention(pages, page).mean((0, 1)).numpy()  # [n, s + n]
        own = np.arange(s) // window == np.arange(len(weights))[:, None]
        own = own & (pages.patch_mask[page].cpu().numpy() | (np.arange(s) == 0))  # a blank page is its first patch
        columns = slice(page * s, (page + 1) * s)
        for rows, values in ((windows, own / own.sum(1, keepdims=True)), (attention, weights[:, :s])):
            row = np.zeros((len(weights), len(pages) * s), np.float32)
            row[:, columns] = values
            rows.append(row)
        page_of.append(np.full(len(weights), page))
        to_latents.append(weights[:, s:].sum(1))
    return MemoryView(
        text,
        pages,
        np.concatenate(page_of),
        np.concatenate(windows),
        np.concatenate(attention),
        np.concatenate(to_latents),
    )
