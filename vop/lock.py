"""One run at a time on an output: a lock that a crash releases.

On a disk the operating system holds it (flock) and lets go when the process ends, however it ends. An object store
knows no locks: there the holder renews a lease, and who finds a lease watches whether it is renewed. Only durations are
measured, so that clocks which differ, or jump, do not matter.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from json import JSONDecodeError
from pathlib import Path

from filelock import FileLock, Timeout

from vop import files
from vop.storage import StorageError

HOLDER = ".lock.json"  # who holds it; in an object store the lease itself
PATIENCE_S = 15.0  # one that only looks, or finds nothing to write, holds a lock for a moment
RENEWED_S, EXPIRED_S = 10.0, 45.0  # a lease is renewed so often; one that was not for so long is nobody's
_dead: set[str] = set()  # runs found so: their other leases are nobody's too
SETTLED_S = 2.0  # two that take a free lease at once have both written it by then; the second to write has it


class LockedError(RuntimeError):
    """Another run is writing there; the message says which."""


def identity(command: str, run: str) -> dict:
    """Who holds a lock, as others are told: the command, its run, host and process, and since when (UTC)."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"command": command, "run": run, "host": socket.gethostname(), "process": os.getpid(), "since": since}


@contextmanager
def held(directory: str, who: dict) -> Iterator[Callable[[], None]]:
    """Be the only run that writes in a directory, which is created; `who` as of `identity`.

    Yields what is to be called now and then: it raises `LockedError` once this process was suspended for so long that
    another took it for dead, and the lock in an object store. Raises `LockedError` at once if another run holds it,
    after a few seconds on a disk and within a minute in a store.
    """
    with _leased(directory, who) if files.is_uri(directory) else _flocked(directory, who) as check:
        yield check


def holder(directory: str) -> dict | None:
    """Who holds the lock of a directory, None: nobody. For people: in an object store it is told by the time of day."""
    told = files.join(directory, HOLDER)
    if files.is_uri(directory):
        renewed = files.info(told).mtime
        now = datetime.now(timezone.utc)
        return _read(told) if renewed and (now - renewed).total_seconds() < 2 * EXPIRED_S else None
    path = Path(directory) / ".lock"
    if path.exists():
        with suppress(Timeout, OSError), FileLock(path, timeout=0):  # OSError: someone else's, only to be read
            return None
    return _read(told)


def _read(path: str) -> dict | None:
    try:
        return files.read_json(path)
    except (FileNotFoundError, JSONDecodeError):
        return None


def _refused(directory: str) -> LockedError:
    who = _read(files.join(directory, HOLDER)) or {}
    named = "`vop {command}` (process {process} on {host}, since {since})".format(**who) if who else "another run"
    return LockedError(
        f"{directory} is being written by {named}: wait until it has ended or end it, then run this command again, or "
        "give another directory"
    )


@contextmanager
def _flocked(directory: str, who: dict) -> Iterator[Callable[[], None]]:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=PATIENCE_S)
    try:
        lock.acquire()
    except Timeout:
        raise _refused(directory) from None
    try:
        files.write_json(folder / HOLDER, who)
        yield lambda: None
    finally:
        with suppress(OSError):  # it only tells; the lock is what is released below
            files.remove(folder / HOLDER)
        lock.release()


@contextmanager
def _leased(directory: str, who: dict) -> Iterator[Callable[[], None]]:
    lease = _Lease(files.join(directory, HOLDER), who | {"token": uuid.uuid4().hex})
    if not lease.free():
        raise _refused(directory)
    lease.renew()
    time.sleep(SETTLED_S)
    if not lease.mine():
        raise _refused(directory)
    ended = threading.Event()

    def check() -> None:
        if lease.lost:
            raise _refused(directory)

    threading.Thread(target=lease.keep, args=(ended,), daemon=True).start()
    try:
        yield check
        check()
    finally:
        ended.set()
        with suppress(OSError, StorageError):
            if lease.mine():
                files.remove(lease.path)


class _Lease:
    """An object that its holder writes again and again, each time with another number."""

    def __init__(self, path: str, who: dict):
        self.path, self.who, self.renewals, self.lost = path, who, 0, False

    def free(self) -> bool:
        """Whether nobody holds it, which takes long to know where somebody did not give it back."""
        found, since = _read(self.path), time.monotonic()
        while found is not None and found["run"] not in _dead:
            if time.monotonic() > since + EXPIRED_S:
                _dead.add(found["run"])
                break
            time.sleep(RENEWED_S / 4)
            seen = _read(self.path)
            if seen is not None and seen != found:
                return False
            found = seen
        return True

    def renew(self) -> None:
        self.renewals += 1
        files.write_json(self.path, self.who | {"renewals": self.renewals})

    def mine(self) -> bool:
        found = _read(self.path)
        return found is not None and found["token"] == self.who["token"]

    def keep(self, ended: threading.Event) -> None:
        while not ended.wait(RENEWED_S):
            with suppress(OSError, StorageError):  # the store may come back before the lease expires
                if not self.mine():
                    self.lost = True
                    return
                self.renew()
