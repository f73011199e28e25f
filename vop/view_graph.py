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

VERSION = 1  # of these rules: models that follow from others are made again
BROKEN = "look-alikes: loops with stronger pairs do not close"
TURNED = "look-alikes: its rotation contradicts those of the others"
WEAK = "few inliers for these images, and no loop that confirms it"
LARGEST_LOOP_DEG, LARGEST_ROTATION_DEG = 5.0, 10.0  # where focal lengths are known
GUESSED_LOOP_DEG, GUESSED_ROTATION_DEG = 20.0, 30.0
CLOSED, FOLLOWED = 0.5, 5  # share of the keypoints that come back, and the least number that says anything
NEAR_PX = 4.0  # keypoints that lie so near are the same: detectors find a corner twice
SCALE_DEG = 5.0  # of the residuals of averaged rotations: beyond it a pair counts less and less
ITERATIONS, CONVERGED = 100, 1e-6  # of the averaging; radians
RIDGE = 1e-9  # keeps the system solvable, whose rotation as a whole is free


@dataclass(frozen=True, eq=False)
class ViewGraph:
    """N images and E verified pairs of them.

    ends (E, 2) int64, rows of images, the first the smaller. inliers: E arrays (m, 2) int32, the keypoints that agree
    with the pair's geometry. rotations (E, 3, 3): the second camera from the first. keypoints: N arrays (n, 2), pixels.
    calibrated (N,) bool: whether the focal length is known; guessed ones turn cameras by some degrees.
    """

    ends: np.ndarray
    inliers: Sequence[np.ndarray]
    rotations: np.ndarray
    keypoints: Sequence[np.ndarray]
    calibrated: np.ndarray

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


def of(pairs: pa.Table, images: pa.Table, keypoints: Mapping[str, np.ndarray]) -> ViewGraph:
    """The graph of pairs that have a pose (`vop.pair_verification.SCHEMA`) of images (`vop.colmap.IMAGES`, by name)."""
    names = images["name"].to_pylist()
    rows = {name: row for row, name in enumerate(names)}
    ends = [[rows[name] for name in pairs[side].to_pylist()] for side in ("image0", "image1")]
    empty = np.empty((0, 2), np.float32)
    return ViewGraph(
        np.array(ends, np.int64).T.reshape(-1, 2),
        [np.array(each, np.int32).reshape(-1, 2) for each in pairs["inliers"].to_pylist()],
        np.array(pairs["cam1_from_cam0"].to_pylist()).reshape(-1, 3, 4)[:, :, :3],
        [keypoints.get(name, empty) for name in names],
        images["calibrated"].to_numpy(zero_copy_only=False),
    )


def distrusted(graph: ViewGraph, strength: float) -> np.ndarray:
    """Why pairs are not to be trusted, (E,) object; None: they are.

    Pairs are taken in the order of their inliers, as look-alikes have fewer than what really is the same, and each is
    held against the loops of three that it closes with pairs taken before. Loops vote with the inliers of their weaker
    taken pair: where more of them break than hold, the pair is left aside. A pair that closes no loop is taken if it is
    strong: if it has at least the share `strength` of the inliers that the less well connected of its two images
    reaches with its best partner. A weak one waits until it closes a loop. Last, rotations are averaged over the pairs
    that were taken, and those that disagree are left aside: longer loops speak there.
    """
    loops = Loops.of(graph)
    reasons = np.full(len(graph.ends), None, object)
    best = np.zeros(len(graph.keypoints))
    for side in (0, 1):
        np.maximum.at(best, graph.ends[:, side], graph.weights)
    strong = graph.weights >= strength * best[graph.ends].min(axis=1)
    taken, broken = _taken(graph.weights, strong, loops)
    reasons[~taken] = WEAK
    reasons[broken] = BROKEN
    while taken.any():
        cameras = averaged_rotations(len(best), graph.ends[taken], graph.rotations[taken], graph.weights[taken])
        largest = np.where(graph.calibrated[graph.ends].all(axis=1), LARGEST_ROTATION_DEG, GUESSED_ROTATION_DEG)
        off = taken & (rotation_residuals(graph.ends, graph.rotations, cameras) > largest)
        if not off.any():
            break
        reasons[off], taken = TURNED, taken & ~off
    return reasons


def _taken(weights: np.ndarray, strong: np.ndarray, loops: "Loops") -> tuple[np.ndarray, np.ndarray]:
    """Which pairs are taken, and which of the others loops speak against, (E,) bool each."""
    taken, broken = np.zeros((2, len(weights)), bool)
    order = np.argsort(-weights, kind="stable")
    waiting = order.tolist()
    while True:
        left = []
        for pair in waiting:
            balance = loops.balance(pair, taken)
            if balance is None and not strong[pair]:
                left.append(pair)
            else:
                taken[pair] = balance is None or balance >= 0
                broken[pair] = not taken[pair]
        if len(left) == len(waiting):
            return taken, broken
        waiting = left


