"""Glyph boxes -> pixels, by one gather from the atlas: the only rendering code that runs on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vist_rag.rendering.typeface import Pictures


@dataclass(frozen=True)
class Sheet:
    """An atlas on a device, its columns side by side, so that a strip is a gather of columns.

    Attributes:
        columns: Columns of all glyphs, with a blank one before and after each glyph, uint8 ``[g * cell, h]``.
        cell: Columns a glyph.
        origin: Column of a cell that stands at the glyph's origin.
        left: First inked column of each glyph, from its origin, int32 ``[g]``.
        right: End of the ink of each glyph, from its origin, int32 ``[g]``.
    """

    columns: Tensor
    cell: int
    origin: int
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, pictures: Pictures, device: torch.device) -> Sheet:
        """Lay out pictures on a device."""
        cells = torch.nn.functional.pad(pictures.ink, (1, 1)).permute(0, 2, 1)  # [g, w + 2, h]
        columns = cells.reshape(-1, cells.shape[2]).to(device)
        left, right = (torch.from_numpy(edge).to(device) for edge in (pictures.left, pictures.right))
        return cls(columns, cells.shape[1], pictures.origin + 1, left, right)

    def draw(
        self, glyphs: Tensor, x: Tensor, advances: Tensor, offsets: Tensor, pages: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Draw strips of text.

        Args:
            glyphs: Glyph ids, page by page and from left to right, int32 ``[g]``.
            x: Left edge of each glyph's box on its page, int32 ``[g]``.
            advances: Width of each box, int32 ``[g]``; the boxes of a page stand side by side from 0.
            offsets: From the box's left edge to the glyph's origin, int32 ``[g]``.
            pages: Page of each glyph, int32 ``[g]``.
            size: Pages and width of a page, in px.
        Returns:
            How dark each pixel is, column by column, uint8 ``[p, width, h]``.
        """
        count, width = size
        first = glyphs * self.cell + self.origin  # the column at the glyph's origin
        # Inside its box a column shows the glyph that the box belongs to.
        box, within = _expand(advances)
        shift = within.sub_(offsets.index_select(0, box)).clamp_(-self.origin, self.cell - 1 - self.origin)
        shift += first.index_select(0, box)
        filled = torch.zeros(count, dtype=torch.int32, device=x.device).index_add_(0, pages, advances)
        column = torch.arange(width, dtype=torch.int32, device=x.device)
        source = torch.zeros(count, width, dtype=torch.int32, device=x.device)  # column 0 of the sheet is blank
        source.masked_scatter_(column < filled[:, None], shift)
        strips = self.columns.index_select(0, source.view(-1))

        # Outside it, what sticks out goes over the neighbours: the darker pixel wins. The page's edges cut.
        left, right = self.left.index_select(0, glyphs) + offsets, self.right.index_select(0, glyphs) + offsets
        before = right.clamp(max=0) - left.clamp(max=0)
        behind = torch.maximum(left, advances)
        after = (right - behind).clamp_(min=0)
        some = torch.nonzero(before + after).squeeze(1)
        one, k = _expand((before + after)[some])
        one = some.index_select(0, one)
        k = torch.where(k < before[one], left[one] + k, behind[one] + k - before[one])  # from the box's left edge
        inside = (k + x[one] >= 0) & (k + x[one] < width)
        one, k = one[inside], k[inside]
        target = (pages[one] * width + x[one] + k).long()[:, None].expand(-1, strips.shape[1])
        strips.scatter_reduce_(0, target, self.columns.index_select(0, first[one] - offsets[one] + k), "amax")
        return strips.view(count, width, -1)


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Item i ``counts[i]`` times over: its number, and which repetition it is; int32 ``[sum of counts]`` each."""
    item = torch.repeat_interleave(counts)
    start = counts.cumsum(0, dtype=torch.int32) - counts
    return item, torch.arange(len(item), dtype=torch.int32, device=counts.device) - start.index_select(0, item)
