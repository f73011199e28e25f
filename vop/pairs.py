"""Pair lists: `pairs.parquet` (the ranking), `pair_list.parquet` (what was chosen from it), `pairs.txt` for hloc.

`scenes.parquet` says which images hang together by the pairs of pairs.txt.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
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

SOURCES = ("forest", "sequence", "neighbours", "best")  # in the order in which a budget is spent on them
LIST_SCHEMA = pa.schema(
    [
        ("query", pa.string()),  # the first of the two names; each unordered pair stands in the list once
        ("database", pa.string()),
        ("weighted", pa.float32()),  # the larger of the two directions; null where neither was scored
        ("source", pa.string()),  # why the pair is listed: one of `SOURCES`
    ]
)
SCENES_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("component", pa.int32()),  # from 0, the largest first
        ("size", pa.int32()),  # images of the component
    ]
)

CHUNK = 1 << 20  # pairs held as names at a time
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
    try:
        with files.opened(files.join(output, "pairs.parquet")) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return metadata.get(FINGERPRINT.encode(), b"").decode() or None


def iterate_rows(path: str, names: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of a file in parts, as positions in `names`: query and database (R,) int32, weighted (R,) float32."""
    known = pa.array(names, pa.string())
    with files.opened(path) as source, pq.ParquetFile(source) as file:
        for part in file.iter_batches(CHUNK, columns=["query", "database", "weighted"]):
            query, database = (pc.index_in(part[side], known).to_numpy() for side in ("query", "database"))
            yield query, database, part["weighted"].to_numpy()


