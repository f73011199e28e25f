"""What ranked pairs are worth for relative pose, on photographs with true poses: overlap voting against other lists.

    python benchmarks/relative_pose.py --data DIR --work DIR [--sets strecha rgbd_office rgbd_kitchen] [--quick]
    .venv-lightglue/bin/python benchmarks/relative_pose.py --data DIR --work DIR --methods aliked+lightglue

DIR of the data holds `strecha/SCENE/` with images and `cameras.json`, and a folder for each RGB-D set
(`vop.datasets.posed`). The scenes of Strecha are ONE pool: nobody tells which images belong together. Every image is a
query; a list ranks the other images for it, and `vop.pose.protocols` says how its first k pairs are judged. The lists:

    overlap voting      `vop register`, its defaults; of a video the shortlist is all frames
    raw tokens          the same without whitening, radius 0.2, votes without weights
    global descriptor   inner products of the global descriptors of the same store, no votes
    random              k images drawn for each query; scores are means over several draws
    all pairs           no choice: of all pairs the one with most inliers
    oracle              the pair whose pose is best, chosen by the truth: what no list can exceed

In video the frame beside the query is the easiest pair there is, so each RGB-D set is judged twice: with all frames,
and with those up to `--gap` frames before and after the query left out of every list, as place recognition does.
Every second frame of these sets is used. The poses of the kitchen drift: pairs of frames more than 160 numbers apart,
whose truth is not known, are in no list.

A pair is matched and posed once: `vop relative-pose` runs over all pairs of a pool, and every list is scored from the
poses it writes; that this is what the single command gives, run on images alone, is checked. All of it stays in
the folder `--work`, and a run that is repeated continues. A method whose packages are in another environment is run
there (`make test-lightglue` makes it); a later run without them scores the poses that it left. ALIKED keeps 1,024
keypoints instead of 2,048 (`KEYPOINTS`), which takes less than half of the time.

Printed are Markdown tables; AUC is in percent, the mean over scenes. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from embed import CORES

from vop import config as configuration
from vop import files, metrics
from vop.config import Config
from vop.datasets.folder import list_images
from vop.datasets.posed import PosedFolder
from vop.pose.protocols import evaluate
from vop.pose.results import AUC_THRESHOLDS, MEAN, rows_of
from vop.store import EmbeddingStore

KS, OVERLAPS = (1, 5), (0.1, 0.3)
STEP = {"rgbd_office": 2, "rgbd_kitchen": 2}  # every second frame
APART = {"rgbd_kitchen": 160}  # numbers beyond which the poses have drifted
QUICK = {"per_scene": 4, "frames": 12, "gap": 3, "draws": 2}
KEYPOINTS = {"aliked+lightglue": 1024}
RANKED = 50  # the default shortlist, and all of it is ranked; of a video all frames, as most may be left out
LISTS = {
    "overlap voting": [],
    "raw tokens": ["embedding.whiten=null", "retrieval.radius=0.2", "retrieval.weights=none"],
}
GLOBAL, RANDOM, ALL, ORACLE = "global descriptor", "random", "all pairs", "oracle"
STEPS = {"features": "extracted_now", "matching": "matched_now", "poses": "posed_now"}  # timed; what they did
MEDIANS = ("median_rotation_deg", "median_translation_deg")
NUMBER = re.compile(r"\d+")

Ranking = list[np.ndarray]  # of every query, positions of database images in `Pool.names`, best first


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Images that are ranked against each other.

    images: what `images=` is told. names: N, sorted, by which everything else is ordered. known: (N, N) bool, pairs of
    two images that may be listed, because their true pose is known.
    """

    name: str
    images: str
    cameras: str
    names: tuple[str, ...]
    known: np.ndarray
    folder: Path

    @classmethod
    def open(cls, data: Path, name: str, folder: Path, quick: bool) -> "Pool":
        """One of the sets, its intermediate results in `folder`."""
        root = data / name
        if name == "strecha":
            everything = tuple(image.name for image in list_images(root).images)
            names = tuple(_first(everything, QUICK["per_scene"]) if quick else everything)
        else:
            everything = tuple(sorted(image.name for image in list_images(root).images))
            names = everything[:: STEP.get(name, 1)][: QUICK["frames"] if quick else None]
        images = str(root)
        if names != everything:
            images = str(folder / "images.txt")
            files.write_bytes(images, "".join(f"{root / image}\n" for image in names).encode())
        known = ~np.eye(len(names), dtype=bool)
        if name in APART:
            numbers = np.array([int(NUMBER.findall(image)[-1]) for image in names])
            known &= np.abs(numbers[:, None] - numbers) <= APART[name]
        return cls(name, images, str(root), names, known, folder)

    @cached_property
    def scenes(self) -> np.ndarray:
        """First folder of every name."""
        return np.array([name.split("/")[0] if "/" in name else "" for name in self.names])

    @cached_property
    def overlap(self) -> np.ndarray | None:
        """True overlaps (N, N) from depth; None where there is none."""
        if self.name == "strecha":
            return None
        posed = PosedFolder.open(self.cameras)
        cameras = tuple(posed.camera(name) for name in self.names)
        return dataclasses.replace(posed, names=self.names, cameras=cameras).overlap_matrix()

    def apart(self, gap: int) -> np.ndarray:
        """(N, N) bool: pairs that may be listed and stand more than `gap` images from each other."""
        rows = np.arange(len(self.names))
        return self.known & (np.abs(rows[:, None] - rows) > gap)

    def table(self, ranking: Ranking) -> pa.Table:
        """A ranking as a pair list: query, database, rank."""
        sizes, names = [len(rows) for rows in ranking], pa.array(self.names)
        query, database = np.repeat(np.arange(len(ranking)), sizes), np.concatenate(ranking)
        rank = np.concatenate([np.arange(size) for size in sizes])
        return pa.table({"query": names.take(pa.array(query)), "database": names.take(pa.array(database)),
                         "rank": rank.astype(np.int32)})  # fmt: skip

    def ranking(self, listed: pa.Table) -> Ranking:
        """The ranking of a pair list of these images, or of more."""
        listed = listed.sort_by("rank")
        query, database = (pc.index_in(listed[side], pa.array(self.names)) for side in ("query", "database"))
        inside = pc.and_(query.is_valid(), database.is_valid())
        query, database = (column.filter(inside).to_numpy() for column in (query, database))
        return [database[query == row] for row in range(len(self.names))]


