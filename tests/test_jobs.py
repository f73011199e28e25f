"""The job scripts under a real `ray start --head`, submitted with `ray job submit` as a user would."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vop.datasets import rendered

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head node on this machine; yields the address jobs are submitted to."""
    log = tmp_path_factory.mktemp("head") / "log"
    for _ in range(3):  # on a busy machine its processes give each other up after 30 s
        process, address = start(log)
        if answers(process, address):
            break
    else:
        pytest.fail(f"the head did not start: {log.read_text()[-2000:]}")
    yield address
    process.terminate()  # `ray start --block` then ends its own processes
    process.wait(60)


def start(log: Path) -> tuple[subprocess.Popen, str]:
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=400000000",
               f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
               f"--dashboard-agent-listen-port={agent}"]  # fmt: skip
    # (The agent's usual port is taken where another Ray runs on this machine, and without its agent no job starts.)
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "RAY_ADDRESS"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    return process, f"http://127.0.0.1:{dashboard}"


def answers(process: subprocess.Popen, address: str) -> bool:
    """Whether the head takes jobs, within two minutes; it is ended if not."""
    deadline = time.monotonic() + 120
    trial = [RAY, "job", "submit", "--address", address, "--", "true"]
    # The server answers some seconds before there is an agent that starts jobs.
    while process.poll() is None and time.monotonic() < deadline:
        if subprocess.run(trial, env=ENVIRONMENT, capture_output=True).returncode == 0:
            return True
        time.sleep(1)
    process.terminate()
    process.wait(60)
    return False


def submit(head: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--address", head, "--working-dir", ROOT / "ray_jobs", "--", sys.executable]
    return subprocess.run([*command, script, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rendered.write(folder / "images", 10, width=160, height=120)
    return folder / "images"


def test_jobs_embed_register_retrieve_and_pose(head, photos, tmp_path):
    store = f"store={tmp_path}/store"
    embedded = submit(head, "embed.py", f"images={photos}", f"output={tmp_path}/embed", store)
    assert embedded.returncode == 0, embedded.stdout + embedded.stderr
    assert "10 in the store (10 embedded by this run" in embedded.stdout
    registered = submit(head, "register.py", f"images={photos}", f"output={tmp_path}/register", store)
    assert registered.returncode == 0, registered.stdout + registered.stderr
    assert "(0 embedded by this run" in registered.stdout
    assert json.loads((tmp_path / "register" / "run.json").read_text())["outcome"] == "finished"
    assert (tmp_path / "register" / "report.html").exists()
    asked = (f"images={photos}", f"queries={photos}/000[01].jpg", f"output={tmp_path}/retrieve", store)
    retrieved = submit(head, "retrieve.py", *asked)
    assert retrieved.returncode == 0, retrieved.stdout + retrieved.stderr
    pairs = pq.read_table(tmp_path / "retrieve" / "pairs.parquet").to_pylist()
    assert {pair["query"] for pair in pairs} == {"0000.jpg", "0001.jpg"}
    everything = pq.read_table(tmp_path / "register" / "pairs.parquet").to_pylist()
    assert pairs == [pair for pair in everything if pair["query"] in ("0000.jpg", "0001.jpg")]
    listed = (f"pair_list={tmp_path}/register/pairs.parquet", f"cameras={photos}", f"output={tmp_path}/poses")
    posed = submit(head, "relative_pose.py", f"images={photos}", *listed, "matching.method=sift+nn")
    assert posed.returncode == 0, posed.stdout + posed.stderr
    assert "relative poses of 10 queries" in posed.stdout
    assert "auc@5" in json.loads((tmp_path / "poses" / "metrics.json").read_text())


def test_a_job_that_cannot_run_says_why_and_fails(head, photos):
    refused = submit(head, "register.py", f"images={photos}", "output=relative")
    assert refused.returncode == 1
    assert "output is the relative path 'relative'" in refused.stdout + refused.stderr
