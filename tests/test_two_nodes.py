"""Two machines with separate file systems, on which only a bucket is shared. Takes a minute: `make test-nodes`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vop import config, pipeline

NAMESPACES = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount", "--net", "--pid",
              "--fork", "--kill-child", "--mount-proc"]  # fmt: skip
SETTINGS = {"embedding.shard_size": 2, "embedding.batch_size": 2, "embedding.encoders": 2, "retrieval.query_batch": 4,
            "retrieval.shards": 2, "report.queries": 3}  # fmt: skip


def not_permitted() -> str | None:
    """Why there can be no machines of namespaces here; None: there can."""
    if sys.platform != "linux" or sys.version_info < (3, 12):
        pass
    try:
        tried = subprocess.run([*NAMESPACES, "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"needs Linux with unshare: {error}"
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("VOP_TEST_NODES"), reason="takes a minute: make test-nodes")
def test_two_machines_that_share_only_a_bucket(local_ray, rendered_collection, tmp_path):
    if reason := not_permitted():
        pytest.skip(reason)
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    here = [f"images={rendered_collection}", f"truth={rendered_collection}", f"output={tmp_path / 'here'}"]
    pipeline.register(config.load([], [*here, *settings]))

    script = Path(__file__).with_name("two_nodes.py")
    command = [*NAMESPACES, sys.executable, str(script), str(rendered_collection), str(tmp_path), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["hosts"] == ["node0", "node1"]
    assert about["parquet_on_disks"] == ["", ""]
    assert set(about["shards_written"]) == set(about["images_read"]) == {"10.77.0.1", "10.77.0.2"}
    assert sum(about["shards_written"].values()) == 12
    there, here = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*")
         if path.is_file() and path.suffix != ".jsonl"}
        for folder in (tmp_path / "run", tmp_path / "here")
    )  # fmt: skip
    assert set(there) == set(here)
    told_apart = {"config.yaml", "run.json", "report.html", "store/images.parquet"}  # by paths, seconds, times of files
    assert [name for name in sorted(here) if there[name] != here[name] and name not in told_apart] == []
