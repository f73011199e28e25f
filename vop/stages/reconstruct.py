"""Reconstruction with Ray: cameras and two-view geometries as Ray Data jobs, then a task for each group of images.

A mapping may take hours in which it tells nothing, so it is a plain task: Ray Data would take it for stuck.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import ray

from vop import colmap
from vop.config import Config
from vop.pair_verification import PairVerification, image_cameras
from vop.reconstruction import Mapper
from vop.stages import cluster

RETRIES = 2  # of a task whose worker is lost
CHECKED_S = 30.0  # how often it is seen whether a mapping can run at all


def cameras(config: Config, images: Iterable[pa.Table], known: str | None) -> pa.Table:
    """The cameras (`vop.colmap.IMAGES`) of images (name, path, width, height), a block for each table, by name."""
    with cluster.whole_blocks(config.cluster):
        found = cluster.by_shards(ray.data.from_arrow([*images]), image_cameras, fn_args=(known,), num_cpus=1)
        rows = list(cluster.rows(found))
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["name"]), schema=colmap.IMAGES)


def verify_pairs(config: Config, verification: PairVerification, parts: Iterable[pa.Table]) -> Iterator[dict]:
    """Verify pairs, a part for each table (`PairVerification`); yields part and pairs as each is written."""
    parts = list(parts)
    if not parts:
        return
    with cluster.whole_blocks(config.cluster):
        yield from cluster.rows(cluster.by_shards(ray.data.from_arrow(parts), verification, num_cpus=1))


def on_a_worker(function: Callable, *arguments: object) -> object:
    """What a function returns, or raises, that a worker runs."""
    try:
        return ray.get(ray.remote(num_cpus=1, max_retries=RETRIES)(_called).remote(function, *arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def map_groups(config: Config, mapper: Mapper, groups: dict[int, list[str]]) -> Iterator[dict]:
    """Make the models of each group of images by its number; yields what `Mapper` returns as each ends.

    The largest come first, and as many run at once as the nodes have CPUs for. Raises ConnectionError if for
    `cluster.no_progress_timeout_s` no node has the CPUs that one of them needs.
    """
    cpus = max(1, min(config.reconstruct.threads, cluster.cpus_of_a_node()))
    task = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_called)
    waiting = [
        task.remote(mapper, part, names) for part, names in sorted(groups.items(), key=lambda each: -len(each[1]))
    ]
    room = time.monotonic()
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=CHECKED_S)
            yield from ray.get(done)
            if cluster.cpus_of_a_node() >= cpus:
                room = time.monotonic()
            elif time.monotonic() > room + config.cluster.no_progress_timeout_s:
                raise ConnectionError(
                    f"{len(waiting)} groups of images are not mapped: for {config.cluster.no_progress_timeout_s} s no "
                    f"node of the cluster had the {cpus} CPUs that a mapper needs: were nodes lost? Run the same "
                    "command on others, or with smaller reconstruct.threads"
                )
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for each in waiting:
            ray.cancel(each, force=True)


def _called(function: Callable, *arguments: object) -> object:
    return function(*arguments)
