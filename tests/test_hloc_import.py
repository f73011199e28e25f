"""hloc's files become stores: files written here by hloc's rules, and our own exports read back."""

import itertools

import h5py
import matched_runs
import numpy as np
import pyarrow.parquet as pq
import pytest
from matched_runs import BLANK, EXPORTED, FAILED, LISTED, NAMES, WIDTH
from PIL import Image, ImageOps

import vop
from vop.catalog import TooManyBadImagesError
from vop.config import ConfigError
from vop.features import FeatureStore
from vop.foreign_hdf5 import ForeignLinkError
from vop.foreign_hloc import HlocError
from vop.image import Header, read_header, upright_points
from vop.matches import MatchStore, matches_of
from vop.names import UnsafeNameError
from vop.shards import StoreError

PICTURES = {"a/0.jpg": (64, 48), "a/1.jpg": (48, 64), "b/2.jpg": (64, 48)}
D = 4


def write_features(path, names=tuple(PICTURES), seed=0, half=True, left_out=(), **changed):
    """Local features as hloc's extraction writes them, with h5py alone; returns the keypoints by name, centres at 0."""
    rng, kind, keypoints = np.random.default_rng(seed), np.float16 if half else np.float32, {}
    with h5py.File(path, "a", libver="latest") as h5:
        for i, name in enumerate(names):
            size, count = PICTURES.get(name, (64, 48)), 9 + i
            values = {"keypoints": rng.uniform([0, 0], np.array(size) - 1, (count, 2)).astype(kind),
                      "descriptors": rng.standard_normal((D, count)).astype(kind),
                      "scores": rng.random(count).astype(kind), "image_size": np.array(size)} | changed  # fmt: skip
            group = h5.create_group(name)
            for key, value in values.items():
                if key not in left_out:
                    group.create_dataset(key, data=value)
            group["keypoints"].attrs["uncertainty"] = np.float32(2)
            keypoints[name] = values["keypoints"]
    return keypoints


def write_matches(path, *pairs, separator="/"):
    """Matches of pairs (name0, name1, matches0) as hloc's matching writes them."""
    with h5py.File(path, "a", libver="latest") as h5:
        for name0, name1, matches0 in pairs:
            group = h5.create_group(separator.join(name.replace("/", "-") for name in (name0, name1)))
            group.create_dataset("matches0", data=np.array(matches0, np.int16))
            scores = np.linspace(0, 1, len(matches0), dtype=np.float16)
            group.create_dataset("matching_scores0", data=scores)


FIRST = ("b/2.jpg", "a/0.jpg", [-1, 3, -1, 8, -1, 0, -1, -1, 1, -1, -1])  # 11 keypoints to 9, the later name first
SECOND = ("a/0.jpg", "a/1.jpg", [9, -1, -1, -1, -1, -1, -1, -1, 0])


@pytest.fixture
def folder(tmp_path):
    for name, size in PICTURES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "images" / name)
    return tmp_path


def imported(folder, output="run", **changed):
    told = {"features": str(folder / "f.h5"), "matches": str(folder / "m.h5")} | changed
    return vop.import_hloc(images=str(folder / "images"), output=str(folder / output), hloc=told)


def stores(folder, output="run"):
    return FeatureStore.open(str(folder / output / "features")), MatchStore.open(str(folder / output / "matches"))


def features_of(store):
    live, found = store.live(), {}
    for number, row, name in zip(*(live[key].to_pylist() for key in ("shard", "row", "name")), strict=True):
        (found[name],) = store.read(number, np.array([row]))
    return found


def matches_in(store):
    """(image0, image1) -> indices, scores, error of every pair."""
    found = {}
    for number in store.receipts():
        table = store.read_shard(number)
        names = zip(*(table[key].to_pylist() for key in ("image0", "image1")), strict=True)
        rest = zip(matches_of(table), table["scores"].to_pylist(), table["error"].to_pylist(), strict=True)
        found |= dict(zip(names, rest, strict=True))
    return found


