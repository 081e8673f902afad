"""The atlas: what Pillow draws, kept in a file."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vist_rag.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from vist_rag.rendering import GlyphAtlas
from vist_rag.rendering.typeface import BOX, best_baseline

NOTO = Path("/usr/share/fonts/truetype/noto")  # where Debian's fonts-noto-core puts it
BUILT_FROM = ["89c3c497f618fdaa", "8242bd1e55368b27", "24b615ceb7d50a2c"]  # first digits of their sha256
FREETYPE = "2.14"


def drawn_by_pillow(path: Path, atlas: GlyphAtlas, codepoint: int, baseline: int, size_px: int = 10) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)
    picture = Image.new("L", (atlas.ink.shape[2], atlas.ink.shape[1]), 0)
    ImageDraw.Draw(picture).text((atlas.origin, baseline), chr(codepoint), fill=255, font=font, anchor="ls")
    return np.asarray(picture)


def test_glyphs_of_any_font_are_pillows(font_path: Path) -> None:
    atlas = GlyphAtlas.from_font(font_path, ranges=[(0x20, 0x700)])
    assert atlas.codepoints.tolist() == [0x20, 0x61, 0x62, 0x66, 0x301, 0x627, 0x628]
    for codepoint, glyph in zip(atlas.codepoints.tolist(), atlas.glyph_ids.tolist(), strict=True):
        expected = drawn_by_pillow(font_path, atlas, codepoint, 12)
        np.testing.assert_array_equal(atlas.ink[glyph].numpy(), expected, err_msg=hex(codepoint))
        assert codepoint == 0x20 or expected.any()
    assert atlas.advances[atlas.lookup(np.array([0x20, 0x61, 0x301, 0x628]))].tolist() == [3, 6, 0, 8]


def test_what_is_not_covered_is_a_box(atlas: GlyphAtlas) -> None:
    ids = atlas.lookup(np.array([ord("a"), 0x4E2D, 0xD800, 0x10FFFF, 0x20]))
    assert (ids == BOX).tolist() == [False, True, True, True, False]
    box = atlas.ink[BOX].numpy()
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    inside = box[rows[0] + 1 : rows[-1], columns[0] + 1 : columns[-1]]
    assert inside.size > 9
    assert not inside.any()
    assert box.sum() == 255 * (len(rows) * len(columns) - inside.size)
    assert columns[-1] - atlas.origin < atlas.advances[BOX]


def test_the_first_font_that_has_a_character_draws_it(font_path: Path, tmp_path: Path) -> None:
    from fontTools.ttLib import TTFont

    other = TTFont(font_path)
    for table in other["cmap"].tables:
        table.cmap = {0x61: "b", 0x63: "a"}
    other.save(tmp_path / "other.ttf")
    both = GlyphAtlas.from_font([font_path, tmp_path / "other.ttf"], ranges=[(0x61, 0x64)])
    assert both.codepoints.tolist() == [0x61, 0x62, 0x63]
    a, _, c = both.glyph_ids.tolist()
    assert torch.equal(both.ink[a], both.ink[c])


def test_a_file_gives_back_the_atlas(atlas: GlyphAtlas, tmp_path: Path) -> None:
    path = tmp_path / "atlas.safetensors"
    old = os.umask(0o022)
    try:
        atlas.save(path)
    finally:
        os.umask(old)
    again = GlyphAtlas.load(path)
    assert again.digest == atlas.digest
    assert torch.equal(again.ink, atlas.ink)
    assert again.origin == atlas.origin
    assert list(tmp_path.iterdir()) == [path]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_digest_changes_with_any_pixel_or_place(atlas: GlyphAtlas) -> None:
    ink, advances = atlas.ink.clone(), atlas.advances.copy()
    ink[7, 3, 11] ^= 1
    advances[5] += 1
    tables = (atlas.codepoints, atlas.glyph_ids)
    others = [
        GlyphAtlas(ink, atlas.advances, *tables, atlas.origin),
        GlyphAtlas(atlas.ink, advances, *tables, atlas.origin),
        GlyphAtlas(atlas.ink, atlas.advances, *tables, atlas.origin + 1),
    ]
    assert len({atlas.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize("damage", ["missing", "torn", "text", "no origin", "ids", "order", "advances"])
def test_a_damaged_file_is_named(atlas: GlyphAtlas, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "atlas.safetensors"
    tensors = {
        "ink": atlas.ink.clone(),
        "advances": torch.from_numpy(atlas.advances.copy()),
        "codepoints": torch.from_numpy(atlas.codepoints.copy()),
        "glyph_ids": torch.from_numpy(atlas.glyph_ids.copy()),
    }
    if damage == "ids":
        tensors["glyph_ids"][3] = len(atlas.ink)
    elif damage == "order":
        tensors["codepoints"][3] = 0
    elif damage == "advances":
        tensors["advances"] = tensors["advances"][1:].clone()
    save_file(tensors, path, metadata={} if damage == "no origin" else {"origin": "10"})
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "text":
        path.write_text("not an atlas")
    with pytest.raises(CheckpointError, match=r"atlas\.safetensors cannot be read"):
        GlyphAtlas.load(path)


def test_bad_fonts_and_ranges_are_named(font_path: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.ttf"
    torn.write_bytes(font_path.read_bytes()[:300])
    for path in (tmp_path / "none.ttf", torn, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            GlyphAtlas.from_font(path)
    with pytest.raises(ConfigError, match="got none"):
        GlyphAtlas.from_font(font_path, ranges=[(0x4E00, 0x4F00)])


def test_on_a_higher_strip_the_same_pictures_stand_in_the_middle(atlas: GlyphAtlas) -> None:
    height = atlas.ink.shape[1]
    higher = atlas.on_strip(height + 3)
    assert torch.equal(higher.ink[:, 1:-2], atlas.ink)
    assert not higher.ink[:, [0, -2, -1]].any()
    assert higher.pictures.right.tolist() == atlas.pictures.right.tolist()
    assert higher.digest != atlas.digest
    assert atlas.on_strip(height).digest == atlas.digest
    with pytest.raises(ConfigError, match=rf"patch_size_px must be {height} or more .* got {height - 1}"):
        atlas.on_strip(height - 1)


def test_a_missing_library_names_its_extra(font_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"vist-rag\[fonts\]"):
        GlyphAtlas.from_font(font_path)


def test_the_baseline_loses_least() -> None:
    assert best_baseline(np.array([8, 10]), np.array([0, 4]), 14) == 10
    assert best_baseline(np.array([5, 7]), np.array([0, 2]), 14) == 12  # nothing is lost in 7..12: the lowest row
    assert best_baseline(np.array([14]), np.array([2]), 14) in (12, 13, 14)


def test_the_embedded_atlas_is_pillows(atlas: GlyphAtlas) -> None:
    """Drawn anew from the fonts that it was built from; a test only where these and their FreeType are."""
    features = pytest.importorskip("PIL.features")
    paths = [NOTO / f"{name}-Regular.ttf" for name in ("NotoSans", "NotoSansMath", "NotoSansSymbols")]
    if not all(path.exists() for path in paths):
        pytest.skip("needs Debian's fonts-noto-core")
    sums = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
    if sums != BUILT_FROM or not (features.version("freetype2") or "").startswith(FREETYPE):
        pytest.skip("other versions of the fonts or of FreeType than the embedded atlas was built with")
    from fontTools.ttLib import TTFont

    covered = [set(TTFont(path, lazy=True).getBestCmap()) for path in paths]
    different = []
    for codepoint, glyph in zip(atlas.codepoints.tolist(), atlas.glyph_ids.tolist(), strict=True):
        path = next(path for path, has in zip(paths, covered, strict=True) if codepoint in has)
        if (drawn_by_pillow(path, atlas, codepoint, 11) != atlas.ink[glyph].numpy()).any():
            different.append(hex(codepoint))
    assert different == []
