"""What a run ends with: metrics.json, report.html, and the error curves of relative poses."""

from vop import files
from vop.config import Config
from vop.datasets.posed import OverlapTruth
from vop.pose.protocols import Evaluation
from vop.run import Run
from vop.viz.page import CURVES, write_curves, write_page


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
