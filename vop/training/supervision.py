"""Where labels come from: depth maps, points of a COLMAP model, prepared labels, or homographies between views.

A pair is a dict: view0, view1 (`vop.training.views`; both mirrored or neither), width0, height0, width1, height1 (of
the images as stored, upright, pixels), scaled_width0 ... (in the letterbox), and what a source needs beside: depth0,
depth1 (paths). A source gives the labels of a pair, or raises `LabelError` with the reason why there are none.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import h5py
import numpy as np
import pyarrow.parquet as pq
import torch

from vop import files
from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.datasets.posed import decode_depth
from vop.foreign_hdf5 import member
from vop.hloc import key
from vop.schema import Config
from vop.training.labels import Correspondence, PatchLabels, depth_correspondence, patch_labels
from vop.training.views import flipped, homography, image_of

MIRROR = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
KEPT_DEPTHS = 256  # letterboxed depth maps that a worker keeps, 0.2 MB each
TOGETHER = 8  # pairs warped at a time


class LabelError(ValueError):
    """A pair without labels; the message is the reason, the same for all pairs that lack the same thing."""


class Supervision(Protocol):
    """A source of labels."""

    def labels(self, pairs: Sequence[dict]) -> list[PatchLabels | LabelError]:
        """Of every pair its labels (B = 1), or why there are none."""


def open_supervision(config: Config, places: dict[str, str]) -> Supervision:
    """The source that a config names. `places`: files that the run prepared for it (cameras, points)."""
    train, size = config.train, config.embedding.image_size
    if train.supervision == "depth":
        return DepthSupervision(places["cameras"], size, train.occlusion, train.min_pixels)
    if train.supervision == "points":
        return PointSupervision(places["points"], size)
    if train.supervision == "labels":
        return PreparedSupervision(train.labels, size)
    return HomographySupervision(size, train.min_pixels)


class DepthSupervision:
    """Labels by warping pixels with their depth (`vop.training.labels.depth_correspondence`)."""

    def __init__(self, cameras: str, size: int, occlusion: float | None, min_pixels: int):
        self.cameras, self.size, self.occlusion, self.min_pixels = cameras, size, occlusion, min_pixels
        self.depth = lru_cache(KEPT_DEPTHS)(self._depth)

    def labels(self, pairs: Sequence[dict]) -> list[PatchLabels | LabelError]:
        """As `Supervision`."""
        cameras = Cameras.read(self.cameras, {image_of(pair[side]) for pair in pairs for side in ("view0", "view1")})
        found: list[PatchLabels | LabelError | None] = [None] * len(pairs)
        ready = []
        for number, pair in enumerate(pairs):
            try:
                ready.append((number, self._posed(pair, cameras)))
            except LabelError as error:
                found[number] = error
        for start in range(0, len(ready), TOGETHER):
            numbers, posed = zip(*ready[start : start + TOGETHER], strict=True)
            parts = (torch.stack(part) for part in zip(*posed, strict=True))
            depth0, K0, limits0, depth1, K1, limits1, pose, related = parts
            tolerance = self.occlusion or 0.0
            unseen0, unseen1 = (None, None) if self.occlusion is None else (depth0, depth1)
            forth = depth_correspondence(depth0, K0, unseen1, K1, pose, limits1, tolerance)
            back = depth_correspondence(depth1, K1, unseen0, K0, torch.linalg.inv(pose), limits0, tolerance)
            forth, back = (replace(found, valid=found.valid & related[:, None]) for found in (forth, back))
            together = patch_labels(forth, back, self.size, self.min_pixels)
            for row, number in enumerate(numbers):
                found[number] = together.of(row)
        return found

    def _posed(self, pair: dict, cameras: Cameras) -> list[torch.Tensor]:
        """Depth, K and limits of both images, the relative pose, and whether there is one."""
        names, given = [image_of(pair[side]) for side in ("view0", "view1")], []
        mirrored = flipped(pair["view0"])
        for side, name in enumerate(names):
            camera = posed_camera(cameras, name)
            if camera.model is not None:
                raise LabelError("image is distorted: undistort it first")
            stored = pair[f"width{side}"], pair[f"height{side}"]
            scaled = pair[f"scaled_width{side}"], pair[f"scaled_height{side}"]
            if pair[f"depth{side}"] is None:
                raise LabelError("depth map missing")
            depth = self.depth(pair[f"depth{side}"], stored, scaled, mirrored)
            given += [depth, torch.from_numpy(_scaled_intrinsics(camera, stored, scaled, mirrored)).float()]
            given += [torch.tensor(scaled, dtype=torch.float32) - 1]
        pose = cameras.relative(*names)
        related = torch.tensor(pose is not None)  # pairs of different worlds are drawn because they share nothing
        pose = torch.eye(4) if pose is None else torch.from_numpy(pose).float()
        return [*given, MIRROR @ pose @ MIRROR if mirrored else pose, related]

    def _depth(self, path: str, stored: tuple[int, int], scaled: tuple[int, int], mirrored: bool) -> torch.Tensor:
        """A depth map in the letterbox, (S, S) float32 metres; every pixel has the value nearest to its centre."""
        depth = read_depth(path)
        if depth.shape[::-1] != stored:
            raise LabelError("depth map of another size than its image")
        if not np.isfinite(depth).all():
            raise LabelError("depth map with NaN or infinite values")
        columns, rows = (
            ((np.arange(small) + 0.5) * large / small).astype(int) for small, large in zip(scaled, stored, strict=True)
        )
        letterboxed = np.zeros((self.size, self.size), np.float32)
        letterboxed[: scaled[1], : scaled[0]] = depth[np.ix_(rows, columns[::-1] if mirrored else columns)]
        return torch.from_numpy(letterboxed)


def posed_camera(cameras: Cameras, name: str) -> KnownCamera:
    """The camera of an image, with K and pose. Raises `LabelError` where there is none."""
    try:
        camera = cameras.get(name)
    except CamerasError as error:
        raise LabelError("pose is not a rotation or K not a calibration") from error
    if camera is None or camera.K is None or camera.cam_from_world is None:
        raise LabelError("camera missing")
    return camera


def read_depth(path: str) -> np.ndarray:
    """A depth map, (H, W) float32 metres, 0: none; a 16-bit PNG in millimetres, or HDF5 with the dataset `depth`.

    Raises `LabelError` where there is none or it cannot be read.
    """
    try:
        data = files.read_bytes(path)
        if path.endswith((".h5", ".hdf5")):
            with h5py.File(io.BytesIO(data), "r") as file:
                depth = np.asarray(member(file, "depth"), np.float32)  # nothing there: an array of no axes
            if depth.ndim != 2:
                raise ValueError(f"{path} has {depth.ndim} axes")
            return depth
        return decode_depth(data, path)
    except FileNotFoundError as error:
        raise LabelError("depth map missing") from error
    except (OSError, KeyError, ValueError) as error:
        raise LabelError("depth map cannot be read") from error


def _scaled_intrinsics(
    camera: KnownCamera, stored: tuple[int, int], scaled: tuple[int, int], mirrored: bool
) -> np.ndarray:
    """K (3, 3) for the letterboxed image."""
    try:
        K = camera.fitted(*stored).K
    except CamerasError as error:
        raise LabelError("camera does not fit the image") from error
    K = np.diag([scaled[0] / stored[0], scaled[1] / stored[1], 1.0]) @ K
    if mirrored:
        K[0, 2] = scaled[0] - K[0, 2]
    return K


class PointSupervision:
    """Labels from the 3D points that two images of a COLMAP model share; one shared point is enough for a match."""

    def __init__(self, points: str, size: int):
        self.size = size
        with files.opened(points) as file:
            table = pq.read_table(file)
        self.rows, self.table = {name: row for row, name in enumerate(table["name"].to_pylist())}, table

    def labels(self, pairs: Sequence[dict]) -> list[PatchLabels | LabelError]:
        """As `Supervision`."""
        return [self._of(pair) for pair in pairs]

    def _of(self, pair: dict) -> PatchLabels | LabelError:
        try:
            (ids0, xy0), (ids1, xy1) = (self._seen(pair, side) for side in (0, 1))
        except LabelError as error:
            return error
        _, rows0, rows1 = np.intersect1d(ids0, ids1, return_indices=True)
        xy0, xy1 = xy0[rows0], xy1[rows1]
        inside = ((xy0 >= 0) & (xy1 >= 0)).all(1)
        for side, xy in enumerate((xy0, xy1)):
            inside &= (xy < [pair[f"scaled_width{side}"], pair[f"scaled_height{side}"]]).all(1)
        forth, back = (self._directed(*ends) for ends in ((xy0[inside], xy1[inside]), (xy1[inside], xy0[inside])))
        return patch_labels(forth, back, self.size, min_pixels=1)

    def _seen(self, pair: dict, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) of the points that an image sees, and where, (n, 2) pixels of the letterbox."""
        view = pair[f"view{side}"]
        row = self.rows.get(image_of(view))
        if row is None:
            raise LabelError("image not in the model")
        line = self.table.slice(row, 1).to_pylist()[0]
        xy = np.array([line["x"], line["y"]], np.float64).T.reshape(-1, 2)
        xy *= [pair[f"scaled_{of}{side}"] / pair[f"{of}{side}"] for of in ("width", "height")]
        if flipped(view):
            xy[:, 0] = pair[f"scaled_width{side}"] - xy[:, 0]
        return np.array(line["id"], np.uint64), xy

    def _directed(self, source: np.ndarray, target: np.ndarray) -> Correspondence:
        pixels = source.astype(np.int64)
        places = torch.from_numpy(pixels[:, 1] * self.size + pixels[:, 0])
        everywhere = torch.ones(1, len(places), dtype=torch.bool)
        return Correspondence(places[None], torch.from_numpy(target).float()[None], everywhere, everywhere)


