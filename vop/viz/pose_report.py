"""The report's section on relative poses: scores, error curves, queries to look at. Pure, as `vop.viz.report` is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from vop.pose.results import AUC_THRESHOLDS, MEAN, POOLED, SCORES, case_of
from vop.viz import plots
from vop.viz.links import Links, draw_links
from vop.viz.matches import Photo

RIGHT = 5.0  # degrees; a query with a smaller pose error is marked as right
Case = tuple[str, int | None]  # unit and k of a table of results
Curves = Sequence[tuple[str, np.ndarray]]  # label, sorted errors in degrees with inf for failures


@dataclass(frozen=True, eq=False)
class PosedQuery:
    """A query and the pair that it is judged by."""

    why: str
    """Why it is shown: the worst, the median, the best."""
    query: Photo
    database: Photo
    rank: int
    """Of the pair among those of the query; 1 is the best."""
    matches: int
    inliers: int
    """As the estimator counted them; 0 without a pose."""
    links: Links | None = None
    """The matches; None: they cannot be read."""
    rotation_error: float | None = None
    """Degrees; None: no pose, or its truth is unknown."""
    translation_error: float | None = None
    """Degrees; None also without a true baseline."""
    reason: str | None = None
    """Why there is no pose; None: there is one."""
    unrelated: bool = False
    """Whether the images belong to different worlds, so that no pose of theirs is true."""

    @property
    def error(self) -> float | None:
        """The pose error, degrees; inf: a failure; None: not judged."""
        if self.reason is not None or self.unrelated:
            return float("inf")
        known = None not in (self.rotation_error, self.translation_error)
        return max(self.rotation_error, self.translation_error) if known else None


@dataclass(frozen=True, eq=False)
class PoseReport:
    """What the section shows."""

    results: pa.Table
    """`vop.pose.results.RESULTS`."""
    headline: tuple[str, str, int | None]
    """Protocol, estimator and k of the numbers at the top and of the queries."""
    judged: bool
    """Whether true poses are known; if not, inliers are all that can be told."""
    curves: Mapping[int | None, Curves] = field(default_factory=dict)
    """Cumulative error curves for each k."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """How many pairs have no pose by the headline's estimator and threshold, by reason."""
    pairs: int = 0
    """Unordered pairs, with a pose or without."""
    queries: Sequence[PosedQuery] = ()
    """Some queries, under the headline's protocol."""


def section(report: PoseReport, add_photo: Callable[[Photo], str]) -> dict:
    """What the template is given; `add_photo` embeds a photograph and returns its id."""
    cases = _cases(report.results)
    protocol, estimator, k = report.headline
    scene = MEAN if report.judged else POOLED  # scenes in which nothing was judged have no part in the mean
    headline = [row for row in report.results.to_pylist() if case_of(row) == (protocol, estimator, "query", k)]
    top = next(row for row in headline if row["scene"] == scene)
    return {
        "report": report,
        "top": top | {key: shown(key, top[key]) for key in SCORES},
        "scenes": sum(row["judged"] > 0 for row in headline if row["scene"] not in (MEAN, POOLED)),
        "choice": choice(k),
        "tables": [_table(report, *case) for case in cases],
        "plots": [_plot(report, k) for unit, k in cases if unit == "query" and len(report.curves.get(k, ()))],
        "hidden": [name for name in ("unjudged", "left_out") if not any(report.results[name].to_pylist())],
        "without": sum(report.reasons.values()),
        "queries": [
            {
                "query": each,
                "drawing": _drawing(each, add_photo),
                "right": (each.error or 0) < RIGHT,
            }
            for each in report.queries
        ],
    }


def choice(k: int | None) -> str:
    """Which of its pairs a query is judged by, for a person."""
    if k == 1:
        return "by the first pair"
    return f"by the best of {'all' if k is None else f'the first {k}'} pairs"


def shown(key: str, value: float | None) -> str:
    """A score as the page writes it: AUC in percent, degrees with two decimals, inliers and matches whole."""
    if value is None:
        return "–"
    if key.startswith("auc@"):
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if key.endswith("_deg") else f"{value:.0f}"


def ks_of(results: pa.Table) -> list[int | None]:
    """Every k that queries are judged at; None, all pairs, only where that differs from the largest number."""
    return [k for unit, k in _cases(results) if unit == "query"]


def _cases(results: pa.Table) -> list[Case]:
    rows: dict[Case, list[dict]] = {}
    for row in results.to_pylist():
        rows.setdefault((row["unit"], row["k"]), []).append({key: row[key] for key in row if key != "k"})
    largest = max((k for unit, k in rows if unit == "query" and k is not None), default=None)
    if largest is not None and rows.get(("query", None)) == rows["query", largest]:
        del rows["query", None]
    return [*rows]


def _table(report: PoseReport, unit: str, k: int | None) -> dict:
    """One table: a group of rows for each protocol and estimator, those of the headline's protocol first."""
    groups: dict[tuple[str, str], list[dict]] = {}
    rows = [row for row in report.results.to_pylist() if (row["unit"], row["k"]) == (unit, k)]
    several = len({row["scene"] for row in rows} - {MEAN, POOLED}) > 1
    for row in sorted(rows, key=lambda row: row["protocol"] != report.headline[0]):
        told = report.judged or row["protocol"] == report.headline[0]  # what is chosen by its AUC needs one
        if told and (several or row["scene"] not in (MEAN, POOLED)):
            line = row | {key: shown(key, row[key]) for key in SCORES}
            groups.setdefault((row["protocol"], row["estimator"]), []).append(line)
    return {
        "title": "Every listed pair by itself" if unit == "pair" else f"Queries, {choice(k)}",
        "unit": "pairs" if unit == "pair" else "queries",
        "open": (unit, k) == ("query", report.headline[2]),
        "groups": [
            {"protocol": protocol, "estimator": estimator, "px": lines[0]["threshold_px"], "rows": lines}
            for (protocol, estimator), lines in groups.items()
        ],
    }


def _plot(report: PoseReport, k: int | None) -> Markup:
    told = []
    for label, errors in report.curves[k]:
        below = (f"{100 * np.mean(errors < at):.0f}% below {at}°" for at in AUC_THRESHOLDS)
        told.append(f"{label}: {', '.join(below)}")
    alt = f"Cumulative pose errors of queries judged {choice(k)}. {'; '.join(told)}"
    return plots.error_curves(report.curves[k], f"Queries, {choice(k)}", alt)


def _drawing(query: PosedQuery, add_photo: Callable[[Photo], str]) -> Markup:
    none = Links(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, bool))
    images = add_photo(query.query), add_photo(query.database)
    return draw_links(query.query, query.database, none if query.links is None else query.links, images)
