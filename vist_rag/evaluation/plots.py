"""The plots of a report: figures of result files -> PNG, the same bytes from the same figures.

Colours are Okabe and Ito's, the light ones darkened until they stand out from white (3:1 and more); each method has a
marker of its own besides, so that no two are told apart by colour alone.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vist_rag.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PX = 1600
"""Of every plot: twice the 800 pixels that a page shows it at."""

_DPI = 200
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": "#1a1a1a",
    "axes.labelcolor": "#1a1a1a",
    "axes.edgecolor": "#595959",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
_ORANGE, _SKY, _GREEN, _BLUE, _RED, _PURPLE = "#9c6a00", "#2a7aa6", "#00815d", "#0072b2", "#d55e00", "#b0508a"
_BLACK, _GREY = "#1a1a1a", "#6b6b6b"


@dataclass(frozen=True, slots=True)
class Style:
    """How a method is called and drawn."""

    label: str
    colour: str = _SKY
    marker: str = "<"
    dashed: bool = False
    heavy: bool = False


METHODS: Mapping[str, Style] = {
    "closed_book": Style("closed book", _GREY, ""),
    "raw": Style("raw text", _BLACK, "*"),
    "truncated": Style("truncated text", _ORANGE, "v"),
    "frequency": Style("frequency deletion", _ORANGE, "^", dashed=True),
    "llmlingua2": Style("LLMLingua-2", _RED, "s"),
    "memory": Style("memory (ours, shipped)", _BLUE, "o", heavy=True),
    "memory_matched": Style("memory (ours, baselines' training steps)", _BLUE, "D", dashed=True),
    "slow_fast": Style("slow-fast", _GREEN, "X"),
    "mean_pool": Style("mean pool", _BLACK, "P"),
    "text_encoder": Style("text encoder + resampler", _PURPLE, "p"),
    "text_encoder_flat": Style("text encoder, no resampler", _PURPLE, "d", dashed=True),
    "shuffled_memory": Style("shuffled memory", _GREY, "x", dashed=True),
    "blank_memory": Style("blank memory", _GREY, "+", dashed=True),
}
"""The methods that this package measures, in the order in which a report shows them."""

LATENCY: Mapping[str, Style] = {
    "raw": Style("raw text", _BLACK, "s"),
    "memory_made_now": Style("memory, encoded now", _RED, "^"),
    "memory_ready": Style("memory, ready", _BLUE, "o"),
}
"""What the time to the first token is measured of."""

_OTHERS = "<>84"


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, and what it shows in words."""

    name: str
    alt: str
    png: bytes


def ordered(methods: Sequence[str], known: Mapping[str, Style] = METHODS) -> list[str]:
    """Each method once: the known ones in their order, then the others by name."""
    return [m for m in known if m in methods] + sorted(set(methods) - set(known))


def style(method: str, among: Sequence[str] = (), known: Mapping[str, Style] = METHODS) -> Style:
    """The style of a method; an unknown one keeps its own name, and has a marker by its place ``among`` them."""
    if method in known:
        return known[method]
    others = [m for m in ordered(among, known) if m not in known]
    return Style(method, marker=_OTHERS[others.index(method) % len(_OTHERS)] if others else "<", dashed=True)


def metric_name(metric: str) -> str:
    """How people write a metric."""
    return {"em": "EM", "f1": "F1"}.get(metric, metric)


def main_metric(block: Mapping[str, Any]) -> tuple[str, float]:
    """The first metric of a block, and what its values are multiplied with: 100 where a report gives per cent."""
    metric: str = block["metrics"][0]
    return metric, 1.0 if metric in block.get("lower_is_better", ()) else 100.0