def _first(names: tuple[str, ...], count: int) -> Iterator[str]:
    """The first images of every scene."""
    scenes = dict.fromkeys(name.split("/")[0] for name in names)
    for scene in scenes:
        yield from [name for name in names if name.startswith(f"{scene}/")][:count]


class Commands:
    """Runs `vop`, and remembers what was run, with DATA and WORK for the two folders."""

    def __init__(self, data: Path, work: Path):
        self.places, self.shown = {str(work): "WORK", str(data): "DATA"}, []

    def run(self, command: str, settings: list[str]) -> dict:
        """Run a command; returns its run.json."""
        line = " ".join(["vop", command, *(f"'{text}'" if "[" in text else text for text in settings)])
        for place, letters in self.places.items():
            line = line.replace(place, letters)
        self.shown.append(line)
        print(f"$ {line}", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", "vop.cli", command, *settings], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"the command ended with status {done.returncode}; the reason stands above")
        output = next(text.removeprefix("output=") for text in settings if text.startswith("output="))
        return files.read_json(files.join(output, "run.json"))


def registered(pool: Pool, commands: Commands) -> dict[str, Ranking]:
    """The rankings that `vop register` makes, and the one by global descriptors."""
    rankings, ranked = {}, RANKED if pool.name == "strecha" else len(pool.names)
    for label, settings in LISTS.items():
        output = pool.folder / label.replace(" ", "-")
        told = [f"images={pool.images}", f"output={output}", *settings, "report.queries=0"]
        told += [f"retrieval.k={ranked}", f"retrieval.shortlist={ranked}"]
        commands.run("register", told)
        rankings[label] = pool.ranking(pq.read_table(output / "pairs.parquet"))
    globals_, _ = EmbeddingStore.open(str(default_store(pool))).select(pool.names).read()
    similarity = globals_.astype(np.float32) @ globals_.astype(np.float32).T
    rankings[GLOBAL] = list(np.argsort(-similarity, axis=1, kind="stable"))
    return rankings


def default_store(pool: Pool) -> Path:
    return pool.folder / next(iter(LISTS)).replace(" ", "-") / "store"


def method_settings(pool: Pool, method: str, estimators: list[str]) -> list[str]:
    """Settings under which all pairs of a pool are matched and posed."""
    return [
        f"images={pool.images}",
        f"cameras={pool.cameras}",
        f"pair_list={pool.folder / 'all.parquet'}",
        f"output={method_folder(pool, method)}",
        f"matching.method={method}",
        *([f"matching.max_keypoints={KEYPOINTS[method]}"] if method in KEYPOINTS else []),
        f"pose.estimators=[{','.join(estimators)}]",
        "report.queries=0",
    ]


def method_folder(pool: Pool, method: str) -> Path:
    return pool.folder / method.replace("+", "-")


def note_speed(folder: Path, done: dict[str, tuple[int, float]]) -> None:
    """Add what a run computed (by step: number, seconds) to what earlier runs did: they may have been cut off."""
    path = folder / "speed.json"
    known = files.read_json(path) if path.exists() else {}
    for step, (number, seconds) in done.items():
        before = known.get(step, [0, 0.0])
        known[step] = [before[0] + number, round(before[1] + seconds * (number > 0), 3)]
    files.write_json(path, known)


def posed(pool: Pool, method: str, estimators: list[str], commands: Commands) -> pa.Table | None:
    """Poses of all pairs: computed where the method can run, else as another environment left them, or None."""
    from vop import matching

    folder, settings = method_folder(pool, method), method_settings(pool, method, estimators)
    try:
        matching.check(configuration.load(overrides=settings).matching)
    except ImportError as error:
        print(f"{method} cannot run here: {error}", file=sys.stderr)
    else:
        run = commands.run("relative-pose", settings)
        note_speed(folder, {step: (run["counts"][count], run["timings_s"][step]) for step, count in STEPS.items()})
    return pq.read_table(folder / "poses.parquet") if (folder / "poses.parquet").exists() else None


def with_lists(pool: Pool, allowed: np.ndarray, rankings: dict[str, Ranking], draws: int) -> dict[str, list[Ranking]]:
    """All lists but the oracle, of pairs that are allowed (N, N): one ranking for each, of `RANDOM` several."""
    lists = {label: [_only(ranking, allowed)] for label, ranking in rankings.items()}
    everything = [np.flatnonzero(row) for row in allowed]
    most = max(KS)
    lists[RANDOM] = [
        [rng.choice(rows, min(most, len(rows)), replace=False) for rows in everything]
        for rng in map(np.random.default_rng, range(draws))
    ]
    return lists | {ALL: [everything]}


def _only(ranking: Ranking, allowed: np.ndarray) -> Ranking:
    return [rows[allowed[query, rows]][: max(KS)] for query, rows in enumerate(ranking)]


def oracle(pool: Pool, allowed: np.ndarray, poses: pa.Table, estimator: str, threshold: float) -> Ranking:
    """For every query the one allowed image with the smallest pose error, if any pair has a pose."""
    chosen = pc.and_(
        pc.equal(poses["estimator"], estimator), pc.equal(poses["threshold"], pa.scalar(threshold, pa.float32()))
    )
    poses = poses.filter(pc.and_(chosen, poses["rotation_error"].is_valid()))
    rows0, rows1 = (pc.index_in(poses[side], pa.array(pool.names)).to_numpy() for side in ("image0", "image1"))
    errors = np.full(allowed.shape, np.inf)
    errors[rows0, rows1] = np.maximum(*(poses[f"{kind}_error"].to_numpy() for kind in ("rotation", "translation")))
    errors = np.where(allowed, np.fmin(errors, errors.T), np.inf)  # NaN, no true baseline, counts as no pose
    return [np.array([row.argmin()] if np.isfinite(row.min()) else [], int) for row in errors]


def scored(pool: Pool, ranking: Ranking, poses: pa.Table, config: Config, estimators: list[str]) -> dict[str, dict]:
    """Scores by `protocol/estimator/k`, k 0 for all pairs: means over the scenes, as `vop relative-pose` has them."""
    pose = dataclasses.replace(config.pose, estimators=estimators, ks=[*KS])
    queries = pa.table({"query": list(pool.names), "scene": pool.scenes, "known": [True] * len(pool.names)})
    results = evaluate(pool.table(ranking), poses, pose, queries).results
    keys = ("threshold_px", "judged", "failed", "unrelated", *(f"auc@{at}" for at in AUC_THRESHOLDS), *MEDIANS)
    return {
        f"{row['protocol']}/{row['estimator']}/{row['k'] or 0}": {key: row[key] for key in keys}
        for row in rows_of(results, MEAN)
        if row["unit"] == "query"
    }


def averaged(draws: list[dict[str, dict]]) -> dict[str, dict]:
    """Means over draws; a score that one of them lacks is none. `spread`: deviation of AUC@5 between draws."""
    means = {}
    for case in draws[0]:
        columns = {key: [draw[case][key] for draw in draws] for key in draws[0][case]}
        means[case] = {key: None if None in values else statistics.mean(values) for key, values in columns.items()}
        if len(draws) > 1:
            means[case]["spread"] = statistics.stdev(columns["auc@5"])
    return means


def found(pool: Pool, ranking: Ranking, allowed: np.ndarray) -> dict[str, float]:
    """`metrics.retrieval` against the true overlaps by `LEAST/KEY`, mean over queries that have something to find."""
    names, scores = np.array(pool.names), {}
    for least in OVERLAPS if pool.overlap is not None else ():
        of_query = []
        for query, rows in enumerate(ranking):
            candidates = np.flatnonzero(allowed[query])
            if (pool.overlap[query, candidates] >= least).any():
                kept = np.append(candidates, query)
                truth = pool.overlap[np.ix_(kept, kept)]
                given = {names[query]: list(names[rows])}
                of_query.append(metrics.retrieval(given, names[kept], truth, least, names[candidates], KS))
        for key in of_query[0] if of_query else ():
            scores[f"{least:g}/{key}"] = statistics.mean(one[key] for one in of_query)
        scores[f"{least:g}/queries"] = len(of_query)
    return scores


def between_scenes(pool: Pool, ranking: Ranking, k: int) -> float:
    """Share of the first k pairs of every query whose images are of different scenes."""
    other = [pool.scenes[query] != pool.scenes[rows[:k]] for query, rows in enumerate(ranking)]
    return float(np.concatenate(other).mean())


def cell(scores: dict | None) -> str:
    """AUC@5 / 10 / 20."""
    if scores is None:
        return "–"
    areas = [scores[f"auc@{at}"] for at in AUC_THRESHOLDS]
    return " / ".join("–" if area is None else f"{100 * area:.1f}" for area in areas)


def degrees(scores: dict) -> str:
    return " / ".join("–" if scores[key] is None else f"{scores[key]:.2f}" for key in MEDIANS)


def table(title: str, columns: list[str], lines: list[list[str]]) -> None:
    print(f"\n**{title}**\n")
    for line in (columns, ["---"] * len(columns), *lines):
        print(f"| {' | '.join(line)} |")


def judge(pool: Pool, allowed: np.ndarray, lists: dict, poses: pa.Table, config: Config, title: str) -> dict:
    """Score every list by the poses of one method, and print the table."""
    estimators, lines, record = config.pose.estimators, [], {}
    for label, rankings in lists.items():
        scores = averaged([scored(pool, ranking, poses, config, estimators) for ranking in rankings])
        for k in (0,) if label == ALL else KS:
            other = statistics.mean(between_scenes(pool, ranking, k or None) for ranking in rankings)
            mine = {case: value for case, value in scores.items() if case.endswith(f"/{k}")}
            lines.append(line(label, str(k or "all"), other, mine, estimators))
            pairs = statistics.mean(len(rows[: k or None]) for ranking in rankings for rows in ranking)
            record[f"{label}/{k or 'all'}"] = {"between_scenes": round(other, 4), "listed": pairs} | rounded(mine)
    best = {}
    for estimator in estimators:
        ranking = oracle(pool, allowed, poses, estimator, config.pose.threshold)
        judged = scored(pool, ranking, poses, config, [estimator])
        best |= {case: value for case, value in judged.items() if case == f"fixed/{estimator}/1"}
    lines.append(line(ORACLE, "1", None, best, estimators))
    record[ORACLE] = rounded(best)
    columns = ["list", "k", *(["other scene"] if len(set(pool.scenes)) > 1 else [])]
    for estimator in estimators:
        columns += [f"{estimator}: fixed", "paper (px)", "median R / t (°)"]
    if len(set(pool.scenes)) == 1:
        lines = [[*row[:2], *row[3:]] for row in lines]
    table(title, columns, lines)
    return record


def line(label: str, k: str, other: float | None, scores: dict[str, dict], estimators: list[str]) -> list[str]:
    cells = [label, k, "–" if other is None else f"{100 * other:.1f}%"]
    at = 0 if k == "all" else int(k)
    for estimator in estimators:
        fixed, paper = (scores.get(f"{protocol}/{estimator}/{at}") for protocol in ("fixed", "paper"))
        chosen = "" if paper is None or label == RANDOM else f" ({paper['threshold_px']:g})"
        cells += [cell(fixed), cell(paper) + chosen, degrees(fixed)]
    return cells


def rounded(scores: dict[str, dict]) -> dict[str, dict]:
    return {
        case: {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
        for case, values in scores.items()
    }


def retrieval_table(pool: Pool, allowed: np.ndarray, lists: dict, title: str) -> dict:
    """How many of the listed images truly overlap, where that is known."""
    record, lines = {}, []
    for label, rankings in lists.items():
        if label == ALL:
            continue
        several = [found(pool, ranking, allowed) for ranking in rankings]
        record[label] = means = {key: round(statistics.mean(one[key] for one in several), 4) for key in several[0]}
        lines.append([label, *(_at(means, least, key) for least in OVERLAPS for key in ("precision", "recall"))])
    first = next(iter(record.values()))
    lines.append(["ceiling", *(text for least in OVERLAPS for text in (_at(first, least, "ceiling"), "1"))])
    columns = [f"≥ {100 * least:.0f}%: {key}" for least in OVERLAPS for key in ("precision@1 / @5", "recall@1 / @5")]
    queries = ", ".join(f"{first[f'{least:g}/queries']:g} at {100 * least:.0f}%" for least in OVERLAPS)
    table(f"{title}: true overlaps found (queries that have one: {queries})", ["list", *columns], lines)
    return record


def _at(means: dict[str, float], least: float, key: str) -> str:
    return " / ".join(f"{means[f'{least:g}/{key}@{k}']:.3f}" for k in KS)


def speed_table(pool: Pool, methods: list[str]) -> dict:
    """How fast features, matches and poses (all estimators and thresholds) were; start of the workers included."""
    record, lines = {}, []
    for method in methods:
        path = method_folder(pool, method) / "speed.json"
        known = files.read_json(path) if path.exists() else {}
        rates = {step: round(number / seconds, 2) for step, (number, seconds) in known.items() if number}
        record[method] = {f"{step}_per_s": rate for step, rate in rates.items()}
        lines.append([method, *(f"{rates.get(step, '–')} ({known.get(step, [0])[0]})" for step in STEPS)])
    columns = ["method", "features: images/s (images)", "matches: pairs/s (pairs)", "poses: pairs/s (pairs)"]
    table(f"{pool.name}: speed on {CORES} cores, start of the workers included", columns, lines)
    return record


def proven(pool: Pool, method: str, record: dict, commands: Commands) -> float:
    """Run the one documented command, on images alone; returns the largest difference of its AUCs from ours.

    It takes up the stores, so that nothing is computed twice. Raises `SystemExit` where the numbers differ.
    """
    output, folder = pool.folder / "one-command", method_folder(pool, method)
    stores = [f"store={default_store(pool)}", f"features={folder / 'features'}", f"matches={folder / 'matches'}"]
    commands.run("relative-pose", [f"images={pool.images}", f"cameras={pool.cameras}", f"output={output}", *stores,
                                   "report.queries=0"])  # fmt: skip
    told, largest = files.read_json(output / "metrics.json"), 0.0
    for k in KS:
        for protocol in ("fixed", "paper"):
            ours = record[f"overlap voting/{k}"][f"{protocol}/opencv/{k}"]
            for at in AUC_THRESHOLDS:
                largest = max(largest, abs(told[f"{protocol}/opencv/k{k}/auc@{at}"] - ours[f"auc@{at}"]))
    if largest > 2e-6:  # both are rounded to 6 digits
        raise SystemExit(f"{output} and the scores above differ by {largest}: the shortcut does not hold")
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything computed; kept")
    parser.add_argument("--sets", nargs="+", default=["strecha", "rgbd_office", "rgbd_kitchen"])
    parser.add_argument("--methods", nargs="+", default=["xfeat+lighterglue", "sift+nn", "aliked+lightglue"])
    parser.add_argument("--estimators", nargs="+", default=["opencv", "poselib"])
    parser.add_argument("--gap", type=int, default=5, help="frames beside a query left out in the second way")
    parser.add_argument("--draws", type=int, default=10, help="random lists, seeds 0, 1, ...")
    parser.add_argument("--quick", action="store_true", help="a dozen images of each set: a trial of the script")
    options = parser.parse_args()
    data, work = options.data.absolute(), options.work.absolute() / ("quick" if options.quick else "full")
    gap, draws = (QUICK["gap"], QUICK["draws"]) if options.quick else (options.gap, options.draws)

    result, commands = {"cores": CORES, "quick": options.quick}, Commands(data, work)
    for name in options.sets:
        pool = Pool.open(data, name, work / name, options.quick)
        listing = pool.folder / "all.parquet"
        if not listing.exists():
            listing.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pool.table([np.flatnonzero(row) for row in pool.known]), listing)
        result[name] = report(pool, options.methods, options.estimators, gap, draws, commands)
    print("\n```sh\n" + "\n".join(commands.shown) + "\n```")
    print(f"\n{json.dumps(result)}")


def report(pool: Pool, methods: list[str], estimators: list[str], gap: int, draws: int, commands: Commands) -> dict:
    """Everything about one set; prints its tables."""
    rankings = registered(pool, commands)
    poses = {method: posed(pool, method, estimators, commands) for method in methods}
    poses = {method: found for method, found in poses.items() if found is not None}
    record = {"images": len(pool.names), "pairs": int(pool.known.sum() // 2)}
    ways = {"lists": (pool.known, f"{pool.name}, {len(pool.names)} images")}
    if pool.name != "strecha":
        ways[f"lists without {gap} neighbours"] = (
            pool.apart(gap), f"{pool.name}, {len(pool.names)} images, {gap} frames on each side left out",
        )  # fmt: skip
    for way, (allowed, title) in ways.items():
        lists, here = with_lists(pool, allowed, rankings, draws), {}
        if pool.overlap is not None:
            here["retrieval"] = retrieval_table(pool, allowed, lists, title)
        for method, known in poses.items():
            config = configuration.load(overrides=method_settings(pool, method, estimators))
            heading = f"{title}, {method}: AUC@5° / 10° / 20° of the queries, percent"
            here[method] = judge(pool, allowed, lists, known, config, heading)
        record[way] = here
    record["speed"] = speed_table(pool, list(poses))
    default = configuration.load().matching.method
    if pool.name not in APART and default in poses and "opencv" in estimators:
        record["one_command_differs_by"] = proven(pool, default, record["lists"][default], commands)
        print(f"\n{pool.name}: the one command, run on images alone, differs by {record['one_command_differs_by']:g}")
    return record


if __name__ == "__main__":
    main()
