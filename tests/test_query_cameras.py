"""Where the intrinsics of queries come from: hloc's lists, known cameras, EXIF, a guess."""

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.TiffImagePlugin import IFDRational

from vop.cameras import CamerasError, KnownCamera
from vop.image import decode
from vop.query_cameras import EXIF, GUESS, KNOWN, LIST, SOURCES, choose, query_camera, read_list, read_lists

pytest.importorskip("pycolmap")

# By COLMAP's documentation: parameters of each model, and where fx, fy, cx, cy stand among them.
MODELS = {
    "SIMPLE_PINHOLE": (3, (0, 0, 1, 2)), "PINHOLE": (4, (0, 1, 2, 3)),
    "SIMPLE_RADIAL": (4, (0, 0, 1, 2)), "RADIAL": (5, (0, 0, 1, 2)),
    "OPENCV": (8, (0, 1, 2, 3)), "FULL_OPENCV": (12, (0, 1, 2, 3)), "FOV": (5, (0, 1, 2, 3)),
    "OPENCV_FISHEYE": (8, (0, 1, 2, 3)), "THIN_PRISM_FISHEYE": (12, (0, 1, 2, 3)),
    "SIMPLE_RADIAL_FISHEYE": (4, (0, 0, 1, 2)), "RADIAL_FISHEYE": (5, (0, 0, 1, 2)),
}  # fmt: skip


def params_of(model):
    count, order = MODELS[model]
    values = 0.01 * np.arange(1, count + 1)
    values[list(order)] = (500, 500, 320.5, 239.5) if order[0] == order[1] else (500, 510, 320.5, 239.5)
    return values


def camera(focal=300.0, size=(640, 480), name="a.jpg"):
    K = np.array([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]])
    return KnownCamera(name, K, None, "w", *size)


def no_exif():
    return None


