"""What training the encoder is worth on places that it has not seen: against raw tokens and two projections.

    python benchmarks/training.py --data DIR --work DIR [--backbones xfeat vits14 vits14-block8] [--weights FILE]
                                  [--widths 128] [--seeds 0 1 2] [--epochs 12] [--poses]

DIR of the data holds `rgbd_kitchen/` and `rgbd_office/` (`vop.datasets.posed`). The kitchen's poses are sound over 160
frame numbers, so it is cut into six pieces, each a world of its own; the office into two halves. Training sees the
first three pieces and the first half, judged is on the rest: other stretches of the same two walks, with the same
cameras, in part looking at the same furniture. `--widths 0` stands for the backbone's own width.

Compared, for every backbone, at the same width E and the same bytes a patch:

    raw tokens          unit tokens as they are (E = D)
    PCA whitening       fitted to the tokens of the training images: what `vop register` does without an encoder
    matched whitening   `train.start=matches` without any training step
    encoder             `vop train` from there, one for each seed; mean and deviation over the seeds

Beside every frame lie four NARROW views: the frame cut into four, with its depth, as if taken with twice the focal
length. They train too, so that a thing is seen at two scales; and they are what is searched, since whole frames of such
a piece are found by anything (recall of 0.9 and more for every line of the table, one query of the office worth 0.02).

Scores: *patches*, of the patches with a match in the other image (labels from depth, held-out pairs of frames and
narrow views) the share whose most similar patch there is that match or one of the eight beside it. *recall@k* (overlap
/ k) of overlap voting with idf: every narrow view of a held-out piece is searched among those of its piece, but for the
same frame and the five before and after it, for true overlaps of at least 10, 30 and 50%; the mean over all queries
that have any such. The radius of each is the one that is best on every fourth narrow view of the training pieces, among
`RADII`, by the mean of all these recalls; that of the first seed serves all encoders.

With `--poses` the lists of the held-out half of the office (whole frames, likewise without the neighbours) and of the
façades of Strecha, `strecha/` in the data, which no training saw, are judged by relative pose: AUC of the first, and of
the best of five by inliers (k), `vop relative-pose` being run once over all pairs of either. The kitchen is left out:
between its neighbouring frames the camera moves too little.

Trainings stay in `--work`; a run that is repeated continues. The last line is one JSON object.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from vop import config as configuration
from vop import files, metrics
from vop.datasets.posed import CAMERAS, PosedFolder, depth_name, encode_depth, read_overlap, write_cameras
from vop.geometry import Camera
from vop.image import patch_mask
from vop.models.encoder import load_encoder
from vop.models.whitening import Whitening, fit_whitening
from vop.parts import Parts
from vop.pose.protocols import evaluate
from vop.pose.results import AUC_THRESHOLDS, MEAN, rows_of
from vop.retrieval.voting import best, scores, votes
from vop.store import EmbeddingStore
from vop.training.batches import batch_of
from vop.training.reading import TokenReader
from vop.training.validation import patch_precision

BACKBONES = {  # settings, and D
    "xfeat": (["backbone=xfeat"], 256),
    "vits14": (["backbone=dinov2_vits14"], 384),
    "vits14-block8": (["backbone=dinov2_vits14", "block=8"], 384),
}
SPAN = 166  # frame numbers of a piece of the kitchen
HELD_OUT = ("kitchen/3", "kitchen/4", "kitchen/5", "office/1")
GAP = 5
KS, OVERLAPS, POSED = (1, 5, 10), (0.1, 0.3, 0.5), (1, 5)
RADII, EVERY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), 4
RECIPE = [  # of a short training: the learning rate falls to a tenth within 12 epochs
    *("train.start=matches", "train.learning_rate=0.001", "train.decay_from=4", "train.decay=0.75"),
    *("train.dropout=0", "train.validation_images=16"),
]
NUMBER, NARROW = re.compile(r"\d+"), re.compile(r"-[0-3]\.png$")
Describe = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens (n, P, D), sizes (n, 2) -> (n, P, E)


def scenes(data: Path, work: Path) -> Path:
    """The two sets as a tree of scenes and pieces, with the narrow views, and the list of the held-out pieces."""
    root, pieces = work / "scenes", {}
    for name in ("kitchen", "office"):
        posed = PosedFolder.open(data / f"rgbd_{name}")
        for rank, image in enumerate(sorted(posed.names)):
            number = int(NUMBER.findall(image)[-1])
            piece = number // SPAN if name == "kitchen" else 2 * rank // len(posed.names)
            pieces.setdefault(f"{name}/{piece}", []).append((posed, image))
    for piece, frames in pieces.items():
        folder, cameras = root / piece, {}
        if (folder / CAMERAS).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for posed, image in frames:
            for file in (image, depth_name(image)):
                (folder / file).unlink(missing_ok=True)
                (folder / file).symlink_to(Path(posed.root, file))
            cameras |= {image: posed.camera(image)} | narrow(posed, image, folder)
        write_cameras(folder, cameras)
    files.write_bytes(work / "held-out.txt", "".join(f"{piece}\n" for piece in HELD_OUT).encode())
    return root


def narrow(posed: PosedFolder, image: str, folder: Path) -> dict[str, Camera]:
    """Cut a frame and its depth into four, as if taken with twice the focal length; returns the cameras."""
    camera, rgb, depth = posed.camera(image), posed.image(image), posed.depth(image)
    width, height, cameras = camera.width // 2, camera.height // 2, {}
    for number in range(4):
        x, y = number % 2 * width, number // 2 * height
        name, window = f"{Path(image).stem}-{number}.png", np.s_[y : y + height, x : x + width]
        cv2.imwrite(str(folder / name), cv2.cvtColor(rgb[window], cv2.COLOR_RGB2BGR))
        (folder / depth_name(name)).write_bytes(encode_depth(depth[window]))
        K = camera.K - np.array([[0, 0, x], [0, 0, y], [0, 0, 0]])
        cameras[name] = replace(camera, K=K, width=width, height=height)
    return cameras


def run(command: str, settings: list[str]) -> dict:
    """Run a command of vop; returns its run.json."""
    print(f"$ vop {command} {' '.join(settings)}", file=sys.stderr)
    if subprocess.run([sys.executable, "-m", "vop.cli", command, *settings], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit("the command failed; the reason stands above")
    output = next(text.removeprefix("output=") for text in settings if text.startswith("output="))
    return files.read_json(files.join(output, "run.json"))


@dataclass(frozen=True)
class Trained:
    """The trainings of one backbone to one width, by seed."""

    settings: list[str]
    width: int
    folders: dict[int, Path]

    @property
    def first(self) -> Path:
        return next(iter(self.folders.values()))


def trained(root: Path, work: Path, name: str, settings: list[str], width: int, options) -> Trained:
    """Train with each seed; all widths share the tokens, and all trainings with one seed the labels."""
    folders = {}
    for seed in options.seeds:
        folders[seed] = work / name / f"width-{width}" / f"seed-{seed}"
        run("train", [
            f"images={root}", f"cameras={root}", f"train.validation={work / 'held-out.txt'}", *settings, *RECIPE,
            f"train.descriptor_dim={width}", f"train.epochs={options.epochs}", f"train.seed={seed}",
            f"tokens={work / name / 'tokens'}", f"train.cache={work / 'cache'}",
            f"pair_labels={work / 'labels' / f'seed-{seed}'}", f"output={folders[seed]}",
        ])  # fmt: skip
    return Trained(settings, width, folders)


@dataclass(frozen=True, eq=False)
class Pool:
    """Images that are searched: names, tokens (n, P, D), scaled sizes (n, 2), which may be paired (n, n) bool."""

    names: list[str]
    tokens: torch.Tensor
    sizes: torch.Tensor
    allowed: np.ndarray

    @classmethod
    def read(cls, reader: TokenReader, names: list[str], allowed: np.ndarray) -> "Pool":
        tokens, sizes = reader.read(names)
        return cls(names, torch.from_numpy(tokens).float(), torch.from_numpy(sizes), allowed)


def apart(frames: np.ndarray) -> np.ndarray:
    """Which may be paired, (n, n) bool, of images of frames (n,): those that are not neighbours in the walk."""
    return np.abs(frames[:, None] - frames) > GAP


def narrow_pools(one: Trained, reader: TokenReader, held_out: bool) -> list[tuple[Pool, np.ndarray]]:
    """The narrow views of the training pieces or of the held-out ones, and their overlaps (n, n)."""
    truth = read_overlap(next(one.first.glob("overlap-*.parquet")))
    pieces: dict[str, list[int]] = {}
    for row, name in enumerate(truth.names):
        if NARROW.search(name):
            pieces.setdefault(name.rpartition("/")[0], []).append(row)
    found = []
    for piece, rows in sorted(pieces.items()):
        if (piece in HELD_OUT) == held_out:
            rows.sort(key=lambda row: truth.names[row])
            pool = Pool.read(reader, [truth.names[row] for row in rows], apart(np.arange(len(rows)) // 4))
            found.append((pool, truth.matrix[rows][:, rows].toarray()))
    return found


@torch.inference_mode()
def patches_of(describe: Describe, pool: Pool) -> list[np.ndarray]:
    """Unit descriptors of the image patches of every image."""
    desc = torch.nn.functional.normalize(describe(pool.tokens, pool.sizes), dim=-1).numpy()
    size = 14 * int(desc.shape[1] ** 0.5)
    return [each[patch_mask(*map(int, box), size)] for each, box in zip(desc, pool.sizes, strict=True)]


def ranked(describe: Describe, pool: Pool, radius: float, most: int, every: int = 1) -> dict[str, list[str]]:
    """Of each image, or every so many, the names of those it may be paired with, best first."""
    patches, rankings = patches_of(describe, pool), {}
    for query in range(0, len(patches), every):
        rows = np.flatnonzero(pool.allowed[query])
        found = votes(patches[query], [patches[row] for row in rows], radius, rows)
        order = found.rows[best(scores(found, "idf"), found.rows, most)]
        rankings[pool.names[query]] = [pool.names[row] for row in order]
    return rankings


def recalls(describe: Describe, pools: list[tuple[Pool, np.ndarray]], radius: float, every: int = 1) -> dict:
    """recall@k by `OVERLAP/K`, of all queries that have such an image to be found."""
    found = {f"{least:g}/{k}": [0.0, 0] for least in OVERLAPS for k in KS}
    for pool, overlap in pools:
        rankings, truth = ranked(describe, pool, radius, max(KS), every), np.where(pool.allowed, overlap, 0)
        for least in OVERLAPS:
            if (truth[::every] >= least).any():
                scored = metrics.retrieval(rankings, pool.names, truth, least, ks=KS)
                for k in KS:
                    found[f"{least:g}/{k}"][0] += scored[f"recall@{k}"] * scored["queries"]
                    found[f"{least:g}/{k}"][1] += scored["queries"]
    return {key: right / queries for key, (right, queries) in found.items()}


def tuned(describe: Describe, training: list[tuple[Pool, np.ndarray]]) -> float:
    """The radius with the highest mean of the recalls; the smallest of equal ones."""
    means = {radius: statistics.mean(recalls(describe, training, radius, EVERY).values()) for radius in RADII}
    return max(means, key=lambda radius: (means[radius], -radius))


@torch.inference_mode()
def precision(describe: Describe, reader: TokenReader, labels) -> float:
    """`patch_precision` over held-out pairs."""
    right = asked = 0
    for start in range(0, labels.num_rows, 32):
        batch = batch_of(reader(labels.slice(start, 32)), 224, "clear")
        sides = ((batch.inputs0, batch.sizes0), (batch.inputs1, batch.sizes1))
        desc = [torch.nn.functional.normalize(describe(tokens.float(), sizes), dim=-1) for tokens, sizes in sides]
        found = patch_precision(*desc, batch.positive)
        right, asked = right + found[0], asked + found[1]
    return right / asked


def variants(one: Trained, reader: TokenReader) -> dict[str, list[Describe]]:
    """What is compared at one width: several functions where there are several seeds."""
    truth = next(one.first.glob("overlap-*.parquet"))
    names = [name for name in read_overlap(truth).names if name.rpartition("/")[0] not in HELD_OUT]
    tokens, sizes = reader.read(names)
    sample = np.concatenate([
        image[patch_mask(*map(int, box), 224)] for image, box in zip(tokens, sizes, strict=True)
    ]).astype(np.float32)  # fmt: skip
    depth = sample.shape[1]
    arrays = {name: tensor.numpy() for name, tensor in load_file(one.first / "start.safetensors").items()}
    encoders = [load_encoder(str(folder / "encoder")) for folder in one.folders.values()]
    pca = fit_whitening(sample, one.width)
    return {
        **({"raw tokens": [lambda tokens, sizes: tokens]} if one.width == depth else {}),
        "PCA whitening": [lambda tokens, sizes: pca.apply(tokens)],
        "matched whitening": [lambda tokens, sizes: Whitening(**arrays).apply(tokens)],
        "encoder": encoders,
    }


def all_poses(label: str, images: Path, pool: Pool, work: Path) -> pa.Table:
    """The poses of all pairs of a pool that are allowed."""
    listed, names = work / f"pairs-{label}.txt", pool.names
    rows = zip(*np.nonzero(np.triu(pool.allowed, 1)), strict=True)
    files.write_bytes(listed, "".join(f"{names[row]} {names[column]}\n" for row, column in rows).encode())
    output = work / f"poses-{label}"
    run("relative-pose", [f"images={images}", f"cameras={images}", f"pair_list={listed}", f"output={output}",
                          "pose.estimators=[opencv]", "report.queries=0"])  # fmt: skip
    return pq.read_table(output / "poses.parquet")


def posed(describe: Describe, pool: Pool, radius: float, poses: pa.Table) -> dict[str, float]:
    """AUC@5, 10, 20 by `K/AUC` of the ranking, by the poses of all pairs; mean over the scenes, `fixed`, opencv."""
    rows = [(query, database, rank) for query, found in ranked(describe, pool, radius, max(POSED)).items()
            for rank, database in enumerate(found)]  # fmt: skip
    query, database, rank = zip(*rows, strict=True)
    listed = pa.table({"query": query, "database": database, "rank": pa.array(rank, pa.int32())})
    queries = pa.table({"query": pool.names, "scene": [name.split("/")[0] for name in pool.names],
                        "known": [True] * len(pool.names)})  # fmt: skip
    config = configuration.load(overrides=["pose.estimators=[opencv]", f"pose.ks={[*POSED]}"]).pose
    results = rows_of(evaluate(listed, poses, config, queries).results, MEAN)
    return {
        f"{row['k']}/{at}": row[f"auc@{at}"]
        for row in results
        if row["unit"] == "query" and row["protocol"] == "fixed" and row["k"] in POSED
        for at in AUC_THRESHOLDS
    }


def averaged(several: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and, of several, deviation of every score."""
    return {
        key: [round(statistics.mean(values), 4), *([round(statistics.stdev(values), 4)] if len(values) > 1 else [])]
        for key in several[0]
        if (values := [one[key] for one in several])
    }


