"""Known cameras of a collection by image name, and their table `cameras.parquet`.

Pixel conventions are those of `vop.geometry`: K in pixels of the stored image after EXIF rotation, pixel centres at
+0.5, poses `cam_from_world`. Poses are comparable within one `world` only: two scenes that were reconstructed apart
have no relative pose, whatever their numbers say.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files
from vop.geometry import Camera, invert

SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # sorted
        ("width", pa.int32()),  # null: the source does not say; K is then for the image as it is stored
        ("height", pa.int32()),
        ("K", pa.list_(pa.float64(), 9)),  # row-major; null: intrinsics unknown
        ("cam_from_world", pa.list_(pa.float64(), 16)),  # row-major; null: pose unknown
        ("world", pa.string()),
        ("model", pa.string()),  # COLMAP's name of a camera model with distortion; null: pinhole
        ("params", pa.list_(pa.float64())),  # its parameters in COLMAP's order; null: pinhole
    ]
)
MATRICES = {"K": (3, 3), "cam_from_world": (4, 4)}
ROW_GROUP = 1024  # rows: the least that a reader of a few names takes in


class CamerasError(ValueError):
    """Cameras that are malformed, missing or contradict each other."""


@dataclass(frozen=True, eq=False)
class KnownCamera:
    """What is known of the camera of one image.

    K: (3, 3) float64, or None. cam_from_world: (4, 4) float64, or None. width, height: pixels of the image that K is
    for; None: not recorded. model, params: COLMAP's camera model and its parameters if the image is distorted (K is
    then the pinhole of the same focal lengths and principal point), else None.
    Only the shapes of K and pose are checked here, so that one bad camera does not cost the others: `checked` does the
    rest for every camera that comes out of a table. Both raise `CamerasError`, naming the image.
    """

    name: str
    K: np.ndarray | None
    cam_from_world: np.ndarray | None
    world: str = ""
    width: int | None = None
    height: int | None = None
    model: str | None = None
    params: tuple[float, ...] | None = None

    def __post_init__(self):
        for field, shape in MATRICES.items():
            if getattr(self, field) is not None:
                value = np.asarray(getattr(self, field), np.float64)
                if value.shape != shape:
                    raise CamerasError(f"camera of {self.name!r}: {field} has shape {value.shape}; expected {shape}")
                object.__setattr__(self, field, value)

    def checked(self) -> "KnownCamera":
        """The same. Raises `CamerasError` for what `vop.geometry.Camera` refuses, and a K that is no calibration."""
        K = np.eye(3) if self.K is None else self.K
        pose = np.eye(4) if self.cam_from_world is None else self.cam_from_world
        try:
            _check_calibration(Camera(K, pose, *((self.width, self.height) if self.sized else (1, 1))))
        except ValueError as error:
            raise CamerasError(f"camera of {self.name!r}: {error}") from error
        return self

    @property
    def sized(self) -> bool:
        """Whether the size of the image is recorded."""
        return self.width is not None and self.height is not None

    def fitted(self, width: int, height: int) -> "KnownCamera":
        """Give the camera of the same photograph as it is stored: width x height pixels, after EXIF rotation.

        Another size of the same shape scales K, for a collection that was reduced after it was calibrated. Raises
        `CamerasError` where the shapes differ by more than the rounding of the sides: one of the two was turned or
        cropped.
        """
        if (width, height) == (self.width, self.height):
            return self
        if not self.sized:
            return dataclasses.replace(self, width=width, height=height)
        (w, h), (W, H) = sorted([(width, height), (self.width, self.height)])
        if abs(h * W - w * H) > W + H:  # each side of the smaller image is off by at most one pixel
            raise CamerasError(
                f"{self.name!r} is {width}x{height} pixels after EXIF rotation, but its camera is for "
                f"{self.width}x{self.height}: was the image turned or cropped after it was calibrated?"
            )
        scale = np.diag([width / self.width, height / self.height, 1.0])
        K, params = None if self.K is None else scale @ self.K, None
        if self.model is not None:
            colmap = self._colmap()
            colmap.rescale(width, height)
            K, params = colmap.calibration_matrix(), tuple(colmap.params)
        return dataclasses.replace(self, K=K, width=width, height=height, params=params)

    def undistorted(self, points: np.ndarray) -> np.ndarray:
        """Where the pinhole camera K sees the points (n, 2) of the distorted image, float64 pixels, (n, 2).

        Points that the model cannot invert become NaN. A pinhole camera gives its points back.
        """
        points = np.asarray(points, np.float64)
        if self.model is None:
            return points
        rays = self._colmap().cam_from_img(points)
        return rays @ self.K[:2, :2].T + self.K[:2, 2]

    def _colmap(self):
        return load_pycolmap().Camera(model=self.model, width=self.width, height=self.height, params=list(self.params))


def load_pycolmap() -> ModuleType:
    """The module pycolmap, which only COLMAP's models and their distortion need.

    Raises ImportError, naming the extra, where it is not installed or of another generation: 4.1 moved the poses.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise ImportError("COLMAP's models and camera models need pycolmap: pip install 'vop[localize]'") from error
    version = tuple(int(part) for part in re.findall(r"\d+", pycolmap.__version__)[:2])
    if not (4, 1) <= version < (5, 0):
        raise ImportError(
            f"pycolmap {pycolmap.__version__} is installed, but 4.1 up to 5 is needed: pip install 'vop[localize]'"
        )
    return pycolmap


