"""Rates of the driver's tables: what an image and a shard cost it, and the memory that they take there."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from vop import catalog, files
from vop.config import Config
from vop.datasets.folder import ImageFile
from vop.datasets.image_sets import ImageSets
from vop.parts import fingerprint
from vop.planning.timing import in_turns, line
from vop.store import EmbeddingStore, shard_name

LINES = 4_000  # of the catalog that is timed
RECEIPTS = 50


def measured(config: Config, store: EmbeddingStore, folder: str) -> dict[str, float]:
    """What the driver takes for its tables, an image and a shard, and the memory they take in it."""
    listed = _lines(LINES)
    size = config.embedding.shard_size

    def planned(of: pa.Table) -> pa.Table:
        images = catalog.plan(catalog.SCHEMA.empty_table(), of, size, False, lambda name: None).images
        for shard in catalog.pending(images, {}).values():
            catalog.located(shard, {}, "")
        facts = images.select(["image_id", "content", "width", "height", "scaled_width", "scaled_height"])
        receipts = {number: {"quarantined": []} for number in np.unique(images["shard"].to_numpy()).tolist()}
        finished = catalog.finish(images, receipts, lambda number: facts.slice(number * size, size))
        EmbeddingStore(files.join(folder, "catalog"), {}).write_images(finished)
        return finished

    def prepared(images: pa.Table) -> None:
        rows = images.select(["image_id", "name", "scene", "scaled_width", "scaled_height", "shard", "row"])
        fingerprint(rows.to_pydict())  # of the queries and of the database
        fingerprint(rows.to_pydict())
        rows["name"].to_pylist()

    images = planned(listed)
    tables = {rows: _catalog(rows, 50) for rows in (LINES, 50 * LINES)}
    for number in range(2, RECEIPTS):
        files.write_json(files.join(store.path, f"{shard_name(number)}.json"), {"shard": number, "sha256": "0" * 64})
    took = in_turns(
        {
            "plan": lambda: planned(listed),
            "prepare": lambda: prepared(images),
            "receipts": store.receipts,
            "facts": lambda: store.shard_facts(0),
        }
        | {rows: lambda table=table: catalog.pending(table, {}) for rows, table in tables.items()}
    )
    _, pending = line((LINES, took[LINES]), (50 * LINES, took[50 * LINES]))
    return {
        "catalog_s": took["plan"] / LINES,
        "pending_s": pending / 50,
        "receipt_s": took["receipts"] / RECEIPTS,
        "facts_s": took["facts"],
        "prepare_s": took["prepare"] / LINES,
        "catalog_bytes": files.listing(files.join(folder, "catalog"))["images.parquet"] / LINES,
        "driver_bytes": _peak(lambda: [files_of := _files(LINES), planned(files_of.listing())]) / LINES,
    }


def _lines(count: int) -> pa.Table:
    """A listing of so many images."""
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "name": [f"folder-{i // 1000:05d}/image-{i:09d}.jpg" for i in range(count)],
            "scene": [f"folder-{i // 1000:05d}" for i in range(count)],
            "size": rng.integers(10**5, 10**7, count),
            "modified_ns": rng.integers(10**18, 2 * 10**18, count),
        }
    )


def _files(count: int) -> ImageSets:
    """The same as a collection that was listed."""
    lines = _lines(count).to_pylist()
    images = tuple(ImageFile(path=f"/collection/{line['name']}", **line) for line in lines)
    return ImageSets("/collection", images, (), (), {})


def _catalog(rows: int, shards: int) -> pa.Table:
    """A catalog of planned images in so many shards."""
    columns = {"image_id": np.arange(rows), "shard": np.arange(rows) * shards // rows}
    arrays = {name: pa.array(values) for name, values in columns.items()} | {"status": pa.array(["planned"] * rows)}
    lines = _lines(rows)
    arrays |= {name: lines[name].combine_chunks() for name in lines.column_names}
    return pa.table({f.name: arrays.get(f.name, pa.nulls(rows, f.type)) for f in catalog.SCHEMA}, catalog.SCHEMA)


def _peak(work: Callable[[], object]) -> float:
    """Bytes that a call takes at most: Python's objects, and Arrow's tables."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        held = work()
        return tracemalloc.get_traced_memory()[1] + max(0, pa.total_allocated_bytes() - before) + 0 * len(held)
    finally:
        tracemalloc.stop()
