"""What layout and raster ask of a font: text -> glyphs, and their pictures; `GlyphAtlas` and `ShapedFont` give it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

BOX = 0
"""Glyph id of the box that stands for whatever the font does not cover."""


@dataclass(frozen=True)
class Glyphs:
    """Texts as glyphs, in the order of the text.

    Attributes:
        ids: Glyph ids, int32 ``[g]``.
        advances: Pixels from the left edge of a glyph's box to the next one's, int32 ``[g]``, none negative.
        offsets: Pixels from the left edge of the box to where the glyph's origin stands, int32 ``[g]``.
        clusters: First code point that each glyph shows, int64 ``[g]``; ascending.
        cluster_ends: End of the code points that each glyph shows, int64 ``[g]``.
        levels: Direction, uint8 ``[g]``: even is left to right, odd is right to left (embedding levels of UAX #9).
    """

    ids: np.ndarray
    advances: np.ndarray
    offsets: np.ndarray
    clusters: np.ndarray
    cluster_ends: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True)
class Pictures:
    """What glyphs look like.

    Attributes:
        ink: How dark each pixel is, uint8 ``[g, h, w]``; glyph ``BOX`` is drawn for what no glyph covers.
        origin: Column of ``ink`` that stands at a glyph's origin; columns before it reach back over the left neighbour.
        left: First inked column, counted from the origin, int32 ``[g]``.
        right: End of the ink, counted from the origin, int32 ``[g]``; equal to ``left`` where blank.
    """

    ink: Tensor
    origin: int
    left: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, ink: Tensor, origin: int) -> Pictures:
        """Pictures with their extents measured."""
        inked = ink.amax(dim=1).cpu().numpy() > 0  # [g, w]
        some = inked.any(axis=1)
        left = np.where(some, inked.argmax(axis=1) - origin, 0)
        right = np.where(some, ink.shape[2] - inked[:, ::-1].argmax(axis=1) - origin, 0)
        return cls(ink, origin, left.astype(np.int32), right.astype(np.int32))


class Typeface(Protocol):
    """Turns code points into glyphs, and has their pictures."""

    @property
    def reads_joiners(self) -> bool:
        """Whether ``shape`` wants the characters that show nothing but change their neighbours (joiners, selectors)."""

    @property
    def pictures(self) -> Pictures:
        """The glyphs' pictures; another object once ``shape`` has met new glyphs, whose ids follow the known ones."""

    @property
    def digest(self) -> str:
        """sha256 of everything that changes a pixel, in hexadecimal."""

    def shape(self, codepoints: np.ndarray, bounds: np.ndarray) -> Glyphs:
        """Glyphs of several texts.

        Args:
            codepoints: Of all texts, one after the other, int64 ``[c]``; the only white space is U+0020.
            bounds: Where each text begins, and the end of the last, int64 ``[t + 1]``.
        """


def box_picture(size_px: int) -> tuple[np.ndarray, int]:
    """An empty rectangle of about a capital letter's size, uint8 ``[rows, columns]``, and its advance."""
    side = max(4, round(size_px * 0.6))
    picture = np.full((round(size_px * 0.7), side), 255, np.uint8)
    picture[1:-1, 1:-1] = 0
    return picture, side + 2


def best_baseline(tops: np.ndarray, bottoms: np.ndarray, height_px: int) -> int:
    """Row of the strip on which letters stand, so that as little as possible of them sticks out of the strip.

    Args:
        tops: Rows of each letter above the baseline.
        bottoms: Rows of each letter below it.
        height_px: Height of the strip.
    """
    rows = np.arange(height_px, 0, -1)  # of two that are as good, the lower one
    lost = (tops[:, None] - rows).clip(min=0) + (bottoms[:, None] - (height_px - rows)).clip(min=0)
    return int(rows[lost.sum(axis=0).argmin()])
