"""Time and memory of a search as the collection grows to 100,000 images, and what follows for 1 and 100 million.

    python benchmarks/scale.py [--sizes 1000,10000,100000] [--queries 1000] [--data DIR] [--keep]

The images are those of `vop.datasets.synthetic`: 256 patches of width 256, float16, whose neighbours share landmarks
(131 kB an image: 13 GB for 100,000, made and written shard by shard). Every size is the first images of one store.

For each size `vop retrieve` runs twice, each time in a process of its own, with a shortlist and votes of K = 20 for
`--queries` images spread evenly over the collection (all of them, if it has no more). First with one batch of queries
and an empty `retrieval.cache`: how long the search actors take to write their memory-mapped copies. Then with all
queries: the stages. `read`, `send`, `merge` and `write` are the driver's, timed around its functions; `shortlist` and
`votes` are the actors', as they report it, added up over actors; all are wall clock, so that waiting for the disk and
for a core counts. The first call of every function is left out: it loads what is compiled. Stages overlap: `wall` is
the median time from one batch of queries to the next, per query. `prepare` is what the driver does before (catalog,
names, fingerprints); `start` is from the start of the actors until they answer.

Every query is sent to every shard, so more shards cost something even where they have nothing to add. That is measured
apart, for the projection: a query at a shard of 64 images without a pair to score, and one message to an actor.

Memory is sampled from /proc (Linux): largest anonymous memory, mapped files (which the system may drop; the copies of
the descriptors are there) and shared memory (Ray's objects, seen by everyone) of every process. The growth exponent is
the slope of log seconds over log images. The last line is one JSON object.

The store takes 132 MB per 1,000 images and the copies as much again: 27 GB for 100,000. With --data they lie in DIR,
and a killed run goes on with the store that it finds there. Without --keep they are deleted in the end, except for a
store that was there before.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from embed import CORES, busy_cores, process_tree

P = E = G = 256
IMAGE_BYTES = 2 * P * E
K, BATCH, SHARD_SIZE = 20, 64, 256
DRIVER, ACTORS = ("read", "send", "merge", "write"), ("shortlist", "votes")
SAMPLING_S = 0.2
KINDS = {"RssAnon": "anonymous", "RssFile": "files", "RssShmem": "shared"}
# The cluster of the projection.
NODES, NODE_CORES, NODE_GB, LINK_GB_S, DISK_GB_S = 16, 32, 256, 3.1, 2.0
PROJECTED = 10**6, 10**8


class Clock:
    """Seconds of calls by stage and function, gathered by wrapping functions of the package."""

    def __init__(self):
        self.calls: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def seconds(self, stage: str) -> float:
        """Seconds of a stage, as if the first call of each function had taken as long as the others."""
        return sum(self.each(stage, name) * len(took) for name, took in self.calls[stage].items())

    def each(self, stage: str, name: str) -> float:
        """Seconds of one call of a function."""
        took = self.calls[stage][name]
        return float(np.mean(took[1:] or took))

    def wrap(self, owner, name: str, stage: str) -> None:
        """Count every call of `owner.name` for a stage."""
        inner = getattr(owner, name)

        def timed(*arguments, **keywords):
            start = time.perf_counter()
            try:
                return inner(*arguments, **keywords)
            finally:
                self.calls[stage][f"{owner.__name__}.{name}"].append(time.perf_counter() - start)

        setattr(owner, name, timed)

    def wrap_actors(self, shards) -> None:
        """Count what the actors of a `Shards` class report: they are asked with as many references as listed here."""
        inner, stages = shards._wait, {0: "load", 1: "shortlist", 2: "votes"}

        def wait(running, asked):
            before = running.busy.sum()
            answers = inner(running, asked)
            self.calls[stages[len(asked.given)]]["_wait"].append(running.busy.sum() - before)
            return answers

        shards._wait = wait


def retrieve(folder: str, output: str, queries: list[str], database: list[str], radius: float, answer) -> None:
    """One `vop retrieve`, in this process; sends what it took."""
    import ray

    import vop
    from vop import pairs
    from vop.parts import Parts
    from vop.retrieval import search as searching
    from vop.retrieval import shortlist, voting
    from vop.retrieval.reuse import Reuse
    from vop.stages import cluster
    from vop.stages import search as stage
    from vop.store import Selection

    clock = Clock()
    for owner, names, counted in [
        (Selection, ["read"], "read"),
        (searching, ["masks"], "read"),
        (ray, ["put"], "send"),
        (ray.actor.ActorMethod, ["remote"], "send"),
        (stage, ["_answer"], "send"),
        (voting, ["merge"], "merge"),
        (shortlist, ["merge"], "merge"),
        (Reuse, ["want", "add", "complete", "recall"], "merge"),
        (searching.Search, ["candidates", "rank"], "merge"),
        (searching.Search, ["kept"], "write"),
        (Parts, ["write"], "write"),
        (pairs, ["write", "finish"], "write"),
        (cluster, ["_start"], "ray"),
    ]:
        for name in names:
            clock.wrap(owner, name, counted)
    clock.wrap_actors(stage.Shards)
    waited, held = [], []

    class Shards(stage.Shards):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            waited.append(time.perf_counter())

        def rank(self, numbers):
            waited.append(time.perf_counter())
            held.append(memory_mb("self")["anonymous"])
            return super().rank(numbers)

    stage.Shards = Shards
    where = Path(folder)
    for name, listed in (("queries", queries), ("database", database)):
        (where / f"{name}.txt").write_text("".join(f"{line}\n" for line in listed))
    run = vop.retrieve(
        queries=str(where / "queries.txt"),
        database=str(where / "database.txt"),
        store=str(where / "store"),
        output=str(where / output),
        retrieval={"shortlist": K, "k": K, "radius": radius, "query_batch": BATCH, "cache": str(where / "cache")},
        report={"queries": 0},
        cluster={"object_store_gb": 2.0},
    )
    counts, timings, ray_s = run.counts, run.timings, clock.seconds("ray")
    answer.send(
        {stage: clock.seconds(stage) / len(queries) for stage in (*DRIVER, *ACTORS)}
        | {"message": clock.each("send", "ActorMethod.remote") + clock.each("send", f"{stage.__name__}._answer")}
        | {"wall": counts["seconds_per_batch"]["p50"] / min(BATCH, len(queries))}
        | {"prepare": timings["total"] - timings["search"] - timings["write pairs"] - ray_s}
        | {"start": waited[1] - waited[0], "total": timings["total"], "held_mb": held[0], "counts": counts}
    )


def memory_mb(process: int | str) -> dict[str, float] | None:
    """Resident memory of a process by kind, MB; None if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().split("\n")
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if line)
    return {kind: int(values.get(name, "0 kB").split()[0]) * 1024 / 1e6 for name, kind in KINDS.items()}


