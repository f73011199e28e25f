"""From image files to a store: what the embedding stage does before and after the models, as plain callables.

A shard travels as one Arrow table: planned rows, then decoded rows, then described rows (`vop.models.embedder`). An
image that cannot be read keeps its row, with the reason in `error`, until the shard is written. Nothing here imports
PyTorch: workers that decode and write need none, and importing it takes each about 2 s of a core.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from vop import files
from vop.image import ImageError, decode, letterbox
from vop.shards import ImageStore
from vop.store import tensor_column


def content_hash(data: bytes) -> str:
    """Hash of a file's bytes, 32 hexadecimal digits: tells a changed file from a touched one."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_file(path: str) -> str | None:
    """`content_hash` of a file, None if it cannot be read."""
    try:
        return content_hash(files.read_bytes(path))
    except OSError:
        return None


def read_image(path: str, max_pixels: int) -> tuple[np.ndarray | None, str | None, str | None]:
    """An image's pixels (H, W, 3) uint8, the hash of its file and, where it cannot be used, the reason."""
    content = None
    try:
        data = files.read_bytes(path)
        content = content_hash(data)
        return decode(data, max_pixels), content, None
    except ImageError as error:
        return None, content, str(error)
    except OSError as error:
        return None, content, f"cannot read the file: {error.strerror or error}"


def decode_shard(planned: pa.Table, image_size: int, max_pixels: int, view: Callable | None = None) -> pa.Table:
    """Read, decode and letterbox the images of a shard, or views of them.

    `planned` has image_id, name, path, shard; added are width, height, scaled_width, scaled_height (pixels, of the
    upright image), content, error (null if the image is fine) and pixels (n, S, S, 3) uint8. `view(name, rgb,
    image_size)` gives the pixels of a view; None: names are those of images.
    """
    count = planned.num_rows
    pixels = np.zeros((count, image_size, image_size, 3), np.uint8)
    sizes = np.zeros((count, 4), np.int64)
    contents, errors = [None] * count, [None] * count
    names = planned["name"].to_pylist()
    for i, path in enumerate(planned["path"].to_pylist()):
        rgb, contents[i], errors[i] = read_image(path, max_pixels)
        if rgb is not None:
            shown = rgb if view is None else view(names[i], rgb, image_size)
            pixels[i], scaled = letterbox(shown, image_size)
            sizes[i] = rgb.shape[1], rgb.shape[0], *scaled
    decoded = {name: sizes[:, i] for i, name in enumerate(["width", "height", "scaled_width", "scaled_height"])}
    decoded |= {"content": pa.array(contents, pa.string()), "error": pa.array(errors, pa.string())}
    decoded["pixels"] = tensor_column(pixels)
    for name, values in decoded.items():
        planned = planned.append_column(name, pa.array(values) if isinstance(values, np.ndarray) else values)
    return planned


class ShardWriter:
    """Writes described shards and their receipts into a store, of descriptors or of local features."""

    def __init__(self, store: ImageStore):
        self.store = store

    def __call__(self, described: pa.Table) -> pa.Table:
        """Write one shard; returns its receipt's counts as a one-row table.

        Raises `RuntimeError` if the table is not one whole shard: its receipt would vouch for rows that are missing.
        """
        numbers, expected = described["shard"].unique().to_pylist(), described["shard_rows"][0].as_py()
        if len(numbers) != 1 or described.num_rows != expected:
            raise RuntimeError(
                f"{described.num_rows} rows of shards {numbers} arrived together, expected all {expected} rows of one "
                "shard: Ray Data has split or joined blocks, which DataContext.target_max_block_size=None prevents"
            )
        number = numbers[0]
        bad = described.filter(described["error"].is_valid())
        quarantined = [
            {"image_id": line["image_id"], "name": line["name"], "reason": line["error"], "content": line["content"]}
            for line in bad.select(["image_id", "name", "error", "content"]).to_pylist()
        ]
        good = described.filter(described["error"].is_null()).drop_columns(["path", "shard", "shard_rows", "error"])
        receipt = self.store.write_shard(number, good, quarantined)
        return pa.table({"shard": [number], "ok": [receipt["ok"]], "quarantined": [len(quarantined)]})
