"""A plan's inputs: how large the collection is, what this machine is, and what a job costs on it that is its own."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.compute as pc

from vop import files
from vop.config import Config, ConfigError
from vop.datasets import rendered
from vop.datasets.benchmark import open_benchmark
from vop.datasets.folder import list_images
from vop.datasets.image_sets import ImageSets
from vop.image import to_jpeg
from vop.planning import calibration, changes, plan, table
from vop.planning.plan import Asked, Plan
from vop.planning.rates import SECONDS, Rates, device
from vop.progress import progress
from vop.run import Run
from vop.schema import DatasetConfig, PairsConfig, PlanConfig
from vop.stages import cluster
from vop.stages.messages import message_seconds

TRIAL = 16  # images of the small job that is run to see what Ray and its processes cost
SAMPLED = 8  # of them are sampled
RENDERED = 24  # where there is no collection


@dataclass(frozen=True)
class Planned:
    """What `vop plan` ends with; `summary()` as of a run."""

    plan: Plan

    def summary(self) -> str:
        """The plan, for a person."""
        return table.page(self.plan)


def planned(config: Config, register: Callable[[Config], Run]) -> Planned:
    """Plan the job of a config, measuring on this machine what is not stated.

    `register` is the command of that name: a few images go through it. Raises `ConfigError` for a plan that cannot be
    made, or does not fit; the message then holds the plan.
    """
    told = here(config)
    sets = None
    if any(source is not None for source in (config.images, config.queries, config.database, config.dataset.format)):
        sets = open_benchmark(config).sets
    asked = size(config, sets)
    known = Rates.read(config.plan.rates, config) if config.plan.rates else None
    plan.check(config, known.device if known else device())  # before half a minute of measuring
    rates = known or measured(config, sets, register)
    made = plan.make(told, rates, asked)
    if config.plan.file is not None:
        files.write_json(config.plan.file, to_json(made))
    if made.limits:
        raise ConfigError(f"the plan is refused\n{table.page(made)}")
    return Planned(made)


def here(config: Config) -> Config:
    """The config with this machine's cores, memory and free disk where the plan states none."""
    told = config.plan
    free = told.disk_gb
    if free is None and told.nodes == 1 and told.storage == "local" and not files.is_uri(config.output):
        there = next(place for place in (Path(config.output), *Path(config.output).parents) if place.exists())
        free = shutil.disk_usage(there).free / 1e9
    new = dataclasses.replace(
        told,
        cpus_per_node=told.cpus_per_node or config.cluster.cpus or os.cpu_count(),
        memory_gb_per_node=told.memory_gb_per_node or _memory_gb(),
        disk_gb=free,
    )
    return dataclasses.replace(config, plan=new)


def _memory_gb() -> float:
    """Main memory of this machine, or of the container that this process may use."""
    bound = Path("/sys/fs/cgroup/memory.max")
    allowed = bound.read_text().strip() if bound.exists() else "max"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, machine if allowed == "max" else int(allowed)) / 1e9


def size(config: Config, sets: ImageSets | None) -> Asked:
    """How many images and queries: as stated, else as counted. Raises `ConfigError` where neither can be."""
    told = config.plan
    if told.images is None and sets is None:
        raise ConfigError("how many images? Give images=FOLDER, or plan.images=100e6 for a collection to come")
    counted = sets is not None and config.queries is not None
    database = int(told.images) if told.images else len(sets.database)
    if told.queries is not None or counted:
        queries = int(told.queries) if told.queries else len(sets.queries)
        images = len(sets.images) if counted and not told.images and not told.queries else database + queries
        return Asked(images, database, queries, False)
    return Asked(database, database, database, True)


def measured(config: Config, sets: ImageSets | None, register: Callable[[Config], Run]) -> Rates:
    """The rates of this machine: of the parts in this process, then of a job of `TRIAL` images, for what is around."""
    with tempfile.TemporaryDirectory() as folder, progress("measure", 3, 0, "steps") as bar:
        listing = _sample(config, sets, folder)
        rates = calibration.measured(config, listing, f"{folder}/parts")
        bar.update(1)
        trial = _trial(config, listing, f"{folder}/trial")
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "import vop.pipeline"], check=True)
        with cluster.connect(trial.cluster):
            connected = time.monotonic()
            batch = config.retrieval.query_batch * rates.patches * rates.width * 2
            rates = dataclasses.replace(rates, message_s=message_seconds(batch))
            bar.update(1)
            job = register(trial)
            done = time.monotonic()
        around = time.monotonic() - done + connected - start
        bar.update(1)
        return dataclasses.replace(rates, fixed_s=_fixed(trial, rates, job.timings, around))


