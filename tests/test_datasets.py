"""Adapters of the published layouts: names, poses, calibrations and truth against what the trees were written from."""

import posixpath
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import trees

from vop import config as configuration
from vop import metrics
from vop.config import ConfigError
from vop.datasets.benchmark import FORMATS, check, open_benchmark
from vop.datasets.posed import OverlapTruth, read_overlap, write_overlap
from vop.schema import DatasetConfig

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDS_COLMAP = ("aachen", "colmap")


def opened(format: str, root: Path, **dataset):
    if format in NEEDS_COLMAP:
        pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    return open_benchmark(configuration.load([], dataset={"format": format, "root": str(root)} | dataset))


def overlap_of(truth: OverlapTruth, first: str, second: str) -> float:
    return float(truth.matrix[truth.names.index(first), truth.names.index(second)])


def check_camera(camera, index: int, **fields) -> None:
    np.testing.assert_allclose(camera.K, trees.calibration(index), atol=1e-12)
    np.testing.assert_allclose(camera.cam_from_world, trees.pose(index), atol=1e-12)
    for field, value in fields.items():
        assert getattr(camera, field) == value


ETH3D = {"images": "{scene}/images", "model": "{scene}/dslr_calibration_undistorted"}


def test_eth3d(tmp_path):
    trees.eth3d(tmp_path)
    (tmp_path / "notes").mkdir()  # no scene
    benchmark = opened("colmap", tmp_path, **ETH3D)
    names = [
        f"{scene}/images/dslr_images_undistorted/DSC_{i}.JPG" for scene in ("courtyard", "pipes") for i in range(3)
    ]
    assert benchmark.sets.names == names
    assert list(benchmark.sets.queries) == list(benchmark.sets.database) == names
    assert {image.scene for image in benchmark.sets.images} == {"courtyard", "pipes"}
    assert all(Path(image.path).stat().st_size == image.size for image in benchmark.sets.images)
    for index in range(3):
        check_camera(benchmark.cameras.get(names[3 + index]), index, world="pipes", width=40, height=30, model=None)
    np.testing.assert_allclose(benchmark.cameras.relative(names[0], names[2]), trees.true_relative(0, 2), atol=1e-12)
    assert benchmark.cameras.relative(names[0], names[3]) is None
    # {1, 2, 3, 4}, {3, 4} and {4, 5}: two, one and one point shared
    expected = {(0, 1): 2 / 4, (0, 2): 1 / 4, (1, 2): 1 / 2, (0, 0): 1, (0, 3): 0}
    for (i, j), overlap in expected.items():
        assert overlap_of(benchmark.truth, names[i], names[j]) == pytest.approx(overlap)
        assert overlap_of(benchmark.truth, names[j], names[i]) == pytest.approx(overlap)


