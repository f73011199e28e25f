"""Files for hloc, read back by hloc's own rules, which are written down here anew."""

import h5py
import matched_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matched_runs import BLANK, EXPORTED, FAILED, LISTED, NAMES, SCALED, SIZE

import vop
from vop import files, hloc
from vop.config import ConfigError
from vop.features import LocalFeatures
from vop.pairs import PairsError
from vop.shards import StoreError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of the files of a run, and the record of the export."""
    folder = tmp_path_factory.mktemp("hloc")
    run = matched_runs.write(folder)
    return folder / "out", vop.export_matches(output=run, export={"hloc": str(folder / "out")})


def read_matches(h5, name0, name1):
    """Matches (m, 2) and scores of a pair as hloc looks them up: by either order of the names, slashes as dashes."""
    for names, flipped in (((name0, name1), False), ((name1, name0), True)):
        key = "/".join(name.replace("/", "-") for name in names)
        if key in h5:
            matches0, scores = (h5[key][column][()] for column in ("matches0", "matching_scores0"))
            kept = np.flatnonzero(matches0 != -1)
            found = np.stack([kept, matches0[kept]], axis=1)
            return (found[:, ::-1] if flipped else found), scores[kept]
    raise KeyError((name0, name1))


def test_features_of_every_matched_image(exported):
    with h5py.File(exported[0] / "features.h5") as h5:
        for name in [*NAMES, BLANK]:
            expected, group = matched_runs.local_features(name)[0], h5[name]
            # hloc's pixel centres lie at 0: it adds 0.5 for COLMAP, whose convention is ours.
            np.testing.assert_allclose(group["keypoints"][()] + 0.5, expected.keypoints, atol=1e-6)
            np.testing.assert_array_equal(group["descriptors"][()], expected.descriptors.T)
            np.testing.assert_array_equal(group["scores"][()], expected.scores)
            assert group["descriptors"].dtype == np.float16
            assert group["image_size"][()].tolist() == [*SIZE]
            assert group["keypoints"].attrs["uncertainty"] == SIZE[0] / SCALED[0]
        datasets = []
        h5.visit(lambda path: datasets.append(path) if isinstance(h5[path], h5py.Dataset) else None)
        assert len(datasets) == 4 * (len(NAMES) + 1)


def test_matches_are_found_in_both_orders(exported):
    with h5py.File(exported[0] / "matches.h5") as h5:
        for name0, name1 in EXPORTED:
            expected = matched_runs.matches(name0, name1)
            found, scores = read_matches(h5, name0, name1)
            np.testing.assert_array_equal(found, expected.indices)
            np.testing.assert_array_equal(scores, expected.scores.astype(np.float16))
            np.testing.assert_array_equal(read_matches(h5, name1, name0)[0], expected.indices[:, ::-1])
        assert len(read_matches(h5, BLANK, "a/0.jpg")[0]) == 0
        assert h5["a-0.jpg/a-1.jpg/matches0"].dtype == np.int16
        assert sum(len(group) for group in h5.values()) == len(EXPORTED)
        with pytest.raises(KeyError):
            read_matches(h5, *FAILED)


def test_the_list_has_the_pairs_with_matches_as_the_run_listed_them(exported):
    lines = [tuple(line.split(" ")) for line in (exported[0] / "pairs.txt").read_text().splitlines()]
    whole = [pair for pair in LISTED[:-3] if tuple(sorted(pair)) != FAILED]
    assert sorted(lines) == sorted(whole)
    ranks = {query: [database for asked, database in whole if asked == query] for query, _ in whole}
    assert {query: [database for asked, database in lines if asked == query] for query, _ in lines} == ranks


def test_the_summary_says_what_was_written(exported):
    folder, run = exported
    assert run.counts == {
        "hloc": {"path": str(folder), "images": 7, "pairs": len(EXPORTED)},
        "pairs_left_out": 4,  # failed, in quarantine, an image with itself, an unknown image
    }
    assert f"{folder} (features of 7 images, matches of {len(EXPORTED)} pairs)" in run.summary()
    assert "4 pairs of the run that have no matches" in run.summary()


def test_a_repeated_export_gives_the_same_bytes(tmp_path):
    run = matched_runs.write(tmp_path)
    for name in ("one", "two", "two"):
        vop.export_matches(output=run, export={"hloc": str(tmp_path / name)})
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == ["features.h5", "matches.h5", "pairs.txt"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_a_run_that_was_moved_is_exported_from_its_new_place(tmp_path):
    matched_runs.write(tmp_path)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    vop.export_matches(output=str(moved), export={"hloc": str(tmp_path / "out")})
    assert (tmp_path / "out" / "matches.h5").exists()


def test_more_keypoints_than_16_bits_can_number(tmp_path):
    """The numbers of such matches would turn negative in hloc's own type."""
    table = {
        "image0": ["a", "a"],
        "image1": ["b", "c"],
        "flipped": [False, False],
        "matches": [[[0, 32768], [1, 40000]], [[1, 32767]]],
    }
    kind = pa.list_(pa.list_(pa.int32(), 2))
    table |= {"matches": pa.array(table["matches"], kind), "scores": pa.array([[0.5, 1], [1]], pa.list_(pa.float32()))}
    counts = {"a": 3, "b": 40001, "c": 32768}
    assert list(hloc.write_matches(str(tmp_path / "m.h5"), [pa.table(table)], counts)) == [2]
    with h5py.File(tmp_path / "m.h5") as h5:
        assert read_matches(h5, "a", "b")[0].tolist() == [[0, 32768], [1, 40000]]
        assert read_matches(h5, "c", "a")[0].tolist() == [[32767, 1]]
        assert h5["a/c/matches0"].dtype == np.int16


