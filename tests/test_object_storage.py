"""Artefacts in an object store: a real S3-compatible server on this machine, through a proxy that disturbs it."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from fault_proxy import Plan, every
from processes import Job, kill_dataset_workers

from vop import files, pipeline, storage
from vop.config import Config, ConfigError, load
from vop.datasets.folder import list_images
from vop.embedding import hash_file, read_image
from vop.schema import ClusterConfig
from vop.shards import ShardStore
from vop.storage import StorageError

PART = storage.PART


@pytest.fixture
def impatient(monkeypatch):
    """Fewer and shorter attempts, for stores that stay broken."""
    monkeypatch.setattr(storage, "RETRIES", 3)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    storage.remote.cache_clear()
    yield
    storage.remote.cache_clear()


def test_every_function_does_to_a_bucket_what_it_does_to_a_folder(store, tmp_path):
    for base in (store.uri("base"), str(tmp_path / "base")):
        assert not files.exists(base) and files.listing(base) == {}
        files.remove(base)
        files.write_bytes(files.join(base, "deep", "er", "a b ü"), b"content")
        files.write_json(files.join(base, "x.json"), {"a": 1})
        files.write_bytes(files.join(base, "empty"), b"")
        assert files.listing(base) == {"empty": 0, "x.json": 13}
        assert files.exists(base) and files.exists(files.join(base, "deep"))
        assert files.read_json(files.join(base, "x.json")) == {"a": 1}
        assert files.read_bytes(files.join(base, "empty")) == b""
        assert files.read_bytes(files.join(base, "deep/er/a b ü")) == b"content"
        files.write_json(files.join(base, "x.json"), {"a": 2})
        assert files.read_json(files.join(base, "x.json")) == {"a": 2}
        files.remove(files.join(base, "empty"))
        files.remove(files.join(base, "deep"))
        assert not files.exists(files.join(base, "deep/er")) and files.listing(base) == {"x.json": 13}
        with files.at_hand(base) as folder:
            assert [path.name for path in Path(folder).iterdir()] == ["x.json"]
        files.remove(base)
        assert not files.exists(files.join(base, "x.json"))
        for read in (files.read_bytes, files.read_json, files.sha256):
            with pytest.raises(FileNotFoundError):
                read(files.join(base, "x.json"))


def test_an_exception_publishes_nothing_and_keeps_what_was_there(store):
    uri = store.uri("file")
    with pytest.raises(RuntimeError, match="midway"), files.atomic(uri) as (filesystem, inner):
        with filesystem.open_output_stream(inner) as stream:
            stream.write(b"half")
        raise RuntimeError("midway")
    assert store.objects() == {}
    files.write_bytes(uri, b"old")
    with pytest.raises(KeyboardInterrupt), files.atomic(uri) as (_, inner):
        Path(inner).write_bytes(b"half of the new")
        raise KeyboardInterrupt
    assert store.objects() == {"file": b"old"}
    assert not Path(inner).exists()


def test_a_small_file_takes_one_request_and_a_large_one_is_sent_in_parts(store, monkeypatch):
    monkeypatch.setattr(storage, "PARTS_IN_FLIGHT", 1)
    files.write_bytes(store.uri("small"), b"x" * 1000)
    assert store.proxy.counted() == {"PUT": 1}
    large = os.urandom(1 << 20) * 21 + b"end"  # more parts than are in flight at once
    files.write_bytes(store.uri("large"), large)
    assert store.proxy.counted()["PUT"] == 1 + 1 + 3 + 1  # begin, the parts, complete
    assert store.objects() == {"small": b"x" * 1000, "large": large}
    store.proxy.reset()
    assert files.sha256(store.uri("small")) and store.proxy.counted() == {"HEAD": 1, "GET": 1}
    store.proxy.reset()
    assert files.read_bytes(store.uri("large")) == large
    assert store.proxy.counted()["GET"] == 1


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut"])
def test_what_fails_now_and_then_is_tried_again(store, fault):
    """Every second request fails, of a large file every third: each operation goes through all the same."""
    for data, k, rounds in ((b"small", 2, 12), (bytes(PART + 1), 3, 1)):
        store.proxy.reset(Plan(every(k, [fault])))
        for number in range(rounds):
            uri = store.uri("folder", f"{fault}-{number}")
            files.write_bytes(uri, data)
            assert files.read_bytes(uri) == data
            assert files.listing(store.uri("folder")) == {f"{fault}-{number}": len(data)}
            assert files.exists(uri)
            files.remove(uri)
            assert not files.exists(uri)
        assert len(store.proxy.disturbed()) == len(store.proxy.requests) // k
        if k == 2:  # an answer without content cannot be cut
            kinds = {"GET", "LIST"} if fault == "cut" else {"HEAD", "GET", "LIST", "PUT", "DELETE"}
            assert {request.kind for request in store.proxy.disturbed()} >= kinds


def test_a_long_job_does_not_run_out_of_retries(store):
    """The SDK's strategy "standard" would end here: it gives each process 100 retries."""
    files.write_bytes(store.uri("file"), b"content")
    store.proxy.reset(Plan(every(2, ["503"])))
    for _ in range(110):
        assert files.read_bytes(store.uri("file")) == b"content"
    assert len(store.proxy.disturbed()) > 200


