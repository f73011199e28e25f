"""Scan points behind photographs: InLoc's cutouts with XYZcut, their alignments, and points between the pixels.

Beside each cutout `CUTOUTS/FLOOR/SCAN/DUC_cutout_000_30_0.jpg` lies a MATLAB file of the same name with `.mat` added,
whose variable XYZcut (H, W, 3) holds for every pixel of the cutout the point that its centre sees, metres in the frame
of the scanner, NaN where the scanner saw nothing. `ALIGNMENTS/FLOOR/transformations/DUC_trans_SCAN.txt` holds two 4x4
matrices, each below a line of text, before and after the scans were registered to each other: the second takes scan
points to the frame of the floor. Sources: README.md of github.com/HajimeTaira/InLoc_dataset and
load_WUSTL_transformation.m of github.com/HajimeTaira/InLoc_demo; hloc's `localize_inloc` finds them the same way.

The world is the floor. DUC1 and DUC2 are two floors of one building, but "don't share the same global coordinates"
(github.com/HajimeTaira/InLoc_dataset/issues/9), so points of both never enter one pose.

MATLAB's formats up to 7 are read by SciPy, 7.3 (HDF5, axes reversed) by h5py; neither runs anything that is in a file.
Both are told the size that the image has before memory is spent.
"""

import io
from collections import OrderedDict
from collections.abc import Collection

import h5py
import numpy as np
import scipy.io

from vop import files
from vop.foreign_hdf5 import member
from vop.geometry import transform
from vop.image import ImageError, check_size, upright_size
from vop.lift import Lifted

CUTOUTS, ALIGNMENTS = "database/cutouts", "database/alignments"
VARIABLE, SUFFIX = "XYZcut", ".mat"
HDF5 = b"\x89HDF\r\n\x1a\n"
UNNAMED = f"no name of a cutout: {CUTOUTS}/FLOOR/SCAN/DUC_cutout_SCAN_YAW_PITCH.jpg"
MEMORY = 256e6  # bytes of scans that a worker keeps: 5 of InLoc's cutouts (1600 x 1200, 46 MB each)


class ScanError(ValueError):
    """A scan that cannot be used; the message is a reason a person understands."""


class Scans:
    """Lifts keypoints of cutouts (`vop.lift.Lift`); points have no identity, because every scan measured its own.

    It is pickled as paths. Where it is called it keeps the latest scans, up to `memory` bytes and at least one.
    """

    def __init__(self, root: str, memory: float = MEMORY):
        """root: the folder that image names count from, local or a URI."""
        self.root, self.memory = root, memory
        self.kept: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __repr__(self) -> str:
        return f"Scans({self.root!r})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": OrderedDict()}

    def __call__(self, name: str, rows: np.ndarray, points: np.ndarray) -> Lifted:
        """World points of keypoints; all NaN, with the reason, where scan or alignment are missing or unusable."""
        ids = np.full(len(points), -1, np.int64)
        try:
            scan, world_from_scan = self._read(name)
        except ScanError as error:
            return Lifted(np.full((len(points), 3), np.nan), ids, reason=str(error))
        return Lifted(transform(world_from_scan, interpolate(scan, points)), ids)

    def world(self, name: str) -> str | None:
        """The floor of a cutout, such as DUC1; None for other images."""
        parts = _parts(name)
        return parts[0] if parts else None

    def lacking(self, names: Collection[str]) -> dict[str, str]:
        """Of these database images, those without scan or alignment, and what is not there; only folders are listed."""
        needed = {name: [self._scan(name), self._alignment(name)] for name in names}
        folders = sorted({path.rpartition("/")[0] for paths in needed.values() for path in paths if path})
        there = dict(zip(folders, files.concurrently(files.listing, folders), strict=True))
        found = {}
        for name, paths in needed.items():
            for path in paths:
                folder, _, base = (path or "").rpartition("/")
                if base not in there.get(folder, {}):
                    found.setdefault(name, f"nothing at {path}" if path else UNNAMED)
        return found

    def _scan(self, name: str) -> str:
        return files.join(self.root, name) + SUFFIX

    def _alignment(self, name: str) -> str | None:
        """Where the alignment of a cutout's scan lies; None where the name is not that of a cutout."""
        parts = _parts(name)
        if parts is None:
            return None
        floor, scan, building = parts
        return files.join(self.root, ALIGNMENTS, floor, "transformations", f"{building}_trans_{scan}.txt")

    def _read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The scan points of a cutout, (H, W, 3) in the scanner's frame, and `world_from_scan`, (4, 4)."""
        if name in self.kept:
            self.kept.move_to_end(name)
            return self.kept[name]
        alignment = self._alignment(name)
        if alignment is None:
            raise ScanError(UNNAMED)
        world_from_scan = read_alignment(_content(alignment, "alignment"), alignment)
        size = _image_size(files.join(self.root, name))
        path = self._scan(name)
        scan = read_scan(_content(path, "scan"), size, path)
        self.kept[name] = scan, world_from_scan
        while len(self.kept) > 1 and sum(scan.nbytes for scan, _ in self.kept.values()) > self.memory:
            self.kept.popitem(last=False)
        return scan, world_from_scan


