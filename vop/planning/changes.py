"""What else could be asked for: every change is planned anew, and compared by time and bill."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from vop.config import Config
from vop.planning.plan import Asked, Plan, make

REMOVED = 0.8  # of its seconds: a change that leaves more of a bottleneck does not remove it
SHORTER = 0.98  # of the job's hours
LARGEST_BATCH = 1024
LONGEST_CHAIN = 4
PARTS = (2, 4, 8, 16, 32, 64, 128)  # jobs that a collection may be divided over


@dataclass(frozen=True)
class Change:
    """Another plan, and what to write to get it.

    price: what is lost, "" where the result is the same; larger: how many times as much a node is taken to cost.
    """

    label: str
    plan: Plan
    price: str = ""
    larger: float = 1.0

    @property
    def bill(self) -> float:
        """Of the whole."""
        return self.plan.bill_with(self.larger)


def cheapest(plan: Plan) -> list[Change]:
    """The changes that remove the first bottleneck, by bill; those that change the result come last.

    Of a plan that does not fit they need not make it fit.
    """
    stage, part = plan.bottleneck(scaling=True)
    found = [
        change
        for change in changes(plan)
        if {limit.what for limit in change.plan.limits} <= {limit.what for limit in plan.limits}
        and change.plan.seconds_of(stage.name, part.name) <= REMOVED * part.seconds
        and change.plan.seconds <= SHORTER * plan.seconds
    ]
    return sorted(found, key=lambda change: (bool(change.price), round(change.bill, 9), change.plan.seconds))


def chain(plan: Plan) -> list[Change]:
    """The cheapest change, the cheapest to make then, and so on; none that costs more or changes the result."""
    found: list[Change] = []
    while len(found) < LONGEST_CHAIN:
        last = found[-1].plan if found else plan
        more = [change for change in cheapest(last) if not change.price and change.bill <= last.bill]
        if not more:
            break
        found.append(more[0])
    return found


def remedies(plan: Plan) -> list[Change]:
    """The changes with which a plan fits, by bill; those that change the result come last.

    One change at a time, and, where none is enough, as many machines as it takes; the last resort is a division.
    """
    found = [change for change in changes(plan) if not change.plan.limits]
    found = [*(found or _more_machines(plan)), *_divided(plan)]
    return sorted(found, key=lambda change: (bool(change.price), round(change.bill, 9), change.plan.seconds))


def changes(plan: Plan) -> Iterator[Change]:
    """One thing changed at a time."""
    config, asked = plan.config, plan.config.plan
    embedding, retrieval = config.embedding, config.retrieval

    def changed(section: str, price: str = "", larger: float = 1.0, **values: object) -> Change:
        new = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
        return Change(" ".join(f"{section}.{key}={_shown(value)}" for key, value in values.items()),
                      _again(plan, new), price, larger)  # fmt: skip

    yield changed("plan", nodes=2 * asked.nodes)
    if asked.gpus_per_node:
        yield changed("plan", gpus_per_node=2 * asked.gpus_per_node)
    yield changed("plan", larger=2.0, cpus_per_node=2 * asked.cpus_per_node)
    yield changed("plan", larger=2.0, network_gbit=2 * asked.network_gbit)
    yield changed("plan", larger=2.0, memory_gb_per_node=2 * asked.memory_gb_per_node)
    for size in (embedding.shard_size * 8, embedding.shard_size * 4, max(16, embedding.shard_size // 4)):
        if size != embedding.shard_size:
            yield changed("embedding", shard_size=size)
    if retrieval.query_batch < LARGEST_BATCH:
        yield changed("retrieval", query_batch=LARGEST_BATCH)
    actors = plan.stage("search").shards
    for fewer in sorted({actors // 4, asked.nodes * 4, asked.nodes}):
        if 0 < fewer < actors:
            yield changed("retrieval", shards=fewer)
    if retrieval.cache is None:
        yield Change("retrieval.cache=DIR", changed("retrieval", cache="/cache").plan)
    if retrieval.reuse_gb:
        yield changed("retrieval", reuse_gb=8 * retrieval.reuse_gb)
    if retrieval.keep_votes:
        yield changed("retrieval", "images added later cost a whole search", keep_votes=False)
    if embedding.dtype != "int8":
        yield changed("embedding", "scores change in their last digits", dtype="int8")
    if embedding.whiten and embedding.whiten >= 64:
        yield changed("embedding", "coarser descriptors", whiten=embedding.whiten // 2)
    if retrieval.shortlist and retrieval.shortlist >= 20:
        yield changed("retrieval", "fewer candidates are voted on", shortlist=retrieval.shortlist // 2)
    if retrieval.index == "Flat" and plan.work.database // actors > 10_000:
        lists = 2 ** round(math.log2(4 * (plan.work.database / actors) ** 0.5))
        yield changed("retrieval", "the shortlist misses some candidates", index=f"IVF{lists},Flat", shards=actors)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _more_machines(plan: Plan) -> list[Change]:
    """The least number of nodes, in steps of a half, with which the plan fits."""
    asked, nodes = plan.config.plan, plan.config.plan.nodes
    while nodes < 1000 * asked.nodes:
        nodes += max(1, nodes // 2)
        new = dataclasses.replace(plan.config, plan=dataclasses.replace(asked, nodes=nodes))
        if not (again := _again(plan, new)).limits:
            return [Change(f"plan.nodes={nodes}", again)]
    return []


def _divided(plan: Plan) -> list[Change]:
    """The fewest jobs, of an equal share of the images each, that fit one by one."""
    work = plan.work
    for parts in PARTS:
        images, database = -(-work.images // parts), -(-work.database // parts)
        each = Asked(images, database, database if work.register else work.queries, work.register)
        again = make(plan.config, work.rates, each)
        if not again.limits:
            return [Change(f"{parts} jobs, one after the other, of {images:,} images each", _times(again, parts),
                           "images of different jobs are not paired")]  # fmt: skip
    return []


def _times(plan: Plan, count: int) -> Plan:
    """As many such jobs in a row, for time and bill."""
    stages = tuple(
        dataclasses.replace(stage, **{
            kind: tuple(dataclasses.replace(part, seconds=count * part.seconds) for part in getattr(stage, kind))
            for kind in ("serial", "together")
        })
        for stage in plan.stages
    )  # fmt: skip
    return dataclasses.replace(plan, stages=stages)


def _again(plan: Plan, config: Config) -> Plan:
    work = plan.work
    return make(config, work.rates, Asked(work.images, work.database, work.queries, work.register))
