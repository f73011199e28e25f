"""Colours of a model's points, taken from the upright images.

COLMAP's own extraction reads image files from a local folder only, and leaves EXIF orientation out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vop.embedding import read_image

if TYPE_CHECKING:
    import pycolmap


def paint(model: "pycolmap.Reconstruction", paths: Mapping[str, str], max_pixels: int) -> None:
    """Give every point the mean colour of the pixels that see it; where no image can be read it stays black.

    paths: the files of images by name. max_pixels: of an image, above which it is not decoded.
    """
    ids = np.array(sorted(model.point3D_ids()), np.int64)
    sums, counts = np.zeros((len(ids), 3)), np.zeros(len(ids))
    for number in sorted(model.reg_image_ids()):
        image = model.image(number)
        rgb, _, error = read_image(paths[image.name], max_pixels)
        seen = image.get_observation_points2D()
        if error is not None or not seen:
            continue
        rows = np.searchsorted(ids, [point.point3D_id for point in seen])
        corners = np.floor([point.xy for point in seen]).astype(int)
        x, y = np.clip(corners, 0, np.array(rgb.shape[1::-1]) - 1).T
        np.add.at(sums, rows, rgb[y, x])
        np.add.at(counts, rows, 1)
    colors = np.rint(sums / np.maximum(counts, 1)[:, None]).astype(np.uint8)
    for point, color in zip(ids.tolist(), colors, strict=True):
        model.point3D(point).color = color
