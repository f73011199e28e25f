"""Starting Ray: what is tried again, and what is told at once."""

import pytest

from vop.schema import ClusterConfig
from vop.stages import cluster


@pytest.fixture
def starts(monkeypatch):
    """What Ray answers to each start, in turn: an error, or None for a start that goes well."""
    answers, asked = [], []

    def init(**options):
        asked.append(options)
        if answer := answers.pop(0):
            raise Exception(answer)

    monkeypatch.setattr(cluster.ray, "init", init)
    return answers, asked


def test_a_ray_that_a_busy_machine_keeps_from_starting_is_tried_again(starts):
    answers, asked = starts
    answers += ["The current node timed out during startup. This could happen because ...", None]
    cluster._start(ClusterConfig(cpus=2))
    assert [options["num_cpus"] for options in asked] == [2, 2]


def test_it_is_given_up_in_the_end(starts):
    answers, asked = starts
    answers += ["The current node timed out during startup."] * 9
    with pytest.raises(ConnectionError, match=r"did not start on this machine: .*timed out"):
        cluster._start(ClusterConfig())
    assert len(asked) == cluster.ATTEMPTS


def test_another_error_is_told_at_once(starts):
    answers, asked = starts
    answers += ["no such host"] * 9
    with pytest.raises(ConnectionError, match="did not start at ray://host:1: no such host"):
        cluster._start(ClusterConfig(address="ray://host:1"))
    assert len(asked) == 1


def test_the_largest_living_node_says_how_many_cpus_a_task_may_ask_for(monkeypatch):
    nodes = [(4, True), (8, True), (16, False)]
    monkeypatch.setattr(
        cluster.ray, "nodes", lambda: [{"Alive": alive, "Resources": {"CPU": cpus}} for cpus, alive in nodes]
    )
    assert cluster.cpus_of_a_node() == 8
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1.0}}])
    assert cluster.cpus_of_a_node() == 0
