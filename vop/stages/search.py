"""The search actors: one shard of the database each; answers merge on the driver, a bounded window in flight."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import ray

from vop.retrieval import shortlist
from vop.retrieval.index import BatchVotes, ShardIndex
from vop.retrieval.search import QueryBatch, Search
from vop.retrieval.shortlist import Shortlist
from vop.stages import cluster

SMALL_SHARD = 500  # images; fewer do not repay the start of another actor
IN_FLIGHT = 2  # batches submitted ahead of the one being merged, for each of the two questions
RESTARTS, TASK_RETRIES = -1, 3
Item = TypeVar("Item")


class SearchError(RuntimeError):
    """A search that cannot be started, or a shard that does not answer."""


class SearchShard:
    """One shard as an actor runs it; its constructor is all it needs to come back after a crash."""

    def __init__(self, search: Search, rows: np.ndarray):
        self.index: ShardIndex = search.index(rows)
        self.retrieval, self.radius = search.retrieval, search.radius

    def size(self) -> int:
        """Images of the shard; answers once they are loaded."""
        return len(self.index)

    def shortlist(self, batch: QueryBatch) -> Shortlist:
        """The shard's best images by global descriptor."""
        return self.index.shortlist(batch.globals, self.retrieval.shortlist, batch.exclude, batch.scenes)

    def votes(self, batch: QueryBatch, candidates: Shortlist | None) -> BatchVotes:
        """Votes for the candidates that lie in this shard, or for all its images."""
        listed = None if candidates is None else [candidates[q] for q in range(len(candidates))]
        return self.index.votes(batch.patches, batch.masks, listed, self.radius, batch.exclude, batch.scenes)


@dataclass(frozen=True)
class Shards:
    """The running actors of a search."""

    search: Search
    actors: Sequence[ray.actor.ActorHandle]

    def rank(self, batches: Iterable[QueryBatch]) -> Iterator[tuple[int, pa.Table]]:
        """Answer batches of queries in order: shortlist, votes, merge, rank. Yields (batch number, its pairs)."""
        put = ((batch, ray.put(batch)) for batch in batches)
        asked = _ahead((batch, ref, self._ask_shortlist(ref)) for batch, ref in put)
        listed = ((batch, ref, self._merge_shortlist(answers)) for batch, ref, answers in asked)
        voted = _ahead((batch, candidates, self._ask_votes(ref, candidates)) for batch, ref, candidates in listed)
        for batch, candidates, answers in voted:
            yield batch.number, self.search.rank(batch, candidates, self._wait(answers))

    def _ask_shortlist(self, batch: ray.ObjectRef) -> list[ray.ObjectRef]:
        if self.search.retrieval.shortlist is None:
            return []
        return [actor.shortlist.remote(batch) for actor in self.actors]

    def _merge_shortlist(self, answers: list[ray.ObjectRef]) -> Shortlist | None:
        if not answers:
            return None
        return shortlist.merge(self._wait(answers), self.search.retrieval.shortlist)

    def _ask_votes(self, batch: ray.ObjectRef, candidates: Shortlist | None) -> list[ray.ObjectRef]:
        listed = ray.put(candidates)
        return [actor.votes.remote(batch, listed) for actor in self.actors]

    def _wait(self, answers: list[ray.ObjectRef]) -> list:
        """All answers, in shard order. Raises `SearchError` naming the shards that are late."""
        timeout = self.search.retrieval.timeout_s
        _, late = ray.wait(answers, num_returns=len(answers), timeout=timeout)
        if late:
            shards = [number for number, answer in enumerate(answers) if answer in late]
            raise SearchError(
                f"search shards {shards} of {len(answers)} have not answered within {timeout:g} s: a lost node, too "
                "little memory or a busy machine. Run again (finished parts are kept), with more retrieval.shards or "
                "a longer retrieval.timeout_s"
            )
        return ray.get(answers)


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each produced while up to IN_FLIGHT earlier ones are still unconsumed."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


def shard_rows(database_size: int, shards: int | None) -> list[np.ndarray]:
    """Database rows of every shard: contiguous, as even as can be."""
    asked = shards or min(cluster.cpus(), -(-database_size // SMALL_SHARD))
    return np.array_split(np.arange(database_size), max(1, min(asked, database_size)))


@contextmanager
def search_shards(search: Search) -> Iterator[Shards]:
    """Start one actor per shard of the database, and end them afterwards.

    The memory of every actor is declared to Ray. Raises `SearchError` where the cluster has not that much.
    """
    parts = shard_rows(len(search.database), search.retrieval.shards)
    needed = [search.memory_bytes(len(rows)) for rows in parts]
    _check_memory(needed)
    # Actors declare no CPU: they would otherwise hold the CPUs that Ray Data needs, and nothing would move.
    actors = [
        ray.remote(SearchShard)
        .options(num_cpus=0, memory=size, max_restarts=RESTARTS, max_task_retries=TASK_RETRIES)
        .remote(search, rows)
        for rows, size in zip(parts, needed, strict=True)
    ]
    shards = Shards(search, actors)
    try:
        shards._wait([actor.size.remote() for actor in actors])
        yield shards
    finally:
        for actor in actors:
            ray.kill(actor)


def _check_memory(needed: list[int]) -> None:
    available = ray.cluster_resources().get("memory", 0)
    if sum(needed) > available:
        raise SearchError(
            f"the database needs {sum(needed) / 1e9:.1f} GB of memory in {len(needed)} search shards, but the cluster "
            f"offers {available / 1e9:.1f} GB: use more or larger machines, embedding.dtype=float16 or a narrower "
            "encoder"
        )