def test_files_of_hloc_become_stores(folder):
    keypoints = write_features(folder / "f.h5", [*PICTURES, "c/elsewhere.jpg"])
    write_matches(folder / "m.h5", FIRST, ("c/elsewhere.jpg", "a/0.jpg", [1] * 12))
    write_matches(folder / "m.h5", SECOND, separator="_")
    run = imported(folder)
    features, matches = stores(folder)
    found = features_of(features)
    assert [*found] == [*PICTURES]
    with h5py.File(folder / "f.h5") as h5:
        for name, each in found.items():
            np.testing.assert_array_equal(each.keypoints, keypoints[name].astype(np.float32) + 0.5)
            np.testing.assert_array_equal(each.descriptors, h5[name]["descriptors"][()].T)
            np.testing.assert_array_equal(each.scores, h5[name]["scores"][()].astype(np.float32))
            assert each.size == PICTURES[name]
            assert each.scaled == tuple(side // 2 for side in PICTURES[name])  # what the uncertainty says
    pairs = matches_in(matches)
    assert [*sorted(pairs)] == [("a/0.jpg", "a/1.jpg"), ("a/0.jpg", "b/2.jpg")]
    assert pairs["a/0.jpg", "a/1.jpg"][0].tolist() == [[0, 9], [8, 0]]
    assert pairs["a/0.jpg", "b/2.jpg"][0].tolist() == [[0, 5], [1, 8], [3, 1], [8, 3]]
    assert pairs["a/0.jpg", "b/2.jpg"][1] == pytest.approx([0.5, 0.8, 0.1, 0.3], abs=1e-3)
    assert features.is_imported and matches.is_imported
    assert run.counts["not_in_collection"] == 1
    assert run.counts["pairs_not_imported"] == {"of images that have no features here": 1}
    assert "matching.method=imported" in run.summary()
    assert "1 images of the files are not in the collection" in run.summary()


def test_a_second_import_does_nothing_and_another_file_is_refused(folder):
    write_features(folder / "f.h5")
    write_matches(folder / "m.h5", FIRST)
    imported(folder)
    before = {path: path.read_bytes() for path in (folder / "run").glob("*/shard*")}
    run = imported(folder)
    assert (run.counts["imported_now"], run.counts["pairs_imported_now"]) == (0, 0)
    assert before == {path: path.read_bytes() for path in (folder / "run").glob("*/shard*")}
    write_features(folder / "g.h5", seed=1)
    with pytest.raises(StoreError, match=r"made with other features(.|\n)*files_sha256"):
        imported(folder, features=str(folder / "g.h5"))
    write_matches(folder / "n.h5", SECOND)
    with pytest.raises(StoreError, match=r"matches\.files_sha256"):
        imported(folder, matches=str(folder / "n.h5"))


def test_several_files_are_read_as_one(folder):
    write_features(folder / "f-1.h5", ["a/0.jpg"])
    first = write_features(folder / "f-2.h5", ["a/1.jpg", "a/0.jpg"], seed=1)
    write_features(folder / "f-3.h5", ["b/2.jpg"], keypoints=np.zeros((11, 2)), scores=np.ones(11),
                   descriptors=np.ones((D, 11)))  # fmt: skip
    write_matches(folder / "m-1.h5", ("a/0.jpg", "a/1.jpg", [-1] * 8 + [3]))
    write_matches(folder / "m-2.h5", SECOND, FIRST)
    imported(folder, features=str(folder / "f-*.h5"), matches=str(folder / "m-*.h5"))
    features, matches = stores(folder)
    np.testing.assert_array_equal(features_of(features)["a/1.jpg"].keypoints[:, 0], first["a/1.jpg"][:, 0] + 0.5)
    assert len(features_of(features)["a/0.jpg"]) == 9  # of the first file
    found = matches_in(matches)
    assert found["a/0.jpg", "a/1.jpg"][0].tolist() == [[8, 3]]
    assert len(found["a/0.jpg", "b/2.jpg"][0]) == 4


def test_features_without_descriptors_and_scores_are_taken(folder):
    write_features(folder / "f.h5", left_out=("descriptors", "scores", "image_size"))
    write_matches(folder / "m.h5", FIRST)
    imported(folder)
    found = features_of(stores(folder)[0])["a/0.jpg"]
    assert found.descriptors.shape == (9, 0)
    assert found.scores.tolist() == [1] * 9


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"keypoints": np.zeros((5, 3))}, r"keypoints is float64 of shape \(5, 3\); expected .* \(any, 2\)"),
        ({"keypoints": np.full((11, 2), np.nan)}, "keypoints has 22 values that are not finite"),
        ({"descriptors": np.zeros((D, 7))}, r"descriptors is .* \(4, 7\); expected numbers of shape \(4, 11\)"),
        ({"image_size": [640, 480]}, r"image_size is \[640, 480\], but the image is 64x48"),
        ({"scores": np.zeros(3)}, "scores is"),
    ],
)
def test_a_bad_group_is_quarantined_with_its_reason(folder, changed, reason):
    write_features(folder / "f.h5", ["a/0.jpg", "a/1.jpg"])
    usual = {"keypoints": np.zeros((11, 2)), "descriptors": np.ones((D, 11)), "scores": np.ones(11)}
    write_features(folder / "f.h5", ["b/2.jpg"], **(usual | changed))
    write_matches(folder / "m.h5", FIRST, SECOND)
    with pytest.raises(TooManyBadImagesError):
        imported(folder)
    run = vop.import_hloc(
        images=str(folder / "images"), output=str(folder / "run"), embedding={"max_bad_fraction": 0.5},
        hloc={"features": str(folder / "f.h5"), "matches": str(folder / "m.h5")},
    )  # fmt: skip
    ((name, why),) = run.quarantined
    assert name == "b/2.jpg"
    with pytest.raises(HlocError, match=reason):
        raise HlocError(why)
    assert run.counts["pairs_not_imported"] == {"of images that have no features here": 1}


