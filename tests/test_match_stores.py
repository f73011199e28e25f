"""Stores of local features and of matches: what is written comes back, and plans only ever add what is missing."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vop import catalog, features
from vop.features import FeatureStore, LocalFeatures
from vop.matches import NO_MATCHES, Matches, MatchStore, located, matches_of
from vop.shards import StoreError

WIDTH = 6
COUNTS = [5, 0, 9, 1, 4, 7, 3]  # keypoints of the images, one without any
NAMES = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(len(COUNTS))]


def local_features(i):
    rng = np.random.default_rng(i)
    keypoints = rng.uniform(0, 400, (COUNTS[i], 2)).astype(np.float32)
    descriptors = rng.standard_normal((COUNTS[i], WIDTH)).astype(np.float16)
    return LocalFeatures(keypoints, rng.random(COUNTS[i], np.float32), descriptors, (640 + i, 480), (320, 240 + i))


def shard(ids):
    found = [local_features(i) for i in ids]
    sizes = ("width", "height", "scaled_width", "scaled_height")
    columns = {"image_id": ids, "name": [NAMES[i] for i in ids]}
    columns |= {key: [(*f.size, *f.scaled)[at] for f in found] for at, key in enumerate(sizes)}
    columns |= {"content": [f"{i:032x}" for i in ids]}
    return pa.table(columns | features.columns(found))


def planned(store, shard_size):
    listed = pa.table(
        {"name": NAMES, "scene": [name[0] for name in NAMES], "size": [1] * len(NAMES), "modified_ns": [1] * len(NAMES)}
    )
    return store.plan(listed, shard_size, False, lambda name: None)[1]


@pytest.fixture
def store(tmp_path):
    """Seven images in shards of three, by name: ids follow the sorted names."""
    made = FeatureStore.create(str(tmp_path / "features"), {"method": "test"}, WIDTH)
    for number, lines in planned(made, 3).items():
        made.write_shard(number, shard([NAMES.index(name) for name in lines["name"].to_pylist()]).set_column(
            0, "image_id", lines["image_id"]), [])  # fmt: skip
    made.finish()
    return FeatureStore.open(made.path)


def assert_equal(found, expected):
    for key in ("keypoints", "scores", "descriptors"):
        np.testing.assert_array_equal(getattr(found, key), getattr(expected, key))
        assert getattr(found, key).dtype == getattr(expected, key).dtype
    assert (found.size, found.scaled) == (expected.size, expected.scaled)


def test_features_come_back_as_they_were_in_any_order(store):
    live = store.live()
    assert live["name"].to_pylist() == sorted(NAMES)
    for number in set(live["shard"].to_pylist()):
        lines = [line for line in live.to_pylist() if line["shard"] == number][::-1]
        rows = np.array([line["row"] for line in lines])
        keypoints = store.read_keypoints(number, rows)
        for line, found, (points, size) in zip(lines, store.read(number, rows), keypoints, strict=True):
            expected = local_features(NAMES.index(line["name"]))
            assert_equal(found, expected)
            np.testing.assert_array_equal(points, expected.keypoints)
            assert size == expected.size


def test_plain_pyarrow_reads_the_keypoints(store):
    rows = pq.read_table(f"{store.path}/shard-00000.parquet", columns=["name", "keypoints"]).to_pylist()
    assert len(rows) == 3
    for row in rows:
        keypoints = local_features(NAMES.index(row["name"])).keypoints
        np.testing.assert_array_equal(np.array(row["keypoints"], np.float32).reshape(-1, 2), keypoints)


@pytest.mark.parametrize("column", ["keypoints", "scores", "descriptors"])
def test_a_flipped_bit_is_noticed(store, column, tmp_path):
    name = sorted(NAMES)[3]
    path = tmp_path / "features" / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[data.index(getattr(local_features(NAMES.index(name)), column).tobytes()) + 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"shard-00001\.parquet.*Delete shard-00001\.json and run `vop match` again"):
        store.read(1, np.arange(3))


def test_a_shard_without_its_receipt_is_planned_again_as_it_was(store, tmp_path):
    """The remedy that the error of a damaged shard names."""
    assert planned(store, 3) == {}
    (tmp_path / "features" / "shard-00001.json").unlink()
    pending = planned(store, 3)
    assert list(pending) == [1]
    assert pending[1]["name"].to_pylist() == sorted(NAMES)[3:6]
    statuses = store.images()["status"].to_pylist()
    assert (statuses.count(catalog.PLANNED), statuses.count(catalog.OK)) == (3, 4)


@pytest.fixture
def matches(tmp_path):
    return MatchStore.create(str(tmp_path / "matches"), {"method": "test"})


def wanted(store, pairs):
    image0, image1 = (pa.array([NAMES[pair[side]] for pair in pairs]) for side in (0, 1))
    return located(store.live(), image0, image1)


def found_between(name0, name1):
    rng = np.random.default_rng([*name0.encode(), *name1.encode()])
    count = rng.integers(0, 5)
    return Matches(rng.integers(0, 9, (count, 2)).astype(np.int32), rng.random(count, np.float32))


def write(matches, number, failed=()):
    lines = matches.planned(number)
    names = [*zip(lines["image0"].to_pylist(), lines["image1"].to_pylist(), strict=True)]
    errors = ["unreadable" if name in failed else None for name in names]
    found = [found_between(*name) if error is None else NO_MATCHES for name, error in zip(names, errors, strict=True)]
    return matches.write_shard(number, lines, found, errors)


ALL = [(i, j) for i in range(7) for j in range(i + 1, 7)]


def test_pairs_are_planned_once_whatever_is_asked_for_later(store, matches):
    first = matches.plan(wanted(store, ALL[:12]), 5)
    assert first == [0, 1, 2]
    assert matches.plan(wanted(store, ALL[:12]), 5) == first  # nothing is written yet: the same plan stands
    for number in first:
        write(matches, number)
    assert matches.plan(wanted(store, ALL[3:9]), 5) == []
    rest = matches.plan(wanted(store, ALL), 5)
    assert rest == [3, 4]
    table, shards, _ = matches.catalog()
    assert np.bincount(shards).tolist() == [5, 5, 2, 5, 4]
    assert len({*zip(table["image0"].to_pylist(), table["image1"].to_pylist(), strict=True)}) == len(ALL)


def test_matches_are_found_where_they_were_written(store, matches):
    asked = wanted(store, ALL)
    for number in matches.plan(asked, 4):
        write(matches, number)
    assert matches.plan(asked, 4) == []
    order = np.random.default_rng(0).permutation(len(ALL))
    asked = asked.take(pa.array(order))
    for pair, number, row in zip(asked.to_pylist(), *matches.locate(asked), strict=True):
        table = matches.read_shard(number)
        line = table.slice(row, 1)
        assert (line["image0"][0].as_py(), line["image1"][0].as_py()) == (pair["image0"], pair["image1"])
        expected = found_between(pair["image0"], pair["image1"])
        np.testing.assert_array_equal(matches_of(line)[0], expected.indices)
        np.testing.assert_array_equal(np.array(line["scores"][0].as_py(), np.float32), expected.scores)


def test_a_pair_that_failed_is_planned_again_and_others_are_not(store, matches):
    asked = wanted(store, ALL[:6])
    bad = (NAMES[ALL[2][0]], NAMES[ALL[2][1]])
    for number in matches.plan(asked, 4):
        receipt = write(matches, number, failed={bad})
    assert sum(len(each["quarantined"]) for each in matches.receipts().values()) == 1
    assert receipt["rows"] == receipt["ok"] + len(receipt["quarantined"])
    (again,) = matches.plan(asked, 4)
    assert matches.planned(again).num_rows == 1
    write(matches, again)
    assert matches.plan(asked, 4) == []
    shards, _ = matches.locate(asked)
    assert shards[2] == again


def test_pairs_whose_features_moved_are_planned_again(store, matches):
    asked = wanted(store, ALL[:4])
    for number in matches.plan(asked, 4):
        write(matches, number)
    rows = [asked["row1"][0].as_py() + 1, *asked["row1"].to_pylist()[1:]]
    moved = asked.set_column(asked.schema.get_field_index("row1"), "row1", pa.array(rows, pa.int32()))
    with pytest.raises(StoreError, match="1 pairs are not in the store"):
        matches.locate(moved)
    (again,) = matches.plan(moved, 4)
    assert matches.planned(again).to_pylist() == moved.slice(0, 1).to_pylist()
    assert matches.locate(moved)[0].tolist() == [again, 0, 0, 0]


def test_a_small_plan_is_cut_fine_and_a_large_one_as_asked(store, tmp_path):
    sizes = {}
    for asked in (8, 1000):
        matches = MatchStore.create(str(tmp_path / f"m{asked}"), {})
        matches.plan(wanted(store, ALL), asked)
        sizes[asked] = np.bincount(matches.catalog()[1]).tolist()
    assert sizes == {8: [8, 8, 5], 1000: [8, 8, 5]}


def test_another_method_is_refused(matches):
    with pytest.raises(StoreError, match="matches=") as error:
        matches.check_features({"method": "other"})
    assert "the store has 'test', this run 'other'" in str(error.value)
