"""Pair lists: `pairs.parquet` for programs, `pairs.txt` for hloc."""

from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("database", pa.string()),
        ("rank", pa.int32()),  # from 0, per query
        ("score", pa.float32()),  # sum of the similarities of all hits
        ("weighted", pa.float32()),  # the same with retrieval.weights: what the pairs are ranked by
        ("shortlist_rank", pa.int32()),  # rank by global descriptor; null without a shortlist
        ("shortlist_score", pa.float32()),
    ]
)

FINGERPRINT = "made_by"  # key in the metadata of pairs.parquet


class PairsError(ValueError):
    """Pairs that a format cannot hold."""


def write(output: str, fingerprint: str, read: Callable[[], Iterable[pa.Table]]) -> None:
    """Write pairs.parquet and patch_weights.parquet (query, patch_weights) of a run from its parts.

    `read()` iterates over the parts, tables of `SCHEMA` with the column patch_weights (non-null in one row of an
    illustrated query). `fingerprint` says what the pairs follow from; pairs.parquet, written last, carries it.
    """
    weights = pa.concat_tables([part.filter(part["patch_weights"].is_valid()) for part in read()])
    with files.atomic(files.join(output, "patch_weights.parquet")) as (filesystem, inner):
        pq.write_table(weights.select(["query", "patch_weights"]), inner, filesystem=filesystem)
    schema, path = SCHEMA.with_metadata({FINGERPRINT: fingerprint}), files.join(output, "pairs.parquet")
    with files.atomic(path) as (filesystem, inner), pq.ParquetWriter(inner, schema, filesystem=filesystem) as writer:
        for part in read():
            writer.write_table(part.select(SCHEMA.names))


def written(output: str) -> str | None:
    """The fingerprint of the pairs.parquet of a run; None without one."""
    filesystem, inner = files.resolve(files.join(output, "pairs.parquet"))
    try:
        metadata = pq.read_schema(inner, filesystem=filesystem).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return metadata.get(FINGERPRINT.encode(), b"").decode() or None


def finish(output: str, names: Iterable[str]) -> dict[str, object]:
    """Write pairs.txt from pairs.parquet; returns counts for the record.

    Where `names` cannot stand in pairs.txt it is not written, an older one is removed, and the reason is in the counts.
    """
    parquet, text = files.join(output, "pairs.parquet"), files.join(output, "pairs.txt")
    counts: dict[str, object] = {"pairs": 0, "queries_with_pairs": 0}
    for part in iterate(parquet):
        counts["pairs"] += part.num_rows
        counts["queries_with_pairs"] += pc.sum(pc.equal(part["rank"], 0)).as_py() or 0
    try:
        check_hloc_names(names)
        write_hloc(text, iterate(parquet))
    except PairsError as error:
        files.remove(text)
        counts["pairs_txt"] = f"not written: {error}"
    return counts


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


def best_scores(table: pa.Table) -> dict[str, float]:
    """The score of the best pair of every query that has one."""
    first = table.filter(pc.equal(table["rank"], 0))
    return dict(zip(first["query"].to_pylist(), first["weighted"].to_pylist(), strict=True))


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
