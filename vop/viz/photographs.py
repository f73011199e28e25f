"""Photographs for the page, read again from the collection."""

import numpy as np

from vop import files
from vop.image import ImageError, decode


def photograph(root: str, name: str, size: tuple[int, int]) -> tuple[str, np.ndarray]:
    """What the page calls an image, and its RGB: plain grey, and said so, where the file is no longer at hand.

    `size` is the (width, height) of the grey.
    """
    try:
        return name, decode(files.read_bytes(files.join(root, name)))
    except (OSError, ImageError):
        width, height = size
        return f"{name} (the file cannot be read now)", np.full((height, width, 3), 200, np.uint8)