class HomographySupervision:
    """Labels between views of one image, whose homographies are known (`vop.training.views`)."""

    def __init__(self, size: int, min_pixels: int):
        self.size, self.min_pixels = size, min_pixels

    def labels(self, pairs: Sequence[dict]) -> list[PatchLabels | LabelError]:
        """As `Supervision`; views of two images share nothing."""
        return [
            patch_labels(self._directed(pair, 0, 1), self._directed(pair, 1, 0), self.size, self.min_pixels)
            for pair in pairs
        ]

    def _directed(self, pair: dict, source: int, target: int) -> Correspondence:
        views = pair[f"view{source}"], pair[f"view{target}"]
        sizes = [[pair[f"scaled_{of}{side}"] for of in ("width", "height")] for side in (source, target)]
        pixels = torch.arange(self.size * self.size)
        centers = torch.stack([pixels % self.size, pixels // self.size], 1).double() + 0.5
        known = (centers < torch.tensor(sizes[0])).all(1)
        points, valid = centers, torch.zeros_like(known)
        if image_of(views[0]) == image_of(views[1]):
            points = torch.from_numpy(warped(centers.numpy() / sizes[0], *views) * sizes[1])
            valid = known & ((points >= 0) & (points <= torch.tensor(sizes[1]) - 1)).all(1)
        return Correspondence(pixels[None], points.float()[None], known[None], valid[None])


def warped(shares: np.ndarray, view0: str, view1: str) -> np.ndarray:
    """Where points (n, 2) of a view lie in another view of the same image, both in shares of width and height."""
    H = homography(view1) @ np.linalg.inv(homography(view0))
    points = np.concatenate([shares, np.ones((len(shares), 1))], axis=1) @ H.T
    return points[:, :2] / points[:, 2:]


class PreparedSupervision:
    """Labels from an HDF5 file in the original's layout: a group for each pair with `gt_labels` (P, P), 1: a match.

    A group is called by hloc's rule for pairs, in either order. Mirrored pairs mirror the columns of patches, as the
    original does, which is right for images that fill the width of the letterbox; others are not mirrored.
    """

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size

    def labels(self, pairs: Sequence[dict]) -> list[PatchLabels | LabelError]:
        """As `Supervision`."""
        with h5py.File(self.path, "r") as file:
            return [self._of(file, pair) for pair in pairs]

    def _of(self, file: h5py.File, pair: dict) -> PatchLabels | LabelError:
        names = [image_of(pair[side]) for side in ("view0", "view1")]
        patches = (self.size // 14) ** 2
        if not pair["overlap"]:  # images that share nothing need no file to say so
            nothing, everywhere = torch.zeros(1, patches, patches, dtype=torch.bool), torch.ones(1, patches).bool()
            return PatchLabels(nothing, nothing.int(), nothing, ~everywhere, ~everywhere, everywhere, everywhere)
        try:
            for ends in (names, names[::-1]):
                if (group := member(file, "/".join(map(key, ends)))) is not None:
                    matrix, counts = (member(group, name) for name in ("gt_labels", "label_confs"))
                    if matrix is None:
                        return LabelError("labels cannot be read")
                    matrix = np.asarray(matrix) == 1
                    counts = np.asarray(matrix if counts is None else counts, np.int32)
                    break
            else:
                return LabelError("pair not in the file of labels")
        except (OSError, KeyError, ValueError):
            return LabelError("labels cannot be read")
        for values in (matrix, counts):
            if values.shape != (patches, patches):
                return LabelError(f"labels of shape {values.shape}, not {(patches, patches)}")
        if ends[0] != names[0]:
            matrix, counts = matrix.T, counts.T
        if flipped(pair["view0"]):
            if any(pair[f"scaled_width{side}"] != self.size for side in (0, 1)):
                return LabelError("a mirrored image that does not fill the letterbox")
            order = np.arange(patches).reshape(self.size // 14, -1)[:, ::-1].ravel()
            matrix, counts = (values[np.ix_(order, order)] for values in (matrix, counts))
        positive, counts = (torch.from_numpy(np.ascontiguousarray(values))[None] for values in (matrix, counts))
        seen = positive | (counts > 0)
        visible = seen.any(2), seen.any(1)
        return PatchLabels(positive, counts.int(), seen, *visible, *visible)
