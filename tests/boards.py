"""Photographs of painted boards that stand one before the other, with known cameras: enough parallax to reconstruct."""

import json

import cv2
import numpy as np

from vop.geometry import Camera
from vop.image import to_jpeg

SIZE = (320, 240)
K = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])
BOARDS = ((7.0, (-5.0, -4.0), (5.0, 4.0)), (5.5, (-2.4, -1.2), (-0.5, 1.0)), (4.8, (0.4, -0.6), (1.8, 1.3)))
PIXELS = 60  # of a board's painting, per unit


def camera(i: int, count: int) -> Camera:
    """Cameras on an arc, looking at the middle of the boards."""
    angle = 0.09 * (i - (count - 1) / 2)
    c, s = np.cos(angle), np.sin(angle)
    R = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    center = np.array([0, 0, 5.5]) - R.T @ [0, 0.25 * (i % 3 - 1), 5.5]
    return Camera.from_rt(K, R, -R @ center, *SIZE)


def photograph(seed: int, camera: Camera) -> np.ndarray:
    """What a camera sees of the boards of a seed, (240, 320, 3) uint8; nearer boards hide those behind."""
    rng = np.random.default_rng(seed)
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    for depth, low, high in BOARDS:
        width, height = (round(PIXELS * (b - a)) for a, b in zip(low, high, strict=True))
        painting = _painting(rng, width, height)
        plane = np.array([[1 / PIXELS, 0, low[0]], [0, 1 / PIXELS, low[1]], [0, 0, depth], [0, 0, 1]])
        H = K @ camera.cam_from_world[:3] @ plane
        shift = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])  # OpenCV's pixel centres are whole numbers
        H = shift @ H @ np.linalg.inv(shift)
        seen = cv2.warpPerspective(painting, H, SIZE, flags=cv2.INTER_AREA)
        mask = cv2.warpPerspective(np.full(painting.shape[:2], 255, np.uint8), H, SIZE)
        image = np.where(mask[..., None] > 127, seen, image)
    return image


def _painting(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Rectangles of all sizes and colours."""
    painting = np.full((height, width, 3), 128, np.uint8)
    for _ in range(width * height // 150):
        size, corner = rng.integers(3, 26, 2), rng.integers(-10, (width, height))
        colour = rng.integers(0, 256, 3).tolist()
        cv2.rectangle(painting, corner.tolist(), (corner + size).tolist(), colour, -1)
    return painting


def write(folder, scenes: dict[str, int], count: int) -> None:
    """Write `SCENE/0000.jpg` ... and `SCENE/cameras.json`, each scene painted by its own seed."""
    for scene, seed in scenes.items():
        (folder / scene).mkdir(parents=True)
        rows = {}
        for i in range(count):
            seen = camera(i, count)
            (folder / scene / f"{i:04d}.jpg").write_bytes(to_jpeg(photograph(seed, seen), 95))
            rows[f"{i:04d}.jpg"] = {"K": K.tolist(), "R": seen.rotation.tolist(), "t": seen.translation.tolist(),
                                    "width": SIZE[0], "height": SIZE[1]}  # fmt: skip
        (folder / scene / "cameras.json").write_text(json.dumps(rows))
