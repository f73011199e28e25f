"""`sift+nn`: RootSIFT and mutual nearest neighbours with a ratio test; OpenCV alone, no weights.

SIFT: Lowe, IJCV 2004, whose ratio test at 0.8 this is. RootSIFT: Arandjelović and Zisserman, CVPR 2012: descriptors are
divided by their sum and square-rooted, so that Euclidean distance compares histograms as Hellinger's does.

OpenCV's keypoints have pixel centres at 0, but by default they lie a quarter of a pixel too far right and down: the
detector doubles the image, and halves coordinates as if pixel x became 2x, where its resize makes it 2x + 1/2.
`enable_precise_upscale` mends that; a test measures it on a blob.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from vop.features import LocalFeatures
from vop.matches import NO_MATCHES, Matches
from vop.matching.interface import Extractor, Matcher, strongest
from vop.schema import MatchingConfig

RATIO = 0.8
WIDTH = 128


def check(config: MatchingConfig) -> None:
    """Nothing to check: OpenCV comes with vop."""


def identity(config: MatchingConfig) -> dict:
    """What makes these features and matches."""
    return {
        "features": {"method": "rootsift", "opencv": cv2.__version__, "precise_upscale": True},
        "matches": {"method": "mutual nearest neighbours", "ratio": RATIO},
    }


class SiftExtractor(Extractor):
    """OpenCV's SIFT on the grey image with its default thresholds, described by RootSIFT."""

    width = WIDTH

    def __init__(self, max_keypoints: int):
        self.max_keypoints = max_keypoints
        # all keypoints are asked for, because OpenCV's own limit keeps more where scores tie
        self.sift = cv2.SIFT_create(enable_precise_upscale=True)

    def __call__(self, rgb: np.ndarray, size: tuple[int, int]) -> LocalFeatures:
        """Local features of an image; see `Extractor`. Scores are contrasts of the difference of Gaussians."""
        points, descriptors = self.sift.detectAndCompute(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), None)
        if descriptors is None:
            descriptors = np.empty((0, WIDTH), np.float32)
        return strongest(
            keypoints=np.array([point.pt for point in points], np.float32).reshape(-1, 2),
            scores=np.array([point.response for point in points], np.float32),
            descriptors=_root(descriptors),
            size=size,
            scaled=(rgb.shape[1], rgb.shape[0]),
            most=self.max_keypoints,
        )


def _root(descriptors: np.ndarray) -> np.ndarray:
    total = descriptors.sum(1, keepdims=True)
    return np.sqrt(descriptors / np.maximum(total, np.finfo(np.float32).tiny))


class NearestNeighbours(Matcher):
    """Mutual nearest neighbours whose distance is below `RATIO` times that of the second nearest, both ways.

    Testing both ways makes the matches of a pair independent of its order. A score is 1 minus the larger of the two
    ratios. An image with a single keypoint has no second nearest, hence no matches.
    """

    def __call__(self, pairs: Sequence[tuple[LocalFeatures, LocalFeatures]]) -> list[Matches]:
        """Matches of each pair; see `Matcher`."""
        return [self._match(*pair) for pair in pairs]

    def _match(self, features0: LocalFeatures, features1: LocalFeatures) -> Matches:
        x, y = (features.descriptors.astype(np.float32) for features in (features0, features1))
        if min(len(x), len(y)) < 2:
            return NO_MATCHES
        squared = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * (x @ y.T)
        nearest1, ratio0 = _nearest(squared, axis=1)
        nearest0, ratio1 = _nearest(squared, axis=0)
        rows = np.flatnonzero(nearest0[nearest1] == np.arange(len(x)))
        ratios = np.maximum(ratio0[rows], ratio1[nearest1[rows]])
        kept = ratios < RATIO
        indices = np.stack([rows, nearest1[rows]], axis=1)[kept]
        return Matches(indices.astype(np.int32), (1 - ratios[kept]).astype(np.float32))


def _nearest(squared: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the smallest squared distance along an axis is, and the ratio of the two smallest distances (0 to 0: 1)."""
    at = np.expand_dims(squared.argmin(axis), axis)
    near = np.take_along_axis(squared, at, axis)
    others = squared.copy()
    np.put_along_axis(others, at, np.inf, axis)
    near, far = (np.sqrt(np.maximum(values, 0)).ravel() for values in (near, others.min(axis)))
    return at.ravel(), np.divide(near, far, out=np.ones_like(near), where=far > 0)


def open_extractor(config: MatchingConfig, device: str | None) -> SiftExtractor:
    """SIFT; it runs on the CPU whatever the device."""
    return SiftExtractor(config.max_keypoints)


def open_matcher(config: MatchingConfig, device: str | None) -> NearestNeighbours:
    """The nearest neighbours; they run on the CPU whatever the device."""
    return NearestNeighbours()
