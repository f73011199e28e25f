"""What every method of local features offers, and the way between an extractor's pixels and those of the original.

Extractors and learned matchers count pixel centres at 0 in the resized image they were given; `LocalFeatures` hold
centres at +0.5 in the original image. `strongest` and `seen` are the two directions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from vop.features import LocalFeatures
from vop.matches import Matches

SMALLEST = 32  # pixels; networks that reduce an image by 32 find nothing in a smaller one, or fail


class Extractor(ABC):
    """Finds and describes the keypoints of one image; `width` is the length D of a descriptor."""

    width: int

    @abstractmethod
    def __call__(self, rgb: np.ndarray, size: tuple[int, int]) -> LocalFeatures:
        """Local features of an image, best score first; an image without any keypoint gives n = 0.

        Args:
            rgb: (h, w, 3) uint8, upright and already resized as `matching.resize` asks.
            size: width and height of the original upright image, pixels.
        """


class Matcher(ABC):
    """Tells which keypoints of two images show the same point."""

    @abstractmethod
    def __call__(self, pairs: Sequence[tuple[LocalFeatures, LocalFeatures]]) -> list[Matches]:
        """Matches of any number of pairs, in their order; batches are the matcher's own affair."""


def strongest(
    keypoints: np.ndarray,
    scores: np.ndarray,
    descriptors: np.ndarray,
    size: tuple[int, int],
    scaled: tuple[int, int],
    most: int,
) -> LocalFeatures:
    """The best keypoints of an image, moved into the pixels of the original.

    Args:
        keypoints: (n, 2) x, y in pixels of the resized image, centres at 0.
        scores: (n,) higher is better; equal scores keep their order.
        descriptors: (n, D).
        size: width and height of the original, pixels.
        scaled: width and height of the resized image, pixels.
        most: how many are kept at most.
    """
    order = np.argsort(-scores, kind="stable")[:most]
    scale = np.asarray(size, np.float64) / scaled
    return LocalFeatures(
        keypoints=((keypoints[order].astype(np.float64) + 0.5) * scale).astype(np.float32),
        scores=scores[order].astype(np.float32),
        descriptors=descriptors[order].astype(np.float16),
        size=tuple(size),
        scaled=tuple(scaled),
    )


def nothing(width: int, size: tuple[int, int], scaled: tuple[int, int]) -> LocalFeatures:
    """The features of an image without keypoints; `width` is D."""
    return strongest(np.empty((0, 2)), np.empty(0), np.empty((0, width)), size, scaled, 0)


def seen(features: LocalFeatures) -> np.ndarray:
    """Keypoints (n, 2) float32 as the extractor saw them: pixels of the resized image, centres at 0."""
    scale = np.asarray(features.scaled, np.float64) / features.size
    return (features.keypoints.astype(np.float64) * scale - 0.5).astype(np.float32)


def torch_device(device: str | None) -> str:
    """The device that is asked for; None: a GPU if there is one. What needs no PyTorch does not pay for its import."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")
