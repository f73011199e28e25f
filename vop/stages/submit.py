"""`vop submit`: hands a job to a cluster through its dashboard and follows it to its end.

What runs there is `python -m vop.cli JOB cluster.address=auto KEY=VALUE...`, with every setting that differs from the
defaults spelled out: config files stay here. The working directory goes along for datasets of one's own
(`dataset.format`), without what code has no need of; links to folders are not followed.
"""

import asyncio
import logging
import os
import re
import shlex
import ssl
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ray._private.thirdparty.pathspec import PathSpec  # Ray's own reading of excludes and .gitignore
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from vop import config as configuration
from vop.config import Config, ConfigError
from vop.exit_codes import CLUSTER, DONE, FAILED, INTERRUPTED, MEANINGS, described

EXCLUDES = (  # patterns as in .gitignore
    *(".git", ".hg", ".svn", "__pycache__", ".*_cache", ".hypothesis", ".tox", ".nox", ".ipynb_checkpoints"),
    *("node_modules", "*.egg-info", "*.py[cod]", "*.tmp"),
    *(".env*", ".netrc", ".ssh", ".aws", ".azure", ".gcloud", ".kube", "*.pem", "*.key", "id_rsa*", "id_ed25519*"),
    *("*.[jJ][pP][gG]", "*.[jJ][pP][eE][gG]", "*.[pP][nN][gG]", "*.[tT][iI][fF]", "*.[tT][iI][fF][fF]"),
    *("*.webp", "*.gif", "*.bmp", "*.p[pgbn]m", "*.jp2", "*.avif", "*.heic", "*.HEIC", "*.mp4", "*.mov", "*.avi"),
    *("*.parquet", "*.h5", "*.hdf5", "*.np[yz]", "*.db", "*.ply", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.onnx"),
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z"),
)
MARKS = ("pyvenv.cfg", "run.json")  # in a virtual environment, in a run directory
LARGEST = 100_000_000  # bytes; Ray keeps packages in the memory of the head, and takes 500 MB at most
MOST_FILES = 20_000
LONGEST = 100_000  # bytes of a command; Linux takes 128 KiB
ANSWER_S = 10.0  # for the dashboard to answer
PATIENCE_S = 300.0  # for it to come back while a job is followed
TRIES = 3  # to read the end of the log of a job that has ended
ANEW_S = 600.0  # after which the log is asked for anew: a connection that was cut may look like a job that says nothing


def submit(
    command: str, config: Config, address: str, working_dir: str | None, python: str = "python", wait: bool = True
) -> int:
    """Submit a job and follow it; returns its own exit code (`vop.exit_codes`).

    Args:
        command: one of `vop.cli.JOBS`.
        config: of the job, loaded with `cluster.address=auto`.
        address: of the dashboard, `http://HEAD:8265`.
        working_dir: folder to upload; None: none.
        python: the interpreter of the nodes that has vop.
        wait: follow the job, or leave as soon as it is submitted.

    Raises `ConfigError` for what cannot be submitted, ConnectionError where no cluster answers or it is lost.
    """
    entrypoint, address = command_line(command, config, python), address.rstrip("/")
    environment = {} if working_dir is None else runtime_env(Path(working_dir))
    client = connected(address)
    try:
        job = client.submit_job(
            entrypoint=entrypoint, runtime_env=environment, metadata={"vop": command, "output": config.output}
        )
    except RuntimeError as error:
        raise ConnectionError(f"{address} did not take the job: {error}") from error
    print(f"submitted  {job}\nruns       {entrypoint}\ndashboard  {address}/#/jobs/{job}", flush=True)
    again = (
        f"follow it  ray job logs --follow --address {address} {job}\nstop it    ray job stop --address {address} {job}"
    )
    if not wait:
        print(again)
        return DONE
    try:
        details = followed(client, job)
    except KeyboardInterrupt:
        print(f"\nno longer followed; the job goes on\n{again}")
        return INTERRUPTED
    except ConnectionError:
        print(again)
        raise
    code = code_of(details)
    print(f"job        {job} {details.status.lower()}, exit code {described(code)}")
    print(f"result     {config.store_path if command == 'embed' else config.output}")
    if reason := reason_of(details):
        print(f"reason     {reason}")
    return code


def command_line(command: str, config: Config, python: str = "python") -> str:
    """The shell command of a job."""
    told = [text for text in configuration.overrides(config) if not text.startswith("cluster.address=")]
    line = shlex.join([python, "-m", "vop.cli", command, "cluster.address=auto", *told])
    if len(line.encode()) > LONGEST:
        raise ConfigError(f"the command of the job has {len(line.encode()):,} bytes, at most {LONGEST:,} are taken: "
                          "put long lists into files that the nodes can read")  # fmt: skip
    return line


def runtime_env(folder: Path) -> dict:
    """Ray's description of what to upload. Raises `ConfigError` if it is too much, naming what is largest."""
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder} is not a folder")
    excludes, sizes = list(EXCLUDES), Counter()
    for number, (path, size) in enumerate(uploaded(folder, excludes), start=1):
        sizes[path.split("/")[0]] += size
        if number > MOST_FILES:
            raise ConfigError(f"{folder} holds more than {MOST_FILES:,} files to upload: {_remedy(sizes)}")
    if sizes.total() > LARGEST:
        raise ConfigError(
            f"{folder} has {sizes.total() / 1e6:,.0f} MB to upload, at most {LARGEST / 1e6:,.0f}: {_remedy(sizes)}"
        )
    return {"working_dir": str(folder.absolute()), "excludes": excludes}