def test_names_that_hloc_would_confuse_are_refused():
    with pytest.raises(PairsError, match=r"'a/1.jpg' and 'a-1.jpg' are one to hloc"):
        hloc.check_names(["a/1.jpg", "b/1.jpg", "a-1.jpg"])
    with pytest.raises(PairsError, match="white space"):
        hloc.check_names(["a 1.jpg"])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def torn():
        yield [
            ("x.jpg", LocalFeatures(np.ones((1, 2), np.float32), np.ones(1), np.ones((1, 4), np.float16), SIZE, SIZE))
        ]
        raise OSError("torn")

    (tmp_path / "f.h5").write_bytes(b"older")
    with pytest.raises(OSError, match="torn"):
        list(hloc.write_features(str(tmp_path / "f.h5"), torn()))
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]
    assert (tmp_path / "f.h5").read_bytes() == b"older"


def test_what_cannot_be_exported_is_said_at_once(tmp_path):
    out = {"hloc": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"needs export\.hloc=FOLDER or export\.colmap=FILE"):
        vop.export_matches(output=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no run at output=.*run `vop match` first"):
        vop.export_matches(output=str(tmp_path), export=out)
    files.write_json(str(tmp_path / "run.json"), {"command": "register", "counts": {}, "timings_s": {}})
    with pytest.raises(ConfigError, match=r"was `vop register`, which matched no pairs"):
        vop.export_matches(output=str(tmp_path), export=out)
    assert not (tmp_path / "out").exists()


def test_stores_that_changed_since_are_refused(tmp_path):
    run = matched_runs.write(tmp_path)
    out = {"hloc": str(tmp_path / "out")}
    with (tmp_path / "list.txt").open("a") as listed:
        listed.write(f"{BLANK} b/5.jpg\n")  # after the run
    with pytest.raises(StoreError, match=r"1 pairs are not in the store .*'b/5.jpg' with 'blank.jpg'"):
        vop.export_matches(output=run, export=out)
    matched_runs.write(other := tmp_path / "other")  # its images, and a run of them
    receipt = other / "run" / "matches" / "shard-00000.json"
    receipt.unlink()
    with pytest.raises(StoreError, match=r"1 shards of .* are not matched yet: run `vop match` again"):
        vop.export_matches(output=str(other / "run"), export=out)
    files.write_json(str(other / "run" / "features" / "shard-00000.json"), {"sha256": "another", "quarantined": []})
    with pytest.raises(StoreError, match="are not of the features at"):
        vop.export_matches(output=str(other / "run"), export=out)
    assert not (tmp_path / "out").exists()


def listed(folder):
    return {tuple(line.split(" ")) for line in (folder / "pairs.txt").read_text().splitlines()}


def test_without_a_given_list_the_pairs_are_those_that_the_run_registered(tmp_path):
    run = matched_runs.write(tmp_path, pair_list=None)
    ranking = [(NAMES[0], NAMES[1]), (NAMES[1], NAMES[0]), (NAMES[2], NAMES[0])]
    query, database = zip(*ranking, strict=True)
    pq.write_table(pa.table({"query": query, "database": database, "rank": [0, 0, 0]}), f"{run}/pairs.parquet")
    record = files.read_json(f"{run}/run.json")
    files.write_json(f"{run}/run.json", record | {"counts": record["counts"] | {"pairs": 3}})
    vop.export_matches(output=run, export={"hloc": str(tmp_path / "ranked")})
    assert listed(tmp_path / "ranked") == set(ranking)
    pq.write_table(pa.table({"query": query[2:], "database": database[2:]}), f"{run}/pair_list.parquet")
    vop.export_matches(output=run, export={"hloc": str(tmp_path / "chosen")})
    assert listed(tmp_path / "chosen") == {ranking[2]}
    with h5py.File(tmp_path / "chosen" / "features.h5") as h5:
        assert BLANK not in h5
        assert "a/1.jpg" not in h5
