"""Models of several scenes in one pool, and what the choice of pairs does to them and to the time they take.

    python benchmarks/reconstruct.py --data DIR --work DIR [--lists voting global exhaustive] [--mappers incremental]
        [--method xfeat+lighterglue] [--all-verified]

DIR of the data holds a folder for each scene, `SCENE/` with images and `cameras.json`. The scenes are ONE pool: nobody
tells which images belong together. Intrinsics are given, poses are not: they only judge. The lists of pairs:

    voting      `vop register`, the first `--voting-k` (5) images of every query by predicted overlap
    global      the `--global-k` (10) images with the largest inner products of global descriptors in the same store
    exhaustive  every pair

Each list is matched into a store of its own, from one store of features, and `vop reconstruct` makes its models with
each mapper. Of every scene, the images in the model that holds most of them are aligned to their true cameras by a
similarity; the error of a camera is its distance from its true place as a share of the scene: of the largest distance
between two of its true cameras. Where two scenes share a model, `scale` in the JSON (true units per unit of the model)
tells whether they hang together rightly: it is then the same of both.
`--all-verified` makes the models once more from all verified pairs, without asking whether they contradict each other
(`reconstruct.consistent=false`): what the choice among them is worth.

A run that is repeated measures nothing again that is in `--work`; times are those of the run that did the work.
Printed is a Markdown table; the last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from embed import CORES

from vop import files
from vop.cameras import Cameras
from vop.datasets.folder import list_images
from vop.pose.alignment import judge, similarity
from vop.store import EmbeddingStore

LISTS = ("voting", "global", "exhaustive")
STEPS = ("matching", "verify", "choose pairs", "map")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the scenes")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything computed; kept")
    parser.add_argument("--lists", nargs="+", default=LISTS, choices=LISTS)
    parser.add_argument("--mappers", nargs="+", default=["incremental"], choices=("incremental", "global"))
    parser.add_argument("--method", default="xfeat+lighterglue", help="local features and matcher")
    parser.add_argument("--voting-k", type=int, default=5)
    parser.add_argument("--global-k", type=int, default=10)
    parser.add_argument(
        "--all-verified", action="store_true", help="also without asking whether pairs contradict others"
    )
    options = parser.parse_args()
    data, work = options.data.absolute(), options.work.absolute()
    names = sorted(image.name for image in list_images(str(data)).images)
    scenes = dict(sorted(Counter(name.split("/")[0] for name in names).items()))

    made = run(
        "register",
        [f"images={data}", f"output={work / 'register'}", f"retrieval.k={options.voting_k}", "report.queries=0"],
    )
    lists = {
        "voting": work / "register" / "pairs.parquet",
        "global": written(work / "global.txt", nearest(work / "register" / "store", names, options.global_k)),
        "exhaustive": written(work / "exhaustive.txt", combinations(names, 2)),
    }
    method = options.method.replace("+", "-")
    shared = [
        f"images={data}",
        f"cameras={data}",
        f"matching.method={options.method}",
        f"features={work / method / 'features'}",
    ]
    features = run("match", [*shared, f"pair_list={written(work / 'chain.txt', pairwise(names))}",
                             f"output={work / method / 'extraction'}"])  # fmt: skip
    results = []
    for name in options.lists:
        for mapper in options.mappers:
            for trust in (True, False)[: 1 + options.all_verified]:
                output = work / method / f"{name}-{mapper}{'' if trust else '-all-verified'}"
                settings = [*shared, f"pair_list={lists[name]}", f"matches={work / method / f'matches-{name}'}",
                            f"output={output}", f"reconstruct.mapper={mapper}",
                            f"reconstruct.consistent={str(trust).lower()}"]  # fmt: skip
                record = run("reconstruct", settings)
                results.append(measured(record, output, name, mapper, trust, scenes, work / method))
    report(results, scenes)
    print(
        json.dumps(
            {
                "cores": CORES,
                "method": options.method,
                "images": len(names),
                "register_s": made["timings_s"]["total"],
                "features_s": features["timings_s"]["features"],
                "results": results,
            }
        )
    )


def run(command: str, settings: list[str]) -> dict:
    """Run a command, unless it was run before; returns its run.json."""
    output = next(text.removeprefix("output=") for text in settings if text.startswith("output="))
    record = Path(output) / "run.json"
    if not (record.exists() and files.read_json(record)["outcome"] == "finished"):
        print(f"$ vop {' '.join([command, *settings])}", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", "vop.cli", command, *settings], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"the command ended with status {done.returncode}; the reason stands above")
    return files.read_json(record)


def written(path: Path, pairs) -> Path:
    files.write_bytes(path, "".join(f"{first} {second}\n" for first, second in pairs).encode())
    return path


def nearest(store: Path, names: list[str], k: int):
    """The k images with the largest inner products of every image."""
    descriptors = EmbeddingStore.open(str(store)).select(names).read()[0].astype(np.float32)
    similarity = descriptors @ descriptors.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return ((names[query], names[row]) for query, rows in enumerate(order) for row in rows)


def measured(
    record: dict, output: Path, name: str, mapper: str, trust: bool, scenes: dict[str, int], folder: Path
) -> dict:
    """A row of the table. The matching of a list is timed where it was done: by the first run that used it."""
    kept = folder / f"matching-{name}.json"
    if record["counts"]["matched_now"]:
        files.write_json(kept, {"seconds": record["timings_s"]["matching"]})
    seconds = {step: record["timings_s"].get(step, 0.0) for step in STEPS}
    seconds["matching"] = files.read_json(kept)["seconds"] if kept.exists() else None
    models = record["counts"]["models"]
    return {
        "list": name,
        "mapper": mapper,
        "trust": trust,
        "pairs": record["counts"]["pairs_matched"],
        "used": record["counts"]["pairs_used"],
        "left_aside": record["counts"]["pairs_left_aside"],
        "seconds": seconds,
        "models": [model["images"] for model in models],
        "mixed": sum(model["foreign"] > 0 for model in models),
        "scenes": judged(output, scenes),
    }


def judged(output: Path, scenes: dict[str, int]) -> dict[str, dict | None]:
    """How right the cameras of each scene are in the model that holds most of them; None: in no model."""
    rows = pq.read_table(output / "registered.parquet", columns=["image", "model", "cam_from_world"]).to_pylist()
    known = {camera.name: camera for camera in Cameras.read(str(output / "cameras.parquet"))}
    found: dict[str, dict | None] = {}
    for scene, total in scenes.items():
        mine = [row for row in rows if row["image"].startswith(f"{scene}/")]
        if not mine:
            found[scene] = None
            continue
        model = Counter(row["model"] for row in mine).most_common(1)[0][0]
        poses = {row["image"]: np.reshape(row["cam_from_world"], (3, 4)) for row in mine if row["model"] == model}
        centers = {name: -pose[:, :3].T @ pose[:, 3] for name, pose in poses.items()}
        errors = judge(centers, known).errors
        true = [known[name].cam_from_world for name in centers]
        laid = similarity(np.array([*centers.values()]), np.array([-pose[:3, :3].T @ pose[:3, 3] for pose in true]))
        found[scene] = {
            "model": model,
            "images": len(centers),
            "of": total,
            "largest_error": max(errors.values()) if errors else None,
            "median_error": float(np.median([*errors.values()])) if errors else None,
            "scale": laid.scale if laid else None,
        }
    return found


def report(results: list[dict], scenes: dict[str, int]) -> None:
    """Print the table."""
    columns = ["list", "mapper", "pairs", "take part", "models", *scenes, "matching (s)", "verification", "mapping"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in results:
        seconds = row["seconds"]
        cells = [
            row["list"] + ("" if row["trust"] else ", all verified pairs"),
            row["mapper"],
            str(row["pairs"]),
            str(row["used"]),
            " + ".join(map(str, row["models"])) + (f", {row['mixed']} mixed" if row["mixed"] else ""),
            *(told(row["scenes"][scene]) for scene in scenes),
            "–" if seconds["matching"] is None else f"{seconds['matching']:.0f}",
            f"{seconds['verify'] + seconds['choose pairs']:.0f}",
            f"{seconds['map']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
    print()


def told(scene: dict | None) -> str:
    if scene is None:
        return "–"
    error = "–" if scene["largest_error"] is None else f"{100 * scene['largest_error']:.2f}%"
    return f"{scene['images']}/{scene['of']} in {scene['model']}, {error}"


if __name__ == "__main__":
    main()
