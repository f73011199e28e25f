"""The files of cluster/: each has a check, here or in the modules beside; what they tell vop, vop understands."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from cluster_commands import CLUSTER, FILES, ROOT, commands, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vop import cli, config
from vop.stages import watch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BIN = Path(sys.executable).parent
IMAGES = {"Dockerfile": "gpu", "Dockerfile.cpu": "cpu"}
LOCKS = {"cpu": "requirements-cpu.lock", "gpu": "requirements-gpu.lock"}
PLATFORM = {  # of the images
    **{"python_full_version": "3.11.14", "python_version": "3.11", "implementation_name": "cpython"},
    **{"sys_platform": "linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"},
}
PROMETHEUS_FUNCTIONS = {"sum", "min", "max", "rate", "increase", "by"}
COUNTERS = {counter.info["name"] for counter in (*watch.COUNTED.values(), watch.QUARANTINED)}
GAUGES = {gauge.info["name"] for gauge in (watch.LEFT, watch.QUEUE, watch.LAG)}
RAY_METRICS = {  # as Ray 2.60 exports them
    *("ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_mem_used"),
    *("ray_node_mem_total", "ray_node_disk_usage", "ray_node_disk_free", "ray_resources", "ray_object_store_memory"),
    *("ray_cluster_active_nodes", "ray_actors", "ray_node_failure_total", "ray_memory_manager_worker_eviction_total"),
    "ray_node_manager_unexpected_worker_failure_total",
}
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|\bghp_\w{20}|\beyJ[\w-]{10}|\b[0-9a-f]{32,}\b|://[^/\s:@]+:[^/\s@]+@"
    r"|(?i:(?:password|secret|auth_token|access_key)\w*\s*[=:]\s*[\"']?[a-z0-9+/]{12,})"
)


def readable(*suffixes: str) -> list[Path]:
    """Files that people write, of these suffixes or of any."""
    return [path for path in FILES if path.suffix != ".lock" and (not suffixes or path.suffix in suffixes)]


def test_every_file_has_a_check():
    checked = {
        CLUSTER / name for name in (*IMAGES, *LOCKS.values(), "requirements.in", "runtime_env.yaml", "README.md")
    }
    checked |= {CLUSTER / "grafana/vop.json", *CLUSTER.glob("slurm/*.sbatch")}  # test_cluster_slurm.py
    checked |= {*CLUSTER.glob("kuberay/*.yaml"), *CLUSTER.glob("launcher/*.yaml")}  # test_cluster_manifests.py
    assert set(FILES) == checked


@pytest.mark.parametrize("path", readable(), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_what_a_file_tells_vop_is_understood(path):
    text = path.read_text()
    assert [name for name in settings(text) if name not in config.KEYS] == []
    for command, overrides in commands(text):
        assert command in cli.COMMANDS
        config.load([], ["cluster.address=auto", *overrides])


def test_commands_are_found_where_they_stand():
    found = {path.name: len(commands(path.read_text())) for path in readable()}
    assert all(found[name] for name in ("register.yaml", "cluster.yaml", "one.sbatch", "nodes.sbatch"))
    assert found["README.md"] >= 7
    text = "#  python /opt/vop/ray_jobs/embed.py output=/run images=photos \\\n#     embedding.encoder=8\n"
    assert commands(text) == [("embed", ["output=/run", "images=photos", "embedding.encoder=8"])]
    for wrong in ("images=photos", "embedding.encoder=8"):
        with pytest.raises(config.ConfigError):
            config.load([], ["cluster.address=auto", wrong])
    assert settings("see `retrieval.shard` in search.py and train.py") == ["retrieval.shard"]


@pytest.mark.parametrize("path", readable(), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_nothing_secret_stands_in_a_file_and_no_address_of_a_registry(path):
    text = path.read_text()
    assert SECRET.findall(text) == []
    hosts = set(re.findall(r"https?://([^/\s:\"']+)", text))
    assert hosts <= {"127.0.0.1", "www.googleapis.com"}  # the latter names a right, not a place
    assert "0.0.0.0" not in text or path.name == "README.md"


@pytest.mark.parametrize(
    "planted",
    ["AKIAIOSFODNN7EXAMPLE", "-----BEGIN RSA PRIVATE KEY-----", "https://user:word@host/simple",
     "RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef", 'auth_token: "c29tZXRoaW5nc2VjcmV0"'],
)  # fmt: skip
def test_a_planted_secret_is_found(planted):
    assert SECRET.search(planted)


def locked(extra: str) -> dict[str, str]:
    """Versions of a lock file, by name; fails for anything in it that is no version with its hashes."""
    text = (CLUSTER / LOCKS[extra]).read_text()
    entry = r"([a-z0-9-]+)==([\w.+]+) \\\n(?: {4}--hash=sha256:[0-9a-f]{64} \\\n)* {4}--hash=sha256:[0-9a-f]{64}\n"
    assert re.fullmatch(f"(?:{entry})+", text), "a requirement without hashes, an option or an address"
    return dict(re.findall(entry, text))


def required(extra: str) -> list[Requirement]:
    """What an image must hold by pyproject.toml and requirements.in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (CLUSTER / "requirements.in").read_text().splitlines()
    more = [line for line in lines if line and not line.startswith("#")]
    return [
        Requirement(line)
        for line in [
            *project["project"]["dependencies"], *project["project"]["optional-dependencies"][extra],
            *project["build-system"]["requires"], *more,
        ]
    ]  # fmt: skip


