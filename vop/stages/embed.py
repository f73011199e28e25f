"""Embedding as a Ray Data job: decode, describe, write; one block is one shard, from the plan to the receipt."""

from collections.abc import Callable, Iterator

import pyarrow as pa
import ray

from vop.config import Config
from vop.embedding import ShardWriter, decode_shard
from vop.models.embedder import Calibration, Embedder, calibrate
from vop.stages import cluster
from vop.store import EmbeddingStore


def calibration(config: Config, sample: pa.Table | None) -> Calibration:
    """Load the models once on a worker: what they are, their shapes, and what is estimated on the sampled images."""
    task = ray.remote(num_cpus=1, num_gpus=cluster.gpu_share(config.embedding.gpus_per_encoder), max_retries=2)(
        calibrate
    )
    try:
        return ray.get(task.remote(config, sample))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the reason is the model's or the image's, not Ray's


def embed_shards(
    config: Config, store: EmbeddingStore, shards: dict[int, pa.Table], view: Callable | None = None
) -> Iterator[dict]:
    """Embed planned shards; yields shard, ok and quarantined counts of each as soon as its receipt is written.

    `shards` maps shard numbers to tables of image_id, name, path, shard. Decoding runs as tasks ahead of the models,
    which live in an actor pool; Ray Data bounds what waits between them. `view` as in `decode_shard`.
    """
    if not shards:
        return
    with cluster.whole_blocks(config.cluster):
        yield from cluster.rows(_dataset(config, store, shards, view))


def _dataset(
    config: Config, store: EmbeddingStore, shards: dict[int, pa.Table], view: Callable | None
) -> ray.data.Dataset:
    embedding = config.embedding
    gpu = cluster.gpu_share(embedding.gpus_per_encoder)
    encoders = min(cluster.replicas(embedding.encoders, gpu), len(shards))
    decoding = min(1, 0.5 * cluster.cpus())
    planned = ray.data.from_arrow([shards[number] for number in sorted(shards)])
    decoded = cluster.by_shards(
        planned, decode_shard, fn_args=(embedding.image_size, embedding.max_pixels, view), num_cpus=decoding
    )
    described = cluster.by_shards(
        decoded,
        Embedder,
        fn_constructor_args=(config, store),
        compute=ray.data.ActorPoolStrategy(size=encoders),
        num_cpus=cluster.model_cpus(encoders),
        num_gpus=gpu,
    )
    return cluster.by_shards(described, ShardWriter(store), num_cpus=0.1)
