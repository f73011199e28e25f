"""One run at a time on an output, and a crash releases it. The object store is a folder behind another name."""

import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow.fs as pafs
import pytest

from vop import files, lock, storage
from vop.lock import LockedError

BUCKET = "s3://bucket/run"
ME = lock.identity("embed", "1")
HOLD = "import sys, time; from vop import lock\n" \
       "with lock.held(sys.argv[1], lock.identity('train', '2')): print(flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, monkeypatch):
    """A directory on a disk, and one in a store that knows no locks."""
    for name, seconds in {"PATIENCE_S": 0.2, "RENEWED_S": 0.1, "EXPIRED_S": 3.0, "SETTLED_S": 0.5}.items():
        monkeypatch.setattr(lock, name, seconds)
    if request.param == "disk":
        return str(tmp_path / "run")
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    store.create_dir("bucket/run")
    monkeypatch.setattr(storage, "remote", lambda *bucket, **options: store)
    return BUCKET


def in_time(happened) -> None:
    """Return once something has happened, which other threads may take a while for on a busy machine."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_only_one_holds_it_and_gives_it_back(place):
    assert lock.holder(place) is None
    with lock.held(place, ME):
        told = f"is being written by `vop embed` .process {os.getpid()} on {ME['host']}, since"
        with pytest.raises(LockedError, match=told), lock.held(place, ME):
            pass
        assert lock.holder(place).items() >= ME.items()
    assert lock.holder(place) is None
    with lock.held(place, ME):
        pass
    assert not files.exists(files.join(place, lock.HOLDER))


def test_it_is_given_back_whatever_happens(place):
    with pytest.raises(ZeroDivisionError), lock.held(place, ME):
        _ = 1 / 0
    with lock.held(place, ME):
        pass


@pytest.mark.parametrize("place", ["disk"], indirect=True)
def test_a_killed_process_lets_go_of_a_disk_at_once(place):
    other = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(LockedError, match=f"`vop train` .process {other.pid}"), lock.held(place, ME):
            pass
        assert lock.holder(place)["process"] == other.pid
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        assert lock.holder(place) is None
        with lock.held(place, ME):
            assert lock.holder(place).items() >= ME.items()
    finally:
        other.kill()


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_a_lease_that_nobody_renews_is_taken_over(place, tmp_path, monkeypatch):
    abandoned = {**ME, "process": 0, "token": "of a machine that burnt down", "renewals": 7}
    files.write_json(files.join(place, lock.HOLDER), abandoned)
    then = time.time() - 3600
    os.utime(tmp_path / "bucket/run" / lock.HOLDER, (then, then))
    assert lock.holder(place) is None
    monkeypatch.setattr(time, "time", lambda: 0.0)  # clocks do not matter
    before = time.monotonic()
    with lock.held(place, ME):
        assert time.monotonic() - before >= lock.EXPIRED_S
        assert lock.holder(place)["process"] == os.getpid()


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_all_leases_of_a_run_that_was_found_dead_are_free_at_once(place, tmp_path):
    abandoned = {**ME, "run": "that died", "process": 0, "token": "of its own", "renewals": 7}
    (tmp_path / "bucket/run/store").mkdir()
    for folder in ("run", "run/store"):
        files.write_json(f"s3://bucket/{folder}/{lock.HOLDER}", abandoned)
    with lock.held(place, ME):
        before = time.monotonic()
        with lock.held(f"{place}/store", ME):
            assert time.monotonic() - before < lock.EXPIRED_S


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_a_lease_is_renewed_for_as_long_as_it_is_held(place):
    with lock.held(place, ME):
        first = lock.holder(place)["renewals"]
        in_time(lambda: lock.holder(place)["renewals"] > first)


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_of_two_that_come_at_once_one_has_it(place):
    both, other, holding, refused = threading.Barrier(2), threading.Event(), [], []

    def come(name):
        both.wait()
        try:
            with lock.held(place, {**ME, "run": name}):
                holding.append(name)
                other.wait(60)
        except LockedError:
            refused.append(name)
        other.set()

    two = [threading.Thread(target=come, args=(name,)) for name in "ab"]
    for each in two:
        each.start()
    for each in two:
        each.join()
    assert len(holding) == len(refused) == 1


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
def test_one_that_was_taken_for_dead_stops(place):
    taken = {**ME, "command": "train", "process": 4711, "token": "of another", "renewals": 1}

    def taken_over():
        files.write_json(files.join(place, lock.HOLDER), taken)
        check()

    with pytest.raises(LockedError, match=r"`vop train` .process 4711"), lock.held(place, ME) as check:
        check()
        in_time(taken_over)
    assert lock.holder(place) == taken  # it is not ours to remove
