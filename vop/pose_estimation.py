"""From matches to relative poses: what the pose stage does, as a plain callable that reads what it needs itself."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from vop import metrics
from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.features import FeatureStore
from vop.geometry import invert
from vop.matches import MatchStore, matches_of
from vop.parts import Parts
from vop.pose.protocols import POSES, thresholds
from vop.pose.relative import MIN_MATCHES, Estimator, RelativePose
from vop.schema import PoseConfig
from vop.shards import StoreError

SCHEMA = POSES.append(pa.field("cam1_from_cam0", pa.list_(pa.float64(), 12)))  # the upper rows; |t| = 1; null: no pose
UNKNOWN, QUARANTINED, ITSELF = "unknown image", "image in quarantine", "an image with itself"
NO_CAMERA, MISFIT = "camera missing", "camera does not fit the image"
UNREADABLE, FEW, DEGENERATE = "features unreadable", f"fewer than {MIN_MATCHES} matches", "degenerate geometry"


class NoPoseError(Exception):
    """A pair that no pose can be estimated of; the message is one of the reasons above."""


class PoseEstimation:
    """Estimates the relative poses of pairs in one shard of matches, by every estimator and threshold asked for."""

    def __init__(self, config: PoseConfig, features: FeatureStore, matches: MatchStore, cameras: str, parts: Parts):
        self.config, self.features, self.matches, self.cameras, self.parts = config, features, matches, cameras, parts
        self.estimators = {name: Estimator(name, config) for name in config.estimators}

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Write part `part`: the poses of the rows `row` of the shard `shard` of matches (columns, a row per pair).

        Returns part and pairs, the number of its pairs.
        """
        part, shard = asked["part"][0].as_py(), asked["shard"][0].as_py()
        rows = [line for pair in self._pairs(shard, asked["row"]) for line in self._poses(*pair)]
        self.parts.write(part, pa.Table.from_pylist(rows, schema=SCHEMA))
        return pa.table({"part": [part], "pairs": [asked.num_rows]})

    def _pairs(self, shard: int, rows: pa.ChunkedArray) -> Iterator[tuple[dict, list, np.ndarray | None, list]]:
        """Every pair with what is known of its two images and its matches; None: they cannot be read, or failed."""
        pairs = self.matches.planned(shard).take(rows).to_pylist()
        cameras = Cameras.read(self.cameras, {pair[side] for pair in pairs for side in ("image0", "image1")})
        images = self._images({(pair[f"shard{side}"], pair[f"row{side}"]) for pair in pairs for side in (0, 1)})
        try:
            table = self.matches.read_shard(shard).take(rows)
            failed = table["error"].is_valid().to_pylist()
            matches = [None if bad else each for each, bad in zip(matches_of(table), failed, strict=True)]
        except StoreError:
            matches = [None] * len(pairs)
        for pair, indices in zip(pairs, matches, strict=True):
            seen = [images.get((pair[f"shard{side}"], pair[f"row{side}"])) for side in (0, 1)]
            known = [cameras.get(pair[f"image{side}"]) for side in (0, 1)]
            yield pair, seen, indices, known

    def _images(self, places: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[np.ndarray, tuple[int, int]]]:
        """Keypoints and size of the images at these places; those whose shard cannot be read are missing."""
        found = {}
        for number in {shard for shard, _ in places}:
            rows = sorted(row for shard, row in places if shard == number)
            try:
                read = self.features.read_keypoints(number, np.array(rows))
            except StoreError:
                continue
            found |= {(number, row): each for row, each in zip(rows, read, strict=True)}
        return found

    def _poses(self, pair: dict, seen: list, indices: np.ndarray | None, known: list) -> Iterator[dict]:
        """The rows of a pair, one per estimator and threshold."""
        true, unrelated = _relation(*known)
        row = {"image0": pair["image0"], "image1": pair["image1"], "reason": None} | _told(true, unrelated)
        row |= {"matches": 0 if indices is None else len(indices), "inliers": 0}
        try:
            points, cameras = _points(seen, indices, known)
        except NoPoseError as error:
            points, row["reason"] = None, str(error)
        for name, estimate in self.estimators.items():
            for threshold in thresholds(self.config):
                line = row | {"estimator": name, "threshold": threshold}
                if points is not None:
                    line |= _judged(estimate(*points, *(camera.K for camera in cameras), threshold), true)
                yield line


def unmatched(image0: str, image1: str, reason: str, config: PoseConfig, cameras: Cameras) -> Iterator[dict]:
    """The rows of a pair that was never matched; one that should have a pose counts as one without."""
    row = {"image0": image0, "image1": image1, "matches": 0, "inliers": 0, "reason": reason}
    row |= _told(*_relation(cameras.get(image0), cameras.get(image1)))
    for name in config.estimators:
        for threshold in thresholds(config):
            yield row | {"estimator": name, "threshold": threshold}


def _points(seen: list, indices: np.ndarray | None, known: list[KnownCamera | None]):
    """The matched points (m, 2) of both images as their pinhole cameras see them, and those cameras."""
    if indices is None or None in seen:
        raise NoPoseError(UNREADABLE)
    if any(camera is None or camera.K is None for camera in known):
        raise NoPoseError(NO_CAMERA)
    if len(indices) < MIN_MATCHES:
        raise NoPoseError(FEW)
    try:
        fitted = [camera.fitted(*size) for camera, (_, size) in zip(known, seen, strict=True)]
    except CamerasError as error:
        raise NoPoseError(MISFIT) from error
    points = [
        camera.undistorted(keypoints[indices[:, side]].astype(np.float64))
        for side, (camera, (keypoints, _)) in enumerate(zip(fitted, seen, strict=True))
    ]
    return points, fitted


def _relation(camera0: KnownCamera | None, camera1: KnownCamera | None) -> tuple[np.ndarray | None, bool]:
    """True `cam1_from_cam0`, None if not known, and whether the images are known to have none."""
    if any(camera is None or camera.cam_from_world is None for camera in (camera0, camera1)):
        return None, False
    if camera0.world != camera1.world:
        return None, True
    return camera1.cam_from_world @ invert(camera0.cam_from_world), False


def _told(true: np.ndarray | None, unrelated: bool) -> dict[str, bool]:
    """The columns that say whether a pose of the pair can be judged."""
    comparable = true is not None and np.linalg.norm(true[:3, 3]) >= metrics.MIN_BASELINE
    return {"unrelated": unrelated, "truth": unrelated or bool(comparable)}


def _judged(pose: RelativePose | None, true: np.ndarray | None) -> dict:
    """What an estimated pose adds to its row."""
    if pose is None:
        return {"reason": DEGENERATE}
    found = {"inliers": int(pose.inliers.sum()), "cam1_from_cam0": pose.cam1_from_cam0[:3].ravel()}
    if true is not None:
        R, t = pose.cam1_from_cam0[:3, :3], pose.cam1_from_cam0[:3, 3]
        found["rotation_error"] = float(metrics.rotation_error(R, true[:3, :3]))
        angle = float(metrics.translation_error(t, true[:3, 3]))
        found["translation_error"] = None if np.isnan(angle) else angle
    return found
