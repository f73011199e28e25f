"""The report of a run directory: gathers what the page shows from the pairs, the store and the images."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import catalog, files, pairs
from vop import config as configuration
from vop.config import Config
from vop.datasets.posed import OverlapTruth
from vop.features import FeatureStore
from vop.pose.protocols import Evaluation
from vop.quantised import widen
from vop.run import Run, versions
from vop.store import EmbeddingStore, Selection
from vop.viz import plots
from vop.viz.localized import LOCALIZED_PICTURES, MODEL_PICTURES, localized_report, models_report
from vop.viz.matches import Picture
from vop.viz.photographs import photograph
from vop.viz.pose_report import choice, ks_of
from vop.viz.posed import pose_report
from vop.viz.report import Match, QueryPanel, Report, write_report

WEAKEST = 20  # images listed as hard to pair
SCORES = 200_000  # scores the histogram is drawn from, at most
CURVES = ("curves.png", "curves.svg")  # of a run directory
PICTURES = (*CURVES, *LOCALIZED_PICTURES, *MODEL_PICTURES)


def write_page(
    config: Config,
    run: Run,
    truth: OverlapTruth | None,
    poses: Evaluation | None = None,
    localized: pa.Table | None = None,
    models: bool = False,
) -> str:
    """Write report.html of a run and return its path.

    `poses`: what a run found that judged relative poses. `localized`: the table of one that localized queries, judged.
    `models`: whether it reconstructed models, which lie in its directory.
    """
    ranking = _ranking(config, run, truth) if "pairs" in run.counts else {"radius": None}
    named = run.counts["root"] or run.counts["store"]
    report = Report(
        title=f"vop {run.command}: {named.rstrip('/').rpartition('/')[2]}",
        summary=_cards(run, quarantined := _quarantined(run)),
        quarantined=quarantined,
        timings=[(step, seconds) for step, seconds in run.timings.items() if step != "total"],
        metrics=_shown_metrics(run.metrics),
        chance={f"precision@{k}": run.metrics["chance"] for k in (1, 5, 10)} if "chance" in run.metrics else {},
        min_overlap=config.min_overlap,
        config_yaml=configuration.to_yaml(config),
        versions=versions(),
        poses=None if poses is None else pose_report(config, run, poses),
        localized=None if localized is None else localized_report(config, run, localized),
        models=models_report(run) if models else None,
        **ranking,
    )
    files.write_bytes(run.path("report.html"), write_report(report).encode())
    return run.path("report.html")


def write_curves(run: Run, poses: Evaluation) -> None:
    """Write the cumulative error curves by themselves, curves.png and curves.svg; nothing where no query is judged."""
    panels = {f"Queries, {choice(k)}": curves for k in ks_of(poses.results) if (curves := poses.curves(k))}
    for name in CURVES if panels else ():
        files.write_bytes(run.path(name), plots.curves_file(panels, name.rpartition(".")[2]))


def _ranking(config: Config, run: Run, truth: OverlapTruth | None) -> dict:
    """What the report says of a run that ranked pairs itself."""
    store = EmbeddingStore.open(run.counts["store"])
    ranked = pairs.read_parquet(run.path("pairs.parquet"))
    best = pairs.best_scores(ranked)
    scores = ranked["weighted"].to_numpy()
    return {
        "radius": run.counts["radius"],
        "panels": _panels(config, run, store, ranked, truth),
        "scores": scores[:: max(1, len(scores) // SCORES)],
        "best_scores": np.array(list(best.values())),
        "weakest": sorted(best.items(), key=lambda item: item[1])[:WEAKEST],
    }


def _quarantined(run: Run) -> list[tuple[str, str]]:
    """The files that could not be used, for descriptors or for local features; each once."""
    stores = [EmbeddingStore.open(run.counts["store"])] if "store" in run.counts else []
    stores += [FeatureStore.open(run.counts["features"])] if "features" in run.counts else []
    return [*dict.fromkeys(bad for store in stores for bad in catalog.quarantined(store.images()))]


def _cards(run: Run, quarantined: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    counts = run.counts
    if "pairs" not in counts:
        numbers = {
            "images": counts["images_with_features"],
            "pairs": counts["pairs_matched"] + sum(counts["pairs_unmatched"].values()),
        }
    else:
        numbers = {"images": counts["images"]}
        if counts["queries"] != counts["images"]:
            numbers |= {"queries": counts["queries"], "database": counts["database"]}
        numbers |= {"pairs": counts["pairs"], "images without a pair": counts["queries"] - counts["queries_with_pairs"]}
    return [(name, f"{number:,}") for name, number in (numbers | {"quarantined files": len(quarantined)}).items()]


def _shown_metrics(metrics: dict[str, object]) -> dict[str, float] | None:
    if "precision@1" not in metrics:
        return None
    shown = ("precision@1", "precision@5", "precision@10", "pair_recall@5", "pair_recall@10")
    return {key: metrics[key] for key in shown}


def _panels(
    config: Config, run: Run, store: EmbeddingStore, ranked: pa.Table, truth: OverlapTruth | None
) -> list[QueryPanel]:
    """The illustrated queries: those whose patch weights the search kept."""
    kept = pairs.read_parquet(run.path("patch_weights.parquet"))
    shown = kept.take(catalog.evenly_spread(kept.num_rows, config.report.queries))
    index = {} if truth is None else {name: row for row, name in enumerate(truth.names)}
    panels = []
    for query, patch_weights in zip(shown["query"].to_pylist(), shown["patch_weights"].to_pylist(), strict=True):
        rows = ranked.filter(pc.equal(ranked["query"], query)).slice(0, config.report.matches).to_pylist()
        names = [query, *(row["database"] for row in rows)]
        pictures = _pictures(run, store.select(names))
        matches = []
        for row in rows:
            known = query in index and row["database"] in index
            overlap = float(truth.matrix[index[query], index[row["database"]]]) if known else None
            matches.append(Match(pictures[row["database"]], row["rank"] + 1, row["weighted"], overlap))
        panels.append(QueryPanel(pictures[query], np.array(patch_weights, np.float32), matches))
    return panels


def _pictures(run: Run, selection: Selection) -> dict[str, Picture]:
    _, patches = selection.read()
    sizes = map(tuple, selection.scaled_sizes.tolist())
    return {
        name: Picture(*photograph(run.counts["root"], name, size), size, widen(values))
        for name, size, values in zip(selection.names, sizes, patches, strict=True)
    }
