"""Text in, pages out: pixels, mask, spans, coverage."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch

from vist_rag.config import RendererConfig
from vist_rag.errors import ConfigError, InputError, MissingDependencyError
from vist_rag.rendering import GlyphAtlas, Pages, Renderer
from vist_rag.rendering.layout import set_lines

TEXTS = [
    "Vision-centric reading: the river Loire (1,006 km) flows to the sea; “naïve” façades, Łódź, Größe, 42 % – €5.",
    "The quick brown fox jumps over the lazy dog. " * 12
    + "Ελληνικά, Кириллица, Tiếng Việt: ∑ ≤ ∞ → π² \U0001f600 fi.\nNew line\tand tab.",
    "",
]
INK_SHA256 = "c8ba151ebdca513db8e3d31d7ea209fd6b1767941c8eee0c8fece754b89d5229"
PIXELS_SHA256 = "20c225fe451bef60c0872cc3774aa04c3e677010f25236a617cc3f95ef558b8c"
SMALL = RendererConfig(tower_size_px=56, channels=1, normalize="none")


def ink_of(pages: Pages) -> np.ndarray:
    """uint8 [p, size, size] of pages that were not normalised."""
    return (255 - pages.pixel_values[:, 0].mul(255).round()).to(torch.uint8).numpy()


def strips_by_hand(texts: list[str], atlas: GlyphAtlas, width: int) -> np.ndarray:
    """Lay glyph after glyph on strips, uint8 [p, h, width]."""
    lines, ink = set_lines(texts, atlas, width), atlas.ink.numpy()
    strips = np.zeros((len(lines.widths), ink.shape[1], width + 2 * ink.shape[2]), np.uint8)
    for page, x, glyph in zip(lines.pages, lines.x, lines.glyphs, strict=True):
        left = ink.shape[2] + x - atlas.origin
        part = strips[page, :, left : left + ink.shape[2]]
        np.maximum(part, ink[glyph], out=part)
    return strips[:, :, ink.shape[2] : -ink.shape[2]]


def test_pixels_are_the_same_on_every_machine(atlas: GlyphAtlas) -> None:
    raw = Renderer(atlas, RendererConfig(normalize="none", channels=1)).render(TEXTS)
    assert hashlib.sha256(ink_of(raw).tobytes()).hexdigest() == INK_SHA256
    pixels = Renderer(atlas).render(TEXTS).pixel_values[:, 0].contiguous()
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == PIXELS_SHA256


def test_a_page_is_its_strip_cut_in_rows(atlas: GlyphAtlas) -> None:
    texts = ["The old bridge over the river was built in 1867, by hand. " * 3, "fj", "", "x" * 100]
    pages = Renderer(atlas, SMALL).render(texts)
    strips = strips_by_hand(texts, atlas, 16 * 14)
    rows = [np.concatenate([strip[:, row * 56 : (row + 1) * 56] for row in range(4)]) for strip in strips]
    np.testing.assert_array_equal(ink_of(pages), np.stack(rows))
    assert pages.text_ids.tolist() == sorted(pages.text_ids.tolist())
    assert set(pages.text_ids.tolist()) == {0, 1, 2, 3}


def test_many_pages_are_pages_one_by_one(atlas: GlyphAtlas) -> None:
    """More pages than are drawn at a time, of different lengths: a page does not depend on its neighbours."""
    texts = [("river " * (7 * i % 60)) + "fjord" * (i % 3) for i in range(23)]
    renderer = Renderer(atlas)
    together = renderer.render(texts)
    alone = [renderer.render([text]) for text in texts]
    for name in ("pixel_values", "patch_mask", "char_spans", "coverage"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(pages, name) for pages in alone])), name


def test_the_mask_ends_with_the_text(atlas: GlyphAtlas) -> None:
    pages = Renderer(atlas, SMALL).render(["river", "a" * 5 + " " * 50, "", " \n", "\u200b"])
    widths = set_lines(["river", "aaaaa "], atlas, 224).widths.tolist()
    used = [-(-width // 14) for width in widths] + [0, 0, 0]
    assert pages.patch_mask.tolist() == [[i < n for i in range(16)] for n in used]
    filled = pages.char_spans[..., 0] < pages.char_spans[..., 1]
    assert torch.equal(filled, pages.patch_mask)


def test_normalisation_is_over_the_text_patches_of_each_page(atlas: GlyphAtlas) -> None:
    texts = ["The river runs to the sea.", "W" * 300, "", ending_in_overhang(atlas)]
    raw = Renderer(atlas, RendererConfig(normalize="none", channels=1)).render(texts)
    normal = Renderer(atlas, RendererConfig(channels=3)).render(texts)
    assert normal.pixel_values.shape == (len(raw), 3, 224, 224)
    assert torch.equal(normal.pixel_values[:, 0], normal.pixel_values[:, 2])
    for page in range(len(raw)):
        on_text = raw.patch_mask[page].view(16, 16).repeat_interleave(14, 0).repeat_interleave(14, 1).numpy()
        values = raw.pixel_values[page, 0].double().numpy()
        expected = np.zeros_like(values)
        if on_text.any():
            inside = values[on_text]
            expected[on_text] = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-5)
        np.testing.assert_allclose(normal.pixel_values[page, 0].numpy(), expected, atol=2e-6)


def ending_in_overhang(atlas: GlyphAtlas) -> str:
    """A text that fills its last patch, with a letter whose ink sticks out of it."""
    width = {chr(c): int(atlas.advances[g]) for c, g in zip(atlas.codepoints, atlas.glyph_ids, strict=True)}
    reach = atlas.pictures.right[atlas.lookup(np.array([ord("f")]))[0]]
    assert reach > width["f"]
    return next(text for n in range(99) if (width["f"] + n * width["i"]) % 14 == 0 and (text := "i" * n + "f"))


def test_blank_patches_are_white_when_nothing_is_normalised(atlas: GlyphAtlas) -> None:
    pages = Renderer(atlas, SMALL).render(["a", ""])
    assert pages.pixel_values[1].min() == 1
    assert pages.pixel_values[0].min() < 0.5
    assert pages.pixel_values[0, 0, :, 14:].min() == 1


def test_coverage_counts_boxes(atlas: GlyphAtlas) -> None:
    pages = Renderer(atlas, SMALL).render(["plain", "a中b\ud800", "", "中" * 60])
    assert pages.coverage.tolist() == pytest.approx([1, 0.5, 1, 0])
    assert pages.coverage.dtype == torch.float32


def test_odd_input(atlas: GlyphAtlas) -> None:
    renderer = Renderer(atlas)
    assert len(renderer.render([])) == 0
    assert renderer.render([]).pixel_values.shape == (0, 3, 224, 224)
    with pytest.raises(InputError, match=r"wrap it: render\(\[text\]\)"):
        renderer.render("one text")
    with pytest.raises(InputError, match="got bytes at 1; decode"):
        renderer.render(["text", b"bytes"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="atlas must be 16 px high"):
        Renderer(atlas, RendererConfig(tower_size_px=224, patch_size_px=16))


def test_a_long_text_is_shown_to_its_end(atlas: GlyphAtlas) -> None:
    text = " ".join(f"word{i}" for i in range(4000))
    pages = Renderer(atlas, RendererConfig(channels=1)).render([text])
    spans = pages.char_spans[pages.patch_mask]
    assert spans[0, 0] == 0
    assert spans[-1, 1] == len(text)
    assert (spans[1:, 0] <= spans[:-1, 1]).all()  # no character between two patches
    assert pages.patch_mask[:-1].sum(1).min() > 240


def test_a_picture_shows_the_page(atlas: GlyphAtlas) -> None:
    pytest.importorskip("PIL")
    pages = Renderer(atlas, RendererConfig(tower_size_px=56, channels=3)).render(["The river\nWhi"])
    raw = ink_of(Renderer(atlas, SMALL).render(["The river Whi"]))[0]
    picture = np.asarray(pages.to_image(0, scale=2))[::2, ::2]
    stretched = 255 - raw * (255 / raw.max())
    text_width = int(pages.patch_mask[0].sum()) * 14
    assert 56 < text_width < 112
    np.testing.assert_allclose(picture[3:17, 3:59], stretched[:14], atol=1)
    second = picture[20:34, 3:59]
    np.testing.assert_allclose(second[:, : text_width - 56], stretched[14:28, : text_width - 56], atol=1)
    shade = np.unique(second[:, text_width - 56 :])
    assert len(shade) == 1
    assert 0 < shade[0] < 255
    assert picture[17:20].std() == 0
    left, top, width, height = pages.boxes(scale=2)[5].tolist()  # of four patches a row
    assert (left, top, width, height) == (2 * 17, 2 * 20, 28, 28)
    np.testing.assert_allclose(np.asarray(pages.to_image(0, scale=2))[top : top + 28, left : left + 28][::2, ::2],
                               picture[20:34, 17:31])  # fmt: skip
    with pytest.raises(InputError, match=r"page must be in 0\.\.0"):
        pages.to_image(1)


def test_a_picture_without_pillow_names_the_extra(atlas: GlyphAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Renderer(atlas, SMALL).render([""])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"vist-rag\[fonts\]"):
        pages.to_image()


@pytest.mark.gpu
def test_a_gpu_draws_the_same(atlas: GlyphAtlas) -> None:
    texts = [*TEXTS, "river " * 300]
    here, there = Renderer(atlas).render(texts), Renderer(atlas, device="cuda").render(texts)
    assert torch.equal(there.patch_mask.cpu(), here.patch_mask)
    assert torch.equal(there.char_spans.cpu(), here.char_spans)
    torch.testing.assert_close(there.pixel_values.cpu(), here.pixel_values, atol=1e-6, rtol=0)