def score_against_tokens(name: str, title: str, panels: Sequence[tuple[str, Mapping[str, Any]]]) -> Plot:
    """The main metric against the tokens read: a panel for each block, a line for each method.

    Closed book, which reads none, is a horizontal line; raw text is a star.

    Args:
        name: File name without ending.
        title: What the blocks have in common.
        panels: What to write above each panel, and its block.
    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    methods = ordered([cell["method"] for _, block in panels for cell in block["cells"]])
    metric = metric_name(panels[0][1]["metrics"][0])

    def draw(axes: Axes, block: Mapping[str, Any]) -> None:
        for method in methods:
            _draw_method(axes, block, method, style(method, methods))
        _plain_log(axes)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens read for the passages", ylabel=_unit(block))

    drawn = [(above, block, draw) for above, block in panels]
    alt = (
        f"{metric} against tokens read, {title}; panels: {'; '.join(above for above, _ in panels)}. "
        f"Methods: {_labels(methods)}. The tables give the figures."
    )
    return Plot(name, alt, _png(drawn))


def score_against_k(
    name: str, panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], rates: Sequence[float | None]
) -> Plot:
    """The main metric against the number of passages: a panel for each series of blocks, all methods at one rate.

    Args:
        name: File name without ending.
        panels: What to write above each panel, and its blocks, by ``top_k``.
        rates: The rate of each panel; methods without a setting are drawn beside those that have it.
    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    of_panel = {above: rate for (above, _), rate in zip(panels, rates, strict=True)}
    points: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for above, blocks in panels:
        points[above] = {}
        for block in blocks:
            metric, factor = main_metric(block)
            for cell in block["cells"]:
                rate = cell.get("rate")
                alone = cell["method"] in ("raw", "closed_book")
                if (rate == of_panel[above] or alone) and cell.get(metric) is not None:
                    point = (block["top_k"], *_with_interval(cell, metric, factor))
                    points[above].setdefault(cell["method"], []).append(point)
    methods = ordered([method for some in points.values() for method in some])

    def draw(axes: Axes, what: tuple[str, Sequence[Mapping[str, Any]]]) -> None:
        above, blocks = what
        ks = [block["top_k"] for block in blocks]
        step = (max(ks) / min(ks)) ** 0.008  # methods stand side by side, or their intervals would hide each other
        for place, method in enumerate(methods):
            shift = step ** (place - (len(methods) - 1) / 2)
            shifted = [(k * shift, *rest) for k, *rest in points[above].get(method, ())]
            if shifted:
                _draw_line(axes, shifted, style(method, methods))
        _plain_log(axes)
        axes.set_xticks(ks, labels=[str(k) for k in ks])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="passages read (k)", ylabel=_unit(blocks[0]))

    drawn = [(above, (above, blocks), draw) for above, blocks in panels]
    alt = (
        f"{metric_name(panels[0][1][0]['metrics'][0])} against the number of passages k, methods side by side; "
        f"panels: {'; '.join(above for above, _ in panels)}. Methods: {_labels(methods)}. The tables give the figures."
    )
    return Plot(name, alt, _png(drawn, columns=1))


def first_token_against_k(name: str, panels: Sequence[tuple[str, Mapping[str, Any]]]) -> Plot:
    """The time to the first token against the number of passages; bars are quartiles.

    Args:
        name: File name without ending.
        panels: What to write above each panel, and its latency file.
    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    methods = ordered([point["method"] for _, file in panels for point in file["points"]], LATENCY)

    def draw(axes: Axes, file: Mapping[str, Any]) -> None:
        for method in methods:
            some = [point for point in file["points"] if point["method"] == method]
            if some:
                drawn = [
                    (p["k"], p["ttft_ms"], *(p.get("ttft_ms_quartiles") or (p["ttft_ms"], p["ttft_ms"]))) for p in some
                ]
                _draw_line(axes, drawn, style(method, methods, LATENCY))
        axes.set_xticks(sorted({point["k"] for point in file["points"]}))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="passages read (k)", ylabel="time to first token (ms)")

    drawn = [(above, file, draw) for above, file in panels]
    alt = (
        f"Time to the first token against the number of passages k; panels: {'; '.join(a for a, _ in panels)}. "
        f"Methods: {_labels(methods, LATENCY)}. The table gives the figures."
    )
    return Plot(name, alt, _png(drawn, LATENCY))


def tokens_against_bytes(name: str, panels: Sequence[tuple[str, Mapping[str, Any]]]) -> Plot:
    """The tokens that a question's passages take against the bytes that are kept for them.

    Args:
        name: File name without ending.
        panels: What to write above each panel, and its block.
    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    methods = ordered([cell["method"] for _, block in panels for cell in block["cells"] if has_bytes(cell)])

    def draw(axes: Axes, block: Mapping[str, Any]) -> None:
        for method in methods:
            some = [cell for cell in block["cells"] if cell["method"] == method and has_bytes(cell)]
            points = [(c["memory_bytes"] / 1000, *(c["compressed_tokens"],) * 3) for c in some]
            if points:
                _draw_line(axes, points, style(method, methods))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="memory kept (kB)", ylabel="tokens read for the passages")

    drawn = [(above, block, draw) for above, block in panels]
    alt = (
        f"Tokens read against kilobytes of memory kept; panels: {'; '.join(a for a, _ in panels)}. "
        f"Methods: {_labels(methods)}. The tables give the figures."
    )
    return Plot(name, alt, _png(drawn))


