"""Seconds and peak memory of choosing a pair list from scored pairs, as `vop register` does after its search.

    python benchmarks/graph.py [--pairs 1000000 10000000] [--rounds 3]

A synthetic ranking, 20 directed pairs per image (so 10 million pairs are 500,000 images): most within 40 images of the
query in a walk through the collection, some anywhere, scores with ties. It is written to a pairs.parquet as a search
writes it, one row group for 64 queries. Then, each round in a process of its own: read it (`read`), merge the
directions (`merge`), add sequence and position neighbours (`near`) and choose half as many pairs as there are, forest
first (`choose`), number the connected components (`scenes`), write pair_list.parquet, pairs.txt and scenes.parquet
(`write`). Seconds are medians; peak memory is the process's own (Linux), of which `base` were used before reading. The
last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vop import pairs
from vop.retrieval import graph

K, QUERIES = 20, 64  # pairs per image, queries per row group
STEPS = ("read", "merge", "near", "choose", "scenes", "write")


def image_names(count: int) -> list[str]:
    return [f"scene-{row // 10_000:03d}/camera/{row:08d}.jpg" for row in range(count)]


def write_ranking(path: Path, count: int) -> None:
    """Write `count` scored pairs in `pairs.SCHEMA`."""
    rng, images = np.random.default_rng(0), count // K
    names = pa.array(image_names(images))
    steps = np.array([step for step in range(-40, 41) if step])
    with pq.ParquetWriter(path, pairs.SCHEMA) as writer:
        for start in range(0, images, QUERIES):
            query = np.arange(start, min(start + QUERIES, images))
            found = query[:, None] + np.stack([rng.choice(steps, K, replace=False) for _ in query])
            found[:, -1] = rng.integers(images, size=len(query))
            clash = (found[:, -1:] == query[:, None]) | (found[:, :-1] == found[:, -1:]).any(axis=1, keepdims=True)
            found[:, -1:] = np.where(clash, query[:, None] + 41, found[:, -1:])
            found %= images
            score = -np.sort(-rng.integers(1, 4096, found.shape).astype(np.float32) / 64, axis=1)
            columns = {
                "query": names.take(pa.array(np.repeat(query, K))),
                "database": names.take(pa.array(found.ravel())),
                "rank": np.tile(np.arange(K, dtype=np.int32), len(query)),
                "score": score.ravel(),
                "weighted": score.ravel(),
                "shortlist_rank": np.tile(np.arange(K, dtype=np.int32), len(query)),
                "shortlist_score": score.ravel(),
            }
            writer.write_table(pa.table(columns, schema=pairs.SCHEMA))


def peak_mb() -> float:
    """Peak memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def choose(folder: str, count: int, send) -> None:
    """Choose a list from the ranking in `folder`; sends seconds by step and MB."""
    images = count // K
    names = image_names(images)
    places = np.cumsum(np.random.default_rng(1).normal(size=(images, 3)), axis=0)
    marks, base = [time.perf_counter()], peak_mb()
    ranked = pairs.read_rows(f"{folder}/pairs.parquet", names)
    marks.append(time.perf_counter())
    scored = graph.undirected(*ranked)
    del ranked
    marks.append(time.perf_counter())
    near = graph.sequence(names, 2), graph.neighbours(places, 2)
    marks.append(time.perf_counter())
    listed = graph.choose(scored, images, len(scored) // 2, sequence=near[0], neighbours=near[1])
    marks.append(time.perf_counter())
    component, sizes = graph.components([(listed.pairs.low, listed.pairs.high)], images)
    marks.append(time.perf_counter())
    chosen = listed.pairs
    pairs.write_list(f"{folder}/pair_list.parquet", names, chosen.low, chosen.high, chosen.score, listed.source)
    pairs.write_hloc(f"{folder}/pairs.txt", pairs.iterate(f"{folder}/pair_list.parquet"))
    pairs.write_scenes(f"{folder}/scenes.parquet", names, component, sizes)
    marks.append(time.perf_counter())
    seconds = dict(zip(STEPS, np.diff(marks).tolist(), strict=True)) | {"total": marks[-1] - marks[0]}
    numbers = {"unordered": len(scored), "forest": listed.forest, "chosen": len(chosen), "components": len(sizes)}
    send.send((seconds, {"base_mb": base, "peak_mb": peak_mb()} | numbers))


def in_process(function, *arguments):
    """What `function` sends to its last argument, run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed; the reason stands above") from None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000], help="scored, directed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    result: dict[str, object] = {"rounds": options.rounds}
    columns = [*STEPS, "total"]
    print(f"median seconds of {options.rounds} rounds")
    print(f"{'scored':>10} {'unordered':>10} {'chosen':>9} " + " ".join(f"{name:>7}" for name in columns)
          + f" {'base MB':>8} {'peak MB':>8}")  # fmt: skip
    for count in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            write_ranking(Path(folder) / "pairs.parquet", count)
            rounds = [in_process(choose, folder, count) for _ in range(options.rounds)]
        seconds = {name: round(statistics.median(times[name] for times, _ in rounds), 2) for name in columns}
        facts = {name: round(max(fact[name] for _, fact in rounds)) for name in rounds[0][1]}
        print(f"{count:>10} {facts['unordered']:>10} {facts['chosen']:>9} "
              + " ".join(f"{seconds[name]:>7.2f}" for name in columns)
              + f" {facts['base_mb']:>8} {facts['peak_mb']:>8}")  # fmt: skip
        result[f"n{count}"] = {f"{name}_s": value for name, value in seconds.items()} | facts
    print(json.dumps(result))


if __name__ == "__main__":
    main()
