"""The shortlist: the K database images whose global descriptors have the largest inner product with the query's.

FAISS finds the images; their scores are then computed again in float64, in one order, and rounded to float32. FAISS
chooses its kernels by batch size, so its own scores differ in the last bits from call to call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numba import njit

MARGIN = 8  # rows asked for beyond K, so that rounding at the boundary seldom needs a second search
TRAINING_ROWS = 100_000
CHUNK = 65_536  # rows converted to float32 at a time while the index is built


@dataclass(frozen=True)
class Shortlist:
    """Candidates of Q queries, best first, as flat arrays: those of query q lie at offsets[q] .. offsets[q + 1].

    offsets (Q + 1,) int64; rows (sum,) int64 database rows; scores (sum,) float32 inner products.
    A query has fewer than K candidates where fewer exist. ``shortlist[q]`` is the rows of query q.
    """

    offsets: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, q: int) -> np.ndarray:
        return self.rows[self._slice(q)]

    def scores_of(self, q: int) -> np.ndarray:
        """Scores of query q, in the order of ``shortlist[q]``."""
        return self.scores[self._slice(q)]

    def among(self, queries: np.ndarray, count: int) -> "Shortlist":
        """The same as lists of `count` queries, of which these, ascending, are the positions; the others are empty."""
        sizes = np.zeros(count, np.int64)
        sizes[queries] = np.diff(self.offsets)
        return Shortlist(np.concatenate([[0], np.cumsum(sizes)]), self.rows, self.scores)

    def _slice(self, q: int) -> slice:
        if not 0 <= q < len(self):
            raise IndexError(f"query {q} of {len(self)}")
        return slice(self.offsets[q], self.offsets[q + 1])


NOBODY = Shortlist(np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))  # of no queries


def merge(parts: Sequence[Shortlist], k: int) -> Shortlist:
    """The k best of several shards' shortlists for the same queries; equal scores by database row.

    The same answer however the database is sharded, if every part was asked for at least k.
    """
    count = len(parts[0])
    query = np.concatenate([np.repeat(np.arange(count), np.diff(part.offsets)) for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    order = np.lexsort((rows, -scores, query))
    query, rows, scores = query[order], rows[order], scores[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    kept = rank < k
    sizes = np.bincount(query[kept], minlength=count)
    return Shortlist(np.concatenate([[0], np.cumsum(sizes)]), rows[kept], scores[kept])


class GlobalIndex:
    """Top-K search over the global descriptors of one shard.

    globals   (n, G) float16 or float32
    rows      (n,) int64 database rows, no two equal
    scenes    (n,) int codes, or None: queries may then not be restricted to a scene
    factory   a FAISS ``index_factory`` string, trained on a fixed sample; None is the exact flat index
    """

    def __init__(self, globals, rows, scenes=None, factory: str | None = None):
        self._globals = globals
        self._rows = np.asarray(rows, np.int64)
        self._scenes = None if scenes is None else np.asarray(scenes)
        self._exact = factory is None
        self._largest = 0.0
        self._index = faiss.index_factory(globals.shape[1], factory or "Flat", faiss.METRIC_INNER_PRODUCT)
        if not self._index.is_trained:
            sample = np.random.default_rng(0).permutation(len(globals))[:TRAINING_ROWS]
            self._index.train(np.asarray(globals[np.sort(sample)], np.float32))
        for start in range(0, len(globals), CHUNK):
            chunk = np.ascontiguousarray(globals[start : start + CHUNK], np.float32)
            self._largest = max(self._largest, float(np.linalg.norm(chunk, axis=1).max()))
            self._index.add(chunk)

    def search(self, queries, k: int, exclude=None, scenes=None) -> Shortlist:
        """The k best rows of this shard for each of `queries` (Q, G).

        exclude (Q,): each query's own database row, which is left out; -1 for a query that is not in the database.
        scenes (Q,): each query sees only the rows with its code. ValueError if the index was built without scenes.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._globals.shape[1]:
            raise ValueError(f"query globals have shape {queries.shape}, expected (Q, {self._globals.shape[1]})")
        if scenes is not None and self._scenes is None:
            raise ValueError(
                "a search by scene needs an index with scenes: give ShardIndex the scene codes of its rows"
            )
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        own = np.full(len(queries), -1) if exclude is None else np.asarray(exclude)
        groups = np.zeros(len(queries)) if scenes is None else np.asarray(scenes)
        for code in np.unique(groups):
            members = np.flatnonzero(groups == code)
            allowed = None if scenes is None else self._scenes == code
            for q, result in zip(members, self._search_group(queries[members], k, own[members], allowed), strict=True):
                found[q] = result
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows, _ in found], dtype=np.int64)])
        return Shortlist(
            offsets.astype(np.int64),
            np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)]),
            np.concatenate([np.empty(0, np.float32), *(scores for _, scores in found)]),
        )

    def _search_group(self, queries, k, own, allowed):
        """Results (rows, scores) of queries that may see the same rows, where `allowed` (n,) is True (None: all)."""
        available = len(self._rows) if allowed is None else int(np.count_nonzero(allowed))
        results: list = [None] * len(queries)
        pending, width = np.arange(len(queries)), k + 1 + MARGIN
        while len(pending):
            width = min(width, available)
            similarities, places = self._faiss(queries[pending], width, allowed)
            undecided = []
            for q, similarity, place in zip(pending, similarities, places, strict=True):
                results[q], certain = self._settle(queries[q], similarity, place[place >= 0], own[q], k)
                if not certain and width < available and self._exact:
                    undecided.append(q)
            pending, width = np.array(undecided, np.int64), width * 4
        return results

    def _faiss(self, queries, width, allowed):
        if width == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if allowed is None:
            return self._index.search(queries, width)
        return self._index.search(queries, width, params=_restricted(self._index, allowed))

    def _settle(self, query, similarity, places, own, k):
        """Exact order of what FAISS found, and whether nothing it left out can belong to the k best.

        A row that was left out has a FAISS score of at most the last one's; rounding of a float32 product of length G
        moves a score by at most G * 2**-24 * |q| * |row| (Higham, Accuracy and Stability, section 3.1).
        """
        exact = _products(np.asarray(self._globals[places], np.float32), query)
        order = np.lexsort((self._rows[places], -exact))
        order = order[self._rows[places[order]] != own][:k]
        rows, scores = self._rows[places[order]], exact[order]
        slack = 2 * len(query) * 2.0**-24 * float(np.linalg.norm(query)) * self._largest
        certain = len(places) == 0 or (len(scores) == k and similarity[len(places) - 1] + slack < scores[-1])
        return (rows, scores), certain


def _restricted(index, allowed):
    """FAISS search parameters that let only the `allowed` (n,) be found, of the class that an index asks for."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_restricted(index.index, allowed))
    selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)


@njit(nogil=True, cache=True)
def _products(globals, query):
    out = np.empty(len(globals), np.float32)
    for i in range(len(globals)):
        total = 0.0
        for g in range(len(query)):
            total += np.float64(globals[i, g]) * np.float64(query[g])
        out[i] = total
    return out
