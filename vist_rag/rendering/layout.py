"""Texts -> which glyph stands where. Pure, on the CPU, vectorised over texts; knows nothing about pixels."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vist_rag.errors import ConfigError
from vist_rag.rendering.typeface import BOX, Glyphs, Typeface

_SPACE = ord(" ")
_LONGEST_CLUSTER = 32
"""Code points that are composed together at most (UAX #15, stream-safe text: 30 marks on one base): composing is
quadratic in the length of a run of marks."""

# What is known of a code point, looked up once a process and kept in one table.
_WHITE, _HIDDEN, _JOINER, _MARK, _RECOMPOSED, _UNKNOWN = 1, 2, 4, 8, 16, 255
_KNOWN = np.full(0x110000, _UNKNOWN, np.uint8)

_JOINERS = (0x034F, 0x180B, 0x180C, 0x180D, 0x180F, 0x200C, 0x200D)
_IGNORABLE_LETTERS = (0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0)
_VISIBLE_FORMATS = (*range(0x0600, 0x0606), 0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x110BD, 0x110CD)


@dataclass(frozen=True)
class Lines:
    """Texts, set as glyphs and cut into pages.

    Attributes:
        glyphs: Glyph ids, page by page, from left to right, int32 ``[g]``.
        x: Left edge of each glyph's box on its own page, in px, int32 ``[g]``.
        advances: Width of each glyph's box in px, int32 ``[g]``; the boxes of a page touch and do not overlap.
        offsets: Pixels from the left edge of the box to the glyph's origin, int32 ``[g]``.
        pages: Page of each glyph, counted over all texts, int64 ``[g]``; ascending.
        boxes: What each glyph covers of its page in px, start and end, int32 ``[g, 2]``: its box, or its ink where
            the box has no width (combining marks).
        chars: Characters of its original text that each glyph shows, start and end, int64 ``[g, 2]``.
        widths: Width of the text on each page in px, int32 ``[p]``; every text has at least one page.
        text_ids: Text of each page, int64 ``[p]``.
        coverage: Share of each text's glyphs that are no boxes for want of a glyph, float32 ``[t]``.
    """

    glyphs: np.ndarray
    x: np.ndarray
    advances: np.ndarray
    offsets: np.ndarray
    pages: np.ndarray
    boxes: np.ndarray
    chars: np.ndarray
    widths: np.ndarray
    text_ids: np.ndarray
    coverage: np.ndarray


def set_lines(texts: Sequence[str], typeface: Typeface, page_width_px: int) -> Lines:
    """Set texts, each from the start of a page.

    Text is composed (NFC). White space of any kind and length (tabs and newlines too) is one space; at the start of a
    text it is nothing. Control characters, zero-width characters, direction marks and variation selectors show nothing
    and take no room. Everything else is a glyph or a box. A page breaks at the last space that fits, or inside a word
    that is longer than a page, never between a letter and its marks.

    Raises:
        ConfigError: If a glyph is wider than a page.
    """
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts], dtype=np.int64)))
    # surrogatepass: a lone surrogate is a code point without a glyph, so it is drawn as a box, not a crash.
    encoded = "".join(texts).encode("utf-32-le", "surrogatepass")
    codepoints, chars, bounds = _composed(np.frombuffer(encoded, "<u4").astype(np.int64), offsets)
    codepoints, chars, bounds = _visible(codepoints, chars, bounds, joiners=typeface.reads_joiners)

    glyphs = typeface.shape(codepoints, bounds)
    chars = np.stack((chars[glyphs.clusters, 0], chars[glyphs.cluster_ends - 1, 1]), axis=1)
    bounds = np.searchsorted(glyphs.clusters, bounds)  # from code points to glyphs
    uncovered = np.diff(np.concatenate(([0], np.cumsum(glyphs.ids == BOX)))[bounds])
    left, right = typeface.pictures.left, typeface.pictures.right
    glyphs = _grounded(glyphs, bounds, left, right)

    starts, text_ids = _page_starts(glyphs, codepoints[glyphs.clusters] == _SPACE, chars, bounds, page_width_px)
    ends = np.concatenate((starts[1:], bounds[-1:]))
    pages = np.repeat(np.arange(len(starts)), ends - starts)
    order = _visual_order(glyphs.levels, pages)
    ids, advances, shifts = glyphs.ids[order], glyphs.advances[order], glyphs.offsets[order]
    edges = np.concatenate(([0], np.cumsum(advances, dtype=np.int64)))
    x = (edges[:-1] - edges[starts][pages]).astype(np.int32)
    boxes = np.stack((x, x + advances), axis=1)
    thin = np.flatnonzero(advances == 0)
    ink = x[thin, None] + shifts[thin, None] + np.stack((left[ids[thin]], right[ids[thin]]), axis=1)
    boxes[thin] = np.where(ink[:, :1] < ink[:, 1:], ink, x[thin, None]).clip(0, page_width_px)
    widths = (edges[ends] - edges[starts]).astype(np.int32)
    np.maximum.at(widths, pages[thin], boxes[thin, 1])
    origins = offsets[text_ids[pages]]
    return Lines(
        glyphs=ids,
        x=x,
        advances=advances,
        offsets=shifts,
        pages=pages,
        boxes=boxes,
        chars=chars[order] - origins[:, None],
        widths=widths,
        text_ids=text_ids,
        coverage=(1 - uncovered / np.diff(bounds).clip(min=1)).astype(np.float32),
    )


def patch_spans(lines: Lines, patch_px: int, patches: int) -> np.ndarray:
    """Characters that each patch shows, int64 ``[p, patches, 2]``; 0, 0 where it shows none.

    A glyph belongs to every patch that its box touches.
    """
    starts = np.full(len(lines.widths) * patches, np.iinfo(np.int64).max)
    ends = np.zeros(len(lines.widths) * patches, np.int64)
    first = lines.boxes[:, 0] // patch_px
    last = np.minimum((np.maximum(lines.boxes[:, 1], lines.boxes[:, 0] + 1) - 1) // patch_px, patches - 1)
    first = np.minimum(first, last) + lines.pages * patches
    last = last + lines.pages * patches
    chars = lines.chars
    while len(first):
        np.minimum.at(starts, first, chars[:, 0])
        np.maximum.at(ends, first, chars[:, 1])
        more = np.flatnonzero(first < last)
        first, last, chars = first[more] + 1, last[more], chars[more]
    spans = np.stack((np.minimum(starts, ends), ends), axis=1)
    return spans.reshape(len(lines.widths), patches, 2)


def _known(codepoints: np.ndarray) -> np.ndarray:
    """Flags of code points, uint8 of the same shape."""
    flags: np.ndarray = _KNOWN[codepoints]
    new = np.unique(codepoints[flags == _UNKNOWN])
    if len(new):
        _KNOWN[new] = [_flags(int(c)) for c in new]
        flags = _KNOWN[codepoints]
    return flags


def _flags(c: int) -> int:
    char, category = chr(c), unicodedata.category(chr(c))
    if char.isspace():
        return _WHITE
    joiner = c in _JOINERS or 0xFE00 <= c < 0xFE10 or 0xE0100 <= c < 0xE01F0
    hidden = joiner or c in _IGNORABLE_LETTERS or (category in ("Cc", "Cf") and c not in _VISIBLE_FORMATS)
    # What may compose with what stands before it: marks, the vowels and finals of Hangul, vowel signs of Kirat Rai.
    mark = category[0] == "M" or 0x1160 <= c < 0x1200 or 0xD7B0 <= c < 0xD800 or 0x16D63 <= c < 0x16D6B
    recomposed = unicodedata.normalize("NFC", char) != char
    return _HIDDEN * hidden | _JOINER * joiner | _MARK * mark | _RECOMPOSED * recomposed


def _composed(codepoints: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code points in NFC, the characters that each comes from (start and end, ``[c, 2]``), and the new bounds.

    Composes cluster by cluster (a letter and the marks on it), so that each part knows where it came from.
    """
    n = len(codepoints)
    flags = _known(codepoints)
    if not (flags & (_MARK | _RECOMPOSED)).any():
        return codepoints, np.arange(n)[:, None] + [0, 1], bounds
    begins = (flags & _MARK) == 0
    begins[bounds[bounds < n]] = True
    first = np.flatnonzero(begins)
    since = np.arange(n) - first[np.cumsum(begins) - 1]
    first = np.flatnonzero(since % _LONGEST_CLUSTER == 0)
    last = np.append(first[1:], n)

    sizes = last - first
    open_ = np.flatnonzero((sizes > 1) | ((flags[first] & _RECOMPOSED) > 0))
    pieces = [
        unicodedata.normalize("NFC", "".join(map(chr, codepoints[a:b].tolist())))
        for a, b in zip(first[open_].tolist(), last[open_].tolist(), strict=True)
    ]
    sizes[open_] = [len(piece) for piece in pieces]
    cluster = np.repeat(np.arange(len(first)), sizes)
    composed = codepoints[first][cluster]
    is_open = np.zeros(len(first), bool)
    is_open[open_] = True
    composed[is_open[cluster]] = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), "<u4")
    edges = np.concatenate(([0], np.cumsum(sizes)))
    return composed, np.stack((first, last), axis=1)[cluster], edges[np.searchsorted(first, bounds)]


