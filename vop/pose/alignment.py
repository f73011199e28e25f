"""How far a model's cameras are from their true places, once it is laid over them by a similarity.

A reconstruction has no scale, place or direction of its own, so these seven numbers are fitted before it is judged:
S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist

from vop.cameras import KnownCamera

MIN_CAMERAS = 3  # fewer places, or places on a line, leave the similarity open
FLAT = 1e-9  # share of the largest extent below which places count as on a line


@dataclass(frozen=True, eq=False)
class Similarity:
    """x_target = scale * R x_source + t."""

    scale: float
    R: np.ndarray
    t: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """The points (n, 3) in the target's coordinates."""
        return self.scale * points @ self.R.T + self.t


def similarity(source: np.ndarray, target: np.ndarray) -> Similarity | None:
    """The similarity with the least sum of squared distances from source to target points, (n, 3) each.

    None where they do not fix one: fewer than three, or either on a line.
    """
    if len(source) < MIN_CAMERAS:
        return None
    centers = source.mean(axis=0), target.mean(axis=0)
    x, y = source - centers[0], target - centers[1]
    for points in (x, y):
        extents = np.linalg.svd(points, compute_uv=False)
        if extents[1] <= FLAT * extents[0]:
            return None
    U, D, Vt = np.linalg.svd(y.T @ x)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(U) * np.linalg.det(Vt))])
    R = (U * signs) @ Vt
    scale = float((D * signs).sum() / (x**2).sum())
    return Similarity(scale, R, centers[1] - scale * R @ centers[0])


def extent(centers: np.ndarray) -> float:
    """The size of a scene: the largest distance between its cameras (n, 3)."""
    return float(pdist(centers).max()) if len(centers) > 1 else 0.0


@dataclass(frozen=True, eq=False)
class Judgement:
    """How a model agrees with the true cameras.

    world: that of most of its images (of several, the first by name); None: no true camera of it is known. images:
    how many of its images lie there. foreign: how many lie in other worlds. errors: distance of every aligned camera of
    that world from its true place, as a share of the extent of that world, by image name; None where the similarity is
    not determined.
    """

    world: str | None
    images: int
    foreign: int
    errors: dict[str, float] | None


def judge(centers: Mapping[str, np.ndarray], known: Mapping[str, KnownCamera]) -> Judgement:
    """Judge a model, the centres (3,) of its cameras by image name, by cameras that are known.

    The extent of a world is that of all its known cameras, whether the model holds them or not.
    """
    truth = {name: camera for name, camera in known.items() if camera.cam_from_world is not None}
    worlds: dict[str, list[str]] = {}
    for name in sorted(centers):
        if name in truth:
            worlds.setdefault(truth[name].world, []).append(name)
    if not worlds:
        return Judgement(None, 0, 0, None)
    world = min(worlds, key=lambda name: (-len(worlds[name]), name))
    here, foreign = worlds[world], sum(map(len, worlds.values())) - len(worlds[world])
    size = extent(np.array([_center(camera) for camera in truth.values() if camera.world == world]))
    source, target = np.array([centers[name] for name in here]), np.array([_center(truth[name]) for name in here])
    aligned = similarity(source, target)
    if aligned is None or not size > 0:
        return Judgement(world, len(here), foreign, None)
    apart = np.linalg.norm(aligned(source) - target, axis=1) / size
    return Judgement(world, len(here), foreign, dict(zip(here, apart.tolist(), strict=True)))


def _center(camera: KnownCamera) -> np.ndarray:
    R, t = camera.cam_from_world[:3, :3], camera.cam_from_world[:3, 3]
    return -R.T @ t
