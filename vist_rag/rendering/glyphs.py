"""Font -> glyph atlas: pictures, stored once, so that rendering needs no font and is bit-identical on every machine."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vist_rag.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from vist_rag.rendering.typeface import BOX, Glyphs, Pictures, best_baseline, box_picture

DEFAULT_RANGES: tuple[tuple[int, int], ...] = (
    (0x0020, 0x007F),  # Basic Latin
    (0x00A0, 0x0250),  # Latin-1 Supplement, Latin Extended-A and -B
    (0x0250, 0x0370),  # IPA, spacing modifiers, combining diacritical marks
    (0x0370, 0x0530),  # Greek, Cyrillic, Cyrillic Supplement
    (0x1E00, 0x2000),  # Latin Extended Additional (Vietnamese), Greek Extended
    (0x2010, 0x2060),  # general punctuation
    (0x2070, 0x20D0),  # super- and subscripts, currency
    (0x2100, 0x2190),  # letter-like symbols, number forms
    (0x2190, 0x2200),  # arrows
    (0x2200, 0x2300),  # mathematical operators
)
if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

_TABLES = ("advances", "codepoints", "glyph_ids")


@dataclass(frozen=True)
class GlyphAtlas:
    """Pictures of glyphs, with what is needed to set them side by side: one glyph a code point, from left to right.

    Attributes:
        ink: How dark each pixel is, uint8 ``[g, h, w]``; glyph ``BOX`` is drawn for what no glyph covers.
        advances: Pixels from one glyph's origin to the next one's, int32 ``[g]``.
        codepoints: Unicode code points that have a glyph, int32 ``[c]``, ascending.
        glyph_ids: The glyph of each code point, int32 ``[c]``.
        origin: Column of ``ink`` that stands at the glyph's origin; columns before it reach back over the left
            neighbour.
    """

    reads_joiners: ClassVar[bool] = False

    ink: Tensor
    advances: np.ndarray
    codepoints: np.ndarray
    glyph_ids: np.ndarray
    origin: int

    @property
    def digest(self) -> str:
        """sha256 of everything that changes a pixel, in hexadecimal."""
        sha = hashlib.sha256(str((tuple(self.ink.shape), self.origin)).encode())
        for array in (self.ink.numpy(), self.advances, self.codepoints, self.glyph_ids):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    @cached_property
    def pictures(self) -> Pictures:
        """The glyphs' pictures; see ``Typeface.pictures``."""
        return Pictures.of(self.ink, self.origin)

    @cached_property
    def _table(self) -> np.ndarray:
        """Glyph of every code point up to the last covered one, and ``BOX`` for those behind it."""
        table = np.full(int(self.codepoints[-1]) + 2, BOX, np.int32)
        table[self.codepoints] = self.glyph_ids
        return table

    def lookup(self, codepoints: np.ndarray) -> np.ndarray:
        """Glyph ids of code points, int32 of the same shape; ``BOX`` where there is none."""
        ids: np.ndarray = self._table[np.minimum(codepoints, len(self._table) - 1)]
        return ids

    def shape(self, codepoints: np.ndarray, bounds: np.ndarray) -> Glyphs:
        """One glyph for each code point; see ``Typeface.shape``."""
        ids, places = self.lookup(codepoints), np.arange(len(codepoints))
        nothing = np.zeros(len(ids), np.int32)
        return Glyphs(ids, self.advances[ids], nothing, places, places + 1, nothing.astype(np.uint8))

    def on_strip(self, height_px: int) -> GlyphAtlas:
        """The same pictures in the middle of a higher strip, for a tower whose patches are higher.

        Raises:
            ConfigError: If the strip is lower than the pictures.
        """
        height = self.ink.shape[1]
        if height_px < height:
            raise ConfigError(
                f"patch_size_px must be {height} or more (height of this atlas), got {height_px}; build a lower one "
                "with GlyphAtlas.from_font(..., height_px=...)."
            )
        above = (height_px - height) // 2
        return replace(self, ink=torch.nn.functional.pad(self.ink, (0, 0, above, height_px - height - above)))

    def save(self, path: str | Path) -> None:
        """Write the atlas as one safetensors file, whole or not at all."""
        tensors = {"ink": self.ink.cpu().contiguous()}
        tensors |= {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in _TABLES}
        partial = Path(f"{path}.partial")
        partial.write_bytes(save(tensors, metadata={"format": "pt", "origin": str(self.origin)}))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> GlyphAtlas:
        """Read an atlas that ``save`` wrote.

        Raises:
            CheckpointError: If the file is missing, torn, or not an atlas.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                ink = file.get_tensor("ink")
                advances, codepoints, glyph_ids = (file.get_tensor(name).numpy() for name in _TABLES)
                origin = int((file.metadata() or {})["origin"])
            if ink.dim() != 3 or ink.dtype != torch.uint8 or advances.shape != ink.shape[:1] or advances.min() < 0:
                raise ValueError("its pictures and advances do not belong together")
            if codepoints.shape != glyph_ids.shape or not (np.diff(codepoints, prepend=-1) > 0).all():
                raise ValueError("its code points are not an ascending list with a glyph each")
            if not len(codepoints) or glyph_ids.min() < 0 or glyph_ids.max() >= len(ink):
                raise ValueError("its code points name glyphs that it does not have")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"glyph atlas {path} cannot be read ({error}); restore the file, or build it anew with "
                "GlyphAtlas.from_font(...).save(...)."
            ) from error
        return cls(ink, advances, codepoints, glyph_ids, origin)

    @classmethod
    def from_font(
        cls,
        fonts: str | Path | Iterable[str | Path],
        *,
        size_px: int = 10,
        height_px: int = 14,
        ranges: Iterable[tuple[int, int]] = DEFAULT_RANGES,
    ) -> GlyphAtlas:
        """Draw an atlas from TrueType or OpenType files with FreeType (through Pillow).

        Args:
            fonts: One font file, or several; a code point is taken from the first that has it.
            size_px: Height of the em square.
            height_px: Height of a glyph's picture, the strip's.
            ranges: Half-open ranges of code points to draw.
        Raises:
            InputError: If a font file is missing or is no font.
            ConfigError: If no font has any code point of ``ranges``.
        """
        paths = [fonts] if isinstance(fonts, (str, Path)) else list(fonts)
        faces = [_open_face(path, size_px) for path in paths]
        wanted = sorted({c for first, last in ranges for c in range(first, last)})
        drawn = [(c, face) for c in wanted if (face := next((f for f, covered in faces if c in covered), None))]
        if not drawn:
            raise ConfigError(f"ranges must hold a code point that a font covers, got none in {[*map(str, paths)]}.")
        try:
            ink, advances, origin = _draw([(chr(c), face) for c, face in drawn], size_px, height_px)
        except OSError as error:
            raise InputError(f"fonts {[*map(str, paths)]} cannot be drawn ({error}); give sound ones.") from error
        codepoints = np.array([c for c, _ in drawn], np.int32)
        return cls(torch.from_numpy(ink), advances, codepoints, np.arange(1, len(drawn) + 1, dtype=np.int32), origin)


def _open_face(path: str | Path, size_px: int) -> tuple[FreeTypeFont, set[int]]:
    """A font, and the code points that it covers."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
        from PIL import ImageFont
    except ImportError as error:
        raise MissingDependencyError("Building a glyph atlas", "pillow and fonttools", "fonts") from error
    try:
        face = ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)
        with TTFont(str(path), fontNumber=0, lazy=True) as table:
            return face, set(table.getBestCmap() or ())
    except (OSError, TTLibError, KeyError, struct.error) as error:
        raise InputError(f"font {path} cannot be read ({error}); give a TrueType or OpenType file.") from error


