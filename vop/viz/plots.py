"""Plots as SVG text that takes its colours and its font from the page it is pasted into."""

import io
import re

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Matplotlib writes colours as numbers; these two stand for what only the page knows (light or dark).
INK, ACCENT = "#010203", "#040506"
PAGE_COLORS = {INK: "currentColor", ACCENT: "var(--accent)"}

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
        return _inline(figure, alt)


def _inline(figure: Figure, alt: str) -> Markup:
    """The figure's `<svg>` in the page's colours, without what would reach beyond it: style sheet and unused ids."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
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
