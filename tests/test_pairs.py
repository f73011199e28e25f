import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vop import pairs
from vop.pairs import PairsError

PART = pairs.SCHEMA.append(pa.field("patch_weights", pa.list_(pa.float32())))


def part(*rows):
    """A part of `write`'s input from (query, database, rank, score, weighted, listed rank and score, weights)."""
    columns = zip(*rows, strict=True) if rows else [[]] * len(PART)
    return pa.table([pa.array(list(c), f.type) for c, f in zip(columns, PART, strict=True)], schema=PART)


def parts():
    yield part(
        ("a/1.jpg", "b/2.jpg", 0, 3.5, 0.25, 4, 0.5, [0.0, 1.0]),
        ("a/1.jpg", "b/1.jpg", 1, 2.5, 0.125, 0, 0.75, None),
    )
    yield part()
    yield part(("c.jpg", "a/1.jpg", 0, 1.0, 0.5, None, None, None))


def write(folder, read, names):
    assert pairs.written(str(folder)) is None
    pairs.write(str(folder), "f00d", read)
    return pairs.finish(str(folder), names)


NAMES = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "c.jpg", "d.jpg"]


def test_everything_written_comes_back(tmp_path):
    counts = write(tmp_path, parts, NAMES)
    assert pairs.written(str(tmp_path)) == "f00d"
    assert counts == {"pairs": 3, "queries_with_pairs": 2}
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.schema.equals(pairs.SCHEMA)
    assert table.to_pylist() == [
        {key: value for key, value in row.items() if key != "patch_weights"}
        for piece in parts()
        for row in piece.to_pylist()
    ]
    assert pairs.read_parquet(str(tmp_path / "pairs.parquet")).equals(table)
    assert pa.concat_tables(list(pairs.iterate(str(tmp_path / "pairs.parquet")))).equals(table)
    assert (tmp_path / "pairs.txt").read_text() == "a/1.jpg b/2.jpg\na/1.jpg b/1.jpg\nc.jpg a/1.jpg\n"
    weights = pq.read_table(tmp_path / "patch_weights.parquet")
    assert weights.to_pylist() == [{"query": "a/1.jpg", "patch_weights": [0.0, 1.0]}]


def test_best_scores(tmp_path):
    table = pa.concat_tables(list(parts()))
    assert pairs.best_scores(table) == {"a/1.jpg": 0.25, "c.jpg": 0.5}


@pytest.mark.parametrize(
    "name", ["with space.jpg", "tab\there.jpg", "no-break\u00a0space.jpg", " lead.jpg", "line\n.jpg"]
)
def test_names_that_hloc_would_split_give_no_text_file(tmp_path, name):
    """Even if the name is in no pair: the next run may have it, and the file would come and go."""
    (tmp_path / "pairs.txt").write_text("of an older run\n")
    counts = write(tmp_path, parts, [*NAMES, name])
    assert not (tmp_path / "pairs.txt").exists()
    assert counts["pairs_txt"].startswith("not written: 1 image names hold white space")
    assert repr(name) in counts["pairs_txt"]
    assert pq.read_metadata(tmp_path / "pairs.parquet").num_rows == 3


def test_a_pair_list_with_white_space_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(PairsError, match="white space"):
        pairs.write_hloc(str(tmp_path / "pairs.txt"), [*parts(), part(("a b.jpg", "c.jpg", 0, 1, 1, 0, 0, None))])
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_any_pair_writes_empty_lists(tmp_path):
    counts = write(tmp_path, lambda: [part()], NAMES)
    assert counts == {"pairs": 0, "queries_with_pairs": 0}
    assert pq.read_table(tmp_path / "pairs.parquet").schema.equals(pairs.SCHEMA)
    assert (tmp_path / "pairs.txt").read_bytes() == b""
    assert pairs.best_scores(pairs.read_parquet(str(tmp_path / "pairs.parquet"))) == {}
