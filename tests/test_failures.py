"""Machines fail: shards and nodes are killed in the middle of a search, and the pairs are the same bytes.

Killed drivers: tests/test_interruption.py.
"""

import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from processes import Job, children

from vop import config, pipeline
from vop.datasets.synthetic import World, write_store
from vop.parts import Parts
from vop.retrieval.search import Search
from vop.stages import search
from vop.stages.search import SearchError
from vop.steps import pairs as ranking

IMAGES, PARTS, MB = 2000, 100, 2**20
# A node counts as lost after 2 s instead of 30.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 4,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc"),
]


def asked(store, output, address=None, **retrieval) -> config.Config:
    retrieval = {"query_batch": IMAGES // PARTS, "shards": 2, "radius": 0.3, "timeout_s": 120} | retrieval
    return config.load(store=str(store), output=str(output), retrieval=retrieval, report={"queries": 0},
                       cluster={"address": address})  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "store"
    write_store(str(path), World(IMAGES, patches=36, width=32, global_width=32), 500)
    return path


@pytest.fixture(scope="module")
def undisturbed(local_ray, store, tmp_path_factory):
    """Run directory of a register that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    pipeline.register(asked(store, output))
    return output


def assert_same_pairs(output, undisturbed):
    for name in ("pairs.parquet", "pairs.txt"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes(), name


class Nodes:
    """A head, which has no room for shards, and two nodes with room for all of them each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "memory": MB, "object_store_memory": 100 * MB, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": HEALTH_CHECKS})
        other = {"num_cpus": 1, "memory": 1024 * MB, "object_store_memory": 100 * MB}
        self.others = [self.cluster.add_node(**other) for _ in range(2)]

    def remove(self, node) -> None:
        """End a node as a power cut does, and with it the shards that run there."""
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def shards(self) -> list[tuple[object, int]]:
        """(node, process) of every running shard."""
        raylets = [(node, node.all_processes["raylet"][0].process.pid) for node in self.others]
        return [(node, pid) for node, raylet in raylets
                for pid, title in children(raylet) if title.startswith("ray::SearchShard")]  # fmt: skip


@pytest.fixture
def nodes():
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def register(nodes, store, tmp_path):
    """A register that runs on the nodes; what is left of it is ended."""
    job = Job("register", asked(store, tmp_path / "run", nodes.cluster.address), tmp_path / "job", hold=10)
    yield job
    job.kill()


def test_killed_shards_and_those_of_a_lost_node_come_back(undisturbed, nodes, register, tmp_path):
    register.wait_until(lambda: len(register.written) == 10)
    shards = nodes.shards()
    assert len(shards) == len({node for node, _ in shards}) == 2  # spread over the nodes
    os.kill(shards[0][1], signal.SIGKILL)
    register.go_on(50)
    register.wait_until(lambda: len(register.written) == 50)
    assert {process for _, process in nodes.shards()} != {process for _, process in shards}
    nodes.remove(nodes.shards()[0][0])
    register.go_on()
    assert register.wait() == 0, register.log
    assert sorted(register.written) == [*range(PARTS)]  # none of them twice
    assert_same_pairs(tmp_path / "run", undisturbed)


def test_a_hung_shard_is_named(store, undisturbed, tmp_path, monkeypatch):
    started, written, write = [], [], Parts.write

    @contextmanager
    def watched(*told):
        with search.search_shards(*told) as shards:
            started.append((shards, search.ray.get(shards.actors[1].__ray_call__.remote(lambda _: os.getpid()))))
            yield shards

    def stopping(self, number, table):
        write(self, number, table)
        if self.kind != "parts":
            return
        written.append(number)
        if len(written) == 10:
            shards, process = started[0]
            os.kill(process, signal.SIGSTOP)
            # Short from now on only: a busy machine takes longer to start the shards.
            shards.search = replace(shards.search, retrieval=replace(shards.search.retrieval, timeout_s=15))

    monkeypatch.setattr(ranking, "search_shards", watched)
    monkeypatch.setattr(Parts, "write", stopping)
    try:
        with pytest.raises(SearchError, match=r"search shards \[1\] of 2 have not answered within 15 s"):
            pipeline.register(asked(store, tmp_path / "run"))
    finally:
        for _, process in started:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert 10 <= len(written) < PARTS


def test_shards_that_no_node_has_room_for_are_named(local_ray, store, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_check_memory", lambda needed: None)  # a node was lost since
    monkeypatch.setattr(Search, "memory_bytes", lambda self, rows: 10**15)
    with pytest.raises(SearchError, match=r"search shards \[0, 1, 2\] of 3 have not answered within 2 s: a lost node"):
        pipeline.register(asked(store, tmp_path / "run", shards=3, timeout_s=2))


def test_a_shard_that_cannot_load_is_named_with_the_reason(store, undisturbed, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    (tmp_path / "store" / "shard-00003.parquet").unlink()
    with pytest.raises(SearchError, match=r"search shard 1 of 2 .* failed: .*StoreError: cannot read .*shard-00003"):
        pipeline.register(asked(tmp_path / "store", tmp_path / "run"))


@pytest.mark.parametrize(
    ("nodes", "needed", "fits"),
    [
        ((10,), (5, 5), True),
        ((10,), (4, 4, 4), False),
        ((6, 6), (4, 4, 4), False),  # 12 in all, and 12 needed, but two on no node
        ((6, 6, 4), (4, 4, 4), True),
        ((6, 6), (7,), False),
    ],
)
def test_a_plan_that_fits_on_no_nodes_is_refused(monkeypatch, nodes, needed, fits):
    listed = [{"Alive": True, "Resources": {"memory": 1e9 * size, "CPU": 1}} for size in nodes]
    listed += [{"Alive": False, "Resources": {"memory": 1e12}}, {"Alive": True, "Resources": {"CPU": 1}}]
    monkeypatch.setattr(search.ray, "nodes", lambda: listed)
    sizes = [int(1e9 * size) for size in needed]
    if fits:
        search._check_memory(sizes)
        return
    total, largest, offered = sum(needed), max(needed), sum(nodes)
    with pytest.raises(SearchError) as refused:
        search._check_memory(sizes)
    for part in (f"{total} GB of memory in {len(needed)} search shards of up to {largest} GB",
                 f"{offered} GB in all, {max(nodes)} GB the largest", "retrieval.shards", "float16"):  # fmt: skip
        assert part in str(refused.value)