@dataclass(frozen=True, eq=False)
class Loops:
    """Loops of three pairs, and whether they hold.

    pairs (T, 3): rows of pairs. holds (T,): its rotations cancel to a few degrees, and of the keypoints that are
    matched all around, at least `CLOSED` come back to where they began. weights (E,): inliers of pairs. of: the loops
    of every pair. Loops that too few keypoints go around of, and whose rotations cancel, say nothing and are not here.
    """

    pairs: np.ndarray
    holds: np.ndarray
    weights: np.ndarray
    of_pair: Sequence[list[int]]

    @classmethod
    def of(cls, graph: ViewGraph) -> "Loops":
        """The loops of a graph."""
        pairs = _triangles(graph)
        corners = np.column_stack([graph.ends[pairs[:, 0]], graph.ends[pairs[:, 2], 1]])
        largest = np.where(graph.calibrated[corners].all(axis=1), LARGEST_LOOP_DEG, GUESSED_LOOP_DEG)
        turned = _loop_angles(graph, pairs) > largest
        closed, open_ = _followed(graph, pairs)
        holds = ~turned & (closed >= CLOSED * (closed + open_))
        speaks = turned | (closed + open_ >= FOLLOWED)
        pairs, holds = pairs[speaks], holds[speaks]
        of_pair = [[] for _ in graph.ends]
        for loop, members in enumerate(pairs.tolist()):
            for pair in members:
                of_pair[pair].append(loop)
        return cls(pairs, holds, graph.weights, of_pair)

    def balance(self, pair: int, taken: np.ndarray) -> float | None:
        """By how much the loops that hold outweigh those that break, of a pair and two taken ones; None: no loop."""
        found = None
        for loop in self.of_pair[pair]:
            others = [other for other in self.pairs[loop].tolist() if other != pair]
            if taken[others].all():
                weight = self.weights[others].min()
                found = (found or 0.0) + (weight if self.holds[loop] else -weight)
        return found


def _triangles(graph: ViewGraph) -> np.ndarray:
    """Rows of the pairs (i, j), (i, k), (j, k) of all loops i, j, k, (T, 3) int64; i < j < k."""
    known = {(i, j): pair for pair, (i, j) in enumerate(graph.ends.tolist())}
    after: dict[int, list[int]] = {}
    for i, j in sorted(known):
        after.setdefault(i, []).append(j)
    found = [
        (known[i, j], known[i, k], known[j, k])
        for i, ends in after.items()
        for at, j in enumerate(ends)
        for k in ends[at + 1 :]
        if (j, k) in known
    ]
    return np.array(found, np.int64).reshape(-1, 3)


def _loop_angles(graph: ViewGraph, triangles: np.ndarray) -> np.ndarray:
    """By how many degrees the rotations around each loop do not cancel, (T,)."""
    ij, ik, jk = (graph.rotations[each] for each in triangles.T)
    return np.rad2deg(np.linalg.norm(_logarithms(ik.swapaxes(1, 2) @ jk @ ij), axis=1))


def _followed(graph: ViewGraph, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many keypoints of i, followed to j and from there to k, come to where the pair (i, k) has them, to
    `NEAR_PX`, and how many do not, (T,) each.
    """
    closed, open_ = np.zeros((2, len(triangles)), np.int64)
    steps = [_step(graph, pair) for pair in range(len(graph.ends))]
    for row, (ij, ik, jk) in enumerate(triangles.tolist()):
        keypoints = graph.keypoints[graph.ends[ik, 1]]
        around, direct = steps[jk][steps[ij]], steps[ik]
        both = (around >= 0) & (direct >= 0)
        apart = np.linalg.norm(keypoints[around[both]] - keypoints[direct[both]], axis=1)
        closed[row], open_[row] = np.count_nonzero(apart <= NEAR_PX), np.count_nonzero(apart > NEAR_PX)
    return closed, open_


def _step(graph: ViewGraph, pair: int) -> np.ndarray:
    """Where a pair has the keypoints of its first image, (n + 1,): rows in the second; -1: nowhere, as the last."""
    first = graph.ends[pair, 0]
    found = np.full(len(graph.keypoints[first]) + 1, -1, np.int32)
    found[graph.inliers[pair][:, 0]] = graph.inliers[pair][:, 1]
    return found
