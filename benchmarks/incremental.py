"""What a search costs that adds images to a collection, against one that knows nothing; and pairs scored once or twice.

    python benchmarks/incremental.py [--images 4000] [--added 0.05] [--patches 256] [--embedding 256]

Synthetic images (`vop.datasets.synthetic`) of which every twentieth, by name, is held back: `vop register` pairs the
others (`first`), the missing ones are added to the store, and the same command runs again in the same run directory
(`added`). A run in a new directory knows nothing of it (`full`): its pairs must be the same, or the benchmark fails.
`one-sided` is the full run again with `retrieval.reuse_gb=0`: pairs of images that rank each other are then scored from
both sides unless both are in the same batch of queries. Its pairs must be the same too.

`scored` counts pairs of images whose patches were compared, `known` those taken from elsewhere. `shards_s` are the
seconds that the search actors worked, added up, the loading of what is compiled included; `search_s` those of the step,
with the start of the actors; `total_s` those of the command; `kept_bytes` is what the votes take on disk, per image.
The runs take turns for `--rounds`; seconds are medians. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from embed import CORES, busy_cores

RUNS = {"first": {}, "added": {}, "full": {}, "one-sided": {"reuse_gb": 0.0}}
SHOWN = ("queries", "scored", "known", "shards_s", "search_s", "total_s", "kept_bytes")


def register(store: Path, output: Path, radius: float, settings: dict) -> dict:
    """Run the command; returns what it did and took."""
    import vop

    run = vop.register(
        store=str(store), output=str(output), retrieval={"radius": radius} | settings, report={"queries": 0}
    )
    kept = sum(path.stat().st_size for path in output.glob("votes-*/*"))
    return {
        "queries": run.counts["queries"],
        "scored": run.counts["pairs_scored"],
        "known": run.counts["pairs_known"],
        "shards_s": sum(run.counts["shard_seconds"]),
        "search_s": run.timings["search"],
        "total_s": run.timings["total"],
        "kept_bytes": round(kept / run.counts["queries"]),
    }


def same_pairs(one: Path, other: Path) -> int:
    """How many pairs two runs have found. SystemExit unless they are the same, to the last bit of the scores."""
    from vop import pairs

    tables = [pairs.read_parquet(str(output / "pairs.parquet")) for output in (one, other)]
    if not tables[0].equals(tables[1]):
        raise SystemExit(f"{one.name} and {other.name} differ: {tables[0].num_rows} and {tables[1].num_rows} pairs")
    return tables[0].num_rows


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, dict], int]:
    """One round of all runs, by name, and how many pairs there are."""
    from vop.datasets.synthetic import World, write_store

    world = World(options.images, options.patches, options.embedding, options.embedding)
    store, every = folder / "store", round(1 / options.added)
    write_store(str(store), world, numbers=[number for number in range(world.images) if number % every != every // 2])
    runs = {}
    for name, settings in RUNS.items():
        if name == "added":
            write_store(str(store), world)
        output = folder / ("first" if name == "added" else name)
        runs[name] = register(store, output, options.radius, settings)
    found = {same_pairs(folder / name, folder / "full") for name in ("first", "one-sided")}
    return runs, found.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--added", type=float, default=0.05, help="share of the images that are added")
    parser.add_argument("--patches", type=int, default=256, help="a square number")
    parser.add_argument("--embedding", type=int, default=256)
    parser.add_argument("--radius", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()

    rounds, others = [], []
    for _ in range(options.rounds):
        others.append(busy_cores())
        with tempfile.TemporaryDirectory() as temporary:
            runs, found = measure(Path(temporary), options)
        rounds.append(runs)
    table = {name: {key: statistics.median(runs[name][key] for runs in rounds) for key in SHOWN} for name in RUNS}
    print(f"{CORES} cores, {statistics.median(others):.2f} of them busy with other work; P = {options.patches}, "
          f"E = {options.embedding}, radius {options.radius}; {found} pairs, the same from every way")  # fmt: skip
    print(f"{'':<10} " + " ".join(f"{key:>10}" for key in SHOWN) + f" {'scored/full':>12} {'shards/full':>12}")
    for name, row in table.items():
        shares = [row[key] / table["full"][key] for key in ("scored", "shards_s")]
        cells = " ".join(f"{row[key]:>10,.1f}" if key.endswith("_s") else f"{row[key]:>10,.0f}" for key in SHOWN)
        print(f"{name:<10} {cells} " + " ".join(f"{share:>12.3f}" for share in shares))
    result = {"cores": CORES, "images": options.images, "patches": options.patches, "embedding": options.embedding}
    result |= {"added": options.added, "pairs": found, "rounds": options.rounds}
    print(json.dumps(result | {"others_busy_cores": round(statistics.median(others), 2)} | table))


if __name__ == "__main__":
    main()
