"""Where the cameras of a collection come from: cameras.json, COLMAP models, or a table written earlier."""

import dataclasses
import posixpath
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from vop import files
from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.datasets import colmap
from vop.datasets.posed import CAMERAS, read_cameras

DEPTH = 3  # folders below the source that are looked into: SCENE/sparse/0


def open_cameras(source: str, root: str, names: Collection[str]) -> Cameras:
    """Read the cameras of the images `names`, which are relative to the folder `root`.

    A source is a `cameras.json`, a folder that holds one, the folder of a COLMAP model, a `cameras.parquet`, or a
    folder whose subfolders, up to three levels down, hold such files or models: each of these is a world of its own,
    called by its path below the source.

    Image names in such a file count from a folder that it does not name. Tried are the folders from the file up to the
    one that holds the source, the same places below the root, the folder that holds the root, and `images/` in each:
    the first that makes most names of the file images of the collection is taken. Where there are several such files,
    one whose images lie on disk beside it speaks of those only: scenes often share file names.

    Raises:
        FileNotFoundError: nothing is at the source.
        CamerasError: there are no cameras in it, malformed ones, two of one image, or none of an image in `names`.
    """
    source, root, known = files.absolute(source), files.absolute(root), frozenset(names)
    if source.endswith(".parquet"):
        cameras = Cameras.read(source)
        _check_names(source, cameras.names, cameras.names, root, known)
        return cameras
    listed, placed, sources = [], [], _sources(source)
    for path in sources:
        is_json = path.endswith(".json")
        world = _world(source, path)
        entries = list(read_cameras(path, world) if is_json else colmap.read_cameras(path, world))
        listed += [camera.name for camera in entries]
        bases = _bases(source, path, entries[0].name if entries else None, root, len(sources) > 1)
        placed += placed_below(entries, bases, root, known)
    _check_names(source, listed, [camera.name for camera in placed], root, known)
    return Cameras.of(placed)


def open_points(source: str, root: str, names: Collection[str]) -> pa.Table:
    """The points that the images `names` see in the COLMAP models of a source, `colmap.POINTS`; no rows without models.

    Names are found as in `open_cameras`. Raises what that does where nothing is at the source.
    """
    source, root, known = files.absolute(source), files.absolute(root), frozenset(names)
    tables, sources = [colmap.POINTS.empty_table()], [] if source.endswith(".parquet") else _sources(source)
    for number, path in enumerate(sources):
        if not path.endswith(".json"):
            table = colmap.seen_points(path, offset=number << 48)
            listed = table["name"].to_pylist()
            bases = _bases(source, path, listed[0] if listed else None, root, len(sources) > 1)
            placed = pa.array(names_below(listed, bases, root, known), pa.string())
            tables.append(table.set_column(0, "name", placed).filter(placed.is_valid()))
    return pa.concat_tables(tables)


def _world(source: str, path: str) -> str:
    """What the world of a file or model is called: its folder below the source, or the folder's own name."""
    folder = posixpath.dirname(path) if path.endswith(".json") else path
    world = folder.removeprefix(source).strip("/") if folder.startswith(source) else ""
    return world or posixpath.basename(folder)


def _bases(source: str, path: str, first: str | None, root: str, several: bool) -> list[str]:
    """Folders that the names of a file or model may count from; `first` is one of them, `several`: it is not alone."""
    bases = likely_bases(source, posixpath.dirname(path) if path.endswith(".json") else path, root)
    beside = [base for base in bases if several and first and files.exists(files.join(base, first))]
    return beside[:1] or bases


def _sources(source: str) -> list[str]:
    """The cameras.json files and the folders of COLMAP models at a source."""
    kind = files.info(source).type
    if kind == pafs.FileType.NotFound:
        raise FileNotFoundError(f"no cameras at {source}: give a cameras.json, a COLMAP model or a folder of either")
    found = [source] if kind == pafs.FileType.File else list(_walk(source, DEPTH))
    if not found:
        raise CamerasError(
            f"no cameras in {source}: neither {CAMERAS} nor a COLMAP model (cameras, images and points3D as .bin or "
            f".txt) is there, nor in the folders up to {DEPTH} levels below"
        )
    return found


def _walk(folder: str, depth: int) -> Iterator[str]:
    """Sources in a folder and below; a folder that holds cameras is not looked into further."""
    if files.exists(files.join(folder, CAMERAS)):
        yield files.join(folder, CAMERAS)
    elif colmap.is_model(folder):
        yield folder
    elif depth:
        for name in sorted(info.base_name for info in files.entries(folder) if info.type == pafs.FileType.Directory):
            if not name.startswith("."):
                yield from _walk(files.join(folder, name), depth - 1)


def likely_bases(source: str, folder: str, root: str) -> list[str]:
    """Folders that the names of a file in `folder` may count from, the likeliest first."""
    below = folder.removeprefix(source).strip("/") if folder.startswith(source) else ""
    steps, places = below.split("/") if below else [], [folder]
    for depth in range(len(steps), -1, -1):
        places += [files.join(base, *steps[:depth]) for base in (source, root)]
    places += [posixpath.dirname(source), posixpath.dirname(root)]
    return list(dict.fromkeys(base for place in places for base in (place, files.join(place, "images"))))


def placed_below(
    cameras: Sequence[KnownCamera], bases: Sequence[str], root: str, known: Collection[str]
) -> list[KnownCamera]:
    """The cameras by names relative to the root; none if no base makes a name one of the images."""
    names = names_below([camera.name for camera in cameras], bases, root, known)
    named = zip(cameras, names, strict=True)
    return [dataclasses.replace(camera, name=name) for camera, name in named if name is not None]


def names_below(listed: Sequence[str], bases: Sequence[str], root: str, known: Collection[str]) -> list[str | None]:
    """Listed names as they count from the root, if they count from the base that makes most of them `known`.

    None for one that is not below the root, and for all where no base makes a name known.
    """
    best, most = [None] * len(listed), 0
    for base in bases:
        paths = [files.join(base, name) for name in listed]
        names = [path[len(root) + 1 :] if path.startswith(root + "/") else None for path in paths]
        count = sum(name in known for name in names)
        if count > most:
            best, most = names, count
    return best


def _check_names(source: str, listed: Sequence[str], placed: Sequence[str], root: str, known: Collection[str]) -> None:
    if not any(name in known for name in placed):
        raise CamerasError(
            f"no image has a camera: {source} holds {len(listed)}, such as that of {listed[0] if listed else None!r}, "
            f"and {root} {len(known)} images, such as {min(known, default=None)!r}: do the names count from the same "
            "folder?"
        )