def _draw(chars: list[tuple[str, FreeTypeFont]], size_px: int, height_px: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pictures and advances of the box and of each character, and the column of their origin."""
    from PIL import Image, ImageDraw

    bounds = np.array([face.getbbox(char, anchor="ls") for char, face in chars])  # left, top, right, bottom
    lefts, tops, rights, bottoms = np.concatenate((np.floor(bounds[:, :2]), np.ceil(bounds[:, 2:])), 1).astype(int).T
    baseline = best_baseline(-tops, bottoms, height_px)
    origin = max(size_px, -int(lefts.min()))
    width = origin + max(int(rights.max()), size_px) + 1
    ink = np.zeros((len(chars) + 1, height_px, width), np.uint8)
    advances = np.zeros(len(chars) + 1, np.int32)
    box, advances[BOX] = box_picture(size_px)
    top = max(0, baseline - len(box))
    ink[BOX, top : top + len(box), origin + 1 : origin + 1 + box.shape[1]] = box
    for glyph, (char, face) in enumerate(chars, start=1):
        picture = Image.new("L", (width, height_px), 0)
        ImageDraw.Draw(picture).text((origin, baseline), char, fill=255, font=face, anchor="ls")
        ink[glyph] = np.asarray(picture)
        advances[glyph] = round(face.getlength(char))
    return ink, advances, origin
