"""A plan: stages, what does not fit, and what the whole costs."""

import dataclasses
from dataclasses import dataclass

from vop.config import Config, ConfigError
from vop.planning import stages
from vop.planning.rates import Rates
from vop.planning.shape import RAY_SHARE, Machines, Work
from vop.planning.stages import Part, Stage

NETWORK_BYTES = 1e9 / 8  # of a Gbit


@dataclass(frozen=True)
class Limit:
    """Something that a job needs more of than there is: bytes, or a number of `unit`."""

    what: str
    needed: float
    there: float
    unit: str = "bytes"


@dataclass(frozen=True)
class Asked:
    """The size of a job: images in the store, those that are searched, queries; register: every image is a query."""

    images: int
    database: int
    queries: int
    register: bool


@dataclass(frozen=True)
class Plan:
    """What a job takes on a cluster."""

    config: Config
    work: Work
    machines: Machines
    stages: tuple[Stage, ...]
    limits: tuple[Limit, ...]

    @property
    def seconds(self) -> float:
        """Wall clock of the whole job."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk(self) -> float:
        """Bytes of store and output."""
        return sum(stage.disk for stage in self.stages)

    @property
    def priced(self) -> bool:
        """Whether bills are in money; otherwise in hours of a machine, a card counted as one."""
        return self.config.plan.node_price is not None

    @property
    def bill(self) -> float:
        """Price of all machines for the whole job."""
        return self.bill_with(1.0)

    def bill_with(self, larger: float) -> float:
        """The bill if a node without its cards costs so many times what was stated."""
        asked = self.config.plan
        node, card = (asked.node_price, asked.gpu_price) if self.priced else (1.0, 1.0)
        return self.seconds / 3600 * self.machines.nodes * (larger * node + self.machines.gpus * card)

    def stage(self, name: str) -> Stage:
        """A stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)

    def bottleneck(self, scaling: bool = False) -> tuple[Stage, Part]:
        """The part that takes longest of all that the job waits for; `scaling`: of those that grow with the images."""
        parts = [(stage, part) for stage in self.stages for part in stage.parts]
        grown = [one for one in parts if not (scaling and one[1].once)]
        return max(grown, key=lambda one: one[1].seconds)

    def seconds_of(self, stage: str, part: str) -> float:
        """What a part takes, whether or not the stage waits for it; 0 where there is none of that name."""
        here = self.stage(stage)
        return next((p.seconds for p in (*here.serial, *here.together) if p.name == part), 0.0)


def make(config: Config, rates: Rates, asked: Asked) -> Plan:
    """Plan a job. Raises `ConfigError` as `check` does."""
    check(config, rates.device)
    plan = config.plan
    machines = Machines(
        plan.nodes, plan.cpus_per_node, plan.gpus_per_node, plan.memory_gb_per_node * 1e9,
        plan.network_gbit * NETWORK_BYTES,
    )  # fmt: skip
    work = Work(config, rates, **dataclasses.asdict(asked))
    made = tuple(stage(work, machines) for stage in (stages.start, stages.embed, stages.search, stages.lists))
    planned = Plan(config, work, machines, made, ())
    return dataclasses.replace(planned, limits=tuple(_limits(planned)))


def check(config: Config, device: str) -> None:
    """Raise `ConfigError` for settings without a model, or if a rate is not stated that `device` cannot tell.

    device: cpu or cuda, where the others are measured.
    """
    plan, asked = config.plan, config.retrieval
    if plan.gpus_per_node and plan.forward_images_per_s is None and device != "cuda":
        raise ConfigError(
            f"plan.gpus_per_node is {plan.gpus_per_node}, but {config.backbone} was measured on a CPU, which tells "
            "nothing of a card: give plan.forward_images_per_s=N, the images a second of one card, or plan on a "
            "machine that has such a card (and take plan.file with you: plan.rates)"
        )
    if not plan.gpus_per_node and plan.forward_images_per_s is None and device == "cuda":
        raise ConfigError(
            f"plan.gpus_per_node is 0, but {config.backbone} was measured on a card, which tells nothing of a core: "
            "give plan.gpus_per_node=N, or plan.forward_images_per_s=N, the images a second of one core"
        )
    if asked.device == "cuda" and plan.votes_pairs_per_s is None:
        raise ConfigError(
            "retrieval.device=cuda, but votes were measured on a CPU: give plan.votes_pairs_per_s=N, the pairs of "
            "images a second that one card scores (benchmarks/votes_gpu.py measures it)"
        )
    if not config.embedding.patches:
        raise ConfigError("embedding.patches=false makes a store of tokens to train on, for which there is no plan")
    if asked.patch_index is not None or not (asked.index == "Flat" or asked.index.startswith("IVF")):
        raise ConfigError(
            f"no plan is made for retrieval.index={asked.index}, retrieval.patch_index={asked.patch_index}: only for "
            "Flat and IVF indices of global descriptors"
        )
    if asked.global_descriptors is not None:
        raise ConfigError("no plan is made for retrieval.global_descriptors: only for those of the backbone")


def _limits(plan: Plan) -> list[Limit]:
    """What does not fit."""
    asked, work, machines, found = plan.config.plan, plan.work, plan.machines, []

    def need(what: str, needed: float, there: float | None, unit: str = "bytes") -> None:
        if there is not None and needed > there:
            found.append(Limit(what, needed, there, unit))

    offered = (1 - RAY_SHARE) * machines.memory_bytes
    embedding = plan.stage("embed")
    models = -(-embedding.actors // machines.nodes)
    need(f"memory of a node for {models} models", models * embedding.actor_bytes, offered)
    what = f"memory of the driver, which holds the catalog of {work.images:,} images"
    need(what, work.driver_bytes, machines.memory_bytes)
    search = plan.stage("search")
    per_node = -(-search.shards // machines.nodes)
    need(f"memory of a node for {per_node} of {search.shards} search actors", per_node * search.actor_bytes, offered)
    if plan.config.retrieval.cache is not None:
        cache = work.database * work.image_bytes / machines.nodes
        room = asked.cache_gb_per_node
        need("disk of a node for retrieval.cache", cache, None if room is None else room * 1e9)
    if plan.config.retrieval.device == "cuda":
        need("cards, one for each search actor", search.shards, machines.cards, "cards")
    if asked.storage == "local":
        need("disk for store and output", plan.disk, None if asked.disk_gb is None else asked.disk_gb * 1e9)
    return found
