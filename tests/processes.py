"""Jobs of vop as real processes, to be killed in the middle. Linux: processes are looked up in /proc."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from vop import config

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 400

# The command line of vop, which also tells into a file the number of every part of the pairs that it writes. Once there
# are as many as the file `hold` says, it waits until that is gone: in the middle, however busy the machine is.
COUNTED = """
import sys, time
from pathlib import Path
from vop import cli
from vop.parts import Parts

write = Parts.write

def counted(self, number, table):
    write(self, number, table)
    if self.kind == "parts":
        with open(sys.argv[1], "a") as told:
            told.write(f"{number}\\n")
        hold, written = Path(sys.argv[1]).with_name("hold"), len(Path(sys.argv[1]).read_text().splitlines())
        while hold.exists() and written >= int(hold.read_text()):
            time.sleep(0.02)

Parts.write = counted
sys.exit(cli.main(sys.argv[2:]))
"""


class Job:
    """A command of vop in a process, and a session, of its own; what it says goes to `folder/log.txt`.

    hold: the number of parts of the pairs after which it waits to be killed or to go on (`go_on`).
    """

    def __init__(
        self,
        command: str,
        told: config.Config,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        hold: int | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._hold = folder / "hold"
        self.go_on(hold)
        self._log, self._counted = folder / "log.txt", folder / "written.txt"
        self._counted.write_text("")
        (folder / "asked.yaml").write_text(config.to_yaml(told))
        arguments = [self._counted, command, "--config", folder / "asked.yaml"]
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COUNTED, *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it said so far."""
        return self._log.read_text()

    @property
    def written(self) -> list[int]:
        """Numbers of the parts that it has written, in order."""
        return [int(line) for line in self._counted.read_text().split("\n")[:-1]]

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Return as soon as `happened()`; fails if the job ends before, or nothing happens."""
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.process.poll() is None, f"it ended before it could be disturbed:\n{self.log}"
            assert time.monotonic() < deadline, f"nothing happened that could be disturbed:\n{self.log}"
            time.sleep(0.001)

    def go_on(self, hold: int | None = None) -> None:
        """Let it go on, to its end or until there are `hold` parts."""
        if hold is None:
            self._hold.unlink(missing_ok=True)
        else:
            whole = self._hold.with_name("hold.new")
            whole.write_text(str(hold))
            whole.replace(self._hold)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """End it by SIGKILL, with all that it started."""
        kill_session(self.process)


def kill_session(leader: subprocess.Popen) -> None:
    """End a session by SIGKILL; Ray's workers have groups of their own, but the session of what started Ray."""
    kill_all(lambda: session(leader.pid))
    leader.wait()


def kill_dataset_workers() -> None:
    """End by SIGKILL the workers that are at a dataset of Ray Data, in the Ray that this process started."""
    kill_all(
        lambda: (
            pid
            for raylet, program in children(os.getpid()) if "raylet/raylet" in program
            for pid, title in children(raylet) if "MapBatches" in title
        )
    )  # fmt: skip


def kill_all(processes: Callable[[], Iterable[int]]) -> None:
    """End processes by SIGKILL until there are none."""
    while found := [*processes()]:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def session(leader: int) -> Iterator[int]:
    """Living processes of a session, the leader first."""
    for pid, (state, _) in living():
        with suppress(OSError):
            if state not in "ZX" and os.getsid(pid) == leader:
                yield pid


def children(parent: int) -> Iterator[tuple[int, str]]:
    """(process, its title) of the processes that another started; Ray's workers bear the names of their classes."""
    for pid, (_, started_by) in living():
        with suppress(OSError):
            if started_by == parent:
                yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def living() -> Iterator[tuple[int, tuple[str, int]]]:
    """(process, (its state, who started it)) of all processes, by number."""
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with suppress(OSError):
            state, started_by = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            yield pid, (state, int(started_by))
