"""The raster against a loop over glyphs and pixels."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vist_rag.rendering import GlyphAtlas
from vist_rag.rendering.raster import Sheet
from vist_rag.rendering.typeface import Pictures


def draw_slowly(pictures: Pictures, glyphs: list[tuple[int, int, int, int]], pages: int, width: int) -> np.ndarray:
    """Glyphs are (page, x, offset, id): each lays all of its ink on its page, the darker pixel wins."""
    ink = pictures.ink.numpy()
    strips = np.zeros((pages, width, ink.shape[1]), np.uint8)
    for page, x, offset, glyph in glyphs:
        for column in range(ink.shape[2]):
            at = x + offset + column - pictures.origin
            if 0 <= at < width:
                strips[page, at] = np.maximum(strips[page, at], ink[glyph, :, column])
    return strips


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_same_as_pixel_by_pixel(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    count, cell, origin = 6, 9, int(rng.integers(0, 5))
    ink = rng.integers(0, 256, (count, 4, cell)).astype(np.uint8)
    ink[rng.random((count, 4, cell)) < 0.5] = 0
    ink[0] = 0
    pictures = Pictures.of(torch.from_numpy(ink), origin)
    pages, width = 3, 24
    glyphs, advances = [], []
    for page in range(pages):
        x = 0
        while x < width and rng.random() < 0.9:
            advance = int(rng.integers(0, min(12, width - x) + 1))
            glyphs.append((page, x, int(rng.integers(-4, 5)), int(rng.integers(count))))
            advances.append(advance)
            x += advance
    columns = [[row[i] for row in glyphs] for i in range(4)]
    page_of, x_of, offsets, ids = (torch.tensor(column, dtype=torch.int32) for column in columns)
    sheet = Sheet.of(pictures, torch.device("cpu"))
    drawn = sheet.draw(ids, x_of, torch.tensor(advances, dtype=torch.int32), offsets, page_of, (pages, width))
    np.testing.assert_array_equal(drawn.numpy(), draw_slowly(pictures, glyphs, pages, width))


def test_extents_are_the_inked_columns(atlas: GlyphAtlas) -> None:
    ink, pictures = atlas.ink.numpy(), atlas.pictures
    for glyph in range(0, len(ink), 13):
        columns = [c for c in range(ink.shape[2]) if ink[glyph, :, c].any()]
        expected = (columns[0] - atlas.origin, columns[-1] + 1 - atlas.origin) if columns else (0, 0)
        assert (pictures.left[glyph], pictures.right[glyph]) == expected


def test_a_third_mark_on_a_letter_is_drawn(atlas: GlyphAtlas) -> None:
    ids = torch.from_numpy(atlas.lookup(np.array([ord("x"), 0x301, 0x323, 0x327, 0x30A]))).int()
    advances = torch.from_numpy(atlas.advances[ids.numpy()])
    x = (advances.cumsum(0) - advances).int()
    none = torch.zeros_like(ids)
    strip = Sheet.of(atlas.pictures, torch.device("cpu")).draw(ids, x, advances, none, none, (1, 28))
    glyphs = [(0, int(left), 0, int(glyph)) for left, glyph in zip(x, ids, strict=True)]
    np.testing.assert_array_equal(strip.numpy(), draw_slowly(atlas.pictures, glyphs, 1, 28))
    without = draw_slowly(atlas.pictures, glyphs[:-1], 1, 28)
    assert (strip.numpy() != without).any()
