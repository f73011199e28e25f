"""From keypoints of a database image to points of the world: what localization needs of a database with geometry."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Lifted:
    """World points of m keypoints of one database image.

    xyz: (m, 3) float64, world units; NaN where the keypoint has no 3D point. ids: (m,) int64, equal where two images
    see the same point; -1: the point has no identity, and is never taken for that of another image. reason: why there
    is no point at all, where that is a fault of the data, such as a scan that is missing; None: nothing is wrong.
    """

    xyz: np.ndarray
    ids: np.ndarray
    reason: str | None = None


class Lift(Protocol):
    """Where database keypoints lie in the world. Cheap to make and to pickle: it holds paths, and workers read.

    Its repr says what the points follow from: of two lifts with equal ones, the poses are equal too.
    """

    def __call__(self, name: str, rows: np.ndarray, points: np.ndarray) -> Lifted:
        """The world points of keypoints of the image `name`.

        rows: (m,) int32, rows of its keypoints in the store of features. points: (m, 2) float64, the same keypoints in
        pixels of the upright original image, centres at +0.5.
        """

    def world(self, name: str) -> str | None:
        """The world that an image lies in, None where it has no geometry; points of two worlds are never mixed."""

    def lacking(self, names: Collection[str]) -> dict[str, str]:
        """Of these database images, those that have no geometry, and why: they take no part. Nothing large is read."""
