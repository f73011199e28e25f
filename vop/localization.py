"""From matches to absolute poses: what the localization stage does, as a plain callable that reads what it needs.

A query's matches with database images of known geometry become correspondences between its keypoints and points of the
world (`vop.lift`); the pose follows from these. Where several database images see the same point, the query's keypoint
is given it once, as hloc's `localize_sfm` does.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import scipy.sparse as sparse

from vop import colmap, files
from vop.cameras import Cameras, CamerasError
from vop.features import FeatureStore
from vop.lift import Lift
from vop.matches import MatchStore, matches_of
from vop.parts import Parts
from vop.pose import localized as reasons
from vop.pose.absolute import MIN_POINTS, AbsolutePose, estimate
from vop.pose.localized import SCHEMA
from vop.query_cameras import query_camera
from vop.schema import LocalizeConfig
from vop.shards import StoreError

if TYPE_CHECKING:
    import pycolmap

Keypoints = tuple[np.ndarray, tuple[int, int]]  # (n, 2) float32, pixels; (width, height) of the upright image
ASKED = pa.schema(
    [
        ("part", pa.int32()),
        ("query", pa.string()),
        ("reason", pa.string()),  # of a query without a matched pair, which has one row without shard and row
        ("shard", pa.int32()),  # where the matches of a pair lie
        ("row", pa.int32()),
    ]
)


@dataclass(frozen=True, eq=False)
class QueryPair:
    """Matches of a query with a database image: indices (m, 2), rows of the query's keypoints and of keypoints (n, 2).

    None: the features of the database image cannot be read.
    """

    database: str
    indices: np.ndarray
    keypoints: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Correspondences:
    """Keypoints of a query, by rows (m,), and the points of the world that they show: ids (m,) int64, xyz (m, 3).

    fault: why there are none, where the geometry of the database image cannot be read.
    """

    rows: np.ndarray
    ids: np.ndarray
    xyz: np.ndarray
    fault: str | None = None

    def __len__(self) -> int:
        return len(self.rows)


class NotLocalizedError(Exception):
    """A query that no pose can be sought for; the message is one of the reasons."""


class Localization:
    """Localizes the queries of a part.

    cameras, listed: paths of tables of `vop.cameras`, what is known of queries and what lists say of them. root: the
    folder that names of images count from.
    """

    def __init__(
        self,
        config: LocalizeConfig,
        features: FeatureStore,
        matches: MatchStore,
        cameras: str,
        listed: str,
        lift: Lift,
        root: str,
        parts: Parts,
    ):
        self.config, self.features, self.matches, self.lift, self.root = config, features, matches, lift, root
        self.cameras, self.listed, self.parts = cameras, listed, parts

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Write part `part`: a row for each query of `ASKED`, whose pairs stand by rank.

        Returns part, queries and failed, the number of those without a pose.
        """
        queries = {row["query"]: row["reason"] for row in asked.to_pylist()}
        cameras, listed = (Cameras.read(path, queries) for path in (self.cameras, self.listed))
        pairs, images = self._pairs(asked)
        rows = []
        for query, reason in queries.items():
            row = {"query": query, "reason": reason, "inliers": 0, "correspondences": 0, "pairs": 0, "matches": 0}
            try:
                if reason is None:
                    row |= self._localized(query, pairs[query], images[query], listed.get(query), cameras.get(query))
            except NotLocalizedError as error:
                row["reason"] = str(error)
            rows.append(row)
        part, table = asked["part"][0].as_py(), pa.Table.from_pylist(rows, schema=SCHEMA)
        self.parts.write(part, table)
        failed = table.num_rows - table["reason"].null_count
        return pa.table({"part": [part], "queries": [table.num_rows], "failed": [failed]})

    def _pairs(self, asked: pa.Table) -> tuple[dict[str, list[QueryPair]], dict[str, Keypoints | None]]:
        """The pairs of every query in their order, and the keypoints of queries; None: they cannot be read.

        Pairs that were not matched for an error are left out, and so are those whose matches cannot be read.
        """
        asked = asked.filter(asked["shard"].is_valid())
        shards, rows = asked["shard"].to_numpy(), asked["row"].to_numpy()
        found: dict[tuple[int, int], tuple[dict, np.ndarray | None]] = {}
        for number in np.unique(shards).tolist():
            wanted = np.unique(rows[shards == number])
            read = zip(self.matches.planned(number).take(wanted).to_pylist(), self._read(number, wanted), strict=True)
            found |= {(number, row): each for row, each in zip(wanted.tolist(), read, strict=True)}
        planned = [pair for pair, _ in found.values()]
        images = self._images(
            {pair[f"image{side}"]: (pair[f"shard{side}"], pair[f"row{side}"]) for pair in planned for side in (0, 1)}
        )
        pairs: dict[str, list[QueryPair]] = {}
        for query, place in zip(
            asked["query"].to_pylist(), zip(shards.tolist(), rows.tolist(), strict=True), strict=True
        ):
            pair, indices = found[place]
            side = 0 if pair["image0"] == query else 1
            mine = pairs.setdefault(query, [])
            if indices is not None:
                database = pair[f"image{1 - side}"]
                seen = images.get(database)
                mine.append(QueryPair(database, indices[:, [side, 1 - side]], None if seen is None else seen[0]))
        return pairs, {query: images.get(query) for query in pairs}

    def _read(self, number: int, rows: np.ndarray) -> list[np.ndarray | None]:
        """The matches in these rows of a shard; None for a pair that failed, or where they cannot be read."""
        try:
            table, places = self.matches.read_around(number, rows, ["matches", "error"])
        except StoreError:
            return [None] * len(rows)
        table = table.take(places)
        whole = table["error"].is_null().to_pylist()
        return [matches if good else None for matches, good in zip(matches_of(table), whole, strict=True)]

    def _images(self, places: dict[str, tuple[int, int]]) -> dict[str, Keypoints]:
        """Keypoints and sizes of images by name; those whose shard cannot be read are missing."""
        found = {}
        for number in {shard for shard, _ in places.values()}:
            names = sorted((row, name) for name, (shard, row) in places.items() if shard == number)
            try:
                read = self.features.read_keypoints(number, np.array([row for row, _ in names]))
            except StoreError:
                continue
            found |= {name: each for (_, name), each in zip(names, read, strict=True)}
        return found

    def _localized(self, query: str, pairs: Sequence[QueryPair], seen: Keypoints | None, listed, known) -> dict:
        """What becomes of a query: the columns of its row that say more than zero. Raises `NotLocalizedError`."""
        readable = [pair for pair in pairs if pair.keypoints is not None]
        if seen is None or not readable:
            raise NotLocalizedError(reasons.UNREADABLE if seen is None or pairs else reasons.NO_PAIRS)
        keypoints, size = seen
        try:
            path, config = files.join(self.root, query), self.config
            chosen, source = query_camera(path, size, listed, known, config.focal, config.exif)
            camera = None if chosen is None else colmap.known_camera(chosen, size).camera
        except (CamerasError, colmap.ColmapError) as error:
            raise NotLocalizedError(reasons.MISFIT) from error
        if camera is None:
            raise NotLocalizedError(reasons.NO_CAMERA)
        used = [pair for pair in readable if len(pair.indices) >= self.config.min_matches]
        row = {"pairs": len(used), "matches": sum(len(pair.indices) for pair in used), "camera": source}
        return row | localize(used, keypoints, camera, self.lift, self.config)