def _remedy(sizes: Counter) -> str:
    largest = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in sizes.most_common(3))
    return (
        f"largest are {largest}. Name them in a .rayignore (written like a .gitignore), submit from the folder of the "
        "code (--working-dir DIR), or upload nothing (--no-working-dir)"
    )


def uploaded(folder: Path, excludes: list[str]) -> Iterator[tuple[str, int]]:
    """Path and bytes of the files that Ray uploads of a folder.

    Left out are `excludes`, which grow by the virtual environments, run directories and links to folders that are
    found, and what .rayignore and .gitignore files name (the latter unless RAY_RUNTIME_ENV_IGNORE_GITIGNORE is 1).
    """
    first = _matcher(folder, excludes)
    yield from _walk(folder, folder, [first], excludes)


def _walk(root: Path, folder: Path, ignored: list[Callable], excludes: list[str]) -> Iterator[tuple[str, int]]:
    names = [".rayignore", *([".gitignore"] if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1" else [])]
    here = [folder / name for name in names if (folder / name).is_file()]
    ignored = [*ignored, *(_matcher(folder, file.read_text().splitlines()) for file in here)]
    for path in sorted(folder.iterdir()):
        if any(matches(path) for matches in ignored):
            continue
        inside = path.relative_to(root).as_posix()
        if not path.is_dir():
            if path.is_file():
                yield inside, path.stat().st_size
        elif path.is_symlink() or any((path / mark).exists() for mark in MARKS):
            excludes.append("/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", inside))
        else:
            yield from _walk(root, path, ignored, excludes)


def _matcher(folder: Path, patterns: list[str]) -> Callable[[Path], bool]:
    spec = PathSpec.from_lines("gitwildmatch", patterns)
    return lambda path: spec.match_file(path.relative_to(folder).as_posix())


def connected(address: str) -> JobSubmissionClient:
    """A client of the dashboard at an address; whatever addresses the environment names.

    Raises `ConfigError` for an address of another form and where a token is missing, ConnectionError where nothing
    answers.
    """
    configuration.check_uri("--address", address)
    if not re.match(r"https?://[^/]+", address):
        raise ConfigError(f"--address is {address!r}, but must be that of the dashboard, such as http://HEAD:8265")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # to Ray they would count for more than the argument
        os.environ.pop(name, None)
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    remedy = "is it the address of a dashboard, and open to this machine (a VPN, `kubectl port-forward`, `ssh -L`)?"
    try:
        _ask(address)
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address}: {getattr(error, 'reason', error)}; {remedy}") from error
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} asks for a token ({error.message.splitlines()[0]}): export RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN_PATH=FILE, the token file of the cluster (or put the token into ~/.ray/auth_token)"
        ) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ConnectionError(f"{address} answers, but not as Ray does ({error}); {remedy}") from error


def _ask(address: str) -> None:
    """Raise OSError unless the server answers soon, whatever it says; Ray's own client would wait for ever."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_S):
            pass
    except urllib.error.HTTPError:
        pass  # Ray's client says what is wrong
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # Ray's client knows other certificates
            raise


class _Log:
    """What a job says, printed once, however often it is read from the beginning."""

    def __init__(self):
        self.printed = 0

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        """Print what is new until the job ends or the connection does."""
        seen = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, self.printed - seen) :]
            seen += len(text)
            self.printed = max(self.printed, seen)
            print(new, end="", flush=True)


def followed(client: JobSubmissionClient, job: str, patience_s: float = PATIENCE_S) -> JobDetails:
    """Print what a job says until it ends. Raises ConnectionError if the cluster is silent for so long."""
    log, broken, lost = _Log(), 0, None
    while True:
        try:
            asyncio.run(asyncio.wait_for(log.follow(client, job), ANEW_S))
            broken = 0
        except Exception:  # aiohttp, requests and Ray have a dozen kinds for a broken connection
            broken += 1
        try:
            _ask(client.get_address())
            details, lost = client.get_job_info(job), None
            if details.status.is_terminal() and (not broken or broken > TRIES):
                return details
        except Exception as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > patience_s:
                raise ConnectionError(f"lost the cluster while following {job}: {error}; the job may go on") from error
        time.sleep(1)


def code_of(details: JobDetails) -> int:
    """The exit code that a finished job stands for: its own, or what its end without one means."""
    if details.status == "SUCCEEDED":
        return DONE
    if details.status == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code
    if code is None or code < 0 or (code > 128 and code != INTERRUPTED):  # never started, lost, or killed by a signal
        return CLUSTER
    return code if code in MEANINGS and code != DONE else FAILED


def reason_of(details: JobDetails) -> str | None:
    """Why a job failed: as it said itself in its last lines, or else as Ray puts it."""
    if details.status == "SUCCEEDED" or not details.message:
        return None
    if details.driver_exit_code == 127:
        return "there is no such python on the cluster: name the one that has vop, --python /path/to/bin/python"
    told = re.findall(r"^reason {2,}(.*)", details.message, re.MULTILINE)
    return told[-1] if told else details.message.strip().splitlines()[-1]
