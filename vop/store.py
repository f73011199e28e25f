"""`EmbeddingStore`: descriptors of a collection in shards (`vop.shards`).

Beside the files of every store it has `calibration.safetensors`: centre and whitening estimated on a sample of the
collection, where there are any.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from vop import files
from vop.quantised import float_type
from vop.shards import ImageStore, StoreError, shard_name

GROUP_ROWS = 16  # images in a row group of a shard: the least that is read of it, 2 MB of 256 x 256 float16


def tensor_column(values: np.ndarray) -> pa.Array:
    """An Arrow fixed_shape_tensor column of `values` (n, ...)."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def tensor_values(column: pa.ChunkedArray) -> np.ndarray:
    """The array (n, ...) of a fixed_shape_tensor column."""
    return column.combine_chunks().to_numpy_ndarray()


@dataclass(frozen=True)
class Selection:
    """Live images of a store in database order (sorted by name): what a search takes as its queries or database.

    `rows` has one line per image: image_id, name, scene, scaled_width, scaled_height, shard, row.
    """

    store: "EmbeddingStore"
    rows: pa.Table

    def __len__(self) -> int:
        return self.rows.num_rows

    @cached_property
    def names(self) -> list[str]:
        """Names of the images, in order."""
        return self.rows["name"].to_pylist()

    @property
    def locations(self) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row inside the shard of every image, (n,) int64 each."""
        return self.rows["shard"].to_numpy(), self.rows["row"].to_numpy()

    @property
    def scaled_sizes(self) -> np.ndarray:
        """Width and height of every letterboxed image without its padding, pixels, (n, 2) int64."""
        return np.stack([self.rows["scaled_width"].to_numpy(), self.rows["scaled_height"].to_numpy()], axis=1)

    @cached_property
    def scenes(self) -> list[str]:
        """Scenes of the images, in order."""
        return self.rows["scene"].to_pylist()

    @property
    def image_ids(self) -> list[int]:
        """Ids of the images in the store, in order."""
        return self.rows["image_id"].to_pylist()

    def take(self, indices: Sequence[int] | np.ndarray) -> "Selection":
        """The images at these positions."""
        return Selection(self.store, self.rows.take(pa.array(np.asarray(indices, dtype=np.int64))))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Global descriptors (n, G) and patches (n, P, E) of these images, in this order and in the stored type.

        `vop.quantised.widen` makes float32 vectors of patches, whatever type they have.
        """
        manifest = self.store.with_patches().manifest
        globals_ = np.empty((len(self), manifest["global_width"]), float_type(manifest["dtype"]))
        patches = np.empty((len(self), manifest["patches"], manifest["width"]), manifest["dtype"])
        self._fill({"global": globals_, "patches": patches})
        return globals_, patches

    def read_mapped(self, directory: str) -> tuple[np.ndarray, np.ndarray]:
        """Like `read`, but the patches are a read-only memory map of a file in a local directory (`_mapped`)."""
        manifest = self.store.with_patches().manifest
        globals_ = np.empty((len(self), manifest["global_width"]), float_type(manifest["dtype"]))
        patches = self._mapped("patches", manifest["width"], manifest["dtype"], directory)
        self._fill({"global": globals_})
        return globals_, patches

    def map_tokens(self, directory: str) -> np.ndarray:
        """The backbone's tokens (n, P, D) of these images, a read-only memory map of a file in a local directory.

        Raises `StoreError` if the store has none.
        """
        manifest = self.store.manifest
        if not manifest["features"].get("tokens"):
            raise StoreError(f"the store at {self.store.path} has no tokens: it was made with embedding.tokens=false")
        return self._mapped("tokens", manifest["token_width"], float_type(manifest["dtype"]), directory)

    def _mapped(self, column: str, width: int, dtype, directory: str) -> np.ndarray:
        """A column of these images as a memory map.

        The file is written if it is not there, one shard in memory at a time, by one process of a machine. Its name
        follows from the rows and from the hashes of their shards, so that a later reader of the same rows on the same
        machine finds it.
        """
        receipts = self.store.receipts()
        hashes = {int(number): receipts[number]["sha256"] for number in np.unique(self.locations[0])}
        what = [hashes, self.image_ids] if column == "patches" else [column, hashes, self.image_ids]
        path = Path(directory) / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    with files.atomic(path) as (_, temporary):
                        values = np.lib.format.open_memmap(
                            temporary, "w+", dtype, (len(self), self.store.manifest["patches"], width)
                        )
                        self._fill({column: values})
                        values.flush()
        return np.load(path, mmap_mode="r")

    def _fill(self, columns: dict[str, np.ndarray]) -> None:
        """Read columns of the images into arrays, a shard at a time."""
        shards, rows = self.locations
        for number in np.unique(shards):
            here = np.flatnonzero(shards == number)
            table, places = self.store.read_around(int(number), rows[here], list(columns))
            for name, array in columns.items():
                array[here] = tensor_values(table[name])[places]


