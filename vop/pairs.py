"""Pair lists: `pairs.parquet` for programs, `pairs.txt` for hloc."""

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from vop import files

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("database", pa.string()),
        ("rank", pa.int32()),  # from 0, per query
        ("score", pa.float32()),  # sum of the similarities of the hits, U of DESIGN
        ("weighted", pa.float32()),  # the same with TF-IDF weights, W
        ("shortlist_rank", pa.int32()),  # rank by global descriptor; null without a shortlist
        ("shortlist_score", pa.float32()),
    ]
)


class PairsError(ValueError):
    """Pairs that a format cannot hold."""


def write_parquet(path: str, parts: Iterable[pa.Table]) -> int:
    """Write parts of a pair list, one row group each, as one file; returns the number of pairs."""
    count = 0
    with files.atomic(path) as (filesystem, inner), pq.ParquetWriter(inner, SCHEMA, filesystem=filesystem) as writer:
        for part in parts:
            writer.write_table(part.cast(SCHEMA))
            count += part.num_rows
    return count


def read_parquet(path: str) -> pa.Table:
    """All pairs of a file, by query and rank."""
    filesystem, inner = files.resolve(path)
    return pq.read_table(inner, filesystem=filesystem, partitioning=None)


def iterate(path: str) -> Iterator[pa.Table]:
    """The pairs of a file, one row group at a time."""
    filesystem, inner = files.resolve(path)
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def check_hloc_names(names: Iterable[str]) -> None:
    """Raise `PairsError` if a name cannot stand in hloc's pair list, whose lines are split at white space."""
    bad = [name for name in names if name.split() != [name]]
    if bad:
        raise PairsError(
            f"{len(bad)} image names hold white space, the first {bad[0]!r}: hloc's pairs.txt splits its lines there. "
            "Rename the files, or use pairs.parquet"
        )


def write_hloc(path: str, parts: Iterable[pa.Table]) -> None:
    """Write `query database` lines, the format that hloc reads. Raises `PairsError` for names with white space."""
    with files.atomic(path) as (filesystem, inner), filesystem.open_output_stream(inner) as stream:
        for part in parts:
            queries, database = part["query"].to_pylist(), part["database"].to_pylist()
            check_hloc_names({*queries, *database})
            stream.write("".join(f"{q} {d}\n" for q, d in zip(queries, database, strict=True)).encode())
