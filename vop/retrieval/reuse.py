"""Votes that need not be counted again: of a pair that was scored from its other side, and of an earlier search.

Both are exact: the votes of a pair of images have the same bits whenever, wherever and from whichever side they are
counted. What is known only decides which pairs the shards are asked for. Where that does not hold (`Search.exact`,
`Search.symmetric`) nothing is taken up, or every pair is scored from both sides.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import files
from vop.parts import Parts
from vop.retrieval.index import Wanted
from vop.retrieval.pair_votes import PairVotes, merge
from vop.retrieval.shortlist import Shortlist

# The votes of a batch of queries as they are kept. A search by shortlist keeps every candidate, with empty lists where
# no patch voted; a full search keeps the pairs with votes.
KEPT = pa.schema(
    [
        ("query", pa.int64()),  # image ids
        ("database", pa.int64()),
        ("shortlist_score", pa.float32()),  # null in a full search
        ("patches", pa.list_(pa.uint16())),  # the query's patches with hits, counted among those that take part
        ("counts", pa.list_(pa.uint16())),
        ("sums", pa.list_(pa.float32())),
    ]
)
KEPT_IN, RECORD = "votes", "search.json"  # directory of the parts, and what says which search they are of


def kept_table(
    query_ids: np.ndarray, database_ids: np.ndarray, shortlist: Shortlist | None, votes: PairVotes
) -> pa.Table:
    """The votes of a batch in `KEPT`. `votes` are merged; their queries are positions in query_ids (Q,)."""
    sizes, entries = np.diff(votes.starts), (votes.patches, votes.counts, votes.sums)
    queries, rows, scores = votes.queries, votes.rows, pa.nulls(len(votes), pa.float32())
    if shortlist is not None:
        queries, rows = np.repeat(np.arange(len(shortlist)), np.diff(shortlist.offsets)), shortlist.rows
        order = np.lexsort((rows, queries))  # as in the votes, of which some pairs have none
        queries, rows, scores = queries[order], rows[order], pa.array(shortlist.scores[order])
        listed, sizes = queries * len(database_ids) + rows, np.zeros(len(rows), np.int64)
        sizes[np.searchsorted(listed, votes.queries * len(database_ids) + votes.rows)] = np.diff(votes.starts)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in entries]
    return pa.table([query_ids[queries], database_ids[rows], scores, *lists], schema=KEPT)


def _pair_votes(kept: pa.Table, queries: np.ndarray, rows: np.ndarray) -> PairVotes:
    """The votes in a table of `KEPT`, for pairs numbered anew."""
    columns = [kept[name].combine_chunks() for name in ("patches", "counts", "sums")]
    starts = np.concatenate([[0], np.cumsum(pc.list_value_length(columns[0]).to_numpy())]).astype(np.int64)
    found = PairVotes(queries, rows, starts, *(column.flatten().to_numpy() for column in columns))
    return found.take(np.flatnonzero(np.diff(starts)))


class Earlier:
    """A finished search of some of the images, under the same settings, whose votes were kept."""

    def __init__(self, parts: Parts, about: Mapping):
        self.parts, self.query_batch = parts, about["query_batch"]
        self.database = np.sort(np.array(about["database"], np.int64))
        self._position = {image_id: i for i, image_id in enumerate(about["queries"])}
        self._read: dict[int, pa.Table] = {}

    @classmethod
    def find(cls, output: str, settings: str, shards: Mapping[int, str]) -> "Earlier | None":
        """The votes kept in a run directory by a search with these settings; None without any, or of other data.

        `shards` are the hashes of the store's shards, which must be those that the search read. Of several the one
        with the most queries.
        """
        found = []
        for parts in Parts.all_of(output, KEPT_IN):
            record = files.join(parts.path, RECORD)
            about = files.read_json(record) if files.exists(record) else {"settings": None}
            unchanged = all(shards.get(int(number)) == sha for number, sha in about.get("shards", {}).items())
            if about["settings"] == settings and unchanged and not parts.missing(about["batches"]):
                found.append((parts, about))
        return cls(*max(found, key=lambda one: len(one[1]["queries"]))) if found else None

    def of(self, query_ids: np.ndarray) -> pa.Table:
        """What was kept of these queries, in `KEPT`."""
        numbers = {self._position[i] // self.query_batch for i in query_ids.tolist() if i in self._position}
        # Neighbouring batches share parts, since both go by name.
        self._read = {number: self._read.get(number) or self.parts.read_one(number) for number in sorted(numbers)}
        wanted = pa.array(query_ids)
        parts = (part.filter(pc.is_in(part["query"], wanted)) for part in self._read.values())
        return pa.concat_tables([KEPT.empty_table(), *parts])

    def searched(self, query_ids: np.ndarray) -> np.ndarray:
        """(Q,) bool: which of these were queries."""
        return np.array([image_id in self._position for image_id in query_ids.tolist()], bool)


@dataclass(frozen=True)
class _Recalled:
    """What is known of a batch from an earlier search, renumbered: positions in the batch, rows of the database."""

    settled: np.ndarray  # (Q,) bool: the shortlist among the rows that the earlier search had is known
    shortlist: Shortlist
    pairs: np.ndarray  # keys of the pairs whose votes are known, besides the settled ones of a full search
    votes: PairVotes


class Reuse:
    """Decides, batch by batch, which pairs the shards are asked for, and completes what they answer.

    query_ids (Q,), database_ids (N,)  image ids; own (Q,) each query's own database row or -1
    numbers      batches that will be asked for, in this order; `query_batch` queries each
    earlier      votes kept by an earlier search, or None; full: a search without shortlists
    budget       bytes of votes held for later batches; beyond it their pairs are scored from both sides. None: all are
    """

    def __init__(self, query_ids, database_ids, own, query_batch, numbers, earlier, full, budget):
        self.query_ids, self.database_ids, self.own = query_ids, database_ids, own
        self.query_batch, self.earlier, self.full, self.budget = query_batch, earlier, full, budget
        self.held, self.counted, self.reused = 0, 0, 0
        self._by_id = np.argsort(database_ids)
        turn = np.full(-(-len(query_ids) // query_batch) + 1, -1)
        turn[list(numbers)] = np.arange(len(numbers))
        self._position = np.full(len(database_ids), -1)  # of each database row among the queries
        self._position[own[own >= 0]] = np.flatnonzero(own >= 0)
        self._turn = np.where(self._position >= 0, turn[self._position // query_batch], -1)
        self._number_turn = turn
        self._recalled: dict[int, _Recalled] = {}
        self._promised: dict[int, list[np.ndarray]] = defaultdict(list)  # by turn
        self._found: dict[int, list[PairVotes]] = defaultdict(list)

    def _queries(self, number: int) -> slice:
        return slice(number * self.query_batch, (number + 1) * self.query_batch)

    @cached_property
    def fresh(self) -> np.ndarray | None:
        """(N,) bool: the database rows that the earlier search had not; None without one."""
        return None if self.earlier is None else ~np.isin(self.database_ids, self.earlier.database)

    def recall(self, number: int) -> np.ndarray | None:
        """(Q,) bool: the queries of a batch whose shortlist needs a search among the fresh rows only."""
        if self.earlier is None:
            return None
        ids = self.query_ids[self._queries(number)]
        kept = self.earlier.of(ids)
        queries = _places(ids, np.argsort(ids), kept["query"].to_numpy())
        rows = _places(self.database_ids, self._by_id, kept["database"].to_numpy())
        settled = self.earlier.searched(ids)
        if not self.full:
            settled[queries[rows < 0]] = False  # a candidate is gone: another one may take its place
        alive = np.flatnonzero(rows >= 0)
        kept, queries, rows = kept.take(alive), queries[alive], rows[alive]
        votes = merge([_pair_votes(kept, queries, rows)])
        shortlist = None
        if not self.full:
            scores, listed = kept["shortlist_score"].to_numpy(), settled[queries]
            order = np.lexsort((rows[listed], -scores[listed], queries[listed]))
            sizes = np.bincount(queries[listed], minlength=len(ids))
            offsets = np.concatenate([[0], np.cumsum(sizes)])
            shortlist = Shortlist(offsets, rows[listed][order], scores[listed][order])
        self._recalled[number] = _Recalled(settled, shortlist, self._keys(queries, rows), votes)
        return settled

    def shortlist(self, number: int) -> list[Shortlist]:
        """What is known of the shortlists of a batch, to be merged with what the shards find."""
        return [] if self.earlier is None else [self._recalled[number].shortlist]

    def _keys(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return queries * len(self.database_ids) + rows

    def want(self, number: int, queries: np.ndarray, rows: np.ndarray) -> Wanted:
        """Which of the pairs (positions in the batch, database rows) of a batch the shards must score."""
        turn, own = self._number_turn[number], self.own[self._queries(number)]
        known = np.zeros(len(rows), bool)
        if self.earlier is not None:
            recalled = self._recalled[number]
            known |= np.isin(self._keys(queries, rows), recalled.pairs)
            if self.full:
                known |= recalled.settled[queries] & ~self.fresh[rows]
        promised = np.concatenate([np.empty(0, np.int64), *self._promised.pop(turn, [])])
        self.held -= promised.nbytes
        known |= np.isin(self._keys(own[queries], rows), promised)
        asked = np.flatnonzero(~known)
        queries, rows = queries[asked], rows[asked]
        mine = own[queries]
        turns = np.where((mine >= 0) & (self.budget is not None), self._turn[rows], -1)
        # Inside the batch a pair listed by both sides is asked for once, by the smaller row.
        both = (turns == turn) & np.isin(self._keys(rows, mine), self._keys(mine, rows))
        later = (turns > turn) & (self.held < (self.budget or 0))
        for target in np.unique(turns[later]):
            chosen = later & (turns == target)
            self._promised[target].append(self._keys(rows[chosen], mine[chosen]))
            self.held += 8 * int(chosen.sum())
        kept = ~both | (mine < rows)
        self.counted += int(kept.sum())
        self.reused += len(known) - int(kept.sum())
        return Wanted(queries[kept], rows[kept], (both | later)[kept])

    def add(self, number: int, mutual: Sequence[PairVotes]) -> None:
        """Take up the votes of rows for the queries of a batch, as the shards return them."""
        own = self.own[self._queries(number)]
        for part in mutual:
            turned = PairVotes(self._position[part.queries], own[part.rows], part.starts, *part.entries)
            turns = self._turn[part.queries]
            for turn in np.unique(turns):
                chosen = turned.take(np.flatnonzero(turns == turn))
                self._found[turn].append(chosen)
                self.held += chosen.nbytes

    def complete(self, number: int, queries: np.ndarray, rows: np.ndarray) -> list[PairVotes]:
        """The known votes of the pairs of a batch: all that `want` left out."""
        turn, start = self._number_turn[number], number * self.query_batch
        listed, known = self._keys(queries, rows), []
        if self.earlier is not None:
            recalled = self._recalled.pop(number)
            known.append(_among(recalled.votes, self._keys(recalled.votes.queries, recalled.votes.rows), listed))
            listed = listed[~np.isin(listed, recalled.pairs)]
        for part in self._found.pop(turn, []):
            self.held -= part.nbytes
            part = PairVotes(part.queries - start, part.rows, part.starts, *part.entries)
            known.append(_among(part, self._keys(part.queries, part.rows), listed))
        return known


def _places(ids: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where in `ids` (whose argsort is `order`) each wanted one stands, -1 where it is not there."""
    places = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return np.where(ids[places] == wanted, places, -1)


def _among(votes: PairVotes, keys: np.ndarray, listed: np.ndarray) -> PairVotes:
    return votes.take(np.flatnonzero(np.isin(keys, listed)))
