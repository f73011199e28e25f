"""Where photographs were taken: from cameras.json, a table of positions, or the GPS tags of the photographs.

Positions are metres in any fixed frame; only distances between images are used. Latitude and longitude become points on
a sphere, whose chords differ from distances on the ground by less than 0.6%. Altitude from GPS is left out: it is the
least certain number of the three.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from PIL import ExifTags, Image

from vop import files
from vop.datasets.posed import CAMERAS, PosedFolder

EARTH_RADIUS = 6_371_008.8  # metres, the mean radius of WGS 84
READERS = 16  # files opened at a time: reading tags is waiting
MEANING = {"x": "metres", "y": "metres", "z": "metres", "lat": "degrees", "lon": "degrees"}


class PositionsError(ValueError):
    """Positions that are unknown, or that no image of the collection has."""


def read_positions(source: str | None, root: str, names: Sequence[str]) -> np.ndarray:
    """Positions of images, (N, 3) float64 metres, NaN where unknown.

    Args:
        source: a folder with cameras.json; a Parquet or CSV file with the columns name and x, y (and z), metres, or
            lat, lon, degrees; None: the cameras.json of the collection if it has one, else the photographs' GPS tags.
        root: folder of the images, or "" where they are not at hand.
        names: the images, relative to the root.

    Raises:
        PositionsError: the position of no image is known, or the table lacks a column.
        FileNotFoundError: nothing is at `source`.
    """
    beside = (root, root.removesuffix("/images")) if root else ()
    folder = next((place for place in beside if files.exists(files.join(place, CAMERAS))), None)
    if source is not None and source.lower().endswith((".csv", ".parquet")):
        known = _from_table(source)
    elif source is not None or folder is not None:
        source = source or folder
        known = _from_cameras(source, root)
    elif root:
        source = f"the GPS tags of the images in {root}"
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda name: _gps(files.join(root, name)), names)
            known = {name: position for name, position in zip(names, found, strict=True) if position is not None}
    else:
        raise PositionsError("the images are not at hand, only their store: give positions=FILE for pairs.neighbours")
    unknown = np.full(3, np.nan)
    positions = np.array([known.get(name, unknown) for name in names], np.float64).reshape(-1, 3)
    if not np.isfinite(positions).all(axis=1).any():
        example = f", such as {next(iter(known))!r}" if known else ""
        raise PositionsError(
            f"{source} gives positions of {len(known)} images{example}, but of none of the {len(names)} here, such as "
            f"{names[0]!r}: name them so, give other positions=FILE, or leave out pairs.neighbours"
        )
    return positions


def on_sphere(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Points (N, 3) metres of latitudes and longitudes (N,), degrees."""
    lat, lon = np.radians(latitude), np.radians(longitude)
    return EARTH_RADIUS * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def _from_cameras(folder: str, root: str) -> dict[str, np.ndarray]:
    """Camera centres; names relative to `root` where the images of the folder lie below it."""
    posed = PosedFolder.open(folder)
    below = posed.root.removeprefix(f"{root}/") if root and posed.root.startswith(f"{root}/") else ""
    centers = (camera.center for camera in posed.cameras)
    return {files.join(below, name) if below else name: c for name, c in zip(posed.names, centers, strict=True)}


def _from_table(path: str) -> Mapping[str, np.ndarray]:
    types = csv.ConvertOptions(column_types={"name": pa.string()} | dict.fromkeys(MEANING, pa.float64()))
    with files.opened(path, whole=True) as file:
        parquet = path.lower().endswith(".parquet")
        table = pq.read_table(file) if parquet else csv.read_csv(file, convert_options=types)
    columns = set(table.column_names)
    chosen = next((c for c in (("x", "y", "z"), ("x", "y"), ("lat", "lon")) if {"name", *c} <= columns), None)
    if chosen is None:
        raise PositionsError(
            f"{path} has the columns {table.column_names}; needed are name and x, y (and z) in metres, or name and "
            "lat, lon in degrees"
        )
    values = np.stack([table[column].to_numpy().astype(np.float64) for column in chosen], axis=1)  # null becomes NaN
    points = on_sphere(*values.T) if chosen == ("lat", "lon") else np.pad(values, ((0, 0), (0, 3 - values.shape[1])))
    return dict(zip(table["name"].to_pylist(), points, strict=True))


def _gps(path: str) -> np.ndarray | None:
    """Position (3,) of a photograph by its GPS tags; None without them, or if they cannot be read."""
    with files.opened(path, whole=True) as stream:  # seekable: of a local file only the head is read
        try:
            with Image.open(stream) as image:
                tags = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
            latitude = _degrees(tags[ExifTags.GPS.GPSLatitude], tags[ExifTags.GPS.GPSLatitudeRef], "S")
            longitude = _degrees(tags[ExifTags.GPS.GPSLongitude], tags[ExifTags.GPS.GPSLongitudeRef], "W")
        except Exception:  # Pillow raises a dozen kinds for broken tags; an image without position is no failure
            return None
    return on_sphere(latitude, longitude)


def _degrees(parts: Sequence[float], reference: str, negative: str) -> float:
    degrees, minutes, seconds = map(float, parts)
    return (degrees + minutes / 60 + seconds / 3600) * (-1 if reference.strip("\0 ").upper() == negative else 1)
