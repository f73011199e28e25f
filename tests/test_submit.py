"""`vop submit` without a cluster: what is checked, uploaded and said. With one: tests/test_jobs.py."""

import asyncio
import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vop
from vop import cli, config, exit_codes
from vop.config import ConfigError
from vop.exit_codes import AROUND, CLUSTER, CODES, FAILED, IMPOSSIBLE, INTERRUPTED, UNUSABLE, exit_code
from vop.stages import submit

ROOT = Path(__file__).resolve().parents[1]


def loaded(*overrides):
    return config.load([], ["output=/data/run", *overrides, "cluster.address=auto"])


@contextmanager
def dashboard(status: int, said: dict):
    """A server that says the same to everyone; yields its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# The command


def test_the_command_of_a_job_makes_the_same_config(tmp_path):
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("retrieval: {k: 7, radius: null}\ndataset: {format: colmap, root: s3://b/root, scenes: ['0015']}")
    told = ["images=/data/a b's $HOME; rm -rf", 'dataset.model="{scene}/sparse"', "encoder=/models/e", "output=/data/r"]
    resolved = config.load([str(recipe)], [*told, "cluster.address=auto"])
    python, flag, module, command, *overrides = shlex.split(submit.command_line("register", resolved, "/opt/v/python"))
    assert (python, flag, module, command) == ("/opt/v/python", "-m", "vop.cli", "register")
    assert config.load([], overrides) == resolved
    assert "retrieval.k=7" in overrides
    assert str(recipe) not in overrides


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda value: "${" not in value)


@settings(max_examples=8)  # loading takes a tenth of a second
@given(text, st.lists(text, max_size=3), st.floats(1e-8, 1.99), st.none() | st.integers(1), st.booleans())
def test_overrides_make_the_same_config(word, words, radius, shortlist, mutual):
    asked = config.load(dataset={"format": word, "scenes": words}, pairs={"mutual": mutual},
                        retrieval={"radius": radius, "shortlist": shortlist})  # fmt: skip
    assert config.load([], config.overrides(asked)) == asked


def test_an_encoder_with_the_settings_of_none_keeps_them():
    asked = config.load(encoder="/e", retrieval={"radius": config.Config().retrieval.radius})
    assert config.load([], config.overrides(asked)) == asked
    assert config.overrides(config.load()) == [f"output={config.load().output}"]


def test_a_command_that_no_system_takes_is_refused(monkeypatch):
    monkeypatch.setattr(submit, "LONGEST", 1000)
    with pytest.raises(ConfigError, match="bytes, at most 1,000"):
        submit.command_line("train", loaded(f"dataset.scenes={json.dumps(['scene-of-many'] * 90)}"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["register", "output=run"], "output is the relative path 'run'"),
        (["register", "output=/r", "images=photos"], "images is the relative path 'photos'"),
        (["register", "output=/r", "encoder=encoder"], "encoder is the relative path 'encoder'"),
        (["register", "output=/r", "retrieval.k=0"], "retrieval.k is 0"),
        (["report", "output=/r"], "invalid choice"),
        (["register", "output=/r", "--adress", "x"], "--adress"),
        (["register", "output=/r", "--working-dir", "/nowhere"], "--working-dir /nowhere is not a folder"),
        (["register", "output=/r", "--address", "HEAD:8265"], "must be that of the dashboard"),
        (["register", "output=/r", "--address", "http://me:hidden@HEAD:8265"], "credentials"),
    ],
)
def test_what_cannot_be_submitted_is_refused_before_a_cluster_is_asked(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    monkeypatch.setattr(submit, "_ask", lambda address: pytest.fail("asked"))
    try:
        status = cli.main(["submit", "--address", "http://HEAD:8265", *arguments])
    except SystemExit as left:
        status = left.code
    err = capsys.readouterr().err
    assert status == IMPOSSIBLE
    assert said in err
    assert "hidden" not in err


def test_settings_may_stand_on_both_sides_of_options(capsys):
    arguments = ["submit", "embed", "images=/p", "--address", "http://h:1", "output=/r", "--dry-run", "retrieval.k=3"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "k: 3\n" in out
    assert out.splitlines()[-1] == ("# python -m vop.cli embed cluster.address=auto images=/p output=/r retrieval.k=3")


@pytest.mark.parametrize("script", sorted((ROOT / "ray_jobs").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_run_their_command_and_say_how_to_submit_it(script, monkeypatch):
    ran = []
    monkeypatch.setattr(cli, "main", lambda arguments: ran.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", [str(script), "images=/data/photos"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 3
    command = script.stem.replace("_", "-")
    assert ran == [[command, "cluster.address=auto", "images=/data/photos"]]
    lines = script.read_text().replace("\\\n", "").split("\n\n")
    line = next(shlex.split(line) for line in lines if line.strip().startswith("ray job submit"))
    given = line[line.index("python") :]
    assert line[:7] == shlex.split("ray job submit --address http://HEAD:8265 --working-dir .")
    assert given[:2] == ["python", f"ray_jobs/{script.name}"]
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert cli.main([command, "cluster.address=auto", *given[2:], "--dry-run"]) == 0
    assert command in cli.JOBS


# The working directory


def tree(folder, *paths, size=10):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x" * size)


def test_code_is_uploaded_and_nothing_else(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    here = tmp_path / "here"
    wanted = ("my_package/layout.py", "my_package/__init__.py", "configs/a.yaml", "README.md", "kept/logs/a.py")
    tree(here, *wanted, "photos/a.jpg", "photos/b.JPG", "photos/c.jpeg", "store/shard-00000.parquet", "x/feats.h5",
         ".git/config", ".venv/pyvenv.cfg", ".venv/lib/a.py", "odd [env]/pyvenv.cfg", "odd [env]/bin/activate.py",
         "my_package/__pycache__/a.cpython-311.pyc", "old run/run.json", "old run/report.html",
         ".env", "server.pem", "data/scene.npz", "weights.pth", "ignored/a.py", "kept/logs.txt", "kept/secret.yaml",
         ".pytest_cache/x.py", "all/a.py")  # fmt: skip
    (here / ".gitignore").write_text("ignored/\n")
    (here / "kept" / ".rayignore").write_text("/logs.txt\nsecret*\n")
    (here / "all" / ".gitignore").write_text("*\n")
    (here / "everything").symlink_to(tmp_path)  # a folder above: to follow it would never end
    environment = submit.runtime_env(here)
    found = {path for path, _ in submit.uploaded(here, list(submit.EXCLUDES))}
    assert found == {*wanted, ".gitignore", "kept/.rayignore"}
    package = tmp_path / "package.zip"
    create_package(environment["working_dir"], package, include_gitignore=True, excludes=environment["excludes"])
    with ZipFile(package) as zipped:
        assert {name for name in zipped.namelist() if not name.endswith("/")} == found


def test_too_much_to_upload_is_refused_by_its_largest_folders(tmp_path, monkeypatch):
    tree(tmp_path, "notes/a.bin", "notes/b.bin", size=60_000_000)
    tree(tmp_path, "logs/a.txt", size=2_000_000)
    tree(tmp_path, "a.py")
    with pytest.raises(
        ConfigError, match=r"122 MB to upload, at most 100: .*notes \(120.0 MB\), logs \(2.0 MB\), a.py"
    ):
        submit.runtime_env(tmp_path)
    (tmp_path / ".rayignore").write_text("notes\n")
    assert submit.runtime_env(tmp_path)["working_dir"] == str(tmp_path)
    monkeypatch.setattr(submit, "MOST_FILES", 1)
    with pytest.raises(ConfigError, match="more than 1 files to upload: largest are"):
        submit.runtime_env(tmp_path)


# The cluster


def test_no_cluster_is_said_within_seconds(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert cli.main(["submit", "embed", "--address", address, "images=/p", "output=/r"]) == CLUSTER
    assert f"nothing answers at {address}" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_that_wants_a_token_is_explained(status, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with dashboard(status, {"error": "Unauthorized"}) as address:
        assert cli.main(["submit", "embed", "--address", address, "images=/p", "output=/r"]) == IMPOSSIBLE
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "said"), [(200, {"hello": "world"}), (404, {}), (500, {})])
def test_another_server_is_no_cluster(status, said):
    with dashboard(status, said) as address, pytest.raises(ConnectionError, match="but not as Ray does"):
        submit.connected(address)


def test_the_address_counts_for_more_than_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:2")
    with dashboard(200, {"ray_version": "2.60.0", "version": "4"}) as address:
        assert submit.connected(address).get_address() == address


class Client:
    """A cluster whose job says `lines`; the connection breaks `breaks` times in the middle."""

    def __init__(self, status="SUCCEEDED", exit_code=0, message="", breaks=0, lines=("first\n", "second\n", "third\n")):
        from ray.job_submission import JobStatus

        self.details = SimpleNamespace(status=JobStatus(status), driver_exit_code=exit_code, message=message)
        self.breaks, self.lines, self.submitted = breaks, lines, {}

    def submit_job(self, **told):
        self.submitted = told
        return "raysubmit_1"

    def get_address(self):
        return "http://h:1"

    async def tail_job_logs(self, job):
        for number, line in enumerate(self.lines):
            if self.breaks and number == 2:
                self.breaks -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly")
            if line == signal.SIGINT:
                os.kill(os.getpid(), line)
                await asyncio.sleep(10)
            else:
                yield line

    def get_job_info(self, job):
        from ray.job_submission import JobStatus

        return SimpleNamespace(status=JobStatus.RUNNING) if self.breaks > 1 else self.details


def submitted(monkeypatch, client, **told):
    monkeypatch.setattr(submit, "connected", lambda address: client)
    monkeypatch.setattr(submit, "_ask", lambda address: None)
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    return submit.submit("embed", loaded("images=/p"), "http://h:1/", None, **told)


def test_a_job_is_followed_to_its_end_through_broken_connections(capsys, monkeypatch):
    client = Client(breaks=2)
    assert submitted(monkeypatch, client) == 0
    out = capsys.readouterr().out
    assert out.count("first\n") == out.count("second\n") == out.count("third\n") == 1
    assert "http://h:1/#/jobs/raysubmit_1" in out
    assert out.splitlines()[-2:] == [
        "job        raysubmit_1 succeeded, exit code 0, done",
        "result     /data/run/store",
    ]
    assert client.submitted["runtime_env"] == {}


def test_a_failed_job_gives_its_own_exit_code_and_reason(capsys, monkeypatch):
    message = "Job failed with exit code 3, last logs:\nreason     no images in /p\nresult     /data/run"
    assert submitted(monkeypatch, Client("FAILED", 3, message)) == 3
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "job        raysubmit_1 failed, exit code 3, the input or a store cannot be used: look at the data",
        "result     /data/run/store",
        "reason     no images in /p",
    ]


def test_no_wait_says_how_to_follow_and_stop(capsys, monkeypatch):
    assert submitted(monkeypatch, Client("FAILED", 3), wait=False) == 0
    out = capsys.readouterr().out
    assert "ray job logs --follow --address http://h:1 raysubmit_1" in out
    assert "ray job stop --address http://h:1 raysubmit_1" in out


def test_interrupting_leaves_the_job_alone(capsys, monkeypatch):
    client = Client(lines=["first\n", signal.SIGINT, "second\n"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may have it ignored
    try:
        assert submitted(monkeypatch, client) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    assert "first\n" in out
    assert "second\n" not in out
    assert "the job goes on" in out
    assert "ray job stop --address http://h:1 raysubmit_1" in out
    assert not hasattr(client, "stop_job")  # it would have been called in vain


def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    client = Client()
    monkeypatch.setattr(submit, "_ask", lambda address: (_ for _ in ()).throw(OSError("gone")))
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="lost the cluster while following raysubmit_1: gone"):
        submit.followed(client, "raysubmit_1", patience_s=0)


@pytest.mark.parametrize(
    ("status", "own", "code"),
    [
        ("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 5, 5), ("FAILED", 130, 130), ("FAILED", 127, 1),
        ("FAILED", -9, 5), ("FAILED", 137, 5), ("FAILED", None, 5), ("FAILED", 42, 1), ("STOPPED", None, 130),
    ],
)  # fmt: skip
def test_the_end_of_a_job_as_an_exit_code(status, own, code):
    assert submit.code_of(Client(status, own).details) == code


# Exit codes


def test_every_name_in_the_tables_is_an_error():
    for name in CODES.keys() | AROUND.keys():
        module, _, kind = name.rpartition(".")
        error = getattr(importlib.import_module(module), kind)
        assert issubclass(error, BaseException), name
        assert f"{error.__module__}.{error.__qualname__}" == name


def test_exit_codes_by_meaning():
    from ray.exceptions import ActorDiedError, RayTaskError

    from vop.catalog import TooManyBadImagesError
    from vop.shards import StoreError
    from vop.stages.search import NoRoomError, SearchError

    def raised(error, cause):
        error.__cause__ = cause
        return error

    def in_a_worker(cause):
        return RayTaskError("f", "traceback", cause, ip="x", pid=1).as_instanceof_cause()

    expected = [
        (ConfigError("k is 0"), 2), (StoreError("no store"), 3), (TooManyBadImagesError("9 of 10"), 3),
        (FileNotFoundError("photos"), 3), (ValueError("no images in x"), 3), (ImportError("pycolmap"), 2),
        (OSError(28, "No space left on device"), 5), (OSError(30, "Read-only file system"), 5),
        (TimeoutError("has not moved"), 5), (ConnectionError("Ray did not start"), 5), (NoRoomError("9 GB"), 2),
        (RuntimeError("?"), 1), (KeyError("bug"), 1), (KeyboardInterrupt(), 130), (ActorDiedError(), 5),
        (in_a_worker(KeyError("bug")), 1), (in_a_worker(StoreError("cut")), 3), (in_a_worker(OSError(28, "full")), 5),
        (SearchError("late"), 5), (raised(SearchError("shard 1 failed"), ActorDiedError()), 5),
        (raised(SearchError("shard 1 failed"), in_a_worker(StoreError("cut"))), 3),
        (raised(SearchError("shard 1 failed"), in_a_worker(KeyError("bug"))), 1),
    ]  # fmt: skip
    assert [(str(error), exit_code(error)) for error, _ in expected] == [(str(error), code) for error, code in expected]


def test_the_reason_is_that_of_the_worker():
    from ray.exceptions import RayTaskError

    inner = OSError(28, "No space left on device")
    outer = RayTaskError("f", "File ...\nFile ...", inner, ip="x", pid=1).as_instanceof_cause()
    assert exit_codes.reason(outer) == exit_codes.reason(inner) == "[Errno 28] No space left on device"
    assert exit_codes.reason(KeyError()) == "KeyError"
    advice = "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."
    assert exit_codes.reason(OSError(28, "No space left on device", advice)) == "[Errno 28] No space left on device"
    assert exit_codes.reason(ValueError(f"no store at x\n{advice}")) == "no store at x"


def test_the_last_lines_of_a_job(capsys, monkeypatch, tmp_path):
    pipeline = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "vop.pipeline", pipeline)
    monkeypatch.setattr(vop, "pipeline", pipeline, raising=False)
    told = ["cluster.address=auto", f"output={tmp_path}/run", "images=s3://bucket/photos"]
    pipeline.register = lambda config: SimpleNamespace(summary=lambda: "vop register: done")
    assert cli.main(["register", *told]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["vop register: done", "status     vop register: exit code 0, done", f"result     {tmp_path}/run"]

    def failing(config):
        raise OSError(28, "No space left on device")

    pipeline.embed = failing
    assert cli.main(["embed", *told]) == CLUSTER
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"status     vop embed: exit code 5, {exit_codes.MEANINGS[5]}",
        f"result     {tmp_path}/run/store",
        "reason     [Errno 28] No space left on device",
    ]
    assert cli.main(["embed", *told, "retrieval.k=0"]) == IMPOSSIBLE
    assert capsys.readouterr().out.splitlines()[-1].startswith("reason     retrieval.k is 0")
    assert {FAILED, UNUSABLE} <= exit_codes.MEANINGS.keys()
