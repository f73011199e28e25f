"""Which verified pairs to trust: what pairs of look-alikes give away by contradicting the others.

Two different walls that look alike pass the verification of a single pair. What a single pair cannot show, three images
do: relative rotations around a loop must cancel, and a keypoint that is followed from image to image must arrive at the
keypoint that the direct pair matches it with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array, eye_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.sparse.linalg import splu
from scipy.spatial.transform import Rotation

from vop.schema import ReconstructConfig

VERSION = 1  # of these rules: models that follow from others are made again
SCALE_DEG = 5.0  # of the residuals of averaged rotations: beyond it a pair counts less and less
ITERATIONS, CONVERGED = 100, 1e-6  # of the averaging; radians
RIDGE = 1e-9  # keeps the system solvable, whose rotation as a whole is free


@dataclass(frozen=True, eq=False)
class ViewGraph:
    """N images and E verified pairs of them.

    ends (E, 2) int64, rows of images. matches (E,): how many were found. inliers: E arrays (m, 2) int32, the keypoints
    that agree with the pair's geometry. rotations (E, 3, 3): the second camera from the first. keypoints: N arrays
    (n, 2), pixels.
    """

    ends: np.ndarray
    matches: np.ndarray
    inliers: Sequence[np.ndarray]
    rotations: np.ndarray
    keypoints: Sequence[np.ndarray]

    @cached_property
    def weights(self) -> np.ndarray:
        """Inliers of every pair, (E,) float64."""
        return np.array([len(each) for each in self.inliers], np.float64)


def averaged_rotations(count: int, ends: np.ndarray, rotations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rotations (N, 3, 3) of N cameras that agree best with those of pairs; apart from each component's own direction.

    Starts from the spanning forest of largest weights, then iterates least squares in which pairs count the less the
    worse they agree (Geman-McClure): A. Chatterjee and V. M. Govindu, Efficient and robust large-scale rotation
    averaging, ICCV 2013.
    """
    found = _along_forest(count, ends, rotations, weights)
    first, second = ends.T
    rows = np.arange(len(ends))
    A = coo_array(
        (np.repeat([-1.0, 1.0], len(ends)), (np.concatenate([rows, rows]), np.concatenate([first, second]))),
        shape=(len(ends), count),
    ).tocsr()
    scale = np.deg2rad(SCALE_DEG)
    for _ in range(ITERATIONS):
        off = _logarithms(found[second].swapaxes(1, 2) @ rotations @ found[first])
        trust = weights * (scale**2 / (scale**2 + (off**2).sum(axis=1))) ** 2
        At = A.T.multiply(trust).tocsc()
        step = splu((At @ A + RIDGE * weights.max(initial=1.0) * eye_array(count)).tocsc()).solve(At @ off)
        found = found @ Rotation.from_rotvec(step).as_matrix()
        if np.abs(step).max() < CONVERGED:
            break
    return found


def rotation_residuals(ends: np.ndarray, rotations: np.ndarray, cameras: np.ndarray) -> np.ndarray:
    """By how many degrees the rotation of each pair (E, 3, 3) differs from that of its cameras (N, 3, 3)."""
    first, second = ends.T
    off = _logarithms(cameras[second].swapaxes(1, 2) @ rotations @ cameras[first])
    return np.rad2deg(np.linalg.norm(off, axis=1))


def _logarithms(rotations: np.ndarray) -> np.ndarray:
    return Rotation.from_matrix(rotations).as_rotvec().reshape(-1, 3)


def _along_forest(count: int, ends: np.ndarray, rotations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rotations (N, 3, 3) along the spanning forest of largest weights, the identity at each root."""
    found = np.tile(np.eye(3), (count, 1, 1))
    order = np.argsort(np.argsort(-weights, kind="stable")) + 1.0  # ranks: nothing is left to the library's taste
    graph = coo_array((order, tuple(ends.T)), shape=(count, count)).tocsr()
    forest = minimum_spanning_tree(graph)
    known = {(int(i), int(j)): each for (i, j), each in zip(ends, rotations, strict=True)}
    labels = connected_components(forest, directed=False)[1]
    for root in np.unique(labels, return_index=True)[1]:
        nodes, before = breadth_first_order(forest, root, directed=False)
        for node in nodes[1:]:
            parent = int(before[node])
            step = known.get((parent, int(node)))
            step = known[(int(node), parent)].T if step is None else step
            found[node] = step @ found[parent]
    return found


def of(pairs: pa.Table, names: Sequence[str], keypoints: Mapping[str, np.ndarray]) -> ViewGraph:
    """The graph of verified pairs (`vop.pair_verification.SCHEMA`) of images with these names."""
    rows = {name: row for row, name in enumerate(names)}
    ends = [[rows[name] for name in pairs[side].to_pylist()] for side in ("image0", "image1")]
    poses = [np.full(12, np.nan) if pose is None else pose for pose in pairs["cam1_from_cam0"].to_pylist()]
    empty = np.empty((0, 2), np.float32)
    return ViewGraph(
        np.array(ends, np.int64).T.reshape(-1, 2),
        pairs["matches"].to_numpy(),
        [np.array(each, np.int32).reshape(-1, 2) for each in pairs["inliers"].to_pylist()],
        np.array(poses).reshape(-1, 3, 4)[:, :, :3],
        [keypoints.get(name, empty) for name in names],
    )


def distrusted(graph: ViewGraph, config: ReconstructConfig) -> np.ndarray:
    """Why pairs are not to be trusted, (E,) object; None: they are."""
    return np.full(len(graph.ends), None, object)
