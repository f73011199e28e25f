"""The report's section on localized queries: scores, reasons, the map from above. Pure, as `vop.viz.report` is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.colors import Normalize

from vop.pose.localized import RECALLS
from vop.query_cameras import GUESS
from vop.viz.above import Above
from vop.viz.above_plot import draw, scale_of, share

LISTED = 200  # queries of a table, at most


@dataclass(frozen=True, eq=False)
class LocalizedReport:
    """What the section shows."""

    metrics: Mapping[str, object]
    """`vop.pose.localized.metrics`."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """How many queries have no pose, by reason."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """How many queries have their intrinsics from where."""
    failed: Sequence[Mapping[str, object]] = ()
    """The queries without a pose: rows of `vop.pose.localized.SCHEMA`."""
    weakest: Sequence[Mapping[str, object]] = ()
    """Those with one that are worst, by error where it is known, else by inliers; such rows."""
    views: Sequence[Above] = ()
    """The worlds that queries were found in; the largest."""
    hidden: int = 0
    """Worlds that are not among them."""


@dataclass(frozen=True, eq=False)
class ModelsReport:
    """What the section on reconstructed models shows."""

    models: Sequence[Mapping[str, object]]
    """Of each: model (its number), images, points, reprojection_error (pixels), track_length; others are left out."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many images are in no model, by reason."""
    views: Sequence[Above] = ()
    """The models from above, the largest."""


def section(report: LocalizedReport) -> dict:
    """What the template is given."""
    scores, scale = report.metrics, scale_of(report.views) if report.views else None
    return {
        "report": report,
        "judged": scores["judged"] > 0,
        "guessed": GUESS in report.sources,
        "cards": [*_cards(scores)],
        "recalls": [
            {"metres": units, "degrees": degrees, "share": scores[key]}
            for key, (units, degrees) in RECALLS.items()
            if key in scores
        ],
        "views": [_drawn(view, scale) for view in report.views],
        "failed": report.failed[:LISTED],
        "weakest": report.weakest[:LISTED],
        "number": number,
    }


def models_section(report: ModelsReport) -> dict:
    """What the template is given."""
    return {
        "report": report,
        "views": [_drawn(view) for view in report.views],
        "number": number,
    }


def _drawn(view: Above, scale: Normalize | None = None) -> dict:
    return {"title": view.title, "told": view.told, "plot": draw(view, scale), "width": 100 * share(view)}


def number(value: float | None) -> str:
    """A number as the section writes it: three digits that count; a dash for none, ∞ for a wrong world."""
    if value is None:
        return "–"
    return "∞" if value == float("inf") else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cards(scores: Mapping[str, object]):
    yield "localized", f"{scores['localized']:,}", "", f"of {scores['queries']:,} queries"
    if scores["judged"]:
        judged = f"of {scores['judged']:,} queries, failures counted"
        yield "median position error", number(scores["median_translation_error"]), "", f"units of the map, {judged}"
        yield "median rotation error", number(scores["median_rotation_error"]), "°", judged
        if scores["wrong_world"]:
            yield "in a wrong world", f"{scores['wrong_world']:,}", "", "counted as failures"
    yield "median inliers", number(scores["median_inliers"]), "", "of the localized"
