"""One search shard: the descriptors of some database rows, and both searches over them.

A `ShardIndex` is built from plain arrays and answers with plain arrays, so that it runs in a test, a loop, or an actor.
What it returns merges: `shortlist.merge` for shortlists, `voting.merge` for votes. The answer does not depend on which
rows lie in which shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vop.retrieval import kernel
from vop.retrieval.shortlist import GlobalIndex, Shortlist
from vop.retrieval.voting import Votes, image_patches, patch_scratch, threshold


@dataclass(frozen=True)
class BatchVotes:
    """`Votes` of Q queries as flat arrays, cheap to send between processes; ``batch[q]`` is query q's `Votes` (views).

    offsets     (Q + 1,) int64: the candidates of query q are offsets[q] .. offsets[q + 1] of `rows`
    patches     (Q,) int64: P_q, how many patches of query q took part
    candidates  (Q,) int64: how many candidates of query q this shard searched
    rows        (n,) int64 database rows, ascending within a query
    sums        (sum of n_q * P_q,) float32; counts likewise, int32
    """

    offsets: np.ndarray
    patches: np.ndarray
    candidates: np.ndarray
    rows: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, q: int) -> Votes:
        if not 0 <= q < len(self):
            raise IndexError(f"query {q} of {len(self)}")
        starts = np.concatenate([[0], np.cumsum(np.diff(self.offsets) * self.patches)])
        rows = slice(self.offsets[q], self.offsets[q + 1])
        values = slice(starts[q], starts[q + 1])
        shape = (rows.stop - rows.start, int(self.patches[q]))
        return Votes(
            self.rows[rows],
            self.sums[values].reshape(shape),
            self.counts[values].reshape(shape),
            int(self.candidates[q]),
        )


class ShardIndex:
    """The rows of one shard.

    patches  (n, P, E) float16 or float32, unit vectors; kept as given (a memory map or a read-only view will do)
    globals  (n, G) float16 or float32
    rows     (n,) int64 database rows over all shards, no two equal
    masks    (n, P) bool, True where a patch is image; None: padding votes too
    scenes   (n,) int scene codes, or None
    factory  FAISS ``index_factory`` string of the shortlist's index; None: exact
    """

    def __init__(self, patches, globals, rows, masks=None, scenes=None, factory: str | None = None):
        rows = np.asarray(rows, np.int64)
        lengths = {"patches": len(patches), "globals": len(globals)}
        lengths |= {name: len(array) for name, array in (("masks", masks), ("scenes", scenes)) if array is not None}
        for name, length in lengths.items():
            if length != len(rows):
                raise ValueError(
                    f"{length} {name} for {len(rows)} rows: all arrays of a shard describe the same images"
                )
        if not len(rows):
            raise ValueError("a shard without rows: give the database to fewer shards")
        if len(np.unique(rows)) != len(rows):
            raise ValueError("two rows of a shard have the same number: each database image must appear once")
        self._patches, self._masks = patches, None if masks is None else np.asarray(masks, bool)
        self._rows, self._scenes = rows, None if scenes is None else np.asarray(scenes)
        self._order = np.argsort(rows)  # local positions in database order
        self._globals = GlobalIndex(globals, rows, scenes, factory)

    def __len__(self) -> int:
        return len(self._rows)

    def shortlist(self, query_globals, k: int, exclude=None, scenes=None) -> Shortlist:
        """The k best rows of this shard for each of query_globals (Q, G); see `GlobalIndex.search`."""
        return self._globals.search(query_globals, k, exclude, scenes)

    def votes(
        self,
        query_patches: np.ndarray,
        query_masks: np.ndarray | None,
        candidates: Sequence[np.ndarray] | None,
        radius: float,
        exclude: np.ndarray | None = None,
        scenes: np.ndarray | None = None,
    ) -> BatchVotes:
        """Votes of Q queries for those of their candidates that lie in this shard.

        query_patches  (Q, P, E) float16 or float32 unit vectors; query_masks (Q, P) bool, or None: all patches vote
        candidates     per query the database rows to search, such as a merged `Shortlist`; rows of other shards are
                       ignored, every candidate is returned. None: search every row and return those with a hit
        exclude        (Q,) each query's own database row, never a candidate; -1 for a query that is not in the database
        scenes         (Q,) codes: a query sees only the rows with the same

        ValueError if E differs, a radius is out of range, or a query names a candidate twice.
        """
        count, P, E = query_patches.shape
        for name, array in (("candidates", candidates), ("exclude", exclude), ("scenes", scenes)):
            if array is not None and len(array) != count:
                raise ValueError(f"{len(array)} {name} for {count} queries")
        if scenes is not None and self._scenes is None:
            raise ValueError(
                "a search by scene needs an index with scenes: give ShardIndex the scene codes of its rows"
            )
        bound = threshold(radius)
        query_masks = np.ones((count, P), bool) if query_masks is None else query_masks
        sizes = query_masks.sum(axis=1)
        scratch = patch_scratch(query_patches)
        packed = [
            kernel.panels(image_patches(x, mask, E, scratch))
            for x, mask in zip(query_patches, query_masks, strict=True)
        ]
        scratch = patch_scratch(self._patches)  # one converted candidate: it serves all queries that list it
        sums = np.empty(max((panel.shape[0] for panel in packed), default=0) * kernel.WIDTH, np.float32)
        counts = np.empty(len(sums), np.int32)

        found: list[list] = [[] for _ in range(count)]
        searched = np.zeros(count, np.int64)
        for place, members in self._groups(count, candidates, exclude, scenes):
            mask = None if self._masks is None else self._masks[place]
            y = image_patches(self._patches[place], mask, E, scratch)
            for q in members:
                length = packed[q].shape[0] * kernel.WIDTH
                kernel.count_hits(packed[q], y, bound, sums[:length], counts[:length])
                searched[q] += 1
                if candidates is not None or counts[: sizes[q]].any():
                    found[q].append((self._rows[place], sums[: sizes[q]].copy(), counts[: sizes[q]].copy()))
        return _batch(found, sizes, searched)

    def _groups(self, count: int, candidates, exclude, scenes) -> Iterator[tuple[int, np.ndarray]]:
        """Each local row that is a candidate, in database order, and the queries (m,) it is a candidate of.

        By candidate, not by query, so that a batch reads and converts each row once.
        """
        own = np.full(count, -1) if exclude is None else np.asarray(exclude)
        if candidates is None:
            for place in self._order:
                allowed = own != self._rows[place]
                if scenes is not None:
                    allowed &= np.asarray(scenes) == self._scenes[place]
                yield place, np.flatnonzero(allowed)
            return
        query = np.repeat(np.arange(count), [len(rows) for rows in candidates])
        rows = np.concatenate([np.empty(0, np.int64), *candidates])
        sorted_rows = self._rows[self._order]
        rank = np.minimum(np.searchsorted(sorted_rows, rows), len(sorted_rows) - 1)
        kept = (sorted_rows[rank] == rows) & (rows != own[query])
        if scenes is not None:
            kept &= self._scenes[self._order[rank]] == np.asarray(scenes)[query]
        rank, query = rank[kept], query[kept]
        order = np.lexsort((query, rank))
        rank, query = rank[order], query[order]
        twice = (np.diff(rank) == 0) & (np.diff(query) == 0)
        if twice.any():
            q = query[:-1][twice][0]
            raise ValueError(f"the candidates of query {q} of the batch name a row twice: it would vote twice")
        for start, end in pairwise(np.flatnonzero(np.diff(rank, prepend=-1, append=-1))):
            yield self._order[rank[start]], query[start:end]


def _batch(found: list[list], patches: np.ndarray, candidates: np.ndarray) -> BatchVotes:
    flat = [entry for entries in found for entry in entries]
    offsets = np.concatenate([[0], np.cumsum([len(entries) for entries in found], dtype=np.int64)]).astype(np.int64)
    return BatchVotes(
        offsets,
        patches,
        candidates,
        np.array([row for row, _, _ in flat], np.int64),
        np.concatenate([np.empty(0, np.float32), *(sums for _, sums, _ in flat)]),
        np.concatenate([np.empty(0, np.int32), *(counts for _, _, counts in flat)]),
    )


def memory_bytes(rows: int, P: int, E: int, dtype: str, G: int) -> int:
    """Bytes a shard of `rows` images holds: patches and globals in `dtype`, FAISS's exact float32 copy, masks, rows."""
    return rows * ((P * E + G) * np.dtype(dtype).itemsize + 4 * G + P + 16)
