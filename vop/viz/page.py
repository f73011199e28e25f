"""The report of a run directory: gathers what the page shows from the pairs, the store and the images."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import catalog, files, pairs
from vop import config as configuration
from vop.config import Config
from vop.datasets.posed import OverlapTruth
from vop.image import ImageError, decode
from vop.pose.protocols import Evaluation
from vop.quantised import widen
from vop.run import Run, versions
from vop.store import EmbeddingStore, Selection
from vop.viz.matches import Picture
from vop.viz.report import Match, QueryPanel, Report, write_report

WEAKEST = 20  # images listed as hard to pair
SCORES = 200_000  # scores the histogram is drawn from, at most


def write_page(config: Config, run: Run, truth: OverlapTruth | None, poses: Evaluation | None = None) -> str:
    """Write report.html of a run and return its path."""
    store = EmbeddingStore.open(run.counts["store"])
    ranked = pairs.read_parquet(run.path("pairs.parquet"))
    best = pairs.best_scores(ranked)
    scores = ranked["weighted"].to_numpy()
    report = Report(
        title=f"vop {run.command}: {(run.counts['root'] or run.counts['store']).rstrip('/').rpartition('/')[2]}",
        radius=run.counts["radius"],
        summary=_cards(run),
        panels=_panels(config, run, store, ranked, truth),
        scores=scores[:: max(1, len(scores) // SCORES)],
        best_scores=np.array(list(best.values())),
        weakest=sorted(best.items(), key=lambda item: item[1])[:WEAKEST],
        quarantined=list(catalog.quarantined(store.images())),
        timings=[(step, seconds) for step, seconds in run.timings.items() if step != "total"],
        metrics=_shown_metrics(run.metrics),
        chance={f"precision@{k}": run.metrics["chance"] for k in (1, 5, 10)} if "chance" in run.metrics else {},
        min_overlap=config.min_overlap,
        config_yaml=configuration.to_yaml(config),
        versions=versions(),
    )
    files.write_bytes(run.path("report.html"), write_report(report).encode())
    return run.path("report.html")


def _cards(run: Run) -> list[tuple[str, str]]:
    counts = run.counts
    cards = [("images", f"{counts['images']:,}"), ("pairs", f"{counts['pairs']:,}")]
    if counts["queries"] != counts["images"]:
        cards[1:1] = [("queries", f"{counts['queries']:,}"), ("database", f"{counts['database']:,}")]
    return [
        *cards,
        ("images without a pair", f"{counts['queries'] - counts['queries_with_pairs']:,}"),
        ("quarantined files", f"{counts['quarantined']:,}"),
    ]


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
        name: Picture(*_photograph(run, name, size), size, widen(values))
        for name, size, values in zip(selection.names, sizes, patches, strict=True)
    }


def _photograph(run: Run, name: str, scaled_size: tuple[int, int]) -> tuple[str, np.ndarray]:
    """What the page calls an image, and its RGB: plain grey, and said so, where the file is no longer at hand."""
    try:
        return name, decode(files.read_bytes(files.join(run.counts["root"], name)))
    except (OSError, ImageError):
        width, height = scaled_size
        return f"{name} (the file cannot be read now)", np.full((height, width, 3), 200, np.uint8)
