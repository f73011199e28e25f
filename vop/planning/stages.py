"""The arithmetic of every stage: what its parts take on given machines, and which of them it waits for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from vop.files import AT_ONCE
from vop.planning.shape import BYTES, Machines, Work
from vop.retrieval.search import shard_count

DECODING = 0.6  # of the cores take decoding tasks where models run on cores; the rest is reserved for the models
LISTINGS = 3  # times that a step reads all receipts
KEYS = 1000  # a page of a bucket's listing


@dataclass(frozen=True)
class Part:
    """What one resource takes in a stage; `how` is the arithmetic, for people."""

    name: str
    seconds: float
    how: str
    once: bool = False  # the same for any number of images


@dataclass(frozen=True)
class Traffic:
    """What goes to and from the storage: bytes and requests."""

    read: float = 0.0
    written: float = 0.0
    requests: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A step of a job: parts that come one after the other, and parts that run together and wait for the slowest."""

    name: str
    serial: Sequence[Part]
    together: Sequence[Part] = ()
    role: str = ""  # of the processes that do the work
    actors: int = 0  # how many there are
    actor_bytes: float = 0.0  # memory of each
    disk: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    shards: int = 0
    cards: int = 0

    @property
    def slowest(self) -> Part:
        """Of the parts that run together the one that the others wait for."""
        return max(self.together, key=lambda part: part.seconds)

    @property
    def seconds(self) -> float:
        """Wall clock."""
        return sum(part.seconds for part in self.serial) + (self.slowest.seconds if self.together else 0.0)

    @property
    def parts(self) -> list[Part]:
        """The parts that the stage waits for."""
        return [*self.serial, *([self.slowest] if self.together else [])]


def embed(work: Work, machines: Machines) -> Stage:
    """From image files to a store."""
    embedding, plan, rates = work.config.embedding, work.config.plan, work.rates
    n, shards, remote = work.images, work.shards, plan.storage == "object"
    request = plan.request_ms / 1e3 if remote else 0.0
    forward = forward_s(work)
    write = rates.write_s * work.image_bytes / 1e6
    sampled = min(embedding.sample, n) * (rates.sampled_s + request)
    receipts = LISTINGS * shards * (rates.receipt_s + request / AT_ONCE) + shards * (rates.facts_s + 2 * request)
    driver = n * rates.catalog_s
    on_cards = machines.cards > 0
    replicas = embedding.encoders or (machines.cards if on_cards else machines.cores)
    replicas = min(replicas, shards)
    own = rates.decode_s + write + (0 if on_cards else forward)
    together = [_spread("cores", n, own, machines.cores, "decode, write" if on_cards else "decode, models, write")]
    busiest = _most_images(n, embedding.shard_size, replicas)
    chain = busiest * forward + min(n, embedding.shard_size) * (rates.decode_s + write)
    where = "cards" if on_cards else "replicas"
    how = f"{_count(busiest)} images on the busiest of {replicas} {where} x {_ms(forward)}, the first decoded before"
    together.append(Part(f"models on {where}", chain, how))
    if remote:
        slots = machines.cores * (1 if on_cards else DECODING)
        how = f"{_count(n)} images x ({plan.request_ms:g} ms + {_ms(rates.decode_s)}) / {slots:g} tasks at a time"
        together.append(Part("requests", n * (request + rates.decode_s) / slots, how))
    read = n * rates.image_bytes + min(embedding.sample, n) * rates.image_bytes + work.store_bytes
    together += _network(machines, remote, read, work.store_bytes)
    return Stage(
        "embed",
        [
            Part("start of models", rates.fixed_s["models"] + rates.fixed_s["embed"], "measured, once", True),
            Part("sample", sampled, f"{min(embedding.sample, n)} images x {_ms(sampled / min(embedding.sample, n))}"),
            Part("catalog", driver, f"{_count(n)} images x {_ms(rates.catalog_s)}, one driver"),
            Part("receipts", receipts, f"{_count(shards)} shards x {_ms(receipts / shards)}, one driver"),
        ],
        together,
        role="models",
        actors=replicas,
        actor_bytes=rates.process_bytes + embedding.shard_size * (3 * embedding.image_size**2 + work.image_bytes),
        disk=work.store_bytes,
        traffic=Traffic(read, work.store_bytes, n + shards * (4 + LISTINGS + 2) + LISTINGS * 2 * shards / KEYS),
        shards=shards,
        cards=machines.cards,
    )  # fmt: skip


