"""Exchange with the HDF5 files of the original, `overlap_feats.h5`.

    <name of the image>/           nested groups where the name has slashes
        keypoints          (P, 2)  patch centres, x and y in pixels of the letterboxed image (`vop.image.patch_centers`)
        descriptors        (P, D)  backbone tokens, row by row
        global_descriptor  (G,)
        image_size         (2,)    width and height of the scaled image, without its padding
        original_image_size (2,)   width and height of the file's image         -- where known, as all that follow
        K, original_K      (3, 3)  intrinsics for the scaled image and for the file's image
        T_w2cam            (4, 4)  world to camera
    indices/query, indices/db      names of the queries and of the database

The layout is that of github.com/weitong8591/vop, whose scripts run the encoder when they read: what they expect as
`descriptors` are raw tokens. A store that keeps tokens (`embedding.tokens`) is therefore written with its tokens, any
other with its descriptors, and the attribute `descriptors` of the file says which. hloc takes the same file as global
features, if it is given lists of queries and database.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
import pyarrow as pa

from vop import catalog, files
from vop.foreign_hdf5 import ForeignLinkError, member
from vop.geometry import Camera
from vop.image import patch_centers
from vop.names import checked
from vop.progress import progress
from vop.quantised import float_type, stored, widen
from vop.store import EmbeddingStore, Selection, tensor_column, tensor_values

REQUIRED = ("keypoints", "descriptors", "global_descriptor", "image_size")
ORIGINAL_SIZE, INDICES = "original_image_size", "indices"
PATCH_SIZE = 14
ROWS = pa.schema(
    [("image_id", pa.int64()), ("name", pa.string())]
    + [(key, pa.int64()) for key in ("width", "height", "scaled_width", "scaled_height")]
    + [("content", pa.string())]  # null: the hash of the image file is not known
)
TOLERANCE = 1.0  # pixels between our patch centres and the file's: other rounding passes, another order does not


class H5Error(ValueError):
    """A file, or a group of it, that is not in the layout; the message names what was found and what was expected."""


def local(path: str) -> str:
    """The path of a file on a local disk. Raises `H5Error` for a bucket: HDF5 reads here and there in a file."""
    if not files.is_local(path):
        raise H5Error(f"h5={path} lies in a bucket, but HDF5 reads here and there in a file: copy it to a local disk")
    return files.resolve(path)[1]


def export(
    selection: Selection, path: str, indices: Mapping[str, Sequence[str]], cameras: Mapping[str, Camera]
) -> Iterator[int]:
    """Write images of a store, one shard in memory at a time; yields the number of images written after each.

    `indices` are the lists of names below `indices/`, `cameras` the known ones by name. Descriptors keep the stored
    type; int8 patches are written as the float32 unit vectors that they stand for. The file appears when the iterator
    is exhausted, whole. Raises `H5Error` for a name that the layout has no place for.
    """
    taken = next((name for name in selection.names if name.split("/")[0] == INDICES), None)
    if taken is not None:
        raise H5Error(f"image {taken!r} cannot be exported: the group {INDICES!r} holds the lists; rename its folder")
    features = selection.store.manifest["features"]
    column = "tokens" if features["tokens"] else "patches"
    centers = patch_centers(features["preprocessing"]["image_size"])
    (shards, rows), scaled_sizes = selection.locations, selection.scaled_sizes
    checked(selection.names, selection.store.path)
    with files.atomic(path) as (_, inner), h5py.File(inner, "w") as h5:
        h5.attrs["descriptors"] = column
        h5.attrs["vop_features"] = json.dumps(features)
        for key, names in indices.items():
            h5.create_dataset(f"{INDICES}/{key}", data=np.array(names, object), dtype=h5py.string_dtype())
        for number in np.unique(shards):
            table = selection.store.read_shard(int(number), ["width", "height", "global", column])
            sizes = np.stack([table[side].to_numpy() for side in ("width", "height")], axis=1)  # NaN where unknown
            globals_, descriptors = tensor_values(table["global"]), tensor_values(table[column])
            if descriptors.dtype == np.int8:
                descriptors = widen(descriptors)
            here = np.flatnonzero(shards == number)
            for i in here:
                name, row, scaled = selection.names[i], rows[i], scaled_sizes[i]
                values = {"keypoints": centers, "descriptors": descriptors[row], "global_descriptor": globals_[row]}
                values |= {"image_size": scaled} | _known(sizes[row], scaled, cameras.get(name))
                group = h5.create_group(name)
                for key, value in values.items():
                    group.create_dataset(key, data=value)
            yield len(here)


def _known(size: np.ndarray, scaled: np.ndarray, camera: Camera | None) -> dict[str, np.ndarray]:
    """What is written only where it is known: the size of the file's image, the camera."""
    known = {ORIGINAL_SIZE: size.astype(np.int64)} if np.isfinite(size).all() else {}
    if camera is not None:
        known |= {"K": camera.resized(*scaled).K, "original_K": camera.K, "T_w2cam": camera.cam_from_world}
    return known


