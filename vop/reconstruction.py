"""From verified pairs to COLMAP models: what the mapping stage does, as plain callables that read for themselves."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import colmap, files, view_graph
from vop.cameras import load_pycolmap
from vop.features import FeatureStore
from vop.pair_verification import SCHEMA as GEOMETRIES
from vop.pair_verification import geometry_of, read_keypoints
from vop.parts import Parts
from vop.point_colors import paint
from vop.schema import ReconstructConfig

if TYPE_CHECKING:
    import pycolmap

DATABASE, VERIFIED, MODELS = "database.db", "verified.parquet", "models"
MADE_BY = "made_by"
PAIRS_AT_ONCE = 4096  # written in one transaction
MOST_MODELS = 1_000_000  # COLMAP's own bound of 50 would lose scenes
PAIRS = pa.schema(
    [
        ("image0", pa.string()),
        ("image1", pa.string()),
        ("matches", pa.int32()),
        ("inliers", pa.int32()),  # matches that agree with the geometry
        ("reason", pa.string()),  # why the pair takes no part; null: it does
    ]
)
PART = pa.schema(
    [
        ("image", pa.string()),
        ("model", pa.int32()),
        ("cam_from_world", pa.list_(pa.float64())),  # the upper three rows, row-major, in the model's own world
        ("points", pa.int32()),  # of the model, seen by the image
        ("model_points", pa.int64()),  # of the model
        ("observations", pa.int64()),
        ("reprojection_error", pa.float64()),
    ]
)
MODEL = pa.schema(
    [
        ("model", pa.int32()),  # from 0, the one with most images first: its folder below `models`
        ("images", pa.int32()),
        ("points", pa.int64()),
        ("observations", pa.int64()),
        ("reprojection_error", pa.float64()),  # mean over the observations, pixels
        ("track_length", pa.float64()),  # mean number of images that see a point
    ]
)


@dataclass(frozen=True)
class DatabaseWriter:
    """Chooses the pairs to trust, and writes them for COLMAP.

    images: where the images lie that have features, a table of `colmap.IMAGES` with their
    `path` and, there, their `shard` and `row`.
    geometries: `count` parts with the verified pairs.
    """

    config: ReconstructConfig
    features: FeatureStore
    images: str
    geometries: Parts
    count: int
    output: str

    def __call__(self, made_by: str) -> None:
        """Write database.db with the trusted pairs, then verified.parquet, which says what became of every pair.

        made_by: what it all follows from, for the metadata of verified.parquet.
        """
        pairs = pa.concat_tables([GEOMETRIES.empty_table(), *self.geometries.read(self.count)])
        pairs = pairs.sort_by([("image0", "ascending"), ("image1", "ascending")]).combine_chunks()
        images = _read(self.images)
        reasons = self._reasons(pairs, images)
        self._write(images, pairs.filter(reasons.is_null()))
        told = pa.table(
            {
                **{name: pairs[name] for name in ("image0", "image1", "matches")},
                "inliers": pc.fill_null(pc.list_value_length(pairs["inliers"]), 0),
                "reason": reasons,
            }
        ).cast(PAIRS)
        write_table(files.join(self.output, VERIFIED), told, made_by)

    def _reasons(self, pairs: pa.Table, images: pa.Table) -> pa.Array:
        """Why pairs take no part: verified they were not, or the other pairs contradict them."""
        reasons = np.array(pairs["reason"].to_pylist(), object)
        good = np.flatnonzero(pairs["reason"].is_null().to_numpy())
        if self.config.consistent and len(good):
            graph = view_graph.of(pairs.take(good), images, self._keypoints(images))
            reasons[good] = view_graph.distrusted(graph, self.config.strength)
        return pa.array(reasons.tolist(), pa.string())

    def _keypoints(self, images: pa.Table) -> dict[str, np.ndarray]:
        """The keypoints (n, 2) float32 of all images."""
        places = zip(images["shard"].to_pylist(), images["row"].to_pylist(), strict=True)
        names = dict(zip(places, images["name"].to_pylist(), strict=True))
        return {names[place]: found for place, found in read_keypoints(self.features, set(names))}

    def _write(self, images: pa.Table, pairs: pa.Table) -> None:
        keypoints = self._keypoints(images)
        cameras = {name: camera for name, camera in colmap.image_cameras(images).items() if name in keypoints}
        pycolmap = load_pycolmap()
        with colmap.database(files.join(self.output, DATABASE)) as db:
            ids = colmap.add_images(db, cameras)
            for _ in colmap.add_keypoints(db, ids, [keypoints.items()]):
                pass
            for start in range(0, pairs.num_rows, PAIRS_AT_ONCE):
                part = pairs.slice(start, PAIRS_AT_ONCE)
                with pycolmap.DatabaseTransaction(db):
                    for row, inliers in zip(part.drop(["inliers"]).to_pylist(), inliers_of(part), strict=True):
                        pair = ids[row["image0"]], ids[row["image1"]]
                        geometry = geometry_of(row, inliers)
                        db.write_matches(*pair, geometry.inlier_matches)
                        db.write_two_view_geometry(*pair, geometry)


def inliers_of(pairs: pa.Table) -> list[np.ndarray]:
    """The inliers (m, 2) int32 of every row of a table with that column."""
    return [np.array(each, np.int32).reshape(-1, 2) for each in pairs["inliers"].to_pylist()]


@dataclass(frozen=True)
class Mapper:
    """Makes the models of images that hang together, and writes each into a folder of its own.

    The same images of the same database give the same bytes, whatever else is in it.
    """

    config: ReconstructConfig
    images: str
    output: str
    parts: Parts
    max_pixels: int

    def __call__(self, part: int, names: list[str]) -> dict:
        """Write the models of these images into folders of part `part` (`place`), then the part: `PART`.

        Returns part, images (that were asked for) and registered (how many the models hold).
        """
        rows = []
        with (
            tempfile.TemporaryDirectory(prefix="vop-mapping-") as folder,
            files.at_hand(files.join(self.output, DATABASE)) as database,
        ):
            copy = str(shutil.copy(database, Path(folder) / DATABASE))  # SQLite writes beside what it reads
            paths = _read(self.images, ["name", "path"])
            paths = dict(zip(paths["name"].to_pylist(), paths["path"].to_pylist(), strict=True))
            for number, model in enumerate(self._models(copy, names, Path(folder))):
                paint(model, paths, self.max_pixels)
                rows += _registered(model, number)
                written = Path(folder) / f"model-{number}"
                written.mkdir()
                model.write_binary(written)
                for file in sorted(written.iterdir()):
                    files.write_bytes(files.join(place(self.parts, part, number), file.name), file.read_bytes())
        self.parts.write(part, pa.Table.from_pylist(rows, schema=PART))
        return {"part": part, "images": len(names), "registered": len({row["image"] for row in rows})}

    def _models(self, database: str, names: list[str], folder: Path) -> "list[pycolmap.Reconstruction]":
        """The models of at least `min_model_size` images, the one with most images first."""
        pycolmap = load_pycolmap()
        images = _read(self.images, ["name", "source"])
        known = {row["name"] for row in images.to_pylist() if row["source"] == colmap.KNOWN} & {*names}
        with pycolmap.Database.open(database) as db:
            fixed = {image.camera_id for image in db.read_all_images() if image.name in known}
        options = (_incremental if self.config.mapper == "incremental" else _global)(self.config, fixed)
        options.image_names = names
        if len(known) == len(names):
            _keep_intrinsics(options)
        mapping = getattr(pycolmap, f"{self.config.mapper}_mapping")
        found = folder / "found"
        found.mkdir()
        models = mapping(database, folder, found, options).values()  # the folder of images is not looked into
        kept = [model for model in models if model.num_reg_images() >= self.config.min_model_size]
        return sorted(kept, key=lambda model: (-model.num_reg_images(), min(_names(model))))


def place(parts: Parts, part: int, number: int) -> str:
    """The folder of one model of a part, the largest being number 0."""
    return files.join(parts.path, f"{part:06d}", str(number))


def _incremental(config: ReconstructConfig, fixed: set[int]) -> "pycolmap.IncrementalPipelineOptions":
    options = load_pycolmap().IncrementalPipelineOptions()
    options.min_num_matches, options.min_model_size = config.min_inliers, config.min_model_size
    options.max_num_models = MOST_MODELS
    options.extract_colors = False
    options.constant_cameras = options.mapper.constant_cameras = fixed
    for each in (options, options.mapper, options.triangulation):
        each.random_seed = config.seed
    options.num_threads = options.mapper.num_threads = config.threads
    return options


def _global(config: ReconstructConfig, fixed: set[int]) -> "pycolmap.GlobalPipelineOptions":
    """Its bundle adjustment keeps all intrinsics or none, so `fixed` ones are refined where others are guessed."""
    options = load_pycolmap().GlobalPipelineOptions()
    options.min_num_matches, options.min_model_size = config.min_inliers, config.min_model_size
    mapper = options.mapper
    for each in (options, mapper, mapper.rotation_averaging, mapper.global_positioning, mapper.retriangulation):
        each.random_seed = config.seed
    options.num_threads = mapper.num_threads = config.threads
    return options


def _keep_intrinsics(options) -> None:
    """Refine no intrinsics: all are known."""
    if hasattr(options.mapper, "bundle_adjustment"):
        for name in ("refine_focal_length", "refine_principal_point", "refine_extra_params"):
            setattr(options.mapper.bundle_adjustment, name, False)
        return
    for name in ("focal_length", "principal_point", "extra_params"):
        setattr(options, f"ba_refine_{name}", False)
    options.mapper.abs_pose_refine_focal_length = options.mapper.abs_pose_refine_extra_params = False


def _names(model: "pycolmap.Reconstruction") -> list[str]:
    return [model.image(number).name for number in model.reg_image_ids()]


def _registered(model: "pycolmap.Reconstruction", number: int) -> Iterator[dict]:
    """The rows of a model in its part."""
    whole = {
        "model": number,
        "model_points": model.num_points3D(),
        "observations": model.compute_num_observations(),
        "reprojection_error": model.compute_mean_reprojection_error(),
    }
    for image in sorted((model.image(each) for each in model.reg_image_ids()), key=lambda image: image.name):
        pose = image.cam_from_world().matrix()
        yield {"image": image.name, "cam_from_world": pose.ravel(), "points": image.num_points3D} | whole


def models_of(registered: pa.Table) -> pa.Table:
    """The models (`MODEL`) that a table with the columns of `PART` speaks of, in their order."""
    found = {row["model"]: row for row in registered.to_pylist() if row["model"] is not None}
    sizes = {each["values"]: each["counts"] for each in pc.value_counts(registered["model"]).to_pylist()}
    rows = [
        {
            "model": number,
            "images": sizes[number],
            "points": row["model_points"],
            "observations": row["observations"],
            "reprojection_error": row["reprojection_error"],
            "track_length": row["observations"] / row["model_points"] if row["model_points"] else None,
        }
        for number, row in sorted(found.items())
    ]
    return pa.Table.from_pylist(rows, schema=MODEL)


def write_table(path: str, table: pa.Table, made_by: str) -> None:
    """Write a table as Parquet that tells in its metadata what it follows from."""
    table = table.replace_schema_metadata({MADE_BY: made_by})
    with files.atomic(path) as (filesystem, inner):
        pq.write_table(table, inner, filesystem=filesystem, compression="zstd")


def made_by(path: str) -> str | None:
    """What the table at a path follows from; None where there is none."""
    try:
        with files.opened(path) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return metadata.get(MADE_BY.encode(), b"").decode() or None


def _read(path: str, columns: list[str] | None = None) -> pa.Table:
    with files.opened(path) as file:
        return pq.read_table(file, columns=columns)
