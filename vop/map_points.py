"""The triangulated map of a database on disk: which keypoints of each image are which points of the world.

    map.parquet       a row per database image, sorted by name, in small row groups; `MAP`
    cameras.parquet   the cameras it was made with (`vop.cameras`)

`map.parquet` carries, in its metadata, a fingerprint of what it was made of: images, features, matches, cameras and
settings. A map of the same things is never made again.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import colmap, files
from vop.cameras import Cameras, CamerasError, may_hold
from vop.features import FeatureStore
from vop.lift import Lifted
from vop.matches import MatchStore, matches_of
from vop.parts import Parts
from vop.pose.localized import MISFIT
from vop.shards import StoreError
from vop.triangulation import PosedImage, SeenPoints, triangulate

MAP = pa.schema(
    [
        ("name", pa.string()),
        ("world", pa.string()),
        ("keypoint", pa.list_(pa.int32())),  # rows of its keypoints that have a 3D point, ascending
        ("point", pa.list_(pa.int64())),  # ids of these points, unique in the whole map
        ("xyz", pa.list_(pa.float64())),  # three numbers of each, world units
        ("reason", pa.string()),  # why the image takes no part; null: it does
    ]
)
FILE = "map.parquet"
FINGERPRINT, COUNTS = b"made_by", b"counts"  # keys in the metadata
ROW_GROUP = 16  # images read for the sake of one
KEPT = 1024  # images whose points a worker keeps in memory
WORLD_BITS = 40  # of a point's id: those of one world stay below
SKEWED = "camera has skew, which COLMAP's models do not have"
NOTHING = SeenPoints(np.empty(0, np.int32), np.empty(0, np.int64), np.empty((0, 3)))


@dataclass(frozen=True)
class MapPoints:
    """A finished map (`vop.lift.Lift`): its path, and the fingerprint of what it was made of.

    What it reads is kept in memory, per process."""

    path: str
    made_by: str

    def __call__(self, name: str, rows: np.ndarray, points: np.ndarray) -> Lifted:
        """The points of keypoints of a database image, by their rows alone.

        Raises `StoreError` if the map was replaced since it was opened.
        """
        _, seen = _image(self.path, self.made_by, name)
        at = np.searchsorted(seen.rows, rows)
        there = np.flatnonzero(np.append(seen.rows, -1)[at] == rows)
        xyz, ids = np.full((len(rows), 3), np.nan), np.full(len(rows), -1, np.int64)
        xyz[there], ids[there] = seen.xyz[at[there]], seen.ids[at[there]]
        return Lifted(xyz, ids)

    def world(self, name: str) -> str | None:
        """The world of a database image; None for one that is not in the map."""
        return _image(self.path, self.made_by, name)[0]

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Columns of the whole map, `MAP`."""
        with files.opened(files.join(self.path, FILE)) as file:
            return pq.read_table(file, columns=columns)


def made_by(path: str) -> str | None:
    """The fingerprint of the map in a folder; None without one."""
    try:
        with files.opened(files.join(path, FILE)) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return metadata.get(FINGERPRINT, b"").decode() or None


def counted(path: str) -> dict[str, object]:
    """What the map in a folder holds: `counts` of it, taken when it was written."""
    with files.opened(files.join(path, FILE)) as file:
        return json.loads(pq.read_schema(file).metadata[COUNTS])


def write(path: str, table: pa.Table, fingerprint: str) -> MapPoints:
    """Write a map (`MAP`, in any order) and say what it was made of."""
    metadata = {FINGERPRINT: fingerprint.encode(), COUNTS: json.dumps(counts(table)).encode()}
    table = table.sort_by("name").replace_schema_metadata(metadata)
    with files.atomic(files.join(path, FILE)) as (filesystem, inner):
        pq.write_table(table, inner, filesystem=filesystem, compression="zstd", row_group_size=ROW_GROUP,
                       use_dictionary=["world", "reason"], write_statistics=["name"])  # fmt: skip
    return MapPoints(path, fingerprint)


@lru_cache(4)
def _groups(path: str, fingerprint: str) -> pq.FileMetaData:
    if made_by(path) != fingerprint:
        raise StoreError(f"the map at {path} was made anew by another run while this one used it: run this one again")
    with files.opened(files.join(path, FILE)) as source:
        return pq.read_metadata(source)


