"""The directory of a finished `vop match` whose scene, keypoints and matches are known, made without any matching."""

import itertools
import json

import numpy as np
import pyarrow as pa
from PIL import Image

from vop import config, features, files, pairs
from vop.features import FeatureStore, LocalFeatures
from vop.geometry import Camera, project, transform
from vop.matches import NO_MATCHES, Matches, MatchStore, located
from vop.run import Run

SIZE, SCALED = (640, 480), (320, 240)
WIDTH = 8
K = np.array([[600.0, 0, 322], [0, 600, 239], [0, 0, 1]])
NAMES = ["a/0.jpg", "a/1.jpg", "a/2.jpg", "b/deep/3.jpg", "b/deep/4.jpg", "b/5.jpg"]
BLANK = "blank.jpg"  # without keypoints
LOST = "lost.jpg"  # in the list, but in quarantine
FAILED = ("a/0.jpg", "b/5.jpg")
NOISE, STRAY = 0.2, 40  # pixels; keypoints of an image that are no point of the scene
POINTS = np.random.default_rng(0).uniform([-2, -1.5, 5], [2, 1.5, 9], (250, 3))


def camera(i: int) -> Camera:
    """Cameras on an arc, looking at the middle of the points."""
    angle = 0.12 * (i - 2.5)
    c, s = np.cos(angle), np.sin(angle)
    R = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    center = np.array([0, 0, 7]) - R.T @ [0, 0.1 * (i % 2), 7]
    return Camera.from_rt(K, R, -R @ center, *SIZE)


def local_features(name: str) -> tuple[LocalFeatures, np.ndarray]:
    """Features of an image, and which point of the scene each keypoint shows (n,); -1: none."""
    if name == BLANK:
        empty = np.empty((0, 2), np.float32), np.empty(0, np.float32), np.empty((0, WIDTH), np.float16)
        return LocalFeatures(*empty, SIZE, SCALED), np.empty(0, int)
    i = NAMES.index(name)
    rng = np.random.default_rng(i)
    seen = project(transform(camera(i).cam_from_world, POINTS), K) + rng.normal(0, NOISE, (len(POINTS), 2))
    points = np.where((seen > 0).all(axis=1) & (seen < SIZE).all(axis=1))[0]
    keypoints = np.concatenate([seen[points], rng.uniform([0, 0], SIZE, (STRAY, 2))]).astype(np.float32)
    order, points = rng.permutation(len(keypoints)), np.concatenate([points, np.full(STRAY, -1)])
    descriptors = rng.standard_normal((len(keypoints), WIDTH)).astype(np.float16)
    scores = np.sort(rng.random(len(keypoints), np.float32))[::-1]
    return LocalFeatures(keypoints[order], scores, descriptors, SIZE, SCALED), points[order]


def matches(name0: str, name1: str) -> Matches:
    """True matches, and some false ones of stray keypoints."""
    points0, points1 = local_features(name0)[1], local_features(name1)[1]
    shared, rows0, rows1 = np.intersect1d(points0, points1, return_indices=True)
    true = np.stack([rows0, rows1], axis=1)[shared >= 0]
    stray = np.stack([np.flatnonzero(points == -1)[: STRAY // 2] for points in (points0, points1)], axis=1) if (
        len(points0) and len(points1)) else np.empty((0, 2), int)  # fmt: skip
    indices = np.concatenate([true, stray])
    indices = indices[np.argsort(indices[:, 0])].astype(np.int32)
    return Matches(indices, np.random.default_rng(len(indices)).random(len(indices), np.float32))


LISTED = [
    *itertools.permutations(NAMES, 2),  # each pair from both sides, as a ranking has it
    (BLANK, "a/0.jpg"),
    ("a/1.jpg", LOST),
    ("a/1.jpg", "a/1.jpg"),
    ("a/1.jpg", "never/seen.jpg"),
]
EXPORTED = sorted({tuple(sorted(pair)) for pair in LISTED[:-3]} - {FAILED})


def write(folder, **settings) -> str:
    """Write the run, its images (blank) and its pair list below a folder; returns the run directory."""
    images = [*NAMES, BLANK, LOST]
    for name in images:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(folder / "images" / name)
    known = {name: camera(i) for i, name in enumerate(NAMES)}
    rows = {name: {"K": K.tolist(), "R": c.rotation.tolist(), "t": c.translation.tolist(),
                   "width": SIZE[0], "height": SIZE[1]} for name, c in known.items()}  # fmt: skip
    (folder / "cameras.json").write_text(json.dumps(rows))
    (folder / "list.txt").write_text("".join(f"{query} {database}\n" for query, database in LISTED))
    asked = {"images": str(folder / "images"), "pair_list": str(folder / "list.txt"), "output": str(folder / "run")}
    cfg = config.load([], [], **(asked | settings))
    store = _features(cfg.features_path)
    _matches(cfg.matches_path, store)
    files.write_bytes(f"{cfg.output}/config.yaml", config.to_yaml(cfg).encode())
    record = Run(cfg.output, "match", {"pairs_matched": len(EXPORTED) + 1}).record()
    files.write_json(f"{cfg.output}/run.json", record)
    return cfg.output


def _features(path: str) -> FeatureStore:
    store = FeatureStore.create(path, {"method": "test"}, WIDTH)
    names = sorted([*NAMES, BLANK, LOST])
    listed = pa.table({"name": names, "scene": [""] * 8, "size": [1] * 8, "modified_ns": [1] * 8})
    for number, lines in store.plan(listed, 3, False, lambda name: None)[1].items():
        whole = [line for line in lines.to_pylist() if line["name"] != LOST]
        lost = [line | {"reason": "torn", "content": None} for line in lines.to_pylist() if line["name"] == LOST]
        columns = {key: [line[key] for line in whole] for key in ("image_id", "name")}
        columns |= {"width": [SIZE[0]] * len(whole), "height": [SIZE[1]] * len(whole)}
        columns |= {"scaled_width": [SCALED[0]] * len(whole), "scaled_height": [SCALED[1]] * len(whole)}
        columns |= {"content": [""] * len(whole)}
        found = [local_features(line["name"])[0] for line in whole]
        store.write_shard(number, pa.table(columns | features.columns(found)), lost)
    store.finish()
    return store


def _matches(path: str, store: FeatureStore) -> None:
    made = MatchStore.create(path, {"first_shard_of_features": store.receipts()[0]["sha256"]})
    asked = pairs.unordered(pa.table({"query": [a for a, _ in LISTED[:-3]], "database": [b for _, b in LISTED[:-3]]}))
    wanted = located(store.live(), asked["image0"].combine_chunks(), asked["image1"].combine_chunks())
    for number in made.plan(wanted, 8):
        planned = made.planned(number)
        names = [*zip(planned["image0"].to_pylist(), planned["image1"].to_pylist(), strict=True)]
        errors = ["features unreadable" if pair == FAILED else None for pair in names]
        found = [NO_MATCHES if pair == FAILED else matches(*pair) for pair in names]
        made.write_shard(number, planned, found, errors)
