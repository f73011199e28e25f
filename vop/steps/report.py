"""What a run ends with: metrics.json, report.html, and its pictures: curves, maps from above."""

import dataclasses
import warnings

import pyarrow as pa

from vop import files
from vop.config import Config
from vop.datasets.benchmark import check, open_benchmark
from vop.datasets.posed import OverlapTruth, overlap_truth
from vop.pairs import read_parquet
from vop.pose.protocols import Evaluation
from vop.run import Run
from vop.steps.poses import judged_again
from vop.viz import trained
from vop.viz.localized import write_localized, write_models
from vop.viz.page import PICTURES, write_curves, write_page


def known_overlaps(config: Config, job: Run) -> OverlapTruth | None:
    """The true overlaps that a finished run's pages show beside its pairs; None where they are unknown.

    Those of a benchmark are read from its own layout. Where they can be read no more, a warning says so.
    """
    if "pairs" not in job.counts:  # the run was given its pairs: no page of it shows overlaps
        return None
    try:
        if config.truth is not None:
            return overlap_truth(config.truth)
        if config.dataset.format is None:
            return None
        lacking = check(config.dataset)
        if not lacking:
            return open_benchmark(dataclasses.replace(config, cameras=None)).truth
    except OSError as error:
        lacking = [str(error)]
    warnings.warn(f"the report is written without the true overlaps: {'; '.join(lacking)}", stacklevel=2)
    return None


def reported(
    config: Config,
    job: Run,
    truth: OverlapTruth | None,
    poses: Evaluation | None = None,
    localized: pa.Table | None = None,
    models: bool = False,
) -> None:
    """Write metrics.json (where anything was measured), report.html and the pictures of what the run has found.

    `localized`: the judged table of a run that localized queries. `models`: whether it reconstructed models.
    """
    for stale in ("metrics.json", "report.html", *PICTURES):  # of another run in the same directory
        files.remove(job.path(stale))
    if poses is not None:
        with job.step("curves"):
            write_curves(job, poses)
    if localized is not None or models:
        with job.step("pictures"):
            write_localized(config, job, localized) if localized is not None else write_models(job)
    if config.report.queries:
        with job.step("report"):
            job.report = write_page(config, job, truth, poses, localized, models)


def found_again(config: Config, job: Run) -> dict[str, object]:
    """What a finished run has found beside pairs, as `write_page` takes it, from the files of its directory."""
    if job.command == "relative-pose":
        return {"poses": judged_again(config, job)}
    if job.command == "localize":
        return {"localized": read_parquet(job.path("localized.parquet"))}
    return {"models": True} if job.command == "reconstruct" else {}


def reported_training(config: Config, job: Run) -> None:
    """Write report.html and the curves of a training."""
    for stale in ("report.html", *trained.CURVES):  # of an earlier run in the same directory
        files.remove(job.path(stale))
    with job.step("curves"):
        trained.write_training_curves(job)
    if config.report.queries:
        with job.step("report"):
            job.report = trained.write_training_page(config, job)
