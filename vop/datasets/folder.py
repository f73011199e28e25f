"""Collections of images: a folder, a glob pattern, a list file, an image, or several of these.

Names are the POSIX paths of the images relative to the root of the collection, exactly as the file system spells them
(no Unicode normalisation: the name must open the file again). Local paths and URIs (`s3://`, `gs://`) work alike.
"""

import itertools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow.fs as pafs

from vop.files import absolute, concurrently, entries, info, is_uri, join, read_bytes, resolve

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)

# The line of a query list as hloc writes it: name, COLMAP camera model, width, height, parameters.
_WITH_INTRINSICS = re.compile(
    r"(?P<name>.+?)\s+(?:[A-Z_]*(?:PINHOLE|RADIAL|OPENCV|FISHEYE)|FOV)(?:\s+[-+]?[\d.]+(?:[eE][-+]?\d+)?){3,}"
)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image of a collection.

    `name` is relative to the root, `path` opens the file (absolute path or URI), `scene` is the first folder of the
    name or "". `size` is in bytes and `modified_ns` in nanoseconds since 1970; both are -1 for a file that a list
    names and that is not there: it stays in the collection so that it is reported with the other bad files.
    """

    name: str
    path: str
    size: int
    modified_ns: int
    scene: str


@dataclass(frozen=True)
class Collection:
    """Images under one root, sorted by name; `skipped` counts the files left out, by reason."""

    root: str
    images: tuple[ImageFile, ...]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    size: int
    modified_ns: int


def list_images(sources: str | os.PathLike | Sequence[str | os.PathLike], root: str | None = None) -> Collection:
    """List the images of one or several sources.

    A source is one of these, tried in this order:

    * a folder: its images (by extension, any case) at every depth. Hidden files and folders and `*.depth.png` are
      skipped; links are followed, except those to a folder they lie in.
    * a `.txt` file: one image per line, absolute or relative to `root`, or to the folder of the list if `root` is
      not given. Lines that are blank or start with `#` are ignored. If a line ends in a COLMAP camera model and at
      least three numbers (`name PINHOLE 640 480 500 500 320 240`, hloc's query lists), the name is what stands before
      them; otherwise the whole line is the name, spaces included.
    * any other file: that image.
    * a glob pattern: `*`, `?` and `[...]` within a folder name, `**` for any number of folders. It matches files, and
      of those the ones that a folder would give.

    Args:
        sources: paths or URIs.
        root: the folder that names are relative to. By default the folder, the list's folder, or the part of a
            pattern before its first wildcard; the deepest folder they have in common if there are several.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: no image found, a name listed twice, a file outside the root, sources without a common root.
    """
    sources = [absolute(s) for s in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    root = None if root is None else absolute(root)
    skipped: Counter[str] = Counter()
    bases, files = [], []
    for source in sources:
        base, found = _expand(source, root, skipped)
        bases.append(base)
        files.extend(found)
    if not files:
        where = ", ".join(sources) or "an empty list of sources"
        other = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "nothing else either"
        raise ValueError(f"no images in {where}; found {other}. Extensions read: {' '.join(EXTENSIONS)}")
    root = root or common_folder(bases)
    images = sorted((_image(file, root) for file in files), key=lambda image: image.name)
    for first, second in itertools.pairwise(images):
        if first.name == second.name:
            raise ValueError(f"{first.name!r} is listed twice in {', '.join(sources)}; remove one of the two")
    return Collection(root, tuple(images), dict(skipped))


def _expand(source: str, root: str | None, skipped: Counter) -> tuple[str, list[_File]]:
    """The folder that a source's names are relative to by default, and its files."""
    there = info(source)
    if there.type == pafs.FileType.Directory:
        return source, _images_only(_walk(source, skipped), skipped)
    if there.type == pafs.FileType.File:
        if source.lower().endswith(".txt"):
            return _read_list(source, root)
        return posixpath.dirname(source), [_file(source, there)]
    wildcard = re.search(r"[*?\[]", source)
    if not wildcard:
        raise FileNotFoundError(f"{source} does not exist: neither a folder, nor a list (.txt), nor an image")
    base = posixpath.dirname(source[: wildcard.start()]) or "/"
    pattern = relative_name(source, base).split("/")
    depth = None if "**" in pattern else len(pattern)
    found = (
        file for file in _walk(base, skipped, depth) if _matches(relative_name(file.path, base).split("/"), pattern)
    )
    return base, _images_only(found, skipped)


def _images_only(files: Iterator[_File], skipped: Counter) -> list[_File]:
    kept = []
    for file in files:
        reason = _why_not(posixpath.basename(file.path).lower())
        if reason is None:
            kept.append(file)
        else:
            skipped[reason] += 1
    return kept


def _why_not(name: str) -> str | None:
    if name.endswith(".depth.png"):
        return "depth map (.depth.png)"
    extension = posixpath.splitext(name)[1]
    if extension in EXTENSIONS:
        return None
    if extension in (".heic", ".heif"):
        return f"{extension} (not supported: convert to JPEG)"
    return f"not an image ({extension or 'no extension'})"


def _walk(folder: str, skipped: Counter, depth: int | None = None) -> Iterator[_File]:
    """All visible files under a folder, at most `depth` names deep, with size and time from the listing itself."""
    filesystem, inner = resolve(folder)
    if isinstance(filesystem, pafs.LocalFileSystem):
        stat = os.stat(inner)  # noqa: PTH116
        yield from _walk_local(inner, folder, {(stat.st_dev, stat.st_ino)}, depth, skipped)
        return
    infos = entries(folder, recursive=True)  # a request for every 1,000 files, the fewest there can be
    infos.reverse()
    while infos:  # each is let go as it is taken, not after a second list of all of them is made
        found = infos.pop()
        inside = found.path[len(inner.rstrip("/")) + 1 :]
        if not found.is_file:
            continue
        if any(part.startswith(".") for part in inside.split("/")):
            skipped["hidden"] += 1
        else:
            yield _file(join(folder, inside), found)


def _walk_local(folder: str, shown: str, above: set, depth: int | None, skipped: Counter) -> Iterator[_File]:
    """Walk with `os.scandir`, because pyarrow's recursion follows a link to a folder above without end.

    `shown` is the folder as the user named it (it may be a `file://` URI); `above` holds device and inode of the
    folders on the way down, in which a link must not lead back.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            path = join(shown, entry.name)
            if entry.name.startswith("."):
                skipped["hidden"] += 1
            elif not _is_unicode(entry.name):
                skipped["name is not valid UTF-8"] += 1
            elif entry.is_file():
                stat = entry.stat()
                yield _File(path, stat.st_size, stat.st_mtime_ns)
            elif not entry.is_dir():
                skipped["broken link or special file"] += 1
            elif depth is None or depth > 1:
                stat = entry.stat()
                here = (stat.st_dev, stat.st_ino)
                if here in above:
                    skipped["link to a folder above"] += 1
                else:
                    yield from _walk_local(entry.path, path, above | {here}, depth and depth - 1, skipped)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a pattern, both split at slashes; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _read_list(source: str, root: str | None) -> tuple[str, list[_File]]:
    """The common folder of the files a list names, and the files, there or not."""
    folder = root or posixpath.dirname(source)
    paths, bases = [], []
    try:
        text = read_bytes(source).decode("utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text ({error}); a list holds one image name per line") from error
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        intrinsics = _WITH_INTRINSICS.fullmatch(line)
        name = intrinsics["name"] if intrinsics else line
        name = name if is_uri(name) else posixpath.normpath(name)
        if is_uri(name) or name.startswith("/"):
            paths.append(name)
            bases.append(posixpath.dirname(name))
            continue
        if name == ".." or name.startswith("../"):
            raise ValueError(
                f"{source}, line {number}: {name!r} leaves {folder}, the folder that names are relative to; "
                "write the absolute path or set root to a folder above"
            )
        paths.append(join(folder, name))
        bases.append(folder)
    return common_folder(bases or [folder]), _stat(paths)


def _stat(paths: list[str]) -> list[_File]:
    """Sizes and times of files."""
    return [_file(path, there) for path, there in zip(paths, concurrently(info, paths), strict=True)]


def _file(path: str, there: pafs.FileInfo) -> _File:
    if not there.is_file:
        return _File(path, -1, -1)
    return _File(path, there.size, -1 if there.mtime_ns is None else there.mtime_ns)


def _image(file: "_File | ImageFile", root: str) -> ImageFile:
    name = relative_name(file.path, root)
    return ImageFile(name, file.path, file.size, file.modified_ns, name.split("/")[0] if "/" in name else "")


def below(collection: Collection, root: str) -> Collection:
    """The same images with names relative to another root, which must hold them all."""
    return Collection(root, tuple(_image(image, root) for image in collection.images), collection.skipped)


def relative_name(path: str, root: str) -> str:
    """The name of an image: its path below the root. Raises `ValueError` if it lies elsewhere."""
    prefix = root.rstrip("/") + "/"
    if not path.startswith(prefix):
        raise ValueError(f"{path} lies outside the root {root}; set root to a folder that holds all images")
    return path[len(prefix) :]


def common_folder(folders: list[str]) -> str:
    """The deepest folder that holds all of them."""
    schemes = {folder.split("://", 1)[0] if is_uri(folder) else "" for folder in folders}
    if len(schemes) == 1:
        scheme = schemes.pop()
        common = posixpath.commonpath([folder.split("://", 1)[-1] for folder in folders])
        if common:
            return f"{scheme}://{common}" if scheme else common
    raise ValueError(f"no common folder of {', '.join(sorted(set(folders))[:5])}; make one collection of each")