def read_rows(path: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of a file, as `iterate_rows` gives them."""
    with files.opened(path) as source, pq.ParquetFile(source) as file:
        count = file.metadata.num_rows
    columns, start = tuple(np.empty(count, dtype) for dtype in (np.int32, np.int32, np.float32)), 0
    for part in iterate_rows(path, names):
        for column, values in zip(columns, part, strict=True):
            column[start : start + len(values)] = values
        start += len(part[0])
    return columns


def write_list(
    path: str, names: Sequence[str], low: np.ndarray, high: np.ndarray, weighted: np.ndarray, source: np.ndarray
) -> None:
    """Write chosen pairs in `LIST_SCHEMA`: low, high are positions in `names`, source in `SOURCES`; NaN: no score."""
    known, sources = pa.array(names, pa.string()), pa.array(SOURCES, pa.string())
    with files.atomic(path) as (filesystem, inner), pq.ParquetWriter(inner, LIST_SCHEMA, filesystem=filesystem) as out:
        for start in range(0, len(low), CHUNK):
            here = slice(start, start + CHUNK)
            pair = [known.take(pa.array(rows[here])) for rows in (low, high)]
            score = pa.array(weighted[here], from_pandas=True)  # NaN becomes null
            out.write_table(pa.table([*pair, score, sources.take(pa.array(source[here]))], schema=LIST_SCHEMA))


def write_scenes(path: str, names: Sequence[str], component: np.ndarray, sizes: np.ndarray) -> None:
    """Write the connected component of every image and its size, by component, then name."""
    order = np.argsort(component, kind="stable")
    columns = [pa.array(names, pa.string()).take(pa.array(order)), pa.array(component[order])]
    table = pa.table([*columns, pa.array(sizes[component[order]], pa.int32())], schema=SCENES_SCHEMA)
    with files.atomic(path) as (filesystem, inner):
        pq.write_table(table, inner, filesystem=filesystem)


def finish(output: str, names: Iterable[str], listed: str = "pairs.parquet") -> dict[str, object]:
    """Write pairs.txt from the file `listed` of the run; returns counts of pairs.parquet for the record.

    Where `names` cannot stand in pairs.txt it is not written, an older one is removed, and the reason is in the counts.
    """
    parquet, text = files.join(output, "pairs.parquet"), files.join(output, "pairs.txt")
    counts: dict[str, object] = {"pairs": 0, "queries_with_pairs": 0}
    for part in iterate(parquet):
        counts["pairs"] += part.num_rows
        counts["queries_with_pairs"] += pc.sum(pc.equal(part["rank"], 0)).as_py() or 0
    try:
        check_hloc_names(names)
        write_hloc(text, iterate(files.join(output, listed)))
    except PairsError as error:
        files.remove(text)
        counts["pairs_txt"] = f"not written: {error}"
    return counts


def read_parquet(path: str) -> pa.Table:
    """All pairs of a file, by query and rank."""
    with files.opened(path) as file:
        return pq.read_table(file)


def iterate(path: str) -> Iterator[pa.Table]:
    """The pairs of a file, one row group at a time."""
    with files.opened(path) as source, pq.ParquetFile(source) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def read_given(path: str) -> pa.Table:
    """A pair list that someone gave: query, database, rank (int32, from 0 per query), each ordered pair once.

    A Parquet file with query and database, and perhaps rank, or a text file with two names on a line, as hloc has it;
    without ranks a query's pairs rank as they stand. Raises `PairsError` for anything else, `FileNotFoundError`.
    """
    try:
        table = read_parquet(path) if path.endswith(".parquet") else _read_text(path)
    except pa.ArrowInvalid as error:
        raise PairsError(f"{path} is not Parquet: {error}") from error
    missing = {"query", "database"} - {*table.column_names}
    if missing:
        raise PairsError(f"{path} lacks the columns {sorted(missing)}; it has {table.column_names}")
    if not table.num_rows:
        raise PairsError(f"{path} lists no pairs")
    return ranked(table.select([name for name in ("query", "database", "rank") if name in table.column_names]))


def ranked(table: pa.Table) -> pa.Table:
    """Pairs (query, database and perhaps rank) by query and rank, each once; ranks count from 0 without gaps."""
    if "rank" not in table.column_names:
        table = table.append_column("rank", pa.array(np.arange(table.num_rows, dtype=np.int32)))
    first = table.group_by(["query", "database"], use_threads=False).aggregate([("rank", "min")])
    first = first.rename_columns(["query", "database", "rank"]).sort_by([("query", "ascending"), ("rank", "ascending")])
    starts = np.flatnonzero(pc.not_equal(first["query"][1:], first["query"][:-1]).to_numpy()) + 1
    starts = np.concatenate([[0], starts])
    ranks = np.arange(first.num_rows) - np.repeat(starts, np.diff([*starts, first.num_rows]))
    return first.set_column(2, "rank", pa.array(ranks.astype(np.int32)))


def _read_text(path: str) -> pa.Table:
    lines = [line.split() for line in files.read_bytes(path).decode().splitlines() if line.strip()]
    wrong = next((line for line in lines if len(line) != 2), None)
    if wrong:
        raise PairsError(
            f"{path}: expected two names on a line, found {' '.join(wrong)!r}; names with white space need a Parquet "
            "file with the columns query and database"
        )
    query, database = zip(*lines, strict=True) if lines else ((), ())
    return pa.table({"query": pa.array(query, pa.string()), "database": pa.array(database, pa.string())})


def unordered(listed: pa.Table) -> pa.Table:
    """The pairs of images in a list, each once under its sorted names: image0, image1, sorted."""
    query, database = (listed[side].combine_chunks() for side in ("query", "database"))
    names = {"image0": pc.min_element_wise(query, database), "image1": pc.max_element_wise(query, database)}
    once = pa.table(names).group_by(["image0", "image1"], use_threads=False).aggregate([])
    return once.sort_by([("image0", "ascending"), ("image1", "ascending")])


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
            "Rename the files, or read the pairs from their Parquet file"
        )


def write_hloc(path: str, parts: Iterable[pa.Table]) -> None:
    """Write `query database` lines, the format that hloc reads. Raises `PairsError` for names with white space."""
    with files.atomic(path) as (filesystem, inner), filesystem.open_output_stream(inner) as stream:
        for part in parts:
            queries, database = part["query"].to_pylist(), part["database"].to_pylist()
            check_hloc_names({*queries, *database})
            stream.write("".join(f"{q} {d}\n" for q, d in zip(queries, database, strict=True)).encode())
