"""Ranked pairs of many queries as arrays, so that millions are judged without a loop over them."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def queries_of(ranked: pa.Table) -> pa.Table:
    """The queries that have ranked pairs, everything known of all: query, scene, known, truth."""
    first = ranked.group_by("query", use_threads=False).aggregate([("scene", "first")])
    everything = pa.array(np.ones(len(first), bool))
    return pa.table({"query": first["query"], "scene": first["scene_first"], "known": everything, "truth": everything})


@dataclass(frozen=True, eq=False)
class Listed:
    """The ranked pairs of Q queries by scene, query and rank, as arrays; R pairs, U of them different.

    names: every image. keys: (U,) int64 sorted, one number per unordered pair. rows: (R,) where the pair stands in the
    table it came from. pair: (R,) positions in `keys`. place: (R,) from 0 within the query. bounds: (Q + 1,) pairs of
    each query. truth: (Q,) bool, whether the true pose of the query is known. scenes, scene_bounds: (S + 1,) queries of
    each scene. left_out: (S, 2) queries without a known camera, and their pairs; they are among none of the above.
    """

    names: pa.Array
    keys: np.ndarray
    rows: np.ndarray
    pair: np.ndarray
    place: np.ndarray
    bounds: np.ndarray
    truth: np.ndarray
    scenes: list[str]
    scene_bounds: np.ndarray
    left_out: np.ndarray

    @classmethod
    def of(cls, ranked: pa.Table, queries: pa.Table) -> "Listed":
        """Arrange pairs; tables as in `vop.pose.protocols.evaluate`."""
        queries = queries.sort_by([("scene", "ascending"), ("query", "ascending")])
        columns = ranked["query"], ranked["database"], queries["query"]
        names = pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))
        known, scene = queries["known"].to_numpy(), queries["scene"].to_numpy()
        truth = queries["truth"].to_numpy() if "truth" in queries.column_names else np.ones(len(queries), bool)
        position = np.full(len(names), -1)
        position[codes(queries["query"], names)] = np.arange(len(queries))
        query = position[codes(ranked["query"], names)]
        if (query < 0).any():
            name = ranked["query"][int(np.argmax(query < 0))].as_py()
            raise ValueError(f"pairs are ranked for {name!r}, which is not among the {len(queries)} queries")
        scenes, scene_of = np.unique(scene, return_inverse=True)
        rows_per_query = np.bincount(query, minlength=len(queries))
        left_out = [np.bincount(scene_of[~known], weights, len(scenes)) for weights in (None, rows_per_query[~known])]
        rows = np.flatnonzero(known[query])
        query = (np.cumsum(known) - 1)[query[rows]]
        order = np.lexsort([ranked["rank"].to_numpy()[rows], query])
        rows, query = rows[order], query[order]
        keys, pair = np.unique(pair_keys(ranked["query"], ranked["database"], names)[rows], return_inverse=True)
        bounds = np.searchsorted(query, np.arange(known.sum() + 1))
        return cls(
            names=names,
            keys=keys,
            rows=rows,
            pair=pair,
            place=np.arange(len(rows)) - bounds[query],
            bounds=bounds,
            truth=truth[known],
            scenes=list(scenes),
            scene_bounds=np.searchsorted(scene_of[known], np.arange(len(scenes) + 1)),
            left_out=np.stack(left_out, axis=1).astype(int),
        )

    def positions(self, first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
        """Positions in `keys` of pairs of names, whichever comes first, (n,) int64; -1: not listed."""
        asked = pair_keys(first, second, self.names)
        found = np.minimum(np.searchsorted(self.keys, asked), max(len(self.keys) - 1, 0))
        listed = self.keys[found] == asked if len(self.keys) else np.zeros(len(asked), bool)
        return np.where(listed, found, -1)


def codes(column: pa.ChunkedArray, names: pa.Array) -> np.ndarray:
    """Positions of strings in `names`, (n,) int64, -1 for others."""
    return pc.fill_null(pc.index_in(column, names), -1).to_numpy().astype(np.int64)


def pair_keys(first: pa.ChunkedArray, second: pa.ChunkedArray, names: pa.Array) -> np.ndarray:
    """One number per unordered pair of names, (n,) int64; negative where a name is not among them."""
    first, second = codes(first, names), codes(second, names)
    low, high = np.minimum(first, second), np.maximum(first, second)
    return np.where(low < 0, -1, low * len(names) + high)