def told(score: list[float]) -> str:
    return f"{score[0]:.3f}" + (f" ± {score[1]:.3f}" if len(score) > 1 else "")


@dataclass(frozen=True)
class Judge:
    """What all variants of one backbone are judged on."""

    reader: TokenReader
    training: list[tuple[Pool, np.ndarray]]
    held_out: list[tuple[Pool, np.ndarray]]
    labels: pa.Table
    posed: dict[str, tuple[Pool, pa.Table]]

    def scores(self, describe: Describe, radius: float) -> dict[str, float]:
        """All scores of a variant."""
        scored = {"radius": radius, "patches": precision(describe, self.reader, self.labels)}
        scored |= recalls(describe, self.held_out, radius)
        for label, (pool, poses) in self.posed.items():
            scored |= {f"{label} {key}": value for key, value in posed(describe, pool, radius, poses).items()}
        return scored

    def table(self, title: str, compared: dict[str, list[Describe]]) -> dict:
        """Judge and print."""
        record = {}
        for label, several in compared.items():
            radius = tuned(several[0], self.training)
            found = [self.scores(describe, radius) for describe in several]
            record[label] = averaged(found)
            print(f"{title}, {label}: {record[label]}", file=sys.stderr)
        columns = [key for key in next(iter(record.values())) if key != "radius"]
        print(f"\n**{title}**\n\n| | radius | {' | '.join(columns)} |")
        print(f"| {' | '.join(['---'] * (len(columns) + 2))} |")
        for label, scored in record.items():
            cells = [f"{scored['radius'][0]:.2f}", *(told(scored[column]) for column in columns)]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
        return record


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything computed; kept")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["xfeat"])
    parser.add_argument("--weights", help="file of the ViT-S weights")
    parser.add_argument("--widths", type=int, nargs="+", default=[128], help="0: the backbone's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--poses", action="store_true", help="judge the lists by relative pose too")
    options = parser.parse_args()
    work, data = options.work.resolve(), options.data.resolve()
    root, record = scenes(data, work), {}
    for name in options.backbones:
        backbone, depth = BACKBONES[name]
        settings = backbone + ([f"weights={options.weights}"] if name != "xfeat" and options.weights else [])
        trainings = [trained(root, work, name, settings, width or depth, options) for width in options.widths]
        reader = TokenReader(str(work / name / "tokens"), str(work / "cache"))
        (labels,) = Parts.all_of(str(work / "labels" / f"seed-{options.seeds[0]}"), "labels")
        judge = Judge(
            reader,
            narrow_pools(trainings[0], reader, held_out=False),
            narrow_pools(trainings[0], reader, held_out=True),
            labels.read_one(0).replace_schema_metadata(None),
            pools_with_poses(root, data, reader, name, settings, work) if options.poses else {},
        )
        for one in trainings:
            title = f"{name}, E = {one.width} ({2 * one.width} bytes a patch in float16)"
            record[f"{name}/{one.width}"] = judge.table(title, variants(one, reader))
    print(json.dumps({"epochs": options.epochs, "seeds": options.seeds, **record}))


def pools_with_poses(root: Path, data: Path, reader: TokenReader, name: str, settings: list[str], work: Path) -> dict:
    """The pools whose lists are judged by relative pose, and the poses of all their pairs."""
    office = sorted(f"office/1/{image}" for image in json.loads((root / "office/1" / CAMERAS).read_text())
                    if not NARROW.search(image))  # fmt: skip
    store, photographs = work / name / "strecha", data / "strecha"
    run("embed", [f"images={photographs}", *settings, "embedding.whiten=null", "embedding.tokens=true",
                  "embedding.patches=false", f"store={store}", f"output={store}-run"])  # fmt: skip
    facades = EmbeddingStore.open(str(store)).select().names
    pools = {
        "office": (root, Pool.read(reader, office, apart(np.arange(len(office))))),
        "facades": (photographs, Pool.read(TokenReader(str(store), str(work / "cache")), facades,
                                           ~np.eye(len(facades), dtype=bool))),
    }  # fmt: skip
    return {label: (pool, all_poses(label, images, pool, work)) for label, (images, pool) in pools.items()}


if __name__ == "__main__":
    main()
