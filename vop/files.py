"""Files on local disks and object stores behind one set of functions.

Every path of `vop` is a local path or a URI (`s3://bucket/key`, `gs://bucket/key`); `pyarrow.fs` serves both.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pyarrow.fs as pafs


def is_uri(path: str | os.PathLike) -> bool:
    """Whether the path names an object store or another remote file system (`scheme://...`)."""
    return "://" in str(path)


def absolute(path: str | os.PathLike) -> str:
    """The path as other processes must see it: URIs unchanged, local paths absolute with `~` expanded."""
    text = str(path)
    return text.rstrip("/") if is_uri(text) else os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111


def join(base: str | os.PathLike, *parts: str) -> str:
    """`base/parts...` for local paths and URIs alike."""
    return "/".join([str(base).rstrip("/"), *parts])


@lru_cache(maxsize=32)
def _remote(scheme_and_host: str) -> pafs.FileSystem:
    return pafs.FileSystem.from_uri(scheme_and_host)[0]


def resolve(path: str | os.PathLike) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it.

    Raises `ValueError` for a URI whose scheme pyarrow does not know.
    """
    text = str(path)
    if not is_uri(text):
        return pafs.LocalFileSystem(), absolute(text)
    scheme, rest = text.split("://", 1)
    try:
        if scheme == "file":
            return pafs.LocalFileSystem(), rest
        bucket = rest.split("/", 1)[0]
        return _remote(f"{scheme}://{bucket}"), rest
    except Exception as error:
        raise ValueError(f"cannot open {text!r}: {error}. Use a local path, s3://... or gs://...") from error


def exists(path: str | os.PathLike) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner = resolve(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def listing(directory: str | os.PathLike) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder, sorted; empty if the folder is not there."""
    filesystem, inner = resolve(directory)
    infos = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return {info.base_name: info.size for info in sorted(infos, key=lambda i: i.base_name) if info.is_file}


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file. Raises `FileNotFoundError`, `PermissionError` or another `OSError`."""
    filesystem, inner = resolve(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def read_json(path: str | os.PathLike) -> dict:
    """The content of a JSON file."""
    return json.loads(read_bytes(path))


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[tuple[pafs.FileSystem, str]]:
    """Write a file so that it appears whole or not at all: yields (file system, path to write to).

    On a local disk that is a temporary name beside the target, synced and renamed at the end; an object store makes
    an object visible only when its upload completes, so there the target itself is written.
    """
    filesystem, inner = resolve(path)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield filesystem, inner
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
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(inner)


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces."""
    filesystem, inner = resolve(path)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner) as stream:
        while piece := stream.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()
