"""An S3-compatible server (moto's) in a process of its own, behind a proxy that counts and disturbs."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path

import pyarrow.fs as pafs
from fault_proxy import FaultProxy

# Prints the port that it was given, and serves until its input ends: with the process that started it, however it dies.
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class ObjectStore:
    """A store at `proxy.url`; processes with `environment` find it by `s3://` paths."""

    def __init__(self, host: str = "127.0.0.1"):
        self.proxy = FaultProxy(host)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.proxy.url,
        }
        self._server: subprocess.Popen | None = None
        self._port, self._buckets, self.bucket = 0, itertools.count(1), ""

    @contextmanager
    def running(self) -> Iterator["ObjectStore"]:
        """Start the server, and end it afterwards."""
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._port = int(self._server.stdout.readline())
            self.proxy.serve(("127.0.0.1", self._port))
            yield self
        finally:
            self.proxy.close()
            self._server.kill()
            self._server.wait()

    @cached_property
    def behind(self) -> pafs.S3FileSystem:
        """The store as it is, not through the proxy."""
        return pafs.S3FileSystem(endpoint_override=f"http://127.0.0.1:{self._port}", allow_bucket_creation=True)

    def new_bucket(self) -> str:
        """An empty bucket, which `uri` names from now on."""
        self.bucket = f"bucket-{next(self._buckets)}"
        self.behind.create_dir(self.bucket)
        return self.bucket

    def uri(self, *names: str) -> str:
        """A path in the bucket."""
        return "/".join([f"s3://{self.bucket}", *names])

    def put(self, folder: Path, name: str) -> str:
        """Copy a local folder into the bucket under a name; returns its URI."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                with self.behind.open_output_stream(f"{self.bucket}/{name}/{path.relative_to(folder)}") as stream:
                    stream.write(path.read_bytes())
        return self.uri(name)

    def objects(self, name: str = "") -> dict[str, bytes]:
        """Content of the objects under a name, without the markers of empty folders, by what follows the name."""
        base = "/".join(filter(None, [self.bucket, name]))
        infos = self.behind.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
        return {info.path[len(base) + 1 :]: self._content(info.path) for info in infos if info.is_file}

    def _content(self, path: str) -> bytes:
        with self.behind.open_input_stream(path) as stream:
            return stream.read()

    def unfinished_uploads(self) -> int:
        """Uploads in parts that were begun, and neither completed nor given up."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", f"/{self.bucket}?uploads")
        return connection.getresponse().read().count(b"<UploadId>")

    def wait_for(self, name: str, seconds: float = 60) -> None:
        """Return once an object is there."""
        deadline = time.monotonic() + seconds
        while self.behind.get_file_info(f"{self.bucket}/{name}").type == pafs.FileType.NotFound:
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.02)