def test_matches_of_other_features_fail_with_a_reason(folder):
    write_features(folder / "f.h5")
    write_matches(folder / "m.h5", ("a/0.jpg", "a/1.jpg", [0] * 8), ("a/0.jpg", "b/2.jpg", [11] * 9))
    write_matches(folder / "m.h5", ("a/1.jpg", "b/2.jpg", [-1] * 10))
    run = imported(folder)
    found = matches_in(stores(folder)[1])
    assert "8 numbers up to 0, but the images have 9 and 10 keypoints" in found["a/0.jpg", "a/1.jpg"][2]
    assert "9 numbers up to 11, but the images have 9 and 11 keypoints" in found["a/0.jpg", "b/2.jpg"][2]
    assert found["a/1.jpg", "b/2.jpg"][2] is None
    assert run.counts["pairs_failed"] == 2


def test_names_that_hloc_confuses_are_left_out(tmp_path):
    for name in ("a/9.jpg", "a-9.jpg", "b.jpg", "x_y.jpg", "z.jpg", "x", "y.jpg_z.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / name, "JPEG")
    listed = ["a/9.jpg", "a-9.jpg", "b.jpg", "x_y.jpg", "z.jpg", "x", "y.jpg_z.jpg"]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in listed))
    write_features(tmp_path / "f.h5", listed)
    write_matches(tmp_path / "m.h5", ("a/9.jpg", "b.jpg", [-1] * 9), ("b.jpg", "z.jpg", [-1] * 11))
    write_matches(tmp_path / "m.h5", ("x_y.jpg", "z.jpg", [-1] * 12), ("x_y.jpg", "b.jpg", [-1] * 12), separator="_")
    run = vop.import_hloc(
        images=str(tmp_path / "list.txt"), root=str(tmp_path / "images"), output=str(tmp_path / "run"),
        hloc={"features": str(tmp_path / "f.h5"), "matches": str(tmp_path / "m.h5")},
    )  # fmt: skip
    assert {*matches_in(stores(tmp_path)[1])} == {("b.jpg", "z.jpg"), ("b.jpg", "x_y.jpg")}
    assert run.counts["pairs_not_imported"] == {"names that may be read in several ways": 2}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_are_turned_as_the_picture_is(tmp_path, orientation):
    """Pillow turns a picture in which one pixel is lit; hloc's keypoint of that pixel must lie on it still."""
    pixels = np.zeros((5, 9), np.uint8)
    pixels[1, 6] = 255
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored, (tmp_path / "a.png").open("rb") as file:
        upright = np.asarray(ImageOps.exif_transpose(stored))
        header = read_header(file)
    assert header == Header((9, 5), orientation)
    assert header.upright == upright.shape[::-1]
    ((x, y),) = upright_points(np.array([[6.5, 1.5]]), header)
    assert np.argwhere(upright == 255).tolist() == [[y - 0.5, x - 0.5]]


