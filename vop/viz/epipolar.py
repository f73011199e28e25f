"""Which matches agree with a relative pose: what an estimator's inliers are, found again from the pose alone."""

import numpy as np


def agreeing(
    points0: np.ndarray,
    points1: np.ndarray,
    K0: np.ndarray,
    K1: np.ndarray,
    cam1_from_cam0: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """Matches near their epipolar lines and in front of both cameras, (m,) bool.

    Near by Sampson's distance (Hartley and Zisserman, Multiple View Geometry, 2nd edition, equation 11.9), by which the
    estimators judge too; each converts pixels in its own way, so that a match at the threshold may be judged otherwise.

    Args:
        points0, points1: (m, 2) matched points, undistorted pixels; a point that is not finite agrees with nothing.
        K0, K1: (3, 3) intrinsics in the same pixels.
        cam1_from_cam0: (4, 4) or (3, 4); its translation may have any length but zero, for which nothing agrees.
        threshold: pixels.
    """
    R, t = cam1_from_cam0[:3, :3], cam1_from_cam0[:3, 3]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (_sampson(points0, points1, K0, K1, R, t) <= threshold) & _in_front(points0, points1, K0, K1, R, t)


def _sampson(points0, points1, K0, K1, R, t) -> np.ndarray:
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]]) / np.linalg.norm(t)
    F = np.linalg.inv(K1).T @ cross @ R @ np.linalg.inv(K0)
    x0, x1 = _homogeneous(points0), _homogeneous(points1)
    lines1, lines0 = x0 @ F.T, x1 @ F
    slopes = np.concatenate([lines1[:, :2], lines0[:, :2]], axis=1)
    return np.abs((x1 * lines1).sum(axis=1)) / np.linalg.norm(slopes, axis=1)


def _in_front(points0, points1, K0, K1, R, t) -> np.ndarray:
    """Whether the two rays come closest at a positive depth in both cameras: depth0 * R ray0 + t = depth1 * ray1."""
    ray0, ray1 = _homogeneous(points0) @ (R @ np.linalg.inv(K0)).T, _homogeneous(points1) @ np.linalg.inv(K1).T
    normal = np.cross(ray0, ray1)
    depth0, depth1 = ((np.cross(ray, t) * normal).sum(axis=1) for ray in (ray1, ray0))
    return (depth0 > 0) & (depth1 > 0)


def _homogeneous(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)
