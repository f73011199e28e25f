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

    They lie in `directory/<kind>-<fingerprint>/`; those of other inputs are never read.
    """

    def __init__(self, directory: str, fingerprint: str, kind: str = "parts"):
        self.directory, self.kind, self.path = directory, kind, files.join(directory, f"{kind}-{fingerprint}")

    def missing(self, count: int) -> list[int]:
        """Numbers below `count` whose part is not written."""
        there = files.listing(self.path)
        return [number for number in range(count) if f"{number:06d}.parquet" not in there]

    def write(self, number: int, table: pa.Table) -> None:
        """Write a part."""
        words = [field.name for field in table.schema if pa.types.is_string(field.type)]  # numbers seldom come twice
        with files.atomic(files.join(self.path, f"{number:06d}.parquet")) as (filesystem, inner):
            pq.write_table(
                table, inner, filesystem=filesystem, compression="zstd", use_dictionary=words, write_statistics=False
            )

    def read(self, count: int) -> Iterator[pa.Table]:
        """The parts below `count`, in order."""
        return (self.read_one(number) for number in range(count))

    def read_one(self, number: int) -> pa.Table:
        """One part."""
        path = files.join(self.path, f"{number:06d}.parquet")
        with files.opened(path) as file:
            return pq.read_table(file)

    def described(self, number: int) -> tuple[int, pa.Schema]:
        """Rows and schema of one part, without its content."""
        path = files.join(self.path, f"{number:06d}.parquet")
        with files.opened(path) as source, pq.ParquetFile(source) as file:
            return file.metadata.num_rows, file.schema_arrow

    @classmethod
    def all_of(cls, directory: str, kind: str) -> list["Parts"]:
        """The parts of this kind that lie in a directory, whatever inputs they follow from."""
        names = sorted(info.base_name for info in files.entries(directory) if info.type == pafs.FileType.Directory)
        return [cls(directory, name[len(kind) + 1 :], kind) for name in names if name.startswith(f"{kind}-")]

    def remove(self, but_these: bool = False) -> None:
        """Delete the parts of this kind, once what they make up is written; `but_these`: only those of other inputs."""
        for parts in Parts.all_of(self.directory, self.kind):
            if not (but_these and parts.path == self.path):
                files.remove(parts.path)
