"""Folders of images with known cameras and, where there is depth, known overlap.

`cameras.json` maps an image's name to {"K": 3x3, "R": 3x3, "t": 3, optional "width", "height"}: world to camera, K in
pixels of the stored image, pixel centres at +0.5. The images lie beside it, or in its subfolder `images/`; the depth of
`name.jpg` is `name.depth.png` beside the image, 16-bit millimetres, 0 = none. `overlap.parquet` holds overlaps already
computed: columns query, database (string) and overlap (float32), one row per ordered pair with overlap above 0.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sparse

from vop import files
from vop.cameras import KnownCamera
from vop.geometry import Camera, overlap_matrix, pose_from_rt
from vop.image import check_size, decode, upright_size
from vop.names import checked

CAMERAS = "cameras.json"
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of one
OVERLAP = "overlap.parquet"
MAX_DEPTH = 65.535  # metres: what 16-bit millimetres can hold
_NAMES_KEY = b"names"  # images without any overlap have no row; the file's metadata lists them


@dataclass(frozen=True, eq=False)
class OverlapTruth:
    """Known overlaps: names of N images and their symmetric overlaps, (N, N) float32 in 0..1, ones on the diagonal.

    Benchmarks of many images, most of which share nothing, give the matrix sparse; `matrix[row, columns]` reads both.
    """

    names: tuple[str, ...]
    matrix: np.ndarray | sparse.csr_array


@dataclass(frozen=True, eq=False)
class PosedFolder:
    """A folder with `cameras.json`: names and cameras, in the file's order; images and depth are read when asked for.

    path: the folder, local or a URI. root: where its images lie.
    """

    path: str
    root: str
    names: tuple[str, ...]
    cameras: tuple[Camera, ...]

    @classmethod
    def open(cls, path) -> "PosedFolder":
        """Read `cameras.json`.

        Raises FileNotFoundError where it (or, lacking sizes in it, an image) is missing, ValueError where it is
        malformed.
        """
        path = files.absolute(path)
        source = files.join(path, CAMERAS)
        if not files.exists(source):
            raise FileNotFoundError(
                f"no {CAMERAS} in {path}: it must map image names to K, R, t (world to camera); "
                f"is this the folder that holds it?"
            )
        root = image_root(path)
        known = read_cameras(source, required=("K", "R", "t"))
        return cls(path, root, tuple(camera.name for camera in known), tuple(_posed(root, camera) for camera in known))

    def image(self, name: str) -> np.ndarray:
        """Decode an image, (H, W, 3) uint8 RGB."""
        return decode(files.read_bytes(files.join(self.root, name)))

    def camera(self, name: str) -> Camera:
        """Give the camera of an image. Raises KeyError for an unknown name."""
        if name not in self.names:
            raise KeyError(f"{name!r} is not in {files.join(self.path, CAMERAS)} ({len(self.names)} images)")
        return self.cameras[self.names.index(name)]

    def depth(self, name: str) -> np.ndarray:
        """Read the depth map of an image, (H, W) float32 metres, 0 = none.

        Raises FileNotFoundError where there is none, ValueError where it is not 16-bit or not of the image's size.
        """
        camera, path = self.camera(name), files.join(self.root, depth_name(name))
        if not files.exists(path):
            raise FileNotFoundError(f"{name} has no depth: {path} is not there")
        depth = decode_depth(files.read_bytes(path), path)
        if depth.shape != (camera.height, camera.width):
            raise ValueError(
                f"{path} is {depth.shape[1]}x{depth.shape[0]} pixels, its image {camera.width}x{camera.height}: "
                "register the depth to the image and store both at one size"
            )
        return depth

    def without_depth(self) -> list[str]:
        """Names of the images that have no depth map."""
        folders = {_folder(self.root, name) for name in self.names}
        present = {folder: files.listing(folder) for folder in folders}
        return [n for n in self.names if PurePosixPath(depth_name(n)).name not in present[_folder(self.root, n)]]

    def overlap_matrix(self) -> np.ndarray:
        """Symmetric overlap of every pair, (N, N) float32, from depth (`vop.geometry.overlap_matrix`).

        Raises FileNotFoundError naming the images without depth.
        """
        missing = self.without_depth()
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.names)} images in {self.path} have no depth map, so their overlap is "
                f"unknown: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Expected "
                f"{depth_name(missing[0])} (16-bit PNG, millimetres) beside the image; remove them from {CAMERAS}, "
                f"or give an {OVERLAP}"
            )
        return overlap_matrix(_Depths(self), self.cameras)


def image_root(folder: str) -> str:
    """Where the images of a folder with `cameras.json` lie: its subfolder `images/` if it has one, else itself."""
    inner = files.join(folder, "images")
    return inner if files.exists(inner) else folder


def read_cameras(path: str, world: str = "", required: Collection[str] = ()) -> list[KnownCamera]:
    """The entries of a `cameras.json`, in its order, all of one world; no image is looked at.

    Unless `required`, K may be absent (intrinsics unknown) or R and t (pose unknown); width and height always may.
    Raises ValueError where the file is not JSON, a name leads out of its folder, or an entry lacks something or is of
    another shape; that a pose is one is not checked (`KnownCamera.checked`).
    """
    try:
        entries = files.read_json(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} must map image names to objects with K, R, t (world to camera)")
    return [_known(name, entries[name], world, required) for name in checked(entries, path)]


def _known(name: str, entry: dict, world: str, required: Collection[str]) -> KnownCamera:
    needed = set(required) | ({"R", "t"} if {"R", "t"} & set(entry) or "K" not in entry else set())
    if missing := needed - set(entry):
        raise ValueError(f"{name} in {CAMERAS} lacks {sorted(missing)}; it has {sorted(entry)}")
    pose = pose_from_rt(np.array(entry["R"]), np.array(entry["t"])) if "R" in entry else None
    K = np.array(entry["K"]) if "K" in entry else None
    size = (entry["width"], entry["height"]) if {"width", "height"} <= set(entry) else ()
    return KnownCamera(name, K, pose, world, *size)


def depth_name(name: str) -> str:
    """`a/b.jpg` -> `a/b.depth.png`."""
    return str(PurePosixPath(name).with_suffix(".depth.png"))


def encode_depth(depth: np.ndarray) -> bytes:
    """Write depth in metres, (H, W), as a 16-bit PNG in millimetres; beyond 65.535 m it becomes 0, unknown."""
    millimetres = np.where(depth <= MAX_DEPTH, np.rint(np.asarray(depth, np.float64) * 1000), 0)
    return cv2.imencode(".png", millimetres.astype(np.uint16), [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes()


def decode_depth(data: bytes, path: str = "depth map") -> np.ndarray:
    """Read a 16-bit PNG in millimetres as (H, W) float32 metres; `path` names it in the error.

    Raises ValueError for anything else, and for one of more pixels than an image may have.
    """
    png = data.startswith(PNG)
    if png:
        check_size(data)
    millimetres = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
    if millimetres is None or millimetres.dtype != np.uint16 or millimetres.ndim != 2:
        found = "no PNG" if millimetres is None else f"{millimetres.dtype} of shape {millimetres.shape}"
        raise ValueError(f"{path} holds {found}; expected a 16-bit single-channel PNG in millimetres")
    return millimetres.astype(np.float32) / 1000


def write_cameras(path, cameras: dict[str, Camera]) -> None:
    """Write `cameras.json` into the folder `path`."""
    entries = {
        name: {
            "K": camera.K.tolist(),
            "R": camera.rotation.tolist(),
            "t": camera.translation.tolist(),
            "width": camera.width,
            "height": camera.height,
        }
        for name, camera in cameras.items()
    }
    files.write_json(files.join(path, CAMERAS), entries)


def write_overlap(path, truth: OverlapTruth) -> None:
    """Write overlaps as a Parquet file: (query, database, overlap) for the ordered pairs with overlap above 0."""
    found = sparse.coo_array(truth.matrix)
    shown = (found.row != found.col) & (found.data > 0)
    query, database, names = found.row[shown], found.col[shown], np.array(truth.names, dtype=object)
    table = pa.table(
        {
            "query": pa.array(names[query], pa.string()),
            "database": pa.array(names[database], pa.string()),
            "overlap": pa.array(found.data[shown], pa.float32()),
        }
    ).replace_schema_metadata({_NAMES_KEY: json.dumps(list(truth.names))})
    with files.atomic(path) as (filesystem, inner):
        pq.write_table(table, inner, filesystem=filesystem)


def read_overlap(path) -> OverlapTruth:
    """Read an overlap file: the matrix is sparse, zero where there is no row; of several for a pair the first counts.

    Names come in the order they were written in; a file of other origin, without the list in its metadata, gives the
    names of its rows, sorted. Raises FileNotFoundError, and ValueError where a column is missing.
    """
    if not files.exists(path):
        raise FileNotFoundError(f"no overlap file at {path}")
    with files.opened(path) as file:
        table = pq.read_table(file)
    missing = {"query", "database", "overlap"} - set(table.column_names)
    if missing:
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {table.column_names}")
    query, database = table["query"].to_pylist(), table["database"].to_pylist()
    listed = (table.schema.metadata or {}).get(_NAMES_KEY)
    names = tuple(json.loads(listed)) if listed else tuple(sorted({*query, *database}))
    index = {name: row for row, name in enumerate(names)}
    ends = [np.array([*range(len(names)), *(index[name] for name in side)], np.int64) for side in (query, database)]
    _, first = np.unique(ends[0] * len(names) + ends[1], return_index=True)
    values = np.concatenate([np.ones(len(names)), table["overlap"].to_numpy()]).astype(np.float32)
    matrix = sparse.csr_array((values[first], (ends[0][first], ends[1][first])), shape=(len(names), len(names)))
    return OverlapTruth(names, matrix)


def overlap_truth(path) -> OverlapTruth:
    """Known overlaps of an `overlap.parquet` file, or of a folder: its own `overlap.parquet`, else cameras and depth.

    Raises FileNotFoundError where neither is there or an image lacks depth.
    """
    path = files.absolute(path)
    stored = path if path.endswith(".parquet") else files.join(path, OVERLAP)
    if path.endswith(".parquet") or files.exists(stored):
        return read_overlap(stored)
    folder = PosedFolder.open(path)
    return OverlapTruth(folder.names, folder.overlap_matrix())


class _Depths(Sequence):
    """The depth maps of a folder, read one at a time."""

    def __init__(self, folder: PosedFolder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder.names)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.folder.depth(self.folder.names[index])


def _folder(root: str, name: str) -> str:
    return files.join(root, *PurePosixPath(name).parts[:-1])


def _posed(root: str, known: KnownCamera) -> Camera:
    known = known.checked()
    size = (known.width, known.height) if known.sized else upright_size(files.read_bytes(files.join(root, known.name)))
    return Camera(known.K, known.cam_from_world, *size)
