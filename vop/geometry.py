"""Cameras, projection and overlap: the one statement of this project's pixel conventions.

* Pixel centres lie at +0.5: the pixel in column c and row r covers [c, c+1) x [r, r+1) and its centre is
  (c + 0.5, r + 0.5). A point falls on the pixel (floor(x), floor(y)). The image spans [0, width] x [0, height].
* K is in pixels of the stored image (after EXIF rotation), so its principal point is about (width/2, height/2).
* Camera axes: x right, y down, z forward. Depth is z, in metres where the data has a scale; 0 means no depth.
* Poses are `cam_from_world`, 4x4 [R t; 0 1]: x_cam = R x_world + t. They read right to left: `cam1_from_cam0`.
* Overlap of image 0 with image 1: the share of image 0's pixels with depth that land in image 1 at a depth that agrees
  with image 1's own. The symmetric overlap is the smaller of the two shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

DEPTH_TOLERANCE = 0.1  # a warped depth within 10% of the depth found there is the same surface


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera and its pose.

    K: (3, 3) float64, pixels of the stored image. cam_from_world: (4, 4) float64. width, height: pixels.
    Raises ValueError where a shape is wrong, a value is not finite, or the pose is not a rotation and a translation.
    """

    K: np.ndarray
    cam_from_world: np.ndarray
    width: int
    height: int

    def __post_init__(self):
        for name, shape in (("K", (3, 3)), ("cam_from_world", (4, 4))):
            value = np.asarray(getattr(self, name), np.float64)
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(f"{name} has shape {value.shape}; expected {shape} of finite numbers")
            object.__setattr__(self, name, value)
        if self.width < 1 or self.height < 1:
            raise ValueError(f"the image is {self.width}x{self.height} pixels; both sides must be at least 1")
        error = np.abs(self.rotation @ self.rotation.T - np.eye(3)).max()
        if error > 1e-3 or np.linalg.det(self.rotation) < 0:
            raise ValueError(
                f"cam_from_world holds no rotation: R R^T differs from the identity by {error:.2g} (at most 1e-3), "
                f"determinant {np.linalg.det(self.rotation):.3g} (must be +1); is it transposed, scaled or mirrored?"
            )

    @classmethod
    def from_rt(cls, K, R, t, width: int, height: int) -> "Camera":
        """Build a camera from a world-to-camera rotation R (3, 3) and translation t (3,)."""
        return cls(K, pose_from_rt(R, t), width, height)

    @property
    def rotation(self) -> np.ndarray:
        """Rotation, world to camera, (3, 3)."""
        return self.cam_from_world[:3, :3]

    @property
    def translation(self) -> np.ndarray:
        """Translation, world to camera, (3,)."""
        return self.cam_from_world[:3, 3]

    @property
    def center(self) -> np.ndarray:
        """Where the camera stands, in the world, (3,)."""
        return -self.rotation.T @ self.translation

    def resized(self, width: int, height: int) -> "Camera":
        """Give the camera of the same photograph stored at width x height pixels."""
        scale = np.diag([width / self.width, height / self.height, 1.0])
        return Camera(scale @ self.K, self.cam_from_world, width, height)


def pose_from_rt(R, t) -> np.ndarray:
    """Stack R (3, 3) and t (3,) into a 4x4 pose, float64."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R, np.asarray(t, np.float64).reshape(3)
    return pose


def invert(pose: np.ndarray) -> np.ndarray:
    """Invert a rigid 4x4 pose: `world_from_cam` from `cam_from_world`."""
    return pose_from_rt(pose[:3, :3].T, -pose[:3, :3].T @ pose[:3, 3])


def relative_pose(camera0: Camera, camera1: Camera) -> np.ndarray:
    """`cam1_from_cam0`, (4, 4) float64."""
    return camera1.cam_from_world @ invert(camera0.cam_from_world)


def transform(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a 4x4 pose to points (..., 3)."""
    return points @ pose[:3, :3].T + pose[:3, 3]