@dataclass(frozen=True)
class EmbeddingStore(ImageStore):
    """A store of descriptors."""

    FORMAT = "vop-store-1"
    MADE_BY = "`vop embed`"
    KEY = "store"

    @classmethod
    def create(cls, path: str, features: dict, shapes: dict, calibration: dict[str, np.ndarray]) -> "EmbeddingStore":
        """Start an empty store.

        `features` says what makes the descriptors (see `check_features`); `shapes` holds `patches` P, `width` E (0 for
        a store without patches), `global_width` G, `token_width` D and `dtype`, the type of the patches and, unless
        that is int8, of all descriptors; `calibration` holds the arrays estimated on a sample.
        """
        if calibration:
            files.write_bytes(files.join(path, "calibration.safetensors"), safetensors.save(calibration))
        manifest = {
            "format": cls.FORMAT,
            "features": features,
            **shapes,
            "calibration": digest(calibration),
            "rows": {},
        }
        files.write_json(files.join(path, "manifest.json"), manifest)
        return cls(path, manifest)

    @classmethod
    def is_imported(cls, path: str) -> bool:
        """Whether a store is there whose descriptors came from a file, so that its images may be nowhere at hand."""
        return cls.exists(path) and cls.open(path).manifest["features"]["backbone"]["name"] == "imported"

    def with_patches(self) -> "EmbeddingStore":
        """This store. Raises `StoreError` if it has tokens alone, for training: nothing can be searched in it."""
        if not self.manifest["width"]:
            raise StoreError(f"the store at {self.path} has no patches: it was made with embedding.patches=false")
        return self

    def calibration(self) -> dict[str, np.ndarray]:
        """The arrays estimated on a sample of the collection. Raises `StoreError` if their file is damaged."""
        if not self.manifest["calibration"]:
            return {}
        path = files.join(self.path, "calibration.safetensors")
        remedy = "restore it, or embed into a new store"
        try:
            arrays = safetensors.load(files.read_bytes(path))
        except (FileNotFoundError, SafetensorError) as error:
            raise StoreError(f"cannot read {path} ({error}): {remedy}") from error
        if digest(arrays) != self.manifest["calibration"]:
            raise StoreError(f"{path} is not the file that the manifest names: {remedy}")
        return arrays

    def write_shard(self, number: int, table: pa.Table, quarantined: list[dict]) -> dict:
        """Write a shard, then its receipt, which is returned.

        `table` has image_id, name, width, height, scaled_width, scaled_height, content, global (n, G) and one at least
        of patches (n, P, E) and tokens (n, P, D); `quarantined` has image_id, name, reason per bad image.
        """
        path = files.join(self.path, f"{shard_name(number)}.parquet")
        with files.atomic(path) as (filesystem, inner):
            # Descriptors look random: dictionaries, statistics and compression cost time and save nothing. But Parquet
            # has no type of one byte: int8 takes one by means of a dictionary of its 255 values, without it four.
            int8 = "patches" in table.column_names and table["patches"].type.value_type == pa.int8()
            in_bytes = ["patches.list.element"] if int8 else False
            pq.write_table(table, inner, filesystem=filesystem, row_group_size=GROUP_ROWS, use_dictionary=in_bytes,
                           write_statistics=False, compression="none")  # fmt: skip
            digest = files.sha256(inner)
        return self.write_receipt(number, table.num_rows, quarantined, digest)

    def select(self, names: Sequence[str] | None = None) -> Selection:
        """The live images, all or those named, in database order.

        Raises `StoreError` as `live` does, and if all are in quarantine.
        """
        columns = ["image_id", "name", "scene", "scaled_width", "scaled_height", "shard", "row"]
        chosen = self.live(names).select(columns)
        if not chosen.num_rows:
            raise StoreError(
                f"none of {self.images().num_rows if names is None else len(names)} images can be used: all are in "
                f"quarantine, and {self.path}/images.parquet says why in its column error"
            )
        return Selection(self, chosen)


def digest(arrays: dict[str, np.ndarray]) -> str | None:
    """SHA-256 of named arrays, None for none."""
    if not arrays:
        return None
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        state.update(np.ascontiguousarray(arrays[name]).tobytes())
    return state.hexdigest()
