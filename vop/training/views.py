"""Views: an image as it is, mirrored, or warped, each with a name of its own, so that a store holds them like images.

`a/b.jpg` is the image itself, `a/b.jpg?flip` its mirror image and `a/b.jpg?warp=2` its warped copy number 2: a part of
the image seen from aside, under other light. What a copy shows follows from its name alone.
"""

import hashlib
import re

import cv2
import numpy as np

from vop.image import thumbnail

FLIP = "?flip"
WARP = re.compile(r"^(?P<image>.*)\?warp=(?P<number>\d+)$", re.DOTALL)
SHARE = (0.45, 0.95)  # of the sides of the image, what a warped copy shows
TURN = 25.0  # degrees, at most
SLANT = 0.18  # of the sides of the part shown, how far its corners are moved at most


def image_of(view: str) -> str:
    """The image that a view is made of."""
    match = WARP.match(view)
    return match["image"] if match else view.removesuffix(FLIP)


def flipped(view: str) -> bool:
    """Whether a view is a mirror image."""
    return view.endswith(FLIP)


def view_names(image: str, flip: bool, warps: int) -> list[str]:
    """All views of an image that a training needs, the image itself first."""
    return [image, *([image + FLIP] if flip else []), *(f"{image}?warp={number}" for number in range(warps))]


def homography(view: str) -> np.ndarray:
    """From the image to the view, (3, 3) float64, in shares of width and height: (0, 0) top left, (1, 1) bottom right.

    The identity for the image itself, a mirroring for its mirror image. A warped copy shows a quadrangle that lies
    inside the image: a rectangle of the same shape, smaller, shifted and turned, its corners moved.
    """
    if flipped(view):
        return np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    if not WARP.match(view):
        return np.eye(3)
    rng = _random(view, "shape")
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    angle = np.radians(rng.uniform(-TURN, TURN))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (square + rng.uniform(-SLANT, SLANT, (4, 2))) @ turn.T * rng.uniform(*SHARE)
    low, high = corners.min(0), corners.max(0)
    corners = (corners - low) / np.maximum(high - low, 1)  # what would not fit in is made to
    room = 1 - (corners.max(0) - corners.min(0))
    corners += rng.uniform(0, 1, 2) * room
    return cv2.getPerspectiveTransform(corners.astype(np.float32), (square + 0.5).astype(np.float32))


def view_pixels(view: str, rgb: np.ndarray, image_size: int) -> np.ndarray:
    """The pixels of a view from those of its image, (H, W, 3) uint8 both.

    A warped copy is as large as is of use for a letterbox of `image_size` pixels.
    """
    if flipped(view):
        return np.ascontiguousarray(rgb[:, ::-1])
    if not WARP.match(view):
        return rgb
    source = thumbnail(rgb, 2 * image_size)  # twice as fine as needed, so that enlarging a part does not blur it
    height, width = source.shape[:2]
    to_pixels = np.diag([width, height, 1.0])
    # OpenCV counts from the centre of the first pixel, homographies here from its corner
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    warp = np.linalg.inv(half) @ to_pixels @ homography(view) @ np.linalg.inv(to_pixels) @ half
    warped = cv2.warpPerspective(source, warp, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return relit(warped, _random(view, "light"))


def relit(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same picture under other light and through another lens: (H, W, 3) uint8 both.

    Gamma, exposure, contrast, colour balance, a gradient of light, blur and noise, each of random strength.
    """
    image = (rgb / np.float32(255)) ** np.float32(2 ** rng.uniform(-0.8, 0.8))
    gains = np.float32(2 ** rng.uniform(-0.5, 0.5) * 2 ** rng.uniform(-0.2, 0.2, 3))
    height, width = image.shape[:2]
    slope = rng.uniform(-0.4, 0.4, 2)
    light = (
        1
        + slope[0] * np.linspace(-0.5, 0.5, width)[None, :, None]
        + slope[1] * np.linspace(-0.5, 0.5, height)[:, None, None]
    )
    image = image * gains * light.astype(np.float32)
    image = (image - np.float32(0.5)) * np.float32(rng.uniform(0.7, 1.3)) + np.float32(0.5)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.5))
    image = image + rng.normal(0, rng.uniform(0, 0.03), image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _random(view: str, what: str) -> np.random.Generator:
    """A generator that depends on the name of a view alone."""
    return np.random.default_rng(list(hashlib.sha256(f"{what} {view}".encode()).digest()))
