"""Text -> which glyph stands where. Pure, on the CPU, vectorised; knows nothing about pixels."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np

from vist_rag.rendering.glyphs import BOX, GlyphAtlas

_SPACE = ord(" ")


@dataclass(frozen=True)
class Line:
    """One text, set as glyphs and cut into pages.

    Attributes:
        glyphs: Glyph ids in reading order, int32 ``[g]``.
        x: Left edge of each glyph on its own page, in px, int32 ``[g]``.
        page: Page of each glyph, counted from 0 in this text, int32 ``[g]``.
        chars: Character of the original text that each glyph shows (the first, where it shows several), int64 ``[g]``.
        char_ends: End of what each glyph shows, int64 ``[g]``.
        widths: Inked width of each page in px, int32 ``[p]``; at least one page, also for an empty text.
        uncovered: Glyphs that are boxes because the atlas has no glyph for them.
    """

    glyphs: np.ndarray
    x: np.ndarray
    page: np.ndarray
    chars: np.ndarray
    char_ends: np.ndarray
    widths: np.ndarray
    uncovered: int


def set_line(text: str, atlas: GlyphAtlas, page_width_px: int) -> Line:
    """Set one text.

    White space of any kind and length (tabs and newlines too) is one space; control characters, zero-width
    characters, direction marks and variation selectors show nothing and take no room; everything else is a glyph or a
    box. Text is composed (NFC) first. A page breaks at the last space that fits, or inside a word longer than a page.
    """
    codepoints, starts, ends = _composed(text)
    keep, codepoints = _visible(codepoints)
    codepoints, starts, ends = codepoints[keep], starts[keep], ends[keep]
    glyphs = atlas.lookup(codepoints)
    return _paginate(glyphs, atlas.advances[glyphs], codepoints == _SPACE, starts, ends, page_width_px)


def _composed(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code points in NFC, with the span of the original text that each comes from."""
    if unicodedata.is_normalized("NFC", text):
        codepoints = _codepoints(text)
        starts = np.arange(len(codepoints), dtype=np.int64)
        return codepoints, starts, starts + 1
    # Compose cluster by cluster (a starter and what combines with it), so that each part knows where it came from.
    pieces, starts_list, ends_list = [], [], []
    begin = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or (unicodedata.combining(text[i]) == 0 and not 0x1160 <= ord(text[i]) <= 0x11FF):
            piece = unicodedata.normalize("NFC", text[begin:i])
            pieces.append(piece)
            starts_list += [begin] * len(piece)
            ends_list += [i] * len(piece)
            begin = i
    return _codepoints("".join(pieces)), np.array(starts_list, np.int64), np.array(ends_list, np.int64)


def _codepoints(text: str) -> np.ndarray:
    # surrogatepass: a lone surrogate is a code point without a glyph, so it is drawn as a box, not a crash.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def _visible(codepoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which code points take room, and the code points with every white space turned into U+0020."""
    unique, inverse = np.unique(codepoints, return_inverse=True)
    white = np.array([chr(c).isspace() for c in unique], bool)
    hidden = np.array(
        [
            not chr(c).isspace()
            and (unicodedata.category(chr(c)) in ("Cc", "Cf") or 0xFE00 <= c < 0xFE10 or 0xE0100 <= c < 0xE01F0)
            for c in unique
        ],
        bool,
    )
    if len(codepoints) == 0:
        return np.zeros(0, bool), codepoints
    is_white, is_hidden = white[inverse], hidden[inverse]
    codepoints = np.where(is_white, _SPACE, codepoints)
    shown = np.flatnonzero(~is_hidden)
    keep = np.zeros(len(codepoints), bool)
    # A space is kept only after something that is not a space: runs collapse, and no page starts blank.
    spaces = is_white[shown]
    keep[shown] = ~spaces | np.concatenate(([False], ~spaces[:-1]))
    return keep, codepoints


def _paginate(
    glyphs: np.ndarray,
    advances: np.ndarray,
    is_space: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    page_width_px: int,
) -> Line:
    edges = np.concatenate(([0], np.cumsum(advances, dtype=np.int64)))
    cuts = [0]
    while edges[-1] - edges[cuts[-1]] > page_width_px:
        first = cuts[-1]
        last = int(np.searchsorted(edges, edges[first] + page_width_px, side="right")) - 1  # glyphs first..last-1 fit
        spaces = np.flatnonzero(is_space[first:last])
        cuts.append(first + int(spaces[-1]) + 1 if len(spaces) else max(last, first + 1))
    page = np.zeros(len(glyphs), np.int32)
    page[[c for c in cuts[1:] if c < len(glyphs)]] = 1
    page = np.cumsum(page, dtype=np.int32)
    x = (edges[:-1] - edges[np.array(cuts)][page]).astype(np.int32)
    widths = np.zeros(len(cuts), np.int32)
    np.maximum.at(widths, page, x + advances.astype(np.int32))
    return Line(glyphs, x, page, starts, ends, widths, int((glyphs == BOX).sum()))
