"""Pages a second against Pillow, and pixels against Pillow.

    python benchmarks/render.py --json

Speed: the passages of the demo corpus, drawn by the renderer (text to normalised pixels, mask and character spans) and
by Pillow (``ImageDraw.text`` with basic layout on the same strips, already broken into pages, then scaled, normalised
and folded by numpy), in alternating rounds of one run. Pixels: every glyph of the embedded atlas, and every page,
against what Pillow draws with the fonts that the atlas was built from: Noto Sans, Noto Sans Math, Noto Sans Symbols
(Debian: fonts-noto-core). Without these fonts no pixels are compared, and Pillow's own font stands in for the speed.
Needs the extra ``fonts``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

import vist_rag
from vist_rag.config import RendererConfig
from vist_rag.evaluation.demo import demo_passages
from vist_rag.evaluation.provenance import run_facts
from vist_rag.rendering import GlyphAtlas, Renderer
from vist_rag.rendering.layout import Lines, set_lines

DEBIAN = Path("/usr/share/fonts/truetype/noto")
FONTS = [DEBIAN / f"{name}-Regular.ttf" for name in ("NotoSans", "NotoSansMath", "NotoSansSymbols")]
SIZE_PX, HEIGHT_PX, BASELINE = 10, 14, 11
CONFIG = RendererConfig(channels=1)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def pages_of(texts: Sequence[str], lines: Lines) -> list[str]:
    """The text of each page, as one line."""
    first = np.searchsorted(lines.pages, np.arange(len(lines.widths)))
    last = np.append(first[1:], len(lines.pages)) - 1
    pieces = [
        texts[t][lines.chars[a, 0] : lines.chars[b, 1]] for t, a, b in zip(lines.text_ids, first, last, strict=True)
    ]
    return [" ".join(piece.split()) for piece in pieces]


def pillow_strip(page: str, font: Font) -> np.ndarray:
    """Ink of one page, uint8 [h, w]."""
    picture = Image.new("L", (CONFIG.page_width_px, HEIGHT_PX), 0)
    ImageDraw.Draw(picture).text((0, BASELINE), page, fill=255, font=font, anchor="ls")
    return np.asarray(picture)


def pillow_pages(pages: Sequence[str], widths: np.ndarray, font: Font) -> np.ndarray:
    """What a renderer made of Pillow and numpy would give, float32 [p, 1, size, size]."""
    side = CONFIG.tower_size_px
    squares = np.zeros((len(pages), 1, side, side), np.float32)
    for page, (text, width) in enumerate(zip(pages, widths.tolist(), strict=True)):
        pixels = 1 - pillow_strip(text, font).astype(np.float32) / 255
        used = -(-width // CONFIG.patch_size_px) * CONFIG.patch_size_px
        inside = pixels[:, :used]
        pixels = (pixels - inside.mean()) / np.sqrt(inside.var() + 1e-5)
        pixels[:, used:] = 0
        squares[page, 0] = pixels.reshape(HEIGHT_PX, -1, side).transpose(1, 0, 2).reshape(side, side)
    return squares


def speed(texts: Sequence[str], renderer: Renderer, font: Font, rounds: int) -> dict[str, Any]:
    """Pages a second of both, and their ratio: medians of the rounds, with 95 % bootstrap intervals."""
    lines = set_lines(texts, renderer.atlas, CONFIG.page_width_px)
    pages = pages_of(texts, lines)
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {"renderer": [], "renderer_1_thread": [], "pillow": []}
    for warm in [True, *[False] * rounds]:
        for name, times in seconds.items():
            torch.set_num_threads(1 if name == "renderer_1_thread" else threads)
            start = time.perf_counter()
            if name == "pillow":
                pillow_pages(pages, lines.widths, font)
            else:
                renderer.render(texts)
            if not warm:
                times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    rates = {name: len(pages) / np.array(times) for name, times in seconds.items()}
    result: dict[str, Any] = {"texts": len(texts), "pages": len(pages), "rounds": rounds, "threads": threads}
    result |= {f"{name}_pages_per_s": median_of(rate) for name, rate in rates.items()}
    result["ratio"] = median_of(rates["renderer"] / rates["pillow"])
    result["ratio_1_thread"] = median_of(rates["renderer_1_thread"] / rates["pillow"])
    return result


def median_of(values: np.ndarray) -> dict[str, Any]:
    """The median, with its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return {"median": round(float(np.median(values)), 1), "95": [round(float(low), 1), round(float(high), 1)]}


