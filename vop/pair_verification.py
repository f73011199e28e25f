"""From matches to two-view geometries: what the stage that verifies pairs does, as callables that read themselves."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vop import colmap, files
from vop.cameras import Cameras, load_pycolmap
from vop.features import FeatureStore
from vop.matches import MatchStore, matches_of
from vop.parts import Parts
from vop.schema import ReconstructConfig
from vop.shards import StoreError

if TYPE_CHECKING:
    import pycolmap

MATRIX = pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("image0", pa.string()),
        ("image1", pa.string()),
        ("matches", pa.int32()),
        ("reason", pa.string()),  # why there is no geometry; null: there is one
        ("kind", pa.int32()),  # of geometry, `pycolmap.TwoViewGeometryConfiguration`
        ("E", MATRIX),  # row-major; null: of another kind
        ("F", MATRIX),
        ("H", MATRIX),
        ("cam1_from_cam0", MATRIX),  # the upper three rows, row-major; |t| = 1 or 0
        ("angle", pa.float64()),  # median angle between the rays of a match, radians
        ("inliers", pa.list_(pa.list_(pa.int32(), 2))),  # rows of the keypoints of image 0 and of image 1
    ]
)
UNREADABLE, FEW, NONE = "matches or features unreadable", "too few matches", "no two-view geometry"
WATERMARK = "a watermark is all they share"


def image_cameras(images: pa.Table, cameras: str | None) -> pa.Table:
    """The cameras (`colmap.IMAGES`) of images (name, path, width, height), known or guessed from their files.

    cameras: a `cameras.parquet`; None: no camera is known.
    """
    known = None if cameras is None else Cameras.read(cameras, images["name"].to_pylist())
    rows = []
    for image in images.to_pylist():
        name, size, path = image["name"], (image["width"], image["height"]), image["path"]
        given = None if known is None else known.get(name)
        rows.append(colmap.described(name, colmap.camera_of(given, size, lambda path=path: path)))
    return pa.Table.from_pylist(rows, schema=colmap.IMAGES)


class PairVerification:
    """Verifies the pairs in one shard of matches as COLMAP's own matcher would, into a part with `SCHEMA`.

    images: where a table of `colmap.IMAGES` lies that holds every image of the pairs. The geometry of a pair follows
    from its matches, its cameras and the seed alone.
    """

    def __init__(
        self, config: ReconstructConfig, features: FeatureStore, matches: MatchStore, images: str, parts: Parts
    ):
        self.config, self.features, self.matches, self.images, self.parts = config, features, matches, images, parts

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Write part `part`: the geometries of the rows `row` of the shard `shard` of matches (a row per pair).

        Returns part and pairs, the number of its pairs.
        """
        part, shard = asked["part"][0].as_py(), asked["shard"][0].as_py()
        self.parts.write(part, pa.Table.from_pylist(self._rows(shard, asked["row"]), schema=SCHEMA))
        return pa.table({"part": [part], "pairs": [asked.num_rows]})

    def _rows(self, shard: int, rows: pa.ChunkedArray) -> list[dict]:
        pairs = self.matches.planned(shard).take(rows).to_pylist()
        cameras = self._cameras({pair[side] for pair in pairs for side in ("image0", "image1")})
        places = {(pair[f"shard{side}"], pair[f"row{side}"]) for pair in pairs for side in (0, 1)}
        keypoints = dict(read_keypoints(self.features, places))
        try:
            table = self.matches.read_shard(shard).take(rows)
            failed = table["error"].is_valid().to_pylist()
            matches = [None if bad else each for each, bad in zip(matches_of(table), failed, strict=True)]
        except StoreError:
            matches = [None] * len(pairs)
        verify, options = _Verifier(cameras), _options(self.config)
        with ThreadPoolExecutor(cpu_count()) as threads:  # COLMAP lets go of Python's lock
            tasks = [
                threads.submit(
                    verify, pair, [keypoints.get((pair[f"shard{side}"], pair[f"row{side}"])) for side in (0, 1)],
                    found, options,
                )
                for pair, found in zip(pairs, matches, strict=True)
            ]  # fmt: skip
            return [task.result() for task in tasks]

    def _cameras(self, names: set[str]) -> Mapping[str, "pycolmap.Camera"]:
        with files.opened(self.images) as file:
            table = pq.read_table(file, filters=[("name", "in", names)])
        return {name: each.camera for name, each in colmap.image_cameras(table).items()}


def read_keypoints(features: FeatureStore, places: set[tuple[int, int]]) -> Iterator[tuple[tuple, np.ndarray]]:
    """The keypoints (n, 2) float32 at these places (shard, row), by shard; those of unreadable shards are missing."""
    for number in sorted({shard for shard, _ in places}):
        rows = sorted(row for shard, row in places if shard == number)
        try:
            found = features.read_keypoints(number, np.array(rows))
        except StoreError:
            continue
        yield from (((number, row), points) for row, (points, _) in zip(rows, found, strict=True))


def _options(config: ReconstructConfig) -> "pycolmap.TwoViewGeometryOptions":
    options = colmap.two_view_options(config.seed)
    options.min_num_inliers = config.min_inliers
    options.compute_relative_pose = True
    return options


class _Verifier:
    """Verifies one pair; returns its row."""

    def __init__(self, cameras: Mapping[str, "pycolmap.Camera"]):
        self.cameras, self.pycolmap, self.unusable = cameras, load_pycolmap(), colmap.unusable_kinds()

    def __call__(self, pair: dict, keypoints: list, matches: np.ndarray | None, options) -> dict:
        row = {"image0": pair["image0"], "image1": pair["image1"], "matches": 0, "reason": UNREADABLE}
        if matches is None or any(each is None for each in keypoints):
            return row
        row |= {"matches": len(matches), "reason": FEW}
        if len(matches) < options.min_num_inliers:
            return row
        cameras = [self.cameras[pair[side]] for side in ("image0", "image1")]
        points = [each.astype(np.float64) for each in keypoints]
        found = self.pycolmap.estimate_two_view_geometry(
            cameras[0], points[0], cameras[1], points[1], matches.astype(np.uint32), options
        )
        if found.config in self.unusable or found.cam2_from_cam1 is None:
            watermark = found.config == self.pycolmap.TwoViewGeometryConfiguration.WATERMARK
            return row | {"reason": WATERMARK if watermark else NONE}
        return row | _written(found)


def _written(found: "pycolmap.TwoViewGeometry") -> dict:
    pose = found.cam2_from_cam1
    matrices = {name: getattr(found, name) for name in ("E", "F", "H")}
    return {
        "reason": None,
        "kind": int(found.config),
        **{name: None if matrix is None else matrix.ravel() for name, matrix in matrices.items()},
        "cam1_from_cam0": None if pose is None else pose.matrix().ravel(),
        "angle": float(found.tri_angle),
        "inliers": found.inlier_matches.tolist(),
    }


def geometry_of(row: dict, inliers: np.ndarray) -> "pycolmap.TwoViewGeometry":
    """COLMAP's two-view geometry of a row of `SCHEMA` that has one; inliers (m, 2)."""
    pycolmap = load_pycolmap()
    found = pycolmap.TwoViewGeometry()
    found.config, found.inlier_matches, found.tri_angle = row["kind"], inliers.astype(np.uint32), row["angle"]
    for name in ("E", "F", "H"):
        if row[name] is not None:
            setattr(found, name, np.array(row[name]).reshape(3, 3))
    if row["cam1_from_cam0"] is not None:
        found.cam2_from_cam1 = pycolmap.Rigid3d(np.array(row["cam1_from_cam0"]).reshape(3, 4))
    return found
