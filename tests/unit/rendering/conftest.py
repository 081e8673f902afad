"""The embedded atlas, and a font built here, so that no test needs a font of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from vist_rag.rendering import GlyphAtlas

ASSETS = Path(__file__).parents[3] / "vist_rag" / "assets"

BOXES = {
    # name: (code point, advance, x from, y from, x to, y to), in 1/1000 em
    "space": (0x20, 300, 0, 0, 0, 0),
    "a": (0x61, 600, 100, 0, 500, 500),
    "b": (0x62, 600, 100, 0, 500, 800),
    "a_b": (None, 1000, 100, 0, 900, 300),
    "f": (0x66, 300, -200, -200, 500, 700),
    "acute": (0x301, 0, -400, 600, -200, 800),
    "alef": (0x627, 300, 100, 0, 200, 800),
    "beh": (0x628, 800, 0, 0, 800, 300),
    "beh.init": (None, 400, 0, 0, 400, 300),
}
FEATURES = """
languagesystem DFLT dflt; languagesystem latn dflt; languagesystem arab dflt;
feature liga { sub a b by a_b; } liga;
feature init { sub beh by beh.init; } init;
markClass acute <anchor -300 600> @TOP;
feature mark { pos base b <anchor 300 900> mark @TOP; } mark;
"""


@pytest.fixture(scope="session")
def atlas() -> GlyphAtlas:
    return GlyphAtlas.load(ASSETS / "noto-sans-10px.safetensors")


@pytest.fixture(scope="session")
def font_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TrueType font of rectangles with a ligature (a b), an initial form (beh) and a mark that is placed on b."""
    builder = pytest.importorskip("fontTools.fontBuilder", reason="needs fonttools")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *BOXES])
    font.setupCharacterMap({box[0]: name for name, box in BOXES.items() if box[0] is not None})
    glyphs, metrics = {".notdef": pens.TTGlyphPen(None).glyph()}, {".notdef": (500, 0)}
    for name, (_, advance, left, low, right, high) in BOXES.items():
        pen = pens.TTGlyphPen(None)
        if left < right:
            pen.moveTo((left, low))
            for point in ((left, high), (right, high), (right, low)):
                pen.lineTo(point)
            pen.closePath()
        glyphs[name], metrics[name] = pen.glyph(), (advance, left)
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(metrics)
    font.setupHorizontalHeader(ascent=1000, descent=-300)
    font.setupOS2(sTypoAscender=1000, sTypoDescender=-300, usWinAscent=1000, usWinDescent=300)
    font.setupNameTable({"familyName": "Rectangles", "styleName": "Regular"})
    font.setupPost()
    font.addOpenTypeFeatures(FEATURES)
    path = tmp_path_factory.mktemp("fonts") / "rectangles.ttf"
    font.save(path)
    return path
