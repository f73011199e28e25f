"""Pose of an image from its correspondences with 3D points, by COLMAP's robust estimator (`pycolmap`).

LO-RANSAC over poses from three correspondences, then a refinement on the inliers with a robust loss. Inliers are told
by their reprojection error in pixels of the query, with whatever distortion its camera has.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vop.cameras import load_pycolmap
from vop.geometry import pose_from_rt
from vop.schema import LocalizeConfig

if TYPE_CHECKING:
    import pycolmap

MIN_POINTS = 4  # three give up to four poses, and one tells these apart


@dataclass(frozen=True, eq=False)
class AbsolutePose:
    """What was estimated for a query.

    cam_from_world: (4, 4) float64. inliers: (n,) bool. camera: the one given, refined where that was asked for.
    """

    cam_from_world: np.ndarray
    inliers: np.ndarray
    camera: "pycolmap.Camera"


def estimate(
    points2d: np.ndarray, points3d: np.ndarray, camera: "pycolmap.Camera", config: LocalizeConfig
) -> AbsolutePose | None:
    """Estimate the pose of an image. The same arguments give the same bits: every call starts from the seed.

    points2d: (n, 2) float64, pixels of the query, centres at +0.5. points3d: (n, 3) float64, world units. camera: is
    left as it is. None where they give no pose: fewer than `MIN_POINTS`, no model found, or a result that is not
    finite. A pose that few agree with is given: the caller judges the number of inliers.
    Raises ValueError for arrays of other shapes, or with values that are not finite.
    """
    points2d, points3d = np.asarray(points2d, np.float64), np.asarray(points3d, np.float64)
    if points2d.shape != (len(points2d), 2) or points3d.shape != (len(points2d), 3):
        raise ValueError(f"points2d has shape {points2d.shape}, points3d {points3d.shape}; expected (n, 2) and (n, 3)")
    if not (np.isfinite(points2d).all() and np.isfinite(points3d).all()):
        raise ValueError("points must be finite: leave out those without a 3D point")
    if len(points2d) < MIN_POINTS:
        return None
    pycolmap = load_pycolmap()
    camera = pycolmap.Camera(camera.todict())  # refined in place
    search, refinement = _options(config)
    found = pycolmap.estimate_and_refine_absolute_pose(points2d, points3d, camera, search, refinement)
    if found is None:
        return None
    pose = pose_from_rt(*np.split(found["cam_from_world"].matrix(), [3], axis=1))
    if not (np.isfinite(pose).all() and np.isfinite(camera.params).all()):
        return None
    return AbsolutePose(pose, np.asarray(found["inlier_mask"], bool), camera)


def _options(config: LocalizeConfig):
    pycolmap = load_pycolmap()
    search, refinement = pycolmap.AbsolutePoseEstimationOptions(), pycolmap.AbsolutePoseRefinementOptions()
    search.ransac.max_error = config.threshold
    search.ransac.confidence = config.confidence
    search.ransac.max_num_trials = config.iterations
    search.ransac.min_num_trials = min(search.ransac.min_num_trials, config.iterations)
    search.ransac.random_seed = config.seed
    refinement.refine_focal_length = config.refine_focal
    return search, refinement