def localize(
    pairs: Sequence[QueryPair], keypoints: np.ndarray, camera: "pycolmap.Camera", lift: Lift, config: LocalizeConfig
) -> dict[str, object]:
    """The pose of a query from its pairs, best first, as columns of `vop.pose.localized.SCHEMA`.

    keypoints: (n, 2), pixels of the query. Every world is tried, or with `covisibility` every group of images in it,
    and the pose with most inliers is taken, of equals that of the better pairs.
    """
    row = _camera(camera)
    if not pairs:
        return row | {"reason": reasons.FEW_MATCHES}
    best: tuple[AbsolutePose, str] | None = None
    tried, row["faults"] = 0, []
    for world, group in _groups(pairs, lift, config.covisibility):
        parts = lifted(group, lift)
        row["faults"] += [part.fault for part in parts if part.fault]
        found = merged(parts)
        tried = max(tried, len(found))
        if len(found) < MIN_POINTS:
            continue
        pose = estimate(keypoints[found.rows].astype(np.float64), found.xyz, camera, config)
        if pose is not None and (best is None or pose.inliers.sum() > best[0].inliers.sum()):
            best = pose, world
    if best is None:
        return row | {"correspondences": tried, "reason": reasons.NO_POINTS if tried < MIN_POINTS else reasons.RANSAC}
    pose, world = best
    row |= {"correspondences": len(pose.inliers), "inliers": int(pose.inliers.sum())}
    if row["inliers"] < config.min_inliers:
        return row | {"reason": reasons.FEW_INLIERS}
    return row | _camera(pose.camera) | {"world": world, "cam_from_world": pose.cam_from_world[:3].ravel()}


