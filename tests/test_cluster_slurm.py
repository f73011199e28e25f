"""The batch scripts of cluster/slurm: linted, and run with stand-ins for Slurm, Ray and vop."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_commands import CLUSTER

from vop import config

SCRIPTS = sorted((CLUSTER / "slurm").glob("*.sbatch"))
OPTIONS = {"--job-name", "--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--mem",
           "--exclusive", "--output", "--open-mode", "--time", "--requeue", "--signal"}  # fmt: skip
TOLD = ["images=/data/photos", "output=/data/run"]
STANDS_IN = """#!/bin/bash
name=${0##*/}
echo "$name $*" >> calls
case "$name" in
    python) case "$*" in *token_hex*) exec PYTHON "$@";; *node_ip*) echo 192.0.2.1;; esac;;
    ray) [ "$1" = "$REFUSED" ] && exit 4;;
    vop) stat --format='%a %n' "$RAY_AUTH_TOKEN_PATH" > token
        cat "$RAY_AUTH_TOKEN_PATH" >> token
        echo "$RAY_AUTH_MODE" >> token
        [ -z "$SECONDS_OF_WORK" ] || { trap 'echo ended >> calls; exit 143' TERM; sleep "$SECONDS_OF_WORK" & wait; }
        exit "$STATUS";;
esac
exit 0
"""


@pytest.fixture
def start(tmp_path):
    """Start a script as Slurm would: `start(script, nodes, **environment)` is its process, in `tmp_path`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "ray", "vop", "srun", "scontrol"):
        (folder / name).write_text(STANDS_IN.replace("PYTHON", sys.executable))
        (folder / name).chmod(0o755)
    started = []

    def run(script: Path, nodes: int = 1, **more: str) -> subprocess.Popen:
        told = {
            "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": f"9{os.getpid()}", "SLURM_NNODES": str(nodes),
            "SLURM_CPUS_PER_TASK": "16", "SLURM_CPUS_ON_NODE": "32", "SLURMD_NODENAME": "node1", "STATUS": "0",
            "SECONDS_OF_WORK": "", "REFUSED": "",
        }  # fmt: skip
        started.append(subprocess.Popen(["bash", script, *TOLD], cwd=tmp_path, env=os.environ | told | more))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether a process has a handler for a signal, as Linux tells it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def called(folder: Path) -> list[str]:
    """What the stand-ins were called with, in order."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_clean(path):
    for command in (["bash", "-n"], [Path(sys.executable).with_name("shellcheck"), "--norc"]):
        run = subprocess.run([*command, path], capture_output=True, text=True)
        assert (run.returncode, run.stdout + run.stderr) == (0, "")
    asked = re.findall(r"^#SBATCH (.*)$", path.read_text(), flags=re.MULTILINE)
    options = {word.partition("=")[0] for line in asked for word in line.split()}
    assert options <= OPTIONS
    assert {"--requeue", "--signal", "--time", "--mem"} <= options


def test_shellcheck_finds_what_it_is_there_for(tmp_path):
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\nrm -rf $FOLDER/$1\n")
    run = subprocess.run([Path(sys.executable).with_name("shellcheck"), tmp_path / "wrong.sh"], capture_output=True)
    assert b"SC2086" in run.stdout


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize(("name", "nodes"), [("one", 1), ("nodes", 1), ("nodes", 4)])
def test_a_job_runs_under_a_token_of_its_own_and_ends_as_vop_does(start, tmp_path, name, nodes, status):
    process = start(CLUSTER / f"slurm/{name}.sbatch", nodes, STATUS=str(status))
    assert process.wait(120) == status
    calls = called(tmp_path)
    (vop,) = [call.split()[1:] for call in calls if call.startswith("vop ")]
    assert vop[0] == "register"
    asked = config.load([], vop[1:])
    assert (asked.images, asked.output) == ("/data/photos", "/data/run")
    mode, secret, auth = (tmp_path / "token").read_text().splitlines()
    assert mode.split()[0] == "600"
    assert Path(mode.split()[1]).is_relative_to(tmp_path)  # the job's folder, which all nodes see
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert auth == "token"
    assert not Path(mode.split()[1]).exists()
    assert not [call for call in calls if secret in call]  # command lines are for all to see
    heads = [call for call in calls if call.startswith("ray start --head")]
    workers = [call for call in calls if call.startswith("srun") and "ray start" in call]
    assert len(heads) == (name == "nodes")
    assert len(workers) == (nodes > 1)
    if workers:
        port = re.search(r"--port=(\d+)", heads[0])[1]
        assert f"--nodes={nodes - 1} " in workers[0]
        assert f"--address=192.0.2.1:{port}" in workers[0]


def test_a_head_that_does_not_start_fails_the_job(start, tmp_path):
    assert start(CLUSTER / "slurm/nodes.sbatch", 4, REFUSED="start").wait(120) == 4
    assert not [call for call in called(tmp_path) if call.startswith("vop ")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("restarts", ["0", "20"])
def test_a_job_whose_time_is_up_stops_and_asks_to_be_queued_again(start, tmp_path, path, restarts):
    process = start(path, SECONDS_OF_WORK="60", SLURM_RESTART_COUNT=restarts)
    deadline = time.monotonic() + 120
    while not (tmp_path / "token").exists() or len((tmp_path / "token").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while not catches(process, signal.SIGUSR1):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) != 0
    calls = called(tmp_path)
    asked = f"scontrol requeue 9{os.getpid()}"
    assert (asked in calls) == (restarts == "0")
    assert "ended" in calls
    if asked in calls:
        assert calls.index("ended") < calls.index(asked)
