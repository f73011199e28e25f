"""Full search by FAISS: an index of all patches of a shard finds the hits, which are then counted as ever.

A `PatchIndex` answers as `ShardIndex.votes` does. FAISS only proposes pairs of patches, by a range search just below
the threshold; their similarities are computed again by the function that all votes use, in the same order. So "Flat"
gives the same bits as the exact kernel, and any other index a subset of its hits, each with the right similarity.

What another index finds depends on what it was trained with and on what else it holds, and so on the shards. Lists
(IVF) and graphs (HNSW) miss what lies outside the part that is searched. Codes that lose bits (SQ, PQ) misjudge
similarities, and PQ mostly underrates high ones: `margin` lets FAISS look further down. What moves the origin (PCA)
does not keep inner products at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import numpy as np
from numba import njit

from vop.quantised import widen
from vop.retrieval import kernel
from vop.retrieval.index import Wanted
from vop.retrieval.pair_votes import NO_VOTES, PairVotes, merge, threshold

IMAGES_AT_ONCE = 64  # converted to float32 at a time while the index is built
FEWEST, USUAL = 39, 64  # patches to train a centroid: fewer FAISS warns of; a sample has so many, and at least
SMALLEST_SAMPLE = 50_000
# FAISS is asked about so many patches of one image at a time. What it returns grows with them; and since they are never
# patches of different images, its choice of lists (which may round otherwise in other company) follows from the image.
PATCHES_AT_ONCE = 128
HITS_AT_ONCE = 2**22  # kept, 8 bytes each, until they are counted together


class PatchIndex:
    """A FAISS index of all patches of one shard.

    patches  (n, P, E) float16, float32 or int8, unit vectors as stored; kept as given, the hits are settled by them
    rows     (n,) int64 database rows over all shards, no two equal
    masks    (n, P) bool, True where a patch is image: others are left out of the index; None: all are in it
    factory  FAISS ``index_factory`` string, such as "Flat", "IVF1024,Flat", "IVF1024,SQ8" or "HNSW32".
             FAISS searches codes without lists ("SQ8") far slower than the same in one list ("IVF1,SQ8")
    probe    how far to search, in FAISS's words: "nprobe=16" for IVF, "efSearch=64" for HNSW; None: its own choice
    margin   how far below the threshold, in similarity, to look for patches that the index's codes underrate

    Built by one FAISS thread, the same index every time; several threads link the graph of an HNSW in any order.
    ValueError if FAISS knows no such index or parameter, if the index can search no range, or if the shard has too few
    patches to train it.
    """

    def __init__(self, patches, rows, masks=None, factory: str = "Flat", probe: str | None = None, margin: float = 0.0):
        rows = np.asarray(rows, np.int64)
        masks = np.ones(patches.shape[:2], bool) if masks is None else np.asarray(masks, bool)
        for name, length in (("patches", len(patches)), ("masks", len(masks))):
            if length != len(rows):
                raise ValueError(f"{length} {name} for {len(rows)} rows: a patch index describes the same images")
        if not len(rows) or len(np.unique(rows)) != len(rows):
            raise ValueError(f"{len(rows)} rows, {len(np.unique(rows))} of them different: each image appears once")
        if margin < 0:
            raise ValueError(f"margin is {margin}, but must be at least 0: above the threshold, hits would be lost")
        self._patches, self._masks, self._rows, self._margin = patches, masks, rows, margin
        self._order = np.argsort(rows)
        sizes = masks.sum(axis=1)
        self._image_of = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)  # of every patch of the index
        self._starts = np.cumsum(sizes) - sizes  # its number of the first patch of every image
        self._index = _untrained(patches.shape[2], factory)
        self._train(factory)
        self._longest = 0.0  # of the patches
        for _, chunk in self._chunks():
            self._longest = max(self._longest, float(np.linalg.norm(chunk, axis=1).max(initial=0)))
            self._index.add(chunk)
        _check_range_search(self._index, factory)
        if probe is not None:
            _set_probe(self._index, factory, probe)

    def __len__(self) -> int:
        return len(self._rows)

    def votes(
        self, patches: np.ndarray, masks: np.ndarray | None, wanted: Wanted, radius: float
    ) -> tuple[PairVotes, PairVotes]:
        """Votes of Q queries for those of the wanted rows that lie in this shard; see `ShardIndex.votes`.

        All of the shard is searched for each query that wants one of its rows; what was not wanted is left out then.
        With `mutual`, the votes of a row for the query come from the hits that the query found.
        """
        bound = threshold(radius)
        Q, P, E = patches.shape
        if self._patches.shape[2] != E:
            raise ValueError(
                f"query patches have width {E}, the database {self._patches.shape[2]}: were both made by the same "
                "encoder?"
            )
        masks = np.ones((Q, P), bool) if masks is None else masks
        x, *_, sizes = kernel.stack(patches, masks)
        asked, mutual = self._tables(Q, wanted)
        found, back, waiting = [NO_VOTES], [NO_VOTES], []
        # Asked about nothing or in nothing, some of FAISS's indexes end the process.
        queries = np.flatnonzero(asked.any(axis=1) & (sizes > 0) & (self._index.ntotal > 0))
        for q in queries:
            waiting += self._proposed(q, widen(patches[q][masks[q]]), asked, bound, P)
            if q == queries[-1] or sum(map(len, waiting)) > HITS_AT_ONCE:
                # FAISS names no pair twice; if it did, it would count twice.
                place, query, votes, votes_back = _count(
                    np.unique(np.concatenate(waiting)), x, kernel.as_bits(self._patches), self._masks, bound
                )
                rows, both = self._rows[place], np.flatnonzero(mutual[query, place])
                found.append(PairVotes(query, rows, *votes))
                back.append(PairVotes(rows, query, *votes_back).take(both))
                waiting = []
        return merge(found), merge(back)

    def _tables(self, queries: int, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
        """Which images of this shard a query wants, and which in both directions, (Q, n) bool each."""
        ordered = self._rows[self._order]
        rank = np.minimum(np.searchsorted(ordered, wanted.rows), len(self) - 1)
        here = ordered[rank] == wanted.rows
        pairs = wanted.queries[here], self._order[rank[here]]
        asked, mutual = np.zeros((2, queries, len(self)), bool)
        asked[pairs], mutual[pairs] = True, wanted.mutual[here]
        return asked, mutual

    def _proposed(self, q: int, x: np.ndarray, asked: np.ndarray, bound: np.float32, P: int) -> list[np.ndarray]:
        """Keys (see `_keys`) of what FAISS proposes to query q with patches x (p, E).

        FAISS's similarity and ours each miss the true one by at most E * 2**-24 * |x| * |y| (Higham, Accuracy and
        Stability, section 3.1); 64 more stand for what is rounded besides.
        """
        longest = self._longest * float(np.linalg.norm(x, axis=1).max(initial=0))
        lowest = float(bound) - self._margin - 2 * (x.shape[1] + 64) * 2.0**-24 * longest
        lowest = float(np.nextafter(np.float32(lowest), np.float32(-np.inf)))
        # Where FAISS pauses in the middle of a range search of a graph to look for interrupts, it ends the process.
        step, keys = 1 if isinstance(_inner(self._index), faiss.IndexHNSW) else PATCHES_AT_ONCE, []
        for first in range(0, len(x), step):
            with _blas():
                limits, _, numbers = self._index.range_search(x[first : first + step], lowest)
            shape = len(asked), P, self._patches.shape[1]
            keys.append(
                _keys(limits.astype(np.int64), numbers, q, first, self._image_of, self._starts, asked[q], shape)
            )
        return keys

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The patches of the index as float32 (m, E), some images at a time, and the number of the first."""
        for first in range(0, len(self), IMAGES_AT_ONCE):
            now = slice(first, first + IMAGES_AT_ONCE)
            yield self._starts[first], widen(self._patches[now][self._masks[now]])

    def _train(self, factory: str) -> None:
        """Train the index, if it needs that, on a sample of the patches that is the same every time."""
        if self._index.is_trained:
            return
        total, centroids = len(self._image_of), _centroids(self._index)
        if total < FEWEST * centroids:
            raise ValueError(
                f"{factory} has {centroids} centroids and takes at least {FEWEST * centroids} patches to train, but "
                f"this shard of {len(self)} images has {total}: use up to {total // FEWEST} lists, fewer shards, or "
                "Flat, which needs no training"
            )
        chosen = np.random.default_rng(0).choice(total, min(total, _sample(centroids)), replace=False, shuffle=False)
        chosen.sort()
        sample = []
        for first, chunk in self._chunks():
            sample.append(chunk[chosen[slice(*np.searchsorted(chosen, [first, first + len(chunk)]))] - first])
        self._index.train(np.concatenate(sample))