@pytest.mark.parametrize("model", MODELS)
def test_every_model_of_a_line(tmp_path, model):
    values = params_of(model)
    (tmp_path / "list.txt").write_text(f"# a comment\n\n a/b.jpg {model} 640 480 {' '.join(map(str, values))}\r\n")
    (found,) = read_list(tmp_path / "list.txt")
    fx, fy, cx, cy = values[list(MODELS[model][1])]
    np.testing.assert_array_equal(found.K, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    assert (found.name, found.width, found.height, found.cam_from_world) == ("a/b.jpg", 640, 480, None)
    plain = model in ("PINHOLE", "SIMPLE_PINHOLE")
    assert (found.model, found.params) == ((None, None) if plain else (model, tuple(values)))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a.jpg PINHOLE 640 480", "0 parameters for PINHOLE, whose are fx, fy, cx, cy"),
        ("a.jpg PINHOLE 640 480 1 2 3", "3 parameters for PINHOLE"),
        ("a.jpg PINHOLE 640", "found 3 fields"),
        ("a.jpg", "found 1 fields"),
        ("a b.jpg PINHOLE 640 480 500 500 320 240", "no camera model 'b.jpg'; names cannot hold white space"),
        ("a.jpg PINHOLES 640 480 500 500 320 240", "no camera model 'PINHOLES'"),
        ("a.jpg INVALID 640 480", "expected name, COLMAP camera model"),
        ("a.jpg EQUIRECTANGULAR 640 480 640 480", "perspective"),
        ("a.jpg PINHOLE 640 x 500 500 320 240", "invalid literal"),
        ("a.jpg PINHOLE 0 480 500 500 320 240", "must be at least 1"),
        ("a.jpg PINHOLE -640 480 500 500 320 240", "expected name"),
        ("a.jpg PINHOLE 640 480 -500 500 320 240", "fx, fy above 0"),
        ("a.jpg SIMPLE_RADIAL 640 480 500 320 240 nan", "not all finite"),
        ("../a.jpg PINHOLE 640 480 500 500 320 240", "leads to a folder above"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, told):
    path = tmp_path / "list.txt"
    path.write_text(f"# first\nok.jpg PINHOLE 640 480 500 500 320 240\n{line}\n")
    with pytest.raises(CamerasError, match=r"list\.txt, line 3: expected name, COLMAP camera model, ") as error:
        list(read_list(path))
    assert told in str(error.value)


def test_not_utf8(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CamerasError, match=r"list\.txt is not UTF-8"):
        list(read_list(tmp_path / "list.txt"))


LINE = "{} SIMPLE_PINHOLE 640 480 {} 320 240\n"


@pytest.mark.parametrize("source", ["lists/day.txt", "lists", "lists/*.txt"])
def test_a_file_a_folder_a_pattern(tmp_path, source):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/day.txt").write_text(LINE.format("query/a.jpg", 400) + LINE.format("other.jpg", 1))
    (tmp_path / "lists/night.txt").write_text(LINE.format("query/b.jpg", 500))
    (tmp_path / "lists/README").write_text("not a list")
    found = read_lists(str(tmp_path / source), str(tmp_path), ["query/a.jpg", "query/b.jpg", "query/c.jpg"])
    one = source == "lists/day.txt"
    assert found.cameras.names == ["query/a.jpg"] + ([] if one else ["query/b.jpg"])
    assert found.cameras.get("query/a.jpg").K[0, 0] == 400
    assert (found.entries, found.unknown) == (2 if one else 3, 1)


@pytest.mark.parametrize("base", ["root", "root/photos/query", "root/photos", "", "root/lists"])
def test_names_may_count_from_another_folder(tmp_path, base):
    root, lists = tmp_path / "root", tmp_path / "root/lists"
    lists.mkdir(parents=True)
    queries = ["photos/query/day/a.jpg", "photos/query/night/b.jpg"]
    if base == "root/lists":
        lists = root / "photos/query"
        lists.mkdir(parents=True)
        base = "root/photos/query"
    names = [str((root / name).relative_to(tmp_path / base)) for name in queries]
    (lists / "all.txt").write_text("".join(LINE.format(name, 100 + i) for i, name in enumerate(names)))
    if base == "root/photos":  # neither the root, nor the queries' folder, nor the list's: not looked for
        with pytest.raises(CamerasError, match="no query has a camera in"):
            read_lists(str(lists), str(root), queries)
        return
    found = read_lists(str(lists), str(root), queries)
    assert found.cameras.names == queries
    assert found.unknown == 0


def test_lists_that_are_not_there_or_disagree(tmp_path):
    for missing in ("none.txt", "none", "*.txt", "."):
        with pytest.raises(FileNotFoundError, match=r"localize\.intrinsics"):
            read_lists(f"{tmp_path}/{missing}", str(tmp_path), ["a.jpg"])
    (tmp_path / "1.txt").write_text(LINE.format("a.jpg", 100))
    (tmp_path / "2.txt").write_text(LINE.format("a.jpg", 100))
    assert read_lists(str(tmp_path), str(tmp_path), ["a.jpg"]).cameras.names == ["a.jpg"]
    (tmp_path / "2.txt").write_text(LINE.format("a.jpg", 101))
    with pytest.raises(CamerasError, match=r"'a.jpg' has two cameras: one in .*1\.txt, and another one in .*2\.txt"):
        read_lists(str(tmp_path), str(tmp_path), ["a.jpg"])


def test_order_of_sources():
    size = (640, 480)
    listed, known, blind = camera(100), camera(200), KnownCamera("a.jpg", None, np.eye(4))
    assert SOURCES == (LIST, KNOWN, EXIF, GUESS)
    cases = [
        (listed, known, 300, 1.2, 100, LIST),
        (None, known, 300, 1.2, 200, KNOWN),
        (blind, blind, 300, 1.2, 300, EXIF),
        (None, blind, None, 1.2, 768, GUESS),
    ]
    for first, second, exif, focal, expected, source in cases:
        found, told = choose(first, second, size, lambda exif=exif: exif, focal)
        assert (found.K[0, 0], found.K[1, 1], told) == (expected, expected, source)
        assert (found.K[0, 2], found.K[1, 2], found.width, found.height) == (320, 240, *size)
    assert choose(None, None, size, no_exif, None) == (None, None)


def test_the_long_side_counts_and_the_middle_of_a_portrait():
    found, _ = choose(None, None, (480, 640), no_exif, 0.5)
    np.testing.assert_array_equal(found.K, [[320, 0, 240], [0, 320, 320], [0, 0, 1]])


def test_a_better_source_spares_the_file():
    def never():
        raise AssertionError("the file was read")

    assert choose(camera(), None, (640, 480), never, 1.2)[1] == LIST
    assert choose(None, camera(), (640, 480), never, 1.2)[1] == KNOWN


@pytest.mark.parametrize("side", [0, 1])
def test_another_size_is_scaled_another_shape_does_not_fit(side):
    given = [camera() if side == each else None for each in (0, 1)]
    found, _ = choose(*given, (320, 240), no_exif, 1.2)
    assert found.K[0, 0] == 150
    with pytest.raises(CamerasError, match="480x640 pixels after EXIF rotation, but its camera is for 640x480"):
        choose(*given, (480, 640), no_exif, 1.2)


def photograph(path, size, orientation=1, camera=(), **tags):
    image = Image.new("RGB", size, (90, 120, 60))
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    for tag, value in zip((Base.Make, Base.Model), camera, strict=False):
        exif[tag] = value
    exif.get_ifd(IFD.Exif).update({Base[name]: value for name, value in tags.items()})
    image.save(path, exif=exif)
    return str(path)


DIAGONAL = np.hypot(36, 24)  # of 35 mm film, mm: what equivalents are told by


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_equivalent_of_35_mm(tmp_path, orientation):
    path = photograph(tmp_path / "a.jpg", (640, 480), orientation, FocalLengthIn35mmFilm=28)
    height, width = decode((tmp_path / "a.jpg").read_bytes()).shape[:2]
    assert (width, height) == ((480, 640) if orientation >= 5 else (640, 480))
    found, source = query_camera(path, (width, height), None, None, 1.2)
    assert source == EXIF
    np.testing.assert_allclose(found.K[0, 0], 28 / DIAGONAL * 800, rtol=1e-3)
    assert (found.K[0, 2], found.K[1, 2]) == (width / 2, height / 2)
    assert found.K[0, 0] == found.K[1, 1]


@pytest.mark.parametrize("reduced", [1, 4])
@pytest.mark.parametrize(("unit", "per_mm"), [(2, 1 / 25.4), (3, 1 / 10)])
def test_exif_focal_length_and_pixels_of_the_sensor(tmp_path, unit, per_mm, reduced):
    tags = {"FocalLength": IFDRational(5), "FocalPlaneXResolution": IFDRational(4000)}
    tags |= {"FocalPlaneResolutionUnit": unit, "ExifImageWidth": 640, "ExifImageHeight": 480}
    path = photograph(tmp_path / "a.jpg", (640 // reduced, 480 // reduced), **tags)
    found, source = query_camera(path, (640 // reduced, 480 // reduced), None, None, None)
    assert source == EXIF
    np.testing.assert_allclose(found.K[0, 0], 5 * 4000 * per_mm / reduced, rtol=1e-6)


@pytest.mark.parametrize("tags", [{}, {"FocalLengthIn35mmFilm": 0}, {"FocalLength": IFDRational(5)}])
def test_exif_that_gives_nothing_is_guessed(tmp_path, tags):
    path = photograph(tmp_path / "a.jpg", (640, 480), **tags)
    found, source = query_camera(path, (640, 480), None, None, 1.2)
    assert (found.K[0, 0], source) == (768, GUESS)
    assert query_camera(path, (640, 480), None, None, None) == (None, None)


def test_a_file_that_is_gone_or_broken_is_guessed(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    for name in ("gone.jpg", "broken.jpg"):
        assert query_camera(str(tmp_path / name), (640, 480), None, None, 1.2)[1] == GUESS