def interpolate(scan: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Scan points (m, 3) float64 at points (m, 2) of the image; NaN where the scanner saw nothing.

    Points have pixel centres at +0.5, so the sample in row r and column c is for the point (c + 0.5, r + 0.5); hloc,
    whose keypoints have centres at 0, finds it at (c, r) (`grid_sample` with align_corners=True). The value is bilinear
    where all four samples around are finite, else the nearest sample. Up to the border of the image, half a pixel
    beyond the outermost centres, the nearest place between centres counts.

    Bilinear across a depth edge makes a point in the air between the two surfaces: such correspondences are left to
    RANSAC, as in hloc.
    """
    height, width = scan.shape[:2]
    x, y = (np.clip(points[:, axis] - 0.5, 0, side - 1) for axis, side in enumerate((width, height)))
    left, top = (np.clip(np.floor(at).astype(int), 0, max(side - 2, 0)) for at, side in ((x, width), (y, height)))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    corners = np.stack([scan[top, left], scan[top, right], scan[bottom, left], scan[bottom, right]]).astype(np.float64)
    fx, fy = x - left, y - top
    weights = np.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy])
    found = (weights[..., None] * np.where(np.isfinite(corners), corners, 0)).sum(0)
    near = scan[np.rint(y).astype(int), np.rint(x).astype(int)].astype(np.float64)
    near[~np.isfinite(near).all(1)] = np.nan
    whole = np.isfinite(corners).all((0, 2))
    return np.where(whole[:, None], found, near)


def read_scan(data: bytes, size: tuple[int, int], path: str) -> np.ndarray:
    """XYZcut of a MATLAB file, (H, W, 3) float32 or float64 as stored.

    size: width and height of the image that it belongs to. path: names the file in errors. Raises `ScanError` where the
    file is damaged, lacks the variable, or holds one of another kind or size.
    """
    try:
        hdf5 = HDF5 in (data[:8], data[512:520])  # MATLAB puts 512 bytes of its own before it
        return (_hdf5 if hdf5 else _matlab)(data, size, path)
    except ScanError:
        raise
    except Exception as error:  # damaged files raise nearly any type, from zlib.error to MemoryError
        raise ScanError(f"scan damaged, or no file of MATLAB's: {path}: {error or type(error).__name__}") from error


def _matlab(data: bytes, size: tuple[int, int], path: str) -> np.ndarray:
    """Of formats 4 to 7: the header of each variable is read before its content."""
    kinds = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(io.BytesIO(data))}
    _check(*kinds.get(VARIABLE, (None, None)), size, path)
    return scipy.io.loadmat(io.BytesIO(data), variable_names=[VARIABLE])[VARIABLE]


def _hdf5(data: bytes, size: tuple[int, int], path: str) -> np.ndarray:
    """Of format 7.3, which stores MATLAB's columns as rows: (3, W, H)."""
    with h5py.File(io.BytesIO(data), "r") as file:
        found = member(file, VARIABLE)
        if not isinstance(found, h5py.Dataset):
            _check(None, None, size, path)
        kind = {"float32": "single", "float64": "double"}.get(found.dtype.name, found.dtype.name)
        _check(found.shape[::-1], kind, size, path)
        return np.ascontiguousarray(found[()].transpose(2, 1, 0))


def _check(shape: tuple[int, ...] | None, kind: str | None, size: tuple[int, int], path: str) -> None:
    """Raise `ScanError` for anything but floating numbers (H, W, 3) of the image's size."""
    width, height = size
    if shape is None:
        raise ScanError(f"scan without the variable {VARIABLE}: {path}")
    if tuple(shape) != (height, width, 3) or kind not in ("single", "double"):
        raise ScanError(
            f"scan of another shape than its image: {path} holds {VARIABLE} {tuple(shape)} of {kind}, but the image "
            f"needs ({height}, {width}, 3) of double or single: was the image resized?"
        )


def read_alignment(data: bytes, path: str) -> np.ndarray:
    """`world_from_scan`, (4, 4) float64: the last matrix of a file of alignments. Raises `ScanError` without one."""
    rows = [_numbers(line) for line in data.decode(errors="replace").splitlines()]
    matrices = [np.array(rows[i : i + 4]) for i in range(len(rows) - 3) if all(rows[i : i + 4])]
    if not matrices or not np.isfinite(matrices[-1]).all() or (matrices[-1][3] != [0, 0, 0, 1]).any():
        raise ScanError(f"alignment without a matrix of 4 lines of 4 numbers, the last 0 0 0 1: {path}")
    return matrices[-1]


def _numbers(line: str) -> list[float] | None:
    """The four numbers of a line, None where it holds anything else."""
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def _parts(name: str) -> tuple[str, str, str] | None:
    """Floor, scan and building of `.../DUC1/000/DUC_cutout_000_30_0.jpg`: ("DUC1", "000", "DUC"); None elsewhere."""
    folders, _, base = name.rpartition("/")
    building, cutout, _ = base.partition("_cutout_")
    inner = folders.removeprefix(CUTOUTS + "/").split("/")
    return (inner[0], inner[1], building) if cutout and len(inner) == 2 and folders.startswith(CUTOUTS + "/") else None


def _content(path: str, what: str) -> bytes:
    try:
        return files.read_bytes(path)
    except FileNotFoundError as error:
        raise ScanError(f"no {what}: nothing at {path}") from error


def _image_size(path: str) -> tuple[int, int]:
    try:
        data = _content(path, "image")
        check_size(data)
        return upright_size(data)
    except ImageError as error:
        raise ScanError(f"size of the cutout unknown: {path}: {error}") from error
