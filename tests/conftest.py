"""One local Ray, one rendered collection and one object store for all tests.

The environment must stand before Ray is imported.
"""

import logging
import os
from collections import Counter

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
os.environ.pop("RAY_ADDRESS", None)

import pytest
from hypothesis import settings
from object_store import ObjectStore

from vop.datasets import rendered

# Its limit of 200 ms for an example says something of the machine only.
settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("patient")

STORE = ObjectStore()  # so far only an address: workers of Ray are told it when they start
os.environ |= STORE.environment


def pytest_collection_modifyitems(items):
    """Files with slow tests first, then those with many: none is left for one process when the others have finished."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


@pytest.fixture(scope="session")
def local_ray():
    """Ray on this machine, with more logical CPUs than a small runner has: Data jobs and actors must fit side by side.

    `vop.stages.cluster.connect` uses a running Ray as it is, so every pipeline call of a test shares this one; a job in
    a process of its own can join it at the address that this yields.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # pytest would print pages of it under every failure
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=4,
                object_store_memory=400 * 2**20,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
            )
            break
        except Exception as error:  # Ray raises a bare one if its processes take more than 30 s, as on a busy machine
            if not attempts_left or "timed out during startup" not in str(error):
                raise
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def running_store():
    """An S3-compatible server on this machine, behind a proxy that disturbs it as a test asks."""
    pytest.importorskip("moto", reason="needs moto[server,s3] (the extra dev)")
    with STORE.running():
        yield STORE


@pytest.fixture
def store(running_store):
    """The same, undisturbed and with no requests counted, and an empty bucket for the test alone."""
    running_store.new_bucket()
    running_store.proxy.reset()
    yield running_store
    running_store.proxy.reset()


@pytest.fixture(scope="session")
def rendered_collection(tmp_path_factory):
    """Folder of 24 small rendered photographs (two rooms, portrait ones among them) with their true overlaps.

    Tests that change files work on a copy.
    """
    folder = tmp_path_factory.mktemp("rendered")
    rendered.write(folder, 24, seed=0, width=160, height=120, lighting=1.0)
    return folder