@pytest.mark.parametrize("extra", LOCKS)
def test_a_lock_holds_what_is_required_in_the_versions_that_are_tested(extra):
    versions = locked(extra)
    for requirement in required(extra):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = [pin for pin in pins if not pin.marker or pin.marker.evaluate(PLATFORM)]
    tested = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    old = {
        name: version
        for name, version in versions.items()
        if not tested.get(name, Requirement("x").specifier).contains(version)
    }
    assert old == {}, "`make lock` brings the lock files up to date with constraints.txt"


def test_one_image_has_cuda_and_the_other_has_none():
    cpu, gpu = locked("cpu"), locked("gpu")
    assert cpu["torch"] == gpu["torch"] + "+cpu"
    assert {name for name in cpu if name.startswith(("nvidia", "cuda", "triton"))} == set()
    assert {"nvidia-cudnn-cu13", "triton", "faiss-gpu"} <= gpu.keys()
    assert "faiss-cpu" not in gpu
    apart = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert apart == {"torch"}  # nodes of one cluster run either image


def instructions(name: str) -> list[str]:
    """The instructions of a Dockerfile, a line each."""
    text = re.sub(r"^#.*\n", "", (CLUSTER / name).read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


def hadolint(text: str) -> str:
    """What hadolint says of a Dockerfile; nothing if it is fine."""
    run = subprocess.run([BIN / "hadolint", "--no-color", "-"], input=text, capture_output=True, text=True)
    assert run.returncode in (0, 1)
    return run.stdout


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_well_built(name):
    assert hadolint((CLUSTER / name).read_text()) == ""
    lines = instructions(name)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert lines[-1] == 'CMD ["vop", "--help"]'
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert LOCKS[IMAGES[name]] in installs[0]
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(installs[1].split())
    assert any("RAY_AUTH_MODE=token" in line for line in lines)


def test_hadolint_finds_what_it_is_there_for():
    assert "DL3007" in hadolint("FROM python:latest\n")
    assert "DL3008" in hadolint("FROM python:3.11.14\nRUN apt-get update && apt-get install -y curl\n")


def test_images_share_a_pinned_base_of_the_locked_python():
    bases = {line for name in IMAGES for line in instructions(name) if line.startswith("ARG BASE")}
    assert len(bases) == 1  # Ray refuses nodes whose Python differs
    version = re.fullmatch(r"ARG BASE=python:(\d+\.\d+\.\d+)-slim-\w+", bases.pop())[1]
    assert f"--python-version {version} " in (ROOT / "Makefile").read_text()


def test_an_image_is_given_what_it_copies_and_nothing_else():
    first, *rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all([*ROOT.glob(pattern)] for pattern in let_in)
    copied = {line.split()[1] for name in IMAGES for line in instructions(name) if line.startswith("COPY")}
    built = {"vop", "pyproject.toml", "README.md", "LICENSE"}
    for source in copied | built:
        assert any(Path(source).match(pattern) for pattern in let_in), source


def test_a_runtime_env_leaves_data_and_history_behind(tmp_path):
    from ray._private.runtime_env.packaging import create_package
    from ray.runtime_env import RuntimeEnv

    told = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert told.keys() == {"excludes", "env_vars"}
    RuntimeEnv(**told)
    sent = {"vop/cli.py", "vop/viz/page.html", "ray_jobs/register.py", "configs/train/colmap.yaml"}
    kept = {".git/config", ".venv/bin/python", "run/store/shard-00001.parquet", "photos/a.JPG.jpg", "weights.pth",
            ".env", "head.pem", "tests/test_cli.py"}  # fmt: skip
    for name in sent | kept:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    create_package(str(tmp_path / "tree"), tmp_path / "sent.zip", include_gitignore=True, excludes=told["excludes"])
    with zipfile.ZipFile(tmp_path / "sent.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == sent


def test_a_readme_leads_to_what_is_there():
    text = (CLUSTER / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (CLUSTER / link).exists(), link
    for name in re.findall(r"cluster/[\w./-]+\w", text):
        assert (ROOT / name).exists(), name
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        run = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def dashboard() -> dict:
    return json.loads((CLUSTER / "grafana/vop.json").read_text())


def test_a_dashboard_asks_for_metrics_that_there_are():
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES} | RAY_METRICS
    asked = set()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            names = set(re.findall(r"\b(?:ray|vop|autoscaler)_\w+", target["expr"]))
            assert names, target
            assert names <= exported
            left = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([\w, ]+\)|\b\d+\b", "", target["expr"])
            assert set(re.findall(r"[a-zA-Z_]\w*", left)) - names <= PROMETHEUS_FUNCTIONS
            assert target["expr"].count("(") == target["expr"].count(")")
            asked |= names
            for name in names & {f"ray_{counter}_total" for counter in COUNTERS}:
                assert re.search(rf"(rate|increase)\({name}\{{", target["expr"]), (
                    "a counter starts anew with its process"
                )
    assert asked == exported


def test_a_dashboard_fits_any_grafana():
    board = dashboard()
    assert board["uid"] is board["id"] is None
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used - {"__rate_interval", "__range", "__all"} == variables.keys()
    sources = [panel["datasource"] for panel in board["panels"] if panel["type"] != "row"]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_panels_lie_side_by_side():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
