"""The page of a training: how it went, what is kept of it, and how that is used. Pure, as `vop.viz.report` is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from vop.training.loop import SCORES
from vop.viz.template import rendered
from vop.viz.training_curves import SHARES, epochs_of, training_plots

SCORE_NAMES = {"validation_loss": "validation loss"}


@dataclass(frozen=True, eq=False)
class TrainingReport:
    """All that the page shows. Every number is as the run used it; nothing is looked up."""

    title: str
    """Heading of the page."""
    history: pa.Table
    """What was measured while training (`vop.training.loop.SCHEMA`)."""
    kept: int | None
    """The step whose weights are kept; None: the training has not ended."""
    best: str
    """Score that decides what is kept, as in `TrainConfig.best`."""
    summary: Sequence[tuple[str, str]] = ()
    """(label, value) of the cards at the top."""
    left_out: Sequence[tuple[str, str, int]] = ()
    """(what, reason, how many): pairs without labels, images without overlap."""
    card: Sequence[tuple[str, str]] = ()
    """Label and text of the model card; empty: there is no encoder yet."""
    use: str | None = None
    """Command that uses the encoder; None: there is none yet."""
    quarantined: Sequence[tuple[str, str]] = ()
    """(name, reason) of the files that could not be used; the first 200 are shown and all are counted."""
    timings: Sequence[tuple[str, float]] = ()
    """(step, seconds) in the order they ran."""
    config_yaml: str = ""
    """The resolved configuration."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name to version."""


def write_training_report(report: TrainingReport) -> str:
    """The page as HTML text; the same report gives the same text."""
    epochs = epochs_of(report.history)
    kept = next((epoch for epoch in epochs if epoch.last == report.kept), None)
    scores = [name for name in SCORES if any(name in epoch.scores for epoch in epochs)]
    return rendered(
        "training.html",
        report,
        epochs=epochs,
        kept=kept,
        scores={name: SCORE_NAMES.get(name, name) for name in scores},
        decisive="validation_loss" if report.best == "loss" else report.best,
        plots=training_plots(report.history, report.kept) if epochs else [],
        left_out=sum(number for _, _, number in report.left_out),
        shown=shown,
    )


def shown(name: str, value: float | None) -> str:
    """A score as the page writes it: shares in percent, losses as they are."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if name in SHARES else f"{value:.4f}"
