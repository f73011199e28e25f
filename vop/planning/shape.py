"""What is planned: a collection and its descriptors, and the machines they are made on. Plain numbers."""

from dataclasses import dataclass

import pyarrow as pa

from vop.config import Config
from vop.planning.rates import Rates
from vop.quantised import float_type
from vop.retrieval.search import Search
from vop.store import GROUP_ROWS, EmbeddingStore, Selection

BYTES = {"int8": 1, "float16": 2, "float32": 4}
OF_AN_IMAGE = 150  # bytes: its id, name, sizes and hash in a shard
OF_A_GROUP = 1_900  # bytes: headers and metadata of a row group of a shard
OF_A_DICTIONARY = 1_060  # bytes of a row group of int8 patches
RECEIPT = 150  # bytes
RAY_SHARE = 0.3  # of a node's memory is Ray's for objects; the rest is offered to actors


@dataclass(frozen=True)
class Machines:
    """The cluster: `nodes` equal machines."""

    nodes: int
    cpus: int
    gpus: int
    memory_bytes: float
    network_bytes_s: float

    @property
    def cores(self) -> int:
        """CPU cores of all nodes."""
        return self.nodes * self.cpus

    @property
    def cards(self) -> int:
        """Graphics cards of all nodes."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Work:
    """A job of so many images, with what its settings make of each."""

    config: Config
    rates: Rates
    images: int
    database: int
    queries: int
    register: bool

    @property
    def width(self) -> int:
        """E, numbers of a stored descriptor."""
        return self.config.embedding.whiten or self.rates.width

    @property
    def manifest(self) -> dict:
        """What the manifest of the store will say of its shapes."""
        names = ("patches", "global_width", "token_width")
        return {name: getattr(self.rates, name) for name in names} | {
            "width": self.width,
            "dtype": self.config.embedding.dtype,
        }

    @property
    def image_bytes(self) -> float:
        """Bytes of an image in a shard of the store."""
        embedding, rates = self.config.embedding, self.rates
        patches, floats = BYTES[embedding.dtype], BYTES[float_type(embedding.dtype)]
        numbers = rates.patches * self.width * patches + rates.global_width * floats
        if embedding.tokens:
            numbers += rates.patches * rates.token_width * floats
        group = OF_A_GROUP + (OF_A_DICTIONARY if embedding.dtype == "int8" else 0)
        return numbers + OF_AN_IMAGE + group / min(GROUP_ROWS, embedding.shard_size)

    @property
    def shards(self) -> int:
        """Shards of the store."""
        return -(-self.images // self.config.embedding.shard_size)

    @property
    def store_bytes(self) -> float:
        """Bytes of the store: shards, receipts, catalog."""
        return self.images * (self.image_bytes + self.rates.catalog_bytes) + self.shards * RECEIPT

    @property
    def driver_bytes(self) -> float:
        """Memory of the driver: it holds the catalog as a whole, and the votes that wait for their other side."""
        reused = self.config.retrieval.reuse_gb * 1e9 if self.register else 0.0
        waiting = self.queries * self.candidates / 4 * (8 + self.rates.vote_bytes)
        return self.rates.process_bytes + self.images * self.rates.driver_bytes + min(reused, waiting)

    @property
    def candidates(self) -> int:
        """Images that are voted on for a query."""
        others = self.database - (1 if self.register else 0)
        return min(self.config.retrieval.shortlist or others, others)

    @property
    def pairs_scored(self) -> int:
        """Pairs of images whose votes are counted; a pair that both images list, once while memory for it lasts.

        Votes that wait for their other side fill that memory most in the middle of the job, when a half of such pairs
        waits: then they are taken to lie anywhere in the collection.
        """
        listed, asked, rates = self.queries * self.candidates, self.config.retrieval, self.rates
        if not self.register or asked.device == "cuda" or not self.candidates:
            return listed
        chance = self.candidates / (self.database - 1)
        twins = listed * (rates.mutual + (1 - rates.mutual) * chance) / 2
        waiting = twins / 2 * (8 + rates.vote_bytes)
        return round(listed - twins * min(1.0, asked.reuse_gb * 1e9 / waiting))

    def actor_bytes(self, rows: int) -> int:
        """Memory that a search actor of so many images declares."""
        store = EmbeddingStore("", self.manifest)
        nobody = Selection(store, pa.table({}))
        return Search(nobody, nobody, self.config.retrieval, 1.0).memory_bytes(rows)
