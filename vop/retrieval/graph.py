"""From scored pairs to a pair list: a graph with images (rows 0 .. N - 1, by name) as nodes and pairs as edges.

All functions are pure, exact and the same for any order of their input: equal scores are settled by row, and where a
library breaks ties by itself it is given ranks, which have none.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial import KDTree

from vop.pairs import SOURCES

FOREST, SEQUENCE, NEIGHBOURS, BEST = range(len(SOURCES))


@dataclass(frozen=True, eq=False)
class Pairs:
    """M unordered pairs, each once, sorted by (low, high).

    low, high (M,) int32: the rows of the two images, low < high. score (M,) float32: the larger of the scores that the
    two images give each other (each weighs its own patches, so these differ); NaN if neither scored the other.
    mutual (M,) bool: each image ranks the other.
    """

    low: np.ndarray
    high: np.ndarray
    score: np.ndarray
    mutual: np.ndarray

    def __len__(self) -> int:
        return len(self.low)

    def take(self, chosen: np.ndarray) -> "Pairs":
        """The pairs at these ascending positions, or where a mask is true."""
        return Pairs(self.low[chosen], self.high[chosen], self.score[chosen], self.mutual[chosen])


@dataclass(frozen=True, eq=False)
class PairList:
    """The chosen pairs; source (M,) uint8 says why, a position in `vop.pairs.SOURCES`.

    `forest` is the number of pairs that connect all that can be connected, 0 if that was not asked for; a smaller
    budget leaves some of it apart.
    """

    pairs: Pairs
    source: np.ndarray
    forest: int

    def counts(self) -> dict[str, int]:
        """Pairs by source."""
        return dict(zip(SOURCES, np.bincount(self.source, minlength=len(SOURCES)).tolist(), strict=True))


def undirected(query: np.ndarray, database: np.ndarray, weighted: np.ndarray) -> Pairs:
    """Merge ranked pairs, rows (R,) int32 and scores (R,) float32, into unordered ones.

    A direction that is not listed has no say: it cannot lower the score of a pair that the other image ranks.
    """
    keys = _keys(np.minimum(query, database), np.maximum(query, database))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    if not len(starts):
        return Pairs(*_rows(keys), np.empty(0, np.float32), np.empty(0, bool))
    score = np.maximum.reduceat(weighted[order], starts)
    direction = np.where(query < database, np.uint8(1), np.uint8(2))[order]
    return Pairs(*_rows(keys[starts]), score, np.bitwise_or.reduceat(direction, starts) == 3)


def sequence(names: Sequence[str], window: int) -> np.ndarray:
    """Pairs (M, 2) int32 of each image with the next `window` images of its folder.

    The folder is all of the name but its last part. Numbers in names are compared as numbers: frame2 before frame10.
    """
    places = [(posixpath.dirname(name), _natural(name), name) for name in names]
    order = np.array(sorted(range(len(names)), key=places.__getitem__), np.int32)
    codes: dict[str, int] = {}
    folder = np.array([codes.setdefault(places[row][0], len(codes)) for row in order], np.int32)
    found = [np.empty((0, 2), np.int32)]
    for step in range(1, min(window, len(names) - 1) + 1):
        same = folder[:-step] == folder[step:]
        found.append(np.stack([order[:-step][same], order[step:][same]], axis=1))
    return np.sort(np.concatenate(found), axis=1)


def neighbours(
    positions: np.ndarray, count: int, limit_m: float | None = None, groups: np.ndarray | None = None
) -> np.ndarray:
    """Pairs (M, 2) int32 of each image with its `count` nearest, each pair once, sorted.

    Images at the very same distance as the last of them are left out by the k-d tree's order, which is fixed.

    Args:
        positions: (N, 3) metres; NaN where unknown: such an image has no neighbours.
        count: neighbours per image.
        limit_m: largest distance, metres; None: any.
        groups: (N,) integers; only images of the same group are neighbours. None: all are of one group.
    """
    known = np.flatnonzero(np.isfinite(positions).all(axis=1))
    groups = np.zeros(len(positions), np.int64) if groups is None else groups
    by_group = known[np.argsort(groups[known], kind="stable")]
    found = [np.empty(0, np.int64)]
    for rows in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
        near = _nearest(positions[rows], count, np.inf if limit_m is None else limit_m)
        one, other = rows[near].T
        found.append(_keys(np.minimum(one, other), np.maximum(one, other)))
    return np.stack(_rows(np.unique(np.concatenate(found))), axis=1)


def choose(
    scored: Pairs,
    images: int,
    budget: int | None = None,
    mutual: bool = False,
    connect: bool = True,
    sequence: np.ndarray | None = None,
    neighbours: np.ndarray | None = None,
) -> PairList:
    """Choose the pair list: scored pairs and those in sequence or nearby, at most `budget` of them.

    A budget is spent on the maximum spanning forest of all these pairs first, then on sequence, on neighbours, and on
    what remains; inside each the best scores come first, pairs without a score after them, ties by row. So whatever
    can be connected is, if the budget is not smaller than the forest; if it is, the best of the forest are chosen.

    Args:
        scored: pairs with their scores.
        images: N, the number of images.
        budget: largest number of pairs; None: all.
        mutual: of the scored pairs take only the mutual ones; sequence and neighbours are taken as they are.
        connect: False: no forest comes first.
        sequence: (S, 2) pairs, low row first; None: none.
        neighbours: (G, 2) pairs, low row first; None: none.
    """
    if mutual:
        scored = scored.take(scored.mutual)
    pairs, source = _united(scored, sequence, neighbours)
    order = np.argsort(-pairs.score, kind="stable")  # NaN last
    forest = spanning_forest(pairs, order, images) if connect else order[:0]
    source[forest] = FOREST
    if budget is not None and budget < len(pairs):
        kept = np.sort(order[np.argsort(source[order], kind="stable")][:budget])
        pairs, source = pairs.take(kept), source[kept]
    return PairList(pairs, source, len(forest))


def spanning_forest(pairs: Pairs, order: np.ndarray, images: int) -> np.ndarray:
    """Positions, ascending, of the pairs of the maximum spanning forest; `order` (M,) lists the pairs best first.

    Ranks are distinct, so there is one such forest, and for any other choice of it the sum of scores is not larger.
    """
    rank = np.empty(len(pairs), np.float64)  # exact to 2**53, and from 1: a zero would be no edge to scipy
    rank[order] = np.arange(1, len(pairs) + 1)
    return np.sort(order[minimum_spanning_tree(_graph(pairs, rank, images)).data.astype(np.int64) - 1])


def components(parts: Iterable[tuple[np.ndarray, np.ndarray]], images: int) -> tuple[np.ndarray, np.ndarray]:
    """Connected components: the number (N,) int32 of each image's, and their sizes (C,) int64.

    `parts` are pairs of rows, one array for either side, in as many parts as memory asks for. Numbered from 0 by
    decreasing size, equal sizes by their first row. An image without pairs is one by itself.
    """
    labels = np.arange(images, dtype=np.int32)
    for low, high in parts:
        edges = csr_array((np.ones(len(low), np.int32), (labels[low], labels[high])), shape=(images, images))
        labels = connected_components(edges, directed=False)[1][labels]
    found, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    number = np.empty(len(found), np.int32)
    number[order] = np.arange(len(found), dtype=np.int32)
    return number[labels], sizes[order]


def _united(scored: Pairs, sequence: np.ndarray | None, neighbours: np.ndarray | None) -> tuple[Pairs, np.ndarray]:
    """Scored pairs and the others, each once, and their source; a pair of both other kinds counts as sequence."""
    source = np.full(len(scored), BEST, np.uint8)
    added = {kind: rows for kind, rows in ((SEQUENCE, sequence), (NEIGHBOURS, neighbours)) if rows is not None}
    if not added:
        return scored, source
    kinds = np.repeat(np.array(list(added), np.uint8), [len(rows) for rows in added.values()])
    new, first = np.unique(_keys(*np.concatenate(list(added.values())).T), return_index=True)
    kinds, keys = kinds[first], _keys(scored.low, scored.high)
    at = np.searchsorted(keys, new)
    known = np.zeros(len(new), bool)
    known[at < len(keys)] = keys[at[at < len(keys)]] == new[at < len(keys)]
    source[at[known]] = kinds[known]
    at, new, kinds = at[~known], new[~known], kinds[~known]
    pairs = Pairs(
        *_rows(np.insert(keys, at, new)), np.insert(scored.score, at, np.nan), np.insert(scored.mutual, at, False)
    )
    return pairs, np.insert(source, at, kinds)


def _keys(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """One int64 per pair, sorted as (low, high)."""
    return low.astype(np.int64) << 32 | high


def _rows(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high rows, int32, of keys."""
    return (keys >> 32).astype(np.int32), (keys & 0xFFFFFFFF).astype(np.int32)


