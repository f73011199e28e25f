"""The search actors: one shard of the database each; answers merge on the driver, a bounded window in flight."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import ray

from vop.retrieval import pair_votes, shortlist
from vop.retrieval.index import ShardIndex, Wanted
from vop.retrieval.reuse import Reuse
from vop.retrieval.search import QueryBatch, Search, shard_count
from vop.retrieval.shortlist import Shortlist
from vop.schema import RetrievalConfig
from vop.stages import cluster, watch

IN_FLIGHT = 2  # batches submitted ahead of the one being merged, for each of the two questions
# How often Ray restarts a shard and asks it again: without bound, since every try to reach a node that is gone counts
# until Ray has noticed, which takes 15 to 30 s. What ends it is retrieval.timeout_s.
RESTARTS, TASK_RETRIES = -1, -1
Item = TypeVar("Item")


class SearchError(RuntimeError):
    """A search that cannot be started, or a shard that does not answer."""


class NoRoomError(SearchError):
    """A search that the cluster has no room for, however often it is tried."""


@dataclass(frozen=True)
class Timed:
    """An answer and the seconds that it took the shard."""

    answer: object
    seconds: float


def timed(method: Callable, *arguments) -> Timed:
    """Call a method and time it."""
    start = time.perf_counter()
    answer = method(*arguments)
    return Timed(answer, time.perf_counter() - start)


@dataclass(frozen=True)
class Answered:
    """What became of a batch of queries: its pairs (`search.RANKED`) and the votes behind them (`reuse.KEPT`)."""

    number: int
    ranked: pa.Table
    kept: pa.Table


class SearchShard:
    """One shard as an actor runs it; its constructor is all it needs to come back after a crash.

    It is given references to the `Search` and to its rows with their `fresh`. Plain arguments Ray would forget once the
    actor has started, and could not start it again; what these refer to the driver holds.
    """

    def __init__(self, given: list[ray.ObjectRef]):
        search, (rows, fresh) = ray.get(given)
        self.index: ShardIndex = search.index(rows, fresh)
        self.retrieval, self.radius = search.retrieval, search.radius

    def size(self) -> Timed:
        """Images of the shard; answers once they are loaded."""
        return timed(len, self.index)

    def shortlist(self, batch: QueryBatch) -> Timed:
        """The shard's best images by global descriptor, a `Shortlist`."""
        return timed(
            self.index.shortlist, batch.globals, self.retrieval.shortlist, batch.exclude, batch.scenes, batch.settled
        )

    def votes(self, batch: QueryBatch, wanted: Wanted) -> Timed:
        """Votes of those of the wanted pairs whose database row lies in this shard, as of `ShardIndex.votes`."""
        return timed(self.index.votes, batch.patches, batch.masks, wanted, self.radius)


@dataclass(frozen=True)
class Asked:
    """Answers on their way, one per shard in their order, and what was asked with.

    An answer that is lost with its node is computed again from `given`, which Ray forgets unless it is held here.
    """

    answers: list[ray.ObjectRef]
    given: tuple[ray.ObjectRef, ...]


class Shards:
    """The running actors of a search.

    busy (shards,) float64: seconds that each has worked on answers; run: the id that its metrics bear
    """

    def __init__(self, search: Search, reuse: Reuse, actors: Sequence[ray.actor.ActorHandle], run: str):
        self.search, self.reuse, self.actors, self.run = search, reuse, actors, run
        self.busy = np.zeros(len(actors))
        self.took: list[float] = []  # seconds from one batch to the next

    def rank(self, numbers: Sequence[int]) -> Iterator[Answered]:
        """Answer these batches of queries in order: shortlist, votes, merge, rank."""
        given: set[int] = set()

        def put() -> Iterator[tuple[QueryBatch, ray.ObjectRef]]:
            for batch in self.search.batches(numbers, self.reuse):
                given.add(batch.number)
                yield batch, ray.put(batch)

        asked = _ahead((batch, ref, self._ask_shortlist(ref)) for batch, ref in put())
        lists = ((batch, ref, self._merge_shortlist(batch, answers)) for batch, ref, answers in asked)
        voted = _ahead((batch, listed, *self._ask_votes(batch, ref, listed)) for batch, ref, listed in lists)
        last = time.perf_counter()
        for batch, listed, pairs, answers in voted:
            found, back = zip(*self._wait(answers), strict=True)
            self.reuse.add(batch.number, back)
            votes = pair_votes.merge([*found, *self.reuse.complete(batch.number, *pairs)])
            ranked = self.search.rank(batch, listed, pairs[0], votes)
            yield Answered(batch.number, ranked, self.search.kept(batch, listed, votes))
            last, now = time.perf_counter(), last
            self.took.append(last - now)
            given.remove(batch.number)
            watch.search(self.run, len(given), self.busy)

    @property
    def lag(self) -> str:
        """Which shard has worked longest, for people: one that holds up the others."""
        slowest, usual = int(self.busy.argmax()), float(np.median(self.busy))
        return f"shard {slowest} {self.busy[slowest] - usual:.1f} s behind" if len(self.busy) > 1 else ""

    def summary(self) -> dict[str, object]:
        """For the record: pairs scored and known, seconds a batch took (percentiles), seconds each shard worked."""
        seconds = {f"p{p}": round(float(np.percentile(self.took, p)), 4) for p in (50, 90, 99)} if self.took else {}
        return {
            "pairs_scored": self.reuse.counted,
            "pairs_known": self.reuse.reused,
            "seconds_per_batch": seconds,
            "shard_seconds": [round(float(seconds), 3) for seconds in self.busy],
        }

    def _ask_shortlist(self, batch: ray.ObjectRef) -> Asked | None:
        if self.search.retrieval.shortlist is None:
            return None
        return Asked([actor.shortlist.remote(batch) for actor in self.actors], (batch,))

    def _merge_shortlist(self, batch: QueryBatch, asked: Asked | None) -> Shortlist | None:
        if asked is None:
            return None
        found = [*self._wait(asked), *self.reuse.shortlist(batch.number)]
        return shortlist.merge(found, self.search.retrieval.shortlist)

    def _ask_votes(self, batch: QueryBatch, ref: ray.ObjectRef, listed: Shortlist | None) -> tuple[tuple, Asked]:
        pairs = self.search.candidates(batch, listed)
        wanted = ray.put(self.reuse.want(batch.number, *pairs))
        return pairs, Asked([actor.votes.remote(ref, wanted) for actor in self.actors], (ref, wanted))

    def _wait(self, asked: Asked) -> list:
        """All answers, in shard order. Raises `SearchError` naming the shards that are late or have failed."""
        timeout = self.search.retrieval.timeout_s
        _, late = ray.wait(asked.answers, num_returns=len(asked.answers), timeout=timeout)
        if late:
            shards = [number for number, answer in enumerate(asked.answers) if answer in late]
            raise SearchError(
                f"search shards {shards} of {len(asked.answers)} have not answered within {timeout:g} s: a lost node, "
                "too little memory or a busy machine. Run again (finished parts are kept), with more retrieval.shards "
                "or a longer retrieval.timeout_s"
            )
        answers = [_answer(asked, number, timeout) for number in range(len(asked.answers))]
        self.busy += [answer.seconds for answer in answers]
        return [answer.answer for answer in answers]


