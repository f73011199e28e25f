"""What the report says of a training, gathered from its run directory."""

import pyarrow as pa

from vop import catalog, files
from vop import config as configuration
from vop.config import Config
from vop.pairs import read_parquet
from vop.run import Run, versions
from vop.store import EmbeddingStore
from vop.training.card import card_rows
from vop.training.loop import HISTORY, SCHEMA
from vop.viz.training_curves import epochs_of, loss_rows, throughput, training_file
from vop.viz.training_report import TrainingReport, write_training_report

CURVES = ("training.png", "training.svg")  # of a run directory
NUMBERS = {
    "images": "views with tokens",
    "pairs_labelled": "pairs with labels",
    "pairs_of_an_epoch": "pairs an epoch",
    "validation_pairs": "validation pairs",
}


def write_training_page(config: Config, run: Run) -> str:
    """Write report.html of a training, ended or not, and return its path."""
    files.write_bytes(run.path("report.html"), write_training_report(training_report(config, run)).encode())
    return run.path("report.html")


def write_training_curves(run: Run) -> None:
    """Write the curves of a training that has ended by themselves, training.png and training.svg."""
    history = read_parquet(run.path(HISTORY))
    for name in CURVES if loss_rows(history).num_rows else ():
        content = training_file(history, run.metrics["best_step"], name.rpartition(".")[2])
        files.write_bytes(run.path(name), content)


def training_report(config: Config, run: Run) -> TrainingReport:
    """What the page shows of a run."""
    counts = run.counts
    history = read_parquet(run.path(HISTORY)) if files.exists(run.path(HISTORY)) else SCHEMA.empty_table()
    card = []
    if "encoder" in counts:
        card = card_rows(files.read_json(files.join(counts["encoder"], "config.json"))["trained_with"])
    quarantined = []
    if "store" in counts and EmbeddingStore.exists(counts["store"]):  # it is large, and may be gone after a training
        quarantined = [*catalog.quarantined(EmbeddingStore.open(counts["store"]).images())]
    left_out = [("pairs", *each) for each in counts.get("pairs_without_labels", {}).items()]
    left_out += [("images", *each) for each in counts.get("images_without_overlap", {}).items()]
    return TrainingReport(
        title=f"vop train: {counts.get('root', config.output).rstrip('/').rpartition('/')[2]}",
        history=history,
        kept=run.metrics["best_step"] if "encoder" in counts else None,
        best=config.train.best,
        summary=_cards(run, history),
        left_out=left_out,
        card=card,
        use=f"vop register images=DIR output=DIR {counts['use']}" if "use" in counts else None,
        quarantined=quarantined,
        timings=[(step, seconds) for step, seconds in run.timings.items() if step != "total"],
        config_yaml=configuration.to_yaml(config),
        versions=versions(),
    )


def _cards(run: Run, history: pa.Table) -> list[tuple[str, str]]:
    counts = run.counts
    numbers = {label: f"{counts[key]:,}" for key, label in NUMBERS.items() if key in counts}
    numbers["pairs left out"] = f"{sum(counts.get('pairs_without_labels', {}).values()):,}"
    epochs = epochs_of(history)
    if epochs:
        numbers |= {"epochs": str(len(epochs)), "steps": f"{epochs[-1].last:,}"}
        numbers["pairs/s"] = f"{throughput(epochs):,.1f}"
    return [*numbers.items()]
