"""Glyph boxes -> pixels, by one gather from the atlas: the only rendering code that runs on the device."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = (-2, -1, 0, 1, 2)
"""A column shows ink of the glyph it belongs to and of its neighbours' overhang: italics, `j`, combining marks."""


def rasterize(ink: Tensor, origin: int, glyphs: Tensor, x: Tensor, count: Tensor, width_px: int) -> Tensor:
    """Draw strips of text.

    Args:
        ink: The atlas' pictures, uint8 ``[g, h, w]``.
        origin: Column of ``ink`` at a glyph's origin.
        glyphs: Glyph ids, int ``[p, m]``, padded with anything.
        x: Left edge of each glyph in px, int ``[p, m]``, padded with values not below ``width_px``.
        count: Glyphs on each page, int ``[p]``.
        width_px: Width of the strip.
    Returns:
        How dark each pixel is, uint8 ``[p, h, width_px]``.
    """
    pages, most = glyphs.shape
    height, cell = ink.shape[1], ink.shape[2]
    if most == 0:
        return torch.zeros(pages, height, width_px, dtype=torch.uint8, device=ink.device)
    columns = torch.arange(width_px, device=ink.device).expand(pages, -1).contiguous()
    # The glyph whose box holds a column is the last one that starts at or before it.
    here = torch.searchsorted(x.contiguous(), columns, right=True) - 1
    neighbours = here[None] + torch.tensor(NEIGHBOURS, device=ink.device)[:, None, None]  # [5, p, width]
    inside = (neighbours >= 0) & (neighbours < count[None, :, None])
    neighbours = neighbours.clamp(0, most - 1)
    left = torch.gather(x.expand(len(NEIGHBOURS), -1, -1), 2, neighbours)
    glyph = torch.gather(glyphs.expand(len(NEIGHBOURS), -1, -1), 2, neighbours)
    column = columns[None] - left + origin
    inside &= (column >= 0) & (column < cell)
    # Columns of the atlas side by side, [g * cell, h]; an index past the end is the blank column.
    sheet = torch.cat((ink.permute(0, 2, 1).reshape(-1, height), ink.new_zeros(1, height)))
    index = torch.where(inside, glyph * cell + column, sheet.shape[0] - 1)
    return sheet[index].amax(0).transpose(1, 2)
