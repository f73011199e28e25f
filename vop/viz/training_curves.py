"""The curves of a training: losses over its steps, losses and scores over its epochs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vop.catalog import evenly_spread
from vop.training.learner import LOSSES
from vop.training.loop import SCORES
from vop.viz import plots
from vop.viz.plots import DASHES

POINTS = 500  # of one loss that are drawn, at most
DOTS = 15  # epochs up to which each has a dot of its own; of more the dots would hide the dashes
LOSS_NAMES = dict(zip(LOSSES, ("loss", "positive", "negative"), strict=True))
SHARES = SCORES[1:]  # the scores that are shares of something
DRAWING = {"linewidth": 1.8, "markersize": 4.5}


@dataclass(frozen=True)
class Epoch:
    """An epoch of a training, or what was done of it.

    number: from 1. first, last: its steps, counted from 1. losses: their means over the epoch. scores: of the
    validation after it, those that there are. pairs_per_s: over the whole epoch.
    """

    number: int
    first: int
    last: int
    learning_rate: float
    losses: dict[str, float]
    pairs_per_s: float
    scores: dict[str, float] = field(default_factory=dict)


def loss_rows(history: pa.Table) -> pa.Table:
    """The rows of a history (`vop.training.loop.SCHEMA`) that hold losses: means of the steps since the row before."""
    return history.filter(pc.is_valid(history["loss"])).sort_by("step")


def epochs_of(history: pa.Table) -> list[Epoch]:
    """The epochs of a history, in order."""
    rows = loss_rows(history).to_pylist()
    found: dict[int, list[tuple[int, dict]]] = {}
    before = 0
    for row in rows:
        found.setdefault(row["epoch"], []).append((row["step"] - before, row))
        before = row["step"]
    scores = {
        row["epoch"]: {name: row[name] for name in SCORES if row[name] is not None}
        for row in history.to_pylist()
        if row["loss"] is None
    }
    return [_epoch(number, counted, scores.get(number, {})) for number, counted in sorted(found.items())]


def _epoch(number: int, counted: Sequence[tuple[int, dict]], scores: dict[str, float]) -> Epoch:
    """An epoch from its rows and how many steps each speaks of."""
    steps = np.array([count for count, _ in counted], float)
    rows = [row for _, row in counted]
    losses = {name: float(np.average([row[name] for row in rows], weights=steps)) for name in LOSSES}
    seconds = steps / [row["pairs_per_s"] for row in rows]  # for as many pairs as there are steps
    last = rows[-1]["step"]
    return Epoch(number + 1, int(last - steps.sum()) + 1, last, rows[0]["learning_rate"], losses,
                 float(steps.sum() / seconds.sum()), scores)  # fmt: skip


def throughput(epochs: Sequence[Epoch]) -> float | None:
    """Pairs learned from per second, over all epochs; None without any."""
    steps = np.array([epoch.last - epoch.first + 1 for epoch in epochs])
    return float(steps.sum() / (steps / [epoch.pairs_per_s for epoch in epochs]).sum()) if epochs else None


def training_plots(history: pa.Table, kept: int | None) -> list[Markup]:
    """The curves as inline SVG: losses over steps; where there was a validation, losses and scores over epochs.

    Args:
        history: `vop.training.loop.SCHEMA`, with at least one row of losses.
        kept: the step whose weights are kept; None: none yet.

    Returns:
        `<svg>`s that take their colours from the page; the same history gives the same text.
    """
    drawn = []
    for title, draw, alt in _panels(history, kept):
        with matplotlib.rc_context(plots.STYLE):
            figure = Figure(figsize=(5.4, 4.1), layout="constrained")
            _drawn(figure, title, draw, plots.CURVES)
            drawn.append(plots.inline(figure, alt))
    return drawn


def training_file(history: pa.Table, kept: int | None, suffix: str) -> bytes:
    """The curves of `training_plots` side by side as a picture, png or svg, on white."""
    panels = _panels(history, kept)
    with matplotlib.rc_context(plots.PAPER):
        figure = Figure(figsize=(5.4 * len(panels), 4.4), layout="constrained")
        parts = figure.subfigures(1, len(panels), squeeze=False)[0]
        for part, (title, draw, _) in zip(parts, panels, strict=True):
            _drawn(part, title, draw, plots.SLIDE_COLORS)
        return plots.as_file(figure, suffix)


Draw = Callable[[Axes, Sequence[str]], None]


def _panels(history: pa.Table, kept: int | None) -> list[tuple[str, Draw, str]]:
    """Title, drawing and alternative text of every panel."""
    rows, epochs = loss_rows(history), epochs_of(history)
    at = next((epoch.number for epoch in epochs if epoch.last == kept), None)
    first, last = epochs[0], epochs[-1]
    what = f"epoch means from {first.losses['loss']:.3g} to {last.losses['loss']:.3g}"
    panels: list[tuple[str, Draw, str]] = [
        ("Loss over steps", lambda axes, colors: _losses(axes, colors, rows, epochs, kept),
         f"Loss over {last.last} steps, {what}"),
    ]  # fmt: skip
    scored = [epoch for epoch in epochs if epoch.scores]
    if scored:
        told = ", ".join(f"{name} {value:.3g}" for name, value in scored[-1].scores.items())
        panels += [
            ("Scores of the validation", lambda axes, colors: _scores(axes, colors, scored, at),
             f"Scores of the validation over {len(scored)} epochs, after the last: {told}"),
            ("Loss of training and validation", lambda axes, colors: _compared(axes, colors, epochs, at),
             f"Loss over {len(epochs)} epochs: training {what}, validation at last "
             f"{scored[-1].scores['validation_loss']:.3g}"),
        ]  # fmt: skip
    return panels


def _drawn(figure: Figure, title: str, draw: Draw, colors: Sequence[str]) -> None:
    axes = figure.add_subplot()
    draw(axes, colors)
    axes.set_title(title, fontsize=10)
    axes.grid()
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    handles = [line for line in axes.lines if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, handlelength=3.6, fontsize=9)


def _losses(axes: Axes, colors: Sequence[str], rows: pa.Table, epochs: Sequence[Epoch], kept: int | None) -> None:
    drawn = rows.take(pa.array(evenly_spread(rows.num_rows, POINTS)))
    middles = [(epoch.first + epoch.last) / 2 for epoch in epochs]
    size = 2.6 if drawn.num_rows > 100 else 4
    for number, (name, label) in enumerate(LOSS_NAMES.items()):
        axes.plot(drawn["step"].to_numpy(), drawn[name].to_numpy(), linestyle="none", marker="o", markersize=size,
                  markeredgewidth=0, alpha=0.4, color=colors[number], label="_points")  # fmt: skip
        _line(axes, number, colors, middles, [epoch.losses[name] for epoch in epochs], f"{label}, mean of an epoch")
    _mark(axes, kept, f"kept: step {kept}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step (dots: means of 10 steps)")


def _scores(axes: Axes, colors: Sequence[str], scored: Sequence[Epoch], kept: int | None) -> None:
    for number, name in enumerate(SHARES):
        known = [epoch for epoch in scored if name in epoch.scores]
        if known:
            _line(axes, number, colors, [epoch.number for epoch in known],
                  [100 * epoch.scores[name] for epoch in known], name)  # fmt: skip
    _mark(axes, kept, f"kept: epoch {kept}")
    axes.set_xlim(0.5, scored[-1].number + 0.5)
    axes.set_ylim(0, 101)
    axes.set_yticks([0, 25, 50, 75, 100], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("epoch")


def _compared(axes: Axes, colors: Sequence[str], epochs: Sequence[Epoch], kept: int | None) -> None:
    _line(axes, 0, colors, [epoch.number for epoch in epochs], [epoch.losses["loss"] for epoch in epochs], "training")
    known = [epoch for epoch in epochs if epoch.scores]
    found = [epoch.scores["validation_loss"] for epoch in known]
    _line(axes, 3, colors, [epoch.number for epoch in known], found, "validation")
    _mark(axes, kept, f"kept: epoch {kept}")
    axes.set_xlim(0.5, epochs[-1].number + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")


def _line(axes: Axes, number: int, colors: Sequence[str], x: Sequence, y: Sequence, label: str) -> None:
    marker = "o" if len(x) <= DOTS else None
    axes.plot(x, y, color=colors[number], linestyle=DASHES[number], marker=marker, label=label, **DRAWING)


def _mark(axes: Axes, at: int | None, label: str) -> None:
    if at is not None:
        axes.axvline(at, color=matplotlib.rcParams["text.color"], linewidth=1, linestyle=(0, (2, 2)), alpha=0.7,
                     label=label, zorder=1)  # fmt: skip
