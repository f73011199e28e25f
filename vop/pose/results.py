"""The table of relative pose scores: its columns, its numbers as flat metrics, and Markdown to read."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from vop.schema import PoseConfig

RESULTS = pa.schema(
    [
        ("scene", pa.string()),  # or `MEAN`, or `POOLED`
        ("unit", pa.string()),  # what is counted: query, or pair (each listed one)
        ("k", pa.int32()),  # pairs a query may choose from; null: all that are listed
        ("protocol", pa.string()),
        ("estimator", pa.string()),
        ("threshold_px", pa.float64()),
        ("judged", pa.int64()),  # queries or pairs that the scores are over
        ("failed", pa.int64()),  # of these: without a pose
        ("unrelated", pa.int64()),  # of these: with a pose between different worlds
        ("unjudged", pa.int64()),  # beside these: posed, but the truth is unknown or has no baseline
        ("left_out", pa.int64()),  # beside these: the camera of the query is unknown
        ("auc@5", pa.float64()),  # 0 to 1, `vop.metrics.pose_auc`; null: nothing was judged
        ("auc@10", pa.float64()),
        ("auc@20", pa.float64()),
        ("median_rotation_deg", pa.float64()),  # over the judged; null: half or more have no error
        ("median_translation_deg", pa.float64()),
        ("median_inliers", pa.float64()),  # over those with a pose
        ("mean_matches", pa.float64()),  # over the pairs that are taken
    ]
)
MEAN = "(mean)"  # in brackets, lest a scene be called so; over scenes: of the scores; the counts are sums
POOLED = "(all)"  # the queries or pairs of all scenes in one
COUNTS = ("judged", "failed", "unrelated", "unjudged", "left_out")
SCORES = tuple(name for name in RESULTS.names if "@" in name or name.startswith(("median", "mean")))
AUC_THRESHOLDS = tuple(int(name.removeprefix("auc@")) for name in SCORES if name.startswith("auc@"))


def metrics(results: pa.Table, config: PoseConfig) -> dict[str, object]:
    """The means over scenes as flat keys such as `fixed/opencv/k5/auc@5` (`all` for every listed pair, `pairs`).

    At top level: AUC, counts, protocol, estimator, threshold_px and k of the headline: the protocol `fixed` with the
    first of `config.estimators` and of `config.ks`. None where nothing could be judged.
    """
    flat: dict[str, object] = {}
    headline = ("fixed", config.estimators[0], "query", config.ks[0] if config.ks else None)
    for row in rows_of(results, MEAN):
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        unit = "pairs" if row["unit"] == "pair" else f"k{row['k']}" if row["k"] else "all"
        prefix = f"{row['protocol']}/{row['estimator']}/{unit}"
        flat |= {f"{prefix}/{key}": row[key] for key in ("threshold_px", *SCORES)}
        if case_of(row) == headline:
            flat |= {key: row[key] for key in ("protocol", "estimator", "threshold_px", "k", *COUNTS, *SCORES)}
    return flat


def markdown(results: pa.Table) -> str:
    """The results as tables to read, one for each k and one for the pairs; AUC in percent."""
    rows = results.to_pylist()
    several = len({row["scene"] for row in rows} - {MEAN, POOLED}) > 1
    rows = [row for row in rows if several or row["scene"] not in (MEAN, POOLED)]
    titles = [*dict.fromkeys(map(_title, rows))]
    return "\n".join(_section(title, [row for row in rows if _title(row) == title]) for title in titles)


def _title(row: dict) -> str:
    if row["unit"] == "pair":
        return "Every listed pair"
    if row["k"] == 1:
        return "Queries, by their first pair"
    return f"Queries, by the best of {'their first ' + str(row['k']) if row['k'] else 'all their'} pairs"


def _section(title: str, rows: list[dict]) -> str:
    columns = {
        "protocol": "{protocol}", "estimator": "{estimator}", "px": "{threshold_px:g}", "scene": "{scene}",
        "AUC@5°": "{auc@5}", "@10°": "{auc@10}", "@20°": "{auc@20}", "median R (°)": "{median_rotation_deg}",
        "median t (°)": "{median_translation_deg}", "median inliers": "{median_inliers}",
        "mean matches": "{mean_matches}", "judged": "{judged}", "no pose": "{failed}", "wrong world": "{unrelated}",
        "unjudged": "{unjudged}", "left out": "{left_out}",
    }  # fmt: skip
    lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        shown = row | {key: _shown(key, row[key]) for key in SCORES}
        shown["scene"] = row["scene"].replace("|", "\\|") or "–"
        lines.append("| " + " | ".join(column.format_map(shown) for column in columns.values()) + " |")
    return "\n".join([*lines, ""])


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key.startswith("auc@"):
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if key.endswith("_deg") else f"{value:.0f}"


def rows_of(results: pa.Table, scene: str) -> Iterator[dict]:
    """The rows of a scene, of `MEAN` or of `POOLED`."""
    yield from results.filter(pc.equal(results["scene"], scene)).to_pylist()


def case_of(row: dict) -> tuple[str, str, str, int | None]:
    """What a row is about, beside its scene: protocol, estimator, unit, k."""
    return row["protocol"], row["estimator"], row["unit"], row["k"]
