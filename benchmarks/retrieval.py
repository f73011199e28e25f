"""Accuracy of the ranking on RGB-D sets, against overlaps computed from depth and pose.

    python benchmarks/retrieval.py --data DIR [--sets rgbd_office rgbd_kitchen] [--vits WEIGHTS] [--changed-images DIR]

DIR holds a folder per set: images, `cameras.json` and depth (`vop.datasets.posed`). Every image is a query against all
others of its set. Printed is precision@1 / @5 / @10, the share of the k first that overlap by at least 10, 30 and 50%,
hits / k: where fewer images overlap that much, 1 is out of reach, and the ceiling says how far. Features: xfeat; with
`--vits`, that file as dinov2_vits14, its last block and block 8; the same architecture with random weights; and random
vectors. The tables in between show how far the settings of the votes matter, and what storage as int8 costs; all share
one embedding of the images.

"Changed" queries are altered photographs (`Change`) searched in the unaltered database; whitening and centre are fitted
on the unaltered images, and the own, unaltered image of a query is never among its candidates. "Held out" repeats the
default settings with whitening and centre fitted on images that are not queries. The kitchen's poses drift: frames more
than 160 numbers apart are searched, but taken out of the ranking before it is judged, as nothing is known about them.
The last line is one JSON object.
"""

import argparse
import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model

from vop import metrics
from vop.datasets.posed import PosedFolder
from vop.image import decode, letterbox, patch_mask, to_jpeg
from vop.models.backbone import Backbone, load_backbone
from vop.models.descriptor import pooled, unit
from vop.models.whitening import fit_whitening
from vop.quantised import stored
from vop.retrieval import voting
from vop.retrieval.index import ShardIndex, Wanted

OVERLAPS, KS = (0.1, 0.3, 0.5), (1, 5, 10)
STEP = {"rgbd_kitchen": 2}  # frames are 4 numbers apart; each second one halves the time that ViT-S takes
APART = {"rgbd_kitchen": 160}  # numbers; beyond, the poses have drifted
BATCH = 16


@dataclass(frozen=True)
class Variant:
    """A way to search: the defaults of `vop` unless said otherwise. `weights` null: the order of the shortlist."""

    label: str
    weights: str | None = "idf"
    whiten: int | None = 128
    radius: float = 0.65
    masked: bool = True
    shortlist: int | None = 50
    dtype: str = "float16"


RAW = Variant("raw", whiten=None, radius=0.2)
VARIANTS = (
    Variant("whitened, r 0.65, idf"),
    Variant("whitened, r 0.65, tfidf", weights="tfidf"),
    Variant("whitened, r 0.65, unweighted", weights="none"),
    Variant("whitened, r 0.65, idf, padding votes", masked=False),
    Variant("whitened, r 0.65, idf, no shortlist", shortlist=None),
    replace(RAW, label="raw, r 0.2, idf"),
    replace(RAW, label="raw, r 0.2, tfidf", weights="tfidf"),
    replace(RAW, label="raw, r 0.2, unweighted", weights="none"),
    replace(RAW, label="raw, r 0.2, tfidf, padding votes", weights="tfidf", masked=False),
    Variant("whitened, r 0.65, idf, int8", dtype="int8"),
    replace(RAW, label="raw, r 0.2, idf, int8", dtype="int8"),
    Variant("global only", weights=None),
)
DEFAULT = VARIANTS[0]
CONTROLS = (DEFAULT, VARIANTS[6], VARIANTS[-1])  # for features that know nothing


