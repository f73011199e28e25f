"""The table of relative pose scores: its columns, its numbers as flat metrics, and Markdown to read."""

import html
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
        ("unjudged", pa.int64()),  # beside the judged: the truth is unknown or has no baseline
        ("unposed", pa.int64()),  # of these: without a pose
        ("left_out", pa.int64()),  # beside all these: the intrinsics of the query are unknown
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
COUNTS = ("judged", "failed", "unrelated", "unjudged", "unposed", "left_out")
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


COLUMNS = {  # of the Markdown tables: title, and how the key of a row is written
    "protocol": "{protocol}", "estimator": "{estimator}", "px": "{threshold_px:g}", "scene": "{scene}",
    "AUC@5°": "{auc@5}", "@10°": "{auc@10}", "@20°": "{auc@20}", "median R (°)": "{median_rotation_deg}",
    "median t (°)": "{median_translation_deg}", "median inliers": "{median_inliers}",
    "mean matches": "{mean_matches}", "judged": "{judged}", "no pose": "{failed}", "wrong world": "{unrelated}",
    "unjudged": "{unjudged}", "unjudged, no pose": "{unposed}", "left out": "{left_out}",
}  # fmt: skip
EMPTY = {"0", "–"}  # a column of nothing else is left away, as is that of the one scene without a name

JUDGED_BY = (
    "A query is judged by the pair with most inliers among its first k: its error is the larger of that pose's "
    "rotation and translation error, infinite without a pose or for one between two worlds"
)
NOTHING = "Nothing could be judged: no true pose of these images is known, or none with a baseline"


def markdown(results: pa.Table) -> str:
    """The results as text to read: how to read them, then a table for each k and one for the pairs; AUC in percent.

    Columns that say nothing in any row are left away, and so is a table that only repeats that of a smaller k.
    """
    rows = results.to_pylist()
    several = len({row["scene"] for row in rows} - {MEAN, POOLED}) > 1
    rows = [row for row in rows if several or row["scene"] not in (MEAN, POOLED)]
    if not any(row["judged"] for row in rows):  # the mean is of judged scenes; what is chosen by its AUC needs one
        rows = [row for row in rows if row["scene"] != MEAN and row["protocol"] == "fixed"]
    lines = [{title: form.format_map(_written(row)) for title, form in COLUMNS.items()} for row in rows]
    titles = [title for title in COLUMNS if not {line[title] for line in lines} <= EMPTY]
    tables: dict[tuple[str, int | None], list[dict]] = {}
    for row, line in zip(rows, lines, strict=True):
        tables.setdefault((row["unit"], row["k"]), []).append(line)
    sections = [
        _section(_title(unit, k), same, titles, table) for (unit, k), same, table in _without_repetition(tables)
    ]
    return "\n".join([_introduction(rows), *sections])


def _introduction(rows: list[dict]) -> str:
    """What the tables are, in a few sentences."""
    protocols = "Protocol `fixed`: the threshold of the estimator was chosen beforehand"
    if any(row["protocol"] == "paper" for row in rows):
        protocols += (
            "; `paper`: it is the one of several with the best AUC@5° on these very queries or pairs, for each "
            "estimator and k, which is optimistic"
        )
    units = "AUC is in percent, errors are in degrees, px (the threshold) are pixels of the original images"
    judged = any(row["judged"] for row in rows)
    told = [protocols, JUDGED_BY, units] if judged else [NOTHING, protocols]
    if any(row["scene"] == MEAN for row in rows):
        told.append(f"{MEAN} is over the scenes, its counts are sums; {POOLED} takes all scenes as one")
    if judged and any(row["unjudged"] for row in rows):
        told.append("Unjudged: the true pose is unknown, or both photographs were taken from one place")
    if any(row["left_out"] for row in rows):
        told.append("Left out: the intrinsics of the query are unknown")
    return ". ".join(told) + ".\n"


def _without_repetition(
    tables: dict[tuple[str, int | None], list[dict]],
) -> Iterator[tuple[tuple[str, int | None], list[str], list[dict]]]:
    """Tables that differ, each with the choices of pairs that give the same one once more."""
    for (unit, k), table in tables.items():
        same = [case for case, other in tables.items() if case[0] == unit and other == table]
        if same[0] == (unit, k):
            yield (unit, k), [_choice(case[1]) for case in same[1:]], table


def _choice(k: int | None) -> str:
    return "all their pairs" if k is None else f"their first {k} pairs"


def _title(unit: str, k: int | None) -> str:
    if unit == "pair":
        return "Every listed pair"
    return "Queries, by their first pair" if k == 1 else f"Queries, by the best of {_choice(k)}"


def _section(title: str, same: list[str], titles: list[str], table: list[dict]) -> str:
    lines = [f"### {title}", ""]
    if same:
        lines += [f"The best of {' or of '.join(same)} gives the same table.", ""]
    lines += ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    lines += ["| " + " | ".join(line[title] for title in titles) + " |" for line in table]
    return "\n".join([*lines, ""])


def _written(row: dict) -> dict:
    scene = html.escape(" ".join(row["scene"].split()), quote=False).replace("|", "\\|") or "–"
    return row | {key: _shown(key, row[key]) for key in SCORES} | {"scene": scene}


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