def test_a_response_that_hangs_is_given_up_and_asked_for_again(store, impatient):
    files.write_bytes(store.uri("file"), b"content")
    for method in ("GET", "PUT"):
        pending = [method]
        store.proxy.reset(
            Plan(lambda _, m, __, pending=pending: "hang" if m in pending and not pending.clear() else None)
        )
        if method == "PUT":
            files.write_bytes(store.uri("file"), b"content")
        assert files.read_bytes(store.uri("file")) == b"content"
        assert len(store.proxy.disturbed()) == 1


@pytest.mark.parametrize("fault", ["500", "503", "reset", "hang"])
def test_a_store_that_stays_broken_is_an_error_that_says_what_was_tried(store, impatient, fault):
    files.write_bytes(store.uri("file"), b"content")
    store.proxy.reset(Plan(lambda *_: fault))
    for number, act in enumerate((files.read_bytes, files.exists, lambda uri: files.write_bytes(uri, b"new"))):
        store.proxy.reset(store.proxy.plan)
        with pytest.raises(
            StorageError, match=rf"s3://{store.bucket}/file at {store.proxy.url} .* in 4 attempts: .*Is it up"
        ):
            act(store.uri("file"))
        assert len(store.proxy.requests) == 4 if fault != "hang" else 4 <= len(store.proxy.requests) <= 8, number
        if fault == "hang":  # one is enough of this
            break
    store.proxy.reset()
    assert store.objects() == {"file": b"content"}


def test_a_broken_store_makes_no_bad_images(store, impatient):
    """An image that cannot be had now is no reason for quarantine: the job fails, and can go on. One refused is."""
    files.write_bytes(store.uri("1.jpg"), b"content")
    for read in (lambda uri: read_image(uri, 10**6), hash_file):
        store.proxy.reset(Plan(lambda *_: "503"))
        with pytest.raises(StorageError, match=r"1\.jpg .*in 4 attempts"):
            read(store.uri("1.jpg"))
    store.proxy.reset(Plan(lambda *_: "403"))
    assert "refuses access" in read_image(store.uri("1.jpg"), 10**6)[2]
    assert "cannot read the file" in read_image(store.uri("nothing.jpg"), 10**6)[2]


def test_a_part_that_cannot_be_sent_publishes_nothing(store, impatient):
    files.write_bytes(store.uri("file"), b"old")
    store.proxy.reset(Plan(lambda _, __, path: "500" if "partNumber=2" in path else None))
    with pytest.raises(StorageError, match="in 4 attempts"):
        files.write_bytes(store.uri("file"), b"x" * (6 * PART))
    assert store.objects() == {"file": b"old"}
    assert store.unfinished_uploads() == 1  # for the bucket's own rule to clean up: docs/storage.md