def test_a_binary_model_with_distortion_and_an_image_that_is_gone(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    trees.colmap_text(tmp_path / "text", ["a.jpg", "b/c.jpg"], [{1}, {1, 2}], "OPENCV", "0.1 -0.02 0.001 0")
    trees.picture(tmp_path / "photos" / "a.jpg")
    (tmp_path / "sparse").mkdir()
    pycolmap.Reconstruction(str(tmp_path / "text")).write_binary(str(tmp_path / "sparse"))
    benchmark = opened("colmap", tmp_path, images="photos", model="sparse")
    assert benchmark.sets.names == ["photos/a.jpg", "photos/b/c.jpg"]
    assert [image.size < 0 for image in benchmark.sets.images] == [False, True]
    camera = benchmark.cameras.get("photos/b/c.jpg")
    check_camera(camera, 1, model="OPENCV", world=tmp_path.name)
    np.testing.assert_allclose(camera.params, [51, 53, 20.5, 14.5, 0.1, -0.02, 0.001, 0])


def test_megadepth_as_d2net_prepared_it(tmp_path):
    names = trees.megadepth(tmp_path)
    benchmark = opened("megadepth", tmp_path)
    present = [name for name in names if name]
    assert benchmark.sets.names == present
    assert {image.scene for image in benchmark.sets.images} == {"0015"}
    for index in (0, 1, 3):  # the third row has no image
        check_camera(benchmark.cameras.get(names[index]), index, world="0015", width=None)
    # the smaller of 0.6 and 0.4, of 0.2 and 0.3; 0 and NaN
    for (i, j), overlap in {(0, 1): 0.4, (3, 0): 0.2, (1, 3): 0, (3, 3): 1}.items():
        assert overlap_of(benchmark.truth, names[i], names[j]) == pytest.approx(overlap)
    assert benchmark.pairs is None


def test_megadepth_1500_prescribes_its_pairs(tmp_path):
    names = trees.megadepth(tmp_path, "0015_0.1_0.3", [((0, 1), 0.2)])
    trees.megadepth(tmp_path, "0015_0.3_0.5", [((3, 0), 0.4)])
    trees.megadepth(tmp_path, "0022_0.3_0.5", [((1, 3), 0.35)])
    benchmark = opened("megadepth", tmp_path)
    others = [f"Undistorted_SfM/0022/images/{index}_o.jpg" for index in (1, 3)]
    assert benchmark.sets.names == [names[0], names[1], names[3], *others]
    assert benchmark.pairs == ((names[0], names[1]), (names[3], names[0]), tuple(others))
    assert overlap_of(benchmark.truth, names[0], names[3]) == pytest.approx(0.4)
    np.testing.assert_allclose(benchmark.cameras.relative(names[0], names[3]), trees.true_relative(0, 3), atol=1e-12)
    assert benchmark.cameras.relative(names[1], others[0]) is None
    only = opened("megadepth", tmp_path, scenes=["0022_0.3_0.5"])
    assert only.sets.names == others


KEYS = ["02928139_3448003521", "name-with-hyphens_1", "lonely_2"]


def test_phototourism_of_the_ransac_tutorial(tmp_path):
    trees.phototourism(tmp_path, "sacre_coeur", KEYS, [(0, 1)])
    first, reverse, other = f"{KEYS[0]}-{KEYS[1]}", f"{KEYS[1]}-{KEYS[0]}", f"{KEYS[2]}-{KEYS[1]}"
    trees.covisible(tmp_path / "sacre_coeur", {"0.0": [first, other], "0.1": [first], "0.6": [reverse]})
    (tmp_path / "readme").mkdir()
    benchmark = opened("phototourism", tmp_path)
    names = [f"sacre_coeur/images/{key}.jpg" for key in KEYS]
    assert benchmark.sets.names == sorted(names)
    for index in (0, 1):
        check_camera(benchmark.cameras.get(names[index]), index, world="sacre_coeur")
    assert benchmark.cameras.get(names[2]).K is None  # in no pair
    np.testing.assert_allclose(benchmark.cameras.relative(names[2], names[0]), trees.true_relative(2, 0), atol=1e-12)
    assert overlap_of(benchmark.truth, names[0], names[1]) == pytest.approx(0.6)
    assert overlap_of(benchmark.truth, names[0], names[2]) == 0


def test_phototourism_of_the_challenge(tmp_path):
    trees.challenge(tmp_path, "reichstag", KEYS)
    benchmark = opened("phototourism", tmp_path, images="{scene}/set_100/images", model="{scene}/set_100")
    names = [f"reichstag/set_100/images/{key}.png" for key in KEYS]
    assert benchmark.sets.names == sorted(names)
    for index, name in enumerate(names):
        check_camera(benchmark.cameras.get(name), index, world="reichstag")
    assert benchmark.truth is None


def test_inloc(tmp_path):
    trees.inloc(tmp_path)
    benchmark = opened("inloc", tmp_path)
    assert benchmark.sets.queries == ("query/iphone7/IMG_0731.JPG", "query/iphone7/IMG_0732.JPG")
    assert benchmark.sets.database == tuple(
        f"database/cutouts/{scan}/DUC_cutout_{scan[-3:]}_0_0.jpg" for scan in ("DUC1/000", "DUC2/046")
    )
    assert benchmark.cameras is None and benchmark.truth is None
    assert "not published" in benchmark.withheld
    assert [benchmark.lift.world(name) for name in benchmark.sets.database] == ["DUC1", "DUC2"]
    assert benchmark.lift.world(benchmark.sets.queries[0]) is None
    assert benchmark.written == "basename"


def test_aachen(tmp_path):
    trees.aachen(tmp_path)
    benchmark = opened("aachen", tmp_path)
    assert benchmark.sets.database == ("images_upright/db/1.jpg", "images_upright/sequences/gopro/2.png")
    day, night = "images_upright/query/day/nexus4/a.jpg", "images_upright/query/night/nexus5x/b.jpg"
    assert benchmark.sets.queries == (day, night)
    camera = benchmark.cameras.get(day)
    np.testing.assert_array_equal(camera.K, [[55, 0, 20], [0, 55, 15], [0, 0, 1]])
    assert (camera.cam_from_world, camera.model, camera.params) == (None, "SIMPLE_RADIAL", (55, 20, 15, -0.05))
    assert (benchmark.cameras.get(night).params, benchmark.cameras.get(night).width) == ((44, 15, 20, 0), 30)
    np.testing.assert_allclose(
        benchmark.cameras.relative(*benchmark.sets.database), trees.true_relative(0, 1), atol=1e-12
    )
    assert benchmark.cameras.relative(day, benchmark.sets.database[0]) is None
    (tmp_path / "queries" / "day_time_queries_with_intrinsics.txt").write_text("a.jpg SIMPLE_RADIAL 40 30 55 20\n")
    with pytest.raises(ValueError, match=r"day_time_queries_with_intrinsics.txt, line 1: expected name, COLMAP"):
        opened("aachen", tmp_path)


def test_pitts30k_by_positions_in_names(tmp_path):
    trees.pitts30k(tmp_path)
    benchmark = opened("pitts30k", tmp_path, scenes=["test"])
    assert len(benchmark.sets.queries) == 2 and len(benchmark.sets.database) == 3
    query = f"images/test/queries/{trees.utm(584500, 4477900)}"
    matches = {name: overlap_of(benchmark.truth, query, name) for name in benchmark.sets.database}
    # 25 m is near, 25.5 m is not, (20, 15) m is 25 m
    expected = {(584500, 4477925): 1, (584500, 4477925.5): 0, (584520, 4477915): 1}
    assert matches == {f"images/test/database/{trees.utm(*at)}": near for at, near in expected.items()}
    ranked = {query: [f"images/test/database/{trees.utm(584500, 4477925.5)}", *matches]}
    judged = metrics.retrieval(ranked, benchmark.truth.names, benchmark.truth.matrix, 0.3, list(matches), ks=(1, 2))
    assert (judged["recall@1"], judged["recall@2"], judged["ceiling@2"]) == (0, 1, 1)


def test_pitts30k_by_lists(tmp_path):
    trees.pitts30k_lists(tmp_path)
    benchmark = opened("pitts30k", tmp_path, images=".", model="pitts30k_{scene}", scenes=["test"])
    assert benchmark.sets.queries == ("queries_real/0.jpg", "queries_real/1.jpg")
    assert benchmark.sets.database == ("000/a.jpg", "000/b.jpg", "001/c.jpg")
    row = [overlap_of(benchmark.truth, "queries_real/0.jpg", name) for name in benchmark.sets.database]
    assert row == [1, 0, 1]
    (tmp_path / "pitts30k_test_gt.npy").unlink()
    assert opened("pitts30k", tmp_path, images=".", model="pitts30k_{scene}").truth is None


def test_ten_thousand_images_make_no_dense_matrix(tmp_path):
    from vop.datasets.layout import symmetric

    rows = np.arange(20_000)
    matrix = symmetric(20_001, rows, rows + 1, np.full(20_000, 0.5))
    assert matrix.nnz == 60_001  # each pair both ways, and the diagonal
    assert (matrix[7, np.array([6, 8, 9])] >= 0.3).sum() == 2


def test_sparse_overlaps_survive_their_file(tmp_path):
    trees.megadepth(tmp_path)
    truth = opened("megadepth", tmp_path).truth
    write_overlap(tmp_path / "overlap.parquet", truth)
    read = read_overlap(tmp_path / "overlap.parquet")
    assert read.names == truth.names
    np.testing.assert_array_equal(read.matrix.toarray(), truth.matrix.toarray())


WRITERS = {
    "aachen": trees.aachen,
    "colmap": trees.eth3d,
    "inloc": trees.inloc,
    "megadepth": trees.megadepth,
    "phototourism": lambda root: trees.phototourism(root, "sacre_coeur", KEYS, [(0, 1)]),
    "pitts30k": trees.pitts30k,
}


@pytest.mark.parametrize(
    ("format", "removed", "said"),
    [
        ("aachen", "queries", "no list in ROOT/queries: day_time_queries_with_intrinsics.txt"),
        ("aachen", "3D-models/aachen_v_1_1/images.txt", "no COLMAP model in ROOT/3D-models/aachen_v_1_1"),
        ("aachen", "images_upright", "nothing at ROOT/images_upright: the images"),
        ("colmap", "pipes/images", "no folder ROOT/pipes/images"),
        ("colmap", "pipes/dslr_calibration_undistorted/points3D.txt", "cameras, images, points3D as .txt or .bin"),
        ("inloc", "database/cutouts", "nothing at ROOT/database/cutouts: folders DUC1 and DUC2"),
        ("inloc", "query", "nothing at ROOT/query/iphone7"),
        ("megadepth", "scene_info", "no scene in ROOT/scene_info: expected ROOT/scene_info/{scene}.npz"),
        ("megadepth", "Undistorted_SfM", "none of the 3 images of 0015 is there (Undistorted_SfM), such as ROOT/Und"),
        ("phototourism", "sacre_coeur/K1_K2.h5", "nothing at ROOT/sacre_coeur/K1_K2.h5: K of both images"),
        ("phototourism", "sacre_coeur/images", "nothing at ROOT/sacre_coeur/images"),
        ("phototourism", "sacre_coeur", "no scene in ROOT"),
        ("pitts30k", "images/test/queries", "nothing at ROOT/images/test/queries: the queries, named @UTM"),
        ("pitts30k", "images", "no scene in ROOT/images"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_read(tmp_path, format, removed, said):
    WRITERS[format](tmp_path)
    templates = ETH3D if format == "colmap" else {}
    dataset = DatasetConfig(format=format, root=str(tmp_path), **templates)
    assert check(dataset) == []
    target = tmp_path / removed
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    found = check(dataset)
    assert len(found) == 1
    assert said in found[0].replace(str(tmp_path), "ROOT")
    with pytest.raises(ConfigError) as error:
        open_benchmark(configuration.load([], dataset={"format": format, "root": str(tmp_path)} | templates))
    assert found[0] in str(error.value)
    assert "https://" in str(error.value)  # where to get it


def test_all_that_is_missing_is_said_at_once(tmp_path):
    trees.eth3d(tmp_path)
    dataset = DatasetConfig("colmap", str(tmp_path), ["courtyard", "facade", "office"], **ETH3D)
    found = check(dataset)
    assert [scene in line for scene, line in zip(("facade", "facade", "office", "office"), found, strict=True)] == [
        True
    ] * 4


def test_a_dataset_without_root_or_of_unknown_format_is_refused(tmp_path):
    assert "dataset.root is not given" in check(DatasetConfig("inloc"))[0]
    assert "nothing at dataset.root=" in check(DatasetConfig("inloc", str(tmp_path / "none")))[0]
    with pytest.raises(ConfigError, match="must be one of aachen, colmap"):
        check(DatasetConfig("eth3d", str(tmp_path)))
    with pytest.raises(ConfigError, match="is it on PYTHONPATH"):
        check(DatasetConfig("my_package.my_layout", str(tmp_path)))


def test_an_npz_without_poses_is_refused(tmp_path):
    trees.megadepth(tmp_path)
    path = tmp_path / "scene_info" / "0015.npz"
    content = dict(np.load(path, allow_pickle=True))
    np.savez(path, **{key: value for key, value in content.items() if key not in ("poses", "intrinsics")})
    with pytest.raises(ValueError, match=r"0015.npz lacks intrinsics, poses; it has depth_paths, image_paths, overlap"):
        opened("megadepth", tmp_path)


def test_poses_that_contradict_each_other_are_refused(tmp_path, monkeypatch):
    trees.megadepth(tmp_path, "0015_0.1_0.3", [((0, 1), 0.2)])
    original = trees.pose
    monkeypatch.setattr(trees, "pose", lambda index: original(index + 1))
    trees.megadepth(tmp_path, "0015_0.3_0.5", [((0, 3), 0.4)])
    with pytest.raises(ValueError, match="has two poses, in 0015 and in 0015"):
        opened("megadepth", tmp_path)


def test_every_format_has_a_recipe_that_loads():
    recipes = {path.stem: configuration.load([str(path)]) for path in (REPOSITORY / "configs" / "dataset").iterdir()}
    assert {name: recipe.dataset.format for name, recipe in recipes.items()} == {
        "eth3d" if format == "colmap" else format: format for format in FORMATS
    }


def test_the_adapter_of_the_documentation_works(tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "datasets.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "seven_scenes.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    root = tmp_path / "7scenes"
    for index in range(2):
        trees.picture(root / "chess" / "seq-01" / f"frame-00000{index}.color.png")
        world_from_cam = np.linalg.inv(trees.pose(index))
        np.savetxt(root / "chess" / "seq-01" / f"frame-00000{index}.pose.txt", world_from_cam)
    dataset = {"format": "my_package.seven_scenes", "root": str(root)}
    benchmark = open_benchmark(configuration.load([], dataset=dataset))
    names = [f"chess/seq-01/frame-00000{index}.color.png" for index in range(2)]
    assert benchmark.sets.names == names
    np.testing.assert_allclose(benchmark.cameras.relative(*names), trees.true_relative(0, 1), atol=1e-9)
    shutil.rmtree(root / "chess")
    with pytest.raises(ConfigError, match="no scene in"):
        open_benchmark(configuration.load([], dataset=dataset))
    sys.modules.pop("my_package.seven_scenes")


def test_docs_name_every_recipe():
    text = (REPOSITORY / "docs" / "datasets.md").read_text()
    for path in (REPOSITORY / "configs" / "dataset").glob("*.yaml"):
        assert posixpath.join("configs/dataset", path.name) in text
