"""Relative pose of two images from their point matches, by any of several robust estimators.

| name | what runs | package |
| --- | --- | --- |
| `opencv` | OpenCV's USAC with MAGSAC scoring and local optimisation | embedded |
| `opencv_ransac` | OpenCV's plain RANSAC, without refinement | embedded |
| `poselib` | PoseLib: LO-RANSAC, then non-linear refinement | embedded |
| `pycolmap` | COLMAP's verification: essential matrix or, for planes, homography; refinement | extra `localize` |

The threshold is a distance from the epipolar line in pixels of the original images. Where the two cameras have
different focal lengths, each library converts it in its own way, and is left to do so, because published numbers follow
from that: OpenCV divides by the arithmetic mean of the focal lengths, PoseLib by their harmonic mean, COLMAP by that or
(newer versions) weighs each point by its own camera. With focal lengths of 500 and 2000 pixels OpenCV's threshold is
0.64 of PoseLib's.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vop.geometry import pose_from_rt
from vop.schema import ConfigError, PoseConfig

MIN_MATCHES = 5  # an essential matrix has five degrees of freedom
ESTIMATORS = {  # name: (module, function in it)
    "opencv": ("vop.pose.opencv", "magsac"),
    "opencv_ransac": ("vop.pose.opencv", "ransac"),
    "poselib": ("vop.pose.poselib", "estimate"),
    "pycolmap": ("vop.pose.pycolmap", "estimate"),
}


@dataclass(frozen=True, eq=False)
class RelativePose:
    """What was estimated for a pair of images.

    cam1_from_cam0: (4, 4) float64; the translation has length 1, as its scale cannot be seen in two images.
    inliers: (n,) bool, the matches within the threshold and in front of both cameras.
    """

    cam1_from_cam0: np.ndarray
    inliers: np.ndarray


def check(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that no estimator has, or whose package is not installed."""
    for name in names:
        if name not in ESTIMATORS:
            close = difflib.get_close_matches(name, ESTIMATORS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(ESTIMATORS)}"
            raise ConfigError(f"pose.estimators: no estimator is called {name!r}; {hint}")
        try:
            importlib.import_module(ESTIMATORS[name][0])
        except ImportError as error:
            raise ConfigError(f"pose.estimators: {error}") from error


class Estimator:
    """A robust estimator of relative poses.

    The same matches give the same bits in any order, process and number of calls: every call starts from the seed.
    """

    def __init__(self, name: str, config: PoseConfig):
        check([name])
        module, function = ESTIMATORS[name]
        self.name, self.config = name, config
        self._solve = getattr(importlib.import_module(module), function)

    def __call__(
        self, points0: np.ndarray, points1: np.ndarray, K0: np.ndarray, K1: np.ndarray, threshold: float
    ) -> RelativePose | None:
        """Estimate the pose of image 1's camera relative to image 0's.

        Args:
            points0, points1: (n, 2), matched points in pixels of the original images, centres at +0.5, undistorted.
                A point that is not finite (it has no undistorted position) makes its match an outlier.
            K0, K1: (3, 3) intrinsics, in the same pixels.
            threshold: largest distance of an inlier from its epipolar line, pixels of the original images.

        Returns:
            The pose, or None where the matches do not give one: fewer than 5 different points in an image; no model
            that the library finds; fewer than 5 inliers; a result that is not finite or has no translation. COLMAP may
            say so of a pure rotation, which otherwise gets the right rotation and an arbitrary translation. A planar
            scene has two poses that fit, of which OpenCV may return the wrong one.

        Raises:
            ValueError: an array has the wrong shape, K has no inverse, or the threshold is not positive.
        """
        points0, points1 = _points(points0, "points0"), _points(points1, "points1")
        K0, K1 = _intrinsics(K0, "K0"), _intrinsics(K1, "K1")
        if len(points0) != len(points1):
            raise ValueError(f"{len(points0)} points of image 0 but {len(points1)} of image 1: give the matched ones")
        if not threshold > 0:
            raise ValueError(f"the threshold is {threshold}, but must be a positive number of pixels")
        finite = np.isfinite(np.hstack([points0, points1])).all(axis=1)
        points0, points1 = _without_skew(points0[finite], K0), _without_skew(points1[finite], K1)
        if min(len(np.unique(points, axis=0)) for points in (points0, points1)) < MIN_MATCHES:
            return None
        found = self._solve(points0, points1, K0, K1, float(threshold), self.config)
        if found is None:
            return None
        R, t, mask = found
        length = np.linalg.norm(t)
        if not (np.isfinite(R).all() and np.isfinite(length) and length > 0 and mask.sum() >= MIN_MATCHES):
            return None
        inliers = np.zeros(len(finite), bool)
        inliers[finite] = mask
        return RelativePose(pose_from_rt(R, np.ravel(t) / length), inliers)


def _points(points: np.ndarray, name: str) -> np.ndarray:
    points = np.ascontiguousarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} has shape {points.shape}; expected (n, 2)")
    return points


def _intrinsics(K: np.ndarray, name: str) -> np.ndarray:
    K = np.asarray(K, np.float64)
    if K.shape != (3, 3) or not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError(f"{name} is {K.tolist()}; expected 3x3 finite numbers with positive focal lengths")
    return K


def _without_skew(points: np.ndarray, K: np.ndarray) -> np.ndarray:
    """The points as a camera without K's skew sees them; the libraries know four intrinsics only."""
    shear = K[0, 1] / K[1, 1] * (points[:, 1] - K[1, 2])
    return np.ascontiguousarray(np.stack([points[:, 0] - shear, points[:, 1]], axis=1))
