"""Shaping: a font of rectangles built here, and Noto where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vist_rag.config import RendererConfig
from vist_rag.errors import InputError, MissingDependencyError
from vist_rag.rendering import GlyphAtlas, Renderer, ShapedFont
from vist_rag.rendering.layout import Lines, patch_spans, set_lines
from vist_rag.rendering.shaping import embedding_levels

pytest.importorskip("uharfbuzz", reason="needs uharfbuzz")
pytest.importorskip("freetype", reason="needs freetype-py")

NOTO = Path("/usr/share/fonts/truetype/noto")  # where Debian's fonts-noto-core puts it
RAW = RendererConfig(channels=1, normalize="none")
ALEF, BEH = "\u0627", "\u0628"


def strip(font: ShapedFont, text: str) -> tuple[np.ndarray, Lines]:
    """Ink of the first 10 patches, uint8 [14, 140], and the layout."""
    ink = 255 - Renderer(font, RAW).render([text]).pixel_values[0, 0, :14, :140].mul(255).round()
    return ink.to(torch.uint8).numpy(), set_lines([text], font, 3584)


def columns(strip: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, rows) of what stands apart on a strip of rectangles: darkest rows of each run of inked columns."""
    inked = np.concatenate(([False], strip.any(axis=0), [False]))
    edges = np.flatnonzero(inked[1:] != inked[:-1])
    return [(int(a), int(b), int((strip[:, a:b] > 127).any(axis=1).sum())) for a, b in edges.reshape(-1, 2)]


def test_a_ligature_is_one_glyph_of_two_characters(font_path: Path) -> None:
    ink, lines = strip(ShapedFont(font_path), "a ab b")
    assert lines.chars.tolist() == [[0, 1], [1, 2], [2, 4], [4, 5], [5, 6]]
    assert lines.advances.tolist() == [6, 3, 10, 3, 6]
    assert columns(ink) == [(1, 5, 5), (10, 18, 3), (23, 27, 8)]


def test_right_to_left_is_visual_order(font_path: Path) -> None:
    """In `beh beh alef` the first beh is an initial form and stands rightmost."""
    ink, lines = strip(ShapedFont(font_path), BEH + BEH + ALEF)
    assert lines.chars.tolist() == [[2, 3], [1, 2], [0, 1]]
    assert lines.advances.tolist() == [3, 8, 4]
    assert columns(ink) == [(1, 2, 8), (3, 15, 3)]


def test_left_to_right_inside_right_to_left(font_path: Path) -> None:
    _, lines = strip(ShapedFont(font_path), f"{BEH} af {ALEF}")
    assert lines.chars[:, 0].tolist() == [5, 4, 2, 3, 1, 0]


def test_a_mark_is_placed_on_its_letter(font_path: Path) -> None:
    """The mark's anchor lies 300 units above where it is drawn by itself: three rows."""
    font = ShapedFont(font_path)
    placed, lines = strip(font, "b\u0301")
    assert lines.chars.tolist() == [[0, 2], [0, 2]]
    assert lines.advances.tolist() == [6, 0]
    alone, _ = strip(font, "b")
    mark = np.argwhere(placed != alone)
    assert mark[:, 1].min() == 2
    assert mark[:, 1].max() == 3
    assert mark[:, 0].max() - mark[:, 0].min() == 1


def test_ink_above_the_strip_is_moved_in(font_path: Path) -> None:
    """At 14 px the mark on b would stand 15 rows above the baseline, in a strip of 14."""
    font = ShapedFont(font_path, size_px=14)
    mark = set_lines(["b\u0301"], font, 3584).glyphs[1]
    alone = set_lines(["\u0301"], font, 3584).glyphs[0]
    ink = font.pictures.ink
    assert mark != alone
    assert ink[mark].sum() == ink[alone].sum() > 0
    assert (ink[mark].amax(1) > 0).nonzero().flatten().tolist() == [0, 1, 2]


def test_levels_follow_the_bidirectional_algorithm() -> None:
    cases = {
        "abc def": "0000000",
        "abc 123": "0000000",
        f"a {BEH}{ALEF} b": "001100",
        f"{BEH} abc {ALEF}": "1122211",
        f"{BEH} 1,234 {ALEF}": "112222211",
        f"{BEH} 50% {ALEF}": "1122211",
        f"{BEH}, {ALEF}": "1111",
        f"a {BEH} 12 {ALEF} b": "0011221100",
        f"a {BEH}. b": "001000",
        f"a 1 {BEH}": "00001",
        f"{BEH}\u0301 1": "1112",
        "": "",
    }
    for text, levels in cases.items():
        assert "".join(map(str, embedding_levels(text))) == levels, ascii(text)


