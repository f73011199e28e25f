"""Speed of the votes, as one shard actor runs them: one thread, `ShardIndex.votes`, float16 descriptors.

    python benchmarks/votes.py [--masked] [--actor] [--words 39] [--rounds 7]

Timed in turns, every number the median of the rounds:

    sgemm     the machine's own matrix product, one large one on one thread
    votes     a batch of queries against a shortlist of 20 and of 100 images each
    float32   the same without the integer pass (`screens=False`)
    naive     one query against the same: a flat FAISS index of the shortlist's patches, rebuilt for each query, a range
              search and a bincount
    masked    the votes where a quarter of the patches is padding (4:3 images); with `--masked` every line is
    register  100 images, each against all others: every unordered pair once, votes both ways; the naive way needs an
              index of the 99 others for each, is timed on REGISTER_QUERIES of them and multiplied
    actor     with `--actor`: the votes asked of a `SearchShard` through Ray; what it takes there, and until the answer
              is here

GFLOP/s counts the useful work only, 2 P P E for each pair of images, so that the integer pass may exceed the peak.

The data are unkind to the integer pass, as descriptors are: each patch shows one of `--words` things, more or less
blurred, and things come in kinds that look alike. So similarities do not separate: those of the same thing lie from
0.4 to 0.95, on both sides of the threshold 0.7. The pass cannot tell those within about 0.04 below it, and marks 1.3
times as many pairs as hit. With `--words` 80, 39 and 19 about 0.5, 1 and 2% of the pairs hit, and another 0.15, 0.3 and
0.6% are marked in vain. The run measures both shares, hit_density and marked_density. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack

THREADS = 1
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(THREADS)  # before the libraries read it

import faiss  # noqa: E402
import numpy as np  # noqa: E402

from vop.retrieval import kernel, pair_votes, tiles  # noqa: E402
from vop.retrieval.index import ShardIndex, Wanted  # noqa: E402

SHORTLISTS = (20, 100)
REGISTER, REGISTER_QUERIES = 100, 3
SIZE = 2048  # rows and columns of the large product
KINDS = 12
SGEMM = f"""
import time, numpy as np
a, b = np.random.default_rng(0).standard_normal((2, {SIZE}, {SIZE}), dtype=np.float32)
def run():
    start = time.perf_counter()
    a @ b
    return 2 * {SIZE}**3 / (time.perf_counter() - start) / 1e9
