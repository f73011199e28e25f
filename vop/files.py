"""Files on local disks and object stores behind one set of functions.

Every path of `vop` is a local path or a URI (`s3://bucket/key`, `gs://bucket/key`); `pyarrow.fs` serves both. What a
store does when it fails, and how it is reached, is in `vop.storage`.
"""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from vop.storage import again, answered, file_system, is_local, is_uri, plain, upload

AT_ONCE = 16  # requests under way for many small files: each is mostly waiting
PIECE = 8 << 20  # bytes hashed at a time
SMALL = 1 << 20  # bytes up to which a file is fetched at once: a request costs more than they do
Item, Result = TypeVar("Item"), TypeVar("Result")


def absolute(path: str | os.PathLike) -> str:
    """The path as other processes must see it: URIs unchanged, local paths absolute with `~` expanded.

    Raises `ValueError` for a URI that holds credentials or options of a connection.
    """
    text = str(path)
    if is_uri(text):
        return plain(text).rstrip("/")
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111


def join(base: str | os.PathLike, *parts: str) -> str:
    """`base/parts...` for local paths and URIs alike."""
    return "/".join([str(base).rstrip("/"), *parts])


def resolve(path: str | os.PathLike) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it.

    Raises `ValueError` for a URI whose scheme pyarrow does not know, or that holds credentials.
    """
    return file_system(str(path)) if is_uri(path) else (pafs.LocalFileSystem(), absolute(path))


@contextmanager
def opened(path: str | os.PathLike, whole: bool = False) -> Iterator[pa.NativeFile]:
    """A file to be read here and there, such as Parquet; a small one of a store, or any if `whole`, is fetched at once.

    Raises what `answered` does, for what is read inside the context too.
    """
    filesystem, inner = resolve(path)
    with answered(path), filesystem.open_input_file(inner) as file:
        if is_local(path) or not (whole or file.size() <= SMALL):
            yield file
        else:
            yield pa.BufferReader(again(lambda: file.read_at(file.size(), 0)))


def concurrently(function: Callable[[Item], Result], paths: Iterable[Item]) -> list[Result]:
    """The results of a function that reads one path, in order: `AT_ONCE` at a time where they are in a store."""
    paths = list(paths)
    if all(map(is_local, paths)):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, paths))


def info(path: str | os.PathLike) -> pafs.FileInfo:
    """What is at a path: its type (perhaps NotFound), and of a file size and time."""
    filesystem, inner = resolve(path)
    with answered(path):
        return filesystem.get_file_info(inner)


def entries(directory: str | os.PathLike, recursive: bool = False) -> list[pafs.FileInfo]:
    """Files and folders in a folder, unsorted, or all below it; none if it is not there."""
    filesystem, inner = resolve(directory)
    with answered(directory):
        return filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True, recursive=recursive))


def exists(path: str | os.PathLike) -> bool:
    """Whether a file or folder is there."""
    return info(path).type != pafs.FileType.NotFound


def listing(directory: str | os.PathLike) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder, sorted; empty if the folder is not there."""
    found = {each.base_name: each.size for each in entries(directory) if each.is_file}
    return dict(sorted(found.items()))


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file. Raises `FileNotFoundError`, `PermissionError` or another `OSError`, or `StorageError`."""
    filesystem, inner = resolve(path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_input_stream(inner) as stream:
            return stream.read()
    with answered(path), filesystem.open_input_file(inner) as file:
        return again(lambda: file.read_at(file.size(), 0))  # without a size pyarrow asks for 256 KiB at a time


@contextmanager
def at_hand(path: str | os.PathLike) -> Iterator[str]:
    """A local path of a file, or of a folder with its files: itself, or a copy of what is in a store, for the context.

    For libraries that open files by themselves. Raises what `read_bytes` does.
    """
    if is_local(path):
        yield resolve(path)[1]
        return
    with tempfile.TemporaryDirectory(prefix="vop-copy-") as folder:
        names = listing(path)
        for name in names:
            Path(folder, name).write_bytes(read_bytes(join(path, name)))
        if not names:
            Path(folder, PurePosixPath(str(path)).name).write_bytes(read_bytes(path))
        yield folder if names else str(Path(folder, PurePosixPath(str(path)).name))


def read_json(path: str | os.PathLike) -> dict:
    """The content of a JSON file."""
    return json.loads(read_bytes(path))


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[tuple[pafs.FileSystem, str]]:
    """Write a file so that it appears whole or not at all: yields (local file system, path to write to).

    On a local disk that is a temporary name beside the target, synced and renamed at the end. For an object store it is
    a file in the temporary folder of this machine (TMPDIR), uploaded at the end: what is written to a store directly
    is published when its stream is closed, and an exception closes it.
    """
    filesystem, inner = resolve(path)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with tempfile.TemporaryDirectory(prefix="vop-upload-") as folder:
            temporary = Path(folder) / PurePosixPath(inner).name
            yield pafs.LocalFileSystem(), str(temporary)
            # In a thread: Ctrl-C is raised in the main one, and would publish what was sent so far.
            with answered(path), ThreadPoolExecutor(1) as other:
                other.submit(again, lambda: upload(temporary, str(path))).result()
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield filesystem, str(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # a rename that survives a power cut must not outlive the bytes it names
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file atomically, creating its folder."""
    with atomic(path) as (filesystem, inner), filesystem.open_output_stream(inner) as stream:
        stream.write(data)


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Write JSON atomically, readable and with a fixed layout, so that equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove(path: str | os.PathLike) -> None:
    """Delete a file or a folder with its content; nothing happens if it is not there."""
    filesystem, inner = resolve(path)
    # gs:// says of a folder that it is not there once it has deleted the files in it, if it was no object of its own
    with answered(path), suppress(FileNotFoundError):
        kind = info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(inner)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(inner)


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces."""
    filesystem, inner = resolve(path)
    digest = hashlib.sha256()
    with answered(path), filesystem.open_input_file(inner) as file:
        for start in range(0, file.size(), PIECE):
            digest.update(again(lambda start=start: file.read_at(PIECE, start)))
    return digest.hexdigest()