@lru_cache(KEPT)
def _image(path: str, fingerprint: str, name: str) -> tuple[str | None, SeenPoints]:
    """World and points of an image; None and nothing for one that the map does not hold."""
    metadata = _groups(path, fingerprint)
    groups = [group for group in range(metadata.num_row_groups) if may_hold(metadata.row_group(group), [name])]
    with files.opened(files.join(path, FILE)) as source, pq.ParquetFile(source, metadata=metadata) as file:
        table = file.read_row_groups(groups)
    rows = table.filter(pc.equal(table["name"], name))
    if not rows.num_rows or rows["reason"][0].is_valid:
        return None, NOTHING
    keypoint, point, xyz = (rows[column][0].values.to_numpy() for column in ("keypoint", "point", "xyz"))
    return rows["world"][0].as_py(), SeenPoints(keypoint, point, xyz.reshape(-1, 3))


class Triangulation:
    """Makes the points of whole worlds: what the stage of the map does, as a plain callable that reads what it needs.

    cameras: path of a table of `vop.cameras` that holds every image of the map.
    """

    def __init__(self, min_angle: float, features: FeatureStore, matches: MatchStore, cameras: str, parts: Parts):
        self.min_angle, self.features, self.matches = min_angle, features, matches
        self.cameras, self.parts = cameras, parts

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Write part `part`: the images of the pairs in rows `row` of shards `shard` of matches, all of one world.

        The columns have a row per pair. Returns part and images, the number of images in the part.
        """
        part, pairs = asked["part"][0].as_py(), []
        shards, rows = asked["shard"].to_numpy(), asked["row"].to_numpy()
        for number in np.unique(shards).tolist():
            wanted = rows[shards == number]
            planned, found = self.matches.planned(number).take(wanted), self.matches.read_shard(number).take(wanted)
            pairs += zip(planned.to_pylist(), matches_of(found), strict=True)
        images, reasons, world = self._images([pair for pair, _ in pairs])
        usable = ((pair["image0"], pair["image1"], matches) for pair, matches in pairs)
        usable = (each for each in usable if each[0] in images and each[1] in images)
        seen = triangulate(images, usable, self.min_angle) if images else {}
        self.parts.write(part, _table(world, part, [*images], seen, reasons))
        return pa.table({"part": [part], "images": [len(images) + len(reasons)]})

    def _images(self, pairs: list[dict]) -> tuple[dict[str, PosedImage], dict[str, str], str]:
        """The images of pairs by name, the reasons why some cannot take part, and their world."""
        places = {pair[f"image{side}"]: (pair[f"shard{side}"], pair[f"row{side}"]) for pair in pairs for side in (0, 1)}
        cameras, images, reasons = Cameras.read(self.cameras, places), {}, {}
        for number in sorted({shard for shard, _ in places.values()}):
            names = sorted((row, name) for name, (shard, row) in places.items() if shard == number)
            read = self.features.read_keypoints(number, np.array([row for row, _ in names]))
            for (_, name), (keypoints, size) in zip(names, read, strict=True):
                known = cameras.get(name)
                try:
                    images[name] = PosedImage(keypoints, colmap.known_camera(known, size), known.cam_from_world)
                except CamerasError:
                    reasons[name] = MISFIT
                except colmap.ColmapError:
                    reasons[name] = SKEWED
        return images, reasons, next(iter(cameras)).world


def _table(world: str, part: int, names: Iterable[str], seen: dict[str, SeenPoints], reasons: dict[str, str]):
    rows = [(name, seen.get(name, NOTHING), None) for name in names]
    rows += [(name, NOTHING, reason) for name, reason in reasons.items()]
    rows.sort(key=lambda row: row[0])
    columns = {
        "name": [name for name, _, _ in rows],
        "world": [world] * len(rows),
        "keypoint": [points.rows for _, points, _ in rows],
        "point": [points.ids + (part << WORLD_BITS) for _, points, _ in rows],
        "xyz": [points.xyz.ravel() for _, points, _ in rows],
        "reason": [reason for _, _, reason in rows],
    }
    return pa.table(columns, schema=MAP)


def pointless(names: Iterable[str], worlds: dict[str, str]) -> pa.Table:
    """The rows of images that no pair of the map holds."""
    tables = [_table(worlds[name], 0, [name], {}, {}) for name in names]
    return pa.concat_tables([MAP.empty_table(), *tables])


def counts(table: pa.Table) -> dict[str, object]:
    """Of a map: images, worlds, points, observations, images without any point, and reasons why some took no part."""
    sizes = pc.list_value_length(table["keypoint"])
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason is not None)
    return {
        "images": table.num_rows,
        "worlds": pc.count_distinct(table["world"]).as_py(),
        "points": pc.count_distinct(pc.list_flatten(table["point"])).as_py(),
        "observations": pc.sum(sizes).as_py() or 0,
        "without_points": table.num_rows - (pc.sum(pc.greater(sizes, 0)).as_py() or 0),
        "left_out": dict(reasons),
    }