run()
print(np.median([run() for _ in range(7)]))
"""


def sgemm_all_threads() -> float:
    """GFLOP/s of the large product on every core, in a process of its own: BLAS reads its thread count once."""
    threads = {"OPENBLAS_NUM_THREADS": str(os.cpu_count()), "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-c", SGEMM]
    return float(subprocess.run(command, env=os.environ | threads, capture_output=True, check=True, text=True).stdout)


def collection(images: int, P: int, E: int, words: int) -> np.ndarray:
    """Unit descriptors (images, P, E) float16; see the module."""
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((KINDS, E), dtype=np.float32)
    things = 0.6 * kinds[np.arange(words) % KINDS] + 0.8 * rng.standard_normal((words, E), dtype=np.float32)
    blur = rng.uniform(0.2, 1.2, (images, P, 1)).astype(np.float32)
    patches = things[rng.integers(words, size=(images, P))]
    patches = patches + blur * rng.standard_normal((images, P, E), dtype=np.float32)
    return (patches / np.linalg.norm(patches, axis=-1, keepdims=True)).astype(np.float16)


def naive(x: np.ndarray, y: np.ndarray, radius: float) -> pair_votes.Votes:
    """Votes of x (P, E) for y (K, P, E), both float32, by a FAISS index made for this query."""
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(y.reshape(-1, x.shape[1]))
    limits, similarities, found = index.range_search(x, float(pair_votes.threshold(radius)))
    cell = np.repeat(np.arange(len(x)), np.diff(limits.astype(np.int64))) + found // y.shape[1] * len(x)
    shape = len(y), len(x)
    sums = np.bincount(cell, similarities, shape[0] * shape[1]).reshape(shape)
    return pair_votes.Votes(np.arange(len(y)), sums, np.bincount(cell, minlength=sums.size).reshape(shape), len(y))


def check(votes: pair_votes.Votes, rows: np.ndarray, expected: pair_votes.Votes) -> None:
    """Both ways must find the same, or the comparison says nothing; but a BLAS rounds otherwise at the threshold."""
    counts, sums = (np.zeros(expected.counts.shape) for _ in range(2))
    place = np.searchsorted(rows, votes.rows)
    counts[place], sums[place] = votes.counts, votes.sums
    same = counts == expected.counts
    if np.count_nonzero(~same) > 5:
        raise SystemExit(f"the naive way finds other hits for {np.count_nonzero(~same)} patches: nothing to compare")
    np.testing.assert_allclose(sums[same], expected.sums[same], rtol=1e-5)


def marked_share(x: np.ndarray, y: np.ndarray, radius: float) -> float:
    """Share of the pairs of patches of x (m, E) and y (n, E), both float32, that the integer pass marks."""
    sides = []
    for patches in (x, y):
        levels = np.empty(patches.shape, np.uint8)
        scale, norm, rest = np.array([kernel._quantise(*pair) for pair in zip(patches, levels, strict=True)]).T
        sides.append((scale[:, None] * (levels - np.float32(tiles.LEVEL)), norm, rest))
    (a, norm, rest), (b, other_norm, other_rest) = sides
    bound = (norm + rest).max() * other_rest + np.outer(rest, other_norm)
    return float(np.mean(a @ b.T + bound > pair_votes.threshold(radius)))


def timed_in_turns(ways: dict[Hashable, Callable], rounds: int) -> dict[Hashable, list[float]]:
    """Seconds that each takes in every round; a first round, which compiles and warms up, is left out."""
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Held:
    """What a `SearchShard` is made from, without a store."""

    retrieval = None

    def __init__(self, radius, *arrays):
        self.radius, self.arrays = radius, arrays

    def index(self, rows, fresh):
        return ShardIndex(*self.arrays)


def actor_votes(stack: ExitStack, radius: float, arrays: tuple, queries: np.ndarray, masks) -> Callable:
    """Start Ray and one search actor; returns what asks it for votes, waits, and gives the seconds it took there."""
    from vop.retrieval.search import QueryBatch
    from vop.schema import ClusterConfig
    from vop.stages import cluster, search

    stack.enter_context(cluster.connect(ClusterConfig()))
    ray = search.ray
    given = [ray.put(Held(radius, *arrays)), ray.put((None, None))]
    actor = ray.remote(search.SearchShard).options(num_cpus=0).remote(given)
    ray.get(actor.size.remote())  # until then Ray would forget what nobody holds
    batch = ray.put(QueryBatch(0, queries[:, 0], queries, masks, None, None, None))

    def ask(wanted):
        return ray.get(actor.votes.remote(batch, ray.put(wanted))).seconds

    return ask


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--embedding", type=int, default=256)
    parser.add_argument("--queries", type=int, default=8, help="queries in a batch")
    parser.add_argument("--database", type=int, default=400, help="images in the shard")
    parser.add_argument("--words", type=int, default=39, help="things that patches show: fewer, more hits")
    parser.add_argument("--radius", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--masked", action="store_true", help="4:3 images: the last quarter of the patches is padding")
    parser.add_argument("--actor", action="store_true", help="ask a search actor through Ray as well")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    Q, N, E, radius = options.queries, options.database, options.embedding, options.radius
    every = collection(N + Q, options.patches, E, options.words)
    image = np.arange(options.patches) < options.patches * 3 // 4
    padding = np.tile(image, (N + Q, 1))
    masks, mask = (padding, image) if options.masked else (None, np.ones(options.patches, bool))
    used = int(mask.sum())
    single = every[:, mask].astype(np.float32)  # the naive way is spared the conversion

    def of(masks, rows):
        return None if masks is None else masks[rows]

    arrays = every[:N], every[:N, 0].astype(np.float32), np.arange(N), of(masks, slice(N))
    shard, padded = ShardIndex(*arrays), ShardIndex(*arrays[:3], padding[:N])
    queries, query_masks = every[N:], of(masks, slice(N, None))
    rng = np.random.default_rng(1)
    listed = {k: np.sort([rng.choice(N, k, replace=False) for _ in range(Q)]) for k in SHORTLISTS}
    wanted = {k: Wanted(np.repeat(np.arange(Q), k), rows.ravel(), np.zeros(Q * k, bool)) for k, rows in listed.items()}
    pairs = np.triu_indices(REGISTER, 1)
    once = Wanted(*pairs, np.ones(len(pairs[0]), bool))
    images = ShardIndex(*(array[:REGISTER] for array in arrays[:3]), of(masks, slice(REGISTER)))
    a, b = rng.standard_normal((2, SIZE, SIZE), dtype=np.float32)

    def votes(k, screens=True):
        return shard.votes(queries, query_masks, wanted[k], radius, screens)[0]

    def register():
        return images.votes(every[:REGISTER], of(masks, slice(REGISTER)), once, radius)

    def naive_register(q):
        return naive(single[q], np.delete(single[:REGISTER], q, axis=0), radius)

    ways: dict[Hashable, Callable] = {"sgemm": lambda: a @ b}
    for k in SHORTLISTS:
        ways["votes", k] = lambda k=k: votes(k)
        ways["float32", k] = lambda k=k: votes(k, False)
        ways["naive", k] = lambda k=k: naive(single[N], single[listed[k][0]], radius)
    ways["unmasked"] = lambda: ShardIndex.votes(plain, queries, None, wanted[100], radius)
    ways["masked"] = lambda: padded.votes(queries, padding[N:], wanted[100], radius)
    ways["register"] = register
    ways["naive register"] = lambda: [naive_register(q) for q in range(REGISTER_QUERIES)]
    plain = ShardIndex(*arrays[:3]) if options.masked else shard

    hits = 0
    for k in SHORTLISTS:
        found = votes(k)
        check(found.of(0, used, k), listed[k][0], naive(single[N], single[listed[k][0]], radius))
        hits = found.counts.sum() / (Q * k * used**2)
    both = pair_votes.merge(register())
    for q in range(REGISTER_QUERIES):
        check(both.of(q, used, REGISTER - 1), np.delete(np.arange(REGISTER), q), naive_register(q))
    marked = np.mean([marked_share(single[N], single[row], radius) for row in listed[100][0][:10]])

    inside: dict[int, list[float]] = {k: [] for k in SHORTLISTS}
    with ExitStack() as stack:
        if options.actor:
            ask = actor_votes(stack, radius, arrays, queries, query_masks)
            for k in SHORTLISTS:
                ways["actor", k] = lambda k=k: inside[k].append(ask(wanted[k]))
        seconds = timed_in_turns(ways, options.rounds)
    median = {name: float(np.median(values)) for name, values in seconds.items()}

    peak = 2 * SIZE**3 / median["sgemm"] / 1e9
    result = {
        "threads": THREADS,
        "peak_gflops": round(peak, 1),
        "peak_best_gflops": round(2 * SIZE**3 / min(seconds["sgemm"]) / 1e9, 1),
        "peak_all_threads_gflops": round(sgemm_all_threads(), 1),
        "all_threads": os.cpu_count(),
        "integer_pass": bool(tiles.SCREENS),
        "patches": used,
        "embedding": E,
        "hit_density": round(float(hits), 5),
        "marked_density": round(float(marked), 5),
    }
    print(
        f"sgemm {result['peak_gflops']} GFLOP/s on {THREADS} thread (best {result['peak_best_gflops']}), "
        f"{result['peak_all_threads_gflops']} on {os.cpu_count()}; P {used}, E {E}, {100 * hits:.2f}% hits, "
        f"{100 * marked:.2f}% marked; median of {options.rounds} rounds"
    )
    print(f"{'K':>4} {'ms/query':>9} {'GFLOP/s':>8} {'of peak':>8} {'float32':>8} {'naive ms':>9} {'times':>6}")
    for k in SHORTLISTS:
        work = k * 2 * used**2 * E / 1e9
        each, plainly, slow = median["votes", k] / Q, median["float32", k] / Q, median["naive", k]
        line = {
            "gflops": round(work / each, 1),
            "share_of_peak": round(work / each / peak, 3),
            "float32_share_of_peak": round(work / plainly / peak, 3),
            "ratio_float32": round(plainly / each, 2),
            "ratio_naive": round(slow / each, 2),
            "ms_per_query": round(1e3 * each, 3),
        }
        print(
            f"{k:>4} {line['ms_per_query']:>9.2f} {line['gflops']:>8.1f} {100 * line['share_of_peak']:>7.1f}% "
            f"{100 * line['float32_share_of_peak']:>7.1f}% {1e3 * slow:>9.2f} {line['ratio_naive']:>6.2f}"
        )
        if options.actor:
            there = float(np.median(inside[k][1:])) / Q
            line["actor_ms_per_query"] = round(1e3 * there, 3)
            line["actor_share_of_peak"] = round(work / there / peak, 3)
            line["actor_ms_with_ray"] = round(1e3 * median["actor", k] / Q, 3)
            print(
                f"     {1e3 * there:>8.2f} {work / there:>8.1f} {100 * work / there / peak:>7.1f}% in a search actor, "
                f"{line['actor_ms_with_ray']:.2f} ms with Ray around it"
            )
        result[f"k{k}"] = line
    result["mask_speedup"] = round(median["unmasked"] / median["masked"], 2)
    whole = median["naive register"] * REGISTER / REGISTER_QUERIES
    result["register100"] = {
        "seconds": round(median["register"], 3),
        "ratio_naive": round(whole / median["register"], 2),
    }
    print(f"a quarter of padding, left out: {result['mask_speedup']:.2f} times the queries at K = 100")
    print(
        f"register of {REGISTER}: {median['register']:.2f} s; naive {whole:.2f} s (from {REGISTER_QUERIES} queries), "
        f"{result['register100']['ratio_naive']:.1f} times"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