def test_pages_of_right_to_left_text_come_in_reading_order(font_path: Path) -> None:
    text = " ".join([BEH * 3 + ALEF] * 12)
    font = ShapedFont(font_path)
    lines = set_lines([text], font, 112)
    shown = []
    for page in range(len(lines.widths)):
        chars = lines.chars[lines.pages == page]
        assert (np.diff(chars[:, 0]) < 0).all()  # from right to left
        shown += sorted(chars[:, 0].tolist())
        assert text[shown[-1]] == " " or shown[-1] == len(text) - 1
    assert shown == list(range(len(text)))
    assert (lines.widths <= 112).all()


def test_latin_letters_are_the_atlas_ones(font_path: Path) -> None:
    """Without ligatures and marks, shaping changes nothing."""
    atlas = GlyphAtlas.from_font(font_path, ranges=[(0x20, 0x7F)])
    text = "bba faf b fb " * 30 + "\n zz"
    shaped, plain = Renderer(ShapedFont(font_path), RAW).render([text]), Renderer(atlas, RAW).render([text])
    assert torch.equal(shaped.pixel_values, plain.pixel_values)
    assert torch.equal(shaped.char_spans, plain.char_spans)
    assert shaped.coverage.tolist() == plain.coverage.tolist()
    assert shaped.coverage[0] < 1


def test_spaces_stay_in_the_font_of_what_stands_before_them(font_path: Path, tmp_path: Path) -> None:
    from fontTools.ttLib import TTFont

    other = TTFont(font_path)
    for table in other["cmap"].tables:
        table.cmap = {0x20: "space", 0x63: "b"}
    other["hmtx"]["space"] = (500, 0)
    other.save(tmp_path / "other.ttf")
    lines = set_lines(["a c c a"], ShapedFont([font_path, tmp_path / "other.ttf"]), 3584)
    assert lines.advances.tolist() == [6, 3, 6, 5, 6, 5, 6]
    assert lines.coverage.tolist() == [1]


def test_the_atlas_grows_and_ids_stay(font_path: Path) -> None:
    font = ShapedFont(font_path)
    renderer = Renderer(font, RAW)
    first = renderer.render(["a"])
    known = font.pictures
    assert len(known.ink) == 2  # the box and a
    renderer.render(["fbb\u0301" + BEH])
    grown = font.pictures
    assert len(grown.ink) == 6  # f, b, the mark, beh
    assert (grown.left[:2] == known.left).all()
    assert torch.equal(renderer.render(["a"]).pixel_values, first.pixel_values)
    assert font.pictures is grown


def test_odd_input(font_path: Path, tmp_path: Path) -> None:
    font = ShapedFont(font_path)
    lines = set_lines(["", "\u0301", "\u200d", "中\ud800a", " \n"], font, 3584)
    assert lines.coverage.tolist() == pytest.approx([1, 1, 1, 1 / 3, 1])
    assert lines.text_ids.tolist() == [0, 1, 2, 3, 4]
    assert lines.widths[[0, 2, 4]].tolist() == [0, 0, 0]
    assert (lines.x + lines.offsets + font.pictures.left[lines.glyphs] >= 0).all()
    for path in (tmp_path / "none.ttf", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            ShapedFont(path)
    with pytest.raises(InputError, match="one font file or more"):
        ShapedFont([])


def test_the_digest_names_font_and_size(font_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ttf"
    copy.write_bytes(font_path.read_bytes())
    font = ShapedFont(font_path)
    before = font.digest
    set_lines(["ab"], font, 3584)
    assert font.digest == before == ShapedFont(copy).digest
    assert ShapedFont(font_path, size_px=9).digest != before


def test_a_missing_library_names_its_extra(font_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uharfbuzz", None)
    with pytest.raises(MissingDependencyError, match=r"vist-rag\[fonts\]"):
        ShapedFont(font_path)


@pytest.mark.parametrize(
    ("name", "text", "fewest"),
    [
        # glyphs that stand for several characters, or characters that many glyphs stand for
        ("NotoSansArabic", "كان المسرح الصيفي قيد العمل من 1870 إلى 1939، لا يزال", 0),
        ("NotoSansDevanagari", "समर थियेटर का संचालन क्षत्रिय ज्ञान", 1),
        ("NotoSansThai", "ใกล้ๆ กันนั้นซัมเมอร์เธียเตอร์", 0),
    ],
)
def test_scripts_that_need_shaping(name: str, text: str, fewest: int) -> None:
    paths = [NOTO / f"{font}-Regular.ttf" for font in (name, "NotoSans")]
    if not all(path.exists() for path in paths):
        pytest.skip(f"needs {name} of Debian's fonts-noto-core")
    font = ShapedFont(paths)
    lines = set_lines([text], font, 3584)
    assert lines.coverage.tolist() == [1]
    together = lines.chars[:, 1] - lines.chars[:, 0] > 1
    assert together.sum() > fewest
    shown = {c for first, end in patch_spans(lines, 14, 256)[0].tolist() for c in range(first, end)}
    assert shown >= {i for i, char in enumerate(text) if not char.isspace()}
    # Every letter by itself, side by side, looks otherwise: letters have joined.
    apart = set_lines(["\u200c".join(text)], font, 3584)
    assert apart.glyphs.tolist() != lines.glyphs.tolist()
