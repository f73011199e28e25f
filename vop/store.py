"""`EmbeddingStore`: descriptors of a collection as Parquet shards, with receipts.

    manifest.json           what made the descriptors, their shapes and types, row counts
    calibration.safetensors centre and whitening estimated on a sample of the collection, where there are any
    images.parquet          the catalog: every image, its shard and row, its status (see `vop.catalog`)
    shard-00007.parquet     descriptors of one shard; plain Arrow types, readable without `vop`
    shard-00007.json        the receipt, written after the shard: a shard with a receipt is never computed again

Every file is written under a temporary name and renamed, and every name and content follows from the inputs and the
order of runs, so that a killed and repeated run leaves the same bytes as an undisturbed one.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from vop import catalog, files
from vop.quantised import float_type

FORMAT = "vop-store-1"
GROUP_ROWS = 16  # images in a row group of a shard: the least that is read of it, 2 MB of 256 x 256 float16


class StoreError(ValueError):
    """A store that cannot be used as asked; the message names what was found, what was expected and the remedy."""


def shard_name(number: int) -> str:
    """File name of a shard without its suffix."""
    return f"shard-{number:05d}"


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
        manifest = self.store.manifest
        globals_ = np.empty((len(self), manifest["global_width"]), float_type(manifest["dtype"]))
        patches = np.empty((len(self), manifest["patches"], manifest["width"]), manifest["dtype"])
        self._fill({"global": globals_, "patches": patches})
        return globals_, patches

    def read_mapped(self, directory: str) -> tuple[np.ndarray, np.ndarray]:
        """Like `read`, but the patches are a read-only memory map of a file in a local directory.

        The file is written if it is not there, one shard in memory at a time. Its name follows from the rows and from
        the hashes of their shards, so that a later reader of the same rows on the same machine finds it.
        """
        manifest, receipts = self.store.manifest, self.store.receipts()
        hashes = {int(number): receipts[number]["sha256"] for number in np.unique(self.locations[0])}
        name = hashlib.sha256(json.dumps([hashes, self.image_ids]).encode()).hexdigest()[:32]
        path, shape = Path(directory) / f"{name}.npy", (len(self), manifest["patches"], manifest["width"])
        globals_ = np.empty((len(self), manifest["global_width"]), float_type(manifest["dtype"]))
        if not path.exists():
            with files.atomic(path) as (_, temporary):
                patches = np.lib.format.open_memmap(temporary, "w+", manifest["dtype"], shape)
                self._fill({"patches": patches})
                patches.flush()
        self._fill({"global": globals_})
        return globals_, np.load(path, mmap_mode="r")

    def _fill(self, columns: dict[str, np.ndarray]) -> None:
        """Read columns of the images into arrays, a shard at a time."""
        shards, rows = self.locations
        for number in np.unique(shards):
            here = np.flatnonzero(shards == number)
            table, places = self.store.read_around(int(number), rows[here], list(columns))
            for name, array in columns.items():
                array[here] = tensor_values(table[name])[places]


@dataclass(frozen=True)
class EmbeddingStore:
    """A store on disk or in a bucket; cheap to construct and to send to workers."""

    path: str
    manifest: dict

    @classmethod
    def create(cls, path: str, features: dict, shapes: dict, calibration: dict[str, np.ndarray]) -> "EmbeddingStore":
        """Start an empty store.

        `features` says what makes the descriptors (see `check_features`); `shapes` holds `patches` P, `width` E,
        `global_width` G, `token_width` D and `dtype`, the type of the patches and, unless that is int8, of all
        descriptors; `calibration` holds the arrays estimated on a sample.
        """
        if calibration:
            files.write_bytes(files.join(path, "calibration.safetensors"), safetensors.save(calibration))
        manifest = {"format": FORMAT, "features": features, **shapes, "calibration": digest(calibration), "rows": {}}
        files.write_json(files.join(path, "manifest.json"), manifest)
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str) -> "EmbeddingStore":
        """Open a store. Raises `StoreError` if there is none or its format is unknown."""
        try:
            manifest = files.read_json(files.join(path, "manifest.json"))
        except FileNotFoundError as error:
            raise StoreError(f"no store at {path} (it has no manifest.json): run `vop embed` first") from error
        except json.JSONDecodeError as error:
            raise StoreError(f"{path}/manifest.json is not JSON ({error}): restore it or embed anew") from error
        if manifest.get("format") != FORMAT:
            raise StoreError(f"{path} has store format {manifest.get('format')!r}; this version of vop reads {FORMAT}")
        return cls(path, manifest)

    @staticmethod
    def exists(path: str) -> bool:
        """Whether a store was started at this path."""
        return files.exists(files.join(path, "manifest.json"))

    @classmethod
    def is_imported(cls, path: str) -> bool:
        """Whether a store is there whose descriptors came from a file, so that its images may be nowhere at hand."""
        return cls.exists(path) and cls.open(path).manifest["features"]["backbone"]["name"] == "imported"

    def check_features(self, features: dict) -> None:
        """Refuse to mix descriptors: raise `StoreError` naming both sides of every difference."""
        found, asked = _flat(self.manifest["features"]), _flat(features)
        differing = [key for key in sorted(found | asked) if found.get(key) != asked.get(key)]
        if differing:
            lines = [f"  {key}: the store has {found.get(key)!r}, this run {asked.get(key)!r}" for key in differing]
            raise StoreError(
                f"the store at {self.path} was made with other features:\n" + "\n".join(lines) + "\n"
                "Give another store=..., or the settings that made this one"
            )

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

    def images(self) -> pa.Table:
        """The catalog (`vop.catalog.SCHEMA`); empty before the first plan."""
        filesystem, inner = files.resolve(files.join(self.path, "images.parquet"))
        try:
            return pq.read_table(inner, filesystem=filesystem, partitioning=None)
        except FileNotFoundError:
            return catalog.SCHEMA.empty_table()

    def write_images(self, images: pa.Table) -> None:
        """Replace the catalog and the row counts of the manifest."""
        with files.atomic(files.join(self.path, "images.parquet")) as (filesystem, inner):
            pq.write_table(images, inner, filesystem=filesystem, compression="zstd")
        self.manifest["rows"] = dict(sorted(Counter(images["status"].to_pylist()).items()))
        files.write_json(files.join(self.path, "manifest.json"), self.manifest)

    def receipts(self) -> dict[int, dict]:
        """Receipts by shard number. A receipt that is not whole JSON counts as missing."""
        found = {}
        for name in files.listing(self.path):
            if name.startswith("shard-") and name.endswith(".json"):
                try:
                    found[int(name[6:-5])] = files.read_json(files.join(self.path, name))
                except ValueError:
                    continue
        return found

    def write_shard(self, number: int, table: pa.Table, quarantined: list[dict]) -> dict:
        """Write a shard, then its receipt, which is returned.

        `table` has image_id, name, width, height, scaled_width, scaled_height, content, global (n, G),
        patches (n, P, E) and perhaps tokens (n, P, D); `quarantined` has image_id, name, reason per bad image.
        """
        path = files.join(self.path, f"{shard_name(number)}.parquet")
        with files.atomic(path) as (filesystem, inner):
            # Descriptors look random: dictionaries, statistics and compression cost time and save nothing. But Parquet
            # has no type of one byte: int8 takes one by means of a dictionary of its 255 values, without it four.
            in_bytes = ["patches.list.element"] if table["patches"].type.value_type == pa.int8() else False
            pq.write_table(table, inner, filesystem=filesystem, row_group_size=GROUP_ROWS, use_dictionary=in_bytes,
                           write_statistics=False, compression="none")  # fmt: skip
        receipt = {
            "shard": number,
            "rows": table.num_rows + len(quarantined),
            "ok": table.num_rows,
            "quarantined": quarantined,
            "sha256": files.sha256(path),
        }
        files.write_json(files.join(self.path, f"{shard_name(number)}.json"), receipt)
        return receipt

    def plan(
        self, listed: pa.Table, shard_size: int, prune: bool, content: Callable[[str], str | None]
    ) -> tuple[catalog.Plan, dict[int, pa.Table]]:
        """Plan a listing into the catalog and write it; returns the plan and the images of every shard to be written.

        Arguments as of `catalog.plan`. What a killed run left is taken up first: finished shards are noted, their
        images compared with the listing, and half-written files deleted.
        """
        receipts = self.receipts()
        known = catalog.finish(self.images(), receipts, self.shard_facts)
        planned = catalog.plan(known, listed, shard_size, prune, content)
        self.write_images(planned.images)
        pending = catalog.pending(planned.images, receipts)
        if pending:
            for name in files.listing(self.path):
                if name.startswith(".") and name.endswith(".tmp"):
                    files.remove(files.join(self.path, name))
        return planned, pending

    def finish(self) -> pa.Table:
        """Note in the catalog what became of the planned images; returns it."""
        images = catalog.finish(self.images(), self.receipts(), self.shard_facts)
        self.write_images(images)
        return images

    def read_shard(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Columns of a shard. Raises `StoreError` if the file is missing or is not whole Parquet."""
        with self._parquet(number) as file:
            return file.read(columns)

    def read_around(self, number: int, rows: np.ndarray, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
        """Columns of those row groups of a shard that hold these rows (n,), and where in them the rows are, (n,).

        Raises `StoreError` as `read_shard` does.
        """
        with self._parquet(number) as file:
            sizes = np.array([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            ends = np.cumsum(sizes)
            groups, group = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
            skipped = (ends - sizes)[groups] - (np.cumsum(sizes[groups]) - sizes[groups])
            return file.read_row_groups(groups.tolist(), columns), rows - skipped[group]

    @contextmanager
    def _parquet(self, number: int) -> Iterator[pq.ParquetFile]:
        filesystem, inner = files.resolve(files.join(self.path, f"{shard_name(number)}.parquet"))
        try:
            with pq.ParquetFile(inner, filesystem=filesystem, pre_buffer=True) as file:
                yield file
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            receipt = f"{shard_name(number)}.json"
            raise StoreError(f"cannot read {inner}: {error}. Delete {receipt} and run `vop embed` again") from error

    def shard_facts(self, number: int) -> pa.Table:
        """What the catalog takes from a shard: image_id, content and sizes of its rows."""
        return self.read_shard(number, ["image_id", "content", "width", "height", "scaled_width", "scaled_height"])

    def verify(self) -> Iterator[str]:
        """Yield what is wrong with the files: shards whose content is not what their receipt says."""
        for number, receipt in sorted(self.receipts().items()):
            path = files.join(self.path, f"{shard_name(number)}.parquet")
            if not files.exists(path):
                yield f"{path} is missing"
            elif files.sha256(path) != receipt["sha256"]:
                yield f"{path} is not the file that its receipt names"

    def select(self, names: Sequence[str] | None = None) -> Selection:
        """The live images, all or those named, in database order.

        Raises `StoreError` if the store is unfinished, lacks a named image that is not quarantined, or if all are.
        """
        images = self.images()
        unfinished = pc.sum(pc.equal(images["status"], catalog.PLANNED)).as_py() or 0
        if unfinished or not images.num_rows:
            raise StoreError(f"the store at {self.path} lacks {unfinished or 'all'} images: run `vop embed` again")
        columns = ["image_id", "name", "scene", "scaled_width", "scaled_height", "shard", "row"]
        live = images.filter(pc.equal(images["status"], catalog.OK)).select(columns).sort_by("name")
        current = images.filter(pc.is_in(images["status"], pa.array([catalog.OK, catalog.QUARANTINED])))
        wanted = current["name"].combine_chunks() if names is None else pa.array(names, pa.string())
        absent = pc.filter(wanted, pc.invert(pc.is_in(wanted, current["name"].combine_chunks())))
        if len(absent):
            raise StoreError(
                f"{len(absent)} images are not in the store at {self.path}, the first {absent[0].as_py()!r}: "
                "run `vop embed` on the collection that holds them"
            )
        chosen = live.filter(pc.is_in(live["name"], wanted))
        if not chosen.num_rows:
            raise StoreError(
                f"none of {len(wanted)} images can be used: all are in quarantine, and {self.path}/images.parquet says "
                "why in its column error"
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


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
