"""One search shard: the descriptors of some database rows, and both searches over them.

A `ShardIndex` is built from plain arrays and answers with plain arrays, so that it runs in a test, a loop, or an actor.
What it returns merges: `shortlist.merge` for shortlists, `pair_votes.merge` for votes. The answer does not depend on
which rows lie in which shard.
"""

from dataclasses import dataclass

import numpy as np

from vop.quantised import float_type
from vop.retrieval import kernel
from vop.retrieval.pair_votes import PairVotes, merge, threshold
from vop.retrieval.shortlist import NOBODY, GlobalIndex, Shortlist
from vop.retrieval.shortlist import merge as merge_shortlists

PAIRS_AT_ONCE = 4096  # bounds the scratch memory of a call


@dataclass(frozen=True)
class Wanted:
    """The pairs of images to be scored for a batch of queries.

    queries (m,) int64, positions in the batch; rows (m,) int64 database rows; no pair twice, no query with itself
    mutual  (m,) bool: whether the candidate's votes for the query are wanted too
    """

    queries: np.ndarray
    rows: np.ndarray
    mutual: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class ShardIndex:
    """The rows of one shard.

    patches  (n, P, E) float16, float32 or int8, unit vectors as stored; kept as given, a memory map or a read-only view
             will do
    globals  (n, G) float16 or float32
    rows     (n,) int64 database rows over all shards, no two equal
    masks    (n, P) bool, True where a patch is image; None: padding votes too
    scenes   (n,) int scene codes, or None
    factory  FAISS ``index_factory`` string of the shortlist's index; None: exact
    fresh    (n,) bool, or None: the rows among which settled queries are searched
    """

    def __init__(self, patches, globals, rows, masks=None, scenes=None, factory: str | None = None, fresh=None):
        rows = np.asarray(rows, np.int64)
        lengths = {"patches": len(patches), "globals": len(globals)}
        lengths |= {name: len(array) for name, array in (("masks", masks), ("scenes", scenes)) if array is not None}
        for name, length in lengths.items():
            if length != len(rows):
                raise ValueError(
                    f"{length} {name} for {len(rows)} rows: all arrays of a shard describe the same images"
                )
        if masks is not None and np.shape(masks) != patches.shape[:2]:
            raise ValueError(f"masks of shape {np.shape(masks)} for patches of shape {patches.shape}: one bool a patch")
        if not len(rows):
            raise ValueError("a shard without rows: give the database to fewer shards")
        if len(np.unique(rows)) != len(rows):
            raise ValueError("two rows of a shard have the same number: each database image must appear once")
        self._patches = patches
        self._masks = np.ones(patches.shape[:2], bool) if masks is None else np.asarray(masks, bool)
        self._rows = rows
        self._order = np.argsort(rows)  # local positions in database order
        self._sorted = rows[self._order]
        self._globals = GlobalIndex(globals, rows, scenes, factory)
        self._fresh = None
        if fresh is not None and np.any(fresh):
            self._fresh = GlobalIndex(globals[fresh], rows[fresh], None if scenes is None else scenes[fresh], factory)

    def __len__(self) -> int:
        return len(self._rows)

    def shortlist(self, query_globals, k: int, exclude=None, scenes=None, settled=None) -> Shortlist:
        """The k best rows of this shard for each of query_globals (Q, G); see `GlobalIndex.search`.

        settled (Q,) bool: queries that see only the fresh rows, because an earlier search knows the best of the others.
        """
        if settled is None:
            return self._globals.search(query_globals, k, exclude, scenes)
        parts = []
        for index, queries in ((self._globals, np.flatnonzero(~settled)), (self._fresh, np.flatnonzero(settled))):
            if index is not None and len(queries):
                own = (None if array is None else array[queries] for array in (exclude, scenes))
                parts.append(index.search(query_globals[queries], k, *own).among(queries, len(settled)))
        return merge_shortlists([*parts, NOBODY.among(np.empty(0, np.int64), len(settled))], k)

    def votes(
        self, patches: np.ndarray, masks: np.ndarray | None, wanted: Wanted, radius: float, screens: bool = True
    ) -> tuple[PairVotes, PairVotes]:
        """Votes of Q queries for those of the wanted rows that lie in this shard; rows of other shards are ignored.

        patches (Q, P, E) unit vectors as stored; masks (Q, P) bool, or None: all patches vote. `screens`
        False leaves out the integer pass: the same result, slower.

        Returns the votes of the queries for the rows, and where `mutual` those of the rows for the queries, whose
        queries are database rows and whose rows are positions in the batch. ValueError if E differs, or a radius is
        out of range.
        """
        bound = threshold(radius)
        if patches.shape[2] != self._patches.shape[2]:
            raise ValueError(
                f"query patches have width {patches.shape[2]}, the database {self._patches.shape[2]}: were both made "
                "by the same encoder?"
            )
        masks = np.ones(patches.shape[:2], bool) if masks is None else masks
        if masks.shape != patches.shape[:2]:
            raise ValueError(f"masks of shape {masks.shape} for patches of shape {patches.shape}: one bool a patch")
        if len(wanted) and not 0 <= wanted.queries.min() <= wanted.queries.max() < len(patches):
            raise ValueError(
                f"the wanted pairs name queries outside the batch of {len(patches)}"
            )  # read unchecked below
        rank = np.minimum(np.searchsorted(self._sorted, wanted.rows), len(self) - 1)
        here = np.flatnonzero(self._sorted[rank] == wanted.rows)
        here = here[np.argsort(rank[here], kind="stable")]  # by row, so that a row is read and converted once
        place, query, mutual = self._order[rank[here]], wanted.queries[here], wanted.mutual[here]
        asked, query = np.unique(query, return_inverse=True)  # only those are prepared
        packed, bits, found, back = kernel.stack(patches[asked], masks[asked]), kernel.as_bits(self._patches), [], []
        for start in range(0, len(here), PAIRS_AT_ONCE):
            now = slice(start, start + PAIRS_AT_ONCE)
            pairs = place[now], query[now], mutual[now]
            hits, hits_back = kernel.count_hits(packed, bits, self._masks, *pairs, bound, screens)
            queries, rows = asked[query[now]], self._rows[place[now]]
            found.append(_with_hits(queries, rows, *hits))
            back.append(_with_hits(rows, queries, *hits_back))
        return merge(found), merge(back)


def _with_hits(queries, rows, ends, patches, counts, sums) -> PairVotes:
    """The pairs that have an entry."""
    hit = np.diff(ends, prepend=0) > 0
    return PairVotes(queries[hit], rows[hit], np.concatenate([[0], ends[hit]]), patches, counts, sums)


def memory_bytes(rows: int, held: int, P: int, E: int, dtype: str, G: int, queries: int) -> int:
    """Bytes a shard of `rows` images needs, of which it holds the patches of `held`, in answering so many queries.

    Globals lie in the store's type and as FAISS's exact float32 copy. Queries are held as they come and as the kernel
    takes them, in float32 and in integers.
    """
    patches, globals_ = np.dtype(dtype).itemsize, np.dtype(float_type(dtype)).itemsize
    scratch = 40 * P * P + 2 * PAIRS_AT_ONCE * P * 8
    return held * P * E * patches + rows * ((globals_ + 4) * G + P + 16) + queries * P * E * (patches + 5) + scratch
