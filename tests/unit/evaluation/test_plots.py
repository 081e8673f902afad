"""Plots of synthetic result files: PNG of one width, the same bytes from the same figures, readable without colour."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.synthetic_results import block, cell, latency, synthetic_block
from vist_rag.errors import MissingDependencyError
from vist_rag.evaluation import plots
from vist_rag.evaluation.plots import LATENCY, METHODS, Plot, ordered, style

needs_matplotlib = pytest.mark.usefixtures("_matplotlib")


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def _tokens(some: dict[str, Any]) -> Plot:
    return plots.score_against_tokens("name", "synthetic", [("panel", some)])


def _over_k(some: dict[str, Any]) -> Plot:
    other = synthetic_block(10)
    return plots.score_against_k("name", [("panel", [some, other])], [2.3])


def _bytes(some: dict[str, Any]) -> Plot:
    return plots.tokens_against_bytes("name", [("panel", some)])


def _size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@needs_matplotlib
@pytest.mark.parametrize("draw", [_tokens, _over_k, _bytes])
def test_a_plot_is_the_same_from_the_same_figures_and_another_from_others(draw: Callable[..., Plot]) -> None:
    some = synthetic_block(1)
    plot = draw(some)
    assert plot == draw(synthetic_block(1))
    assert _size(plot.png)[0] == plots.WIDTH_PX
    memory = next(c for c in some["cells"] if c["method"] == "memory" and c["rate"] == 2.3)
    memory |= {"em": memory["em"] + 0.1, "em_95": [0.2, 0.7], "memory_bytes": 2 * memory["memory_bytes"]}
    assert draw(some).png != plot.png


@needs_matplotlib
def test_the_file_says_neither_when_nor_by_what_it_was_made() -> None:
    png = _tokens(synthetic_block(1)).png
    assert b"Software" not in png
    assert b"tIME" not in png
    assert b"tEXt" not in png


@needs_matplotlib
def test_the_readers_own_settings_change_nothing() -> None:
    import matplotlib

    plain = _tokens(synthetic_block(1)).png
    with matplotlib.rc_context({"axes.facecolor": "red", "font.family": "monospace", "lines.linewidth": 9}):
        assert _tokens(synthetic_block(1)).png == plain


@needs_matplotlib
def test_two_panels_stand_side_by_side_and_four_in_two_rows() -> None:
    some = synthetic_block(1)
    heights = [_size(plots.score_against_tokens("n", "t", [("p", some)] * n).png)[1] for n in (2, 3, 4)]
    assert heights[0] < heights[1] == heights[2]


@needs_matplotlib
def test_points_are_where_the_figures_are_and_closed_book_is_a_line_without_tokens() -> None:
    from matplotlib.figure import Figure

    some = block([cell("closed_book", None, 0.05), cell("memory", 2.0, 0.4), cell("memory", 4.0, 0.3)])
    axes = Figure().add_subplot()
    for method in ("closed_book", "memory"):
        plots._draw_method(axes, some, method, style(method))
    closed, memory = axes.get_lines()[:2]
    assert list(closed.get_ydata()) == [5.0, 5.0]
    assert list(memory.get_xdata()) == [37.5, 75.0]
    assert list(memory.get_ydata()) == [30.0, 40.0]
    (bars,) = axes.collections
    assert [[round(y, 6) for _, y in bar] for bar in bars.get_segments()] == [[24.0, 36.0], [34.0, 46.0]]


@needs_matplotlib
def test_times_to_the_first_token_are_drawn_with_and_without_quartiles() -> None:
    with_quartiles = plots.first_token_against_k("name", [("panel", latency())])
    points = [{k: v for k, v in point.items() if k != "ttft_ms_quartiles"} for point in latency()["points"]]
    without = plots.first_token_against_k("name", [("panel", latency(points=points))])
    assert with_quartiles.png != without.png
    assert "raw text, memory, encoded now, memory, ready" in with_quartiles.alt


@needs_matplotlib
def test_cells_without_figures_are_left_out() -> None:
    some = block([cell("memory", 2.3, 0.4), {"method": "mean_pool", "rate": 2.3, "em": None}])
    assert _size(_tokens(some).png)[0] == plots.WIDTH_PX
    assert _size(_tokens(block([{"method": "memory", "em": None}])).png)[0] == plots.WIDTH_PX


def test_the_alternative_text_names_panels_and_methods() -> None:
    pytest.importorskip("matplotlib")
    plot = plots.score_against_tokens("name", "synthetic", [("dev, k = 1", synthetic_block(1))])
    assert "EM against tokens read, synthetic; panels: dev, k = 1." in plot.alt
    assert "LLMLingua-2" in plot.alt


def test_methods_come_in_their_order_and_unknown_ones_after_them() -> None:
    assert ordered(["zebra", "raw", "apple", "closed_book", "raw"]) == ["closed_book", "raw", "apple", "zebra"]
    assert style("zebra").label == "zebra"
    apple, zebra = (style(name, ["zebra", "apple", "raw"]) for name in ("apple", "zebra"))
    assert apple.marker != zebra.marker


def test_no_two_methods_share_a_marker_and_all_colours_stand_out_from_white() -> None:
    for known in (METHODS, LATENCY):
        markers = [look.marker for look in known.values()]
        assert len(set(markers)) == len(markers)
        for look in known.values():
            assert _contrast_with_white(look.colour) >= 3


def test_words_and_numbers_of_a_plot_stand_out_as_text_must() -> None:
    texts = {key: colour for key, colour in plots._STYLE.items() if key in ("text.color", "axes.labelcolor")}
    assert len(texts) == 2
    assert all(_contrast_with_white(str(colour)) >= 4.5 for colour in texts.values())
    assert _contrast_with_white(str(plots._STYLE["axes.edgecolor"])) >= 3


def _contrast_with_white(colour: str) -> float:
    """WCAG 2.2, definitions of contrast ratio and relative luminance."""
    assert re.fullmatch("#[0-9a-f]{6}", colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 1.05 / (sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(MissingDependencyError, match=r"plots needs matplotlib.*vist-rag\[eval\]"):
        _tokens(synthetic_block(1))