def _untrained(E: int, factory: str) -> faiss.Index:
    try:
        index = faiss.index_factory(E, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS can make no index {factory!r} for patches of width {E} ({_reason(error)}): see its list of "
            "index_factory strings, for example Flat, IVF1024,Flat, IVF1024,SQ8 or HNSW32"
        ) from error
    codec = _inner(index)
    if hasattr(codec, "do_polysemous_training"):
        codec.do_polysemous_training = False  # seconds for each byte of code, for a filter that nothing here uses
    return index


def _inner(index: faiss.Index) -> faiss.Index:
    """The index behind transforms of the vectors."""
    index = faiss.downcast_index(index)
    return _inner(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _centroids(index: faiss.Index) -> int:
    """The most centroids that have to be told apart in one training: lists, or values of a product quantiser."""
    index = _inner(index)
    quantiser = getattr(index, "pq", None)
    return max(getattr(index, "nlist", 1), 1 if quantiser is None else quantiser.ksub)


def _sample(centroids: int) -> int:
    """Patches to train with."""
    return max(SMALLEST_SAMPLE, USUAL * centroids)


def _check_range_search(index: faiss.Index, factory: str) -> None:
    try:
        if index.ntotal:
            index.range_search(np.zeros((1, index.d), np.float32), 1.0)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS's index {factory!r} can search no range ({_reason(error)}): use another kind, for example Flat, "
            "IVF1024,Flat, IVF1024,SQ8 or HNSW32"
        ) from error


