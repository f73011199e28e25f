"""The store of descriptors: made of a collection, or taken as it is."""

from collections.abc import Callable

from vop import catalog
from vop.config import Config
from vop.datasets.image_sets import ImageSets
from vop.embedding import hash_file
from vop.run import Run
from vop.stages.embed import calibration, embed_shards
from vop.store import EmbeddingStore


def embedded(config: Config, job: Run, sets: ImageSets, view: Callable | None = None) -> EmbeddingStore:
    """The store with every image of the collection embedded or quarantined; `view` as in `decode_shard`."""
    listing = sets.listing()
    with job.step("load models"):
        new = not EmbeddingStore.exists(config.store_path)
        made = calibration(config, catalog.sample(listing, config.embedding.sample) if new else None)
    with job.writing(config.store_path):
        if new and not EmbeddingStore.exists(config.store_path):  # another run may have been quicker
            store = EmbeddingStore.create(config.store_path, made.features, made.shapes, made.arrays)
        else:
            store = EmbeddingStore.open(config.store_path)
            store.check_features(made.features)
        with job.step("plan"):
            paths = dict(zip(sets.names, listing["path"].to_pylist(), strict=True))
            planned, pending = store.plan(
                listing, config.embedding.shard_size, config.embedding.prune, lambda name: hash_file(paths[name])
            )
            guard = catalog.BadImages(planned.images, store.receipts(), config.embedding.max_bad_fraction)
        total = planned.images.num_rows
        waiting = sum(shard.num_rows for shard in pending.values())
        with job.progress("embed", total, total - waiting, "images") as bar:
            guard.add(0)
            located = {number: catalog.located(shard, paths, sets.root) for number, shard in pending.items()}
            for written in embed_shards(config, store, located, view):
                bar.update(written["ok"] + written["quarantined"], bad=written["quarantined"])
                guard.add(written["quarantined"])
        with job.step("finish store"):
            images = store.finish()
    job.counts |= catalog.summary(images, planned) | {"embedded_now": waiting, "skipped": sets.skipped}
    job.counts |= {"root": sets.root, "store": store.path}
    job.quarantined = list(catalog.quarantined(images))
    return store


def as_stored(config: Config, job: Run) -> EmbeddingStore:
    """A store as it is, without a look at images: imported, or of photographs that lie elsewhere."""
    store = EmbeddingStore.open(config.store_path)
    images = store.images()
    job.counts |= catalog.summary(images, catalog.Plan(images, 0, 0, [])) | {"embedded_now": 0, "skipped": {}}
    job.counts |= {"root": "", "store": store.path}
    job.quarantined = list(catalog.quarantined(images))
    return store
