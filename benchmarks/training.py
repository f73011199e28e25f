"""What training the encoder is worth on places that it has not seen: against raw tokens and two projections.

    python benchmarks/training.py --data DIR --work DIR [--backbones xfeat vits14 vits14-block8] [--weights FILE]
                                  [--widths 128] [--seeds 0 1 2] [--epochs 8] [--poses]

DIR of the data holds `rgbd_kitchen/` and `rgbd_office/` (`vop.datasets.posed`). The kitchen's poses are sound over 160
frame numbers, so it is cut into six pieces, each a world of its own; the office into two halves. Training sees the
first three pieces and the first half, judged is on the rest: other stretches of the same two walks, with the same
cameras, in part looking at the same furniture. `--widths 0` stands for the backbone's own width.

Compared, for every backbone, at the same width E and the same bytes a patch:

    raw tokens          unit tokens as they are (E = D)
    PCA whitening       fitted to the tokens of the training images: what `vop register` does without an encoder
    matched whitening   `train.start=matches` without any training step
    encoder             `vop train` from there, one for each seed; mean and deviation over the seeds

Scores: *patches*, of the patches with a match in the other image (labels from depth, held-out pairs) the share whose
most similar patch there is that match or one of the eight beside it. *recall@k* of overlap voting with idf among NARROW
views: every frame is cut into four, as if taken with twice the focal length (whole frames are found by anything: recall
of 0.9 and more for every line of the table, a query of the office being worth 0.02). Of a held-out piece every narrow
view is searched among all of the piece but those of the same frame and of the five before and after it, for true
overlaps of at least 10, 30 and 50%; the mean over all queries that have any such. The radius of each is the one that is
best on every fourth narrow view of the training pieces, among `RADII`, by the mean of all these recalls; that of the
first seed serves all encoders.

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
from vop.datasets.posed import (
    CAMERAS,
    OVERLAP,
    OverlapTruth,
    PosedFolder,
    depth_name,
    encode_depth,
    read_overlap,
    write_cameras,
    write_overlap,
)
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
PIECES, SPAN = 6, 166  # of the kitchen, and frame numbers of each
HELD_OUT = ("kitchen/3", "kitchen/4", "kitchen/5", "office/1")
GAP = 5
KS, OVERLAPS, POSED = (1, 5, 10), (0.1, 0.3, 0.5), (1, 5)
RADII, EVERY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), 4
RECIPE = ["train.start=matches", "train.learning_rate=0.001", "train.dropout=0"]
NUMBER = re.compile(r"\d+")
Describe = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens (n, P, D), sizes (n, 2) -> (n, P, E)


def scenes(data: Path, work: Path) -> Path:
    """The two sets as a tree of scenes and pieces, in links, and the list of the held-out ones."""
    root = work / "scenes"
    for name in ("kitchen", "office"):
        source = data / f"rgbd_{name}"
        cameras = json.loads((source / CAMERAS).read_text())
        for rank, image in enumerate(sorted(cameras)):
            number = int(NUMBER.findall(image)[-1])
            piece = number // SPAN if name == "kitchen" else 2 * rank // len(cameras)
            folder = root / name / str(piece)
            folder.mkdir(parents=True, exist_ok=True)
            for file in (image, depth_name(image)):
                if not (folder / file).exists():
                    (folder / file).symlink_to((source / file).resolve())
            known = json.loads((folder / CAMERAS).read_text()) if (folder / CAMERAS).exists() else {}
            if image not in known:
                files.write_json(folder / CAMERAS, known | {image: cameras[image]})
    files.write_bytes(work / "held-out.txt", "".join(f"{piece}\n" for piece in HELD_OUT).encode())
    return root


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


def narrow(root: Path, work: Path) -> Path:
    """Every frame of every piece cut into four, as taken with twice the focal length: with depth, cameras, overlaps."""
    cut = work / "narrow"
    for folder in sorted(path.parent for path in root.glob(f"*/*/{CAMERAS}")):
        target = cut / folder.relative_to(root)
        if (target / OVERLAP).exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        posed, cameras = PosedFolder.open(folder), {}
        for name in sorted(posed.names):
            camera, rgb, depth = posed.camera(name), posed.image(name), posed.depth(name)
            width, height = camera.width // 2, camera.height // 2
            for number in range(4):
                x, y = number % 2 * width, number // 2 * height
                part, window = f"{Path(name).stem}-{number}.png", np.s_[y : y + height, x : x + width]
                cv2.imwrite(str(target / part), cv2.cvtColor(rgb[window], cv2.COLOR_RGB2BGR))
                (target / depth_name(part)).write_bytes(encode_depth(depth[window]))
                K = camera.K - np.array([[0, 0, x], [0, 0, y], [0, 0, 0]])
                cameras[part] = replace(camera, K=K, width=width, height=height)
        write_cameras(target, cameras)
        truth = PosedFolder.open(target)
        write_overlap(target / OVERLAP, OverlapTruth(truth.names, truth.overlap_matrix()))
    return cut


def tokens_of(images: Path, label: str, name: str, settings: list[str], work: Path) -> TokenReader:
    """The tokens of a folder of images."""
    store = work / name / label
    run("embed", [f"images={images}", *settings, "embedding.whiten=null", "embedding.tokens=true", f"store={store}",
                  f"output={work / name / label}-run"])  # fmt: skip
    return TokenReader(str(store), str(work / "cache"))


def narrow_pools(cut: Path, reader: TokenReader, held_out: bool) -> list[tuple[Pool, np.ndarray]]:
    """The narrow views of the training pieces or of the held-out ones, and their overlaps (n, n)."""
    found = []
    for file in sorted(cut.glob(f"*/*/{OVERLAP}")):
        piece = file.parent.relative_to(cut).as_posix()
        if (piece in HELD_OUT) == held_out:
            names, overlap = read_overlap(file)
            pool = Pool.read(reader, [f"{piece}/{name}" for name in names], apart(np.arange(len(names)) // 4))
            found.append((pool, overlap))
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


def variants(one: Trained, frames: TokenReader) -> dict[str, list[Describe]]:
    """What is compared at one width: several functions where there are several seeds."""
    truth = next(one.first.glob("overlap-*.parquet"))
    names = [name for name in read_overlap(truth)[0] if name.rpartition("/")[0] not in HELD_OUT]
    tokens, sizes = frames.read(names)
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


def all_poses(label: str, images: Path, names: list[str], allowed: np.ndarray, work: Path) -> pa.Table:
    """The poses of all pairs of a pool that are allowed."""
    listed = work / f"pairs-{label}.txt"
    rows = zip(*np.nonzero(np.triu(allowed, 1)), strict=True)
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

    frames: TokenReader
    training: list[tuple[Pool, np.ndarray]]
    held_out: list[tuple[Pool, np.ndarray]]
    labels: pa.Table
    posed: dict[str, tuple[Pool, pa.Table]]

    def scores(self, describe: Describe, radius: float) -> dict[str, float]:
        """All scores of a variant."""
        scored = {"radius": radius, "patches": precision(describe, self.frames, self.labels)}
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
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--poses", action="store_true", help="judge the lists by relative pose too")
    options = parser.parse_args()
    work, data = options.work.resolve(), options.data.resolve()
    root = scenes(data, work)
    cut, record = narrow(root, work), {}
    for name in options.backbones:
        backbone, depth = BACKBONES[name]
        settings = backbone + ([f"weights={options.weights}"] if name != "xfeat" and options.weights else [])
        trainings = [trained(root, work, name, settings, width or depth, options) for width in options.widths]
        reader = tokens_of(cut, "narrow", name, settings, work)
        frames = TokenReader(str(work / name / "tokens"), str(work / "cache"))
        (labels,) = Parts.all_of(str(work / "labels" / "seed-0"), "labels")
        judge = Judge(
            frames,
            narrow_pools(cut, reader, held_out=False),
            narrow_pools(cut, reader, held_out=True),
            labels.read_one(0).replace_schema_metadata(None),
            pools_with_poses(root, data, frames, name, settings, work) if options.poses else {},
        )
        for one in trainings:
            title = f"{name}, E = {one.width} ({2 * one.width} bytes a patch in float16)"
            record[f"{name}/{one.width}"] = judge.table(title, variants(one, frames))
    print(json.dumps({"epochs": options.epochs, "seeds": options.seeds, **record}))


def pools_with_poses(root: Path, data: Path, frames: TokenReader, name: str, settings: list[str], work: Path) -> dict:
    """The pools whose lists are judged by relative pose, and the poses of all their pairs."""
    office = sorted(f"office/1/{image}" for image in json.loads((root / "office/1" / CAMERAS).read_text()))
    allowed = {"office": apart(np.arange(len(office)))}
    facades = tokens_of(data / "strecha", "strecha", name, settings, work)
    photographs = EmbeddingStore.open(facades.path).select().names
    allowed["facades"] = ~np.eye(len(photographs), dtype=bool)
    return {
        label: (Pool.read(reader, names, allowed[label]), all_poses(label, images, names, allowed[label], work))
        for label, reader, names, images in (
            ("office", frames, office, root), ("facades", facades, photographs, data / "strecha")
        )
    }  # fmt: skip


if __name__ == "__main__":
    main()
