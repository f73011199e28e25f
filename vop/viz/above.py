"""Cameras seen from above: which way is up, and where everything lies in the picture. Pure: arrays in, arrays out.

Above is where the cameras have their upper side, on average; where they do not agree on one, as pictures taken
straight down do not, it is across the plane that they stand in. The picture is turned so that its horizontal axis is
the direction in which the cameras are spread most, and its lower left corner is the origin.
"""

from dataclasses import dataclass, field

import numpy as np

from vop.pose.localized import center

ERROR, INLIERS = "position error", "inliers"  # what the colours of queries may tell
UNITS = "units of the map"
AGREED = 0.5  # length of the mean of all upper sides from which they count as one direction
HALF_ANGLE = np.radians(26)  # of the cone that a camera looks into
NEAR = (1e6, 1.0, 0.7)  # how far true places, queries and points may be off the map, in its extents, to be drawn
MARGIN, FLATTEST = 0.07, 0.25  # around the picture, and its least height: shares of its width


@dataclass(frozen=True, eq=False)
class Above:
    """One world as it is drawn.

    database: (n, 3, 4) `cam_from_world`. points: (p, 3), a sample of the map's. queries: (q, 3, 4). values: (q,), what
    their colour tells, `measured` (ERROR or INLIERS); NaN: unknown, inf: wrong altogether. truth: (q, 3), where they
    truly stood; NaN: unknown.
    """

    title: str
    database: np.ndarray
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    queries: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 4)))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    truth: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    measured: str = ERROR

    @property
    def known(self) -> np.ndarray:
        """The values that are known and finite."""
        return self.values[np.isfinite(self.values)]

    @property
    def told(self) -> str:
        """What is drawn, in words."""
        if not len(self.queries):
            return f"{len(self.database):,} camera{'s' * (len(self.database) != 1)}"
        span = ""
        if len(self.known):
            span = f", {self.measured} {self.known.min():.3g} to {self.known.max():.3g}"
            span += f" {UNITS}" if self.measured == ERROR else ""
        return f"{len(self.database):,} cameras of the database, {len(self.queries):,} of queries{span}"


def upright(poses: np.ndarray) -> np.ndarray:
    """Axes (3, 3) of the picture as rows in the world: right, up in the picture, and towards the one who looks down.

    They are right-handed. poses: (n, 3, 4) `cam_from_world`, n > 0.
    """
    centers, up = center(poses), -poses[:, 1, :3].mean(axis=0)  # the y axis of a camera points down
    if np.linalg.norm(up) < AGREED:
        thin = _spread(centers)[-1]
        up = thin if thin @ up >= 0 else -thin
    up = up / np.linalg.norm(up)
    first = np.eye(3)[np.abs(up).argmin()]
    first = first - first @ up * up
    level = np.stack([first, np.cross(up, first)]) / np.linalg.norm(first)
    right = _spread(centers @ level.T)[0] @ level
    right *= np.sign(right[np.abs(right).argmax()])
    return np.stack([right, np.cross(up, right), up])


def _spread(points: np.ndarray) -> np.ndarray:
    """Orthonormal directions of points (n, d) as rows (d, d), that of the widest spread first."""
    offsets = points - points.mean(axis=0)
    return np.linalg.eigh(offsets.T @ offsets)[1].T[::-1]


@dataclass(frozen=True, eq=False)
class Frame:
    """What of the world is in the picture: `axes` of `upright`, and the box in their first two, low and high (2,)."""

    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, view: Above) -> "Frame":
        """The box of nearly all cameras of the map, and of the queries and points that are not far from it."""
        poses = view.database if len(view.database) else view.queries
        axes = upright(poses) if len(poses) else np.eye(3)
        flat = [each @ axes[:2].T for each in (center(poses), view.truth, center(view.queries), view.points)]
        low, high = _range(flat[0], 0.5)
        if (high - low).max() <= 0:
            low, high = _range(np.concatenate(flat[:3]), 0.5)
        span = (high - low).max()
        for around, off, percent in zip(flat[1:], NEAR, (0, 0, 4), strict=True):
            near = around[((around >= low - off * span) & (around <= high + off * span)).all(axis=1)]
            if len(near):
                first, last = _range(near, percent)
                low, high = np.minimum(low, first), np.maximum(high, last)
        if (high - low).max() <= 0:  # one camera alone
            low, high = low - 1, high + 1
        widest = (high - low).max()
        size = np.maximum(high - low + 2 * MARGIN * widest, FLATTEST * (1 + 2 * MARGIN) * widest)
        return cls(axes, (low + high - size) / 2, (low + high + size) / 2)

    @property
    def size(self) -> np.ndarray:
        """Width and height, (2,), units of the map."""
        return self.high - self.low

    def flat(self, points: np.ndarray) -> np.ndarray:
        """Where points (n, 3) lie in the picture, (n, 2)."""
        return points @ self.axes[:2].T - self.low

    def inside(self, flat: np.ndarray) -> np.ndarray:
        """Which of such points are in the picture, (n,) bool."""
        return ((flat >= 0) & (flat <= self.size)).all(axis=1)

    def border(self, flat: np.ndarray) -> np.ndarray:
        """Where the lines from the middle of the picture to points (n, 2) outside leave it."""
        way, half = flat - self.size / 2, self.size / 2
        return half + way / np.abs(way / half).max(axis=1, keepdims=True)

    def cones(self, poses: np.ndarray, length: float) -> np.ndarray:
        """What cameras look into, triangles (n, 3, 2) from where they stand; short where they look up or down."""
        way = poses[:, 2, :3] @ self.axes[:2].T
        level = np.linalg.norm(way, axis=1, keepdims=True)
        way = way / np.maximum(level, 1e-12) * length * np.maximum(level, 0.3)
        side = np.tan(HALF_ANGLE) * np.stack([-way[:, 1], way[:, 0]], axis=1)
        at = self.flat(center(poses))
        return np.stack([at, at + way + side, at + way - side], axis=1)


def _range(flat: np.ndarray, percent: float) -> tuple[np.ndarray, np.ndarray]:
    """Low and high ends (2,) of points without the outermost `percent` at either; NaN is left out; 0 of nothing."""
    flat = flat[np.isfinite(flat).all(axis=1)]
    return tuple(np.percentile(flat, [percent, 100 - percent], axis=0)) if len(flat) else (np.zeros(2), np.zeros(2))