def test_no_store_at_all(impatient, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"s3://somewhere/file at http://127.0.0.1:9 .*in 4 attempts.*AWS_ENDPOINT_URL"
    ):
        files.read_bytes("s3://somewhere/file")


def test_what_is_refused_or_missing_is_said_at_once(store):
    """Asked once: permissions do not come by waiting."""
    files.write_bytes(store.uri("file"), b"content")
    acts = (files.read_bytes, files.exists, files.listing, files.remove, lambda uri: files.write_bytes(uri, b"new"))
    for act in acts:
        store.proxy.reset(Plan(lambda *_: "403"))
        with pytest.raises(
            PermissionError, match=rf"refuses access to s3://{store.bucket}/file.*Check the credentials"
        ):
            act(store.uri("file"))
        assert len(store.proxy.requests) == 1
    store.proxy.reset()
    with pytest.raises(FileNotFoundError, match=r"no bucket for s3://nowhere-at-all/file.*create it"):
        files.write_bytes("s3://nowhere-at-all/file", b"content")
    assert store.proxy.counted().total() == 1


@pytest.mark.parametrize(
    "uri",
    [
        "s3://HUSH1:HUSH2@bucket/images",
        "s3://HUSH1@bucket/images",
        "s3://bucket?access_key=HUSH1&secret_key=HUSH2",
        "s3://bucket/images?session_token=HUSH2",
        "https://bucket.host/images?X-Amz-Credential=HUSH1&X-Amz-Signature=HUSH2",
    ],
)
@pytest.mark.parametrize("key", ["images", "output", "weights"])
def test_credentials_in_a_path_are_refused_before_anything_is_written(uri, key):
    with pytest.raises(ConfigError, match=rf"{key}.* is a URI with credentials in it.*AWS_ACCESS_KEY_ID") as error:
        load(**{key: uri})
    assert "HUSH2" not in str(error.value) and "HUSH1" not in str(error.value)
    with pytest.raises(ValueError, match="is a URI with credentials in it") as error:
        files.resolve(uri)
    assert "HUSH2" not in str(error.value) and "HUSH1" not in str(error.value)


def test_options_of_a_connection_are_no_part_of_a_path():
    with pytest.raises(ConfigError, match=r"holds the option endpoint_override.*AWS_ENDPOINT_URL"):
        load(images="s3://bucket/images?endpoint_override=http://127.0.0.1:1")
    assert load(images="s3://bucket/im?ge*.jpg").images == "s3://bucket/im?ge*.jpg"  # a glob pattern