@contextmanager
def _blas() -> Iterator[None]:
    """Let FAISS multiply by BLAS, which it does not for so few vectors: ten times as fast, here."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def _set_probe(index: faiss.Index, factory: str, probe: str) -> None:
    try:
        faiss.ParameterSpace().set_index_parameters(index, probe)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS's index {factory!r} takes no parameters {probe!r} ({_reason(error)}): write for example nprobe=16 "
            "for IVF, efSearch=64 for HNSW"
        ) from error


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1]


@njit(nogil=True, cache=True)
def _keys(limits, numbers, q, first, image_of, starts, asked, shape):
    """One number for each proposed pair of patches of a wanted image; they sort by image, query, patch, patch.

    limits (p + 1,), numbers: what a range search for patches first .. first + p - 1 of query q returned.
    """
    queries, P0, P1 = shape
    keys = np.empty(numbers.shape[0], np.int64)
    size = 0
    for p in range(limits.shape[0] - 1):
        for number in numbers[limits[p] : limits[p + 1]]:
            image = image_of[number]
            if asked[image]:
                keys[size] = ((image * queries + q) * P0 + first + p) * P1 + number - starts[image]
                size += 1
    return keys[:size].copy()


@njit(nogil=True, cache=True)
def _count(keys, x, patches, masks, threshold):
    """Votes from the proposed pairs of patches: keys in order, queries x (Q, P0, E'), and images as of `count_hits`.

    Returns image and query of each pair that has a hit; and (starts, patches, counts, sums) as of `PairVotes`, for the
    queries' patches and for the images'.
    """
    Q, P0, P1 = x.shape[0], x.shape[1], patches.shape[1]
    cell, total = P0 * P1, keys.shape[0]
    pairs = 0
    for i in range(total):
        pairs += i == 0 or keys[i] // cell != keys[i - 1] // cell
    places, queries = np.empty(pairs, np.int64), np.empty(pairs, np.int64)
    starts, other_starts = np.zeros(pairs + 1, np.int64), np.zeros(pairs + 1, np.int64)
    patch, count, value = np.empty(total, np.uint16), np.empty(total, np.uint16), np.empty(total, np.float32)
    other_patch, other_count = np.empty(total, np.uint16), np.empty(total, np.uint16)
    other_value = np.empty(total, np.float32)
    y = kernel.room(patches, P1, x.shape[2])
    p, s = np.empty(cell + 4, np.uint32), np.empty(cell + 4, np.uint32)
    out = np.empty(cell + 4, np.float32)
    sums, counts = np.empty(P0, np.float32), np.empty(P0, np.int32)
    other_sums, other_counts = np.empty(P1, np.float32), np.empty(P1, np.int32)
    read, pair, at, other_at, i = -1, 0, 0, 0, 0
    while i < total:
        base, found = keys[i] // cell, 0
        while i < total and keys[i] // cell == base:
            p[found], s[found] = keys[i] % cell // P1, keys[i] % P1
            found += 1
            i += 1
        place, query = base // Q, base % Q
        if place != read:
            kernel.gather(patches[place], masks[place], y)
            read = place
        sums[:], counts[:], other_sums[:], other_counts[:] = 0, 0, 0, 0
        kernel.settle(x[query], y, p, s, found, threshold, out, sums, counts, other_sums, other_counts)
        before = at
        for j in range(P0):
            if counts[j]:
                patch[at], count[at], value[at] = j, counts[j], sums[j]
                at += 1
        for j in range(P1):
            if other_counts[j]:
                other_patch[other_at], other_count[other_at], other_value[other_at] = j, other_counts[j], other_sums[j]
                other_at += 1
        if at > before:
            places[pair], queries[pair] = place, query
            pair += 1
            starts[pair], other_starts[pair] = at, other_at
    votes = starts[: pair + 1].copy(), patch[:at].copy(), count[:at].copy(), value[:at].copy()
    ends = other_starts[: pair + 1].copy()
    back = ends, other_patch[:other_at].copy(), other_count[:other_at].copy(), other_value[:other_at].copy()
    return places[:pair], queries[:pair], votes, back


def memory_bytes(rows: int, P: int, E: int, factory: str) -> int:
    """Bytes that the index of a shard takes at most: its codes, or the sample that trains them if that is more.

    What `index.memory_bytes` says of the shard itself comes on top. ValueError if FAISS knows no such index.
    """
    index = _untrained(E, factory)
    patches, centroids = rows * P, _centroids(index)
    sample = 0 if index.is_trained else min(patches, _sample(centroids))
    codes = patches * (2 * _code_bytes(index) + 4)  # FAISS's arrays grow by doubling; and the image of every patch
    return max(codes, 2 * 4 * E * sample) + 4 * E * (centroids + 2 * P * min(rows, IMAGES_AT_ONCE))


def _code_bytes(index: faiss.Index) -> int:
    """Bytes of one vector in an index."""
    index = _inner(index)
    if isinstance(index, faiss.IndexIVF):
        return index.code_size + 8
    if isinstance(index, faiss.IndexHNSW):
        links = index.hnsw.nb_neighbors(0) + 2  # the layers above have few vectors
        return _code_bytes(index.storage) + 4 * links + 16
    return index.sa_code_size()
