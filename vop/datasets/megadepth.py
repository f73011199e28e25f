"""MegaDepth as D2-Net and LoFTR prepared it: one npz per scene with images, intrinsics, poses and overlaps.

    ROOT/scene_info/0015.npz                                 dataset.model = scene_info/{scene}.npz
    ROOT/Undistorted_SfM/0015/images/3_o.jpg                 as the npz says (image_paths, relative to dataset.images)
    ROOT/depth_undistorted/0015/3_o.h5                       as the npz says (depth_paths, relative to ROOT), `depth`

    D2-Net, glue-factory: overlap_matrix (N, N): share of the points triangulated in the row's image that the column's
                          image sees too; -1: not computed.
    LoFTR (0015_0.1_0.3.npz, ... of MegaDepth-1500): pair_infos, a list of ((row, row), overlap, matches).

The images: https://www.cs.cornell.edu/projects/megadepth (Undistorted_SfM is the output of D2-Net's undistortion,
https://github.com/mihaidusmanu/d2-net); both, and scene_info: https://github.com/cvg/glue-factory. The files of
MegaDepth-1500: https://github.com/zju3dv/LoFTR.

poses are world to camera, 4x4; intrinsics are COLMAP's, for the undistorted image at full size, with pixel centres at
+0.5: both as here. Rows without image or depth (None) take no part. True overlap: the smaller of the two shares; what
was not computed counts as no overlap. A scene is a world of its own; `0015_0.1_0.3` and its like belong to scene 0015
and bring the pairs that MegaDepth-1500 prescribes, and only the images in them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vop import files
from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.datasets import layout
from vop.datasets.layout import Benchmark
from vop.datasets.posed import OverlapTruth
from vop.schema import DatasetConfig

MODEL = "scene_info/{scene}.npz"
RANGE = re.compile(r"_\d(\.\d+)?_\d(\.\d+)?$")  # the range of overlaps in the names of LoFTR's files


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks."""
    problems = []
    for scene in layout.scenes(dataset, dataset.model or MODEL, problems):
        path = layout.place(dataset, dataset.model or MODEL, scene)
        lacking = layout.lacking(path, "the scene's images, intrinsics and poses (scene_info)")
        problems += lacking or _without_images(dataset, scene)
    return problems


def _without_images(dataset: DatasetConfig, scene: str) -> list[str]:
    info = _read(dataset, scene)
    absent = [image.path for image in layout.image_files(dataset, info.names) if image.size < 0]
    if len(absent) < len(info.names):
        return []
    return [f"none of the {len(absent)} images of {scene} is there (Undistorted_SfM), such as {absent[0]}"]


def read(dataset: DatasetConfig) -> Benchmark:
    """Images and cameras of the scenes, their overlaps, and the pairs where the files prescribe some."""
    images, cameras, depths, overlaps, pairs = {}, {}, {}, [], []
    for scene in layout.scenes(dataset, dataset.model or MODEL):
        info = _read(dataset, scene)
        for image in layout.image_files(dataset, info.names, info.world):
            images[image.name] = image
        for camera in info.cameras():
            _check_same(cameras.setdefault(camera.name, camera), camera)
        overlaps.append(info)
        depths |= zip(info.names, info.depths, strict=True)
        pairs += info.pairs or ()
    return Benchmark(
        layout.one_set(dataset, images.values()),
        Cameras.of(cameras.values()),
        lambda: _overlaps(sorted(images), overlaps),
        tuple(dict.fromkeys(pairs)) or None,
        depths=depths.__getitem__,
    )


@dataclass(frozen=True, eq=False)
class SceneInfo:
    """One npz: names, paths of depth maps, K (N, 3, 3), poses (N, 4, 4), rows, columns and values of overlaps (M,)."""

    world: str
    names: list[str]
    depths: list[str]
    K: np.ndarray
    poses: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    overlap: np.ndarray
    pairs: tuple[tuple[str, str], ...] | None

    def cameras(self) -> Iterator[KnownCamera]:
        """The cameras of the images; the npz does not record sizes."""
        for name, K, pose in zip(self.names, self.K, self.poses, strict=True):
            yield KnownCamera(name, K, pose, self.world)


def _read(dataset: DatasetConfig, scene: str) -> SceneInfo:
    path = layout.place(dataset, dataset.model or MODEL, scene)
    prefix = layout.below_root(dataset, dataset.images or "", scene)
    with files.opened(path, whole=True) as file, np.load(file, allow_pickle=True) as info:  # None needs pickle
        lacking = {"image_paths", "depth_paths", "intrinsics", "poses"} - set(info)
        if lacking or not {"overlap_matrix", "pair_infos"} & set(info):
            wanted = ", ".join(sorted(lacking)) or "both overlap_matrix and pair_infos"
            raise CamerasError(f"{path} lacks {wanted}; it has {', '.join(sorted(info))}")
        paths, intrinsics, poses, depth_paths = (
            info[key] for key in ("image_paths", "intrinsics", "poses", "depth_paths")
        )
        if "pair_infos" in info:
            prescribed = list(info["pair_infos"])
            ends = np.array([[int(row) for row in entry[0]] for entry in prescribed]).reshape(-1, 2)
            kept, local = np.unique(ends, return_inverse=True)
            rows, columns = local.reshape(-1, 2).T
            overlap = np.array([float(entry[1]) for entry in prescribed], np.float32)
        else:
            kept = np.array(
                [row for row in range(len(paths)) if paths[row] is not None and depth_paths[row] is not None]
            )
            rows, columns, overlap = _symmetric(info["overlap_matrix"][np.ix_(kept, kept)])
    names = [prefix + str(paths[row]) for row in kept]
    pairs = tuple((names[i], names[j]) for i, j in zip(rows, columns, strict=True)) if "pair_infos" in info else None
    K, poses = (np.array([values[row] for row in kept], np.float64) for values in (intrinsics, poses))
    depths = [files.join(dataset.root, str(depth_paths[row])) for row in kept]
    return SceneInfo(RANGE.sub("", scene), names, depths, K, poses, rows, columns, overlap, pairs)


def _symmetric(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positive overlaps above the diagonal: rows, columns, and the smaller of the shares in both directions."""
    shares = np.nan_to_num(np.asarray(shares, np.float32), nan=0.0)
    smaller = np.triu(np.minimum(shares, shares.T), 1)  # -1, not computed, is smaller than any share
    rows, columns = np.nonzero(smaller > 0)
    return rows, columns, smaller[rows, columns]


def _overlaps(names: Sequence[str], scenes: Sequence[SceneInfo]) -> OverlapTruth:
    index = {name: row for row, name in enumerate(names)}
    found = []
    for scene in scenes:
        own = np.array([index[name] for name in scene.names])
        found.append((own[scene.rows], own[scene.columns], scene.overlap))
    return OverlapTruth(tuple(names), layout.symmetric(len(names), *map(np.concatenate, zip(*found, strict=True))))


def _check_same(first: KnownCamera, second: KnownCamera) -> None:
    if not np.allclose(first.cam_from_world, second.cam_from_world, atol=1e-5) or first.world != second.world:
        raise CamerasError(
            f"{first.name!r} has two poses, in {first.world} and in {second.world}: the scene files are of different "
            "reconstructions"
        )
