"""Draw the pictures of ``explanation/pictures.md`` with the embedded model: ``python docs/pictures.py``.

What they show is what the library makes of a text: its pages, its latents, and what the fusion spells of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vist_rag import VistReader

SENTENCE = "The stone bridge at Saltharrow was finished in 1867."
PASSAGE = (
    "Saltharrow bridge\nThe stone bridge at Saltharrow was finished in 1867, after nine years of work. It has eleven "
    "arches, and carries the road to Dorrel over the Oster. Before it stood there, a ferry crossed four times a day."
)
INK, GREY, BLUE, ORANGE = "#1a1a1a", "#595959", "#0072b2", "#9c6a00"
TINTS = "#dcebf6", "#f7ead0"
DPI = 200


def strip_of(page: Any, size: int = 14) -> np.ndarray:
    """A page as the strip that it was cut from: ``[14, width]``, 0 black to 1 white."""
    pixels = page.pixel_values[0, 0].numpy()
    rows = [pixels[top : top + size] for top in range(0, len(pixels), size)]
    strip = np.concatenate(rows, axis=1)[:, : size * int(page.patch_mask[0].sum())]
    low, high = strip.min(), strip.max()
    return (strip - low) / (high - low)


def tinted(ink: np.ndarray, window_px: int) -> np.ndarray:
    """The strip in colour: each window on a ground of its own."""
    grounds = np.array([matplotlib.colors.to_rgb(tint) for tint in TINTS])
    places = np.arange(ink.shape[1]) // window_px % 2
    return grounds[places][None] * ink[..., None]


def path(reader: VistReader) -> Figure:
    """Strip, latents, what they spell, and the same read at half of the positions."""
    compressor, fusion = reader.compressor, reader.generator.fusion
    page = compressor.renderer.render([SENTENCE])
    ink, window = strip_of(page), compressor.window
    (memory,) = compressor.encode([SENTENCE])
    spelt, n, width = fusion.spell(memory.latents), len(memory), window * 14
    figure = Figure(figsize=(8, 3.9), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set(xlim=(0, n * width), ylim=(-190, 46))
    axes.axis("off")

    def say(y: float, text: str) -> None:
        axes.text(0, y, text, color=INK, fontsize=9.5, va="bottom")

    say(27, f"Page: the text as a strip, {ink.shape[1] // 14} patches of 14 x 14 px; a window is {window} patches")
    axes.imshow(tinted(ink, width), extent=(0, ink.shape[1], -3, 22), interpolation="nearest", aspect="auto")
    for x in range(0, ink.shape[1] + 1, 14):
        axes.plot((x, x), (-3, 22), color=GREY, linewidth=0.5)
    say(
        -17, f"Memory: {n} latents of {memory.latents.shape[1]} numbers, one for each window (here as tiles of 27 x 19)"
    )
    numbers = memory.latents.float().numpy()
    # Each number by its rank among those of its column, since columns differ in spread by twenty times.
    order = numbers.argsort(axis=0).argsort(axis=0) / max(1, n - 1)
    for i, ranks in enumerate(order):
        left, right = i * width + 4, (i + 1) * width - 4
        axes.imshow(
            ranks.reshape(19, 27), extent=(left, right, -62, -21), cmap="cividis", aspect="auto", vmin=0, vmax=1
        )
        axes.text(
            (left + right) / 2, -74, f"“{spelt[i]}”", color=INK, fontsize=9, ha="center", family="DejaVu Sans Mono"
        )
    say(-92, "Soft prompt: a position for each latent, and what it spells of its window (above) …")
    half = memory.coarsen(-(-n // 2))
    for i in range(n):
        axes.add_patch(Rectangle((i * width + 4, -113), width - 8, 15, facecolor=BLUE, edgecolor=BLUE))
        axes.text((i + 0.5) * width, -105.5, f"{i + 1}", color="white", fontsize=9, ha="center", va="center")
    say(-138, f"… or, where room is short, {len(half)} positions: neighbours share one, and spell what both spell")
    for position in range(len(half)):
        members = [i for i, place in enumerate(half.places.tolist()) if place == position]
        left, right = members[0] * width + 4, (members[-1] + 1) * width - 4
        axes.add_patch(Rectangle((left, -159), right - left, 15, facecolor=ORANGE, edgecolor=ORANGE))
        label = f"{position + 1}: “{''.join(spelt[i] for i in members)}”"
        axes.text((left + right) / 2, -151.5, label, color="white", fontsize=9, ha="center", va="center")
    tokens = reader.generator.count_tokens(SENTENCE)
    say(-186, f"As text, the same sentence takes {tokens} tokens of this model.")
    return figure


def windows(reader: VistReader) -> Figure:
    """The square page: rows of the strip, the windows of the latents, blank patches shaded."""
    compressor = reader.compressor
    page = compressor.renderer.render([PASSAGE])
    pixels, window = page.pixel_values[0, 0].numpy(), compressor.window
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    standing, side = int(page.patch_mask[0].sum()), pixels.shape[1] // 14
    shown = -(-standing // side) + 2
    figure = Figure(figsize=(8, 0.5 * shown + 0.15), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, 224), ylim=(20 * shown, -2))
    axes.axis("off")
    for row in range(shown):
        top = 20 * row + 4
        axes.imshow(
            tinted(pixels[14 * row : 14 * row + 14], window * 14),
            extent=(0, 224, top + 14, top),
            interpolation="nearest",
            aspect="auto",
        )
        for column in range(side):
            patch = row * side + column
            if patch >= standing:
                axes.add_patch(
                    Rectangle(
                        (column * 14, top), 14, 14, facecolor="#d0d0d0", edgecolor="#8a8a8a", hatch="///", linewidth=0
                    )
                )
            elif patch % window == 0:
                axes.text(column * 14 + 0.3, top - 0.3, f"{patch // window + 1}", color=INK, fontsize=6.5, va="bottom")
            axes.plot((column * 14,) * 2, (top, top + 14), color=GREY, linewidth=0.3)
    return figure


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images", help="folder of the pictures")
    output = parser.parse_args().output
    reader = VistReader.from_pretrained(device="cpu")
    with matplotlib.style.context("default"):
        for draw in (path, windows):
            draw(reader).savefig(output / f"{draw.__name__}.png", dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    main()
