"""What `vop plan` is asked: how many images, on which machines, and what is known of their speed."""

from dataclasses import dataclass

from vop.schema.bounds import positive, require


@dataclass(frozen=True)
class PlanConfig:
    """A collection that need not exist yet, and a cluster that need not be there."""

    images: float | None = None
    """Images of the collection, such as 100e6; null: those of `images=`, counted."""
    queries: float | None = None
    """Queries ranked against the images, as `retrieve` does; null: every image is a query, as in `register`."""
    image_width: int = 1600
    """Width of the pictures rendered to measure on where `images=` gives none, pixels; they are 4:3."""
    nodes: int = 1
    """Machines of the cluster."""
    cpus_per_node: int | None = None
    """CPU cores of each; null: as many as this machine has."""
    gpus_per_node: int = 0
    """Graphics cards of each."""
    memory_gb_per_node: float | None = None
    """Main memory of each, GB; null: as much as this machine has."""
    network_gbit: float = 10.0
    """Network of each, Gbit/s, to the others and to the storage."""
    storage: str = "local"
    """Where images, store and output lie: local (a disk that every node mounts) or object (s3://, gs://)."""
    request_ms: float = 30.0
    """Time until an object store answers a request, ms."""
    disk_gb: float | None = None
    """Room for the store and the output, GB; null: what is free at the output if there is one node, else no bound."""
    cache_gb_per_node: float | None = None
    """Room for `retrieval.cache` on each node, GB; null: not checked."""
    node_price: float | None = None
    """Price of a node for an hour, without its cards, in any currency; null: bills are in hours of nodes."""
    gpu_price: float = 0.0
    """Price of a card for an hour, in the same currency."""
    forward_images_per_s: float | None = None
    """Images a second that one graphics card (without cards: one core) describes; null: measured here, which needs a
    machine with such a card where the cluster has any."""
    votes_pairs_per_s: float | None = None
    """Pairs of images a second that one search actor scores; null: measured here, which needs a card with
    `retrieval.device=cuda`."""
    rates: str | None = None
    """File that an earlier plan left (`plan.file`), on a machine like those of the cluster: nothing is measured."""
    file: str | None = None
    """File that the plan and the rates behind it are written to, JSON; null: they are only printed."""

    def __post_init__(self):
        for name in ("images", "queries"):
            value = getattr(self, name)
            require(f"plan.{name}", value, value is None or (value >= 1 and value == int(value)),
                     "a whole number from 1, such as 100e6")  # fmt: skip
        require("plan.storage", self.storage, self.storage in ("local", "object"), "local or object")
        for name in ("gpus_per_node", "gpu_price", "request_ms"):
            require(f"plan.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or positive")
        positive("plan", self, "image_width", "nodes", "cpus_per_node", "memory_gb_per_node", "network_gbit", "disk_gb",
                 "cache_gb_per_node", "node_price", "forward_images_per_s", "votes_pairs_per_s")  # fmt: skip
