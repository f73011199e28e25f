"""A small tree in InLoc's layout, rendered: for tests and demonstrations, with the true poses that InLoc withholds.

Each floor is a building of its own (`vop.datasets.building`) with a frame of its own. In every room stands a scanner;
its cutouts are views from one place, each with what its pixels see in the scanner's own frame, and an alignment says
where the scanner stands. The queries are a phone's: focal length 28/36 of the long side, as the benchmark takes it, and
those held upright are stored turned, with an EXIF tag that says so and 28 mm as the focal length at 35 mm film.

Beside InLoc's own files, `truth/FLOOR/cameras.json` holds the poses of the queries, without intrinsics: give
`cameras=DIR/truth`, and localization is judged by them, while the focal length stays the recipe's.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import scipy.io
from PIL import ExifTags, Image

from vop import files
from vop.datasets.building import Building
from vop.datasets.inloc import QUERIES
from vop.datasets.posed import CAMERAS
from vop.datasets.raster import Light, draw
from vop.datasets.rendered import EYE, QUALITY, light_of, look
from vop.datasets.scans import ALIGNMENTS, CUTOUTS, SUFFIX, VARIABLE
from vop.geometry import Camera, invert, pose_from_rt, transform, unproject
from vop.image import to_jpeg

TRUTH = "truth"
FOCAL = 28 / 36  # of the long side of a query
FIELD = math.radians(60)  # width of a cutout's view, as InLoc's
HOLES = 0.03  # share of pixels whose point the scanner missed
TURNED = 6  # EXIF orientation: the stored image is to be turned a quarter clockwise


@dataclass(frozen=True)
class Tree:
    """What is rendered. InLoc itself has 277 scans of 36 cutouts (12 yaws, 3 pitches) of 1600 x 1200 pixels.

    floors: names, each with `scans` rooms and `queries` queries. yaws: cutouts around; pitches: degrees, up positive.
    cutout: width and height in pixels. phone: long and short side of a query in pixels. lighting: as in
    `vop.datasets.rendered`, of the queries; scans are lit evenly.
    """

    floors: tuple[str, ...] = ("DUC1", "DUC2")
    scans: int = 2
    queries: int = 4
    yaws: int = 12
    pitches: tuple[int, ...] = (0,)
    cutout: tuple[int, int] = (480, 360)
    phone: tuple[int, int] = (640, 480)
    lighting: float = 0.5
    seed: int = 0


def write(directory: str, tree: Tree) -> dict[str, Camera]:
    """Render a tree into a folder; the same bytes again each time. Gives the true camera of every query by name."""
    truth = {}
    for number, floor in enumerate(tree.floors):
        building = Building(tree.seed + number, tree.scans)
        for room in range(tree.scans):
            scan = f"{number * tree.scans + room:03d}"
            _write_scan(directory, tree, building, room, floor, scan, np.random.default_rng((tree.seed, number, room)))
        cameras = {}
        for index in range(tree.queries):
            name = f"{QUERIES}/IMG_{number * tree.queries + index:04d}.JPG"
            rng = np.random.default_rng((tree.seed, number, tree.scans + index))
            cameras[name] = _phone(tree, building, index, rng)
            _write_query(files.join(directory, name), building, cameras[name], tree.lighting, rng)
        poses = {
            name: {"R": c.rotation.tolist(), "t": c.translation.tolist(), "width": c.width, "height": c.height}
            for name, c in cameras.items()
        }
        files.write_json(files.join(directory, TRUTH, floor, CAMERAS), poses)
        truth |= cameras
    return truth


def _write_scan(directory: str, tree: Tree, building: Building, room: int, floor: str, scan: str, rng) -> None:
    """The cutouts of one scan, their points and the alignment."""
    middle = building.path(room)[1:3].mean(0)
    stand = np.array([*middle, EYE])
    scan_from_floor = _scanner(stand, rng)
    text = _matrix("before", _scanner(stand + 0.3, rng)) + "\n" + _matrix("after", invert(scan_from_floor))
    alignment = files.join(directory, ALIGNMENTS, floor, "transformations", f"DUC_trans_{scan}.txt")
    files.write_bytes(alignment, text.encode())
    width, height = tree.cutout
    focal = width / 2 / math.tan(FIELD / 2)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    for pitch in tree.pitches:
        for yaw in (360 * step // tree.yaws for step in range(tree.yaws)):
            R = look(math.radians(yaw), math.radians(pitch), 0.0)
            camera = Camera(K, pose_from_rt(R, -R @ stand), width, height)
            image, depth = draw(building.rectangles, camera, Light(), rng)
            points = transform(scan_from_floor @ invert(camera.cam_from_world), unproject(depth, K))
            points[(depth == 0) | (rng.random(depth.shape) < HOLES)] = np.nan
            path = files.join(directory, CUTOUTS, floor, scan, f"DUC_cutout_{scan}_{yaw}_{pitch}.jpg")
            files.write_bytes(path, to_jpeg(image, QUALITY))
            files.write_bytes(path + SUFFIX, _matlab(points))


def _scanner(stand: np.ndarray, rng) -> np.ndarray:
    """`scan_from_floor` of a scanner that stands there, turned anyhow and not quite upright."""
    tilt = look(rng.uniform(0, 2 * math.pi), rng.normal(0, 0.02), rng.normal(0, 0.02))
    return pose_from_rt(tilt, -tilt @ stand)


def _matrix(name: str, matrix: np.ndarray) -> str:
    rows = "".join(" ".join(f"{value:.10f}" for value in row) + "\n" for row in matrix)
    return f"{name.title()} general icp:\n{rows}"


def _matlab(points: np.ndarray) -> bytes:
    """A file of MATLAB 7, without the time that SciPy notes in its header."""
    stream = io.BytesIO()
    scipy.io.savemat(stream, {VARIABLE: points}, do_compression=True)
    return b"MATLAB 5.0 MAT-file".ljust(116) + stream.getvalue()[116:]


def _phone(tree: Tree, building: Building, index: int, rng) -> Camera:
    """A query's camera: near the middle of a room, looking anywhere; every other one is held upright."""
    width, height = tree.phone if index % 2 else tree.phone[::-1]
    path = building.path(index % tree.scans)[1:3]
    center = path.mean(0) + np.clip(rng.uniform(-0.4, 0.4) * (path[1] - path[0]), -1.2, 1.2) + rng.uniform(-0.3, 0.3, 2)
    R = look(rng.uniform(0, 2 * math.pi), rng.normal(-0.05, 0.08), rng.normal(0, 0.05))
    focal = FOCAL * max(width, height)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(K, pose_from_rt(R, -R @ np.array([*center, EYE + rng.normal(0, 0.1)])), width, height)


def _write_query(path: str, building: Building, camera: Camera, lighting: float, rng) -> None:
    image, _ = draw(building.rectangles, camera, light_of(lighting, camera, rng), rng)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = TURNED if camera.height > camera.width else 1
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 28
    stored = Image.fromarray(np.rot90(image) if camera.height > camera.width else image)
    stream = io.BytesIO()
    stored.save(stream, "JPEG", quality=QUALITY, exif=exif)
    files.write_bytes(path, stream.getvalue())
