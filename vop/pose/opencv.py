"""Relative pose by OpenCV: USAC with MAGSAC scoring, and plain RANSAC.

Both see the points in pixels of one virtual camera, whose focal length is the mean of the four real ones. That is how
OpenCV converts the threshold for two cameras, and USAC must see pixels: with normalised points and K = 1, its
largest noise scale (2.5 pixels, fixed in its source) becomes a distance of 2.5 focal lengths, and poses were ten times
worse in a test.
"""

import cv2
import numpy as np

from vop.schema import PoseConfig

FAR = 1e9  # distance in baselines up to which a triangulated point counts; OpenCV's own 50 drops distant scenery


def magsac(points0, points1, K0, K1, threshold: float, config: PoseConfig):
    """Estimate by USAC_MAGSAC; arguments and result as in `vop.pose.relative.Estimator`."""
    params = cv2.UsacParams()
    params.threshold, params.confidence, params.maxIterations = threshold, config.confidence, config.iterations
    params.randomGeneratorState, params.isParallel = config.seed, False
    # what the flag USAC_MAGSAC stands for; the flag itself leaves no way to give a seed
    params.sampler, params.score, params.loMethod = cv2.SAMPLING_UNIFORM, cv2.SCORE_METHOD_MAGSAC, cv2.LOCAL_OPTIM_SIGMA
    params.loSampleSize, params.loIterations = 50, 10
    points0, points1, K = _in_one_camera(points0, points1, K0, K1)
    return _decompose(*cv2.findEssentialMat(points0, points1, K, K, None, None, params), points0, points1, K)


def ransac(points0, points1, K0, K1, threshold: float, config: PoseConfig):
    """Estimate by RANSAC, without local optimisation; its random numbers are OpenCV's own, always the same."""
    points0, points1, K = _in_one_camera(points0, points1, K0, K1)
    found = cv2.findEssentialMat(
        points0, points1, K, cv2.RANSAC, prob=config.confidence, threshold=threshold, maxIters=config.iterations
    )
    return _decompose(*found, points0, points1, K)


def _in_one_camera(points0, points1, K0, K1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    focal0, focal1 = np.diag(K0)[:2], np.diag(K1)[:2]
    focal = np.mean([focal0, focal1])
    points0, points1 = (points0 - K0[:2, 2]) * (focal / focal0), (points1 - K1[:2, 2]) * (focal / focal1)
    return points0, points1, np.diag([focal, focal, 1.0])


def _decompose(essentials, mask, points0, points1, K):
    """The pose, of all that the essential matrices (3k, 3) allow, that has most inliers in front of both cameras."""
    if essentials is None or mask is None:
        return None
    best = None
    for E in np.split(essentials, len(essentials) // 3):
        count, R, t, front, _ = cv2.recoverPose(E, points0, points1, K, distanceThresh=FAR, mask=mask.copy())
        if best is None or count > best[0]:
            best = count, R, t[:, 0], front.ravel() > 0
    return best and best[1:]