@dataclass(frozen=True)
class FeatureFile:
    """A file to import. names: its images, sorted; indices: its lists of names; made_by: the features of the store it
    was exported from, None for a file of other origin; dtype: the type to store patches in.
    """

    path: str
    sha256: str
    dtype: str
    shape: tuple[int, int, int]
    names: tuple[str, ...]
    indices: dict[str, list[str]]
    made_by: dict | None

    @classmethod
    def open(cls, path: str, dtype: str) -> "FeatureFile":
        """Read what a file holds, no descriptors yet. The first image in order decides P, D and G.

        Raises `FileNotFoundError`, and `H5Error` if it is not HDF5, is cut short, or holds no image in the layout.
        """
        path = local(path)
        with _opened(path) as h5:
            names = tuple(checked(sorted(_images(h5)), path))
            if not names:
                raise H5Error(f"{path} holds no images: expected groups with the datasets {', '.join(REQUIRED)}")
            made_by = h5.attrs.get("vop_features")
            return cls(path, files.sha256(path), dtype, _first_shape(h5, names), names, _indices(h5),
                       None if made_by is None else json.loads(made_by))  # fmt: skip

    @property
    def features(self) -> dict:
        """What the manifest of an imported store says: it can be mixed with descriptors of the same file only."""
        return {
            "backbone": {"name": "imported", "file_sha256": self.sha256},
            "encoder": None,
            "preprocessing": {"image_size": PATCH_SIZE * math.isqrt(self.shape[0])},
            "whiten": None,
            "normalize_global": False,
            "dtype": self.dtype,
            "tokens": False,
        }

    def store(self, path: str) -> EmbeddingStore:
        """The store to import into: the one at `path` if it was made from this file, else a new one.

        Raises `StoreError` naming both sides if that store was made in another way.
        """
        if EmbeddingStore.exists(path):
            store = EmbeddingStore.open(path)
            store.check_features(self.features)
            return store
        patches, width, global_width = self.shape
        shapes = {"patches": patches, "width": width, "global_width": global_width, "token_width": width}
        noted = {"dtype": self.dtype, "made_by": self.made_by}
        return EmbeddingStore.create(path, self.features, shapes | noted, {})

    def listing(self) -> pa.Table:
        """name, scene, size, modified_ns of every image, for `vop.catalog.plan`: sizes and times are unknown, 0."""
        scenes = [name.split("/")[0] if "/" in name else "" for name in self.names]
        nothing = np.zeros(len(self.names), np.int64)
        return pa.table({"name": list(self.names), "scene": scenes, "size": nothing, "modified_ns": nothing})

    def read(self, planned: pa.Table) -> tuple[pa.Table, list[dict]]:
        """A planned shard (image_id, name) as `EmbeddingStore.write_shard` takes it: rows, and bad images with reason.

        Patches are of unit length; those that the file holds as unit vectors, to the accuracy of its type, are kept
        bit for bit. Raises `H5Error` if the file cannot be opened any more.
        """
        lines = planned.select(["image_id", "name"]).to_pylist()
        patches, width, global_width = self.shape
        values = {"global": np.zeros((len(lines), global_width), float_type(self.dtype)),
                  "patches": np.zeros((len(lines), patches, width), self.dtype)}  # fmt: skip
        quarantined = []
        with _opened(self.path) as h5:
            for i, line in enumerate(lines):
                try:
                    sizes, values["global"][i], values["patches"][i] = self._image(member(h5, line["name"]))
                    line.update(sizes)
                except (H5Error, ForeignLinkError, OSError) as error:
                    reason = f"group {line['name']!r} of {self.path}: {error}"
                    quarantined.append({**line, "reason": reason, "content": None})
        table = pa.Table.from_pylist(lines, schema=ROWS)
        for key, column in values.items():
            table = table.append_column(key, tensor_column(column))
        return table.filter(table["scaled_width"].is_valid()), quarantined

    def write(self, store: EmbeddingStore, shard_size: int, max_bad_fraction: float) -> tuple[catalog.Plan, int]:
        """Import into a store (of `store()`) what it does not hold yet; continues where a killed run stopped.

        Returns the catalog as finished and what was planned, and how many images this call imported. Raises
        `TooManyBadImagesError` if more than that share is quarantined.
        """
        planned, pending = store.plan(self.listing(), shard_size, False, lambda name: None)
        total, waiting = planned.images.num_rows, sum(shard.num_rows for shard in pending.values())
        guard = catalog.BadImages(planned.images, store.receipts(), max_bad_fraction)
        guard.add(0)
        with progress("import", total, total - waiting, "images") as bar:
            for number, shard in pending.items():
                receipt = store.write_shard(number, *self.read(shard))
                bar.update(receipt["rows"])
                guard.add(len(receipt["quarantined"]))
        return dataclasses.replace(planned, images=store.finish()), waiting

    def _image(self, group: h5py.Group) -> tuple[dict, np.ndarray, np.ndarray]:
        """Sizes, global descriptor (G,) and unit patches (P, D) of an image, as stored.

        Raises `H5Error`, without its name.
        """
        found = _datasets(group)
        shape = _shape(found)
        if shape != self.shape:
            raise H5Error("it has P {}, D {}, G {}; ".format(*shape)
                          + "the first image of the file has P {}, D {}, G {}".format(*self.shape))  # fmt: skip
        keypoints, descriptors, global_descriptor, scaled = (_values(key, found[key]) for key in REQUIRED)
        side = PATCH_SIZE * math.isqrt(shape[0])
        apart = np.abs(keypoints - patch_centers(side)).max()
        if apart > TOLERANCE:
            raise H5Error(f"keypoints lie up to {apart:.4g} pixels (at most {TOLERANCE:g}) from the centres of "
                          f"{PATCH_SIZE}-pixel patches of a {side}-pixel image, row by row")  # fmt: skip
        if not ((scaled >= 1) & (scaled <= side)).all():
            raise H5Error(f"image_size is {scaled.tolist()}; expected the width and height after scaling, 1 to {side}")
        original = member(group, ORIGINAL_SIZE)
        original = np.array([None, None]) if original is None else _values(ORIGINAL_SIZE, original)
        if original.shape != (2,):
            raise H5Error(f"{ORIGINAL_SIZE} has shape {original.shape}; expected (2,)")
        with np.errstate(over="ignore"):
            narrow = global_descriptor.astype(float_type(self.dtype))
        if not np.isfinite(narrow).all():
            raise H5Error(f"global_descriptor reaches {np.abs(global_descriptor).max():.4g}, too large for "
                          f"{narrow.dtype}: import with embedding.dtype=float32")  # fmt: skip
        sizes = dict(zip(("width", "height", "scaled_width", "scaled_height"), (*original, *scaled), strict=True))
        sizes = {key: None if value is None else int(value) for key, value in sizes.items()}
        return sizes, narrow, stored(_unit(descriptors), self.dtype)


