"""The report of a run: one HTML page that needs no network, for a person to judge what was found.

Pure: it takes plain data and returns text. Photographs are embedded as JPEG, each once, and drawings refer to them.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from vop.image import thumbnail, to_jpeg
from vop.viz import localized_report, matches, plots
from vop.viz.localized_report import LocalizedReport, ModelsReport
from vop.viz.matches import Photo, Picture
from vop.viz.pose_report import PoseReport, section
from vop.viz.template import rendered

PHOTO_LONG_SIDE = 448
POSED_LONG_SIDE = 720  # drawings of local matches are larger, and few
PHOTO_QUALITY = 80


@dataclass(frozen=True)
class Match:
    """One database image found for a query."""

    picture: Picture
    """The database image."""
    rank: int
    """1 is the best."""
    score: float
    """Predicted overlap, as ranked by."""
    overlap_truth: float | None = None
    """True overlap from 0 to 1; None: not known."""


@dataclass(frozen=True)
class QueryPanel:
    """A query and its best matches."""

    query: Picture
    """The query image."""
    weights: np.ndarray
    """How much each query patch counts, (P,) float, not negative; all ones when votes are not weighted."""
    matches: Sequence[Match] = ()
    """Best first."""


@dataclass(frozen=True)
class Report:
    """All that the page shows. Every number is as the run used it; nothing is looked up."""

    title: str
    """Heading of the page."""
    radius: float | None
    """Cosine distance below which two patches vote for each other; None: nothing was ranked, and the page has no
    section on that."""
    summary: Sequence[tuple[str, str]] = ()
    """(label, value) of the cards at the top: images, pairs, quarantined, time ..."""
    panels: Sequence[QueryPanel] = ()
    """The chosen queries."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Scores of all ranked pairs, (n,)."""
    best_scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """The best score of each query, (Q,)."""
    weakest: Sequence[tuple[str, float]] = ()
    """(name, best score) of the images with the weakest best match, weakest first."""
    quarantined: Sequence[tuple[str, str]] = ()
    """(name, reason) of the files that could not be used; the first 200 are shown and all are counted."""
    timings: Sequence[tuple[str, float]] = ()
    """(step, seconds) in the order they ran."""
    metrics: Mapping[str, float] | None = None
    """Evaluations by name, such as `precision@1`; None: no ground truth."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """What a random ranking would reach, for metrics where that is known."""
    min_overlap: float = 0.1
    """True overlap from which a match counts as right."""
    config_yaml: str = ""
    """The resolved configuration."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name to version."""
    poses: PoseReport | None = None
    """The section on relative poses; None: none were estimated."""
    localized: LocalizedReport | None = None
    """The section on localized queries; None: none were."""
    models: ModelsReport | None = None
    """The section on reconstructed models; None: none were made."""

    def __post_init__(self):
        for name in ("scores", "best_scores"):
            bad = np.count_nonzero(~np.isfinite(getattr(self, name)))
            if bad:
                raise ValueError(
                    f"{name} holds {bad} value(s) that are not finite numbers; a query without any match has no score: "
                    "leave it out"
                )


def write_report(report: Report) -> str:
    """The page as HTML text; the same report gives the same text."""
    photos = _Photos()
    return rendered(
        "report.html",
        report,
        panels=[_panel(panel, report, photos) for panel in report.panels],
        poses=report.poses and section(report.poses, lambda photo: photos.add(photo, POSED_LONG_SIDE)),
        localized=report.localized and localized_report.section(report.localized),
        models=report.models and localized_report.models_section(report.models),
        photos=photos.elements,
        heat=matches.heat_stops(),
        plots=_histograms(report),
    )


class _Photos:
    """The photographs of a page; one that is asked for again is not embedded again."""

    def __init__(self):
        self.elements: dict[str, Markup] = {}

    def add(self, photo: Photo, long_side: int = PHOTO_LONG_SIDE) -> str:
        """The id of a photograph on the page, reduced to `long_side` pixels."""
        jpeg = to_jpeg(thumbnail(photo.rgb, long_side), PHOTO_QUALITY)
        name = "photo-" + hashlib.sha256(jpeg + repr(photo.scaled_size).encode()).hexdigest()[:12]
        self.elements[name] = Markup(
            '<image id="{}" width="{}" height="{}" preserveAspectRatio="none" href="data:image/jpeg;base64,{}"/>'
        ).format(name, *photo.scaled_size, base64.b64encode(jpeg).decode())
        return name


def _panel(panel: QueryPanel, report: Report, photos: _Photos) -> dict:
    query = panel.query
    if panel.weights.shape != (len(query.patches),):
        raise ValueError(
            f"{query.name}: weights have shape {panel.weights.shape}, but must be ({len(query.patches)},), "
            "one for each patch, padding included"
        )
    cell = matches.cell_size([query, *(match.picture for match in panel.matches)])
    photo = photos.add(query)
    support = np.zeros(len(query.patches), np.float32)
    cards = []
    for match in panel.matches:
        similarity = matches.patch_similarities(query, match.picture)
        support += panel.weights * matches.patch_support(similarity, report.radius)
        pairs = matches.matched_patches(similarity, report.radius)
        strength = panel.weights[pairs[:, 0]] / max(panel.weights.max(), np.finfo(np.float32).tiny)
        images = photo, photos.add(match.picture)
        drawing = matches.draw_match(query, match.picture, pairs, strength, images, cell)
        cards.append({"match": match, "drawing": drawing, "n_pairs": len(pairs)})
    return {
        "query": query,
        "n_patches": int(query.mask.sum()),
        "n_supported": int(np.count_nonzero(support)),
        "overlap_map": matches.draw_overlap(query, support, photo),
        "cards": cards,
    }


def _histograms(report: Report) -> list[Markup]:
    asked = (
        (report.best_scores, "best score of a query", "queries"),
        (report.scores, "score of a ranked pair", "pairs"),
    )
    return [_histogram(*each) for each in asked if np.any(each[0] > 0)]


def _histogram(values: np.ndarray, label: str, counted: str) -> Markup:
    positive = values[values > 0]
    without = len(values) - len(positive)
    if without:
        label += f" ({without} {counted} without votes not shown)"
    span = f"from {positive.min():.4g} to {positive.max():.4g}, median {np.median(positive):.4g}"
    return plots.histogram(positive, label, counted, f"Histogram of {len(positive)} {counted}: {label}, {span}")
