"""Rates of the driver's tables: what an image and a shard cost it, and the memory that they take there."""

import subprocess
import sys

import numpy as np
import pyarrow as pa

from vop import catalog, files
from vop.config import Config
from vop.datasets.folder import ImageFile
from vop.datasets.image_sets import ImageSets
from vop.parts import fingerprint
from vop.planning.memory import peak_bytes
from vop.planning.timing import in_turns
from vop.store import EmbeddingStore, shard_name

LINES = 4_000  # of the catalog that is timed
HELD = 40_000  # of the catalog whose memory is measured
RECEIPTS = 50
FACTS = ["image_id", "content", "width", "height", "scaled_width", "scaled_height"]


def measured(config: Config, store: EmbeddingStore, folder: str) -> dict[str, float]:
    """What the driver takes for its tables, an image and a shard, and the memory they take in it."""
    listed, size = _lines(LINES), config.embedding.shard_size
    written = EmbeddingStore(files.join(folder, "catalog"), {})
    finished = _catalogued(listed, size)
    for number in range(2, RECEIPTS):
        files.write_json(files.join(store.path, f"{shard_name(number)}.json"), {"shard": number, "sha256": "0" * 64})
    took = in_turns(
        {
            "plan": lambda: written.write_images(_catalogued(listed, size)),
            "prepare": lambda: _prepared(finished),
            "receipts": store.receipts,
            "facts": lambda: store.shard_facts(0),
        }
    )
    return {
        "catalog_s": took["plan"] / LINES,
        "receipt_s": took["receipts"] / RECEIPTS,
        "facts_s": took["facts"],
        "prepare_s": took["prepare"] / LINES,
        "catalog_bytes": files.listing(written.path)["images.parquet"] / LINES,
        "driver_bytes": _alone(f"from {__name__} import held_bytes; print(held_bytes({HELD}, {size}))"),
    }


def held_bytes(images: int, shard_size: int) -> float:
    """Memory of this process for each of so many images of a collection; to be asked of a new process."""
    before = peak_bytes()
    lines = _lines(images).to_pylist()
    sets = ImageSets("/all", tuple(ImageFile(path=f"/all/{line['name']}", **line) for line in lines), (), (), {})
    del lines
    listing = sets.listing()
    paths = dict(zip(sets.names, listing["path"].to_pylist(), strict=True))
    held = _catalogued(listing, shard_size, paths)
    return (peak_bytes() - before) / len(held)


def _alone(code: str) -> float:
    """The number that a process of its own prints."""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _catalogued(listed: pa.Table, shard_size: int, paths: dict[str, str] | None = None) -> pa.Table:
    """Plan a listing and note that all of it was embedded, as `vop.steps.embeddings` does."""
    images = catalog.plan(catalog.SCHEMA.empty_table(), listed, shard_size, False, lambda name: None).images
    pending = catalog.pending(images, {})
    located = [catalog.located(shard, paths or {}, "") for shard in pending.values()]
    sizes = {name: pa.array(np.full(len(images), 200_000)) for name in FACTS[2:]}
    hashes = np.random.default_rng(0).bytes(16 * len(images)).hex()
    contents = [hashes[i : i + 32] for i in range(0, len(hashes), 32)]
    facts = pa.table({"image_id": images["image_id"], "content": contents, **sizes})
    receipts = {number: {"quarantined": []} for number in range(len(located))}
    return catalog.finish(images, receipts, lambda number: facts.slice(number * shard_size, shard_size))


def _prepared(images: pa.Table) -> None:
    """What a search asks of the catalog."""
    rows = images.select(["image_id", "name", "scene", "scaled_width", "scaled_height", "shard", "row"])
    fingerprint(rows.to_pydict())  # of the queries and of the database
    fingerprint(rows.to_pydict())
    rows["name"].to_pylist()


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