def _check_calibration(camera: Camera) -> None:
    K, bottom = camera.K, camera.cam_from_world[3]
    if (K[2] != [0, 0, 1]).any() or K[1, 0] != 0 or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError(
            f"K is {K.tolist()}; it must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in pixels with fx, fy above 0; "
            "is it transposed?"
        )
    if (bottom != [0, 0, 0, 1]).any():
        raise ValueError(f"the last row of cam_from_world is {bottom.tolist()}; expected [0, 0, 0, 1]")


class Cameras:
    """A table of known cameras, one per image name; `table` has `SCHEMA`, sorted by name.

    A table may hold malformed cameras: `get`, `relative` and iteration raise `CamerasError` when they come to one.
    """

    def __init__(self, table: pa.Table):
        self.table = table.combine_chunks()

    @classmethod
    def of(cls, cameras: Iterable[KnownCamera]) -> "Cameras":
        """Make a table. Raises `CamerasError` if a name stands twice."""
        rows = sorted(cameras, key=lambda camera: camera.name)
        for first, second in itertools.pairwise(rows):
            if first.name == second.name:
                raise CamerasError(
                    f"{first.name!r} has two cameras, of the worlds {first.world!r} and {second.world!r}: do scenes "
                    "with the same file names lie in folders of their own below the root of the images?"
                )
        columns = {field: [getattr(row, field) for row in rows] for field in SCHEMA.names if field not in MATRICES} | {
            field: [None if (value := getattr(row, field)) is None else value.ravel() for row in rows]
            for field in MATRICES
        }
        return cls(pa.table({field: pa.array(columns[field], SCHEMA.field(field).type) for field in SCHEMA.names}))

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[KnownCamera]:
        return map(_known, self.table.to_pylist())

    @cached_property
    def names(self) -> list[str]:
        """Names, sorted."""
        return self.table["name"].to_pylist()

    def check(self) -> None:
        """Raise `CamerasError` at the first camera that is malformed."""
        for _ in self:
            pass

    @property
    def worlds(self) -> dict[str, str]:
        """The world of every image, by name."""
        return dict(zip(self.names, self.table["world"].to_pylist(), strict=True))

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def get(self, name: str) -> KnownCamera | None:
        """The camera of an image; None for an image without."""
        row = self._rows.get(name)
        return None if row is None else _known(self.table.slice(row, 1).to_pylist()[0])

    def relative(self, name0: str, name1: str) -> np.ndarray | None:
        """True `cam1_from_cam0`, (4, 4) float64; None where a pose is unknown or the images are of two worlds."""
        camera0, camera1 = self.get(name0), self.get(name1)
        if camera0 is None or camera1 is None or camera0.world != camera1.world:
            return None
        if camera0.cam_from_world is None or camera1.cam_from_world is None:
            return None
        return camera1.cam_from_world @ invert(camera0.cam_from_world)

    def write(self, path: str) -> None:
        """Write the table as Parquet, atomically, in small row groups."""
        with files.atomic(path) as (filesystem, inner):
            pq.write_table(self.table, inner, filesystem=filesystem, row_group_size=ROW_GROUP)

    @classmethod
    def read(cls, path: str, names: Collection[str] | None = None) -> "Cameras":
        """Read a table, or the rows of `names` that it has: only the row groups that may hold one are read."""
        with files.opened(path) as source, pq.ParquetFile(source, pre_buffer=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise CamerasError(
                    f"{path} has the columns {file.schema_arrow.names}; expected those of cameras.parquet"
                )
            if names is None:
                return cls(file.read())
            wanted = sorted(set(names))
            groups = [group for group in range(file.num_row_groups) if may_hold(file.metadata.row_group(group), wanted)]
            table = file.read_row_groups(groups)
        return cls(table.filter(pc.is_in(table["name"], pa.array(wanted, pa.string()))))


def may_hold(group: pq.RowGroupMetaData, wanted: list[str]) -> bool:
    """Whether the range of names of a row group holds one of the wanted names, which are sorted."""
    if not group.num_rows:  # of an empty table: it has no statistics
        return False
    statistics = group.column(0).statistics
    position = bisect.bisect_left(wanted, statistics.min)
    return position < len(wanted) and wanted[position] <= statistics.max


def _known(row: dict) -> KnownCamera:
    for field, shape in MATRICES.items():
        if row[field] is not None:
            row[field] = np.array(row[field]).reshape(shape)
    row["params"] = None if row["params"] is None else tuple(row["params"])
    return KnownCamera(**row).checked()