def compare_glyphs(atlas: GlyphAtlas, paths: Sequence[Path]) -> dict[str, Any]:
    """Every glyph of the atlas against Pillow's drawing of it."""
    faces = [ImageFont.truetype(str(path), SIZE_PX, layout_engine=ImageFont.Layout.BASIC) for path in paths]
    covered = [set(TTFont(path, lazy=True).getBestCmap()) for path in paths]
    different, missing = [], []
    for codepoint, glyph in zip(atlas.codepoints.tolist(), atlas.glyph_ids.tolist(), strict=True):
        face = next((f for f, has in zip(faces, covered, strict=True) if codepoint in has), None)
        if face is None:
            missing.append(hex(codepoint))
            continue
        picture = Image.new("L", (atlas.ink.shape[2], HEIGHT_PX), 0)
        ImageDraw.Draw(picture).text((atlas.origin, BASELINE), chr(codepoint), fill=255, font=face, anchor="ls")
        if (np.asarray(picture) != atlas.ink[glyph].numpy()).any():
            different.append(hex(codepoint))
    equal = len(atlas.codepoints) - len(different) - len(missing)
    return {"glyphs": len(atlas.codepoints), "equal": equal, "different": different, "in_no_font": missing}


def compare_pages(texts: Sequence[str], atlas: GlyphAtlas, path: Path) -> dict[str, Any]:
    """Every page that one font covers against Pillow's line; where glyphs overlap, it blends, we take the darker."""
    lines = set_lines(texts, atlas, CONFIG.page_width_px)
    font = ImageFont.truetype(str(path), SIZE_PX, layout_engine=ImageFont.Layout.BASIC)
    has = set(TTFont(path, lazy=True).getBestCmap())
    raw = Renderer(atlas, RendererConfig(channels=1, normalize="none")).render(texts).pixel_values[:, 0]
    side, rows = CONFIG.tower_size_px, CONFIG.tower_size_px // HEIGHT_PX
    ours = (255 - raw.mul(255).round()).to(torch.uint8).view(-1, rows, HEIGHT_PX, side).transpose(1, 2)
    strips = ours.reshape(-1, HEIGHT_PX, CONFIG.page_width_px).numpy()
    counts = {"pages": 0, "inked_pixels": 0, "different_pixels": 0, "different_where_no_glyphs_overlap": 0}
    largest = 0
    for page, text in enumerate(pages_of(texts, lines)):
        if not has.issuperset(map(ord, text)):
            continue
        pillow = pillow_strip(text, font)
        off = np.abs(pillow.astype(int) - strips[page])
        counts["pages"] += 1
        counts["inked_pixels"] += int((pillow > 0).sum())
        counts["different_pixels"] += int((off > 0).sum())
        counts["different_where_no_glyphs_overlap"] += int((off[layers(lines, page, atlas) < 2] > 0).sum())
        largest = max(largest, int(off.max()))
    return {**counts, "largest_difference_of_255": largest}


def layers(lines: Lines, page: int, atlas: GlyphAtlas) -> np.ndarray:
    """How many glyphs have ink at each pixel of a page, int [h, w]."""
    ink, cell = atlas.ink.numpy() > 0, atlas.ink.shape[2]
    found = np.zeros((HEIGHT_PX, CONFIG.page_width_px + 2 * cell), int)
    for x, glyph in zip(lines.x[lines.pages == page].tolist(), lines.glyphs[lines.pages == page].tolist(), strict=True):
        found[:, cell + x - atlas.origin : 2 * cell + x - atlas.origin] += ink[glyph]
    return found[:, cell:-cell]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, action="append", help="a font of the atlas; Debian's Noto if left out")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (15)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    arguments = parser.parse_args()
    paths = arguments.font or FONTS
    absent = [path.name for path in paths if not path.is_file()]
    atlas = GlyphAtlas.load(Path(vist_rag.__file__).parent / "assets" / "noto-sans-10px.safetensors")
    texts = [passage.text for passage in demo_passages()]
    result: dict[str, Any] = {"benchmark": "render", **run_facts("python benchmarks/render.py --json")}
    result["versions"] |= {"pillow": version("pillow"), "freetype": features.version("freetype2")}
    if absent:
        font: Font = ImageFont.load_default(SIZE_PX)
        result["fonts"] = "Pillow's own, for the speed only"
        result["pixels"] = f"not compared: {', '.join(absent)} not found; name the atlas' fonts with --font"
    else:
        font = ImageFont.truetype(str(paths[0]), SIZE_PX, layout_engine=ImageFont.Layout.BASIC)
        result["fonts"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        result["pixels"] = {"glyphs": compare_glyphs(atlas, paths), "pages": compare_pages(texts, atlas, paths[0])}
    result["speed"] = speed(texts, Renderer(atlas, CONFIG), font, arguments.rounds)
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        for key, value in {**result["speed"], "pixels": result["pixels"]}.items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
