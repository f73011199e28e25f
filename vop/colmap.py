"""A COLMAP database of features and matches, for reconstruction to follow (`pycolmap.incremental_mapping`).

It holds cameras, images (numbered by name from 1), keypoints, matches and two-view geometries; no descriptors, which
COLMAP knows in formats of its own only. Pixel centres lie at +0.5 for COLMAP as they do here. Images are upright here,
while COLMAP leaves EXIF orientation out: of photographs that are turned by it the geometry is right, but COLMAP takes
colours from the wrong pixels and cannot undistort them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from os import cpu_count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image
from PIL.ExifTags import IFD, Base

from vop import files
from vop.cameras import CamerasError, KnownCamera, load_pycolmap
from vop.matches import matches_of

if TYPE_CHECKING:
    import pycolmap

FOCAL_FACTOR = 1.2  # long sides: what COLMAP takes for a focal length of which nothing is known
KNOWN, EXIF, GUESSED = "known", "with the focal length of their EXIF", f"guessed as {FOCAL_FACTOR} x the long side"
MISFIT = "guessed, for the known one is of another image size"
LARGEST_SHEAR = 0.5  # pixels, at the border of the image: COLMAP's cameras have no skew
CACHED_IMAGES = 1024  # images whose keypoints are kept while pairs are verified
IMAGES = pa.schema(
    [
        ("name", pa.string()),
        ("width", pa.int32()),  # pixels of the upright image
        ("height", pa.int32()),
        ("model", pa.string()),  # COLMAP's name of the camera model
        ("params", pa.list_(pa.float64())),  # its parameters, in COLMAP's order
        ("calibrated", pa.bool_()),  # whether the focal length is known, be it from EXIF
        ("source", pa.string()),  # how the camera is known: `KNOWN`, `EXIF`, `GUESSED` or `MISFIT`
        ("shared", pa.string()),  # equal in images of one and the same camera; null: the image has its own
    ]
)


class ColmapError(ValueError):
    """What a COLMAP database cannot hold, or a place where it cannot be written."""


@contextmanager
def database(path: str) -> "Iterator[pycolmap.Database]":
    """Open a new database. The file appears when the context ends without an error, whole, and replaces an older one.

    Raises ImportError without pycolmap.
    """
    with files.atomic(path) as (_, inner):
        with load_pycolmap().Database.open(inner) as db:
            yield db
        if files.is_local(path):
            for leftover in ("-wal", "-shm"):  # of the older database: SQLite would replay them into the new one
                files.remove(f"{path}{leftover}")


@dataclass(frozen=True, eq=False)
class ImageCamera:
    """The camera of an image: how it is known (`KNOWN`, `EXIF` or `GUESSED`), and the camera for COLMAP.

    shared: what images of one and the same camera have in common; None: this image has its own.
    """

    source: str
    camera: "pycolmap.Camera"
    shared: object


def known_camera(camera: KnownCamera, size: tuple[int, int]) -> ImageCamera:
    """The calibrated camera of an image of this size (width, height); images of equal calibration share it.

    Raises `CamerasError` where it does not fit the size, `ColmapError` for a skew that COLMAP's models do not have.
    """
    fitted = camera.fitted(*size)
    (fx, skew, cx), (_, fy, cy) = fitted.K[:2]
    shear = abs(skew) / fy * max(cy, size[1] - cy)
    if shear > LARGEST_SHEAR:
        raise ColmapError(
            f"K of {camera.name!r} has skew {skew:g}, which moves points by up to {shear:.2g} pixels (at most "
            f"{LARGEST_SHEAR:g}): COLMAP has no camera model with skew; give K without it, or no cameras"
        )
    model, params = fitted.model, fitted.params
    if model is None:
        model, params = ("SIMPLE_PINHOLE", (fx, cx, cy)) if fx == fy else ("PINHOLE", (fx, fy, cx, cy))
    return ImageCamera(KNOWN, _camera(model, params, size, True), (model, *size, *params))


def guessed_camera(path: str, size: tuple[int, int]) -> ImageCamera:
    """COLMAP's guess of the camera that took a photograph of this upright size (width, height): SIMPLE_RADIAL.

    The focal length is that of its EXIF; images with the same camera and focal length there share one. Without, or
    where the file cannot be read here, it is `FOCAL_FACTOR` times the long side.
    """
    focal, maker = exif_of(path)
    width, height = size
    params = (focal or FOCAL_FACTOR * max(size), width / 2, height / 2, 0.0)
    camera = _camera("SIMPLE_RADIAL", params, size, bool(focal))
    return ImageCamera(EXIF if focal else GUESSED, camera, (maker, *size, focal) if maker else None)


def exif_of(path: str) -> tuple[float | None, str | None]:
    """The focal length in pixels of the file that the EXIF of a photograph gives, and its camera as COLMAP names it.

    From the equivalent of 35 mm film, by the diagonal; else from the focal length and the pixels per length of the
    sensor, for which the file must be of the size that was taken, or say what that was; else by COLMAP's list of
    sensors. Each is the same for an image that is turned upright. None for what is not known, nothing where the file
    cannot be read. Decodes the image.
    """
    if not files.exists(path):
        return None, None
    with files.at_hand(path) as local:
        bitmap = load_pycolmap().Bitmap.read(local, False)
        if bitmap is None:
            return None, None
        focal = bitmap.exif_focal_length()
        if focal:
            focal *= _reduced(local)
    return (focal if focal and np.isfinite(focal) and focal > 0 else None), bitmap.exif_camera_model()


def _reduced(path: str) -> float:
    """How much smaller a photograph is than taken, where COLMAP has its focal length from pixels of the sensor."""
    try:
        with Image.open(path) as image:
            tags, longest = image.getexif().get_ifd(IFD.Exif), max(image.size)
        taken = max(tags.get(Base.ExifImageWidth, 0), tags.get(Base.ExifImageHeight, 0))
        by_sensor = tags.get(Base.FocalPlaneXResolution) and 2 <= tags.get(Base.FocalPlaneResolutionUnit, 0) <= 5
        return longest / taken if by_sensor and taken > 0 and not tags.get(Base.FocalLengthIn35mmFilm) else 1.0
    except (OSError, ValueError, TypeError, SyntaxError):  # what COLMAP reads and Pillow does not, and broken tags
        return 1.0


def _camera(model: str, params: Iterable[float], size: tuple[int, int], calibrated: bool) -> "pycolmap.Camera":
    width, height = size
    camera = load_pycolmap().Camera(model=model, width=width, height=height, params=list(params))
    camera.has_prior_focal_length = calibrated
    return camera


def camera_of(known: KnownCamera | None, size: tuple[int, int], path: Callable[[], str]) -> ImageCamera:
    """The known camera of an image, or where there is none with intrinsics, or it is of another size, its guess.

    `path` gives the file of the image, if it comes to guessing.
    """
    if known is None or known.K is None:
        return guessed_camera(path(), size)
    try:
        return known_camera(known, size)
    except CamerasError:
        return replace(guessed_camera(path(), size), source=MISFIT)


def described(name: str, found: ImageCamera) -> dict:
    """The camera of an image as a row of `IMAGES`."""
    camera, shared = found.camera, found.shared
    return {
        "name": name,
        "width": camera.width,
        "height": camera.height,
        "model": camera.model_name,
        "params": camera.params.tolist(),
        "calibrated": camera.has_prior_focal_length,
        "source": found.source,
        "shared": None if shared is None else repr(shared),
    }


def image_cameras(table: pa.Table) -> dict[str, ImageCamera]:
    """The cameras of images by name, from a table of `IMAGES`."""
    return {
        row["name"]: ImageCamera(
            row["source"],
            _camera(row["model"], row["params"], (row["width"], row["height"]), row["calibrated"]),
            row["shared"],
        )
        for row in table.to_pylist()
    }


def add_images(db: "pycolmap.Database", cameras: Mapping[str, ImageCamera]) -> dict[str, int]:
    """Write the images of these names and their cameras, each camera a rig of its own; returns the ids of images."""
    pycolmap = load_pycolmap()
    camera_ids: dict[object, int] = {}
    ids = {name: number for number, name in enumerate(sorted(cameras), 1)}
    with pycolmap.DatabaseTransaction(db):
        for name, number in ids.items():
            each = cameras[name]
            shared = each.shared or name
            if shared not in camera_ids:
                camera_ids[shared] = each.camera.camera_id = db.write_camera(each.camera)
                rig = pycolmap.Rig(rig_id=each.camera.camera_id)
                rig.add_ref_sensor(each.camera.sensor_id)
                db.write_rig(rig, use_rig_id=True)
            image = pycolmap.Image(name=name, camera_id=camera_ids[shared], image_id=number)
            db.write_image(image, use_image_id=True)
            frame = pycolmap.Frame(frame_id=number, rig_id=camera_ids[shared])
            frame.add_data_id(image.data_id)
            db.write_frame(frame, use_frame_id=True)
    return ids


def add_keypoints(
    db: "pycolmap.Database", ids: Mapping[str, int], parts: Iterable[Iterable[tuple[str, np.ndarray]]]
) -> Iterator[int]:
    """Write the keypoints (n, 2) of named images, a part in a transaction; yields the number of images of each."""
    for part in parts:
        written = 0
        with load_pycolmap().DatabaseTransaction(db):
            for name, keypoints in part:
                db.write_keypoints(ids[name], keypoints)
                written += 1
        yield written


def add_matches(
    db: "pycolmap.Database", ids: Mapping[str, int], tables: Iterable[pa.Table], seed: int
) -> Iterator[tuple[int, int]]:
    """Write the matches of pairs (columns image0, image1, matches) and verify each pair; images lie in the database.

    A pair is verified as COLMAP's own matcher would do it, with its default options, from the same seed, so that the
    geometry of a pair follows from its matches and cameras alone. Yields for each table, a transaction, the numbers
    of pairs and of those verified.
    """
    pycolmap = load_pycolmap()
    keypoints = lru_cache(CACHED_IMAGES)(lambda number: db.read_keypoints(number).astype(np.float64))
    cameras = lru_cache(CACHED_IMAGES)(lambda number: db.read_camera(db.read_image(number).camera_id))
    options, unusable = two_view_options(seed), unusable_kinds()
    with ThreadPoolExecutor(cpu_count()) as threads:
        for table in tables:
            sides = [[ids[name] for name in table[side].to_pylist()] for side in ("image0", "image1")]
            pairs, found = [*zip(*sides, strict=True)], [each.astype(np.uint32) for each in matches_of(table)]
            geometries = [
                threads.submit(
                    pycolmap.estimate_two_view_geometry,
                    *(cameras(id0), keypoints(id0), cameras(id1), keypoints(id1), matches, options),
                )
                for (id0, id1), matches in zip(pairs, found, strict=True)
            ]
            verified = 0
            with pycolmap.DatabaseTransaction(db):
                for pair, matches, geometry in zip(pairs, found, geometries, strict=True):
                    db.write_matches(*pair, matches)
                    db.write_two_view_geometry(*pair, geometry.result())
                    verified += geometry.result().config not in unusable
            yield len(pairs), verified


def two_view_options(seed: int) -> "pycolmap.TwoViewGeometryOptions":
    """COLMAP's own options to verify a pair, which then follows from its matches and cameras alone."""
    options = load_pycolmap().TwoViewGeometryOptions()
    options.ransac.random_seed = seed
    return options


def unusable_kinds() -> tuple:
    """The kinds of two-view geometry that COLMAP takes no part of a pair's matches from."""
    kinds = load_pycolmap().TwoViewGeometryConfiguration
    return kinds.UNDEFINED, kinds.DEGENERATE, kinds.WATERMARK
