"""From rows of labels to rows that hold what the encoder sees: tokens from the store, or pixels from the files.

Plain callables without PyTorch: importing it takes a process 2 s of a core, and reading needs none.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from vop.embedding import read_image
from vop.image import letterbox
from vop.store import EmbeddingStore, tensor_column
from vop.training.views import image_of, relit, view_pixels


@dataclass(frozen=True)
class TokenReader:
    """Adds the tokens of both images, from a memory map of the store at `path` in the local folder `cache`."""

    path: str
    cache: str

    def __call__(self, labelled: pa.Table) -> pa.Table:
        """Add inputs0, inputs1 (n, P, D) and sizes0, sizes1 (n, 2) to rows with view0, view1."""
        for side in (0, 1):
            labelled = _with(labelled, side, *self.read(labelled[f"view{side}"].to_pylist()))
        return labelled

    def read(self, views: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, P, D) and scaled sizes (n, 2) of views."""
        rows, sizes, tokens = _opened(self.path, self.cache)
        wanted = np.array([rows[view] for view in views], int)
        return tokens[wanted], sizes[wanted]


@lru_cache(2)
def _opened(path: str, cache: str) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """Rows by name, scaled sizes and tokens of a store, kept by the process."""
    everything = EmbeddingStore.open(path).select()
    return (
        {name: row for row, name in enumerate(everything.names)},
        everything.scaled_sizes,
        everything.map_tokens(cache),
    )


@dataclass(frozen=True)
class PixelReader:
    """Adds the letterboxed pixels of both images, each under other light in every epoch: the uncached path.

    paths: of the images by name. seed: of the light.
    """

    paths: Mapping[str, str]
    image_size: int
    max_pixels: int
    seed: int

    def __call__(self, labelled: pa.Table) -> pa.Table:
        """Add inputs0, inputs1 (n, S, S, 3) uint8 and sizes0, sizes1 (n, 2) to rows with view0, view1 and epoch.

        Raises OSError for an image that cannot be read.
        """
        epochs = labelled["epoch"].to_pylist()
        for side in (0, 1):
            seen = [self._view(*row) for row in zip(labelled[f"view{side}"].to_pylist(), epochs, strict=True)]
            labelled = _with(labelled, side, *(np.stack(parts) for parts in zip(*seen, strict=True)))
        return labelled

    def _view(self, view: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.paths[image_of(view)]
        rgb, _, error = read_image(path, self.max_pixels)
        if error is not None:
            raise OSError(f"{path} could be read when its labels were made, but not now: {error}")
        pixels, scaled = letterbox(view_pixels(view, rgb, self.image_size), self.image_size)
        rng = np.random.default_rng([self.seed, epoch + 1, zlib.crc32(view.encode())])
        width, height = scaled
        pixels[:height, :width] = relit(pixels[:height, :width], rng)
        return pixels, np.array(scaled)


def _with(table: pa.Table, side: int, inputs: np.ndarray, sizes: np.ndarray) -> pa.Table:
    for name, values in ((f"inputs{side}", inputs), (f"sizes{side}", sizes)):
        table = table.append_column(name, tensor_column(np.asarray(values)))
    return table
