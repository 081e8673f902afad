"""``vist-rag render`` and ``vist-rag info``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.cli import failure, not_writable, run, run_json, word_embedder
from tests.support.tiny import save_tiny_checkpoint, tiny_compressor


@pytest.fixture(scope="module", autouse=True)
def _embedder() -> Iterator[None]:
    with word_embedder():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def _picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_a_text_is_a_picture_with_ink_in_its_first_rows(tmp_path: Path) -> None:
    report = run_json("render", "The old bridge was built in 1867.", "-o", tmp_path / "page.png", "--scale", 1)
    assert report["files"] == [str(tmp_path / "page.png")]
    assert (report["pages"], report["coverage"], report["characters"]) == (1, 1.0, 33)
    picture = _picture(tmp_path / "page.png")
    assert (picture[:18] < 100).sum() > 200  # the text is one row
    assert (picture[18:] < 100).sum() == 0
    assert (_picture_of(tmp_path, "The old bridge was built in 1868.") != picture).any()


def _picture_of(directory: Path, text: str) -> np.ndarray:
    run_json("render", text, "-o", directory / "other.png", "--scale", 1)
    return _picture(directory / "other.png")


def test_a_long_text_takes_several_files(tmp_path: Path) -> None:
    text = "All work and no play makes Jack a dull boy. " * 30
    report = run_json("render", text, "-o", tmp_path / "page.png")
    assert report["pages"] == len(report["files"]) > 1
    assert [Path(file).name for file in report["files"][:2]] == ["page.png", "page-2.png"]
    assert all(_picture(Path(file)).size for file in report["files"])


def test_what_has_no_glyph_is_counted(tmp_path: Path) -> None:
    result = run("render", "ab上海", "-o", tmp_path / "page.png")
    assert result.exit_code == 0
    assert "50.0% have a glyph, the rest are boxes" in result.stdout


def test_standard_input_and_a_checkpoints_own_glyphs(tiny: Path, tmp_path: Path) -> None:
    result = run("render", "-", "-o", tmp_path / "a.png", "--model", tiny, stdin="Zoë".encode())
    assert result.exit_code == 0
    assert "3 characters on 1 page\n" in result.stdout
    run_json("render", "Zoë", "-o", tmp_path / "b.png")
    assert (_picture(tmp_path / "a.png") == _picture(tmp_path / "b.png")).all()


def test_an_empty_text_is_a_blank_page(tmp_path: Path) -> None:
    assert run_json("render", "", "-o", tmp_path / "page.png")["patches"] == 0


def test_bad_input_is_told(tmp_path: Path) -> None:
    assert "must end in .png" in failure("render", "x", "-o", tmp_path / "page.jpg")
    assert "--scale must be in 1..20" in failure("render", "x", "-o", tmp_path / "page.png", "--scale", 0)
    assert "No such file" in failure("render", "x", "-o", tmp_path / "nowhere" / "page.png")
    assert "must be UTF-8" in failure("render", "-", "-o", tmp_path / "page.png", stdin=b"a\xff")
    (tmp_path / "directory.png").mkdir()
    assert "directory" in failure("render", "x", "-o", tmp_path / "directory.png")
    with not_writable(tmp_path):
        assert "denied" in failure("render", "x", "-o", tmp_path / "page.png").lower()


def test_info_tells_of_versions_machine_and_checkpoint(tiny: Path) -> None:
    report = run_json("info", "--model", tiny)
    compressor = tiny_compressor()
    assert report["versions"]["torch"]
    assert report["machine"]["device"]
    checkpoint = report["checkpoint"]
    assert len(checkpoint["fingerprint"]) == 64
    assert checkpoint["fusion"] == "soft_prompt"
    assert checkpoint["parameters"]["resampler"] == sum(p.numel() for p in compressor.resampler.parameters())
    assert checkpoint["bytes"]["compressor"] > 2 * checkpoint["parameters"]["vision_tower"]
    assert checkpoint["settings"]["budget"] == {"k_raw": 0, "k_memory": 2, "latents": 16}
    assert "index" not in report


def test_info_counts_what_an_index_holds(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The old bridge was built in 1867.")
    index = tmp_path / "index"
    run_json("index", tmp_path / "a.txt", "--index", index, "--no-memory")
    before = run_json("info", "--model", tiny, "--index", index)["index"]
    assert (before["passages"], before["memories_of_this_checkpoint"], before["dimension"]) == (1, 0, 256)
    run_json("index", tmp_path / "a.txt", "--index", index, "--model", tiny)
    report = run_json("info", "--model", tiny, "--index", index)
    assert report["index"]["memories"] == {report["checkpoint"]["fingerprint"]: 1}
    shown = run("info", "--model", tiny, "--index", index).stdout
    assert "1 of this checkpoint" in shown
    assert report["checkpoint"]["fingerprint"] in shown


def test_info_of_what_is_not_there(tiny: Path, tmp_path: Path) -> None:
    assert "does not exist" in failure("info", "--model", tiny, "--index", tmp_path / "nowhere")
    assert "vist.json" in failure("info", "--model", tmp_path)
