"""Poses of localized queries: their table, how good they are, and the list of poses that benchmark servers take.

`localized.parquet` has a row for every query, localized or not. Poses are `cam_from_world`, as everywhere
(`vop.geometry`). A true pose counts in its own world only: a pose found in another world is a wrong one, whatever its
numbers say, and its errors are infinite.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.spatial.transform import Rotation

from vop import files
from vop import metrics as scores
from vop.cameras import Cameras, KnownCamera
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
        (
            "faults",
            pa.list_(pa.string()),
        ),  # of these pairs, those without 3D points for an error: image, error
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
REASONS = (  # in the order in which they can come up
    *(NO_PAIRS, QUARANTINED, UNREADABLE, NO_CAMERA, MISFIT, FEW_MATCHES, NO_POINTS, RANSAC, FEW_INLIERS),
)

# The key of a recall, and (world units, degrees) below which both errors of a query must lie to count: the classes of
# visuallocalization.net (its page on evaluation; strictly below, as hloc's evaluation counts), then those of InLoc.
OUTDOOR = {"recall@0.25m_2deg": (0.25, 2), "recall@0.5m_5deg": (0.5, 5), "recall@5m_10deg": (5, 10)}
INDOOR = {"recall@0.25m_10deg": (0.25, 10), "recall@0.5m_10deg": (0.5, 10), "recall@1m_10deg": (1, 10)}
RECALLS = OUTDOOR | INDOOR
UNJUDGED = "the true pose of no query is known: nothing could be judged"

NAMES: dict[str, Callable[[str], str]] = {  # how poses.txt names a query, by `localize.written`
    "name": lambda name: name,
    "basename": lambda name: name.rsplit("/", 1)[-1],
    "folder": lambda name: "/".join(name.split("/")[-2:]),
}


def errors(pose: np.ndarray | None, world: str | None, truth: KnownCamera | None) -> tuple[float | None, float | None]:
    """(rotation_error in degrees, translation_error in world units) of a query's `cam_from_world` (3 or 4, 4).

    The translation error is the distance of the camera centres. None, None where the true pose is unknown; infinite
    where it is known and none was found (pose None), or one in another world.
    """
    if truth is None or truth.cam_from_world is None:
        return None, None
    if pose is None or world != truth.world:
        return np.inf, np.inf
    true = truth.cam_from_world
    distance = np.linalg.norm(center(pose) - center(true))
    return float(scores.rotation_error(pose[:3, :3], true[:3, :3])), float(distance)


def center(pose: np.ndarray) -> np.ndarray:
    """Where the camera of a `cam_from_world` (..., 3 or 4, 4) stands in the world, (..., 3)."""
    return -np.einsum("...ij,...i->...j", pose[..., :3, :3], pose[..., :3, 3])


def judged(table: pa.Table, truth: Cameras | None) -> pa.Table:
    """The table with rotation_error and translation_error filled in, by the true cameras; None: nothing is known."""
    found = []
    for row in table.select(["query", "world", "cam_from_world"]).to_pylist():
        pose = None if row["cam_from_world"] is None else np.reshape(row["cam_from_world"], (3, 4))
        found.append(errors(pose, row["world"], None if truth is None else truth.get(row["query"])))
    for side, key in enumerate(("rotation_error", "translation_error")):
        column = pa.array([each[side] for each in found], pa.float64())
        table = table.set_column(table.column_names.index(key), SCHEMA.field(key), column)
    return table


def poses_of(table: pa.Table) -> np.ndarray:
    """The poses of a table, (n, 3, 4) float64, NaN where there is none."""
    rows = table["cam_from_world"].to_pylist()
    return np.array([np.full(12, np.nan) if row is None else row for row in rows]).reshape(-1, 3, 4)


def failures(table: pa.Table) -> dict[str, int]:
    """How many queries have no pose, by reason, the most frequent first."""
    return dict(Counter(table["reason"].drop_null().to_pylist()).most_common())


def faults(table: pa.Table) -> dict[str, int]:
    """How many pairs have no 3D points for an error with their database image, by error without its particulars."""
    found = pc.list_flatten(table["faults"]).to_pylist()
    return dict(Counter(fault.split(": ")[1] for fault in found).most_common())


def metrics(table: pa.Table) -> dict[str, object]:
    """How good a judged table is, as flat keys of metrics.json.

    - `queries`, `localized`: how many there are, and have a pose;
    - `median_inliers`: over the localized; None where there is none;
    - `judged`: queries whose true pose is known. All that follows is over these, and a query without a pose, or with
      one in another world (`wrong_world`: how many), counts with an infinite error;
    - `median_rotation_error` (degrees), `median_translation_error` (world units, between camera centres): None where
      the median is infinite, since half or more failed;
    - `RECALLS`, 0 to 1: the share of queries with both errors below the bounds in the key. Metres are world units.

    Where no true pose is known, the last two groups are absent, and `unjudged` says so.
    """
    pose = table["reason"].is_null()
    inliers = table.filter(pose)["inliers"].to_numpy()
    known = table.filter(table["rotation_error"].is_valid())
    flat: dict[str, object] = {
        "queries": table.num_rows,
        "localized": len(inliers),
        "median_inliers": float(np.median(inliers)) if len(inliers) else None,
        "judged": known.num_rows,
    }
    if not known.num_rows:
        return flat | {"unjudged": UNJUDGED}
    rotation, translation = (known[key].to_numpy() for key in ("rotation_error", "translation_error"))
    flat["wrong_world"] = int(np.isinf(rotation[known["reason"].is_null().to_numpy()]).sum())
    for key, values in (("median_rotation_error", rotation), ("median_translation_error", translation)):
        middle = float(np.median(values))
        flat[key] = round(middle, 6) if np.isfinite(middle) else None
    for key, (units, degrees) in RECALLS.items():
        flat[key] = round(float(np.mean((translation < units) & (rotation < degrees))), 6)
    return flat


def check_written(names: Iterable[str], written: str) -> None:
    """Raise `ConfigError` where poses.txt would give two queries one name; to be asked before the long work."""
    taken: dict[str, str] = {}
    for name in sorted(names):
        short = NAMES[written](name)
        if short in taken:
            others = [each for each in WRITTEN if NAMES[each](name) != NAMES[each](taken[short])]
            raise ConfigError(
                f"poses.txt would name two queries {short!r}: {taken[short]!r} and {name!r} (names are written by the "
                f"rule {written!r}); give localize.written={' or '.join(others)}, or localize them in two runs"
            )
        taken[short] = name


def write_poses(path: str, table: pa.Table, written: str) -> dict[str, object]:
    """Write poses.txt, `name qw qx qy qz tx ty tz`, one line for each localized query; returns counts for the record.

    Poses are `cam_from_world`, qw is not negative, and the digits give back the same doubles. Sorted by name, as
    `written` has it ("name", "basename" or "folder"). Where a name holds white space, at which lines are split, the
    file is not written, an older one is removed, and the reason is in the counts. Raises what `check_written` does.
    """
    found = table.filter(table["reason"].is_null())
    names = found["query"].to_pylist()
    check_written(names, written)
    shorts = [NAMES[written](name) for name in names]
    broken = [short for short in shorts if short.split() != [short]]
    if broken:
        files.remove(path)
        return {"poses_txt": f"not written: {len(broken)} names hold white space, the first {broken[0]!r}"}
    lines = []
    for short, pose in zip(shorts, poses_of(found), strict=True):
        values = (repr(float(value) + 0.0) for value in (*quaternion(pose[:, :3]), *pose[:, 3]))  # + 0.0: no -0.0
        lines.append(f"{short} {' '.join(values)}\n")
    files.write_bytes(path, "".join(sorted(lines)).encode())
    return {"poses_txt": len(lines)}


def quaternion(R: np.ndarray) -> np.ndarray:
    """The unit quaternion (qw, qx, qy, qz) of a rotation (3, 3), with qw >= 0."""
    x, y, z, w = Rotation.from_matrix(R).as_quat(canonical=True)
    return np.array([w, x, y, z])