def test_a_turned_photograph_keeps_its_keypoints(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(folder / "images" / "a/1.jpg", exif=exif)
    keypoints = write_features(folder / "f.h5")["a/1.jpg"].astype(np.float32)
    write_matches(folder / "m.h5", SECOND)
    imported(folder)
    found = features_of(stores(folder)[0])["a/1.jpg"]
    assert found.size == (64, 48)
    np.testing.assert_allclose(found.keypoints, np.stack([64 - keypoints[:, 1] - 0.5, keypoints[:, 0] + 0.5], axis=1))
    with h5py.File(folder / "f.h5", "a") as h5:
        del h5["a/1.jpg/image_size"]
        h5["a/1.jpg/image_size"] = [64, 48]
        h5.attrs["orientation"] = "upright"  # as our export says
    imported(folder, "again")
    found = features_of(stores(folder, "again")[0])["a/1.jpg"]
    np.testing.assert_allclose(found.keypoints, keypoints + 0.5)


def test_what_cannot_be_imported_says_why(folder):
    with pytest.raises(ConfigError, match=r"needs hloc\.features=FILE and hloc\.matches=FILE"):
        vop.import_hloc(images=str(folder / "images"), output=str(folder / "run"))
    with pytest.raises(FileNotFoundError, match=r"no file at hloc\.features="):
        imported(folder)
    with pytest.raises(HlocError, match="lies in a bucket"):
        imported(folder, features="s3://bucket/f.h5")
    (folder / "f.h5").write_text("no HDF5")
    with pytest.raises(HlocError, match=r"hloc\.features: cannot open .*f\.h5 as HDF5"):
        imported(folder)
    (folder / "f.h5").unlink()
    assert not (folder / "run").exists()
    write_features(folder / "f.h5", ["other/0.jpg"])
    write_matches(folder / "m.h5", FIRST)
    with pytest.raises(HlocError, match=r"'other/0.jpg', but of none of the 3 here, such as 'a/0.jpg'"):
        imported(folder)
    write_features(folder / "f.h5", ["a/1.jpg"])
    with pytest.raises(HlocError, match="no matches of the images with features here; it has 1 of images that have no"):
        imported(folder)


def test_files_that_lead_elsewhere_are_refused(folder):
    write_features(folder / "g.h5")
    write_matches(folder / "m.h5", FIRST)
    with h5py.File(folder / "f.h5", "w") as h5:
        for name in PICTURES:
            h5.create_group(name)["keypoints"] = np.zeros((1, 2))
            h5[name]["descriptors"] = h5py.ExternalLink(str(folder / "g.h5"), f"{name}/descriptors")
    with pytest.raises(ForeignLinkError, match=r"is a link to .*g\.h5"):
        imported(folder)
    with h5py.File(folder / "n.h5", "w") as h5:
        h5["b-2.jpg"] = h5py.ExternalLink(str(folder / "m.h5"), "b-2.jpg")
    with pytest.raises(ForeignLinkError, match=r"is a link to .*m\.h5"):
        imported(folder, features=str(folder / "g.h5"), matches=str(folder / "n.h5"))
    with h5py.File(folder / "h.h5", "w") as h5:
        h5["a/../../secret.jpg/keypoints"] = np.zeros((1, 2))
    with pytest.raises(UnsafeNameError, match="leads to a folder above"):
        imported(folder, features=str(folder / "h.h5"))


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    """A run, its export, and the stores that the export was imported into."""
    folder = tmp_path_factory.mktemp("trip")
    run = matched_runs.write(folder)
    vop.export_matches(output=run, export={"hloc": str(folder / "out")})
    told = {"features": str(folder / "out" / "features.h5"), "matches": str(folder / "out" / "matches.h5")}
    vop.import_hloc(images=str(folder / "images"), output=str(folder / "back"), hloc=told)
    return folder


def test_an_export_that_is_imported_gives_the_same_features_and_matches(round_trip):
    features, matches = stores(round_trip, "back")
    found = features_of(features)
    assert [*found] == sorted([*NAMES, BLANK])
    for name, each in found.items():
        expected = matched_runs.local_features(name)[0]
        np.testing.assert_allclose(each.keypoints, expected.keypoints, atol=6e-5)  # 0.5 away and back, in float32
        np.testing.assert_array_equal(each.descriptors, expected.descriptors)
        np.testing.assert_array_equal(each.scores, expected.scores)
        assert (each.size, each.scaled) == (expected.size, expected.scaled)
    found = matches_in(matches)
    assert sorted(found) == EXPORTED
    for pair, (indices, scores, error) in found.items():
        expected = matched_runs.matches(*pair)
        np.testing.assert_array_equal(indices, expected.indices)
        np.testing.assert_array_equal(scores, expected.scores.astype(np.float16).astype(np.float32))
        assert error is None
    assert features.manifest["width"] == WIDTH


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_imported_matches_are_posed_and_exported_again(round_trip):
    told = {"images": str(round_trip / "images"), "pair_list": str(round_trip / "list.txt"),
            "matches": str(round_trip / "back" / "matches"), "features": str(round_trip / "back" / "features"),
            "output": str(round_trip / "posed"), "matching": {"method": "imported"}}  # fmt: skip
    job = vop.relative_pose(cameras=str(round_trip), pose={"thresholds": []}, report={"queries": 0}, **told)
    assert (job.counts["pairs_matched"], job.counts["matched_now"]) == (len(EXPORTED), 0)
    assert sorted(job.counts["pairs_unmatched"].values()) == [1, 1, 1, 1]
    poses = pq.read_table(job.path("poses.parquet")).to_pylist()
    reasons = {(row["image0"], row["image1"]): row["reason"] for row in poses}
    assert reasons[FAILED] == "pair not in the imported matches"
    assert reasons["a/1.jpg", "lost.jpg"] == "image not in the imported features"
    errors = [row["rotation_error"] for row in poses if row["reason"] is None]
    assert len(errors) == len(list(itertools.combinations(NAMES, 2))) - 1
    assert max(errors) < 0.5
    vop.export_matches(output=job.output, export={"hloc": str(round_trip / "again")})
    with h5py.File(round_trip / "out" / "matches.h5") as one, h5py.File(round_trip / "again" / "matches.h5") as two:
        assert sorted(one) == sorted(two)
        for pair in EXPORTED:
            group = "/".join(name.replace("/", "-") for name in pair)
            group = group if group in one else "/".join(reversed(group.split("/")))
            np.testing.assert_array_equal(one[group]["matches0"], two[group]["matches0"])
    with pytest.raises(StoreError, match=r"was imported .*give matching\.method=imported"):
        vop.match(**(told | {"matching": {"method": "xfeat+lighterglue"}, "output": str(round_trip / "other")}))
    (round_trip / "few.txt").write_text(" ".join(FAILED) + "\n")
    with pytest.raises(ConfigError, match=r"none of 1 pairs is in the imported stores.*pair not in the imported"):
        vop.match(**(told | {"pair_list": str(round_trip / "few.txt"), "output": str(round_trip / "few")}))
    computed = {"features": str(round_trip / "run" / "features"), "matches": str(round_trip / "run" / "matches")}
    with pytest.raises(StoreError, match=r"was computed, not imported.*features=\.\.\."):
        vop.match(**(told | computed | {"output": str(round_trip / "mixed")}))


def test_listed_pairs_keep_their_order_in_the_file(tmp_path):
    """`localize_inloc` of hloc looks for query/database alone."""
    run = matched_runs.write(tmp_path)
    one_way = [("b/5.jpg", "a/1.jpg"), ("a/2.jpg", "a/0.jpg"), ("a/0.jpg", "a/1.jpg")]
    (tmp_path / "list.txt").write_text("".join(f"{query} {database}\n" for query, database in one_way))
    vop.export_matches(output=run, export={"hloc": str(tmp_path / "out")})
    assert set(one_way) < set(LISTED)
    with h5py.File(tmp_path / "out" / "matches.h5") as h5:
        assert sum(len(group) for group in h5.values()) == 3
        for query, database in one_way:
            matches0 = h5[query.replace("/", "-")][database.replace("/", "-")]["matches0"][()]
            expected = matched_runs.matches(*sorted((query, database))).indices
            expected = expected if query < database else expected[np.argsort(expected[:, 1]), ::-1]
            kept = np.flatnonzero(matches0 > -1)
            np.testing.assert_array_equal(np.stack([kept, matches0[kept]], axis=1), expected)
