"""What the report says of localized queries, and of reconstructed models, gathered from a run directory."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files
from vop.cameras import Cameras, load_pycolmap
from vop.catalog import evenly_spread
from vop.config import Config
from vop.pairs import read_parquet
from vop.pose.localized import center, failures, metrics, poses_of
from vop.run import Run
from vop.viz.above import ERROR, INLIERS, Above
from vop.viz.above_plot import POINTS, above_file
from vop.viz.localized_report import LISTED, LocalizedReport, ModelsReport

WORLDS = 6  # drawn at most, those with most queries
GROUPS = 64  # of rows of the map that points are taken from
LARGEST = 2_000_000  # points of a model up to which it is opened to draw some of them
LOCALIZED_PICTURES = ("localized.png", "localized.svg")  # of a run directory
MODEL_PICTURES = ("models.png", "models.svg")


def localized_report(config: Config, run: Run, table: pa.Table) -> LocalizedReport:
    """The section of a run that localized queries; `table`: `vop.pose.localized.SCHEMA`, judged."""
    scores, found = metrics(table), table.filter(table["reason"].is_null())
    if scores["judged"]:
        found = found.filter(found["translation_error"].is_valid()).sort_by([("translation_error", "descending")])
    else:
        found = found.sort_by([("inliers", "ascending"), ("query", "ascending")])
    views = localized_views(config, run, table)
    worlds = pc.count_distinct(table["world"].drop_null()).as_py() if table.num_rows else 0
    return LocalizedReport(
        metrics=scores,
        reasons=failures(table),
        sources=dict(Counter(table["camera"].drop_null().to_pylist()).most_common()),
        failed=table.filter(table["reason"].is_valid()).slice(0, LISTED + 1).to_pylist(),
        weakest=found.slice(0, LISTED).to_pylist(),
        views=views,
        hidden=worlds - len(views),
    )


def localized_views(config: Config, run: Run, table: pa.Table) -> list[Above]:
    """The worlds that queries were found in, those with most queries first, `WORLDS` at most."""
    found = table.filter(table["reason"].is_null())
    judged = found["translation_error"].null_count < found.num_rows
    colour = found["translation_error"] if judged else found["inliers"].cast(pa.float64())
    values = colour.to_numpy(zero_copy_only=False).astype(float)  # null becomes NaN
    poses, worlds, names = poses_of(found), np.array(found["world"].to_pylist(), object), found["query"].to_pylist()
    database, truth = _cameras(config, run, names)
    views = []
    for world, _ in sorted(Counter(worlds.tolist()).items(), key=lambda each: (-each[1], each[0]))[:WORLDS]:
        here = np.flatnonzero(worlds == world)
        true = [truth.get((names[row], world), np.full(3, np.nan)) for row in here]
        views.append(
            Above(
                title=world,
                database=database.get(world, np.zeros((0, 3, 4))),
                points=_map_points(config, world),
                queries=poses[here],
                values=values[here],
                truth=np.array(true),
                measured=ERROR if judged else INLIERS,
            )
        )
    return views


def _cameras(
    config: Config, run: Run, queries: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Poses of the map's cameras (n, 3, 4) by world, and where queries truly stood (3,) by name and world."""
    mapped = _posed(files.join(config.map_path, "cameras.parquet"))
    known = _posed(run.path("cameras.parquet"))
    asked = pc.is_in(known["name"], pa.array(queries, pa.string()))
    truth, rest = known.filter(asked), known.filter(pc.invert(asked))
    database = mapped if mapped.num_rows else rest
    worlds, poses = np.array(database["world"].to_pylist(), object), _matrices(database)
    where = zip(truth["name"].to_pylist(), truth["world"].to_pylist(), strict=True)
    return (
        {world: poses[worlds == world] for world in dict.fromkeys(worlds.tolist())},
        dict(zip(where, center(_matrices(truth)), strict=True)),
    )


def _posed(path: str) -> pa.Table:
    """name, world and pose of the cameras in a table of `vop.cameras` whose pose is known; none where it is not."""
    table = Cameras.read(path).table if files.exists(path) else Cameras.of([]).table
    return table.filter(table["cam_from_world"].is_valid()).select(["name", "world", "cam_from_world"])


def _matrices(table: pa.Table) -> np.ndarray:
    """The poses of such a table, (n, 3, 4)."""
    return np.array(table["cam_from_world"].to_pylist(), np.float64).reshape(-1, 4, 4)[:, :3]


def _map_points(config: Config, world: str) -> np.ndarray:
    """Some points of a world in the triangulated map, (p, 3): of images spread over it; none where there is no map."""
    path = files.join(config.map_path, "map.parquet")
    if not files.exists(path):
        return np.zeros((0, 3))
    with files.opened(path) as source, pq.ParquetFile(source) as file:
        if not {"world", "xyz"} <= {*file.schema_arrow.names} or not file.num_row_groups:
            return np.zeros((0, 3))
        chosen = evenly_spread(file.num_row_groups, GROUPS).tolist()
        table = file.read_row_groups(chosen, columns=["world", "xyz"])
    here = table.filter(pc.equal(table["world"], world))["xyz"].combine_chunks()
    points = here.flatten().to_numpy(zero_copy_only=False).reshape(-1, 3)
    return points[evenly_spread(len(points), POINTS)]


def write_localized(config: Config, run: Run, table: pa.Table) -> None:
    """Write the map from above by itself, localized.png and localized.svg; nothing where no query has a pose."""
    _write(run, localized_views(config, run, table), LOCALIZED_PICTURES)


def models_report(run: Run) -> ModelsReport:
    """The section of a run that reconstructed models: from models.parquet, registered.parquet and the models."""
    rows = read_parquet(run.path("models.parquet")).to_pylist()
    return ModelsReport(rows, run.counts.get("images_not_registered", {}), model_views(run))


def model_views(run: Run) -> list[Above]:
    """The models from above, the largest, `WORLDS` at most."""
    models, registered = (read_parquet(run.path(f"{name}.parquet")) for name in ("models", "registered"))
    views = []
    for row in models.slice(0, WORLDS).to_pylist():
        mine = registered.filter(pc.equal(registered["model"], row["model"]))
        poses = np.array(mine["cam_from_world"].to_pylist(), np.float64).reshape(-1, 3, 4)
        folder = files.join(run.path("models"), str(row["model"]))
        views.append(Above(f"models/{row['model']}", poses, _model_points(folder, row["points"])))
    return views


def _model_points(folder: str, count: int) -> np.ndarray:
    """Some points of a COLMAP model, (p, 3); none of one that is too large, gone, or cannot be read here."""
    if count > LARGEST or not files.exists(files.join(folder, "points3D.bin")):
        return np.zeros((0, 3))
    try:
        with files.at_hand(folder) as local:
            points = load_pycolmap().Reconstruction(local).points3D
    except (ImportError, ValueError):
        return np.zeros((0, 3))
    ids = sorted(points)
    return np.array([points[ids[at]].xyz for at in evenly_spread(len(ids), POINTS)], np.float64).reshape(-1, 3)


def write_models(run: Run) -> None:
    """Write the models from above by themselves, models.png and models.svg; nothing where there is none."""
    _write(run, model_views(run), MODEL_PICTURES)


def _write(run: Run, views: Sequence[Above], names: Sequence[str]) -> None:
    for name in names if views else ():
        files.write_bytes(run.path(name), above_file(views, name.rpartition(".")[2]))
