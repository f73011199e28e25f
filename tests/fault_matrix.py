"""The fault matrix: each fault strikes a real job in the middle, and the output is that of an undisturbed run.

Not part of `make test`: `make faults` runs it in some ten minutes on two cores and writes docs/reliability.md from what
it saw. Linux; disks that are full or read-only need root, a clock that is set back needs libfaketime and gcc.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import pytest
from processes import Job, children, session

from vop import config, pipeline
from vop.datasets import rendered
from vop.exit_codes import CLUSTER, IN_USE, INTERRUPTED
from vop.schema import ClusterConfig
from vop.steps.status import Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
HEAD = """# What happens when something fails

Written by `make faults`, which strikes real jobs with each fault in the middle and compares every byte of their output
with that of an undisturbed run. The unit of work is a shard of images or pairs, a batch of queries or a checkpoint of
the training: what is finished is never computed again, and what a fault costs is what was in flight.

| fault | what happened | finished work computed again | output |
| --- | --- | --- | --- |
"""
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@dataclass(frozen=True)
class Row:
    """A line of the page."""

    fault: str
    happened: str
    again: str
    output: str = "the same bytes"

    def __str__(self) -> str:
        return f"| {self.fault} | {self.happened} | {self.again} | {self.output} |\n"


@pytest.fixture(scope="module")
def page():
    """Rows in the order of the tests. If `make faults` asks for it they go to the page, each in the place of the row of
    the same fault there: a fault that is struck alone leaves the others as they are.
    """
    rows: list[Row] = []
    yield rows
    if os.environ.get("VOP_WRITE_RELIABILITY"):
        there = PAGE.read_text().splitlines(keepends=True) if PAGE.exists() else []
        table = {line.split(" | ")[0]: line for line in there if line.startswith("| ")}
        table |= {str(row).split(" | ")[0]: str(row) for row in rows}
        PAGE.write_text(HEAD + "".join(line for line in table.values() if line not in HEAD))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two rendered rooms as photographs of 5 megapixels, so that it takes a while to decode them."""
    folder = tmp_path_factory.mktemp("photos")
    rendered.write(folder, 24, seed=0, width=160, height=120, lighting=1.0)
    for path in folder.glob("*.jpg"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (2560, 1920), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    """A walk through a rendered room, in images large enough to be localized by."""
    folder = tmp_path_factory.mktemp("walk")
    rendered.write(folder, 20, seed=0, width=480, height=360, lighting=0.0, mixed=False)
    return folder


def asked(photos: Path, folder: Path, output: Path, **told) -> config.Config:
    names = sorted(path.name for path in photos.glob("*.jpg"))
    pairs, validation = folder / "pairs.txt", folder / "validation.txt"
    pairs.write_text("".join(f"{a} {b}\n" for i, a in enumerate(names) for b in names[i + 1 : i + 5]))
    validation.write_text("".join(f"{name}\n" for name in names[1::4]))
    return config.load(
        images=str(photos),
        output=str(output),
        embedding={"shard_size": 2, "batch_size": 2, "encoders": 1},
        retrieval={"query_batch": 1, "shards": 2},
        matching={"method": "sift+nn", "max_keypoints": 500, "extractors": 1, "matchers": 1, "shard_size": 4,
                  "pair_shard_size": 8},
        train={"validation": str(validation), "epochs": 3, "batch_size": 8, "descriptor_dim": 32, "workers": 1,
               "dropout": 0.0, "positives_per_scene": 24, "negatives_per_scene": 16, "validation_pairs": 10,
               "checkpoint_steps": 2, "cache": str(folder / "cache")},
        min_overlap=0.1,
        report={"queries": 0},
        **{"cluster": {"cpus": 4, "object_store_gb": 0.4}} | told,
    )  # fmt: skip


RESULTS = {
    "embed": ("store/*.parquet", "store/*.json"),
    "register": ("store/*.parquet", "store/*.json", "*.parquet", "pairs.txt"),
    "match": ("features/*", "matches/*"),
    "train": ("encoder/*.safetensors", "best.safetensors"),  # the encoder's config.json names folders of the run
    "localize": ("map/map.parquet", "localized.parquet", "poses.txt"),
}
FINISHED = {
    "embed": "store/shard-*.json",
    "register": "parts-*/[0-9]*.parquet",
    "match": "matches/shard-*.json",
    "train": "checkpoints/step-*.json",
    "localize": "localized-*/[0-9]*.parquet",
}


class Scene:
    """A command that is struck, and what the same command leaves undisturbed."""

    def __init__(self, command: str, photos: Path, folder: Path, output: Path, undisturbed: Path, **told):
        self.command, self.folder, self.output, self.undisturbed = command, folder, output, undisturbed
        extra = {
            "match": {"pair_list": str(folder / "pairs.txt")},
            "train": {"cameras": str(photos)},
            "localize": {"queries": str(photos / "*[05].jpg"), "cameras": str(photos), "localize": {"batch": 1}},
        }
        self.told = asked(photos, folder, output, **extra.get(command, {}) | told)
        self.jobs: list[Job] = []

    def start(self, **environment: str) -> Job:
        """Start the command; on a busy machine Ray itself may not come up in its 30 s, and is tried again."""
        self.jobs.append(Job(self.command, self.told, self.folder / f"job{len(self.jobs)}", environment))
        return self.jobs[-1]

    def finished(self) -> dict[Path, int]:
        """The files that vouch for finished work, and their inodes: a file that is written anew has another."""
        return {path: path.stat().st_ino for path in self.output.glob(FINISHED[self.command])}

    def wait_for(self, job: Job, units: int) -> dict[Path, int]:
        """Wait until so many units are finished; returns them."""
        job.wait_until(lambda: len(self.finished()) >= units)
        return self.finished()

    def again(self) -> Job:
        """Run the same command to its end."""
        job = self.start()
        assert job.wait() == 0, job.log
        return job

    def assert_same(self) -> None:
        """The output is, byte by byte, that of the undisturbed run."""
        for pattern in RESULTS[self.command]:
            expected = {path.name: path.read_bytes() for path in self.undisturbed.glob(pattern)}
            assert expected, pattern
            assert {path.name: path.read_bytes() for path in self.output.glob(pattern)} == expected, pattern
        assert Status.read(str(self.output)).outcome == "finished"

    def kept(self, before: dict[Path, int]) -> str:
        """How much of what was finished before was written again; parts that the end of a run clears away were not."""
        written = sum(path.exists() and path.stat().st_ino != inode for path, inode in before.items())
        return f"{written} of {len(before)}" if before else "none was finished"


@pytest.fixture(scope="module")
def images(photos, walk, rendered_collection) -> Callable[[str], Path]:
    """The images of a command: to train takes depth maps of their size, to localize cameras."""
    return lambda command: {"train": rendered_collection, "localize": walk}.get(command, photos)


@pytest.fixture(scope="module")
def undisturbed(local_ray, images, tmp_path_factory) -> Callable[[str], Path]:
    """The output of a command that nothing disturbs, made once."""
    made: dict[str, Path] = {}

    def output(command: str) -> Path:
        if command not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            scene = Scene(command, images(command), folder, folder / "run", folder)
            getattr(pipeline, command)(replace(scene.told, cluster=ClusterConfig()))
            made[command] = scene.output
        return made[command]

    return output


@pytest.fixture
def scene(images, undisturbed, tmp_path) -> Iterator[Callable[..., Scene]]:
    """Makes scenes; what is left of their jobs is ended."""
    scenes: list[Scene] = []

    def make(command: str, output: Path = tmp_path / "run", **told) -> Scene:
        scenes.append(Scene(command, images(command), tmp_path, output, undisturbed(command), **told))
        return scenes[-1]

    yield make
    for each in scenes:
        for job in each.jobs:
            job.kill()


def workers(job: Job, title: str) -> list[int]:
    """Processes of a job's own Ray that bear a title, as Ray gives it to workers that are at work."""
    found = []
    for pid in session(job.process.pid):
        try:
            if title in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("fault", "command", "title", "units"),
    [
        ("a decode worker is killed", "embed", "MapBatches(decode_shard)", 0),  # they run far ahead of the encoder
        ("the encoder's process is killed", "embed", "MapBatches(Embedder)", 2),
        ("a search shard is killed", "register", "ray::SearchShard", 2),
        ("a matcher's process is killed", "match", "MapBatches(ShardMatcher)", 2),
        ("a training worker is killed", "train", "RayTrainWorker", 1),
    ],
)
def test_a_killed_worker(fault, command, title, units, scene, page):
    struck = scene(command)
    job = struck.start()
    before = struck.wait_for(job, units)
    job.wait_until(lambda: workers(job, title))
    for pid in workers(job, title):
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == 0, job.log
    struck.assert_same()
    page.append(Row(f"{fault} (`vop {command}`)", "the run went on by itself", struck.kept(before)))


