"""Layout against a reference that goes character by character."""

from __future__ import annotations

import time
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vist_rag.errors import ConfigError
from vist_rag.rendering import GlyphAtlas
from vist_rag.rendering.layout import Lines, patch_spans, set_lines

WIDTH, PATCH = 112, 14
HIDDEN = "\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2066\u2069\ufeff\u00ad\u034f\ufe0f\x00\x1b\x7f\U000e0100"
ODD = (
    " \t\n\r\u00a0\u2028\u3000\x1f"
    + HIDDEN
    + "\u0301\u0323\u0327\u0308\u0488\ud83d\udfff\U0001f600中한각\u1100\u1161\u11a8\u212b\u2126\u0958\u0344"
)
TEXTS = st.text(
    st.one_of(st.sampled_from("abcdefij WMÅé.,"), st.sampled_from(ODD), st.characters(codec=None)), max_size=60
)


def is_hidden(char: str) -> bool:
    """What Unicode calls default-ignorable, and controls; but not the signs that stand in front of a number."""
    return not char.isspace() and (
        (
            unicodedata.category(char) in ("Cc", "Cf")
            and char not in "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
        )
        or char in "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
        or 0xFE00 <= ord(char) <= 0xFE0F
        or 0xE0100 <= ord(char) <= 0xE01EF
    )


def visible(char: str) -> bool:
    return not char.isspace() and not is_hidden(char)


def reference(text: str, atlas: GlyphAtlas, width: int) -> tuple[list[list[tuple[int, int, int, int]]], int]:
    """Pages of (glyph, x, first character, end), and the number of boxes; one character at a time."""
    clusters: list[list[int]] = []
    for i, char in enumerate(text):
        joins = unicodedata.category(char)[0] == "M" or 0x1160 <= ord(char) <= 0x11FF or 0xD7B0 <= ord(char) <= 0xD7FF
        if i and joins and clusters[-1][1] - clusters[-1][0] < 32:
            clusters[-1][1] = i + 1
        else:
            clusters.append([i, i + 1])
    items: list[tuple[int, int, int]] = []
    for first, end in clusters:
        for char in unicodedata.normalize("NFC", text[first:end]):
            if is_hidden(char):
                continue
            char = " " if char.isspace() else char
            if char == " " and (not items or items[-1][0] == ord(" ")):
                continue
            items.append((ord(char), first, end))
    glyph_of = dict(zip(atlas.codepoints.tolist(), atlas.glyph_ids.tolist(), strict=True))
    ids = [glyph_of.get(c, 0) for c, _, _ in items]
    advances = [int(atlas.advances[g]) for g in ids]
    for i, g in enumerate(ids):
        if advances[i] != 0:
            break
        advances[i] = int(atlas.pictures.right[g] - atlas.pictures.left[g])
    pages: list[list[tuple[int, int, int, int]]] = [[]]
    first = 0
    while True:
        total, end = 0, first
        while end < len(items) and total + advances[end] <= width:
            total += advances[end]
            end += 1
        if end < len(items):
            for cut in range(end, first, -1):
                if items[cut - 1][0] == ord(" ") and advances[cut] > 0 and items[cut][1] != items[cut - 1][1]:
                    end = cut
                    break
            else:
                for cut in range(end, first, -1):
                    if advances[cut] > 0 and items[cut][1] != items[cut - 1][1]:
                        end = cut
                        break
        x = 0
        for i in range(first, end):
            pages[-1].append((ids[i], x, items[i][1], items[i][2]))
            x += advances[i]
        if end == len(items):
            return pages, sum(g == 0 for g in ids)
        pages.append([])
        first = end


def as_pages(lines: Lines) -> list[list[tuple[int, int, int, int]]]:
    pages: list[list[tuple[int, int, int, int]]] = [[] for _ in lines.widths]
    for page, glyph, x, (first, end) in zip(
        lines.pages.tolist(), lines.glyphs.tolist(), lines.x.tolist(), lines.chars.tolist(), strict=True
    ):
        pages[page].append((glyph, x, first, end))
    return pages


