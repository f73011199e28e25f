"""`connect()`: the only place that starts or joins Ray."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Read by Ray at import. Unset, ray.init() turns token authentication on and writes a token into the home directory;
# a cluster that uses tokens sets the variable on its nodes, and that value is kept.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # stages print their own progress
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from vop.config import ClusterConfig

# Ray Data tells on the console that its bars are off and that a dataset is done; warnings and errors stay.
logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)


@contextmanager
def connect(cluster: ClusterConfig) -> Iterator[None]:
    """Run a job's stages on Ray: on this machine (address null) or on a cluster.

    A Ray that the calling process already started is used as it is and left running.
    """
    if ray.is_initialized():
        yield
        return
    _start(cluster)
    try:
        yield
    finally:
        ray.shutdown()


def _start(cluster: ClusterConfig) -> None:
    options = {"address": cluster.address, "logging_level": logging.ERROR, "log_to_driver": False}
    if cluster.address is None:
        os.environ.pop("RAY_ADDRESS", None)  # one left in the shell would send the job elsewhere
        memory = cluster.object_store_gb
        options |= {
            "address": "local",
            "num_cpus": cluster.cpus,
            "object_store_memory": int(memory * 1e9) if memory else None,
            "include_dashboard": False,
        }
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises bare exceptions here
        where = "on this machine" if cluster.address is None else f"at {cluster.address}"
        raise RuntimeError(
            f"Ray did not start {where}: {error}. A very busy machine or too little shared memory (see "
            "cluster.object_store_gb), or no cluster at that address"
        ) from error


def cpus() -> int:
    """Logical CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))
