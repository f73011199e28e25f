"""The commands of vop that the files of cluster/ name, as vop itself understands them."""

import re
from pathlib import Path

from vop import config
from vop.schema import Config

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
COMMAND = re.compile(
    r"(?:ray_jobs/(?P<job>\w+)\.py|\.(?P<script>sbatch)|(?<![\w./:-])vop (?P<command>[a-z0-9-]+)(?= [a-z.]+=))"
    r"(?P<rest>[^\n`;|&]*)"
)
SECTIONS = {key.partition(".")[0] for key in config.KEYS if "." in key}
SETTING = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(SECTIONS))})\.[a-z]\w*(?![\w/])")
FILE_NAMES = {".yaml", ".py", ".html", ".json"}


def told(command: list[str]) -> Config:
    """The config of a job script and its arguments. Raises `ConfigError` for what a job on a cluster would refuse."""
    script, *overrides = command
    assert (ROOT / "ray_jobs" / Path(script).name).exists(), script
    return config.load([], ["cluster.address=auto", *overrides])


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, its keys and values) of every vop in a text that is told an output, continued lines joined."""
    joined = re.sub(r"\\\n[ #]*", " ", text)
    found = []
    for match in COMMAND.finditer(joined):
        name = match["job"] or ("register" if match["script"] else match["command"])
        overrides = re.findall(r"(?<=\s)[a-z][\w.]*=[^\s\"]+", match["rest"])
        if any(text.startswith("output=") for text in overrides):
            found.append((name.replace("_", "-"), overrides))
    return found


def settings(text: str) -> list[str]:
    """Everything in a text that is written as a setting of a section, such as retrieval.shards."""
    return [name for name in SETTING.findall(text) if f".{name.partition('.')[2]}" not in FILE_NAMES]
