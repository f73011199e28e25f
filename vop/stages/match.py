"""Local features, matches and relative poses as Ray Data jobs; one block is one shard, from the plan to the receipt."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import ray

from vop.config import Config
from vop.embedding import ShardWriter
from vop.extraction import ShardExtractor, decode_shard, descriptor_width
from vop.features import FeatureStore
from vop.matches import MatchStore
from vop.pair_matching import ShardMatcher
from vop.pose_estimation import PoseEstimation
from vop.stages import cluster


def width(config: Config) -> int:
    """Build the extractor once on a worker, so that what it lacks is missed in time: numbers of a descriptor."""
    gpu = cluster.gpu_share(config.matching.gpus_per_worker)
    task = ray.remote(num_cpus=1, num_gpus=gpu, max_retries=2)(descriptor_width)
    try:
        return ray.get(task.remote(config.matching))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the reason is the method's, not Ray's


def extract_shards(config: Config, store: FeatureStore, shards: dict[int, pa.Table]) -> Iterator[dict]:
    """Find the local features of planned shards; yields shard, ok and quarantined counts as receipts are written.

    `shards` maps shard numbers to tables of image_id, name, path, shard. Decoding runs as tasks ahead of the networks.
    """
    if not shards:
        return
    matching = config.matching
    gpu = cluster.gpu_share(matching.gpus_per_worker)
    extractors = min(cluster.replicas(matching.extractors, gpu), len(shards))
    with cluster.whole_blocks(config.cluster):
        decoded = cluster.by_shards(
            ray.data.from_arrow([shards[number] for number in sorted(shards)]),
            decode_shard,
            fn_args=(matching.resize, config.embedding.max_pixels),
            num_cpus=min(1, 0.5 * cluster.cpus()),
        )
        extracted = cluster.by_shards(
            decoded,
            ShardExtractor,
            fn_constructor_args=(matching,),
            compute=ray.data.ActorPoolStrategy(size=extractors),
            num_cpus=cluster.model_cpus(extractors),
            num_gpus=gpu,
        )
        yield from cluster.rows(cluster.by_shards(extracted, ShardWriter(store), num_cpus=0.1))


def match_shards(config: Config, features: FeatureStore, matches: MatchStore, numbers: list[int]) -> Iterator[dict]:
    """Match planned shards of pairs; yields shard, rows and failed of each as its receipt is written.

    Workers get numbers: pairs and features they read for themselves.
    """
    if not numbers:
        return
    matching = config.matching
    gpu = cluster.gpu_share(matching.gpus_per_worker)
    matchers = min(cluster.replicas(matching.matchers, gpu), len(numbers))
    with cluster.whole_blocks(config.cluster):
        matched = cluster.by_shards(
            ray.data.from_arrow([pa.table({"shard": [number]}) for number in numbers]),
            ShardMatcher,
            fn_constructor_args=(matching, features, matches),
            compute=ray.data.ActorPoolStrategy(size=matchers),
            num_cpus=min(0.9, 0.9 * cluster.cpus() / matchers),
            num_gpus=gpu,
        )
        yield from cluster.rows(matched)


def estimate_poses(config: Config, estimation: PoseEstimation, parts: Iterable[pa.Table]) -> Iterator[dict]:
    """Estimate relative poses, a part for each table (`PoseEstimation`); yields part and pairs as each is written."""
    parts = list(parts)
    if not parts:
        return
    with cluster.whole_blocks(config.cluster):
        yield from cluster.rows(cluster.by_shards(ray.data.from_arrow(parts), estimation, num_cpus=1))
