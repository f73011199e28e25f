"""Rates of a search: shortlist, votes, and the driver's work for a query, a candidate and a ranked pair."""

import dataclasses
import time

import faiss
import numpy as np
import pyarrow as pa

from vop import files, pairs
from vop.config import Config
from vop.parts import Parts
from vop.planning.timing import ROUNDS, in_turns, line
from vop.retrieval import graph, pair_votes, shortlist
from vop.retrieval.search import Search, choose_radius
from vop.retrieval.shortlist import GlobalIndex
from vop.store import Selection

ROWS = 2_000, 32_000  # of the shortlists that are compared
LISTED = 20_000  # pairs that are listed


def shortlist_rates(width: int, config: Config) -> dict[str, float]:
    """Seconds for a query and a row, and for a query at a shard, of the exact index over descriptors at random."""
    faiss.omp_set_num_threads(1)  # as in a search actor
    rng, queries = np.random.default_rng(0), config.retrieval.query_batch
    globals_ = rng.standard_normal((ROWS[1], width), dtype=np.float32)
    asked, k = globals_[:queries].copy(), config.retrieval.shortlist or 1
    indices = {rows: GlobalIndex(globals_[:rows], np.arange(rows)) for rows in ROWS}
    took = in_turns({rows: lambda i=index: i.search(asked, k) for rows, index in indices.items()})
    once, row = line(*((rows, took[rows] / queries) for rows in ROWS))
    return {"shortlist_row_s": row, "shortlist_query_s": once}


def measured(config: Config, selection: Selection, folder: str) -> dict[str, float]:
    """What votes, the driver and the lists take: the loop of a search, with one shard and without Ray."""
    few, many = max(1, len(selection) // 6), len(selection) - 1
    radius = choose_radius(selection, config.retrieval)
    searches = {k: _Loop(config, selection, radius, k, files.join(folder, f"search-{k}")) for k in (few, many)}
    for loop in searches.values():
        loop.run()  # what is compiled is loaded now
        loop.laps = {name: [] for name in loop.laps}
    for _ in range(ROUNDS):
        for loop in searches.values():
            loop.run()
    a, b = searches[few], searches[many]
    queries = len(selection)
    votes_query, pair = line(*((loop.scored / queries, loop.median("votes") / queries) for loop in (a, b)))
    driver_query, driver_pair = line(*((loop.listed / queries, loop.median("driver") / queries) for loop in (a, b)))
    chance = few / many
    return {
        "pair_s": pair,
        "votes_query_s": votes_query,
        "driver_query_s": driver_query,
        "driver_pair_s": driver_pair,
        "mutual": min(1.0, max(0.0, (a.mutual() - chance) / (1 - chance))) if chance < 1 else 1.0,
        "vote_bytes": b.vote_bytes,
        "kept_bytes": b.kept_bytes,
        "ranked_bytes": b.ranked_bytes,
        "listed_s": _listing(b.ranked, files.join(folder, "lists")),
    }


class _Loop:
    """The search of `vop.stages.search` over the sample, one actor, in this process: what takes how long."""

    def __init__(self, config: Config, selection: Selection, radius: float, k: int, folder: str):
        plain = {"index": "Flat", "patch_index": None, "patch_probe": None, "cache": None, "device": "cpu"}
        retrieval = dataclasses.replace(config.retrieval, shortlist=k, within_scene=False, **plain)
        self.search, self.folder = Search(selection, selection, retrieval, radius), folder
        self.index = self.search.index(np.arange(len(selection)), None)
        self.laps: dict[str, list[float]] = {"votes": [], "driver": []}

    def median(self, name: str) -> float:
        return float(np.median(self.laps[name]))

    def run(self) -> None:
        """Search once; adds a lap."""
        numbers, retrieval = list(range(self.search.n_batches)), self.search.retrieval
        reuse = self.search.reuse(self.folder, numbers)
        parts, kept = Parts(self.folder, "of-the-plan"), Parts(self.folder, "of-the-plan", "votes")
        took, tables, listed, memory = dict.fromkeys(("driver", "shortlist", "votes"), 0.0), [], [], 0
        last = time.process_time()

        def lap(name: str) -> None:
            nonlocal last
            now = time.process_time()
            took[name] += now - last
            last = now

        for batch in self.search.batches(numbers, reuse):
            lap("driver")
            found = self.index.shortlist(batch.globals, retrieval.shortlist, batch.exclude, batch.scenes, batch.settled)
            lap("shortlist")
            found = shortlist.merge([found], retrieval.shortlist)
            candidates = self.search.candidates(batch, found)
            wanted = reuse.want(batch.number, *candidates)
            lap("driver")
            votes, back = self.index.votes(batch.patches, batch.masks, wanted, self.search.radius)
            lap("votes")
            reuse.add(batch.number, [back])
            votes = pair_votes.merge([votes, *reuse.complete(batch.number, *candidates)])
            tables.append(self.search.rank(batch, found, candidates[0], votes))
            kept.write(batch.number, self.search.kept(batch, found, votes))
            parts.write(batch.number, tables[-1])
            lap("driver")
            listed.append(np.stack([candidates[0] + batch.number * retrieval.query_batch, candidates[1]]))
            memory += votes.nbytes
        for name in self.laps:
            self.laps[name].append(took[name])
        self.pairs, self.ranked = np.concatenate(listed, axis=1), pa.concat_tables(tables)
        self.scored, self.listed = max(1, reuse.counted), max(1, self.pairs.shape[1])
        on_disk = [sum(files.listing(written.path).values()) for written in (parts, kept)]
        self.ranked_bytes = on_disk[0] / max(1, len(self.ranked))
        self.vote_bytes, self.kept_bytes = memory / self.listed, on_disk[1] / self.listed

    def mutual(self) -> float:
        """Share of the listed pairs that are listed from their other side too."""
        query, row = self.pairs
        count = len(self.search.queries)
        return float(np.isin(row * count + query, query * count + row).mean())


def _listing(ranked: pa.Table, folder: str) -> float:
    """Seconds for a pair in pairs.parquet, pairs.txt and the graph."""
    if not len(ranked):
        return 0.0
    table = pa.concat_tables([ranked] * -(-LISTED // len(ranked)))
    names = sorted({*ranked["query"].to_pylist(), *ranked["database"].to_pylist()})

    def work() -> None:
        pairs.write(folder, "a", lambda: [table])
        pairs.finish(folder, [])
        edges = ((query, row) for query, row, _ in pairs.iterate_rows(files.join(folder, "pairs.parquet"), names))
        graph.components(edges, len(names))

    return in_turns({"list": work})["list"] / len(table)