def project(points: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Project points in the camera frame, (..., 3), to pixels (..., 2). Points with z <= 0 give NaN."""
    points = np.asarray(points, np.float64)
    z = points[..., 2:]
    return (points @ np.asarray(K, np.float64).T)[..., :2] / np.where(z > 0, z, np.nan)


def pixel_centers(width: int, height: int) -> np.ndarray:
    """Centres (x, y) of all pixels, (height, width, 2) float64."""
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)


def unproject(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Lift every pixel centre of a depth map (H, W) to camera points (H, W, 3) float64; depth 0 gives the origin."""
    height, width = depth.shape
    return _lift(pixel_centers(width, height), np.asarray(depth, np.float64), K)


def overlap(
    depth0: np.ndarray, camera0: Camera, depth1: np.ndarray, camera1: Camera, tolerance=DEPTH_TOLERANCE, stride: int = 1
) -> float:
    """Share of image 0's pixels with depth that image 1 sees.

    A pixel counts if its point projects inside image 1 (nearest pixel) where |z - depth1| <= tolerance * depth1.
    `stride` takes every stride-th pixel of image 0, both ways. 0.0 for an image without depth.
    Raises ValueError where a depth map is not of its camera's size.
    """
    _check_size(depth0, camera0, "image 0")
    _check_size(depth1, camera1, "image 1")
    points = _world_points(depth0, camera0, stride)
    seen = _count_seen(points, np.array([0, len(points)]), depth1, camera1.K, camera1.cam_from_world, tolerance)[0]
    return float(seen / max(len(points), 1))


def symmetric_overlap(
    depth0: np.ndarray, camera0: Camera, depth1: np.ndarray, camera1: Camera, tolerance=DEPTH_TOLERANCE, stride: int = 1
) -> float:
    """Give the smaller of the two shares of `overlap`: of image 0 in image 1, and of image 1 in image 0."""
    forward = overlap(depth0, camera0, depth1, camera1, tolerance, stride)
    return min(forward, overlap(depth1, camera1, depth0, camera0, tolerance, stride))


def overlap_matrix(
    depths: Sequence[np.ndarray], cameras: Sequence[Camera], tolerance=DEPTH_TOLERANCE, samples: int = 1500
) -> np.ndarray:
    """Symmetric overlap of every pair of N images, (N, N) float32, ones on the diagonal.

    Each image is represented by a regular grid of about `samples` of its pixels (a share is then good to about
    1/sqrt(samples), 2.6% at worst, much less for connected regions); target depths are looked up at full resolution.
    `depths` is walked twice and may load lazily: only one map is held at a time.
    """
    if len(depths) != len(cameras):
        raise ValueError(f"{len(depths)} depth maps for {len(cameras)} cameras; every image needs both")
    clouds = []
    for index, camera in enumerate(cameras):
        depth = depths[index]
        _check_size(depth, camera, f"image {index}")
        clouds.append(_world_points(depth, camera, _grid_stride(camera, samples)))
    counts = np.array([len(cloud) for cloud in clouds], np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    points = np.concatenate(clouds) if clouds else np.zeros((0, 3))
    share = np.zeros((len(cameras), len(cameras)))
    for index, camera in enumerate(cameras):
        seen = _count_seen(points, bounds, depths[index], camera.K, camera.cam_from_world, tolerance)
        share[:, index] = seen / np.maximum(counts, 1)
    symmetric = np.minimum(share, share.T)
    np.fill_diagonal(symmetric, 1.0)
    return symmetric.astype(np.float32)


def _check_size(depth: np.ndarray, camera: Camera, what: str) -> None:
    if depth.shape != (camera.height, camera.width):
        raise ValueError(
            f"the depth map of {what} has shape {depth.shape}; its camera says (height, width) = "
            f"{(camera.height, camera.width)}: resize one of them (Camera.resized)"
        )


def _grid_stride(camera: Camera, samples: int) -> int:
    return max(1, round(np.sqrt(camera.width * camera.height / samples)))


def _lift(centers: np.ndarray, depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    rays = np.concatenate([centers, np.ones((*centers.shape[:-1], 1))], axis=-1) @ np.linalg.inv(K).T
    return rays * depth[..., None]


def _world_points(depth: np.ndarray, camera: Camera, stride: int) -> np.ndarray:
    """Points (M, 3) in the world of the pixels with depth on a grid; the grid is centred, not flush top left."""
    rows, cols = np.arange(stride // 2, camera.height, stride), np.arange(stride // 2, camera.width, stride)
    centers = np.stack(np.meshgrid(cols + 0.5, rows + 0.5), axis=-1)
    grid = np.asarray(depth[np.ix_(rows, cols)], np.float64)
    points = _lift(centers, grid, camera.K)[grid > 0]
    return transform(invert(camera.cam_from_world), points)


@numba.njit(cache=True, nogil=True)
def _count_seen(points, bounds, depth, K, pose, tolerance):
    """Count, per source image, the points that one target image sees.

    points (M, 3) world, those of source i at bounds[i]:bounds[i + 1]; depth (H, W), K, pose: the target's.
    """
    height, width = depth.shape
    P = K @ pose[:3]
    seen = np.zeros(len(bounds) - 1, np.int64)
    for source in range(len(seen)):
        for m in range(bounds[source], bounds[source + 1]):
            x, y, w = points[m]
            z = pose[2, 0] * x + pose[2, 1] * y + pose[2, 2] * w + pose[2, 3]
            if z <= 0:
                continue
            u = (P[0, 0] * x + P[0, 1] * y + P[0, 2] * w + P[0, 3]) / z
            v = (P[1, 0] * x + P[1, 1] * y + P[1, 2] * w + P[1, 3]) / z
            if not (0 <= u < width and 0 <= v < height):
                continue
            found = depth[int(v), int(u)]
            if found > 0 and abs(z - found) <= tolerance * found:
                seen[source] += 1
    return seen
