"""What training the encoder is worth on places that it has not seen: against raw tokens and two projections.

    python benchmarks/training.py --data DIR --work DIR [--backbones xfeat vits14 vits14-block8] [--weights FILE]
                                  [--widths 64 128 256] [--seeds 0 1 2] [--epochs 10] [--poses DIR]

DIR of the data holds `rgbd_kitchen/` and `rgbd_office/` (`vop.datasets.posed`). The kitchen's poses are sound over 160
frame numbers, so it is cut into six pieces, each a world of its own; the office into two halves. Training sees the
first three pieces and the first half, judged is on the rest: other stretches of the same two walks, with the same
cameras, in part looking at the same furniture. With `--poses DIR`, the folder of `relative_pose.py`, the façades of
Strecha, which no training saw, are ranked too, and the lists judged by the poses that lie there.

Compared, for every backbone, at the same width E and the same bytes a patch:

    raw tokens          unit tokens as they are (E = D)
    PCA whitening       fitted to the tokens of the training images: what `vop register` does without an encoder
    matched whitening   `train.start=matches` without any training step
    encoder             `vop train` from there, one for each seed; mean and deviation over the seeds

Scores: *patches*, of the patches with a match in the other image (labels from depth, held-out pairs) the share whose
most similar patch there is that match or one of the eight beside it. *recall@k* of overlap voting with idf, all other
images of the piece being candidates, for true overlaps of at least 10, 30 and 50%, with the five frames before and
after the query left out (beside them every list is right), mean over the held-out pieces. The radius of each is the one
that is best on the training pieces, among `RADII`.

Trainings stay in `--work`; a run that is repeated continues. The last line is one JSON object.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from vop import config as configuration
from vop import files, metrics
from vop.datasets.posed import CAMERAS, depth_name, read_overlap
from vop.image import patch_mask
from vop.models.encoder import load_encoder
from vop.models.whitening import Whitening, fit_whitening
from vop.parts import Parts
from vop.pose.protocols import evaluate
from vop.pose.results import MEAN, rows_of
from vop.retrieval.voting import best, scores, votes
from vop.store import EmbeddingStore
from vop.training.batches import batch_of
from vop.training.reading import TokenReader
from vop.training.validation import patch_precision

BACKBONES = {
    "xfeat": ["backbone=xfeat"],
    "vits14": ["backbone=dinov2_vits14"],
    "vits14-block8": ["backbone=dinov2_vits14", "block=8"],
}
PIECES, SPAN = 6, 166  # of the kitchen, and frame numbers of each
HELD_OUT = ("kitchen/3", "kitchen/4", "kitchen/5", "office/1")
GAP = 5
KS, OVERLAPS = (1, 5, 10), (0.1, 0.3, 0.5)
RADII = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
RECIPE = ["train.start=matches", "train.learning_rate=0.001"]
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
    """Train with each seed; all share the tokens."""
    folders = {}
    for seed in options.seeds:
        folders[seed] = work / name / f"width-{width}" / f"seed-{seed}"
        run("train", [
            f"images={root}", f"cameras={root}", f"train.validation={work / 'held-out.txt'}", *settings, *RECIPE,
            f"train.descriptor_dim={width}", f"train.epochs={options.epochs}", f"train.seed={seed}",
            f"tokens={work / name / 'tokens'}", f"train.cache={work / 'cache'}", f"output={folders[seed]}",
        ])  # fmt: skip
    return Trained(settings, width, folders)


@dataclass(frozen=True, eq=False)
class Piece:
    """Images of one world: names, tokens (n, P, D), scaled sizes (n, 2), true overlaps (n, n), -1 where not judged."""

    names: list[str]
    tokens: torch.Tensor
    sizes: torch.Tensor
    overlap: np.ndarray


def pieces(reader: TokenReader, overlap_file: Path, held_out: bool) -> list[Piece]:
    """The training pieces or the held-out ones, in the order of their names."""
    names, matrix = read_overlap(str(overlap_file))
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition("/")[0], []).append(name)
    index, chosen = {name: row for row, name in enumerate(names)}, []
    for folder, members in sorted(found.items()):
        if (folder in HELD_OUT) == held_out:
            members = sorted(members)
            tokens, sizes = reader.read(members)
            rows = [index[name] for name in members]
            overlap = matrix[np.ix_(rows, rows)].copy()
            order = np.arange(len(members))
            overlap[np.abs(order[:, None] - order) <= GAP] = -1
            chosen.append(Piece(members, torch.from_numpy(tokens).float(), torch.from_numpy(sizes), overlap))
    return chosen


@torch.inference_mode()
def patches_of(describe: Describe, piece: Piece) -> list[np.ndarray]:
    """Unit descriptors of the image patches of every image."""
    desc = torch.nn.functional.normalize(describe(piece.tokens, piece.sizes), dim=-1).numpy()
    size = 14 * int(desc.shape[1] ** 0.5)
    return [each[patch_mask(*map(int, box), size)] for each, box in zip(desc, piece.sizes, strict=True)]


def ranked(patches: list[np.ndarray], allowed: np.ndarray, radius: float, most: int) -> list[np.ndarray]:
    """Of every image the allowed others (n, n), best first."""
    rankings = []
    for query, rows in enumerate(map(np.flatnonzero, allowed)):
        found = votes(patches[query], [patches[row] for row in rows], radius, rows)
        rankings.append(found.rows[best(scores(found, "idf"), found.rows, most)])
    return rankings


def recalls(describe: Describe, judged: list[Piece], radius: float) -> dict[str, float]:
    """recall@k by `OVERLAP/K`, mean over the pieces that have any such pair."""
    found: dict[str, list[float]] = {}
    for piece in judged:
        patches, names = patches_of(describe, piece), np.array(piece.names)
        rankings = ranked(patches, piece.overlap >= 0, radius, max(KS))
        for least in OVERLAPS:
            if (piece.overlap >= least).any():
                lists = {names[query]: list(names[rows]) for query, rows in enumerate(rankings)}
                truth = np.where(piece.overlap < 0, 0, piece.overlap)
                scored = metrics.retrieval(lists, piece.names, truth, least, ks=KS)
                for k in KS:
                    found.setdefault(f"{least:g}/{k}", []).append(scored[f"recall@{k}"])
    return {key: statistics.mean(values) for key, values in found.items()}


def tuned(describe: Describe, training: list[Piece]) -> float:
    """The radius with the highest mean of the recalls on the training pieces; the smallest of equal ones."""
    means = {radius: statistics.mean(recalls(describe, training, radius).values()) for radius in RADII}
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


def variants(one: Trained, reader: TokenReader, training: list[Piece]) -> dict[str, list[Describe]]:
    """What is compared at one width: several functions where there are several seeds."""
    sample = np.concatenate([
        piece.tokens.numpy()[row][patch_mask(*map(int, piece.sizes[row]), 224)]
        for piece in training for row in range(len(piece.names))
    ])  # fmt: skip
    depth = sample.shape[1]
    arrays = {name: tensor.numpy() for name, tensor in load_file(one.first / "start.safetensors").items()}
    encoders = [load_encoder(str(folder / "encoder")) for folder in one.folders.values()]
    pca = fit_whitening(sample, min(one.width, depth))
    return {
        **({"raw tokens": [lambda tokens, sizes: tokens]} if one.width == depth else {}),
        "PCA whitening": [lambda tokens, sizes: pca.apply(tokens)],
        "matched whitening": [lambda tokens, sizes: Whitening(**arrays).apply(tokens)],
        "encoder": encoders,
    }


def facades(work: Path, name: str, settings: list[str], data: Path) -> Piece:
    """The 66 photographs of Strecha as one pool, with their tokens; any two may be paired."""
    store = work / name / "strecha"
    run("embed", [f"images={data / 'strecha'}", *settings, "embedding.whiten=null", "embedding.tokens=true",
                  f"store={store}", f"output={work / name / 'strecha-run'}"])  # fmt: skip
    names = EmbeddingStore.open(str(store)).select().names
    tokens, sizes = TokenReader(str(store), str(work / "cache")).read(names)
    allowed = 1.0 - 2.0 * np.eye(len(names))
    return Piece(names, torch.from_numpy(tokens).float(), torch.from_numpy(sizes), allowed)


def posed(describe: Describe, pool: Piece, radius: float, poses) -> dict[str, float]:
    """AUC@5, 10, 20 by `K/AUC` of the ranking, by the poses of all pairs; mean over the scenes, `fixed`, opencv."""
    rankings = ranked(patches_of(describe, pool), pool.overlap >= 0, radius, 5)
    rows = [(pool.names[query], pool.names[row], rank) for query, found in enumerate(rankings)
            for rank, row in enumerate(found)]  # fmt: skip
    query, database, rank = zip(*rows, strict=True)
    listed = pa.table({"query": query, "database": database, "rank": pa.array(rank, pa.int32())})
    queries = pa.table({"query": pool.names, "scene": [name.split("/")[0] for name in pool.names],
                        "known": [True] * len(pool.names)})  # fmt: skip
    config = configuration.load(overrides=["pose.estimators=[opencv]", "pose.ks=[1,5]"]).pose
    results = rows_of(evaluate(listed, poses, config, queries).results, MEAN)
    return {
        f"{row['k']}/{at}": row[f"auc@{at}"]
        for row in results
        if row["unit"] == "query" and row["protocol"] == "fixed" and row["k"] in (1, 5)
        for at in (5, 10, 20)
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


def judge(name: str, one: Trained, options, poses) -> dict:
    """The table of one backbone at one width."""
    reader = TokenReader(str(options.work / name / "tokens"), str(options.work / "cache"))
    overlaps = next(one.first.glob("overlap-*.parquet"))
    training, held_out = (pieces(reader, overlaps, side) for side in (False, True))
    labels = Parts.all_of(str(one.first), "labels")[0].read_one(0).replace_schema_metadata(None)
    pool = facades(options.work, name, one.settings, options.data) if poses is not None else None
    record = {}
    for label, several in variants(one, reader, training).items():
        found = []
        for describe in several:
            radius = tuned(describe, training)
            scored = {"radius": radius, "patches": precision(describe, reader, labels)}
            scored |= recalls(describe, held_out, radius)
            if pool is not None:
                scored |= {f"pose/{key}": value for key, value in posed(describe, pool, radius, poses).items()}
            found.append(scored)
            print(f"{name}, E {one.width}, {label}: {scored}", file=sys.stderr)
        record[label] = averaged(found)
    columns = ["patches", *(f"{least:g}/{k}" for least in OVERLAPS for k in KS)]
    columns += [f"pose/{k}/{at}" for k in (1, 5) for at in (5, 10, 20)] if pool is not None else []
    print(f"\n**{name}, E = {one.width} ({2 * one.width} bytes a patch in float16)**\n")
    print(f"| | radius | {' | '.join(columns)} |")
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
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--poses", type=Path, help="folder --work of relative_pose.py, for the poses of Strecha")
    options = parser.parse_args()
    options.work = options.work.resolve()
    root = scenes(options.data.resolve(), options.work)
    poses = None
    if options.poses is not None:
        poses = pq.read_table(options.poses / "full" / "strecha" / "xfeat-lighterglue" / "poses.parquet")
    record = {}
    for name in options.backbones:
        settings = BACKBONES[name] + ([f"weights={options.weights}"] if name != "xfeat" and options.weights else [])
        for width in options.widths:
            one = trained(root, options.work, name, settings, width, options)
            record[f"{name}/{width}"] = judge(name, one, options, poses)
    print(json.dumps({"epochs": options.epochs, "seeds": options.seeds, **record}))


if __name__ == "__main__":
    main()
