"""Pictures of the server's page for the docs, taken in Chromium: light, dark, and 360 px wide.

    python benchmarks/screenshots.py --output docs/images

Needs the extras ``serve`` and ``dev``, and a Chromium (``--chromium``). The index is the demo's, of one collection.
"""

from __future__ import annotations

import argparse
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from vist_rag import Budget, Passage, PassageIndex, VistRAG
from vist_rag.serving.page import page_router

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "vist_rag" / "assets" / "demo" / "passages_world.jsonl"
QUESTION = "What is the horseshoe-shaped chasm at Iguazu Falls called in Spanish?"
SHOTS = {
    "inspect-light": {"viewport": {"width": 880, "height": 900}, "color_scheme": "light"},
    "inspect-dark": {"viewport": {"width": 880, "height": 900}, "color_scheme": "dark"},
    "inspect-narrow": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}
PASSAGES, COLOURS = 2, 96
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def shoot(browser: Browser, url: str, name: str, file: Path) -> None:
    """One picture of the page after a question was asked by typing and clicking."""
    page = browser.new_page(**SHOTS[name])
    page.set_default_timeout(120_000)
    page.goto(url)
    page.fill("#question", QUESTION)
    page.click("summary")
    page.fill("#k_memory", str(PASSAGES))
    page.click("summary")
    page.click("#send")
    page.wait_for_selector("#result:not([hidden])")
    page.evaluate("document.activeElement.blur()")
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    page.close()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {picture.width} x {picture.height} px, {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Take the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--index", type=Path, help="an index of the demo's, to save the time of making one")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--only", nargs="*", choices=SHOTS, default=list(SHOTS))
    given = parser.parse_args()
    with TemporaryDirectory() as made, PassageIndex.open(given.index or Path(made) / "index") as index:
        rows = map(json.loads, CORPUS.read_text(encoding="utf-8").splitlines())
        index.add([Passage(row["text"], title=row["title"]) for row in rows])
        rag = VistRAG.from_pretrained(None, index, device="cpu")
        rag.answer(QUESTION, budget=Budget(k_memory=PASSAGES))  # the first answer loads the embedder
        app = FastAPI()
        app.include_router(page_router(rag))
        with served(app) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=given.chromium, args=FLAGS)
            for name in given.only:
                shoot(browser, url, name, given.output / f"{name}.png")
            browser.close()


if __name__ == "__main__":
    main()