def has_bytes(cell: Mapping[str, Any]) -> bool:
    """Whether a cell tells what is kept, and what is read of it."""
    return bool(cell.get("memory_bytes")) and bool(cell.get("compressed_tokens"))


# ------------------------------------------------------------------------------------------------------------ drawing


def _labels(methods: Sequence[str], known: Mapping[str, Style] = METHODS) -> str:
    return ", ".join(style(method, methods, known).label for method in methods)


def _unit(block: Mapping[str, Any]) -> str:
    metric, factor = main_metric(block)
    return metric_name(metric) + (" (%)" if factor == 100 else "")


def _with_interval(cell: Mapping[str, Any], metric: str, factor: float) -> tuple[float, float, float]:
    value = cell[metric]
    low, high = cell.get(f"{metric}_95") or (value, value)
    return factor * value, factor * low, factor * high


def _draw_method(axes: Axes, block: Mapping[str, Any], method: str, look: Style) -> None:
    """One method of one block against tokens."""
    metric, factor = main_metric(block)
    cells = [cell for cell in block["cells"] if cell["method"] == method and cell.get(metric) is not None]
    if method == "closed_book":
        for cell in cells:
            axes.axhline(factor * cell[metric], color=look.colour, linestyle=":", linewidth=1.6, label=look.label)
        return
    points = [
        (cell["compressed_tokens"], *_with_interval(cell, metric, factor))
        for cell in cells
        if cell.get("compressed_tokens")
    ]
    if points:
        _draw_line(axes, points, look)


def _draw_line(axes: Axes, points: Sequence[Sequence[float]], look: Style) -> None:
    """Points of (x, y, low, high), joined from left to right; dashed lines have hollow markers."""
    x, y, low, high = zip(*sorted(points, key=tuple), strict=True)
    below, above = ([abs(a - b) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
    axes.errorbar(
        x,
        y,
        yerr=(below, above),
        label=look.label,
        color=look.colour,
        marker=look.marker or None,
        markersize=11 if look.marker == "*" else 6,
        markerfacecolor="white" if look.dashed else look.colour,
        markeredgewidth=1.3 if look.dashed else 0.8,
        linestyle=(0, (4, 2)) if look.dashed else ":" if not look.marker else "-",
        linewidth=2.4 if look.heavy else 1.4,
        elinewidth=0.8,
        zorder=4 if look.heavy else 3,
    )


def _plain_log(axes: Axes) -> None:
    """A logarithmic x axis, because rates are ratios, with numbers at 1, 2, 5, 10, 20, ..."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _png(
    panels: Sequence[tuple[str, Any, Callable[[Axes, Any], None]]],
    known: Mapping[str, Style] = METHODS,
    columns: int = 2,
) -> bytes:
    """Panels of (what to write above, data, how to draw them), and one legend for all of them."""
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("A report with plots", "matplotlib", "eval") from error
    # "default" first: the reader's own matplotlibrc must not change a page.
    with matplotlib.style.context(["default", _STYLE]):
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(layout="constrained", dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        for place, (above, data, draw) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            draw(axes, data)
            axes.set_title("\n".join(textwrap.wrap(above, 104 // columns)), loc="left")
        lines = _legend(figure, known)
        figure.set_size_inches(WIDTH_PX / _DPI, rows * (3.3 if columns == 2 else 3.8) + 0.22 * lines)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()


def _legend(figure: Figure, known: Mapping[str, Style]) -> int:
    """One legend below all panels, in the order of ``known``. Returns its lines."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    first = [look.label for look in known.values() if look.label in handles]
    labels = [*first, *sorted(set(handles) - set(first))]
    if not labels:
        return 0
    columns = min(3, len(labels))
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=columns)
    return -(-len(labels) // columns)
