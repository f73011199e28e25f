"""Jobs under a real `ray start --head`, by `ray job submit` with the line of the scripts and by `vop submit`."""

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from processes import kill_session

from vop.datasets import rendered

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
               "PATH": f"{RAY.parent}:{os.environ['PATH']}"}  # fmt: skip
LAYOUT = """
from vop.datasets.folder import list_images
from vop.datasets.layout import Benchmark, one_set


def missing(dataset):
    return []


def read(dataset):
    return Benchmark(one_set(dataset, list_images(dataset.root).images))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head node on this machine; yields the address jobs are submitted to."""
    log = tmp_path_factory.mktemp("head") / "log"
    # Of its own, or jobs would join whatever Ray was last started on this machine; short, for the names of sockets.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        for _ in range(3):  # on a busy machine its processes give each other up after 30 s
            process, address = start(log, folder)
            if answers(process, address):
                break
            kill_session(process)
        else:
            pytest.fail(f"the head did not start: {log.read_text()[-2000:]}")
        yield address
        kill_session(process)  # SIGTERM would have it end its processes one by one, each with a delay of grace


METRICS = free_port()


def start(log: Path, folder: str) -> tuple[subprocess.Popen, str]:
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=400000000",
               "--num-gpus=4",  # by name only: models ask for them and compute on the CPU
               f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
               f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}",
               f"--metrics-export-port={METRICS}"]  # fmt: skip
    # (The agent's usual port is taken where another Ray runs on this machine, and without its agent no job starts.)
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "RAY_ADDRESS"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    return process, f"http://127.0.0.1:{dashboard}"


def answers(process: subprocess.Popen, address: str) -> bool:
    """Whether the head takes jobs, within five minutes."""
    deadline = time.monotonic() + 300
    trial = urllib.request.Request(
        f"{address}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), {"Content-Type": "application/json"}
    )
    # The server answers some seconds before there is an agent that starts jobs.
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(trial, timeout=60):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def submit(head: str, job: str, *arguments: str) -> subprocess.CompletedProcess:
    """Submit a script of ray_jobs as its docstring says, or another job with `vop submit`, and follow it."""
    if job.endswith(".py"):
        command = [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--", "python", f"ray_jobs/{job}"]
    else:
        command = [sys.executable, "-m", "vop.cli", "submit", job, "--address", head]
    command = [*command, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


def together(head: str, *jobs: tuple) -> list[subprocess.CompletedProcess]:
    """Submit jobs side by side; what each said, once all have ended."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: submit(head, *job), jobs))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rendered.write(folder / "images", 10, width=160, height=120)
    return folder / "images"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the jobs write."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(head, photos, runs, tmp_path_factory):
    """Jobs that need nothing of another: embed a dataset of one's own, relative_pose, and one that cannot run."""
    code, recipe = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("recipes") / "my recipe.yaml"
    (code / "layouts").mkdir()
    (code / "layouts" / "flat.py").write_text(LAYOUT)
    recipe.write_text(f"dataset: {{format: layouts.flat, root: {photos}}}\n")
    names = sorted(path.name for path in photos.glob("????.jpg"))
    (runs / "pairs.txt").write_text("".join(f"{a} {b}\n" for a, b in itertools.permutations(names, 2)))
    images = f"images={photos}"
    return together(
        head,
        ("embed", "--working-dir", code, "--config", recipe, f"output={runs}/embed", f"store={runs}/store"),
        ("relative_pose.py", images, f"cameras={photos}", f"pair_list={runs}/pairs.txt", f"output={runs}/poses",
         "matching.method=sift+nn", "matching.extractors=1", "matching.matchers=1"),
        ("register", "--no-working-dir", f"images={photos}/nowhere", f"output={runs}/none"),
    )  # fmt: skip


def assert_ended_well(job: subprocess.CompletedProcess) -> None:
    assert job.returncode == 0, job.stdout + job.stderr


def test_jobs_register_and_retrieve_from_the_store_of_another(head, photos, runs, first):
    embedded = first[0]
    assert_ended_well(embedded)
    assert "10 in the store (10 embedded by this run" in embedded.stdout
    assert f"dashboard  {head}/#/jobs/raysubmit_" in embedded.stdout
    last = embedded.stdout.splitlines()[-4:]
    assert [line.split()[0] for line in last] == ["status", "result", "job", "result"]
    assert last[-2].endswith("succeeded, exit code 0, done")
    assert last[-1] == f"result     {runs}/store"
    shared = (f"images={photos}", f"store={runs}/store")
    registered, retrieved = together(
        head,
        ("register.py", *shared, f"output={runs}/register"),
        ("retrieve.py", *shared, f"output={runs}/retrieve", f"queries={photos}/000[01].jpg"),
    )
    assert_ended_well(registered)
    assert "(0 embedded by this run" in registered.stdout
    assert json.loads((runs / "register" / "run.json").read_text())["outcome"] == "finished"
    assert (runs / "register" / "report.html").exists()
    assert "status     vop register: exit code 0, done" in registered.stdout
    assert_ended_well(retrieved)
    pairs = pq.read_table(runs / "retrieve" / "pairs.parquet").to_pylist()
    assert {pair["query"] for pair in pairs} == {"0000.jpg", "0001.jpg"}
    everything = pq.read_table(runs / "register" / "pairs.parquet").to_pylist()
    assert pairs == [pair for pair in everything if pair["query"] in ("0000.jpg", "0001.jpg")]


def test_metrics_of_a_job_are_exported_under_its_run(runs, first):
    run = json.loads((runs / "embed" / "run.json").read_text())["run"]
    wanted, deadline = f'run="{run}",step="embed"', time.monotonic() + 300
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        if found := [line for line in lines if line.startswith("ray_vop_images_total{") and wanted in line]:
            break
        time.sleep(1)
    assert [line.split()[-1] for line in found] == ["10.0"]


def test_a_job_estimates_relative_poses(runs, first):
    posed = first[1]
    assert_ended_well(posed)
    assert "relative poses of 10 queries" in posed.stdout
    assert "auc@5" in json.loads((runs / "poses" / "metrics.json").read_text())


def test_a_job_that_cannot_run_gives_its_exit_code_and_the_reason(photos, runs, first):
    refused = first[2]
    assert refused.returncode == 3, refused.stdout + refused.stderr
    job, result, reason = refused.stdout.splitlines()[-3:]
    assert "failed, exit code 3, the input or a store cannot be used" in job
    assert result == f"result     {runs}/none"
    assert reason.startswith(f"reason     {photos}/nowhere does not exist")
