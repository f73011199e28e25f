"""Writers of tiny benchmarks in their published layouts, with cameras that the tests know independently of the readers.

Written by hand from each format's description, not with the package's own code: quaternions, text models and keys.
"""

import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

WIDTH, HEIGHT = 40, 30


def picture(path: Path, width: int = WIDTH, height: int = HEIGHT, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, 120, 60)).save(path)


def rotation(index: int) -> Rotation:
    return Rotation.from_euler("zyx", [10 + 7 * index, 20 - 5 * index, 3 * index], degrees=True)


def pose(index: int) -> np.ndarray:
    """World to camera, 4x4; an image of its own for every index."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(index).as_matrix(), [0.5 * index, 1 - index, 2 + 0.1 * index]
    return matrix


def calibration(index: int = 0) -> np.ndarray:
    return np.array([[50.0 + index, 0, 20.5], [0, 52.0 + index, 14.5], [0, 0, 1]])


def true_relative(first: int, second: int) -> np.ndarray:
    """cam1_from_cam0 by way of points: the cameras' frames of three points and the origin, solved for the motion."""
    points = np.vstack([np.eye(3), np.zeros(3)])
    in0, in1 = (points @ pose(i)[:3, :3].T + pose(i)[:3, 3] for i in (first, second))
    homogeneous = np.hstack([in0, np.ones((4, 1))])
    motion = np.linalg.solve(homogeneous, in1).T
    return np.vstack([motion, [0, 0, 0, 1]])


def colmap_text(folder: Path, names: list[str], seen: list[set[int]], model: str = "PINHOLE", extra: str = "") -> None:
    """A text model of one camera per image; image i has pose(i) and sees the 3D points `seen[i]`."""
    folder.mkdir(parents=True, exist_ok=True)
    cameras, images, tracks = ["# cameras"], ["# images"], {}
    for index, (name, points) in enumerate(zip(names, seen, strict=True), start=1):
        K = calibration(index - 1)
        values = (K[0, 0], K[1, 1], K[0, 2], K[1, 2]) if model in ("PINHOLE", "OPENCV") else (K[0, 0], K[0, 2], K[1, 2])
        cameras.append(f"{index} {model} {WIDTH} {HEIGHT} {' '.join(map(str, values))} {extra}".rstrip())
        x, y, z, w = rotation(index - 1).as_quat().tolist()
        images.append(f"{index} {' '.join(map(str, (w, x, y, z, *pose(index - 1)[:3, 3].tolist())))} {index} {name}")
        images.append(" ".join(f"{p}.5 3.5 {p}" for p in sorted(points)) + " 7.5 7.5 -1")
        for row, point in enumerate(sorted(points)):
            tracks.setdefault(point, []).append(f"{index} {row}")
    points = [f"{point} 0.1 0.2 3 9 9 9 0.5 {' '.join(track)}" for point, track in sorted(tracks.items())]
    for part, lines in (("cameras", cameras), ("images", images), ("points3D", ["# points", *points])):
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")


def eth3d(root: Path, scenes=("courtyard", "pipes")) -> None:
    for scene in scenes:
        names = [f"dslr_images_undistorted/DSC_{index}.JPG" for index in range(3)]
        for name in names:
            picture(root / scene / "images" / name)
        colmap_text(root / scene / "dslr_calibration_undistorted", names, [{1, 2, 3, 4}, {3, 4}, {4, 5}])


def cameras_json(path: Path, names: list[str], sized: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"width": WIDTH, "height": HEIGHT} if sized else {}
    entries = {
        name: {"K": calibration(i).tolist(), "R": pose(i)[:3, :3].tolist(), "t": pose(i)[:3, 3].tolist()} | size
        for i, name in enumerate(names)
    }
    path.write_text(json.dumps(entries))


