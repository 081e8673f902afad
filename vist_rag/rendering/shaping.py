"""Fonts of scripts whose letters depend on their neighbours: HarfBuzz chooses and places the glyphs, FreeType draws."""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vist_rag.errors import InputError, MissingDependencyError
from vist_rag.rendering.typeface import BOX, Glyphs, Pictures, best_baseline, box_picture

_UNITS = 64
"""HarfBuzz places glyphs in 1/64 px."""

_NO_SCRIPT = ("Zyyy", "Zinh", "Zzzz")
"""Common, inherited and unknown: such a character goes with the script of what stands before it."""


class ShapedFont:
    """A typeface that shapes text: Arabic, Hebrew, Devanagari, Thai, and ligatures and kerning of any script.

    The atlas is drawn as glyphs are met, and kept. The font files are needed wherever it is used, and pixels are the
    same wherever the versions of HarfBuzz and FreeType are.

    Args:
        fonts: One font file, or several; a character is taken from the first that has it.
        size_px: Height of the em square.
        height_px: Height of a glyph's picture, the strip's. What sticks out of it is moved in, what is higher is cut.
        language: BCP 47 tag that chooses between a font's local forms; the machine's own language is never asked.
    Raises:
        InputError: If a font file is missing or is no font.
        MissingDependencyError: If HarfBuzz or FreeType is not installed.
    """

    reads_joiners = True

    def __init__(
        self,
        fonts: str | Path | Iterable[str | Path],
        *,
        size_px: int = 10,
        height_px: int = 14,
        language: str = "und",
    ) -> None:
        try:
            import freetype
            import uharfbuzz
            from fontTools import unicodedata as scripts
        except ImportError as error:
            package = "uharfbuzz, freetype-py and fonttools"
            raise MissingDependencyError("Shaping text", package, "fonts") from error
        self._hb, self._ft, self._language, self._height = uharfbuzz, freetype, language, height_px
        self._script = lru_cache(maxsize=None)(scripts.script)
        self._fonts: list[Any] = []
        self._faces: list[Any] = []
        sha = hashlib.sha256(repr((uharfbuzz.version_string(), freetype.version(), size_px, height_px)).encode())
        sha.update(language.encode())
        self._paths = [fonts] if isinstance(fonts, (str, Path)) else list(fonts)
        for path in self._paths:
            try:
                data = Path(path).read_bytes()
                face = freetype.Face(str(path))
                face.set_pixel_sizes(0, size_px)
            except (OSError, freetype.FT_Exception) as error:
                raise InputError(f"font {path} cannot be read ({error}); give a TrueType or OpenType file.") from error
            font = uharfbuzz.Font(uharfbuzz.Face(data))
            font.scale = (size_px * _UNITS, size_px * _UNITS)
            self._fonts.append(font)
            self._faces.append(face)
            sha.update(hashlib.sha256(data).digest())
        if not self._paths:
            raise InputError("fonts must name one font file or more, got none.")
        self.digest = sha.hexdigest()
        """sha256 of everything that changes a pixel, in hexadecimal."""
        self._baseline = self._measured_baseline()
        box, self._box_advance = box_picture(size_px)
        self._lock = threading.Lock()
        self._ids: dict[tuple[int, int, int], int] = {}
        self._drawn = [(1, self._on_strip(box, len(box)))]
        self._pictures: Pictures | None = None

    @property
    def pictures(self) -> Pictures:
        """The glyphs met so far; see ``Typeface.pictures``."""
        with self._lock:
            if self._pictures is None:
                origin = max(0, -min(left for left, _ in self._drawn))
                width = origin + max(left + picture.shape[1] for left, picture in self._drawn)
                ink = np.zeros((len(self._drawn), self._height, width), np.uint8)
                for glyph, (left, picture) in enumerate(self._drawn):
                    ink[glyph, :, origin + left : origin + left + picture.shape[1]] = picture
                self._pictures = Pictures.of(torch.from_numpy(ink), origin)
            return self._pictures

    def shape(self, codepoints: np.ndarray, bounds: np.ndarray) -> Glyphs:
        """Glyphs of several texts, each shaped by itself; see ``Typeface.shape``."""
        rows = [np.zeros((0, 8), np.int64)]
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            text = "".join(map(chr, codepoints[begin:end].tolist()))
            rows += [run + np.array([0, 0, 0, 0, 0, begin, begin, 0]) for run in self._runs(text)]
        table = np.concatenate(rows)
        keys, places = np.unique(table[:, :3], axis=0, return_inverse=True)
        with self._lock:
            ids = np.array([self._glyph(*key) for key in keys.tolist()], np.int32)[places.reshape(-1)]
        advances, offsets, clusters, cluster_ends, levels = table[:, 3:].T
        return Glyphs(
            ids, advances.astype(np.int32), offsets.astype(np.int32), clusters, cluster_ends, levels.astype(np.uint8)
        )

    def _runs(self, text: str) -> Iterator[np.ndarray]:
        """Shape a text piece by piece: of one direction, one font and one script each.

        Yields:
            Rows of font, glyph of the font, pixels above the baseline, advance, offset, cluster, its end, level.
        """
        levels = embedding_levels(text)
        fonts, scripts = self._itemize(text)
        kinds = list(zip(levels.tolist(), fonts, scripts, strict=True))
        cuts = [i for i in range(1, len(text)) if kinds[i] != kinds[i - 1]]
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            if begin == end:
                continue
            buffer = self._hb.Buffer()
            buffer.add_codepoints([ord(c) for c in text[begin:end]])
            buffer.direction = "rtl" if levels[begin] % 2 else "ltr"
            buffer.script, buffer.language = scripts[begin], self._language
            self._hb.shape(self._fonts[fonts[begin]], buffer)
            found = zip(buffer.glyph_infos, buffer.glyph_positions, strict=True)
            shaped = [(i.codepoint, i.cluster, p.x_advance, p.x_offset, p.y_offset) for i, p in found]
            glyph, cluster, advance, x_offset, y_offset = np.array(shaped, np.int64).reshape(-1, 5).T
            advance = np.where(glyph == 0, self._box_advance * _UNITS, advance)
            pens = np.concatenate(([0], np.cumsum(advance)))
            pixels = np.maximum.accumulate(_pixels(pens))  # a negative advance takes no room
            place = _pixels(pens[:-1] + x_offset) - pixels[:-1]
            distinct = np.unique(cluster)
            cluster_end = np.append(distinct[1:], end - begin)[np.searchsorted(distinct, cluster)]
            constant = np.ones_like(glyph)
            run = np.stack(
                (
                    fonts[begin] * constant,
                    glyph,
                    _pixels(y_offset),
                    np.diff(pixels),
                    place,
                    cluster + begin,
                    cluster_end + begin,
                    levels[begin] * constant,
                ),
                axis=1,
            )
            yield run[::-1] if levels[begin] % 2 else run  # HarfBuzz gives visual order; layout turns it around again

    def _itemize(self, text: str) -> tuple[list[int], list[str]]:
        """Font and script of each character."""
        fonts, scripts = [], []
        font, script = 0, ""
        for char in text:
            own = self._script(char)
            neutral = own in _NO_SCRIPT
            if not neutral:
                script = own
            if not (neutral and self._has(font, char)):
                font = next((f for f in range(len(self._fonts)) if self._has(f, char)), font)
            fonts.append(font)
            scripts.append(script)
        first = next((s for s in scripts if s), "Zyyy")
        return fonts, [s or first for s in scripts]

    def _has(self, font: int, char: str) -> bool:
        return self._fonts[font].get_nominal_glyph(ord(char)) is not None

    def _glyph(self, font: int, glyph: int, above: int) -> int:
        """Id of a glyph that stands so many pixels above the baseline; drawn when it is met first."""
        if glyph == 0:
            return BOX
        key = (font, glyph, above)
        if key not in self._ids:
            left, top, picture = self._draw(font, glyph)
            self._ids[key] = len(self._drawn)
            self._drawn.append((left, self._on_strip(picture, top + above)))
            self._pictures = None
        return self._ids[key]

    def _draw(self, font: int, glyph: int) -> tuple[int, int, np.ndarray]:
        """Left edge from the origin, rows above the baseline, and picture, uint8 ``[rows, columns]``."""
        slot = self._faces[font].glyph
        try:
            self._faces[font].load_glyph(glyph, self._ft.FT_LOAD_DEFAULT | self._ft.FT_LOAD_NO_BITMAP)
            slot.render(self._ft.FT_RENDER_MODE_NORMAL)
        except self._ft.FT_Exception as error:
            raise InputError(f"font {self._paths[font]} cannot be drawn ({error}); give a sound one.") from error
        bitmap = slot.bitmap
        picture = np.array(bitmap.buffer, np.uint8).reshape(bitmap.rows, bitmap.pitch)[:, : bitmap.width]
        return slot.bitmap_left, slot.bitmap_top, picture

    def _on_strip(self, picture: np.ndarray, top: int) -> np.ndarray:
        """A picture as high as the strip, its first row ``top`` rows above the baseline or as near as fits."""
        picture = picture[: self._height]
        strip = np.zeros((self._height, picture.shape[1]), np.uint8)
        first = min(max(self._baseline - top, 0), self._height - len(picture))
        strip[first : first + len(picture)] = picture
        return strip

    def _measured_baseline(self) -> int:
        """The row that loses least of the first font's letters and marks; of a big font, of 500 of them."""
        letters = [glyph for c, glyph in self._faces[0].get_chars() if unicodedata.category(chr(c))[0] in "LM"] or [0]
        drawn = [self._draw(0, glyph) for glyph in letters[:: max(1, len(letters) // 500)]]
        tops = np.array([top for _, top, _ in drawn])
        return best_baseline(tops, np.array([len(picture) for _, _, picture in drawn]) - tops, self._height)


def _pixels(units: np.ndarray) -> np.ndarray:
    return (units + _UNITS // 2) // _UNITS


def embedding_levels(text: str) -> np.ndarray:
    """Direction of each character: even is left to right, odd is right to left, uint8 ``[c]``.

    The whole text is one paragraph, whose direction is that of its first letter. Brackets take the direction of what
    is around them (rule N0 is left out), and so do embedding and isolate marks (X1 to X8).
    Source: UAX #9, rules P2, P3, W1 to W7, N1, N2, I1, I2.
    """
    kinds = [unicodedata.bidirectional(char) for char in text]
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "L")
    if "R" not in kinds and "AL" not in kinds:
        return np.zeros(len(text), np.uint8)
    base = strong = "l" if first == "L" else "r"
    letters: list[str] = []
    for kind in kinds:
        letter = {"L": "l", "R": "r", "AL": "r", "EN": "n", "AN": "n", "CS": ",", "ES": ",", "ET": "%"}.get(kind, " ")
        if kind in ("NSM", "BN"):
            letter = letters[-1] if letters else base
        elif kind == "EN" and strong == "l":
            letter = "l"
        elif letter in "lr":
            strong = letter
        letters.append(letter)

    def neutral(match: re.Match[str]) -> str:
        text, begin, end = match.string, match.start(), match.end()
        before = text[begin - 1].replace("n", "r") if begin else base
        after = text[end].replace("n", "r") if end < len(text) else base
        return (before if before == after else base) * len(match[0])

    run = re.sub("(?<=n),(?=n)", "n", "".join(letters))
    run = re.sub("%+(?=n)|(?<=n)%+", lambda match: "n" * len(match[0]), run)
    run = re.sub("[ ,%]+", neutral, run)
    levels = {"l": 0 if base == "l" else 2, "r": 1, "n": 2}
    return np.array([levels[letter] for letter in run], np.uint8)
