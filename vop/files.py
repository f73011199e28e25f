"""Files on local disks and object stores behind one set of functions.

Every path of `vop` is a local path or a URI (`s3://bucket/key`, `gs://bucket/key`); `pyarrow.fs` serves both. Endpoint
and credentials come from the environment, never from a path (docs/storage.md).
"""

import hashlib
import itertools
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

# Requests to S3 that fail for a reason that may pass are sent again after 0, 50, 100, ... 12,800 ms: 25 s in all. The
# SDK's other strategy, "standard", spends tokens that pyarrow never gives back: after 100 retries it makes none.
RETRIES = 10
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 5.0, 10.0  # the latter without a byte
GCS_RETRY_S = 60
AT_ONCE = 16  # requests under way for many small files: each is mostly waiting
PART = 10 << 20  # bytes; S3 takes what is smaller in one request, and pyarrow sends larger files in pieces of this size
PARTS_IN_FLIGHT = 4

PIECE = 8 << 20  # bytes hashed at a time
SMALL = 1 << 20  # bytes up to which a file is fetched at once: a request costs more than they do

_MISTAKEN = ("Failed to flush response stream", "during CompleteMultipartUpload operation")
_CREDENTIALS = re.compile(r"[?&](access_key|secret_key|session_token|x-amz-[a-z]+)=", re.IGNORECASE)
_OPTIONS = re.compile(r"[?&](endpoint_override|scheme|region|allow_\w+|tls_\w+|retry_\w+)=", re.IGNORECASE)
_S3_ERROR = re.compile(r"AWS Error (?P<code>\w+)(?: \(HTTP status (?P<status>\d+)\))?")
_DENIED = {"ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID",
           "EXPIRED_TOKEN", "PERMISSION_DENIED", "UNAUTHENTICATED"}  # fmt: skip
_PASSING = {"NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "THROTTLING",
            "REQUEST_TIMEOUT"}  # fmt: skip
Item, Result = TypeVar("Item"), TypeVar("Result")


class StorageError(RuntimeError):
    """An object store that does not do what it is asked. Not an `OSError`: no file is to blame, so none is skipped."""


def is_uri(path: str | os.PathLike) -> bool:
    """Whether the path names an object store or another remote file system (`scheme://...`)."""
    return "://" in str(path)


def is_local(path: str | os.PathLike) -> bool:
    """Whether the file is on a disk of this machine, or one that looks like it."""
    return not is_uri(path) or str(path).startswith("file://")


def absolute(path: str | os.PathLike) -> str:
    """The path as other processes must see it: URIs unchanged, local paths absolute with `~` expanded.

    Raises `ValueError` for a URI that holds credentials or options of a connection.
    """
    text = str(path)
    if is_uri(text):
        return _plain(text).rstrip("/")
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111


def _plain(uri: str) -> str:
    """The URI, if it says where something lies and nothing else; errors repeat no secret of it."""
    scheme, rest = uri.split("://", 1)
    bucket = rest.split("/", 1)[0]
    if "@" in bucket or _CREDENTIALS.search(uri):
        shown = bucket.rpartition("@")[2].split("?")[0]
        raise ValueError(
            f"the path {scheme}://{shown}/... holds credentials, and paths are written into run directories and logs: "
            "take them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or "
            "GOOGLE_APPLICATION_CREDENTIALS on every node, or give the machines a role (docs/storage.md)"
        )
    if found := _OPTIONS.search(uri):
        raise ValueError(
            f"{uri!r} holds the option {found[1]}, but a path says only where something lies: set AWS_ENDPOINT_URL or "
            "AWS_REGION in the environment of every node (docs/storage.md)"
        )
    return uri


def join(base: str | os.PathLike, *parts: str) -> str:
    """`base/parts...` for local paths and URIs alike."""
    return "/".join([str(base).rstrip("/"), *parts])