@settings(max_examples=250, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text="\n\t ")
@example(text="\u0301\u0301a")
@example(text="word " * 8 + "x" * 60 + " \u0301y")
@example(text="a" + "\u0301" * 70 + "b")
@example(text="\ud83d\ude00")
@example(text="\u03001\u0478")  # a bare mark, then a letter that is narrower than the next one
@example(text="x" + "\u0958" * 20)  # a letter and its dot, two boxes each, that a page's edge would part
def test_same_as_one_character_at_a_time(text: str, atlas: GlyphAtlas) -> None:
    lines = set_lines([text], atlas, WIDTH)
    pages, boxes = reference(text, atlas, WIDTH)
    assert as_pages(lines) == pages
    glyphs = sum(map(len, pages))
    assert lines.coverage.tolist() == [pytest.approx(1 - boxes / max(1, glyphs))]


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_every_visible_character_is_in_a_span_on_the_mask(text: str, atlas: GlyphAtlas) -> None:
    lines = set_lines([text], atlas, WIDTH)
    spans = patch_spans(lines, PATCH, WIDTH // PATCH)
    assert spans.shape == (len(lines.widths), WIDTH // PATCH, 2)
    shown: set[int] = set()
    for page, width in enumerate(lines.widths.tolist()):
        for patch, (first, end) in enumerate(spans[page].tolist()):
            assert 0 <= first <= end <= len(text)
            assert first == end or patch * PATCH < max(width, 1)
            shown.update(range(first, end))
    assert [i for i, char in enumerate(text) if visible(char) and i not in shown] == []


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_a_batch_is_its_texts_one_by_one(texts: list[str], atlas: GlyphAtlas) -> None:
    together = set_lines(texts, atlas, WIDTH)
    alone = [set_lines([text], atlas, WIDTH) for text in texts]
    for name in ("glyphs", "x", "advances", "offsets", "boxes", "chars", "widths", "coverage"):
        pieces = [getattr(line, name) for line in alone]
        expected = np.concatenate(pieces) if pieces else getattr(together, name)[:0]
        np.testing.assert_array_equal(getattr(together, name), expected, err_msg=name)
    assert together.text_ids.tolist() == [i for i, line in enumerate(alone) for _ in line.widths]


def test_spans_name_the_characters_of_each_patch(atlas: GlyphAtlas) -> None:
    text = "e\u0301\u200b\t\n W"  # a composed letter, nothing, white space, a wide letter
    lines = set_lines([text], atlas, WIDTH)
    advance = dict(zip(atlas.codepoints.tolist(), atlas.advances[atlas.glyph_ids].tolist(), strict=True))
    letter, space, wide = advance[0xE9], advance[0x20], advance[ord("W")]
    assert lines.x.tolist() == [0, letter, letter + space]
    assert lines.chars.tolist() == [[0, 2], [3, 4], [6, 7]]
    assert lines.widths.tolist() == [letter + space + wide]
    assert letter + space < PATCH < letter + space + wide < 2 * PATCH
    assert patch_spans(lines, PATCH, 8)[0].tolist() == [[0, 7], [6, 7]] + [[0, 0]] * 6


def test_format_characters_that_show_something_are_kept(atlas: GlyphAtlas) -> None:
    """U+0600 and U+06DD are drawn around a number; a soft hyphen and a byte order mark are not drawn."""
    lines = set_lines(["\u0600", "\u06dd1", "\u00ad", "\ufeffa"], atlas, WIDTH)
    assert lines.text_ids[lines.pages].tolist() == [0, 1, 1, 3]
    assert lines.coverage.tolist() == [0, 0.5, 1, 1]


def test_pages_break_at_spaces_and_inside_long_words(atlas: GlyphAtlas) -> None:
    text = "river bridge " + "m" * 30 + " end"
    lines = set_lines([text], atlas, WIDTH)
    parts = [text[page[0][2] : page[-1][3]] for page in as_pages(lines)]
    assert "".join(parts) == text
    assert parts[0] == "river bridge "
    assert set(parts[1]) == {"m"}
    assert parts[-1].endswith("end")
    assert (lines.widths <= WIDTH).all()


def test_marks_stay_with_their_letter_and_on_the_page(atlas: GlyphAtlas) -> None:
    for text in ("x\u0301" * 60, "word \u0301" * 20, "word \u200b\u0301" * 20, "\u0301" * 5 + "x"):
        lines = set_lines([text], atlas, WIDTH)
        assert len(lines.widths) == 1 or lines.advances[np.flatnonzero(np.diff(lines.pages)) + 1].min() > 0
        marks = np.flatnonzero(lines.glyphs == atlas.lookup(np.array([0x301]))[0])
        assert len(marks) == text.count("\u0301")
        ink = lines.x[marks] + lines.offsets[marks] + atlas.pictures.left[lines.glyphs[marks]]
        assert (ink >= 0).all()


def test_a_mark_that_reaches_over_the_end_is_on_the_mask(atlas: GlyphAtlas) -> None:
    lines = set_lines(["i\u0488"], atlas, WIDTH)
    letter, mark = lines.glyphs.tolist()
    reach = int(atlas.advances[letter] + atlas.pictures.right[mark])
    assert lines.widths.tolist() == [reach]
    assert reach > atlas.advances[letter]
    assert lines.boxes[1].tolist() == [max(0, int(atlas.advances[letter] + atlas.pictures.left[mark])), reach]


def test_composes_as_unicode_does(atlas: GlyphAtlas) -> None:
    """Every code point that composes with what stands before it is taken together with it."""
    pairs = []
    for c in range(0x110000):
        parts = unicodedata.decomposition(chr(c)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            pairs.append("".join(chr(int(part, 16)) for part in parts))
    assert len(pairs) > 1000
    lines = set_lines(pairs, atlas, WIDTH)
    apart = {pairs[text] for text in lines.text_ids[lines.pages[(lines.chars != [0, 2]).any(axis=1)]]}
    assert apart == set()


def test_a_megabyte_takes_seconds(atlas: GlyphAtlas) -> None:
    start = time.perf_counter()
    prose = set_lines(["The river runs from a lake to the sea. " * 26_000], atlas, 3584)
    marks = set_lines(["a" + "\u0301\u0323" * 250_000], atlas, 3584)
    seconds = time.perf_counter() - start
    assert prose.widths.sum() == prose.advances.sum() > 1_000_000
    assert len(marks.glyphs) >= 500_000 - 32
    assert seconds < 60, f"{seconds:.1f} s; composing is quadratic in the length of a run of marks unless it is cut"


def test_a_glyph_wider_than_a_page_is_refused(atlas: GlyphAtlas) -> None:
    with pytest.raises(ConfigError, match="the widest glyph"):
        set_lines(["a\U0001f600W"], atlas, 7)