def test_ctrl_c_while_a_file_is_sent_does_not_publish_half_of_it(store):
    """The driver is interrupted while an upload of many parts is under way: the file is whole, or the older one."""
    store.proxy.reset(Plan(latency_s=0.3))
    code = """
import signal, sys
from vop import files, storage
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may have it ignored
files.write_bytes(sys.argv[1], b"x" * (3 * storage.PART))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, store.uri("file")], stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    while not any("partNumber" in request.path for request in list(store.proxy.requests)):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(2)
    _, said = child.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said
    assert [len(content) for content in store.objects().values()] in ([], [3 * PART])


def asked(images: str, output: str, **more) -> Config:
    return load(
        images=images,
        output=output,
        truth=images,
        embedding={"shard_size": 2, "batch_size": 2, "encoders": 1},
        retrieval={"query_batch": 4, "shards": 2},
        report={"queries": 3},
        **more,
    )


def is_receipt(path: str) -> bool:
    """Whether the receipt of a shard lies there."""
    return re.search(r"\bshard-\d+\.json\b", path) is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc")
def test_a_run_in_a_bucket_killed_and_disturbed_equals_one_on_disk(store, local_ray, rendered_collection, tmp_path):
    """Embed, register and report; every eleventh request fails, and the driver and its workers are ended by SIGKILL."""
    pipeline.register(asked(str(rendered_collection), str(tmp_path / "run")))
    told = asked(store.put(rendered_collection, "images"), store.uri("run"))
    disturbed = every(11, ["500", "503", "reset", "cut"])
    receipts = []

    def nothing_after_the_first_receipt(number: int, method: str, path: str) -> str | None:
        """So that the driver is in the middle when it is killed, however busy the machine is."""
        if receipts:
            return "503"
        if method == "PUT" and is_receipt(path):
            receipts.append(path)
            return None
        return disturbed(number, method, path)

    store.proxy.reset(Plan(nothing_after_the_first_receipt))
    driver = Job("register", dataclasses.replace(told, cluster=ClusterConfig(address=local_ray)), tmp_path)
    try:
        driver.wait_until(lambda: any(map(is_receipt, store.objects("run/store"))))
    finally:
        driver.kill()
        kill_dataset_workers()
    done = [*filter(is_receipt, store.objects("run/store"))]
    assert len(done) == 1

    store.proxy.reset(Plan(disturbed))
    job = pipeline.register(told)
    assert job.counts["embedded_now"] <= 24 - 2 * len(done)
    assert len(store.proxy.disturbed()) > 20
    assert store.unfinished_uploads() == 0
    local = {str(path.relative_to(tmp_path / "run")): path.read_bytes()
             for path in (tmp_path / "run").rglob("[!.]*") if path.is_file() and path.suffix != ".jsonl"}  # fmt: skip
    there = {name: content for name, content in store.objects("run").items() if not name.endswith(".jsonl")}
    assert set(there) == set(local)
    told_apart = {"config.yaml", "run.json", "report.html", "store/images.parquet"}  # by paths, seconds, times of files
    assert [name for name in sorted(local) if there[name] != local[name] and name not in told_apart] == []

    store.proxy.reset()
    pipeline.report(load(output=store.uri("run")))
    page = store.objects("run")["report.html"].decode()
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) <= {"data:", "https:"}  # all that it shows is in it
    assert not re.findall(r'src="(?!data:)', page)


def test_receipts_are_read_many_at_a_time(store):
    """Two requests for each, a receipt after the other, would take far from the store most of the time of a run."""
    for number in range(200):
        files.write_json(store.uri("store", f"shard-{number:05d}.json"), {"shard": number})
    files.write_bytes(store.uri("store", "shard-00200.json"), b'{"torn": ')
    store.proxy.reset(Plan(latency_s=0.02))
    receipts = ShardStore(store.uri("store"), {}).receipts()
    assert store.proxy.at_once > files.AT_ONCE / 2
    assert receipts == {number: {"shard": number} for number in range(200)}
    assert store.proxy.counted() == {"LIST": 1, "HEAD": 201, "GET": 201}


KEYS = 100_000


class Pages(BaseHTTPRequestHandler):
    """Lists the keys photos/000/0000000.jpg ..., 1,000 a page, as S3 does; knows nothing else."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        Pages.asked.append(self.path)
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        start, size = int(query.get("continuation-token", 0)), int(query.get("max-keys", 1000))
        end = min(start + size, KEYS)
        keys = (
            f"<Contents><Key>photos/{i // 1000:03d}/{i:07d}.jpg</Key><Size>{i}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for i in range(start, end)
        )
        told = (f"<KeyCount>{end - start}</KeyCount><IsTruncated>{str(end < KEYS).lower()}</IsTruncated>"
                f"<NextContinuationToken>{end}</NextContinuationToken>")  # fmt: skip
        self._send(200, f"<ListBucketResult>{told}{''.join(keys)}</ListBucketResult>".encode())

    def do_HEAD(self):
        Pages.asked.append(f"HEAD {self.path}")
        self._send(404, b"")

    def _send(self, status: int, content: bytes):
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def test_a_listing_of_100_000_keys_asks_for_each_page_once(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        collection = list_images("s3://bucket/photos")
    finally:
        server.shutdown()
        server.server_close()
    assert len(collection) == KEYS
    assert (collection.images[-1].name, collection.images[-1].size) == ("099/0099999.jpg", KEYS - 1)
    heads = [path for path in Pages.asked if path.startswith("HEAD")]
    assert len(heads) <= 2  # whether photos is a file, or the marker of a folder
    assert len(Pages.asked) - len(heads) <= KEYS // 1000 + 1  # and whether anything is in it