@lru_cache(maxsize=64)
def _remote(scheme: str, bucket: str, endpoint: str | None, one_request: bool = False) -> pafs.FileSystem:
    """The file system of a bucket. `one_request`: an object is uploaded when its stream is closed, not in parts."""
    if scheme == "s3":
        return pafs.S3FileSystem(
            endpoint_override=endpoint,
            region=None if endpoint else pafs.resolve_s3_region(bucket),
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=RETRIES),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            allow_delayed_open=one_request,
        )
    if scheme in ("gs", "gcs"):
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=GCS_RETRY_S))
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def resolve(path: str | os.PathLike) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path inside it.

    Raises `ValueError` for a URI whose scheme pyarrow does not know, or that holds credentials.
    """
    text = str(path)
    if not is_uri(text):
        return pafs.LocalFileSystem(), absolute(text)
    scheme, rest = _plain(text).split("://", 1)
    if scheme == "file":
        return pafs.LocalFileSystem(), rest
    try:
        return _remote(scheme, rest.split("/", 1)[0], _endpoint()), rest
    except Exception as error:
        raise ValueError(f"cannot open {text!r}: {error}. Use a local path, s3://... or gs://...") from error


@contextmanager
def answered(path: str | os.PathLike) -> Iterator[None]:
    """Run requests to an object store, if the path is in one, so that what fails says what to do about it.

    Raises `PermissionError` where the store refuses, `FileNotFoundError` for a file or bucket that is not there, and
    `StorageError` for what is still wrong after all retries. Errors of local disks pass as they are.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if is_local(path):
            raise
        found = _S3_ERROR.search(str(error))
        code, status = (found["code"], found["status"] or "") if found else ("", "")
        if code in _DENIED or status == "403" or any(name in str(error) for name in _DENIED):
            raise PermissionError(
                f"the store refuses access to {path}: {error}. Check the credentials of this node (AWS_PROFILE, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role): they must allow to read, list, "
                "write and delete there; where they do not allow to list, a missing file looks like this too"
            ) from error
        where = f" at {_endpoint()}" if _endpoint() and str(path).startswith("s3://") else ""
        if code == "NO_SUCH_BUCKET":
            raise FileNotFoundError(
                f"there is no bucket for {path}{where}: create it (vop creates none), or correct its name"
            ) from error
        if code in _PASSING or status.startswith("5"):
            raise StorageError(
                f"the store of {path}{where} did not answer as it should in {RETRIES + 1} attempts: {error}. Is it up, "
                "and is AWS_ENDPOINT_URL right? The same command then goes on where this one stopped"
            ) from error
        raise StorageError(f"the store of {path}{where} cannot do what it was asked: {error}") from error


def again(act: Callable[[], Result]) -> Result:
    """What `act()` returns, after more tries where S3 answered with an error that pyarrow takes for another.

    An error in more bytes than were asked for is an error of the buffer that takes them; and an upload may be completed
    twice, the second time in vain.
    """
    for tried in itertools.count():
        try:
            return act()
        except OSError as error:
            if not any(text in str(error) for text in _MISTAKEN) or tried == RETRIES:
                raise
            time.sleep(0.025 * 2**tried)


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
                other.submit(again, lambda: _upload(temporary, str(path))).result()
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


def _upload(source: Path, uri: str) -> None:
    """Copy a file into a store. (`pyarrow.fs.copy_files` does not tell when an upload fails at its end.)"""
    filesystem, inner = resolve(uri)
    with source.open("rb") as stream:
        piece = stream.read(PART)
        if len(piece) < PART and isinstance(filesystem, pafs.S3FileSystem):
            filesystem = _remote("s3", inner.split("/", 1)[0], _endpoint(), one_request=True)
        with filesystem.open_output_stream(inner) as target:
            for number in itertools.count(1):
                target.write(piece)
                if number % PARTS_IN_FLIGHT == 0:
                    target.flush()  # waits: what is written is copied, and sent in the background
                piece = stream.read(PART)
                if not piece:
                    break


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
    with answered(path):
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