def search(work: Work, machines: Machines) -> Stage:
    """From a store to ranked pairs: shortlists, votes, and the driver that merges them."""
    asked, plan, rates = work.config.retrieval, work.config.plan, work.rates
    remote, queries, rows = plan.storage == "object", work.queries, work.database
    request = plan.request_ms / 1e3 if remote else 0.0
    actors = shard_count(rows, asked, machines.cards if asked.device == "cuda" else machines.cores)
    held = -(-rows // actors)
    compared = 0.0 if asked.shortlist is None else _compared(asked.index, held)
    receipt = LISTINGS * (rates.receipt_s + request / AT_ONCE)
    at_actor = compared * rates.shortlist_row_s + rates.shortlist_query_s + rates.votes_query_s
    pair = 1 / plan.votes_pairs_per_s if plan.votes_pairs_per_s else rates.pair_s
    votes = work.pairs_scored / queries * pair
    batch = min(asked.query_batch, queries)
    sent = 2 * actors * rates.message_s / batch
    written = (1 + asked.keep_votes) * (request if remote else rates.file_s)  # pairs, and votes
    files = (2 * request + written) / batch  # the queries of a batch come in two requests
    driver = rates.driver_query_s + work.candidates * rates.driver_pair_s + sent + files
    each = at_actor + votes / actors
    together = [
        Part("driver", queries * driver, f"{_count(queries)} queries x ({_ms(driver - sent)} + {2 * actors} messages x "
             f"{_ms(rates.message_s)} / {batch})"),
        Part("search actors", queries * each, f"{_count(queries)} queries x ({_count(compared)} rows x "
             f"{_ms(rates.shortlist_row_s)} + {work.pairs_scored / queries / actors:.3g} pairs x {_ms(pair)} + "
             f"{_ms(rates.shortlist_query_s + rates.votes_query_s)}), each of {actors}"),
    ]  # fmt: skip
    if asked.device == "cpu":
        busy = driver + actors * each
        together.append(Part("cores", queries * busy / machines.cores, f"{_count(queries)} queries x {_ms(busy)} / "
                             f"{machines.cores} cores"))  # fmt: skip
    sending = queries * rates.patches * work.width * BYTES[work.config.embedding.dtype]
    nodes = min(actors, machines.nodes)
    if nodes > 1:
        together.append(Part("network", sending * (nodes - 1) / machines.network_bytes_s,
                             f"{_count(queries)} queries to {nodes} nodes, from one"))  # fmt: skip
    store = rows * work.image_bytes
    loading = max(store / actors / 1e6 * rates.read_s * _shared(actors, machines), 0.0)
    if remote:
        loading = max(loading, store / nodes / machines.network_bytes_s)
    first = min(part.seconds for part in together[:2]) * batch / queries  # until the first answers overlap
    listed = queries * work.candidates
    kept = listed * rates.kept_bytes if asked.keep_votes else 0.0
    batches = -(-queries // batch)
    traffic = Traffic(
        store + queries * work.image_bytes,
        kept + queries * min(asked.k, work.candidates) * rates.ranked_bytes,
        2 * work.shards + LISTINGS * work.shards + 2 * batches + (1 + asked.keep_votes) * batches,
    )
    return Stage(
        "search",
        [
            Part("start of actors", rates.fixed_s["search"] + first, "measured, once", True),
            Part("names", rows * rates.prepare_s, f"{_count(rows)} images x {_ms(rates.prepare_s)}, one driver"),
            Part("receipts", work.shards * receipt, f"{_count(work.shards)} shards x {_ms(receipt)}, one driver"),
            Part("load", loading, f"{store / actors / 1e9:.3g} GB into each of {actors} actors"),
        ],
        together,
        role="search actors",
        actors=actors,
        actor_bytes=work.actor_bytes(held),
        disk=kept + queries * min(asked.k, work.candidates) * rates.ranked_bytes,
        traffic=traffic,
        shards=actors,
        cards=machines.cards if asked.device == "cuda" else 0,
    )  # fmt: skip


def lists(work: Work, machines: Machines) -> Stage:
    """From the parts of a search to pairs.parquet, pairs.txt, scenes and the report."""
    rates, plan = work.rates, work.config.plan
    ranked = work.queries * min(work.config.retrieval.k, work.candidates)
    request = plan.request_ms / 1e3 if plan.storage == "object" else 0.0
    batches = -(-work.queries // work.config.retrieval.query_batch)
    size = ranked * rates.ranked_bytes
    return Stage(
        "lists",
        [
            Part("start of lists", rates.fixed_s["pairs"] + rates.fixed_s["report"], "measured, once", True),
            Part("pairs", ranked * rates.listed_s + 2 * batches * request, f"{_count(ranked)} pairs x "
                 f"{_ms(rates.listed_s)}, one driver"),
        ],
        disk=2 * size,
        traffic=Traffic(2 * size, 2 * size, 2 * batches),
    )  # fmt: skip


def start(work: Work, machines: Machines) -> Stage:
    """Until the driver and Ray are there, and until they are gone."""
    return Stage("start", [Part("Python and Ray", work.rates.fixed_s["start"], "measured, once", True)])


def forward_s(work: Work) -> float:
    """Seconds of a card, or of a core, for an image."""
    stated = work.config.plan.forward_images_per_s
    return 1 / stated if stated else work.rates.forward_s


def _spread(name: str, count: int, each: float, over: int, what: str) -> Part:
    return Part(name, count * each / over, f"{_count(count)} images x {_ms(each)} / {over} cores: {what}")


def _most_images(images: int, shard_size: int, replicas: int) -> int:
    """Images of the replica with most, if shards go round."""
    whole, rest = divmod(images, shard_size)
    most = -(-whole // replicas) * shard_size
    return max(most, whole // replicas * shard_size + rest)


def _network(machines: Machines, remote: bool, read: float, written: float) -> list[Part]:
    """A node that stands alone with its disk sends nothing."""
    if not remote and machines.nodes == 1:
        return []
    seconds = (read + written) / (machines.nodes * machines.network_bytes_s)
    return [Part("network", seconds, f"{_count((read + written) / 1e9)} GB / {machines.nodes} nodes")]


def _compared(index: str, rows: int) -> float:
    """Rows of a shard that a shortlist compares: of Flat all, of IVF the lists and one of them (nprobe 1)."""
    ivf = re.search(r"IVF(\d+)", index)
    return rows if ivf is None else int(ivf[1]) + rows / int(ivf[1])


def _shared(actors: int, machines: Machines) -> float:
    """How many actors read at a time for each core that they have."""
    return max(1.0, actors / machines.cores)


def _ms(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e7 else f"{number:.3g}".replace("e+0", "e")
