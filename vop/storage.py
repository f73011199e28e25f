"""Object stores as `vop.files` uses them: which requests are tried again, what an error says, how a file gets there.

Endpoint and credentials come from the environment, never from a path (docs/storage.md).
"""

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs

# Requests to S3 that fail for a reason that may pass are sent again after 0, 50, 100, ... 12,800 ms: 25 s in all. The
# SDK's other strategy, "standard", spends tokens that pyarrow never gives back: after 100 retries it makes none.
RETRIES = 10
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 5.0, 10.0  # the latter without a byte
GCS_RETRY_S = 60
PART = 10 << 20  # bytes; S3 takes what is smaller in one request, and pyarrow sends larger files in pieces of this size
PARTS_IN_FLIGHT = 4
_MISTAKEN = ("Failed to flush response stream", "during CompleteMultipartUpload operation")
_LOGIN = re.compile(r"://[^/?#@\s]*:(?!\d*/)[^?#\s]*@")
_SECRET = re.compile(
    r"://.*[?&;][^=&;]*(secret|passw|token|credential|signature|\bsig\b|(access|api|account)[-_]?key)[^=&;]*=",
    re.IGNORECASE,
)
WITH_CREDENTIALS = (
    "a URI with credentials in it, and a run writes its paths down: give them in the environment of every node "
    "(AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...) or by the role of the machines, and a URI "
    "without (docs/storage.md)"
)
_OPTIONS = re.compile(r"[?&](endpoint_override|scheme|region|allow_\w+|tls_\w+|retry_\w+)=", re.IGNORECASE)
_ERROR = re.compile(r"(?:AWS Error |google::cloud::Status\()(?P<code>\w+)(?: \(HTTP status (?P<status>\d+)\))?")
_DENIED = {"ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID",
           "EXPIRED_TOKEN", "PERMISSION_DENIED", "UNAUTHENTICATED"}  # fmt: skip
_PASSING = {"NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "THROTTLING",
            "REQUEST_TIMEOUT", "UNAVAILABLE", "DEADLINE_EXCEEDED"}  # fmt: skip
Result = TypeVar("Result")


class StorageError(RuntimeError):
    """An object store that does not do what it is asked. Not an `OSError`: no file is to blame, so none is skipped."""


def is_uri(path: str | os.PathLike) -> bool:
    """Whether the path names an object store or another remote file system (`scheme://...`)."""
    return "://" in str(path)


def is_local(path: str | os.PathLike) -> bool:
    """Whether the file is on a disk of this machine, or one that looks like it."""
    return not is_uri(path) or str(path).startswith("file://")


def has_credentials(text: str) -> bool:
    """Whether a text holds a URI with a secret in it: say `WITH_CREDENTIALS` of it, and do not show it."""
    return bool(_LOGIN.search(text) or _SECRET.search(text))


def plain(uri: str) -> str:
    """The URI, if it says where something lies and nothing else.

    Raises `ValueError` for credentials or options of a connection, and repeats no secret.
    """
    scheme, rest = uri.split("://", 1)
    bucket = rest.split("/", 1)[0]
    user = "@" in bucket and scheme in ("s3", "gs", "gcs")  # in other schemes what stands there need be no secret
    if user or has_credentials(uri):
        raise ValueError(f"the path to {bucket.rpartition('@')[2].split('?')[0]} is {WITH_CREDENTIALS}")
    if found := _OPTIONS.search(uri):
        raise ValueError(
            f"{uri!r} holds the option {found[1]}, but a path says only where something lies: set AWS_ENDPOINT_URL or "
            "AWS_REGION in the environment of every node (docs/storage.md)"
        )
    return uri


@lru_cache(maxsize=64)
def remote(scheme: str, bucket: str, endpoint: str | None, one_request: bool = False) -> pafs.FileSystem:
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


def file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the path inside it.

    Raises `ValueError` for a scheme that pyarrow does not know, and for what `plain` refuses.
    """
    scheme, inner = plain(uri).split("://", 1)
    if scheme == "file":
        return pafs.LocalFileSystem(), inner
    try:
        return remote(scheme, inner.split("/", 1)[0], _endpoint()), inner
    except Exception as error:
        raise ValueError(f"cannot open {uri!r}: {error}. Use a local path, s3://... or gs://...") from error


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
        found = _ERROR.search(str(error))
        code, status = (found["code"], found["status"] or "") if found else ("", "")
        if code in _DENIED or status == "403" or any(name in str(error) for name in _DENIED):
            raise PermissionError(
                f"the store refuses access to {path}: {error}. Check the credentials of this node (AWS_PROFILE, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role): they must allow to read, list, "
                "write and delete there; where they do not allow to list, a missing file looks like this too"
            ) from error
        s3 = str(path).startswith("s3://")
        where = " at " + re.sub("//.*@", "//", _endpoint()) if _endpoint() and s3 else ""
        if code == "NO_SUCH_BUCKET":
            raise FileNotFoundError(
                f"there is no bucket for {path}{where}: create it (vop creates none), or correct its name"
            ) from error
        if code in _PASSING or status.startswith("5"):
            tried = f"in {RETRIES + 1} attempts" if s3 else f"within {GCS_RETRY_S} s"
            raise StorageError(
                f"the store of {path}{where} did not answer as it should {tried}: {error}. Is it up, and "
                f"{'is AWS_ENDPOINT_URL' if s3 else 'are the credentials'} right? The same command then goes on where "
                "this one stopped"
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


def upload(source: Path, uri: str) -> None:
    """Copy a file into a store. (`pyarrow.fs.copy_files` does not tell when an upload fails at its end.)"""
    filesystem, inner = file_system(uri)
    with source.open("rb") as stream:
        piece = stream.read(PART)
        if len(piece) < PART and isinstance(filesystem, pafs.S3FileSystem):
            filesystem = remote("s3", inner.split("/", 1)[0], _endpoint(), one_request=True)
        with filesystem.open_output_stream(inner) as target:
            for number in itertools.count(1):
                target.write(piece)
                if number % PARTS_IN_FLIGHT == 0:
                    target.flush()  # waits: what is written is copied, and sent in the background
                piece = stream.read(PART)
                if not piece:
                    break