class Memory(threading.Thread):
    """Watches a process and its descendants; `peaks` are MB by process and kind."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.process, self.done = process, threading.Event()
        self.peaks: dict[int, dict[str, float]] = {}
        self.names = {process: "driver"}

    def run(self) -> None:
        while not self.done.wait(SAMPLING_S):
            for process in process_tree(self.process):
                self._look(process)

    def _look(self, process: int) -> None:
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:
            return
        if command.startswith(b"ray::SearchShard"):  # a worker is idle before it is an actor
            self.names[process] = "actor"
        if now := memory_mb(process):
            peak = self.peaks.setdefault(process, now)
            self.peaks[process] = {kind: max(peak[kind], value) for kind, value in now.items()}

    def report(self) -> dict[str, dict[str, int]]:
        """Peaks of the driver, of every actor, and of Ray's own processes, added up."""
        found: dict[str, dict[str, int]] = {}
        for process, peak in sorted(self.peaks.items()):
            name = self.names.get(process, "Ray's own, added up")
            if name == "actor":
                name = f"actor {sum(known.startswith('actor') for known in found)}"
            known = found.setdefault(name, dict.fromkeys(KINDS.values(), 0))
            for kind, value in peak.items():
                known[kind] += round(value)
        return found


def in_process(function, *arguments) -> tuple[dict, dict]:
    """What `function` sends to its last argument, run in a process of its own, and its peaks of memory."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, send))
    process.start()
    send.close()
    watch = Memory(process.pid)
    watch.start()
    try:
        return receive.recv(), watch.report()
    except EOFError:
        raise SystemExit(f"{function.__name__} failed; the reason stands above") from None
    finally:
        watch.done.set()
        process.join()


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, world, size: int, count: int, radius: float) -> dict:
    """Both runs of one size."""
    names = [world.name(number) for number in range(size)]
    queries = [names[i] for i in np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))]
    for stale in ("cache", "first", "run"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    others = busy_cores()
    first, filling = in_process(retrieve, str(folder), "first", queries[:BATCH], names, radius)
    found, memory = in_process(retrieve, str(folder), "run", queries, names, radius)
    others = max(others, busy_cores())
    done, counted = len(queries), found["counts"]
    idle = shard_costs(folder / "store", names, radius)
    result = {"images": size, "queries": done, "shards": len(counted["shard_seconds"])}
    result |= {"pairs_per_query": round(counted["pairs_scored"] / done, 2), "others_busy_cores": round(others, 2)}
    result |= quality(folder / "run", world)
    result["ms_per_query"] = {name: 1e3 * found[name] for name in ("wall", *DRIVER, *ACTORS)}
    result["once_s"] = {"fill": first["start"], "start": found["start"], "prepare": found["prepare"]}
    result["units_s"] = {
        "shortlist_query": found["shortlist"],
        "votes_pair": (found["votes"] - result["shards"] * idle["votes"]) * done / counted["pairs_scored"],
        "shard_shortlist": idle["shortlist"],
        "shard_votes": idle["votes"],
        "message": found["message"],
    }
    result |= {"total_s": found["total"], "held_mb": found["held_mb"], "memory_mb": memory}
    result["filling_mb"] = {name: peak for name, peak in filling.items() if name.startswith("actor")}
    disk = {"cache": size_of(folder / "cache"), "run": size_of(folder / "run")}
    result["disk_mb"] = {name: round(value / 1e6, 2) for name, value in disk.items()}
    for stale in ("cache", "first", "run", "queries.txt", "database.txt"):
        path = folder / stale
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result


def shard_costs(store: Path, names: list[str], radius: float) -> dict[str, float]:
    """Seconds of a query at a shard of few images that has none of its pairs: what more shards cost in all."""
    from vop.retrieval.index import ShardIndex, Wanted
    from vop.store import EmbeddingStore

    globals_, patches = EmbeddingStore.open(str(store)).select(names[: 2 * BATCH]).read()
    shard, batch = ShardIndex(patches[:BATCH], globals_[:BATCH], np.arange(BATCH)), slice(-BATCH, None)
    nothing = Wanted(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))
    asked = {
        "shortlist": lambda: shard.shortlist(globals_[batch], K),
        "votes": lambda: shard.votes(patches[batch], None, nothing, radius),
    }
    took = {}
    for name, ask in asked.items():
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            ask()
            seconds.append(time.perf_counter() - start)
        took[name] = float(np.median(seconds)) / BATCH
    return took


def quality(run: Path, world) -> dict[str, float]:
    """Whether the data are like photographs: hits among patches that met, and pairs that really overlap."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    kept = [pq.read_table(part, columns=["counts"])["counts"] for part in sorted(run.glob("votes-*/*.parquet"))]
    hits, pairs = sum(pc.sum(pc.list_flatten(part)).as_py() or 0 for part in kept), sum(map(len, kept))
    ranked = pq.read_table(run / "pairs.parquet", columns=["query", "database", "rank"])
    best = ranked.filter(pc.equal(ranked["rank"], 0))
    numbers = (np.array([world.number(name) for name in best[side].to_pylist()]) for side in ("query", "database"))
    return {
        "hit_density": round(hits / pairs / P**2, 5),
        "best_overlaps": round(float(np.mean(world.overlap(*numbers) > 0)), 4),
    }


def exponent(results: list[dict], value) -> float | None:
    """Slope of log value over log images; None where a value is 0 or there is one size."""
    values = [value(result) for result in results]
    if len(results) < 2 or min(values) <= 0:
        return None
    return round(float(np.polyfit(np.log([result["images"] for result in results]), np.log(values), 1)[0]), 2)


def table(results: list[dict]) -> dict[str, float | None]:
    """Print stages, memory and disk by size; returns the exponents of the stages."""
    exponents: dict[str, float | None] = {}

    def line(label: str, value, digits: int = 2, grows: bool = True) -> None:
        slope = exponent(results, value) if grows else None
        if grows:
            exponents[label.strip()] = slope
        numbers = "".join(f"{value(result):>12,.{digits}f}" for result in results)
        print(f"{label:<34}{numbers}" + (f"{slope:>10.2f}" if slope is not None else ""))

    print(f"{'images':<34}" + "".join(f"{result['images']:>12,}" for result in results) + f"{'exponent':>10}")
    line("queries", lambda r: r["queries"], 0, False)
    line("pairs scored per query", lambda r: r["pairs_per_query"], 1, False)
    line("hits among patch pairs, %", lambda r: 100 * r["hit_density"], 2, False)
    line("best image overlaps, %", lambda r: 100 * r["best_overlaps"], 1, False)
    line("other work, busy cores", lambda r: r["others_busy_cores"], 2, False)
    print("ms per query")
    for name in ("wall", *DRIVER, *ACTORS):
        line(f"  {name}", lambda r, name=name: r["ms_per_query"][name])
    line("  votes, per pair", lambda r: 1e3 * r["units_s"]["votes_pair"], 3)
    print("seconds, once")
    for name, meaning in (("prepare", "prepare"), ("fill", "start, cache empty"), ("start", "start, cache there")):
        line(f"  {meaning}", lambda r, name=name: r["once_s"][name], 1)
    print("peak memory, MB: anonymous + mapped files + shared")
    for process in sorted({process for result in results for process in result["memory_mb"]}):
        cells = (result["memory_mb"].get(process) for result in results)
        print(f"  {process:<32}" + "".join(f"{_memory(cell):>18}" for cell in cells))
    cells = (max(r["filling_mb"].values(), key=lambda peak: sum(peak.values())) for r in results)
    print(f"  {'an actor that fills the cache':<32}" + "".join(f"{_memory(cell):>18}" for cell in cells))
    print("disk, MB")
    line("  store (all that is there)", lambda r: r["disk_mb"]["store"], 0, False)
    line("  cache", lambda r: r["disk_mb"]["cache"], 0, False)
    line("  run (pairs, kept votes)", lambda r: r["disk_mb"]["run"], 1, False)
    return exponents


def _memory(peak: dict[str, int] | None) -> str:
    return "" if peak is None else " + ".join(str(peak[kind]) for kind in KINDS.values())


def per_image(results: list[dict], memory) -> float:
    """Bytes that every image adds to a memory in MB: growth between the largest two sizes."""
    small, large = results[-2:]
    return max(0.0, 1e6 * (memory(large) - memory(small)) / (large["images"] - small["images"]))


def _of_actors(result: dict) -> float:
    """Anonymous memory of all actors, MB."""
    return sum(peak["anonymous"] for name, peak in result["memory_mb"].items() if name.startswith("actor"))


def duration(seconds: float) -> str:
    """For people."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def unit_costs(results: list[dict]) -> dict[str, float]:
    """What the projection is made of, by name; seconds and bytes."""
    largest = results[-1]
    # Sampled queries lie in row groups of their own; those of `register` share them, as where all images are queries.
    dense = next((result for result in results if result["queries"] == result["images"]), largest)
    driver = {name: largest["ms_per_query"][name] / 1e3 for name in DRIVER}
    units = dict(largest["units_s"])
    query = units.pop("shortlist_query") - largest["shards"] * units["shard_shortlist"]
    # One message to every shard for each of two questions and a batch; the projection counts those of its own shards.
    driver["send"] -= 2 * largest["shards"] * units["message"] / BATCH
    return units | {
        **driver,
        "shortlist_query_row": max(query, 0.0) / largest["images"],
        "read": dense["ms_per_query"]["read"] / 1e3,
        "actor_bytes": per_image(results, _of_actors),
        "driver_bytes": per_image(results, lambda result: result["held_mb"]),
        "run_bytes": 1e6 * largest["disk_mb"]["run"] / largest["queries"],
    }


def project(unit: dict[str, float], N: int) -> dict[str, float]:
    """Print what N images, all against all, take on the cluster; returns the seconds and gigabytes."""
    cores, link, disk = NODES * NODE_CORES, LINK_GB_S * 1e9, DISK_GB_S * 1e9
    shard, node = N // cores, N * IMAGE_BYTES / NODES
    row, pair, driver = unit["shortlist_query_row"], unit["votes_pair"], sum(unit[name] for name in DRIVER)
    asked, counted, message = unit["shard_shortlist"], unit["shard_votes"], 2 * cores * unit["message"] / BATCH
    steps = {
        "shortlist": (
            N * (row * N + asked * cores) / cores,
            f"{N:.0e} queries x ({1e9 * row:.3g} ns x {N:.0e} rows + {1e3 * asked:.3g} ms x {cores} shards) "
            f"/ {cores} cores",
        ),
        "votes": (
            N * (pair * K + counted * cores) / cores,
            f"{N:.0e} queries x ({1e3 * pair:.3g} ms x {K} + {1e3 * counted:.3g} ms x {cores} shards) / {cores} cores",
        ),
        "driver": (
            (driver + message) * N,
            f"{N:.0e} queries x ({1e3 * driver:.3g} ms + {1e3 * unit['message']:.3g} ms x {2 * cores} messages "
            f"/ {BATCH})",
        ),
        "network": (
            node * NODES**2 / link,
            f"{IMAGE_BYTES} bytes x {N:.0e} queries x {NODES} nodes / {LINK_GB_S} GB/s",
        ),
        "cache": (2 * node / disk, f"2 x {node / 1e9:,.3g} GB a node / {DISK_GB_S} GB/s, read and written once"),
    }
    slowest = max(steps, key=lambda name: steps[name][0])
    if slowest == "shortlist":
        lists = 2 ** round(np.log2(4 * shard**0.5))
        probed = max(1, lists // 128)
        compared = cores * (lists + shard * probed / lists)
        steps["by IVF"] = (
            N * (row * compared + asked * cores) / cores,
            f"IVF{lists},Flat, nprobe {probed}: {N:.0e} x {cores} shards x ({lists} + {shard:,} x {probed} / {lists}) "
            "rows, if one costs as much",
        )
    print(f"\n{N:,} images, {shard:,} in a shard")
    for name, (seconds, arithmetic) in steps.items():
        mark = "   <- bottleneck" if name == slowest else ""
        print(f"  {name:<10} {duration(seconds):>10} = {arithmetic}{mark}")
    own, catalog = N * unit["actor_bytes"] / NODES, N * unit["driver_bytes"]
    fits = "fit" if node + own < NODE_GB * 1e9 else "do not fit (retrieval.cache leaves patches on disk)"
    print(
        f"  memory     a node: {node / 1e9:,.3g} GB of patches and {own / 1e9:,.3g} GB of the actors' own {fits} in "
        f"{NODE_GB} GB\n             driver: {catalog / 1e9:,.3g} GB for names and numbers\n"
        f"  disk       store {N * IMAGE_BYTES / 1e12:.3g} TB, cache {node / 1e12:.3g} TB a node, pairs and kept votes "
        f"{N * unit['run_bytes'] / 1e12:.3g} TB"
    )
    sizes = {"node_gb": (node + own) / 1e9, "driver_gb": catalog / 1e9}
    return {name: round(value, 1) for name, value in ({k: v[0] for k, v in steps.items()} | sizes).items()}


def projection(results: list[dict]) -> dict:
    """Print the projections and where the bottlenecks lie; returns the numbers."""
    unit = unit_costs(results)
    row, votes = unit["shortlist_query_row"], K * unit["votes_pair"]
    driver = sum(unit[name] for name in DRIVER)
    asked, counted, message = (1e3 * unit[name] for name in ("shard_shortlist", "shard_votes", "message"))
    print(
        f"\nprojection: every image is a query (`register`), one actor a core, on {NODES} nodes of {NODE_CORES} cores "
        f"like these,\n{NODE_GB} GB, {LINK_GB_S} GB/s network and {DISK_GB_S} GB/s disk; costs as at the largest size "
        "(read: where all are queries):\n"
        f"  shortlist  {1e9 * row:.3g} ns for a query and a row, {asked:.3g} ms for a query and a shard\n"
        f"  votes      {1e3 * unit['votes_pair']:.3g} ms for a pair ({K} a query, down to half of them while "
        f"retrieval.reuse_gb lasts), {counted:.3g} ms for a query and a shard\n"
        f"  driver     {' + '.join(f'{name} {1e3 * unit[name]:.3g}' for name in DRIVER)} = {1e3 * driver:.3g} ms for a "
        f"query, {message:.3g} ms for a message\n"
        f"  an image   {IMAGE_BYTES:,} bytes of patches, {unit['actor_bytes']:,.0f} of its actor's own memory, "
        f"{unit['driver_bytes']:,.0f} of the driver's"
    )
    projected: dict[str, object] = {f"{N:.0e}": project(unit, N) for N in PROJECTED}
    equal = round(votes / row)
    busy = (votes + row * PROJECTED[0]) / driver
    print(
        "\nThe flat shortlist of a query grows with the collection, that of all queries with its square. It takes as "
        f"long as the\nvotes of {K} pairs at {1e3 * votes:.3g} ms / {1e9 * row:.3g} ns = {equal:,} images; well "
        "beyond, retrieval.index must be an IVF string.\nEvery query visits every shard: fewer, larger shards and a "
        "larger retrieval.query_batch save visits and messages.\nThe driver is one process: at "
        f"{PROJECTED[0]:,} images the rows and pairs of a query take {busy:.1f} times as long as its\npart, messages "
        "aside, so it keeps at most so many cores busy. More cores need several `vop retrieve`, each with a\nshare of "
        "the queries, whose pairs are appended."
    )
    return projected | {"units": unit, "shortlist_equals_votes_at": equal, "cores_for_one_driver": round(busy, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="1000,10000,100000", help="images, rising, comma between")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--radius", type=float, default=0.3)
    parser.add_argument("--data", type=Path, help="folder for the store and the copies; default: temporary")
    parser.add_argument("--keep", action="store_true", help="leave the store in --data")
    options = parser.parse_args()
    sizes = sorted(int(size) for size in options.sizes.split(","))

    from vop.datasets.synthetic import World, write_store

    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.data or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        store, world = folder / "store", World(sizes[-1], P, E, G)
        was_there = store.exists()
        free, needed = shutil.disk_usage(folder).free, 2.1 * sizes[-1] * IMAGE_BYTES - size_of(store)
        if free < needed:
            raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} are needed: choose --data")
        print(f"{CORES} cores; P = E = {P}, float16, K = {K}, radius {options.radius}", flush=True)
        results = []
        try:
            for size in sizes:
                start, before = time.perf_counter(), size_of(store)
                write_store(str(store), World(size, P, E, G), SHARD_SIZE)
                generated, stored = time.perf_counter() - start, size_of(store)
                results.append(measure(folder, world, size, options.queries, options.radius))
                results[-1]["disk_mb"]["store"] = round(stored / 1e6, 2)
                results[-1]["generated"] = {"s": round(generated, 1), "mb": round((stored - before) / 1e6)}
                print(f"{size:,} images: store {generated:.0f} s, measured in "
                      f"{time.perf_counter() - start - generated:.0f} s", flush=True)  # fmt: skip
        finally:
            for made in ("cache", "first", "run", *(() if options.keep or was_there else ("store",))):
                shutil.rmtree(folder / made, ignore_errors=True)
        print()
        exponents = table(results)
        projected = projection(results) if len(results) > 1 else {}
    print(json.dumps({"cores": CORES, "sizes": results, "exponents": exponents, "projected": projected}))


if __name__ == "__main__":
    main()
