"""What FAISS indexes of all patches find of the full search (`retrieval.shortlist=null`), and what they cost.

    python benchmarks/patch_index.py [--images 1000] [--queries 16] [--lists 1024] [--data DIR] [--radius R]

The collection is synthetic (`vop.datasets.synthetic`, radius 0.3) or, with --data, an embedding store or a folder of
photographs, which are embedded with the default settings first (radius 0.65). Queries are images spread evenly over
the collection, each searched among all others, in one batch; everything runs on one thread, as in a shard actor.

    hits      share of the similar patch pairs that are found; each of those has its exact similarity
    pairs     share of the k best images of the exact search that are among the k best, idf weights; first: the best one
    build     seconds to train and fill the index; ms/query: median of rounds that take turns
    KB/image  what the index holds (FAISS's serialised size), besides the stored patches

"exact" is the default: the kernel of the votes, without FAISS. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before the libraries read it

import faiss  # noqa: E402
import numpy as np  # noqa: E402

import vop  # noqa: E402
from vop.catalog import evenly_spread  # noqa: E402
from vop.datasets.synthetic import World  # noqa: E402
from vop.retrieval import pair_votes, voting  # noqa: E402
from vop.retrieval.index import ShardIndex, Wanted  # noqa: E402
from vop.retrieval.patches import FEWEST, PatchIndex  # noqa: E402
from vop.retrieval.search import masks  # noqa: E402
from vop.store import EmbeddingStore  # noqa: E402

# Factory, probe, margin; {L} is the number of lists.
SETTINGS = (
    ("Flat", None, 0.0),
    *(("IVF{L},Flat", f"nprobe={probe}", 0.0) for probe in (1, 4, 16, 64)),
    ("IVF1,SQ8", None, 0.0),
    ("IVF{L},SQ8", "nprobe=16", 0.0),
    *(("IVF{L},PQ32", "nprobe=16", margin) for margin in (0.0, 0.1, 0.2)),
    *(("HNSW32", f"efSearch={ef}", 0.0) for ef in (16, 256, 1024)),
)


@dataclass(frozen=True)
class Images:
    """Patches (N, P, E) in the stored type and which of them are image, (N, P) bool."""

    patches: np.ndarray
    masks: np.ndarray

    @classmethod
    def synthetic(cls, count: int) -> "Images":
        _, patches = World(count).descriptors(range(count), "float16")
        return cls(patches, np.ones(patches.shape[:2], bool))

    @classmethod
    def read(cls, path: str) -> "Images":
        """A store, or a folder of photographs."""
        if EmbeddingStore.exists(path):
            images = EmbeddingStore.open(path).select()
            return cls(images.read()[1], masks(images))
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder) / "run")
            vop.embed(images=path, output=output, store=output)
            return cls.read(output)


def timed(function, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def best(votes: pair_votes.PairVotes, sizes: np.ndarray, candidates: int, k: int) -> list[np.ndarray]:
    """The k best images of every query, best first; sizes: patches that take part."""
    ranked = []
    for q, size in enumerate(sizes):
        one = votes.of(q, int(size), candidates)
        ranked.append(one.rows[voting.best(voting.scores(one, "idf"), one.rows, k)])
    return ranked


def recall(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    total = sum(len(rows) for rows in expected)
    return sum(np.isin(rows, some).sum() for some, rows in zip(found, expected, strict=True)) / max(total, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="images of the synthetic collection")
    parser.add_argument("--data", help="store, or folder of photographs")
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--radius", type=float)
    parser.add_argument("--lists", type=int, default=1024, help="of IVF indexes; fewer for a small collection")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)

    images = Images.read(options.data) if options.data else Images.synthetic(options.images)
    radius = options.radius or (0.65 if options.data else 0.3)
    N, _, E = images.patches.shape
    rows, queries = np.arange(N), evenly_spread(N, options.queries)
    lists = min(options.lists, 2 ** int(np.log2(images.masks.sum() / FEWEST)))
    query, row = np.nonzero(queries[:, None] != rows)
    wanted = Wanted(query, row, np.zeros(len(row), bool))
    asked = images.patches[queries], images.masks[queries], wanted, radius

    exact = ShardIndex(images.patches, np.ones((N, 1), np.float32), rows, images.masks)
    exact.votes(*asked)  # compiles
    searches, lines = [("exact", None, 0.0, exact)], []
    built = {"exact": (0.0, 0.0)}
    for factory, probe, margin in SETTINGS:
        factory = factory.format(L=lists)
        seconds, index = timed(PatchIndex, images.patches, rows, images.masks, factory, probe, margin)
        built[factory] = seconds, len(faiss.serialize_index(index._index)) / N / 1e3
        searches.append((factory, probe, margin, index))
    sizes = images.masks[queries].sum(axis=1)
    seconds = {search[:3]: [] for search in searches}
    answers = {}
    for _ in range(options.rounds):
        for *key, index in searches:
            took, (answers[tuple(key)], _) = timed(index.votes, *asked)
            seconds[tuple(key)].append(took / len(queries))

    expected = answers["exact", None, 0.0]
    ranking, hits = best(expected, sizes, N - 1, options.k), int(expected.counts.sum())
    density = hits / float(sum(sizes[q] * images.masks[r].sum() for q, r in zip(query, row, strict=True)))
    print(
        f"{N} images, {images.masks.sum()} patches of width {E} in {images.patches.dtype}, {len(queries)} queries, "
        f"radius {radius}: {100 * density:.2f}% of patch pairs are similar; one thread, median of {options.rounds}"
    )
    print(f"{'index':<16} {'probe':<14} {'margin':>6} {'hits':>7} {'pairs':>7} {'first':>7} {'build s':>8} "
          f"{'ms/query':>9} {'KB/image':>9}")  # fmt: skip
    for (factory, probe, margin), times in seconds.items():
        found = answers[factory, probe, margin]
        ranked = best(found, sizes, N - 1, options.k)
        line = {
            "index": factory,
            "probe": probe,
            "margin": margin,
            "hits": round(int(found.counts.sum()) / max(hits, 1), 4),
            "pairs": round(recall(ranked, ranking), 4),
            "first": round(recall([some[:1] for some in ranked], [some[:1] for some in ranking]), 4),
            "build_s": round(built[factory][0], 2),
            "ms_per_query": round(1e3 * float(np.median(times)), 2),
            "kb_per_image": round(built[factory][1], 1),
        }
        lines.append(line)
        print(
            f"{factory:<16} {probe or '':<14} {margin:>6.2f} {line['hits']:>7.3f} {line['pairs']:>7.3f} "
            f"{line['first']:>7.3f} {line['build_s']:>8.2f} {line['ms_per_query']:>9.2f} {line['kb_per_image']:>9.1f}"
        )
    summary = {"images": N, "patches": int(images.masks.sum()), "width": E, "radius": radius, "density": density}
    print(json.dumps(summary | {"queries": len(queries), "k": options.k, "settings": lines}))


if __name__ == "__main__":
    main()
