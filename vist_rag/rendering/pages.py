"""What the renderer hands out, and how a person looks at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vist_rag.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

_BLANK, _GAP = 225, 190
"""Grey of blank patches, and of the gap between rows."""


@dataclass(frozen=True)
class Pages:
    """Rendered texts; a long text takes several pages, next to each other and in order.

    Attributes:
        pixel_values: What the vision tower reads, float ``[p, c, size, size]``.
        patch_mask: True where a patch stands before the end of the text, bool ``[p, s]``.
        char_spans: Characters of the original text that each patch shows, int64 ``[p, s, 2]``, start and end;
            empty (start = end) where it shows none.
        text_ids: Which of the rendered texts a page belongs to, int64 ``[p]``.
        coverage: Share of each text's glyphs that the atlas has, float ``[t]``; the rest are boxes.
    """

    pixel_values: Tensor
    patch_mask: Tensor
    char_spans: Tensor
    text_ids: Tensor
    coverage: Tensor

    def __len__(self) -> int:
        return len(self.pixel_values)

    def to_image(self, page: int = 0, *, scale: int = 3) -> Image:
        """A picture of a page for people: black on white, row under row, blank patches shaded.

        The lightest pixel of the page's text is white and the darkest is black, whatever the normalisation.

        Args:
            page: Which page.
            scale: Pixels of the picture for each pixel of the page.
        Raises:
            InputError: If there is no such page.
            MissingDependencyError: If Pillow is not installed.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingDependencyError("Making a picture", "pillow", "fonts") from error
        self.check(page)
        values = self.pixel_values[page, 0].float().cpu().numpy()  # [size, size]
        rows = math.isqrt(self.patch_mask.shape[1])
        size = len(values) // rows
        text = self.patch_mask[page].cpu().numpy().reshape(rows, rows).repeat(size, 0).repeat(size, 1)
        darkest, lightest = values[text].min(initial=np.inf), values[text].max(initial=-np.inf)
        grey = (values - darkest) / max(lightest - darkest, 1e-6) * 255
        grey = np.where(text, grey.round(), _BLANK).astype(np.uint8).reshape(rows, size, -1)
        gap = _gap(size)
        picture = np.pad(grey, ((0, 0), (0, gap), (0, 0)), constant_values=_GAP).reshape(rows * (size + gap), -1)
        picture = np.pad(picture, ((gap, 0), (gap, gap)), constant_values=_GAP)
        return Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1))

    def boxes(self, *, scale: int = 3) -> np.ndarray:
        """Where each patch stands in the picture that :meth:`to_image` makes.

        Args:
            scale: As there.
        Returns:
            Left, top, width and height in pixels, int64 ``[s, 4]``.
        """
        s = self.patch_mask.shape[1]
        columns = math.isqrt(s)
        size = self.pixel_values.shape[-1] // columns
        row, column = np.divmod(np.arange(s), columns)
        gap, sizes = _gap(size), np.full(s, size)
        return scale * np.stack((gap + column * size, gap + row * (size + gap), sizes, sizes), axis=1)

    def check(self, page: int) -> None:
        """Refuse a page that there is none of.

        Raises:
            InputError: If there is no such page.
        """
        if not 0 <= page < len(self):
            raise InputError(f"page must be in 0..{len(self) - 1} (pages rendered), got {page}.")


def _gap(size: int) -> int:
    """Pixels between the rows of a picture, for patches of so many."""
    return max(2, size // 4)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what cannot be made into pages.

    Raises:
        InputError: If it is one string, or an item is not a string.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings, got one string; wrap it: render([text]).")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts must be strings, got {type(text).__name__} at {i}; decode bytes first.")
