"""Embedding as a Ray Data job: decode, describe, write; one block is one shard, from the plan to the receipt."""

from collections.abc import Iterator

import pyarrow as pa
import ray

from vop.config import Config
from vop.embedding import ShardWriter, decode_shard
from vop.models.embedder import Calibration, Embedder, calibrate
from vop.stages import cluster
from vop.store import EmbeddingStore


def calibration(config: Config, sample: pa.Table | None) -> Calibration:
    """Load the models once on a worker: what they are, their shapes, and what is estimated on the sampled images."""
    task = ray.remote(num_cpus=1, num_gpus=_gpus_per_encoder(config), max_retries=2)(calibrate)
    try:
        return ray.get(task.remote(config, sample))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the reason is the model's or the image's, not Ray's


def embed_shards(config: Config, store: EmbeddingStore, shards: dict[int, pa.Table]) -> Iterator[dict]:
    """Embed planned shards; yields shard, ok and quarantined counts of each as soon as its receipt is written.

    `shards` maps shard numbers to tables of image_id, name, path, shard. Decoding runs as tasks ahead of the models,
    which live in an actor pool; Ray Data bounds what waits between them.
    """
    if not shards:
        return
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # a block must stay a whole shard
    context.execution_no_progress_timeout_s = config.cluster.no_progress_timeout_s
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        written = _dataset(config, store, shards)
        for receipt in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from receipt.to_pylist()


def _dataset(config: Config, store: EmbeddingStore, shards: dict[int, pa.Table]) -> ray.data.Dataset:
    gpu = _gpus_per_encoder(config)
    encoders = min(_encoders(config, gpu), len(shards))
    # Logical CPUs only order who may start: the replicas ask for less than half together, so that decoding and writing
    # always find room, on one CPU too; and they ask for another number than decoding does, or Ray Data would fuse both
    # and decode inside the model's process.
    replica = round(min(0.9, 0.4 * cluster.cpus() / encoders), 3)
    decoding = min(1, 0.5 * cluster.cpus())
    shard = {"batch_size": None, "batch_format": "pyarrow"}
    embedding = config.embedding
    return (
        ray.data.from_arrow([shards[number] for number in sorted(shards)])
        .map_batches(decode_shard, fn_args=(embedding.image_size, embedding.max_pixels), num_cpus=decoding, **shard)
        .map_batches(
            Embedder,
            fn_constructor_args=(config, store),
            compute=ray.data.ActorPoolStrategy(size=encoders),
            num_cpus=replica,
            num_gpus=gpu,
            **shard,
        )
        .map_batches(ShardWriter(store), num_cpus=0.1, **shard)
    )


def _gpus_per_encoder(config: Config) -> float:
    asked = config.embedding.gpus_per_encoder
    return (1 if cluster.gpus() else 0) if asked is None else asked


def _encoders(config: Config, gpu: float) -> int:
    if config.embedding.encoders:
        return config.embedding.encoders
    return max(1, int(cluster.gpus() / gpu)) if gpu else cluster.cpus()
