"""What a run ends with: metrics.json, report.html, and the curves of relative poses or of a training."""

import dataclasses
import warnings

from vop import files
from vop.config import Config
from vop.datasets.benchmark import check, open_benchmark
from vop.datasets.posed import OverlapTruth, overlap_truth
from vop.pose.protocols import Evaluation
from vop.run import Run
from vop.viz import trained
from vop.viz.page import CURVES, write_curves, write_page


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


def reported(config: Config, job: Run, truth: OverlapTruth | None, poses: Evaluation | None = None) -> None:
    """Write metrics.json (where anything was measured), report.html and the curves of what the run has found."""
    for stale in ("metrics.json", "report.html", *CURVES):  # of another run in the same directory
        files.remove(job.path(stale))
    if poses is not None:
        with job.step("curves"):
            write_curves(job, poses)
    if config.report.queries:
        with job.step("report"):
            job.report = write_page(config, job, truth, poses)


def reported_training(config: Config, job: Run) -> None:
    """Write report.html and the curves of a training."""
    for stale in ("report.html", *trained.CURVES):  # of an earlier run in the same directory
        files.remove(job.path(stale))
    with job.step("curves"):
        trained.write_training_curves(job)
    if config.report.queries:
        with job.step("report"):
            job.report = trained.write_training_page(config, job)
