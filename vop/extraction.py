"""From image files to local features: what the extraction stage does before and with the network, as plain callables.

As in `vop.embedding` a shard travels as one Arrow table, and an image that cannot be read keeps its row, with the
reason in `error`, until the shard is written (`vop.embedding.ShardWriter`).
"""

import numpy as np
import pyarrow as pa

from vop import features
from vop.embedding import read_image
from vop.features import LocalFeatures
from vop.image import thumbnail
from vop.schema import MatchingConfig

SIZES = ("width", "height", "scaled_width", "scaled_height")


def decode_shard(planned: pa.Table, resize: int | None, max_pixels: int) -> pa.Table:
    """Read, decode and reduce the images of a shard.

    `planned` has image_id, name, path, shard; added are width, height, scaled_width, scaled_height (pixels, upright),
    content, error (null if the image is fine) and pixels, the bytes of (scaled_height, scaled_width, 3) uint8.
    """
    sizes = np.zeros((planned.num_rows, 4), np.int64)
    contents, errors, pixels = [], [], []
    for i, path in enumerate(planned["path"].to_pylist()):
        rgb, content, error = read_image(path, max_pixels)
        contents.append(content)
        errors.append(error)
        if rgb is None:
            pixels.append(None)
            continue
        reduced = rgb if resize is None else thumbnail(rgb, resize)
        sizes[i] = *rgb.shape[1::-1], *reduced.shape[1::-1]
        pixels.append(np.ascontiguousarray(reduced).data)
    decoded = {name: pa.array(sizes[:, i]) for i, name in enumerate(SIZES)}
    decoded |= {"content": pa.array(contents, pa.string()), "error": pa.array(errors, pa.string())}
    decoded["pixels"] = pa.array(pixels, pa.large_binary())
    for name, values in decoded.items():
        planned = planned.append_column(name, values)
    return planned


class ShardExtractor:
    """Finds the local features of decoded shards; the network is built once, where this lives."""

    def __init__(self, config: MatchingConfig):
        from vop import matching

        self.extract = matching.open_extractor(config)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """`decode_shard`'s table with keypoints, scores and descriptors for its pixels."""
        found = []
        none = np.empty((0, 2), np.float32), np.empty(0, np.float32), np.empty((0, self.extract.width), np.float16)
        for pixels, *size in zip(*(decoded[name].to_pylist() for name in ("pixels", *SIZES)), strict=True):
            if pixels is None:
                found.append(LocalFeatures(*none, (0, 0), (0, 0)))
                continue
            width, height, scaled_width, scaled_height = size
            rgb = np.frombuffer(pixels, np.uint8).reshape(scaled_height, scaled_width, 3)
            found.append(self.extract(rgb, (width, height)))
        described = decoded.drop_columns(["pixels"])
        for name, column in features.columns(found).items():
            described = described.append_column(name, column)
        return described


def descriptor_width(config: MatchingConfig) -> int:
    """Numbers of a descriptor, told by the extractor once it is built."""
    from vop import matching

    return matching.open_extractor(config).width
