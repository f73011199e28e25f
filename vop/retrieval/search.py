"""One search without Ray: batches of queries, the index of one shard, and the ranking of merged answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import faiss
import numpy as np
import pyarrow as pa

from vop import pairs
from vop.catalog import evenly_spread
from vop.foreign_hloc import GlobalDescriptors
from vop.image import patch_mask
from vop.parts import fingerprint
from vop.quantised import widen
from vop.retrieval import pair_votes, patches, voting
from vop.retrieval.index import ShardIndex, memory_bytes
from vop.retrieval.pair_votes import PairVotes
from vop.retrieval.patches import PatchIndex
from vop.retrieval.reuse import Earlier, Reuse, kept_table
from vop.retrieval.shortlist import Shortlist
from vop.schema import ILLUSTRATED, RetrievalConfig
from vop.store import Selection

# Pairs as they are ranked; the first pair of an illustrated query also carries the weights of its patches.
# Their number is fixed: what a report shows must not decide whether a search is done already.
RANKED = pairs.SCHEMA.append(pa.field("patch_weights", pa.list_(pa.float32())))

SMALL_SHARD = 500  # images; fewer do not repay the start of another actor
PROCESS = 300_000_000  # bytes of a shard's process without data: Python, Arrow, FAISS and compiled code


def shard_count(database: int, retrieval: RetrievalConfig, workers: int) -> int:
    """Shards that a database of so many images is split over, by this many cores or graphics cards."""
    asked = retrieval.shards or min(workers, -(-database // SMALL_SHARD))
    return max(1, min(asked, database))


@dataclass(frozen=True)
class QueryBatch:
    """Q queries as they travel to the shards.

    globals (Q, G) float32 and patches (Q, P, E) in the stored type; masks (Q, P) bool or None: padding votes too;
    exclude (Q,) int64, the query's own database row or -1; scenes (Q,) int64 or None: any scene will do; settled (Q,)
    bool or None: queries for whose shortlist only the fresh rows are searched, because the rest is known.
    """

    number: int
    globals: np.ndarray
    patches: np.ndarray
    masks: np.ndarray | None
    exclude: np.ndarray
    scenes: np.ndarray | None
    settled: np.ndarray | None


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
    """Queries against a database, and how. Rows of the database are its positions, by name.

    globals: descriptors that make the shortlist in the place of the store's; None: the store's.
    """

    queries: Selection
    database: Selection
    retrieval: RetrievalConfig
    radius: float
    globals: GlobalDescriptors | None = None

    def fingerprint(self) -> str:
        """Equal for searches that give equal parts: the same descriptors, sets and settings."""
        rows = [fingerprint(side.rows.to_pydict()) for side in (self.queries, self.database)]
        ranking = self.retrieval.k, self.retrieval.weights, self.retrieval.query_batch
        return fingerprint(self.settings(), rows, self.shard_hashes(), ranking)

    def settings(self) -> str:
        """Equal for searches in which a pair of images has the same votes, whatever else is in the database."""
        settings = dataclasses.asdict(self.retrieval)
        for name in ("k", "weights", "query_batch"):  # decide what becomes of the votes
            del settings[name]
        for name in ("timeout_s", "reuse_gb", "keep_votes", "cache"):  # where and how long, not what
            del settings[name]
        if self.exact:
            del settings["shards"]
        del settings["global_descriptors"]  # their place is not what they are
        given = [] if self.globals is None else [self.globals.identity]
        return fingerprint(version("vop"), self.database.store.manifest["features"], settings, self.radius, *given)

    @property
    def exact(self) -> bool:
        """Whether the answer follows from the descriptors alone, and not from how an index was trained on a shard."""
        return self.retrieval.index == "Flat" and self.retrieval.patch_index in (None, "Flat")

    @property
    def symmetric(self) -> bool:
        """Whether a pair has the same votes from whichever side it is scored.

        A graphics card adds them up in another order, and a trained index may find other hits.
        """
        return self.retrieval.device == "cpu" and self.retrieval.patch_index in (None, "Flat")

    def shard_hashes(self) -> dict[int, str]:
        """SHA-256 of the store's shards that hold the images of this search, by number."""
        receipts = self.database.store.receipts()
        used = {number for side in (self.queries, self.database) for number in np.unique(side.locations[0]).tolist()}
        return {number: receipts[number]["sha256"] for number in sorted(used)}

    def record(self) -> dict:
        """What a later search must know of the votes that are kept of this one; see `reuse.Earlier`."""
        return {
            "settings": self.settings(),
            "shards": {str(number): sha for number, sha in self.shard_hashes().items()},
            "batches": self.n_batches,
            "query_batch": self.retrieval.query_batch,
            "queries": self.queries.image_ids,
            "database": self.database.image_ids,
        }

    def reuse(self, output: str, numbers: Sequence[int]) -> Reuse:
        """What need not be counted to answer these batches, given the votes that earlier searches left in `output`."""
        earlier = Earlier.find(output, self.settings(), self.shard_hashes()) if self.exact else None
        return Reuse(
            *self._ids,
            self.own_rows,
            self.retrieval.query_batch,
            numbers,
            earlier,
            self.retrieval.shortlist is None,
            self.retrieval.reuse_gb * 1e9 if self.symmetric else None,
        )

    @cached_property
    def own_rows(self) -> np.ndarray:
        """(Q,) int64: the database row of every query, -1 where it is not in the database."""
        rows = {image_id: row for row, image_id in enumerate(self.database.image_ids)}
        return np.array([rows.get(image_id, -1) for image_id in self.queries.image_ids], np.int64)

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.array(side.image_ids, np.int64) for side in (self.queries, self.database))

    @cached_property
    def _scene_codes(self) -> tuple[np.ndarray, np.ndarray]:
        return shared_scenes(self.queries, self.database)

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

    @cached_property
    def chosen(self) -> set[str]:
        """Names of the illustrated queries, evenly spread over all of them."""
        return {self.queries.names[i] for i in evenly_spread(len(self.queries), ILLUSTRATED)}

    def _positions(self, number: int) -> np.ndarray:
        size = self.retrieval.query_batch
        return np.arange(number * size, min((number + 1) * size, len(self.queries)))

    def batches(self, numbers: Sequence[int], reuse: Reuse) -> Iterator[QueryBatch]:
        """Read these batches of queries from the store, one at a time."""
        scenes = self._scene_codes[0] if self.retrieval.within_scene else None
        for number in numbers:
            positions = self._positions(number)
            part = self.queries.take(positions)
            globals_, patches = self._globals(part, part.read())
            yield QueryBatch(
                number,
                globals_.astype(np.float32),
                patches,
                masks(part) if self.retrieval.mask_padding else None,
                self.own_rows[positions],
                None if scenes is None else scenes[positions],
                reuse.recall(number),
            )

    def candidates(self, batch: QueryBatch, shortlist: Shortlist | None) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of a batch that are candidates: positions in the batch and database rows, (m,) int64 each."""
        if shortlist is not None:
            return np.repeat(np.arange(len(shortlist)), np.diff(shortlist.offsets)), shortlist.rows
        allowed = np.ones((len(batch.exclude), len(self.database)), bool)
        if batch.scenes is not None:
            allowed = batch.scenes[:, None] == self._scene_codes[1][None]
        own = np.flatnonzero(batch.exclude >= 0)
        allowed[own, batch.exclude[own]] = False
        return np.nonzero(allowed)

    def index(self, rows: np.ndarray, fresh: np.ndarray | None) -> ShardIndex:
        """The index of one shard, these rows of the database: reads their descriptors from the store.

        It is a `ShardIndex`, or a `PatchIndex` or `CudaIndex`, which answer alike. fresh (n,) bool: which of the rows
        the settled queries are searched among.
        """
        faiss.omp_set_num_threads(1)  # shards run side by side
        part = self.database.take(rows)
        asked = self.retrieval
        globals_, stored = self._globals(part, part.read() if asked.cache is None else part.read_mapped(asked.cache))
        image = masks(part) if asked.mask_padding else None
        if asked.patch_index is not None:
            return PatchIndex(stored, rows, image, asked.patch_index, asked.patch_probe, asked.patch_margin)
        scenes = self._scene_codes[1][rows] if asked.within_scene else None
        if asked.device == "cuda":
            from vop.retrieval.cuda_index import CudaIndex  # PyTorch, which the other shards need not load

            return CudaIndex(stored, globals_, rows, image, scenes, fresh)
        factory = None if asked.index == "Flat" else asked.index
        return ShardIndex(stored, globals_, rows, image, scenes, factory, fresh)

    def _globals(self, part: Selection, read: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Global descriptors (n, G) for the shortlist and patches of images, of what the store has of them."""
        return read if self.globals is None else (self.globals.read(part.names), read[1])

    def memory_bytes(self, rows: int) -> int:
        """Main memory that a shard of so many rows needs; of memory-mapped patches the pages that a batch touches."""
        manifest, asked = self.database.store.manifest, self.retrieval
        P, E, dtype = manifest["patches"], manifest["width"], manifest["dtype"]
        held = rows if asked.cache is None else min(rows, asked.query_batch * (asked.shortlist or rows))
        G = manifest["global_width"] if self.globals is None else self.globals.width
        needed = PROCESS + memory_bytes(rows, held, P, E, dtype, G, asked.query_batch)
        needed += 0 if self.globals is None else rows * G * np.dtype(np.float32).itemsize  # are read as float32
        return needed if asked.patch_index is None else needed + patches.memory_bytes(rows, P, E, asked.patch_index)

    def rank(self, batch: QueryBatch, shortlist: Shortlist | None, queries: np.ndarray, votes: PairVotes) -> pa.Table:
        """Weigh and rank the votes of a batch, of all shards: its pairs, in `RANKED`.

        `queries` are the positions in the batch of its candidates (see `candidates`), those without votes too.
        """
        candidates = np.bincount(queries, minlength=len(batch.exclude))
        columns: dict[str, list] = {name: [] for name in RANKED.names}
        for q, position in enumerate(self._positions(batch.number)):
            name = self.queries.names[position]
            P = batch.patches.shape[1] if batch.masks is None else int(batch.masks[q].sum())
            found = votes.of(q, P, int(candidates[q]))
            plain, weighted = voting.scores(found, "none"), voting.scores(found, self.retrieval.weights)
            kept = voting.best(weighted, found.rows, self.retrieval.k)
            listed = {} if shortlist is None else {row: rank for rank, row in enumerate(shortlist[q].tolist())}
            ranks = [listed.get(row) for row in found.rows[kept].tolist()]
            weights = [None] * len(kept)
            if name in self.chosen and weights:
                weights[0] = _patch_weights(found, batch, q, self.retrieval.weights)
            columns["query"] += [name] * len(kept)
            columns["database"] += [self.database.names[row] for row in found.rows[kept]]
            columns["rank"] += range(len(kept))
            columns["score"] += plain[kept].tolist()
            columns["weighted"] += weighted[kept].tolist()
            columns["shortlist_rank"] += ranks
            columns["shortlist_score"] += [
                None if rank is None else float(shortlist.scores_of(q)[rank]) for rank in ranks
            ]
            columns["patch_weights"] += weights
        return pa.table([pa.array(columns[field.name], field.type) for field in RANKED], schema=RANKED)

    def kept(self, batch: QueryBatch, shortlist: Shortlist | None, votes: PairVotes) -> pa.Table:
        """The votes of a batch as a later search may take them up, in `reuse.KEPT`."""
        queries, database = self._ids
        return kept_table(queries[self._positions(batch.number)], database, shortlist, votes)


def _patch_weights(votes: pair_votes.Votes, batch: QueryBatch, q: int, kind: str) -> np.ndarray:
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
    return voting.automatic_radius([widen(x[mask]) for x, mask in zip(patches, image, strict=True)])