@dataclass(frozen=True)
class Change:
    """A photometric change, drawn for each query from `numpy.random.default_rng(row)` in this order.

    On the stored image, values in [0, 1]: to linear light (power 2.2); exposure times 2^u, u in [-1, 1]; colour
    temperature, red times 2^t and blue times 2^-t, t in [-0.3, 0.3]; clipped; back by power 1 / 2.2; contrast c in
    [0.7, 1.3] about 0.5; Gaussian blur of deviation 0.5 to 1.5 pixels; Gaussian noise of deviation 2 to 8 in 255 for
    each value; clipped, rounded, JPEG of quality 30 to 70 (OpenCV).
    """

    row: int

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(self.row)
        exposure, temperature = rng.uniform(-1, 1), rng.uniform(-0.3, 0.3)
        contrast, blur, noise = rng.uniform(0.7, 1.3), rng.uniform(0.5, 1.5), rng.uniform(2, 8) / 255
        quality = int(rng.integers(30, 71))
        gains = 2.0 ** np.array([exposure + temperature, exposure, exposure - temperature])
        values = np.clip((rgb / 255) ** 2.2 * gains, 0, 1) ** (1 / 2.2)
        values = cv2.GaussianBlur((values - 0.5) * contrast + 0.5, (0, 0), blur)
        values = values + rng.normal(0, noise, values.shape)
        return decode(to_jpeg((np.clip(values, 0, 1) * 255).round().astype(np.uint8), quality))


@dataclass(frozen=True)
class Frames:
    """A set: N images letterboxed to 224 (N, 224, 224, 3), as they are and changed, and what is known about them."""

    names: tuple[str, ...]
    pixels: dict[str, np.ndarray]
    sizes: np.ndarray
    overlap: np.ndarray
    known: np.ndarray  # (N, N) bool: the overlap of this pair can be trusted

    @classmethod
    def read(cls, folder: Path, changed_images: Path | None) -> "Frames":
        posed = PosedFolder.open(folder)
        step = STEP.get(folder.name, 1)
        posed = replace(posed, names=posed.names[::step], cameras=posed.cameras[::step])
        squares, sizes = {"clean": [], "changed": []}, []
        for row, name in enumerate(posed.names):
            images = {"clean": posed.image(name)}
            images["changed"] = Change(row)(images["clean"])
            for condition, rgb in images.items():
                square, size = letterbox(rgb)
                squares[condition].append(square)
            sizes.append(size)
            if changed_images:
                target = changed_images / folder.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(to_jpeg(images["changed"], 95))
        numbers = np.array([int(re.findall(r"\d+", name)[-1]) for name in posed.names])
        known = np.abs(numbers[:, None] - numbers) <= APART.get(folder.name, np.inf)
        pixels = {condition: np.stack(images) for condition, images in squares.items()}
        return cls(posed.names, pixels, np.array(sizes), posed.overlap_matrix(), known)

    @property
    def masks(self) -> np.ndarray:
        return np.stack([patch_mask(width, height) for width, height in self.sizes.tolist()])


@dataclass(frozen=True)
class Features:
    """Tokens (N, P, D) of a set's images and changed images, and global descriptors (N, G) or None: pooled tokens."""

    tokens: dict[str, np.ndarray]
    globals: dict[str, np.ndarray | None]


@dataclass(frozen=True)
class Split:
    """Rows that are queries, rows that are searched, and rows on which whitening and centre are fitted."""

    queries: np.ndarray
    database: np.ndarray
    fit: np.ndarray


