"""A long result written in parts, so that a killed run continues where it stopped."""

import hashlib
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vop import files


def fingerprint(*inputs: object) -> str:
    """Hash of JSON-like inputs: equal inputs give equal results, so parts of one may serve the other."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Parts:
    """Numbered tables of a result that is fully determined by `fingerprint`.

    They lie in `directory/parts-<fingerprint>/`; those of other inputs are never read.
    """

    def __init__(self, directory: str, fingerprint: str):
        self.directory, self.path = directory, files.join(directory, f"parts-{fingerprint}")

    def missing(self, count: int) -> list[int]:
        """Numbers below `count` whose part is not written."""
        there = files.listing(self.path)
        return [number for number in range(count) if f"{number:06d}.parquet" not in there]

    def write(self, number: int, table: pa.Table) -> None:
        """Write a part."""
        with files.atomic(files.join(self.path, f"{number:06d}.parquet")) as (filesystem, inner):
            pq.write_table(table, inner, filesystem=filesystem)

    def read(self, count: int) -> Iterator[pa.Table]:
        """The parts below `count`, in order."""
        for number in range(count):
            filesystem, inner = files.resolve(files.join(self.path, f"{number:06d}.parquet"))
            yield pq.read_table(inner, filesystem=filesystem, partitioning=None)

    def remove(self) -> None:
        """Delete the parts once what they make up is written, and those that runs with other inputs left."""
        filesystem, inner = files.resolve(self.directory)
        for info in filesystem.get_file_info(pafs.FileSelector(inner)):
            if info.base_name.startswith("parts-") and info.type == pafs.FileType.Directory:
                filesystem.delete_dir(info.path)
