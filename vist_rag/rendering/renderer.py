"""The noun: text in, pages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vist_rag.config import RendererConfig
from vist_rag.errors import ConfigError, InputError
from vist_rag.rendering.glyphs import GlyphAtlas
from vist_rag.rendering.layout import Line, set_line
from vist_rag.rendering.raster import rasterize


@dataclass(frozen=True)
class Pages:
    """Rendered texts; a long text takes several pages, next to each other and in order.

    Attributes:
        pixel_values: What the vision tower reads, float ``[p, c, size, size]``.
        patch_mask: True where a patch stands before the end of the text, bool ``[p, s]``.
        char_spans: Characters of the original text that each patch shows, int64 ``[p, s, 2]``, start and end;
            empty (start = end) where it shows none.
        text_ids: Which of the rendered texts a page belongs to, int64 ``[p]``.
        coverage: Share of each text's glyphs that the atlas has, float ``[t]``; the rest are boxes.
    """

    pixel_values: Tensor
    patch_mask: Tensor
    char_spans: Tensor
    text_ids: Tensor
    coverage: Tensor

    def __len__(self) -> int:
        return len(self.pixel_values)


class Renderer:
    """Renders text to pages with a glyph atlas, on any device.

    Args:
        atlas: The glyphs.
        config: Sizes and normalisation.
        device: Where pixels are made; None means where the atlas is.
    """

    def __init__(self, atlas: GlyphAtlas, config: RendererConfig | None = None, *, device: str | None = None) -> None:
        self.config = config or RendererConfig()
        if atlas.ink.shape[1] != self.config.patch_size_px:
            raise ConfigError(
                f"the atlas must be {self.config.patch_size_px} px high (patch_size_px), got {atlas.ink.shape[1]}; "
                "build it with the same height_px."
            )
        self.atlas = atlas
        self._ink = atlas.ink.to(device) if device else atlas.ink

    def to(self, device: str | torch.device) -> Renderer:
        """Make pixels on ``device`` from now on."""
        self._ink = self._ink.to(device)
        return self

    def render(self, texts: Sequence[str]) -> Pages:
        """Render texts; an empty text is one blank page with nothing in its mask.

        Raises:
            InputError: If an item is not a string.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts must be strings, got {type(text).__name__} at {i}; decode bytes first.")
        lines = [set_line(text, self.atlas, self.config.page_width_px) for text in texts]
        strips = self._strips(lines)
        widths = torch.from_numpy(np.concatenate([line.widths for line in lines] or [np.zeros(0, np.int32)]))
        used = -(-widths // self.config.patch_size_px)  # patches that hold text, rounded up
        mask = torch.arange(self.config.page_patches) < used[:, None]
        mask = mask.to(self._ink.device)
        return Pages(
            pixel_values=self._pixels(strips, mask),
            patch_mask=mask,
            char_spans=self._spans(lines, len(widths)),
            text_ids=torch.tensor([i for i, line in enumerate(lines) for _ in line.widths], dtype=torch.long),
            coverage=torch.tensor([1 - line.uncovered / max(1, len(line.glyphs)) for line in lines]),
        )

    def _strips(self, lines: Sequence[Line]) -> Tensor:
        """Ink of every page, uint8 ``[p, h, width]``."""
        counts = [int(n) for line in lines for n in np.bincount(line.page, minlength=len(line.widths))]
        most = max(counts, default=0)
        glyphs = np.zeros((len(counts), most), np.int32)
        x = np.full((len(counts), most), self.config.page_width_px, np.int32)
        filled = np.arange(most) < np.array(counts, np.int64).reshape(-1, 1)
        if most:
            glyphs[filled] = np.concatenate([line.glyphs for line in lines])
            x[filled] = np.concatenate([line.x for line in lines])
        device = self._ink.device
        return rasterize(
            self._ink,
            self.atlas.origin,
            torch.from_numpy(glyphs).to(device),
            torch.from_numpy(x).to(device),
            torch.tensor(counts, dtype=torch.int32, device=device),
            self.config.page_width_px,
        )

    def _pixels(self, strips: Tensor, mask: Tensor) -> Tensor:
        """Fold strips into squares; black on white; normalise; float ``[p, c, size, size]``."""
        config, p = self.config, len(strips)
        pixels = 1 - strips.float() / 255  # [p, h, width]
        if config.normalize == "per_image" and p:
            inside = mask.repeat_interleave(config.patch_size_px, dim=1)[:, None]  # [p, 1, width]
            n = (inside.sum((1, 2), keepdim=True) * config.patch_size_px).clamp(min=1)
            mean = (pixels * inside).sum((1, 2), keepdim=True) / n
            variance = ((pixels - mean).square() * inside).sum((1, 2), keepdim=True) / n
            pixels = (pixels - mean) * inside / (variance + 1e-5).sqrt()  # blank patches become the mean, 0
        rows = config.tower_size_px // config.patch_size_px
        folded = pixels.view(p, config.patch_size_px, rows, config.tower_size_px).transpose(1, 2)
        square = folded.reshape(p, 1, config.tower_size_px, config.tower_size_px)
        return square.expand(-1, config.channels, -1, -1)

    def _spans(self, lines: Sequence[Line], pages: int) -> Tensor:
        """Characters that each patch shows: a glyph belongs to every patch that its box touches."""
        size, s = self.config.patch_size_px, self.config.page_patches
        start = np.full((pages, s), np.iinfo(np.int64).max)
        end = np.zeros((pages, s), np.int64)
        base = 0
        for line in lines:
            rows = line.page + base
            first = (line.x // size).clip(max=s - 1)
            last = ((line.x + np.maximum(self.atlas.advances[line.glyphs], 1) - 1) // size).clip(max=s - 1)
            for patch in range(int((last - first).max(initial=0)) + 1):
                at = np.minimum(first + patch, last)
                np.minimum.at(start, (rows, at), line.chars)
                np.maximum.at(end, (rows, at), line.char_ends)
            base += len(line.widths)
        start = np.minimum(start, end)
        return torch.from_numpy(np.stack((start, end), axis=-1))