def _graph(pairs: Pairs, values: np.ndarray, images: int) -> csr_array:
    """The pairs as the upper half of a sparse matrix (N, N); they are sorted as its rows are."""
    starts = np.searchsorted(pairs.low, np.arange(images + 1, dtype=np.int32)).astype(np.int32)
    return csr_array((values, pairs.high, starts), shape=(images, images))


def _natural(name: str) -> tuple[int | str, ...]:
    """Sort key of the last part of a name in which numbers count as numbers; text and number take turns."""
    pieces = re.split(r"(\d+)", posixpath.basename(name))
    return tuple(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _nearest(points: np.ndarray, count: int, limit: float) -> np.ndarray:
    """(point, one of its `count` nearest others no further than limit), positions, (M, 2) int64."""
    if not len(points):
        return np.empty((0, 2), np.int64)
    asked = min(count + 1, len(points))  # each finds itself too
    bound = np.nextafter(limit, np.inf)  # the tree's bound is exclusive
    _, near = KDTree(points).query(points, k=np.arange(1, asked + 1), distance_upper_bound=bound)
    own = np.arange(len(points))[:, None]
    taken = (near != own) & (near < len(points))
    crowded = (near != own).all(axis=1)  # more than `count` others at the very same place
    taken[crowded, -1] = False
    one, column = np.nonzero(taken)
    return np.stack([one, near[one, column]], axis=1)
