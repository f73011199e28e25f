"""Two machines of namespaces: own file systems, own network addresses, and nothing in common but an object store.

Runs as the first process of a namespace of processes, mounts and networks, so that all ends with it:

    unshare --mount --net --pid --fork --kill-child --mount-proc python tests/two_nodes.py IMAGES RESULT key=value...

Registers the folder IMAGES, which it puts into the store; RESULT is a folder for what then lies there.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DISK = "/mnt"  # where each node has a disk of its own; short, since Ray makes sockets there
RAY_PORT = 6399
# The rest of a node is what both were installed with: it can be read, and the images cannot even be seen.
NODE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=2g tmpfs {disk}
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs -o size=1m tmpfs {images}
mkdir {disk}/home {disk}/tmp
grep -v ' tmpfs \\| proc \\| sysfs \\| devtmpfs \\| devpts \\| mqueue \\| cgroup' /proc/mounts | cut -d' ' -f2 |
    while read -r place; do mount -o remount,bind,ro "$place"; done
hostname node{number}
ip link set lo up
"""


def run(*command: str, **options) -> None:
    subprocess.run(command, check=True, **options)


class Node:
    """A machine: commands run with its mounts and its network."""

    def __init__(self, number: int, images: str, environment: dict[str, str]):
        self.address, self.environment = ADDRESSES[number], environment
        own = ["--net"] if number else []  # the first keeps the network of the store, which stands beside it
        self.holder = subprocess.Popen(["unshare", "--mount", "--uts", *own, "sleep", "infinity"])
        self.inside = ["nsenter", f"--target={self.holder.pid}", "--mount", "--net", "--uts", f"--wdns={DISK}"]
        while Path(f"/proc/{self.holder.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        run(*self.inside[:-1], "sh", "-c", NODE.format(disk=DISK, images=images, number=number))

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        """Run a command on it."""
        return subprocess.run([*self.inside, *command], env=self.environment, check=True, **options)


def connected(nodes: list[Node]) -> None:
    """Lay a wire between both."""
    names = [f"wire{number}" for number in range(len(nodes))]
    run("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1])
    for name, node in zip(names, nodes, strict=True):
        run("ip", "link", "set", name, "netns", str(node.holder.pid))
        node.run("ip", "address", "add", f"{node.address}/24", "dev", name)
        node.run("ip", "link", "set", name, "up")


def main(images: str, result: str, *settings: str) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
        **{"HOME": f"{DISK}/home", "TMPDIR": f"{DISK}/tmp", "RAY_TMPDIR": f"{DISK}/tmp", "PYTHONPATH": str(ROOT)},
        **{"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
        **{"NUMBA_CACHE_DIR": f"{DISK}/tmp", "MPLCONFIGDIR": f"{DISK}/tmp"},
    }
    photographs = {path.name: path.read_bytes() for path in Path(images).iterdir()}
    run("ip", "link", "set", "lo", "up")
    nodes = [Node(number, images, environment) for number in (0, 1)]
    connected(nodes)
    with ObjectStore(ADDRESSES[0]).running() as store:
        environment |= store.environment
        os.environ |= store.environment
        store.new_bucket()
        for name, content in photographs.items():
            with store.behind.open_output_stream(f"{store.bucket}/images/{name}") as stream:
                stream.write(content)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=2", "--disable-usage-stats",
               "--object-store-memory=200000000"]  # fmt: skip
        nodes[0].run(*ray, "--head", f"--port={RAY_PORT}", f"--node-ip-address={ADDRESSES[0]}",
                     "--include-dashboard=false", f"--temp-dir={DISK}/ray", stdout=sys.stderr)  # fmt: skip
        nodes[1].run(*ray, f"--address={ADDRESSES[0]}:{RAY_PORT}", f"--node-ip-address={ADDRESSES[1]}",
                     f"--temp-dir={DISK}/ray", stdout=sys.stderr)  # fmt: skip
        store.proxy.reset()
        since = time.monotonic()
        told = [f"images={store.uri('images')}", f"truth={store.uri('images')}", f"output={store.uri('run')}"]
        nodes[0].run(sys.executable, "-m", "vop.cli", "register", f"cluster.address={ADDRESSES[0]}:{RAY_PORT}",
                     *told, *settings, stdout=sys.stderr)  # fmt: skip
        written, read = Counter(), Counter()
        for request in store.proxy.requests:
            if request.method == "PUT" and "/shard-" in request.path and request.path.endswith(".parquet"):
                written[request.client] += 1
            if request.method == "GET" and "/images/" in request.path and request.path.endswith(".jpg"):
                read[request.client] += 1
        hosts = [node.run("hostname", capture_output=True, text=True).stdout.strip() for node in nodes]
        disks = [node.run("find", DISK, "-name", "*.parquet", capture_output=True, text=True).stdout for node in nodes]
        about = {"shards_written": written, "images_read": read, "hosts": hosts, "parquet_on_disks": disks,
                 "seconds": round(time.monotonic() - since, 1)}  # fmt: skip
        Path(result, "about.json").write_text(json.dumps(about))
        for name, content in store.objects("run").items():
            path = Path(result, "run", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
