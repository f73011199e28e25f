import math

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from vop.datasets.posed import PosedFolder, write_cameras
from vop.datasets.positions import PositionsError, on_sphere, read_positions


def photograph(path, gps=None):
    """A JPEG with GPS tags {tag: value}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps or {})
    Image.new("RGB", (8, 8)).save(path, exif=exif)


def gps(latitude, longitude):
    """Degrees, minutes and seconds of a position, as a camera writes them."""

    def parts(value):
        minutes, seconds = divmod(abs(value) * 3600, 60)
        return (minutes // 60, minutes % 60, seconds)

    tags = ExifTags.GPS
    return {
        tags.GPSLatitudeRef: "S" if latitude < 0 else "N", tags.GPSLatitude: parts(latitude),
        tags.GPSLongitudeRef: "W" if longitude < 0 else "E", tags.GPSLongitude: parts(longitude),
    }  # fmt: skip


def test_on_sphere_gives_metres():
    here, north, east = on_sphere(np.array([47.0, 47.001, 47.0]), np.array([8.0, 8.0, 8.001]))
    degree = 2 * math.pi * 6_371_008.8 / 360
    assert math.dist(here, north) == pytest.approx(0.001 * degree, rel=1e-6)
    assert math.dist(here, east) == pytest.approx(0.001 * degree * math.cos(math.radians(47)), rel=1e-6)


def test_gps_tags_are_read(tmp_path):
    photograph(tmp_path / "a/1.jpg", gps(47.5, 8.25))
    photograph(tmp_path / "2.jpg", gps(-33.123456, -70.5))
    photograph(tmp_path / "none.jpg")
    photograph(tmp_path / "half.jpg", {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (1.0, 2.0, 3.0)})
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    names = ["a/1.jpg", "none.jpg", "2.jpg", "half.jpg", "broken.jpg"]
    found = read_positions(None, str(tmp_path), names)
    np.testing.assert_allclose(found[[0, 2]], on_sphere(np.array([47.5, -33.123456]), np.array([8.25, -70.5])), atol=1)
    assert np.isnan(found[[1, 3, 4]]).all()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_in_metres_and_degrees(tmp_path, kind):
    def read(columns):
        path, table = tmp_path / f"positions.{kind}", pa.table(columns)
        if kind == "csv":
            csv.write_csv(table, path)
        else:
            pq.write_table(table, path)
        return read_positions(str(path), "", ["007", "b.jpg", "absent"])

    names = ["b.jpg", "007", "another"]
    unknown = [math.nan] * 3
    np.testing.assert_array_equal(
        read({"name": names, "x": [1, 2, 3], "y": [4.5, 5.5, 6.5], "z": [7.0, 8.0, 9.0]}),
        [[2, 5.5, 8], [1, 4.5, 7], unknown],
    )
    np.testing.assert_array_equal(
        read({"y": [4.5, 5.5, 6.5], "name": names, "x": [1.0, 2.0, 3.0]}), [[2, 5.5, 0], [1, 4.5, 0], unknown]
    )
    np.testing.assert_array_equal(
        read({"name": names, "x": [1.0, 2.0, 3.0], "y": [4.5, None, 6.5]})[:2], [[2, math.nan, 0], [1, 4.5, 0]]
    )
    degrees = read({"name": names, "lat": [1.0, 2.0, 3.0], "lon": [4.0, 5.0, 6.0]})
    np.testing.assert_array_equal(degrees[:2], on_sphere(np.array([2.0, 1.0]), np.array([5.0, 4.0])))
    with pytest.raises(PositionsError, match=r"'lat'.*needed are name and x, y"):
        read({"name": names, "lat": [1.0, 2.0, 3.0]})
    with pytest.raises(PositionsError, match=r"of 1 images, such as 'other'.*none of the 3 here, such as '007'"):
        read({"name": ["other"], "x": [1.0], "y": [2.0]})


def test_cameras_beside_the_images_are_found(rendered_collection, tmp_path):
    posed = PosedFolder.open(rendered_collection)
    centers = np.stack([camera.center for camera in posed.cameras])
    np.testing.assert_array_equal(read_positions(None, str(rendered_collection), posed.names), centers)
    np.testing.assert_array_equal(read_positions(str(rendered_collection), "", posed.names), centers)
    # cameras.json above `images/`, whose names count from there
    (tmp_path / "images").mkdir()
    write_cameras(tmp_path, dict(zip(posed.names, posed.cameras, strict=True)))
    photographed = read_positions(None, str(tmp_path / "images"), posed.names)
    np.testing.assert_array_equal(photographed, centers)
    from_above = read_positions(None, str(tmp_path), [f"images/{name}" for name in posed.names])
    np.testing.assert_array_equal(from_above, centers)


def test_unknown_positions_are_refused(tmp_path):
    photograph(tmp_path / "1.jpg")
    with pytest.raises(PositionsError, match=r"GPS tags of the images in .* of none of the 1 here"):
        read_positions(None, str(tmp_path), ["1.jpg"])
    with pytest.raises(PositionsError, match="not at hand"):
        read_positions(None, "", ["1.jpg"])
    with pytest.raises(FileNotFoundError):
        read_positions(str(tmp_path / "no.csv"), "", ["1.jpg"])
    with pytest.raises(FileNotFoundError, match=r"no cameras\.json"):
        read_positions(str(tmp_path / "folder"), "", ["1.jpg"])