def _sample(config: Config, sets: ImageSets | None, folder: str) -> pa.Table:
    """The images that rates are measured on: of the collection, or rendered."""
    if sets is None:
        scene, width = rendered.scene_for(RENDERED), config.plan.image_width
        for index in range(RENDERED):
            frame = rendered.render_frame(scene, index, mixed=False).image
            large = cv2.resize(frame, (width, round(width * 3 / 4)), interpolation=cv2.INTER_CUBIC)
            files.write_bytes(f"{folder}/images/{index:04d}.jpg", to_jpeg(large, rendered.QUALITY))
        images = list_images(f"{folder}/images").images
        sets = ImageSets(f"{folder}/images", images, (), (), {})
    listing = sets.listing().sort_by("name")
    listing = listing.filter(pc.greater(listing["size"], 0))
    if listing.num_rows < calibration.FEWEST:
        raise ConfigError(
            f"there are {listing.num_rows} images that are not empty, but rates are measured on {calibration.FEWEST} "
            "at least: so few need no plan; or give plan.images=N without images=, and rendered ones are measured"
        )
    return listing.take(pa.array(calibration.stretches(listing.num_rows)))


def _trial(config: Config, listing: pa.Table, folder: str) -> Config:
    """The small job: the settings of the large one, cut so that every core has work."""
    count = min(TRIAL, listing.num_rows)
    listed = f"{folder}/images.txt"
    files.write_bytes(listed, "".join(f"{path}\n" for path in listing["path"].to_pylist()[:count]).encode())
    encoders = config.embedding.encoders or os.cpu_count()
    nothing = dict.fromkeys(("queries", "database", "store", "truth", "positions", "cameras"))
    return dataclasses.replace(
        config,
        **nothing,
        images=listed,
        output=f"{folder}/run",
        dataset=DatasetConfig(),
        pairs=PairsConfig(),
        embedding=dataclasses.replace(config.embedding, shard_size=-(-count // encoders), sample=SAMPLED),
        retrieval=dataclasses.replace(config.retrieval, device="cpu", cache=None, shards=None, index="Flat"),
        cluster=dataclasses.replace(config.cluster, address=None),
    )


def _fixed(trial: Config, rates: Rates, timings: dict[str, float], around: float) -> dict[str, float]:
    """What the small job took beyond what the model says its images take."""
    count = min(TRIAL, rates.measured_images)
    told = PlanConfig(gpus_per_node=int(rates.device == "cuda"))
    small = plan.make(here(dataclasses.replace(trial, plan=told)), rates, Asked(count, count, count, True))
    embed, search, lists = (small.stage(name) for name in ("embed", "search", "lists"))
    sample = small.seconds_of("embed", "sample")
    took = {
        "models": timings["load models"] - sample,
        "embed": sum(timings[step] for step in ("plan", "embed", "finish store")) - (embed.seconds - sample),
        "search": sum(timings[step] for step in ("radius", "search")) - search.seconds,
        "pairs": timings["write pairs"] - lists.seconds,
        "report": timings.get("report", 0.0),
    }
    named = ("load models", "plan", "embed", "finish store", "radius", "search", "write pairs", "report")
    took["start"] = around + timings["total"] - sum(timings.get(step, 0.0) for step in named)
    return {name: round(max(0.0, took[name]), 3) for name in SECONDS}


def to_json(made: Plan) -> dict:
    """A plan as its file holds it: sizes, seconds by stage and part, limits, changes, rates."""
    found = changes.remedies(made) if made.limits else changes.cheapest(made)
    stage, part = made.bottleneck()
    return {
        "images": made.work.images,
        "queries": made.work.queries,
        "machines": dataclasses.asdict(made.machines),
        "seconds": made.seconds,
        "bill": made.bill,
        "pairs_scored": made.work.pairs_scored,
        "store_shards": made.work.shards,
        "driver_bytes": made.work.driver_bytes,
        "stages": {
            one.name: {
                "seconds": one.seconds,
                "gpu_hours": one.cards * one.seconds / 3600,
                "actors": one.actors,
                "shards": one.shards,
                "actor_bytes": one.actor_bytes,
                "disk_bytes": one.disk,
                "traffic": dataclasses.asdict(one.traffic),
                "parts_s": {part.name: part.seconds for part in (*one.serial, *one.together)},
            }
            for one in made.stages
        },
        "bottleneck": {"stage": stage.name, "part": part.name, "seconds": part.seconds},
        "limits": [dataclasses.asdict(limit) for limit in made.limits],
        "changes": [
            {"change": one.label, "seconds": one.plan.seconds, "bill": one.bill, "price": one.price} for one in found
        ],
        "rates": made.work.rates.to_json(),
    }
