"""Relative pose by PoseLib (Larsson et al., github.com/PoseLib/PoseLib): LO-RANSAC and non-linear refinement.

PoseLib multiplies the threshold by the mean of the inverse focal lengths; the inliers are those before the refinement.
"""

import numpy as np
import poselib

from vop.schema import PoseConfig

LEAST = 1000  # hypotheses PoseLib tries by default before it stops early


def estimate(points0, points1, K0, K1, threshold: float, config: PoseConfig):
    """Estimate a pose; arguments and result as in `vop.pose.relative.Estimator`."""
    options = {
        "max_epipolar_error": threshold,
        "max_iterations": config.iterations,
        "min_iterations": min(LEAST, config.iterations),
        "success_prob": config.confidence,
        "seed": config.seed,
    }
    pose, statistics = poselib.estimate_relative_pose(points0, points1, _camera(K0), _camera(K1), options)
    return pose.R, pose.t, np.array(statistics["inliers"], bool)


def _camera(K: np.ndarray) -> dict[str, object]:
    # PoseLib does not use the size of the image here
    return {"model": "PINHOLE", "width": 1, "height": 1, "params": [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]}
