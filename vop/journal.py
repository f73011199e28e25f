"""The journal of a run: `logs/RUN.jsonl` in its output, a line of JSON for everything that happened, with the run's id.

Lines are few (a step's beginning and end, its progress every half minute), so that the file is written anew, whole,
with each: on a disk and in an object store alike, and a killed run leaves what it had told.
"""

import json
import sys
import time

from vop import files
from vop.progress import Beat
from vop.storage import StorageError

FOLDER = "logs"
PROGRESS_S = 30.0


class Journal:
    """The journal that a run writes. That it cannot be written is told once, and is no reason to end the run."""

    def __init__(self, output: str, run: str):
        self.run, self.path = run, files.join(output, FOLDER, f"{run}.jsonl")
        self._lines: list[str] = []
        self._lost = False
        self._last: tuple[str, float] = "", 0.0

    def tell(self, event: str, **facts: object) -> None:
        """Write a line: what happened, and what there is to know of it."""
        line = {"time": now(), "run": self.run, "event": event, **facts}
        self._lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            files.write_bytes(self.path, "".join(self._lines).encode())
        except (OSError, StorageError) as error:
            if not self._lost:
                print(f"vop: the journal {self.path} cannot be written: {error}", file=sys.stderr)
            self._lost = True

    def observe(self, beat: Beat) -> None:
        """Write the progress of a step: its beginning and its end, and between them every half minute."""
        step, since = self._last
        if step != beat.step or beat.done >= beat.total or time.monotonic() - since >= PROGRESS_S:
            self._last = beat.step, time.monotonic()
            left = None if beat.left_s is None else round(beat.left_s, 1)
            facts = {"step": beat.step, "done": beat.done, "total": beat.total, "unit": beat.unit, "bad": beat.bad}
            self.tell("progress", **facts, left_s=left)


def now() -> str:
    """This moment, UTC, by the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(output: str, run: str) -> list[dict]:
    """The lines of a run's journal, in order; none if it could not write any."""
    path = files.join(output, FOLDER, f"{run}.jsonl")
    return [json.loads(line) for line in files.read_bytes(path).splitlines()] if files.exists(path) else []