def _camera(camera: "pycolmap.Camera") -> dict[str, object]:
    return {"model": camera.model_name, "params": camera.params, "width": camera.width, "height": camera.height}


def lifted(pairs: Iterable[QueryPair], lift: Lift) -> list[Correspondences]:
    """The correspondences that each pair gives: its matches whose database keypoint has a 3D point."""
    found = []
    for pair in pairs:
        rows = pair.indices[:, 1]
        there = lift(pair.database, rows, pair.keypoints[rows].astype(np.float64))
        known = np.isfinite(there.xyz).all(axis=1)
        fault = None if there.reason is None else f"{pair.database}: {there.reason}"
        found.append(Correspondences(pair.indices[known, 0], there.ids[known], there.xyz[known], fault))
    return found


def merged(parts: Sequence[Correspondences]) -> Correspondences:
    """All correspondences, each keypoint with each point once, where it came first; points of id -1 are all kept."""
    rows, ids, xyz = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "ids", "xyz"))
    _, first = np.unique(np.stack([rows, ids]), axis=1, return_index=True)
    kept = ids < 0
    kept[first] = True
    return Correspondences(rows[kept], ids[kept], xyz[kept])


def _groups(pairs: Sequence[QueryPair], lift: Lift, covisibility: bool) -> Iterator[tuple[str, list[QueryPair]]]:
    """The pairs of each world, in order of the best of them; or of images in it that hang together by shared points."""
    worlds: dict[str, list[QueryPair]] = {}
    for pair in pairs:
        if (world := lift.world(pair.database)) is not None:
            worlds.setdefault(world, []).append(pair)
    for world, group in worlds.items():
        yield from ((world, part) for part in (covisible(group, lift) if covisibility else [group]))


def covisible(pairs: Sequence[QueryPair], lift: Lift) -> list[list[QueryPair]]:
    """Pairs whose database images hang together: connected by points that two of them see, matched or not."""
    seen = []
    for pair in pairs:
        every = np.arange(len(pair.keypoints), dtype=np.int32)
        ids = lift(pair.database, every, pair.keypoints.astype(np.float64)).ids
        seen.append(np.unique(ids[ids >= 0]))
    points, columns = np.unique(np.concatenate(seen), return_inverse=True)
    rows = np.repeat(np.arange(len(pairs)), [len(ids) for ids in seen])
    sees = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(pairs), len(points)))
    labels = sparse.csgraph.connected_components(sees @ sees.T, directed=False)[1]
    return [
        [pair for pair, label in zip(pairs, labels, strict=True) if label == wanted]
        for wanted in dict.fromkeys(labels.tolist())
    ]
