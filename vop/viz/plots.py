"""Plots as SVG text that takes its colours and its font from the page it is pasted into."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Matplotlib writes colours as numbers; these stand for what only the page knows (light or dark).
INK, ACCENT = "#010203", "#040506"
CURVES = ("#070801", "#070802", "#070803", "#070804", "#070805", "#070806")
PAGE_COLORS = {INK: "currentColor", ACCENT: "var(--accent)"}
PAGE_COLORS |= {color: f"var(--curve-{number})" for number, color in enumerate(CURVES)}

# For paper and slides: the colours of Okabe and Ito, which the colour-blind tell apart, but for the yellow.
SLIDE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = (
    "-",
    (0, (5, 2)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (11, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2.5, 2.5)),
    (0, (9, 1.5, 3, 1.5)),
)  # a curve has one of its own, so that colour is not needed
MOST_DEGREES = 20  # right end of the error curves
STEPS = 1000  # corners of one curve, at most

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vop",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
}
PAPER = STYLE | {key: "black" for key, value in STYLE.items() if value == INK} | {"svg.fonttype": "path"}  # a file


def histogram(values: np.ndarray, label: str, counted: str, alt: str) -> Markup:
    """A histogram as inline SVG; the horizontal axis is logarithmic where the values span more than a factor of 50.

    Args:
        values: (n,) positive finite numbers, n > 0.
        label: what the values are, under the horizontal axis.
        counted: what is counted, beside the vertical axis.
        alt: what a reader who cannot see the plot is told.

    Returns:
        An `<svg>`; the same values give the same text.
    """
    low, high = float(values.min()), float(values.max())
    bars = min(30, max(5, round(2 * len(values) ** 0.5)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.add_subplot()
        if high > 50 * low:
            axes.hist(values, bins=np.geomspace(low, high, bars + 1), color=ACCENT, edgecolor="none")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.hist(values, bins=bars, color=ACCENT, edgecolor="none")
        axes.set_xlabel(label)
        axes.set_ylabel(counted)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        return inline(figure, alt)


def error_curves(curves: Sequence[tuple[str, np.ndarray]], title: str, alt: str) -> Markup:
    """Cumulative error curves as inline SVG: the share of queries with a pose error below each angle up to 20 degrees.

    Args:
        curves: label and sorted errors (n,) of each, degrees; inf for failures, which count in n only.
        title: stands above the plot.
        alt: what a reader who cannot see the plot is told.

    Returns:
        An `<svg>`; the same curves give the same text.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.9), layout="constrained")
        _draw_curves(figure.add_subplot(), curves, title, CURVES)
        _legend(figure, [label for label, _ in curves], columns=1 if len(curves) < 3 else 2)
        return inline(figure, alt)


def curves_file(panels: Mapping[str, Sequence[tuple[str, np.ndarray]]], suffix: str) -> bytes:
    """The curves of `error_curves` as a picture by itself, on white: a panel beside the other for each title.

    Labels name a threshold each, which may differ between panels: every panel has a legend of its own.

    Args:
        panels: title to curves, at least one.
        suffix: png or svg.

    Returns:
        The content of the file; the same curves give the same bytes with the same Matplotlib.
    """
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(5.4 * len(panels), 4.4), layout="constrained")
        parts = figure.subfigures(1, len(panels), squeeze=False)[0]
        for part, (title, curves) in zip(parts, panels.items(), strict=True):
            _draw_curves(part.add_subplot(), curves, title, SLIDE_COLORS)
            _legend(part, [label for label, _ in curves], columns=1 if len(curves) < 3 else 2)
        return as_file(figure, suffix)


def recall_steps(errors: np.ndarray, most: float = MOST_DEGREES) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the curve of recall over error: from x[i] up to x[i + 1] the recall is y[i].

    Args:
        errors: sorted (n,), n > 0; inf for failures.
        most: right end of the curve, its last corner.

    Returns:
        x from 0, and y from 0 to 1. Every distinct error is a corner, unless there are more than `STEPS`: then the
        corners stand evenly, and the recall is exact at each.
    """
    x = np.unique(errors[errors < most])
    if len(x) > STEPS:
        x = np.linspace(0, most, STEPS, endpoint=False)
    x = np.unique(np.concatenate([[0], x, [most]]))
    return x, np.searchsorted(errors, x, side="right") / len(errors)


def _draw_curves(axes: Axes, curves: Sequence[tuple[str, np.ndarray]], title: str, colors: Sequence[str]) -> None:
    with matplotlib.rc_context({"path.simplify": False}):
        for number, (_, errors) in enumerate(curves):
            x, recall = recall_steps(errors)
            axes.step(x, 100 * recall, where="post", color=colors[number % len(colors)],
                      linestyle=DASHES[number % len(DASHES)], linewidth=1.8, solid_joinstyle="miter")  # fmt: skip
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, MOST_DEGREES)
    axes.set_ylim(0, 101)
    axes.set_xticks([0, 5, 10, 15, 20], ["0°", "5°", "10°", "15°", "20°"])
    axes.set_yticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("pose error")
    axes.set_ylabel("queries with at most this error")
    axes.grid()
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)


def _legend(figure: Figure, labels: Sequence[str], columns: int) -> None:
    """Below the axes, where it hides no curve."""
    handles = [line for axes in figure.axes for line in axes.lines]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.6, fontsize=9
    )


def as_file(figure: Figure, suffix: str) -> bytes:
    """A figure drawn in the style `PAPER` as the content of a file, png or svg, on white."""
    content, undated = io.BytesIO(), {"Date": None} if suffix == "svg" else {}
    figure.savefig(content, format=suffix, dpi=200, facecolor="white", metadata=undated)
    return content.getvalue()


def inline(figure: Figure, alt: str) -> Markup:
    """The figure's `<svg>` in the page's colours, without what would reach beyond it: style sheet and unused ids."""
    text, undated = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": alt}):  # the ids of two plots on one page must differ
        figure.savefig(text, format="svg", transparent=True, metadata=undated)
    svg = text.getvalue()
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    for color, page_color in PAGE_COLORS.items():
        svg = svg.replace(color, page_color)
    for name in set(re.findall(r' id="([^"]+)"', svg)):
        if f"#{name}" not in svg:
            svg = svg.replace(f' id="{name}"', "")
    width, height = (figure.get_size_inches() * 72).tolist()
    head = Markup('<svg role="img" class="plot" viewBox="0 0 {:g} {:g}" aria-label="{}">').format(width, height, alt)
    return head + Markup(svg)