def features(backbone: Backbone, frames: Frames, label: str) -> Features:
    tokens, globals_ = {}, {}
    sizes = torch.from_numpy(frames.sizes)
    for condition, pixels in frames.pixels.items():
        answers = []
        for start in tqdm(range(0, len(pixels), BATCH), f"{label}, {condition}", leave=False):
            images = torch.from_numpy(pixels[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
            answers.append(backbone(images.contiguous(), sizes[start : start + BATCH]))
        tokens[condition] = torch.cat([answer[0] for answer in answers]).numpy()
        pooling = backbone.global_kind == "pooled"
        globals_[condition] = None if pooling else torch.cat([answer[1] for answer in answers]).numpy()
    return Features(tokens, globals_)


def random_features(frames: Frames) -> Features:
    """Standard normal numbers in the shapes of ViT-S."""
    rng = np.random.default_rng(0)
    count = len(frames.names)
    tokens = {key: rng.standard_normal((count, 256, 384), dtype=np.float32) for key in frames.pixels}
    return Features(tokens, {key: rng.standard_normal((count, 384), dtype=np.float32) for key in frames.pixels})


def random_vits(folder: str) -> str:
    """A folder with ViT-S/14 as it is before any training."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    Dinov2Model(Dinov2Config(**shape, image_size=518, patch_size=14)).save_pretrained(folder)
    return folder


def descriptors(found: Features, masks: np.ndarray, variant: Variant, fit: np.ndarray) -> dict[str, tuple]:
    """Patches (N, P, E) and globals (N, G) as a store keeps them, for the images as they are and changed.

    Whitening and centre come from the unchanged images of the rows `fit`.
    """
    sample = found.tokens["clean"][fit][masks[fit]]
    whitening = fit_whitening(sample, variant.whiten) if variant.whiten else None
    center = torch.from_numpy(sample.mean(axis=0, dtype=np.float64).astype(np.float32))
    described = {}
    for condition, tokens in found.tokens.items():
        tokens, globals_ = torch.from_numpy(tokens), found.globals[condition]
        if globals_ is None:
            globals_ = pooled(tokens, torch.from_numpy(masks), center).numpy()
        patches = unit(tokens if whitening is None else whitening.apply(tokens)).numpy()
        described[condition] = stored(patches, variant.dtype), globals_.astype(np.float16)
    return described


def rank(queries: tuple, database: tuple, masks: np.ndarray, variant: Variant, split: Split) -> list[np.ndarray]:
    """Database rows of every query, best first. `queries` and `database` are descriptors of all N images."""
    masks = masks if variant.masked else np.ones_like(masks)
    index = ShardIndex(*(array[split.database] for array in database), split.database, masks[split.database])
    patches, globals_ = (array[split.queries] for array in queries)
    own = np.where(np.isin(split.queries, split.database), split.queries, -1)
    if variant.shortlist:
        found = index.shortlist(globals_.astype(np.float32), variant.shortlist, own)
        listed = [found[q] for q in range(len(found))]
    else:
        listed = [split.database[split.database != row] for row in own]
    if variant.weights is None:
        return listed
    sizes = [len(rows) for rows in listed]
    queries, rows = np.repeat(np.arange(len(listed)), sizes), np.concatenate(listed)
    wanted = Wanted(queries, rows, np.zeros(len(rows), bool))
    votes, _ = index.votes(patches, masks[split.queries], wanted, variant.radius)
    ranked = []
    for q, row in enumerate(split.queries):
        one = votes.of(q, np.count_nonzero(masks[row]), sizes[q])
        ranked.append(one.rows[voting.best(voting.scores(one, variant.weights), one.rows, len(one.rows))])
    return ranked


def judge(ranked: list[np.ndarray], frames: Frames, split: Split) -> dict[str, dict[str, float]]:
    """`metrics.retrieval` per least overlap, mean over queries; pairs that are not known count neither way."""
    names, judged = np.array(frames.names), {}
    for least in OVERLAPS:
        scores = []
        for query, rows in zip(split.queries, ranked, strict=True):
            candidates = split.database[(split.database != query) & frames.known[query, split.database]]
            if (frames.overlap[query, candidates] >= least).any():
                kept = np.append(candidates, query)
                truth = frames.overlap[np.ix_(kept, kept)]
                retrieved = {names[query]: list(names[rows])}
                scores.append(metrics.retrieval(retrieved, names[kept], truth, least, names[candidates], KS))
        means = {key: round(float(np.mean([one[key] for one in scores])), 4) for key in scores[0]}
        judged[f"{least:.1f}"] = means | {"queries": len(scores)}
    return judged


def cell(scores: dict[str, float], key: str = "precision") -> str:
    return " / ".join(f"{scores[f'{key}@{k}']:.3f}" for k in KS)


def table(title: str, columns: list[str], lines: list[list[str]]) -> None:
    print(f"\n**{title}**\n")
    for line in (columns, ["---"] * len(columns), *lines):
        print(f"| {' | '.join(line)} |")


def report(name: str, frames: Frames, found: dict[str, Features]) -> dict:
    """Print the tables of one set; returns their numbers."""
    everything = np.arange(len(frames.names))
    split, masks = Split(everything, everything, everything), frames.masks
    scores: dict = {"clean": {}, "changed": {}, "held out": {}}
    for label, given in found.items():
        for variant in CONTROLS if label.startswith("random") else VARIANTS:
            described = descriptors(given, masks, variant, everything)
            for condition in ("clean", "changed"):
                ranked = rank(described[condition], described["clean"], masks, variant, split)
                scores[condition][f"{label}: {variant.label}"] = judge(ranked, frames, split)
    columns = [f"{100 * least:.0f}% (@1 / @5 / @10)" for least in OVERLAPS]
    for condition in ("clean", "changed"):
        lines = [[row, *(cell(one) for one in judged.values())] for row, judged in scores[condition].items()]
        ends = next(iter(scores[condition].values()))
        lines.append(["chance", *(f"{one['chance']:.3f}" for one in ends.values())])
        lines.append(["ceiling", *(cell(one, "ceiling") for one in ends.values())])
        title = f"{name}, {len(everything)} images, {condition} queries: precision at overlap of at least"
        table(title, ["features: search", *columns], lines)
    scores["held out"] = held_out(frames, found["xfeat"], masks)
    lines = [
        [row, str(one["0.3"]["queries"]), cell(one["0.3"]), cell(one["0.3"], "ceiling")]
        for row, one in scores["held out"].items()
    ]
    columns = ["default settings", "queries", "precision (@1 / @5 / @10)", "ceiling"]
    table(f"{name}, clean queries, held out: precision at overlap of at least 30%", columns, lines)
    return scores


def held_out(frames: Frames, found: Features, masks: np.ndarray) -> dict:
    """The default settings on parts of the queries, calibrated on others."""
    everything = np.arange(len(frames.names))
    even, odd = everything[::2], everything[1::2]
    first, second = np.array_split(everything, 2)
    splits = {
        "even frames; fitted on all": Split(even, everything, everything),
        "odd frames; fitted on all": Split(odd, everything, everything),
        "even frames; fitted on the odd": Split(even, everything, odd),
        "odd frames; fitted on the even": Split(odd, everything, even),
        "even frames; fitted on and searched in the odd only": Split(even, odd, odd),
        "odd frames; fitted on and searched in the even only": Split(odd, even, even),
        "first half; fitted on all": Split(first, everything, everything),
        "second half; fitted on all": Split(second, everything, everything),
        "first half; fitted on the second": Split(first, everything, second),
        "second half; fitted on the first": Split(second, everything, first),
    }
    scores = {}
    for label, split in splits.items():
        described = descriptors(found, masks, DEFAULT, split.fit)["clean"]
        scores[label] = judge(rank(described, described, masks, DEFAULT, split), frames, split)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", default=["rgbd_office", "rgbd_kitchen"])
    parser.add_argument("--vits", help="weights of a DINOv2 ViT-S/14: file, folder or hub id")
    parser.add_argument("--changed-images", type=Path, help="folder for the changed queries, to look at them")
    options = parser.parse_args()

    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        backbones = {"xfeat": ("xfeat", None, None)}
        if options.vits:
            backbones["vits14"] = "dinov2_vits14", options.vits, None
            backbones["vits14, block 8"] = "dinov2_vits14", options.vits, 8
        backbones["random vits14"] = "dinov2_vits14", random_vits(folder), None
        loaded = {label: load_backbone(*choice) for label, choice in backbones.items()}
        for name in options.sets:
            frames = Frames.read(options.data / name, options.changed_images)
            found = {label: features(backbone, frames, label) for label, backbone in loaded.items()}
            found["random vectors"] = random_features(frames)
            scores[name] = report(name, frames, found)
    print(f"\n{json.dumps(scores)}")


if __name__ == "__main__":
    main()
