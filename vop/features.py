"""`FeatureStore`: local features of a collection in shards (`vop.shards`).

A shard has one row per image: image_id, name, width, height (pixels of the upright image), scaled_width, scaled_height
(as the extractor saw it), content, keypoints (list of x, y), scores, descriptors (all of an image in one list,
`manifest["width"]` numbers each).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files
from vop.schema.poses import IMPORTED
from vop.shards import ImageStore, shard_name


@dataclass(frozen=True, eq=False)
class LocalFeatures:
    """Keypoints of one image and what they look like, the best score first (imported ones as their file has them).

    keypoints: (n, 2) float32, x and y in pixels of the upright original image, pixel centres at +0.5. scores: (n,)
    float32. descriptors: (n, D) float16. size: (width, height) of the upright original image; scaled: of the image as
    the extractor saw it, pixels.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray
    size: tuple[int, int]
    scaled: tuple[int, int]

    def __len__(self) -> int:
        return len(self.keypoints)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.keypoints.nbytes + self.scores.nbytes + self.descriptors.nbytes


def columns(features: Sequence[LocalFeatures]) -> dict[str, pa.Array]:
    """keypoints, scores and descriptors of images as the columns of a shard."""
    ends = np.cumsum([0, *map(len, features)]).astype(np.int32)
    keypoints = np.concatenate([np.empty((0, 2), np.float32), *(each.keypoints for each in features)])
    scores = np.concatenate([np.empty(0, np.float32), *(each.scores for each in features)])
    flat = np.concatenate([np.empty(0, np.float16), *(each.descriptors.ravel() for each in features)])
    sizes = np.cumsum([0, *(each.descriptors.size for each in features)]).astype(np.int32)
    pairs = pa.FixedSizeListArray.from_arrays(pa.array(keypoints.astype(np.float32).ravel()), 2)
    return {
        "keypoints": pa.ListArray.from_arrays(pa.array(ends), pairs),
        "scores": pa.ListArray.from_arrays(pa.array(ends), pa.array(scores.astype(np.float32))),
        "descriptors": pa.ListArray.from_arrays(pa.array(sizes), pa.array(flat.astype(np.float16))),
    }


def keypoints_of(table: pa.Table) -> list[np.ndarray]:
    """The keypoints (n, 2) float32 of every row of a table with that column."""
    column = table["keypoints"].combine_chunks()
    values = column.values.values.to_numpy().reshape(-1, 2)
    ends = column.offsets.to_numpy()
    return [values[start:stop] for start, stop in itertools.pairwise(ends)]


@dataclass(frozen=True)
class FeatureStore(ImageStore):
    """A store of local features."""

    FORMAT = "vop-features-1"
    MADE_BY = "`vop match`"
    KEY = "features"

    @classmethod
    def create(cls, path: str, features: dict, width: int) -> "FeatureStore":
        """Start an empty store. `features` says what makes them; `width` is D, the numbers of a descriptor."""
        manifest = {"format": cls.FORMAT, "features": features, "width": width, "rows": {}}
        files.write_json(files.join(path, "manifest.json"), manifest)
        return cls(path, manifest)

    @property
    def is_imported(self) -> bool:
        """Whether the features came from a file (`vop import-hloc`)."""
        return self.manifest["features"].get("method") == IMPORTED

    def write_shard(self, number: int, table: pa.Table, quarantined: list[dict]) -> dict:
        """Write a shard, then its receipt, which is returned.

        `table` has the columns of a shard; `quarantined` has image_id, name, reason per bad image.
        """
        with files.atomic(files.join(self.path, f"{shard_name(number)}.parquet")) as (filesystem, inner):
            # A row group for each image, since pairs ask for single images; checksums, since a flipped bit of a
            # keypoint would be believed.
            pq.write_table(table, inner, filesystem=filesystem, row_group_size=1, use_dictionary=False,
                           write_statistics=False, compression="none", write_page_checksum=True)  # fmt: skip
            digest = files.sha256(inner)
        return self.write_receipt(number, table.num_rows, quarantined, digest)

    def read(self, number: int, rows: np.ndarray) -> list[LocalFeatures]:
        """The features of these rows (n,) of a shard, in this order. Raises `StoreError` if it cannot be read."""
        sizes = ["width", "height", "scaled_width", "scaled_height"]
        table, places = self.read_around(number, rows, [*sizes, "keypoints", "scores", "descriptors"])
        keypoints = keypoints_of(table)
        scores, descriptors = (table[name].combine_chunks() for name in ("scores", "descriptors"))
        size = np.stack([table[name].to_numpy() for name in sizes], axis=1).tolist()
        return [
            LocalFeatures(
                keypoints[place],
                scores[place].values.to_numpy(),
                descriptors[place].values.to_numpy().reshape(len(keypoints[place]), self.manifest["width"]),
                tuple(size[place][:2]),
                tuple(size[place][2:]),
            )
            for place in places.tolist()
        ]

    def counts(self, number: int, rows: np.ndarray) -> np.ndarray:
        """How many keypoints each of these rows of a shard has, (n,) int64, in this order."""
        table, places = self.read_around(number, rows, ["scores"])
        return pc.list_value_length(table["scores"]).to_numpy().astype(np.int64)[places]

    def read_keypoints(self, number: int, rows: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """Keypoints (n, 2) float32 and size of the original (width, height) of these rows of a shard, in this order.

        Raises `StoreError` if the shard cannot be read.
        """
        table, places = self.read_around(number, rows, ["width", "height", "keypoints"])
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        found = [*zip(keypoints_of(table), sizes, strict=True)]
        return [found[place] for place in places.tolist()]