def _opened(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no HDF5 file at {path}") from error
    except OSError as error:
        raise H5Error(f"cannot open {path} as HDF5: {error}. Is it whole, and closed by its writer?") from error


def _images(h5: h5py.File) -> set[str]:
    """Names of the groups that are images, or would be if they were whole: those with datasets, and empty ones."""
    images, others = set(), []

    def visit(path: str) -> None:
        parent, _, leaf = path.rpartition("/")
        if path.split("/")[0] != INDICES:
            images.add(parent) if leaf in REQUIRED else others.append(path)

    h5.visit(visit)  # names only: opening every object of a large file takes minutes
    parents = {path.rpartition("/")[0] for path in (*images, *others)}
    for path in others:
        parent = path.rpartition("/")[0]
        if path not in images and path not in parents and parent not in images:
            images.add(parent if isinstance(h5[path], h5py.Dataset) else path)
    if "" in images:
        raise H5Error(f"{h5.filename} has datasets outside of groups, {sorted(h5)[:5]}; expected a group per image")
    return images


def _indices(h5: h5py.File) -> dict[str, list[str]]:
    lists = member(h5, INDICES) or {}
    try:
        return {key: [str(name) for name in member(lists, key).asstr()[()]] for key in checked(lists, h5.filename)}
    except (AttributeError, TypeError) as error:
        raise H5Error(f"{INDICES} of {h5.filename} holds something else than lists of names: {error}") from error


def _first_shape(h5: h5py.File, names: Sequence[str]) -> tuple[int, int, int]:
    first = None
    for name in names:
        try:
            return _shape(_datasets(member(h5, name)))
        except (H5Error, ForeignLinkError) as error:
            first = first or error
    raise H5Error(f"none of {len(names)} groups of {h5.filename} is an image; {names[0]!r}: {first}")


def _datasets(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """The required datasets of an image's group, each opened once. Raises `H5Error` where one is missing."""
    found = {key: member(group, key) for key in REQUIRED}
    missing = [key for key, dataset in found.items() if not isinstance(dataset, h5py.Dataset)]
    if missing:
        raise H5Error(f"it lacks {', '.join(missing)}; it holds {', '.join(sorted(group)) or 'nothing'}")
    return found


def _shape(found: dict[str, h5py.Dataset]) -> tuple[int, int, int]:
    """P, D and G of an image. Raises `H5Error` if its datasets do not fit each other."""
    keypoints, descriptors, global_descriptor, size = shapes = [found[key].shape for key in REQUIRED]
    patches = descriptors[0] if len(descriptors) == 2 else 0
    square = patches > 0 and math.isqrt(patches) ** 2 == patches
    if not (square and keypoints == (patches, 2) and len(global_descriptor) == 1 and size == (2,)):
        listed = ", ".join(f"{key} {shape}" for key, shape in zip(REQUIRED, shapes, strict=True))
        raise H5Error(f"it has {listed}; expected keypoints (P, 2), descriptors (P, D), global_descriptor (G,) and "
                      "image_size (2,), P a square number")  # fmt: skip
    return patches, descriptors[1], global_descriptor[0]


def _values(key: str, dataset: h5py.Dataset) -> np.ndarray:
    """A dataset as floating point numbers, all finite."""
    if dataset.dtype.kind not in "fiu":
        raise H5Error(f"{key} has type {dataset.dtype}; expected numbers")
    values = dataset[()]
    if not np.isfinite(values).all():
        raise H5Error(f"{key} has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows (P, D) at unit length; zeros, and rows that are unit already to the accuracy of their type, unchanged."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    kept = (lengths == 0) | (np.abs(lengths - 1) <= max(np.finfo(vectors.dtype).eps, 1e-6))
    return vectors / np.where(kept, 1, lengths)
