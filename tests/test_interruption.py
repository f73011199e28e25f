"""Real processes, killed without warning in the middle; the next run finishes the work and leaves the same bytes.

Matches and poses: tests/test_relative_pose_job.py. Shards and nodes that die: tests/test_failures.py.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from processes import Job

from vop import config, pipeline
from vop.parts import Parts
from vop.schema import ClusterConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc"),
    pytest.mark.usefixtures("local_ray"),
]


SHARDS = 12  # of the 24 images


def asked(images: Path, output: Path, store: Path | None = None) -> config.Config:
    return config.load(
        images=str(images),
        output=str(output),
        store=None if store is None else str(store),
        embedding={"shard_size": 2, "batch_size": 2, "encoders": 1},
        retrieval={"query_batch": 1, "shards": 2},
        report={"queries": 0},
        cluster={"cpus": 2, "object_store_gb": 0.4},
    )


def embed_until_killed(told: config.Config, folder: Path) -> set[str]:
    """Embed on a Ray of its own; end everything it started, Ray included, by SIGKILL once a shard is finished.

    Returns the names of the finished shards. On a busy machine this process may come too late, and embeds anew.
    """
    store = Path(told.output) / "store"
    for _ in range(4):
        started = _embed_until_killed(lambda: any(store.glob("shard-*.json")), told, folder)
        done = {path.stem for path in store.glob("shard-*.json")}
        if started and len(done) < SHARDS:
            return done
        shutil.rmtree(told.output, ignore_errors=True)
    pytest.fail("in four attempts Ray did not start, or the embedding ended before it was killed")


def _embed_until_killed(happened, told: config.Config, folder: Path) -> bool:
    """False if Ray itself did not come up in its 30 s, which a busy machine may need; nothing has happened then."""
    job = Job("embed", told, folder)

    def not_started() -> bool:
        return job.process.poll() is not None and "timed out during startup" in job.log

    try:
        job.wait_until(lambda: happened() or not_started())
        return happened()
    finally:
        job.kill()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(rendered_collection, tmp_path_factory):
    """Run directory of a register that nothing interrupted."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    pipeline.register(asked(rendered_collection, output))
    return output


def test_a_killed_embedding_continues_and_leaves_the_same_bytes(rendered_collection, undisturbed, tmp_path):
    """The machine goes down: the driver, its workers and Ray at once."""
    told = asked(rendered_collection, tmp_path / "run")
    store = tmp_path / "run" / "store"
    done = embed_until_killed(told, tmp_path)
    assert 1 <= len(done) < SHARDS
    (store / ".shard-00011.parquet.0badcafe.tmp").write_bytes(b"what a kill in the middle of a shard leaves")

    written = {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.iterdir() if path.stem in done
    }
    job = pipeline.embed(told)
    assert job.counts["images"] == 24
    assert job.counts["embedded_now"] == 24 - 2 * len(done)
    assert {name: ((store / name).stat().st_ino, (store / name).stat().st_mtime_ns) for name in written} == written
    assert bytes_of(store) == bytes_of(undisturbed / "store")


def test_a_killed_search_continues_and_leaves_the_same_pairs(
    rendered_collection, undisturbed, local_ray, tmp_path, monkeypatch
):
    """The driver dies, and the cluster it used goes on."""
    output = tmp_path / "run"
    told = asked(rendered_collection, output, undisturbed / "store")
    driver = Job("register", dataclasses.replace(told, cluster=ClusterConfig(address=local_ray)), tmp_path, hold=3)
    try:
        driver.wait_until(lambda: len(driver.written) == 3)
    finally:
        driver.kill()
    done = {int(path.stem) for path in output.glob("parts-*/[0-9]*.parquet")}
    assert len(done) == 3

    searched, write = [], Parts.write

    def counted(self, number, table):
        searched.append((self.kind, number))
        write(self, number, table)

    monkeypatch.setattr(Parts, "write", counted)
    job = pipeline.register(told)
    assert job.counts["embedded_now"] == 0
    assert sorted(searched) == sorted((kind, number) for kind in ("parts", "votes") for number in {*range(24)} - done)
    assert {path.name for path in output.iterdir()} == {path.name for path in undisturbed.iterdir()} - {"store"}
    for name in ("pairs.parquet", "pairs.txt", "patch_weights.parquet"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()
