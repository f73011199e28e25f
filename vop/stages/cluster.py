"""`connect()`: the only place that starts or joins Ray."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Read by Ray at import. Unset, ray.init() turns token authentication on and writes a token into the home directory;
# a cluster that uses tokens sets the variable on its nodes, and that value is kept.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # stages print their own progress
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data

from vop.run import Run
from vop.schema import ClusterConfig
from vop.stages.watch import Watch

# Ray Data tells on the console that its bars are off and that a dataset is done; warnings and errors stay.
logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
# Of an error in a worker it prints the trace twice, and an invitation to report it to Ray; it is raised as well.
for name in ("exceptions", "_internal.execution.streaming_executor_state"):
    logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)


ATTEMPTS, TOO_SLOW = 3, "timed out during startup"  # Ray gives its own processes 30 s, whatever else the machine does


@contextmanager
def connect(cluster: ClusterConfig, job: Run | None = None) -> Iterator[None]:
    """Run a job's stages on Ray: on this machine (address null) or on a cluster, whose metrics follow its progress.

    job: the run whose progress that is; None: no metrics. A Ray that the calling process already started is used as it
    is and left running.
    """
    if job is not None:
        job.observers.append(Watch(job.id).observe)
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
    told_to_end = signal.getsignal(signal.SIGTERM)
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            ray.init(**options)
            break
        except Exception as error:  # Ray raises bare exceptions here
            if attempts_left and TOO_SLOW in str(error):
                continue
            where = "on this machine" if cluster.address is None else f"at {cluster.address}"
            raise ConnectionError(
                f"Ray did not start {where}: {error}. A very busy machine or too little shared memory (see "
                "cluster.object_store_gb), or no cluster at that address"
            ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, told_to_end)  # Ray's own handler would exit with code 15


def cpus() -> int:
    """Logical CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cpus_of_a_node() -> int:
    """Logical CPUs of the largest living node, 0 without one: a task that asks for more waits for ever."""
    return int(max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0))


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def gpu_share(asked: float | None) -> float:
    """GPUs of a model's process: as asked, else one where the cluster has any."""
    return (1 if gpus() else 0) if asked is None else asked


def replicas(asked: int | None, gpu: float) -> int:
    """Processes with a model: as asked, else as many as the GPUs hold, without GPUs one per CPU."""
    if asked:
        return asked
    return max(1, int(gpus() / gpu)) if gpu else cpus()


def model_cpus(count: int) -> float:
    """Logical CPUs of each of so many model processes, which only order who may start.

    They ask for less than half together, so that decoding and writing always find room, on one CPU too; and for
    another number than decoding does, or Ray Data would fuse both and decode inside the model's process.
    """
    return round(min(0.9, 0.4 * cpus() / count), 3)


@contextmanager
def whole_blocks(config: ClusterConfig) -> Iterator[None]:
    """Run Ray Data so that a block stays what it is, a whole shard, and a job that does not move ends in an error."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = config.no_progress_timeout_s
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # wrapped, a full disk could not be told from an error in the code
    # Its advice to declare memory comes every 30 s, in twelve lines, of every process that holds a model.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    with ray.data.DataContext.current(context):
        yield


def by_shards(dataset: ray.data.Dataset, function: Callable, **resources: object) -> ray.data.Dataset:
    """Map whole blocks, in Arrow's form; `resources` and further arguments as of `map_batches`.

    That itself refuses whole blocks on a graphics card, where it wants a number of rows, and would then make batches of
    that size out of several shards.
    """
    return dataset.map_batches_internal(function, batch_size=None, batch_format="pyarrow", **resources)


def rows(dataset: ray.data.Dataset) -> Iterator[dict]:
    """The rows of a dataset as they come. Raises what a worker raised, as that is: the reason is not Ray's."""
    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from block.to_pylist()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
