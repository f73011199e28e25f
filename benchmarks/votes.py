"""Speed of the votes, as one shard actor runs them: one thread, `ShardIndex.votes`, float16 descriptors.

    python benchmarks/votes.py [--masked] [--embedding 256] [--rounds 7]

Compared with the machine's own sgemm (one large product, same thread count, same run) and with the naive way: a flat
FAISS index of the query's candidates' patches, rebuilt for each query, a range search and a bincount. GFLOP/s counts
the useful work only, 2 P P E for each candidate. Every number is the median of interleaved rounds. The last line is
one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time

THREADS = 1
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(THREADS)  # before the libraries read it

import faiss  # noqa: E402
import numpy as np  # noqa: E402

from vop.retrieval import voting  # noqa: E402
from vop.retrieval.index import ShardIndex  # noqa: E402

SGEMM = """
import time, numpy as np
a, b = np.random.default_rng(0).standard_normal((2, 2048, 2048), dtype=np.float32)
def run():
    start = time.perf_counter()
    a @ b
    return 2 * 2048**3 / (time.perf_counter() - start) / 1e9
run()
print(np.median([run() for _ in range(7)]))
"""


def sgemm(size: int = 2048) -> float:
    """GFLOP/s of one large product."""
    a, b = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    start = time.perf_counter()
    np.matmul(a, b)
    return 2 * size**3 / (time.perf_counter() - start) / 1e9


def sgemm_all_threads() -> float:
    """The same on every core, in a process of its own: BLAS reads its thread count once."""
    threads = {"OPENBLAS_NUM_THREADS": str(os.cpu_count()), "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-c", SGEMM]
    return float(subprocess.run(command, env=os.environ | threads, capture_output=True, check=True, text=True).stdout)


def collection(images: int, P: int, E: int, words: int) -> np.ndarray:
    """Unit descriptors (images, P, E) float16: each patch shows one of `words` things: 1 / words of pairs hit."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((words, E), dtype=np.float32)
    patches = centres[rng.integers(words, size=(images, P))]
    patches = patches + 0.4 * rng.standard_normal((images, P, E), dtype=np.float32)
    return (patches / np.linalg.norm(patches, axis=-1, keepdims=True)).astype(np.float16)


def naive(x: np.ndarray, y: np.ndarray, radius: float) -> voting.Votes:
    """Votes of x (P, E) for y (K, P, E), both float32, by a FAISS index made for this query."""
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(y.reshape(-1, x.shape[1]))
    limits, similarities, found = index.range_search(x, float(voting.threshold(radius)))
    cell = np.repeat(np.arange(len(x)), np.diff(limits.astype(np.int64))) + found // y.shape[1] * len(x)
    shape = len(y), len(x)
    sums = np.bincount(cell, similarities, shape[0] * shape[1]).reshape(shape)
    return voting.Votes(np.arange(len(y)), sums, np.bincount(cell, minlength=sums.size).reshape(shape), len(y))


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def check(votes, candidates, naive_votes) -> None:
    """Both ways must give the same scores, or the comparison says nothing."""
    for weights in ("none", "idf", "tfidf"):
        expected = voting.scores(naive_votes, weights)[np.argsort(candidates)]
        np.testing.assert_allclose(voting.scores(votes, weights), expected, rtol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--embedding", type=int, default=256)
    parser.add_argument("--queries", type=int, default=8, help="queries in a batch")
    parser.add_argument("--database", type=int, default=400, help="images in the shard")
    parser.add_argument("--words", type=int, default=100, help="things that patches show; 1 / words of pairs hit")
    parser.add_argument("--radius", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--masked", action="store_true", help="4:3 images: the last quarter of the patches is padding")
    options = parser.parse_args()

    Q, E = options.queries, options.embedding
    every = collection(options.database + Q, options.patches, E, options.words)
    used = options.patches * 3 // 4 if options.masked else options.patches
    mask = np.arange(options.patches) < used
    masks = np.tile(mask, (len(every), 1)) if options.masked else None
    N = options.database
    shard = ShardIndex(every[:N], every[:N, 0], np.arange(N), None if masks is None else masks[:N])
    queries, query_masks = every[N:], None if masks is None else masks[N:]
    single = every[:, mask].astype(np.float32)  # the naive way is spared the conversion
    rng = np.random.default_rng(1)
    candidates = {k: [rng.choice(N, k, replace=False) for _ in range(Q)] for k in (20, 100)}

    peaks, ours, theirs = [], {k: [] for k in candidates}, {k: [] for k in candidates}
    for turn in range(options.rounds + 1):
        peak = sgemm()
        if turn:
            peaks.append(peak)
        for k, rows in candidates.items():
            seconds, batch = timed(shard.votes, queries, query_masks, rows, options.radius)
            naive_seconds, expected = timed(naive, single[N], single[rows[0]], options.radius)
            if turn:
                ours[k].append(seconds / Q)
                theirs[k].append(naive_seconds)
            else:  # the first turn compiles, warms up and checks
                check(batch[0], rows[0], expected)
                density = batch.counts.sum() / (Q * k * used**2)

    result = {
        "threads": THREADS,
        "peak_gflops": round(float(np.median(peaks)), 1),
        "peak_best_gflops": round(max(peaks), 1),
        "peak_all_threads_gflops": round(sgemm_all_threads(), 1),
        "all_threads": os.cpu_count(),
        "patches": used,
        "embedding": E,
        "hit_density": round(float(density), 4),
    }
    print(
        f"sgemm {result['peak_gflops']} GFLOP/s on {THREADS} thread (best {result['peak_best_gflops']}), "
        f"{result['peak_all_threads_gflops']} on {os.cpu_count()}; P {used}, E {E}, {100 * density:.2f}% hits; "
        f"median of {options.rounds} rounds"
    )
    print(f"{'K':>4} {'ms/query':>9} {'GFLOP/s':>8} {'of peak':>8} {'naive ms':>9} {'times naive':>12}")
    for k in candidates:
        seconds, slow = float(np.median(ours[k])), float(np.median(theirs[k]))
        gflops = k * 2 * used**2 * E / seconds / 1e9
        share = gflops / result["peak_gflops"]
        ours_columns = f"{k:>4} {1e3 * seconds:>9.2f} {gflops:>8.1f} {100 * share:>7.1f}%"
        print(f"{ours_columns} {1e3 * slow:>9.2f} {slow / seconds:>12.2f}")
        result[f"k{k}"] = {
            "gflops": round(gflops, 1),
            "share_of_peak": round(share, 3),
            "ratio_naive": round(slow / seconds, 2),
            "ms_per_query": round(1e3 * seconds, 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
