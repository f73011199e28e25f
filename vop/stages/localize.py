"""The map and the poses of queries as Ray Data jobs: one block is one world of the map, or one part of the queries."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import ray

from vop.config import Config
from vop.localization import Localization
from vop.map_points import Triangulation
from vop.stages import cluster


def triangulate_worlds(config: Config, triangulation: Triangulation, worlds: Iterable[pa.Table]) -> Iterator[dict]:
    """Triangulate worlds, a part for each table (`Triangulation`); yields part and images as each is written."""
    return _written(config, triangulation, worlds)


def localize_queries(config: Config, localization: Localization, parts: Iterable[pa.Table]) -> Iterator[dict]:
    """Localize queries, a part for each table (`Localization`); yields part, queries and failed as each is written."""
    return _written(config, localization, parts)


def _written(config: Config, work: Triangulation | Localization, parts: Iterable[pa.Table]) -> Iterator[dict]:
    parts = list(parts)
    if not parts:
        return
    with cluster.whole_blocks(config.cluster):
        yield from cluster.rows(cluster.by_shards(ray.data.from_arrow(parts), work, num_cpus=1))