def _answer(asked: Asked, number: int, timeout: float) -> Timed:
    """The answer of a shard that has one. What Ray raises here, it has tried again or cannot mend."""
    try:
        return ray.get(asked.answers[number], timeout=timeout)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SearchError(
            f"search shard {number} of {len(asked.answers)} (counted from 0) failed: {reason}. If a machine was lost "
            "or ran out of memory, run again: finished parts are kept"
        ) from error


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each produced while up to IN_FLIGHT earlier ones are still unconsumed."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


def shard_rows(database_size: int, retrieval: RetrievalConfig) -> list[np.ndarray]:
    """Database rows of every shard: contiguous, as even as can be."""
    workers = cluster.gpus() if retrieval.device == "cuda" else cluster.cpus()
    return np.array_split(np.arange(database_size), shard_count(database_size, retrieval, workers))


@contextmanager
def search_shards(search: Search, reuse: Reuse, run: str) -> Iterator[Shards]:
    """Start one actor per shard of the database, and end them afterwards; `run` is the id that its metrics bear.

    The memory of every actor is declared to Ray. Raises `NoRoomError` where the nodes have not that much.
    """
    parts = shard_rows(len(search.database), search.retrieval)
    needed = [search.memory_bytes(len(rows)) for rows in parts]
    _check_memory(needed)
    cards = int(search.retrieval.device == "cuda")
    if cards * len(parts) > cluster.gpus():
        raise NoRoomError(
            f"retrieval.device=cuda needs a graphics card for each of {len(parts)} search shards, but the cluster has "
            f"{cluster.gpus()}: use fewer retrieval.shards or retrieval.device=cpu"
        )
    fresh = [None if reuse.fresh is None else reuse.fresh[rows] for rows in parts]
    told = ray.put(search)
    given = [[told, ray.put(part)] for part in zip(parts, fresh, strict=True)]
    # Actors declare no CPU: they would otherwise hold the CPUs that Ray Data needs, and nothing would move. Ray would
    # pack what needs no CPU on few nodes; spread, they use the cores of all, and a lost node takes few of them.
    actors = [
        ray.remote(SearchShard)
        .options(
            num_cpus=0,
            num_gpus=cards,
            memory=size,
            scheduling_strategy="SPREAD",
            max_restarts=RESTARTS,
            max_task_retries=TASK_RETRIES,
        )
        .remote(references)
        for references, size in zip(given, needed, strict=True)
    ]
    shards = Shards(search, reuse, actors, run)
    try:
        shards._wait(Asked([actor.size.remote() for actor in actors], ()))
        yield shards
    finally:
        for actor in actors:
            ray.kill(actor)
        del given  # held until here


def _check_memory(needed: list[int]) -> None:
    """Place shards on nodes as Ray does, one by one; raises `NoRoomError` at the first for which there is no room."""
    offered = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    left = list(offered)
    for placed, size in enumerate(needed):
        node = next((i for i, free in enumerate(left) if free >= size), None)
        if node is None:
            raise NoRoomError(
                f"the database needs {sum(needed) / 1e9:.3g} GB of memory in {len(needed)} search shards of up to "
                f"{max(needed) / 1e9:.3g} GB, but only {placed} of them fit on the nodes of the cluster "
                f"({len(offered)}, with {sum(offered) / 1e9:.3g} GB in all, {max(offered) / 1e9:.3g} GB the largest): "
                "use more retrieval.shards, embedding.dtype=float16 or int8, a narrower encoder, or larger machines"
            )
        left[node] -= size