def _visible(
    codepoints: np.ndarray, chars: np.ndarray, bounds: np.ndarray, *, joiners: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What takes room (and joiners, where wanted), with every white space turned into U+0020; and the new bounds."""
    flags = _known(codepoints)
    white = (flags & _WHITE) > 0
    hidden = (flags & _HIDDEN) > 0
    if joiners:
        hidden &= (flags & _JOINER) == 0
    shown = np.flatnonzero(~hidden)
    bounds = np.searchsorted(shown, bounds)
    # A space is kept only after something that is not a space: runs collapse, and no text starts blank.
    spaces = white[shown]
    keep = np.concatenate(([True], ~spaces[:-1]))[: len(spaces)]
    keep[bounds[bounds < len(spaces)]] = False
    keep |= ~spaces
    kept = shown[keep]
    bounds = np.concatenate(([0], np.cumsum(keep)))[bounds]
    return np.where(white[kept], _SPACE, codepoints[kept]), chars[kept], bounds


def _grounded(glyphs: Glyphs, bounds: np.ndarray, left: np.ndarray, right: np.ndarray) -> Glyphs:
    """Give room to marks at the start of a text, which would reach back over the page's edge."""
    some = bounds[:-1] < bounds[1:]
    begins, ends = bounds[:-1][some], bounds[1:][some]
    bare = glyphs.advances[begins] == 0
    if not bare.any():
        return glyphs
    advances, offsets = glyphs.advances.copy(), glyphs.offsets.copy()
    for begin, end in zip(begins[bare].tolist(), ends[bare].tolist(), strict=True):
        marks = slice(begin, begin + int((np.append(advances[begin:end], 1) > 0).argmax()))
        ids = glyphs.ids[marks]
        offsets[marks], advances[marks] = -left[ids], right[ids] - left[ids]
    return Glyphs(glyphs.ids, advances, offsets, glyphs.clusters, glyphs.cluster_ends, glyphs.levels)


def _page_starts(
    glyphs: Glyphs, is_space: np.ndarray, chars: np.ndarray, bounds: np.ndarray, page_width_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """First glyph of every page, and the text that it belongs to."""
    widest = int(glyphs.advances.max(initial=0))
    if widest > page_width_px:
        raise ConfigError(
            f"tower_size_px must make pages of {widest} px or more (the widest glyph), got {page_width_px} px; "
            "raise tower_size_px or lower font_size_px."
        )
    edges = np.concatenate(([0], np.cumsum(glyphs.advances, dtype=np.int64)))
    long = np.flatnonzero(np.diff(edges[bounds]) > page_width_px)
    if not len(long):
        return bounds[:-1], np.arange(len(bounds) - 1)
    # Where a page may begin: with a new cluster that does not reach back; best of all after a space.
    n = len(is_space)
    fresh = np.ones(n + 1, bool)
    fresh[1:n] = (chars[1:, 0] != chars[:-1, 0]) & (glyphs.advances[1:] > 0)
    places = np.arange(n + 1)
    any_break = np.maximum.accumulate(np.where(fresh, places, 0))
    good_break = np.maximum.accumulate(np.where(fresh & np.concatenate(([False], is_space)), places, 0))
    cuts, counts = [bounds[:-1]], np.ones(len(bounds) - 1, np.int64)
    for text in long.tolist():
        first, end, mine = int(bounds[text]), int(bounds[text + 1]), []
        while edges[end] - edges[first] > page_width_px:
            fits = int(np.searchsorted(edges, edges[first] + page_width_px, side="right")) - 1  # first..fits-1 fit
            cut = int(good_break[fits])
            if cut <= first:
                cut = int(any_break[fits])
            first = cut if cut > first else fits
            mine.append(first)
        cuts.append(np.array(mine, np.int64))
        counts[text] += len(mine)
    return np.sort(np.concatenate(cuts)), np.repeat(np.arange(len(counts)), counts)


def _visual_order(levels: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Glyphs from left to right: what runs right to left is turned around, page by page (UAX #9, rule L2)."""
    order = np.arange(len(levels))
    for level in range(int(levels.max(initial=0)), 0, -1):
        turned = levels[order] >= level
        begins = np.ones(len(order), bool)
        begins[1:] = (turned[1:] != turned[:-1]) | (pages[1:] != pages[:-1])
        first = np.flatnonzero(begins)
        run = np.cumsum(begins) - 1
        mirrored = first[run] + np.append(first[1:], len(order))[run] - 1 - np.arange(len(order))
        order = order[np.where(turned, mirrored, np.arange(len(order)))]
    return order