def _objects(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


MEGADEPTH_SHARES = np.array([[1, 0.6, -1, 0.2], [0.4, 1, -1, 0], [-1, -1, -1, -1], [0.3, np.nan, -1, 1]])


def megadepth(root: Path, scene: str = "0015", pairs: list | None = None) -> list[str]:
    """D2-Net's layout, or LoFTR's where pairs ((i, j), overlap) are given; the third row has no image."""
    names = [f"Undistorted_SfM/{scene[:4]}/images/{index}_o.jpg" for index in range(4)]
    names[2] = None
    for name in names:
        if name:
            picture(root / name)
    depths = [name and f"depth_undistorted/{scene[:4]}/{index}_o.h5" for index, name in enumerate(names)]
    content = {
        "image_paths": _objects(names),
        "depth_paths": _objects(depths),
        "intrinsics": _objects([name and calibration(i) for i, name in enumerate(names)]),
        "poses": _objects([name and pose(i) for i, name in enumerate(names)]),
    }
    if pairs is None:
        content["overlap_matrix"] = MEGADEPTH_SHARES
    else:
        content["pair_infos"] = _objects([(np.array(ends), overlap, None) for ends, overlap in pairs])
    (root / "scene_info").mkdir(parents=True, exist_ok=True)
    np.savez(root / "scene_info" / f"{scene}.npz", **content)
    return names


def phototourism(root: Path, scene: str, keys: list[str], pairs: list[tuple[int, int]]) -> None:
    """The RANSAC tutorial's tables; pairs index the keys."""
    folder = root / scene
    for key in keys:
        picture(folder / "images" / f"{key}.jpg")
    with h5py.File(folder / "K1_K2.h5", "w") as file:
        for i, j in pairs:
            file[f"{keys[i]}-{keys[j]}"] = np.stack([calibration(i), calibration(j)])[None]
    with h5py.File(folder / "R.h5", "w") as rotations, h5py.File(folder / "T.h5", "w") as translations:
        for index, key in enumerate(keys):
            rotations[key], translations[key] = pose(index)[:3, :3], pose(index)[:3, 3:]


def challenge(root: Path, scene: str, keys: list[str]) -> None:
    """The layout of the challenge of 2020 and 2021: one calibration file per image."""
    folder = root / scene / "set_100"
    (folder / "calibration").mkdir(parents=True)
    for index, key in enumerate(keys):
        picture(folder / "images" / f"{key}.png")
        with h5py.File(folder / "calibration" / f"calibration_{key}.h5", "w") as file:
            file["K"], file["R"], file["T"] = calibration(index), pose(index)[:3, :3], pose(index)[:3, 3]


def covisible(folder: Path, lists: dict[str, list[str]]) -> None:
    (folder / "new-vis-pairs").mkdir(parents=True)
    for threshold, pairs in lists.items():
        np.save(folder / "new-vis-pairs" / f"keys-th-{threshold}.npy", np.array(pairs))


def inloc(root: Path) -> None:
    picture(root / "query/iphone7/IMG_0731.JPG")
    picture(root / "query/iphone7/IMG_0732.JPG")
    for floor, scan in (("DUC1", "000"), ("DUC2", "046")):
        picture(root / f"database/cutouts/{floor}/{scan}/{floor[:3]}_cutout_{scan}_0_0.jpg")
    (root / "query/iphone7/LICENSE.txt").write_text("terms")


def aachen(root: Path) -> None:
    images = root / "images_upright"
    names = ["db/1.jpg", "sequences/gopro/2.png"]
    for name in [*names, "query/day/nexus4/a.jpg", "query/night/nexus5x/b.jpg"]:
        picture(images / name)
    colmap_text(root / "3D-models/aachen_v_1_1", names, [{1, 2}, {2}], "SIMPLE_RADIAL", "-0.02")
    (root / "queries").mkdir()
    for kind, line in (
        ("day", "query/day/nexus4/a.jpg SIMPLE_RADIAL 40 30 55.0 20 15 -0.05"),
        ("night", "query/night/nexus5x/b.jpg SIMPLE_RADIAL 30 40 44.0 15 20 0"),
    ):
        (root / "queries" / f"{kind}_time_queries_with_intrinsics.txt").write_text(line + "\n")


def utm(east: float, north: float) -> str:
    return f"@{east:010.2f}@{north:010.2f}@17@T@40.44@-80.00@x@@@@@@@@.jpg"


def pitts30k(root: Path, split: str = "test") -> None:
    for side, places in (("queries", [(500, 900), (700, 900)]), ("database", [(500, 925), (500, 925.5), (520, 915)])):
        for east, north in places:
            picture(root / "images" / split / side / utm(584000 + east, 4477000 + north))


def pitts30k_lists(root: Path, split: str = "test") -> None:
    queries, database = ["queries_real/0.jpg", "queries_real/1.jpg"], ["000/a.jpg", "000/b.jpg", "001/c.jpg"]
    for name in [*queries, *database]:
        picture(root / name)
    np.save(root / f"pitts30k_{split}_qImages.npy", np.array(queries))
    np.save(root / f"pitts30k_{split}_dbImages.npy", np.array(database))
    np.save(root / f"pitts30k_{split}_gt.npy", _objects([np.array([2, 0]), np.array([], np.int64)]), allow_pickle=True)
