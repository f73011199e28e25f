"""One search without Ray: batches of queries, the index of one shard, and the ranking of merged answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import faiss
import numpy as np
import pyarrow as pa

from vop import pairs
from vop.catalog import evenly_spread
from vop.config import ILLUSTRATED, RetrievalConfig
from vop.image import patch_mask
from vop.parts import fingerprint
from vop.retrieval import voting
from vop.retrieval.index import BatchVotes, ShardIndex, memory_bytes
from vop.retrieval.shortlist import Shortlist
from vop.store import Selection

# Pairs as they are ranked; the first pair of an illustrated query also carries the weights of its patches.
# Their number is fixed: what a report shows must not decide whether a search is done already.
RANKED = pairs.SCHEMA.append(pa.field("patch_weights", pa.list_(pa.float32())))


@dataclass(frozen=True)
class QueryBatch:
    """Q queries as they travel to the shards.

    globals (Q, G) and patches (Q, P, E) in the stored type; masks (Q, P) bool or None: padding votes too; exclude (Q,)
    int64, the query's own database row or -1; scenes (Q,) int64 or None: any scene will do.
    """

    number: int
    globals: np.ndarray
    patches: np.ndarray
    masks: np.ndarray | None
    exclude: np.ndarray
    scenes: np.ndarray | None


def masks(selection: Selection) -> np.ndarray:
    """Which patches of every image are image and not padding, (n, P) bool."""
    image_size = selection.store.manifest["features"]["preprocessing"]["image_size"]
    return np.stack([patch_mask(int(w), int(h), image_size) for w, h in selection.scaled_sizes])


def shared_scenes(queries: Selection, database: Selection) -> tuple[np.ndarray, np.ndarray]:
    """Integer scene codes of queries and database images, equal where the scenes are."""
    codes = {scene: code for code, scene in enumerate(sorted({*database.scenes, *queries.scenes}))}
    return tuple(np.array([codes[scene] for scene in side.scenes], np.int64) for side in (queries, database))


@dataclass(frozen=True)
class Search:
    """Queries against a database, and how. Rows of the database are its positions, by name."""

    queries: Selection
    database: Selection
    retrieval: RetrievalConfig
    radius: float

    def fingerprint(self) -> str:
        """Equal for searches that give equal parts: the same descriptors, sets and settings."""
        settings = dataclasses.asdict(self.retrieval)
        for name in ("shards", "timeout_s"):  # where and how long, not what
            del settings[name]
        rows = [fingerprint(side.rows.to_pydict()) for side in (self.queries, self.database)]
        store = self.database.store
        receipts = {number: receipt["sha256"] for number, receipt in store.receipts().items()}
        made_with = version("vop"), store.manifest["features"], receipts
        return fingerprint(made_with, rows, settings, self.radius)

    @property
    def n_batches(self) -> int:
        """Number of query batches."""
        return -(-len(self.queries) // self.retrieval.query_batch)

    def queries_in(self, number: int) -> int:
        """Queries of a batch."""
        return len(self._positions(number))

    def queries_without(self, missing: Sequence[int]) -> int:
        """Queries of all batches but the missing ones."""
        return len(self.queries) - sum(self.queries_in(number) for number in missing)

    def chosen(self) -> set[str]:
        """Names of the illustrated queries, evenly spread over all of them."""
        return {self.queries.names[i] for i in evenly_spread(len(self.queries), ILLUSTRATED)}

    def _positions(self, number: int) -> np.ndarray:
        size = self.retrieval.query_batch
        return np.arange(number * size, min((number + 1) * size, len(self.queries)))

    def batches(self, numbers: Sequence[int]) -> Iterator[QueryBatch]:
        """Read these batches of queries from the store, one at a time."""
        rows = {image_id: row for row, image_id in enumerate(self.database.image_ids)}
        own = np.array([rows.get(image_id, -1) for image_id in self.queries.image_ids], np.int64)
        scenes = shared_scenes(self.queries, self.database)[0] if self.retrieval.within_scene else None
        for number in numbers:
            positions = self._positions(number)
            part = self.queries.take(positions)
            globals_, patches = part.read()
            yield QueryBatch(
                number,
                globals_.astype(np.float32),
                patches,
                masks(part) if self.retrieval.mask_padding else None,
                own[positions],
                None if scenes is None else scenes[positions],
            )

    def index(self, rows: np.ndarray) -> ShardIndex:
        """The index of one shard, these rows of the database: reads their descriptors from the store."""
        faiss.omp_set_num_threads(1)  # shards run side by side
        part = self.database.take(rows)
        globals_, patches = part.read()
        factory = None if self.retrieval.index == "Flat" else self.retrieval.index
        image = masks(part) if self.retrieval.mask_padding else None
        scenes = shared_scenes(self.queries, self.database)[1][rows] if self.retrieval.within_scene else None
        return ShardIndex(patches, globals_, rows, image, scenes, factory)

    def memory_bytes(self, rows: int) -> int:
        """Memory that a shard of so many rows needs."""
        manifest = self.database.store.manifest
        shape = manifest["patches"], manifest["width"], manifest["dtype"], manifest["global_width"]
        return memory_bytes(rows, *shape)

    def rank(self, batch: QueryBatch, shortlist: Shortlist | None, votes: Sequence[BatchVotes]) -> pa.Table:
        """Weigh and rank the answers of all shards to a batch: its pairs, in `RANKED`."""
        chosen = self.chosen()
        tables = []
        for q, position in enumerate(self._positions(batch.number)):
            name = self.queries.names[position]
            merged = voting.merge([part[q] for part in votes])
            plain, weighted = voting.scores(merged, "none"), voting.scores(merged, self.retrieval.weights)
            kept = voting.best(weighted, merged.rows, self.retrieval.k)
            listed = {} if shortlist is None else {int(row): rank for rank, row in enumerate(shortlist[q])}
            ranks = [listed.get(int(row)) for row in merged.rows[kept]]
            weights = [None] * len(kept)
            if name in chosen and weights:
                weights[0] = _patch_weights(merged, batch, q, self.retrieval.weights)
            columns = {
                "query": [name] * len(kept),
                "database": [self.database.names[row] for row in merged.rows[kept]],
                "rank": np.arange(len(kept)),
                "score": plain[kept],
                "weighted": weighted[kept],
                "shortlist_rank": ranks,
                "shortlist_score": [None if rank is None else shortlist.scores_of(q)[rank] for rank in ranks],
                "patch_weights": weights,
            }
            tables.append(pa.table([pa.array(columns[field.name], field.type) for field in RANKED], schema=RANKED))
        return pa.concat_tables(tables)


def _patch_weights(votes: voting.Votes, batch: QueryBatch, q: int, kind: str) -> np.ndarray:
    """Weights (P,) float32 of all patches of a query; padding that took no part weighs nothing."""
    weights = np.zeros(batch.patches.shape[1], np.float32)
    took_part = slice(None) if batch.masks is None else batch.masks[q]
    weights[took_part] = voting.patch_weights(votes, kind)
    return weights


def choose_radius(database: Selection, retrieval: RetrievalConfig) -> float:
    """The configured radius, or the automatic one, estimated on a sample of the database's images."""
    if retrieval.radius is not None:
        return retrieval.radius
    sample = database.take(voting.radius_sample(len(database)))
    _, patches = sample.read()
    image = masks(sample) if retrieval.mask_padding else np.ones(patches.shape[:2], bool)
    return voting.automatic_radius([x[mask] for x, mask in zip(patches, image, strict=True)])
