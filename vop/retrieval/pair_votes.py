"""Votes as arrays: how they are sent, kept and merged. The method that makes and weighs them is `vop.retrieval.voting`.

Imports nothing compiled, because a shard on a graphics card uses it where there is no Numba.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Votes:
    """What one query's patches found in its candidates.

    rows        (n,) int64, ascending: database rows of the candidates
    sums        (n, P) float32: A, the sum of the similarities of each query patch's hits in each candidate
    counts      (n, P) int32: C, the number of those hits
    candidates  how many candidates were searched; more than n where those without a hit were left out
    """

    rows: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    candidates: int


@dataclass(frozen=True)
class PairVotes:
    """Votes of n pairs of images as they are sent and kept: sparse, about a tenth of `Votes`.

    queries  (n,) int64: the query of each pair, as its user numbers queries
    rows     (n,) int64: database row of its candidate
    starts   (n + 1,) int64: pair i has the entries starts[i] .. starts[i + 1] of the other arrays
    patches  uint16: a query patch with hits in the candidate, ascending, counted among the patches that take part
    counts   uint16: C, how many hits it has there
    sums     float32: A, the sum of their similarities
    """

    queries: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    patches: np.ndarray
    counts: np.ndarray
    sums: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """patches, counts and sums."""
        return self.patches, self.counts, self.sums

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def take(self, pairs: np.ndarray) -> "PairVotes":
        """These pairs, in this order."""
        sizes = np.diff(self.starts)[pairs]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        entries = np.repeat(self.starts[pairs] - starts[:-1], sizes) + np.arange(starts[-1])
        arrays = (array[entries] for array in (self.patches, self.counts, self.sums))
        return PairVotes(self.queries[pairs], self.rows[pairs], starts, *arrays)

    def of(self, query: int, P: int, candidates: int) -> Votes:
        """The votes of one query with P patches for all its candidates; only of votes that `merge` made."""
        first, last = np.searchsorted(self.queries, [query, query + 1])
        entries = slice(self.starts[first], self.starts[last])
        pair = np.repeat(np.arange(last - first), np.diff(self.starts[first : last + 1]))
        sums, counts = np.zeros((last - first, P), np.float32), np.zeros((last - first, P), np.int32)
        sums[pair, self.patches[entries]] = self.sums[entries]
        counts[pair, self.patches[entries]] = self.counts[entries]
        return Votes(self.rows[first:last], sums, counts, candidates)


def merge(parts: Sequence[PairVotes]) -> PairVotes:
    """Join votes of different pairs, from any number of shards, and sort them by query and database row.

    ValueError if a pair comes twice: its votes would count twice.
    """
    parts = [NO_VOTES, *parts]
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    names = ("queries", "rows", "patches", "counts", "sums")
    queries, rows, *entries = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    shifted = (part.starts[:-1] + end for part, end in zip(parts, ends, strict=False))
    joined = PairVotes(queries, rows, np.concatenate([*shifted, ends[-1:]]), *entries)
    order = np.lexsort((rows, queries))
    twice = (np.diff(queries[order]) == 0) & (np.diff(rows[order]) == 0)
    if twice.any():
        first = order[np.flatnonzero(twice)[0]]
        raise ValueError(
            f"the votes of query {queries[first]} for row {rows[first]} came twice: they would count twice"
        )
    return joined if np.all(np.diff(order) == 1) else joined.take(order)


NO_VOTES = PairVotes(
    *(np.empty(0, np.int64) for _ in range(2)),
    np.zeros(1, np.int64),
    *(np.empty(0, dtype) for dtype in (np.uint16, np.uint16, np.float32)),
)


def threshold(radius: float) -> np.float32:
    """The similarity 1 - r that a hit must exceed, as float32. ValueError unless 0 < r <= 2."""
    if not 0 < radius <= 2:
        raise ValueError(
            f"radius {radius} is not in (0, 2]: it is a cosine distance, 1 - similarity; usual values are 0.1 to 0.4"
        )
    return np.float32(1.0 - float(radius))