@pytest.mark.parametrize(
    ("command", "units"), [("embed", 3), ("register", 5), ("match", 2), ("train", 2), ("localize", 1)]
)
def test_a_killed_driver(command, units, scene, page):
    struck = scene(command)
    job = struck.start()
    before = struck.wait_for(job, units)
    job.kill()
    assert Status.read(str(struck.output)).outcome == "died"
    struck.again()
    struck.assert_same()
    happened = "`vop status` says that it died; the same command went on"
    page.append(Row(f"the driver and all its processes are killed (`vop {command}`)", happened, struck.kept(before)))


def test_a_driver_that_is_told_to_end(scene, page):
    struck = scene("embed")
    job = struck.start()
    before = struck.wait_for(job, 3)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == INTERRUPTED, job.log
    assert "interrupted" in job.log and Status.read(str(struck.output)).outcome == "interrupted"
    struck.again()
    struck.assert_same()
    happened = "it ended with code 130; the same command went on"
    page.append(Row("SIGTERM, as a scheduler sends it (`vop embed`)", happened, struck.kept(before)))


def test_two_jobs_at_once(scene, page):
    first = scene("embed")
    job = first.start()
    before = first.wait_for(job, 1)
    job.process.send_signal(signal.SIGSTOP)  # it would have ended before the second has loaded its modules
    second = first.start()
    assert second.wait() == IN_USE, second.log
    job.process.send_signal(signal.SIGCONT)
    assert f"is being written by `vop embed` (process {job.process.pid}" in second.log
    assert job.wait() == 0, job.log
    first.assert_same()
    happened = "the second is refused and told who writes; the first went on"
    page.append(Row("two jobs are started on one output", happened, first.kept(before)))


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A small disk at a folder; yields what mounts it again with other options."""
    if os.geteuid():
        pytest.skip("needs root, to mount a disk")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def last_words(job: Job) -> str:
    """The error that a job ended with."""
    return next(line for line in reversed(job.log.splitlines()) if line.startswith("vop"))


def ended(job: Job) -> str:
    """How a job ended, without the names of folders of a test."""
    words = re.sub(r"/[\w./-]*/", "", last_words(job))
    return f"it ended with code {job.process.returncode} (“{words}”); afterwards the same command went on"


@pytest.mark.parametrize(("command", "size"), [("embed", "800k"), ("register", "1800k"), ("match", "300k")])
def test_a_full_disk(command, size, scene, page, tmp_path):
    with disk(tmp_path / "disk", size) as mounted:
        struck = scene(command, tmp_path / "disk" / "run")
        job = struck.start()
        assert job.wait() == CLUSTER, job.log
        assert "No space left on device" in last_words(job)
        before = struck.finished()
        mounted("size=100m")
        struck.again()
        struck.assert_same()
        page.append(Row(f"the disk of the output is full (`vop {command}`)", ended(job), struck.kept(before)))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a folder read-only")
def test_a_read_only_disk(scene, page, tmp_path):
    struck = scene("embed")
    job = struck.start()
    before = struck.wait_for(job, 3)
    store = tmp_path / "run" / "store"
    subprocess.run(["mount", "--bind", store, store], check=True)  # a mount of its own: the other has files open
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        assert job.wait() == CLUSTER, job.log
        assert "Read-only file system" in last_words(job)
        late = struck.start()
        assert late.wait() == CLUSTER and "Read-only file system" in last_words(late)
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)
    struck.again()
    struck.assert_same()
    page.append(Row("the disk of the output becomes read-only (`vop embed`)", ended(job), struck.kept(before)))


# libfaketime 0.9.10 refuses the sleep of Python, which is by a clock that is left as it is here.
SLEEP = """#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *asked, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, asked, left) ? errno : 0;
}
"""


@pytest.fixture
def faketime(tmp_path) -> str:
    """What is to be loaded before a program so that its time of day is another, and its sleep is as it was."""
    if not (FAKETIME and shutil.which("gcc")):
        pytest.skip("needs libfaketime and gcc")
    library = tmp_path / "sleep.so"
    compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    subprocess.run(compiler, input=SLEEP, text=True, check=True)
    return f"{library} {FAKETIME}"


@pytest.mark.parametrize("command", ["embed", "register"])
def test_a_clock_that_is_set_back(command, faketime, scene, page, tmp_path):
    """Of every process of the job, Ray's own too: by two days, in the middle of it and of the next run."""
    clock = tmp_path / "clock"

    def set_to(offset: str) -> None:  # at once: every process reads it whenever it asks for the time
        whole = tmp_path / "clock.new"
        whole.write_text(offset)
        whole.replace(clock)

    set_to("+1d")
    faked = {"LD_PRELOAD": faketime, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
             "FAKETIME_DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
    struck = scene(command)
    job = struck.start(**faked)
    before = struck.wait_for(job, 3)
    set_to("-1d")
    assert job.wait() == 0, job.log
    times = [path.stat().st_mtime for path in before if path.exists()]  # parts are cleared away at the end
    assert struck.start(**faked).wait() == 0  # nothing to do: what was finished in the future is finished
    assert [path.stat().st_mtime for path in before if path.exists()] == times
    struck.assert_same()
    happened = "nothing: durations decide, not the time of day; a second run computed nothing"
    page.append(Row(f"the clock is set back by two days (`vop {command}`)", happened, struck.kept(before)))


class Nodes:
    """A head without room for work, and two nodes."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 5000,
                  "health_check_failure_threshold": 4}  # fmt: skip
        head = {"num_cpus": 0, "memory": 2**20, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": checks})
        other = {"num_cpus": 2, "memory": 2**31, "object_store_memory": 200 * 2**20}
        self.others = [self.cluster.add_node(**other) for _ in range(2)]

    def workers(self, node, title: str) -> list[int]:
        """Workers of a node that bear a title."""
        raylet = node.all_processes["raylet"][0].process.pid
        return [pid for pid, found in children(raylet) if title in found]


@pytest.mark.parametrize(
    ("command", "title", "units"),
    [
        ("embed", "MapBatches(Embedder)", 3),
        ("register", "ray::SearchShard", 4),
        ("match", "MapBatches(ShardMatcher)", 2),
    ],
)
def test_a_lost_node(command, title, units, scene, page):
    nodes = Nodes()
    try:
        struck = scene(command, cluster={"address": nodes.cluster.address})
        job = struck.start()
        before = struck.wait_for(job, units)
        job.wait_until(lambda: any(nodes.workers(node, title) for node in nodes.others))
        lost = next(node for node in nodes.others if nodes.workers(node, title))
        nodes.cluster.remove_node(lost, allow_graceful=False)
        assert job.wait() == 0, job.log
        struck.assert_same()
        happened = "the run went on by itself on the other node"
        page.append(Row(f"a node is lost with all that runs on it (`vop {command}`)", happened, struck.kept(before)))
    finally:
        nodes.cluster.shutdown()


def test_a_lost_head(scene, page):
    nodes = Nodes()
    try:
        struck = scene("embed", cluster={"address": nodes.cluster.address})
        job = struck.start()
        before = struck.wait_for(job, 3)
        for processes in nodes.cluster.head_node.all_processes.values():
            for process in processes:
                process.process.kill()
        since = time.monotonic()
        code = job.wait()
        took = time.monotonic() - since
        assert code != 0
    finally:
        nodes.cluster.shutdown()
    assert Status.read(str(struck.output)).outcome in ("died", "failed")
    struck.told = replace(struck.told, cluster=ClusterConfig(cpus=4, object_store_gb=0.4))
    struck.again()
    struck.assert_same()
    happened = f"the driver ended after {took:.0f} s with code {code}; on another cluster the same command went on"
    page.append(Row("the head of the cluster is killed (`vop embed`)", happened, struck.kept(before)))
