"""The noun: text in, pages out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vist_rag.config import RendererConfig
from vist_rag.errors import ConfigError
from vist_rag.rendering.layout import Lines, patch_spans, set_lines
from vist_rag.rendering.pages import Pages, check_texts
from vist_rag.rendering.raster import Sheet
from vist_rag.rendering.typeface import Pictures, Typeface

__all__ = ["Pages", "Renderer"]

_CHUNK = 32
"""Pages drawn at a time on the CPU: few enough for its caches, enough that threads rarely wait for each other."""


class Renderer:
    """Renders text to pages with a typeface, on any device.

    Args:
        atlas: The glyphs: a `GlyphAtlas`, or a `ShapedFont` for scripts whose letters depend on their neighbours.
        config: Sizes and normalisation.
        device: Where pixels are made; None means where the atlas is.
    """

    def __init__(self, atlas: Typeface, config: RendererConfig | None = None, *, device: str | None = None) -> None:
        self.config = config or RendererConfig()
        ink = atlas.pictures.ink
        if ink.shape[1] != self.config.patch_size_px:
            raise ConfigError(
                f"the atlas must be {self.config.patch_size_px} px high (patch_size_px), got {ink.shape[1]}; "
                "build it with the same height_px."
            )
        self.atlas = atlas
        self._device = torch.device(device) if device else ink.device
        self._sheet: tuple[Pictures, torch.device, Sheet] | None = None

    def to(self, device: str | torch.device) -> Renderer:
        """Make pixels on ``device`` from now on."""
        self._device = torch.device(device)
        return self

    def render(self, texts: Sequence[str]) -> Pages:
        """Render texts; an empty text is one blank page with nothing in its mask.

        Raises:
            InputError: If an item is not a string.
        """
        check_texts(texts)
        lines = set_lines(texts, self.atlas, self.config.page_width_px)
        size, s = self.config.patch_size_px, self.config.page_patches
        used = torch.from_numpy(_patches(lines, size)).to(self._device)
        mask = torch.arange(s, device=self._device) < used[:, None]
        return Pages(
            pixel_values=self._pixels(lines, mask),
            patch_mask=mask,
            char_spans=torch.from_numpy(patch_spans(lines, size, s)),
            text_ids=torch.from_numpy(lines.text_ids),
            coverage=torch.from_numpy(lines.coverage),
        )

    def count_patches(self, texts: Sequence[str]) -> list[int]:
        """Patches that hold text on each page that ``render`` would make: set, not drawn.

        Raises:
            InputError: If an item is not a string.
        """
        check_texts(texts)
        lines = set_lines(texts, self.atlas, self.config.page_width_px)
        return [int(n) for n in _patches(lines, self.config.patch_size_px)]

    def _current_sheet(self) -> Sheet:
        """The atlas on the device; laid out again when the typeface has drawn new glyphs."""
        pictures = self.atlas.pictures
        if self._sheet is None or self._sheet[0] is not pictures or self._sheet[1] != self._device:
            self._sheet = pictures, self._device, Sheet.of(pictures, self._device)
        return self._sheet[2]

    def _pixels(self, lines: Lines, mask: Tensor) -> Tensor:
        """Black on white; draws, normalises and folds a few pages at a time; float ``[p, c, size, size]``."""
        config, sheet, p = self.config, self._current_sheet(), len(lines.widths)
        side, size = config.tower_size_px, config.patch_size_px
        blank = 0.0 if config.normalize == "per_image" else 1.0
        square = torch.empty((p, 1, side, side), device=self._device)
        arrays = (lines.glyphs, lines.x, lines.advances, lines.offsets, lines.pages)
        boxes = torch.from_numpy(np.stack(arrays, dtype=np.int32)).to(self._device)  # [5, g], one transfer
        chunk = _CHUNK if self._device.type == "cpu" else 16 * _CHUNK
        for begin in range(0, p, chunk):
            end = min(begin + chunk, p)
            rows = -(-int(lines.widths[begin:end].max(initial=0)) // side)  # rows of the square that hold text
            square[begin:end, 0, rows * size :] = blank
            if rows == 0:
                continue
            first, last = np.searchsorted(lines.pages, (begin, end)).tolist()
            glyphs, x, advances, offsets, pages = boxes[:, first:last]
            strips = sheet.draw(glyphs, x, advances, offsets, pages - begin, (end - begin, rows * side))
            patches = strips.view(end - begin, -1, size * size).float()  # [p, rows * side / size, size * size]
            self._normalize(patches, mask[begin:end, : patches.shape[1]])
            folded = patches.view(end - begin, rows, side, size).transpose(2, 3)
            square[begin:end, 0, : rows * size].view(end - begin, rows, size, side).copy_(folded)
        return square.expand(-1, config.channels, -1, -1)

    def _normalize(self, ink: Tensor, mask: Tensor) -> None:
        """Turn ink (0..255) into pixel values, in place; blank patches become the mean, 0, under ``per_image``."""
        if self.config.normalize == "none":
            ink.div_(255).neg_().add_(1)
            return
        # Sums over a patch are whole numbers below 2 ** 24 (up to 16 px), so every order of adding gives the same bits.
        # The few numbers a page that follow from them are worked out on the CPU, in float64, which some devices lack.
        total, squares = ((part.sum(2) * mask).long().sum(1).cpu().double() for part in (ink, ink.square()))
        count = (mask.sum(1).cpu() * ink.shape[2]).clamp(min=1)
        mean = total / count
        scale = -1 / (255 * ((squares / count - mean.square()) / 255**2 + 1e-5).sqrt())
        mean, scale = mean.float().to(ink.device), scale.float().to(ink.device)
        ink.sub_(mean[:, None, None]).mul_((scale[:, None] * mask)[:, :, None])


def _patches(lines: Lines, size: int) -> np.ndarray:
    """Patches that hold text on each page, rounded up, int32 ``[p]``."""
    patches: np.ndarray = -(-lines.widths // size)
    return patches
