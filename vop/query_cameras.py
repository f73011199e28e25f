"""Where the intrinsics of a query come from: lists, known cameras, EXIF, or a guess, the first of these that has any.

Lists are those of hloc and of visuallocalization.net, one query on a line, in pixels of the upright image:

    NAME MODEL WIDTH HEIGHT PARAMETERS...        COLMAP's camera models, https://colmap.github.io/cameras.html

Pixel conventions are those of `vop.geometry`. A camera of another size than its image is scaled where the shape is the
same, and does not fit otherwise: it is not passed over for a worse one, lest nobody notices that it was misread.
"""

import posixpath
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from vop import files
from vop.cameras import Cameras, CamerasError, KnownCamera, load_pycolmap
from vop.colmap import exif_of
from vop.datasets import colmap
from vop.datasets.camera_sources import likely_bases, placed_below
from vop.names import problem

LIST, KNOWN, EXIF, GUESS = "list", "known camera", "EXIF", "guess"
SOURCES = (LIST, KNOWN, EXIF, GUESS)  # in the order in which they are asked


@dataclass(frozen=True, eq=False)
class ListedCameras:
    """The cameras of the queries that lists name. entries: how many cameras they hold; unknown: of no query."""

    cameras: Cameras
    entries: int
    unknown: int


def choose(
    listed: KnownCamera | None,
    known: KnownCamera | None,
    size: tuple[int, int],
    exif_focal: Callable[[], float | None],
    focal: float | None,
) -> tuple[KnownCamera | None, str | None]:
    """The camera of a query for its upright image of this size (width, height), and which of `SOURCES` it is from.

    Args:
        listed, known: what a list, and what the benchmark or `cameras=` say; one without intrinsics says nothing.
        exif_focal: gives the focal length in pixels that the file itself names; asked only where it is needed.
        focal: `localize.focal`, the focal length that is guessed, in long sides of the image; None: no guess.

    Returns:
        The camera, which fits the size; a focal length alone becomes a pinhole camera (of one focal length, without
        distortion) with its principal point in the middle of the image. None, None: the camera is unknown.
        Raises `CamerasError` where the listed or the known camera does not fit the image.
    """
    for camera, source in ((listed, LIST), (known, KNOWN)):
        if camera is not None and camera.K is not None:
            return camera.fitted(*size), source
    if pixels := exif_focal():
        return _pinhole(pixels, size), EXIF
    return (None, None) if focal is None else (_pinhole(focal * max(size), size), GUESS)


def query_camera(
    path: str,
    size: tuple[int, int],
    listed: KnownCamera | None,
    known: KnownCamera | None,
    focal: float | None,
    exif: bool = True,
) -> tuple[KnownCamera | None, str | None]:
    """The same for an image file, by a worker: with `exif` its EXIF is read where nothing better is known.

    `vop.colmap.known_camera` makes it a camera of pycolmap.
    """
    return choose(listed, known, size, lambda: exif_of(path)[0] if exif else None, focal)


def _pinhole(focal: float, size: tuple[int, int]) -> KnownCamera:
    width, height = size
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return KnownCamera("", K, None, width=width, height=height)


def read_lists(source: str, root: str, queries: Collection[str]) -> ListedCameras:
    """The cameras of the queries (names below the folder `root`) in a list, a folder of .txt lists, or a glob pattern.

    Names in a list count from a folder that it does not name: the one of `root`, the deepest that holds all queries,
    the list's own, and those around it that makes most of them queries is taken, in this order where several do.

    Raises:
        FileNotFoundError: there is no such list.
        CamerasError: a line that is no camera (file and line are named), two cameras of one query, or none of any.
    """
    root, known = root.rstrip("/"), frozenset(queries)
    inside = posixpath.commonpath([posixpath.dirname(name) for name in known]) if known else ""
    entries, found = [], {}
    for path in _lists(files.absolute(source)):
        cameras = list(read_list(path))
        entries += [camera.name for camera in cameras]
        around = [root, files.join(root, inside), *likely_bases(posixpath.dirname(path), posixpath.dirname(path), root)]
        for camera in placed_below(cameras, around, root, known):
            if camera.name in known:
                first = found.setdefault(camera.name, (camera, path))
                _check_same(first, (camera, path))
    if known and not found:
        raise CamerasError(
            f"no query has a camera in {source}: it names {len(entries)} images, such as "
            f"{entries[0] if entries else None!r}, and the queries are such as {min(known)!r} in {root}: do the names "
            "count from the same folder?"
        )
    cameras = Cameras.of(camera for camera, _ in found.values())
    return ListedCameras(cameras, len(entries), len(entries) - len(found))


def read_list(path: str, prefix: str = "", world: str = "") -> Iterator[KnownCamera]:
    """The cameras of a list, without poses; `prefix` is what its names lack. Blank lines and `# ...` are skipped.

    Raises `CamerasError`, naming file and line, for what is no camera, ImportError without pycolmap.
    """
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CamerasError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                yield _parsed(line, prefix, world)
            except (ValueError, TypeError) as error:
                raise CamerasError(
                    f"{path}, line {number}: expected name, COLMAP camera model, width, height and parameters ({error})"
                ) from error


def _parsed(line: str, prefix: str, world: str) -> KnownCamera:
    """The camera of a line. Raises ValueError, or TypeError where a number is too large for its type."""
    pycolmap = load_pycolmap()
    fields = line.split()
    if len(fields) < 4:
        raise ValueError(f"found {len(fields)} fields, {line.strip()!r}")
    name, model, width, height, *params = fields
    if wrong := problem(name):
        raise ValueError(f"the name {name!r} {wrong}")
    if model not in pycolmap.CameraModelId.__members__ or model == "INVALID":
        raise ValueError(f"COLMAP knows no camera model {model!r}; names cannot hold white space")
    values = [float(value) for value in params]
    camera = pycolmap.Camera(model=model, width=int(width), height=int(height), params=values)
    if not camera.verify_params():
        raise ValueError(f"{len(params)} parameters for {model}, whose are {camera.params_info}")
    if not np.isfinite(values).all():
        raise ValueError(f"the parameters {' '.join(params)} are not all finite numbers")
    return colmap.known_camera(prefix + name, camera, None, world).checked()


def _lists(source: str) -> list[str]:
    """The files that a source names, sorted. Raises FileNotFoundError where there is none."""
    folder, name = posixpath.split(source)
    if files.info(source).is_file:
        return [source]
    inside = [files.join(source, each) for each in files.listing(source) if each.endswith(".txt")]
    if re.search(r"[*?\[]", name):
        inside = [files.join(folder, each) for each in files.listing(folder) if fnmatchcase(each, name)]
    if not inside:
        raise FileNotFoundError(
            f"no list of cameras at {source}: give localize.intrinsics=FILE, a folder with .txt files, or a "
            "pattern of file names in one folder, such as queries/*_with_intrinsics.txt"
        )
    return sorted(inside)


def _check_same(first: tuple[KnownCamera, str], second: tuple[KnownCamera, str]) -> None:
    """Raise `CamerasError` where a query has two cameras that differ."""
    told = [
        (camera.model, camera.params, camera.width, camera.height, camera.K.tolist()) for camera, _ in (first, second)
    ]
    if told[0] != told[1]:
        raise CamerasError(f"{first[0].name!r} has two cameras: one in {first[1]}, and another one in {second[1]}")
