"""Poses of localized queries: their table, how good they are, and the list of poses that benchmark servers take.

`localized.parquet` has a row for every query, localized or not. Poses are `cam_from_world`, as everywhere
(`vop.geometry`). A true pose counts in its own world only: a pose found in another world is a wrong one, whatever its
numbers say, and its errors are infinite.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import files
from vop import metrics as scores
from vop.cameras import Cameras, KnownCamera
from vop.geometry import invert, pose_from_rt
from vop.schema.bounds import ConfigError
from vop.schema.localization import WRITTEN

SCHEMA = pa.schema(
    [
        ("query", pa.string()),  # sorted
        ("reason", pa.string()),  # why there is no pose; null: localized
        ("world", pa.string()),  # that the pose lies in; null: no pose
        ("cam_from_world", pa.list_(pa.float64(), 12)),  # the upper rows, row-major; null: no pose
        ("inliers", pa.int32()),  # correspondences that agree with the pose; 0 without
        ("correspondences", pa.int32()),  # of a keypoint and a 3D point, that the pose was sought with
        ("pairs", pa.int32()),  # of the query, that took part
        ("matches", pa.int32()),  # of these pairs
        ("camera", pa.string()),  # where its intrinsics come from: `vop.query_cameras.SOURCES`; null: unknown
        ("model", pa.string()),  # COLMAP's camera model that was used, refined where that was asked for
        ("params", pa.list_(pa.float64())),  # its parameters, in COLMAP's order
        ("width", pa.int32()),  # of the upright image
        ("height", pa.int32()),
        ("rotation_error", pa.float64()),  # degrees; null: true pose unknown; inf: none was found, or in another world
        ("translation_error", pa.float64()),  # between camera centres, in units of the world; null and inf likewise
    ]
)

NO_PAIRS, QUARANTINED, UNREADABLE = "no pairs", "image in quarantine", "features unreadable"
NO_CAMERA, MISFIT = "camera unknown", "camera does not fit the image"
FEW_MATCHES = "too few matches"  # no pair has as many as localize.min_matches
NO_POINTS = "no 3D points"  # fewer correspondences with a 3D point than any pose needs
RANSAC, FEW_INLIERS = "RANSAC failed", "too few inliers"
REASONS = (
    *(NO_PAIRS, QUARANTINED, UNREADABLE, NO_CAMERA, MISFIT, FEW_MATCHES, NO_POINTS, RANSAC, FEW_INLIERS),
)  # in the order in which they can come up

# (world units, degrees) below which both errors of a query must lie, as key of the recall: the three classes of
# visuallocalization.net (https://www.visuallocalization.net/details, of outdoor data sets, by day), then InLoc's.
OUTDOOR = {"recall@0.25m_2deg": (0.25, 2), "recall@0.5m_5deg": (0.5, 5), "recall@5m_10deg": (5, 10)}
INDOOR = {"recall@0.25m_10deg": (0.25, 10), "recall@0.5m_10deg": (0.5, 10), "recall@1m_10deg": (1, 10)}
RECALLS = OUTDOOR | INDOOR
UNJUDGED = "no true pose of a query is known: nothing could be judged"


def errors(pose: np.ndarray | None, world: str | None, truth: KnownCamera | None) -> tuple[float | None, float | None]:
    """(rotation_error in degrees, translation_error in world units) of a query's `cam_from_world` (3 or 4, 4).

    The translation error is the distance of the camera centres. None, None where the true pose is unknown; infinite
    where it is known and none was found (pose None), or in another world.
    """
    raise NotImplementedError


def judged(table: pa.Table, truth: Cameras | None) -> pa.Table:
    """The table with the columns rotation_error and translation_error filled in by the true cameras (None: unknown)."""
    raise NotImplementedError


def metrics(table: pa.Table) -> dict[str, object]:
    """Counts, median errors and recalls of a judged table, as flat keys of metrics.json."""
    raise NotImplementedError


def check_written(names: Iterable[str], written: str) -> None:
    """Raise `ConfigError` where poses.txt cannot hold these queries; to be called before the long work."""
    raise NotImplementedError


def write_poses(path: str, table: pa.Table, written: str) -> int:
    """Write poses.txt; returns the number of its lines, one for each localized query."""
    raise NotImplementedError
