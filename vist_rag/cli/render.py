"""``vist-rag render``: what the compressor sees of a text, as pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vist_rag.cli.models import load_compressor_of
from vist_rag.cli.terminal import JsonOption, command, count, emit_json, out, printable, working
from vist_rag.errors import ConfigError, InputError

if TYPE_CHECKING:
    from vist_rag.rendering import Renderer

_ATLAS = Path(__file__).parents[1] / "assets" / "noto-sans-10px.safetensors"


@command
def render(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is drawn; - reads standard input.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.png", help="A second page goes to FILE-2.png, and so on.")
    ],
    scale: Annotated[int, typer.Option(help="Pixels of the picture for each pixel of the page.")] = 3,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR|HUB_ID",
            help="Use the glyphs and sizes of this checkpoint.",
            show_default="the atlas of vist-rag",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a text on the pages that the vision tower reads, and save them as PNG.

    A page is one strip of text, cut into rows. Grey: blank patches, which the tower does not attend to. Characters
    that no glyph covers are boxes, and counted.
    """  # fmt: skip
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output must end in .png, got {output}.")
    if not 1 <= scale <= 20:
        raise ConfigError(f"--scale must be in 1..20, got {scale}.")
    if text == "-":
        text = _standard_input()
    with working("drawing"):
        pages = _renderer(model).render([text])
        files = [output if i == 0 else output.with_stem(f"{output.stem}-{i + 1}") for i in range(len(pages))]
        for i, file in enumerate(files):
            pages.to_image(i, scale=scale).save(file, "PNG")
    report = {
        "files": [str(file) for file in files],
        "pages": len(pages),
        "characters": len(text),
        "patches": int(pages.patch_mask.sum()),
        "coverage": round(float(pages.coverage[0]), 4),
    }
    if as_json:
        emit_json(report)
        return
    line = f"{', '.join(map(str, files))}: {count(len(text), 'character')} on {count(len(pages), 'page')}"
    covered = "" if report["coverage"] == 1 else f"; {report['coverage']:.1%} have a glyph, the rest are boxes"
    out.print(printable(line + covered), markup=False, soft_wrap=True)


def _standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input must be UTF-8 text, got byte {data[error.start]:#04x} at {error.start}."
        ) from error


def _renderer(model: str | None) -> Renderer:
    if model is not None:
        return load_compressor_of(model).renderer
    from vist_rag.config import RendererConfig
    from vist_rag.rendering import GlyphAtlas, Renderer

    return Renderer(GlyphAtlas.load(_ATLAS), RendererConfig(channels=1))
