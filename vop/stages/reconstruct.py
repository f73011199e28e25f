"""Reconstruction with Ray: cameras and two-view geometries as Ray Data jobs, then a task for each group of images.

A mapping may take hours in which it tells nothing, so it is a plain task: Ray Data would take it for stuck.
"""

from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import ray

from vop import colmap
from vop.config import Config
from vop.pair_verification import PairVerification, image_cameras
from vop.reconstruction import Mapper
from vop.stages import cluster

RETRIES = 2  # of a task whose worker is lost


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

    The largest come first, and as many run at once as the cluster has CPUs for.
    """
    cpus = min(config.reconstruct.threads, cluster.cpus())
    task = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_called)
    waiting = [
        task.remote(mapper, part, names) for part, names in sorted(groups.items(), key=lambda each: -len(each[1]))
    ]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for each in waiting:
            ray.cancel(each, force=True)


def _called(function: Callable, *arguments: object) -> object:
    return function(*arguments)
