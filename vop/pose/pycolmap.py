"""Relative pose by COLMAP's verification of calibrated pairs: LO-RANSAC for essential matrix and homography.

Where the homography explains the matches as well, the scene is a plane or the camera only turned; COLMAP then takes the
pose from the homography, and a translation of zero says that there is none to be seen. COLMAP converts the
threshold with both cameras' focal lengths.
"""

import numpy as np

from vop.schema import PoseConfig

try:
    import pycolmap
except ImportError as error:
    raise ImportError("the estimator pycolmap needs the package pycolmap: pip install 'vop[localize]'") from error

MIN_INLIERS = 5
MIN_INLIER_RATIO = 0.01  # COLMAP's 0.25 for pairs would cap the hypotheses at about a thousand


def estimate(points0, points1, K0, K1, threshold: float, config: PoseConfig):
    """Estimate a pose; arguments and result as in `vop.pose.relative.Estimator`."""
    matches = np.repeat(np.arange(len(points0), dtype=np.uint32)[:, None], 2, axis=1)
    found = pycolmap.estimate_calibrated_two_view_geometry(
        _camera(K0), points0, _camera(K1), points1, matches, _options(threshold, config)
    )
    if found.cam2_from_cam1 is None:
        return None
    inliers = np.zeros(len(points0), bool)
    inliers[found.inlier_matches[:, 0]] = True
    return found.cam2_from_cam1.rotation.matrix(), found.cam2_from_cam1.translation, inliers


def _options(threshold: float, config: PoseConfig) -> "pycolmap.TwoViewGeometryOptions":
    options = pycolmap.TwoViewGeometryOptions()
    options.compute_relative_pose = True
    options.min_num_inliers = MIN_INLIERS
    options.detect_watermark = False  # that test needs the size of the images, and is no part of a pose
    options.ransac.max_error = threshold
    options.ransac.confidence = config.confidence
    options.ransac.max_num_trials = config.iterations
    options.ransac.min_num_trials = min(options.ransac.min_num_trials, config.iterations)
    options.ransac.min_inlier_ratio = MIN_INLIER_RATIO
    options.ransac.random_seed = config.seed
    return options


def _camera(K: np.ndarray) -> "pycolmap.Camera":
    return pycolmap.Camera(model="PINHOLE", width=1, height=1, params=[K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
