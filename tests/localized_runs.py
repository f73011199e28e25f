"""The directory of a finished `vop localize`, or `vop reconstruct`, whose numbers are known, made without any of it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vop import config, files
from vop.cameras import Cameras, KnownCamera
from vop.pose.localized import NO_PAIRS, RANSAC, SCHEMA, failures, judged, metrics
from vop.run import Run

WORLD, OTHER = "hall", "yard"


def looking(at, to) -> np.ndarray:
    """`cam_from_world` (4, 4) of an upright camera in a world whose z axis points up."""
    forward = np.asarray(to, float) - at
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    R = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R, -R @ at
    return pose


def ring(count: int, width=12.0, depth=6.0, seed=0) -> np.ndarray:
    """Poses (n, 4, 4) along the walls of a room of that size, looking inward."""
    rng, turns = np.random.default_rng(seed), np.linspace(0, 2 * np.pi, count, endpoint=False)
    at = np.stack([0.45 * width * np.cos(turns), 0.45 * depth * np.sin(turns), np.full(count, 1.6)], axis=1)
    return np.array([looking(each, rng.uniform([-2, -1, 1], [2, 1, 2])) for each in at])


def shifted(pose: np.ndarray, by) -> np.ndarray:
    """The same camera, carried by a vector of the world."""
    moved = pose.copy()
    moved[:3, 3] -= pose[:3, :3] @ by
    return moved


def query_names(hostile: str) -> list[str]:
    return [hostile, *(f"q/{number}.jpg" for number in range(1, 8)), "q/lost.jpg", "q/nowhere.jpg", "q/yard.jpg"]


def table_of(names: list[str], true: np.ndarray) -> pa.Table:
    """What was found: query i off by 0.1 i along x; the last three without a pose, without pairs, and in `OTHER`."""
    rows = []
    for number, name in enumerate(names):
        row = dict.fromkeys(SCHEMA.names) | {"query": name, "inliers": 0, "correspondences": 0, "pairs": 3}
        row |= {
            "matches": 90,
            "camera": "EXIF" if number % 2 else "list",
            "model": "PINHOLE",
            "width": 40,
            "height": 30,
        }
        if number == len(names) - 3:
            row |= {"reason": RANSAC, "correspondences": 20}
        elif number == len(names) - 2:
            row |= {"reason": NO_PAIRS, "pairs": 0, "matches": 0, "camera": None}
        else:
            pose = shifted(true[number], [0.1 * number, 0, 0])
            world = OTHER if number == len(names) - 1 else WORLD
            row |= {"world": world, "cam_from_world": pose[:3].ravel(), "inliers": 10 * (number + 1)}
            row |= {"correspondences": 200}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMA).sort_by("query")


def localized(folder, hostile: str = "q/0.jpg", truth: bool = True) -> tuple[config.Config, Run, pa.Table]:
    """The run and its judged table; `truth`: whether the true poses of the queries are known."""
    cfg = config.load([], [], images=str(folder), output=str(folder / "run"))
    names, true, mapped = query_names(hostile), ring(11, seed=1), ring(40)
    known = Cameras.of(KnownCamera(name, np.eye(3), pose, WORLD) for name, pose in zip(names, true, strict=True))
    known = known if truth else Cameras.of(KnownCamera(name, np.eye(3), None, WORLD) for name in names)
    database = [KnownCamera(f"db/{i}.jpg", np.eye(3), pose, WORLD) for i, pose in enumerate(mapped)]
    database += [KnownCamera(f"yard/{i}.jpg", np.eye(3), pose, OTHER) for i, pose in enumerate(ring(5, 3, 3))]
    walls = np.random.default_rng(0).uniform([-6, -3, 0], [6, 3, 3], (900, 3)).reshape(30, -1)
    rows = [{"name": f"db/{i}.jpg", "world": WORLD, "xyz": wall.tolist()} for i, wall in enumerate(walls)]
    table = judged(table_of(names, true), known)
    known.write(f"{cfg.output}/cameras.parquet")
    Cameras.of(database).write(f"{cfg.map_path}/cameras.parquet")
    for path, content, group in (
        (f"{cfg.map_path}/map.parquet", pa.Table.from_pylist(rows), 4),
        (f"{cfg.output}/localized.parquet", table, 100),
    ):
        with files.atomic(path) as (filesystem, inner):
            pq.write_table(content, inner, filesystem=filesystem, row_group_size=group)
    counts = {"root": str(folder), "images_with_features": 51, "pairs_matched": 33, "pairs_unmatched": {"no pairs": 1}}
    job = Run(cfg.output, "localize", counts | {"queries_without_pose": failures(table)}, {"localize": 2.0})
    job.metrics |= metrics(table)
    recorded(cfg, job)
    return cfg, job, table


def reconstructed(folder, hostile: str = "a.jpg") -> tuple[config.Config, Run]:
    """A run that made two models and left two images out."""
    cfg = config.load([], [], images=str(folder), output=str(folder / "run"))
    rows, models = [], []
    for model, count in enumerate((30, 6)):
        poses = ring(count, seed=model)
        rows += [
            {"image": f"{model}/{i}.jpg", "model": model, "cam_from_world": pose[:3].ravel().tolist()}
            for i, pose in enumerate(poses)
        ]
        models.append({"model": model, "images": count, "points": 1000 * count, "observations": 3500 * count,
                       "reprojection_error": 0.512, "track_length": 3.5})  # fmt: skip
    for name, content in (("registered", rows), ("models", models)):
        with files.atomic(f"{cfg.output}/{name}.parquet") as (filesystem, inner):
            pq.write_table(pa.Table.from_pylist(content), inner, filesystem=filesystem)
    counts = {"root": str(folder), "images_with_features": 38, "pairs_matched": 70, "pairs_unmatched": {}}
    job = Run(cfg.output, "reconstruct", counts | {"images_not_registered": {"no pairs": 1, hostile: 1}}, {"map": 3.0})
    recorded(cfg, job)
    return cfg, job


def recorded(cfg: config.Config, job: Run) -> None:
    files.write_bytes(job.path("config.yaml"), config.to_yaml(cfg).encode())
    files.write_json(job.path("run.json"), job.record())
    if job.metrics:
        files.write_json(job.path("metrics.json"), job.metrics)
