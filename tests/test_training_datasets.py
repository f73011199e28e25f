"""Labels from benchmarks in their published layouts: depth in MegaDepth's, points of COLMAP models."""

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import trees

from vop import config as configuration
from vop import files
from vop.datasets.benchmark import open_benchmark
from vop.datasets.folder import list_images
from vop.datasets.posed import PosedFolder, overlap_truth
from vop.image import letterbox
from vop.schema import TrainConfig
from vop.training.plan import pairs_of, split
from vop.training.supervision import DepthSupervision, PointSupervision, read_depth

SIZE = 224


def opened(root, **given):
    return open_benchmark(configuration.load(dataset={"root": str(root)} | given))


def pair_of(benchmark, sizes, *names) -> dict:
    """A pair as the labelling stage plans it."""
    pair = {"overlap": 0.5}
    for side, name in enumerate(names):
        width, height = sizes[name]
        _, scaled = letterbox(np.zeros((height, width, 3), np.uint8), SIZE)
        pair |= {f"view{side}": name, f"width{side}": width, f"height{side}": height}
        pair |= {f"scaled_width{side}": scaled[0], f"scaled_height{side}": scaled[1]}
        pair[f"depth{side}"] = None if benchmark.depths is None else benchmark.depths(name)
    return pair


@pytest.fixture
def megadepth(rendered_collection, tmp_path):
    """The rendered rooms as MegaDepth lays them out, in one scene."""
    posed, truth = PosedFolder.open(rendered_collection), overlap_truth(rendered_collection)
    names = [f"Undistorted_SfM/0007/images/{index}_o.jpg" for index in range(len(posed.names))]
    depths = [f"depth_undistorted/0007/{index}_o.h5" for index in range(len(posed.names))]
    root = files.join(posed.root, "")
    for name, image, depth in zip(posed.names, names, depths, strict=True):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).write_bytes(files.read_bytes(files.join(root, name)))
        (tmp_path / depth).parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(tmp_path / depth, "w") as file:
            file["depth"] = posed.depth(name)
    rows = [truth.names.index(name) for name in posed.names]
    (tmp_path / "scene_info").mkdir()
    np.savez(
        tmp_path / "scene_info" / "0007.npz",
        image_paths=np.array(names, object),
        depth_paths=np.array(depths, object),
        intrinsics=np.array([camera.K for camera in posed.cameras]),
        poses=np.array([camera.cam_from_world for camera in posed.cameras]),
        overlap_matrix=truth.matrix.toarray()[np.ix_(rows, rows)],
    )
    return tmp_path, posed, dict(zip(names, posed.names, strict=True))


def test_megadepth_gives_the_labels_of_the_same_rooms_as_a_plain_folder(megadepth, rendered_collection, tmp_path):
    root, posed, plain_name = megadepth
    benchmark = opened(root, format="megadepth")
    sizes = {name: (posed.camera(plain).width, posed.camera(plain).height) for name, plain in plain_name.items()}
    config = TrainConfig(flip=False, positives_per_scene=12, negatives_per_scene=4)
    pairs = pairs_of(0, split(benchmark.sets, config), benchmark.truth, config, None).to_pylist()
    assert {pair["overlap"] > 0 for pair in pairs} == {True, False}

    plain = open_benchmark(configuration.load(images=str(rendered_collection), cameras=str(rendered_collection)))
    benchmark.cameras.write(str(tmp_path / "a.parquet"))
    plain.cameras.write(str(tmp_path / "b.parquet"))
    sides = [(pair["view0"], pair["view1"]) for pair in pairs]
    found = DepthSupervision(str(tmp_path / "a.parquet"), SIZE, 0.1, 2).labels(
        [pair_of(benchmark, sizes, *names) for names in sides]
    )
    plain_sizes = {plain: sizes[name] for name, plain in plain_name.items()}
    expected = DepthSupervision(str(tmp_path / "b.parquet"), SIZE, 0.1, 2).labels(
        [pair_of(plain, plain_sizes, *(plain_name[name] for name in names)) for names in sides]
    )
    assert sum(int(labels.positive.sum()) for labels in expected) > 100
    for one, other in zip(found, expected, strict=True):
        assert (one.positive == other.positive).all() and (one.counts == other.counts).all()


def test_a_depth_map_of_megadepth_that_is_gone_is_a_reason(megadepth):
    root, _, _ = megadepth
    benchmark = opened(root, format="megadepth")
    name = "Undistorted_SfM/0007/images/0_o.jpg"
    assert read_depth(benchmark.depths(name)).dtype == np.float32
    (root / "depth_undistorted/0007/0_o.h5").unlink()
    with pytest.raises(ValueError, match="depth map missing"):
        read_depth(benchmark.depths(name))


def test_points_of_colmap_models_match_patches_within_a_model(tmp_path):
    pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    trees.eth3d(tmp_path)
    benchmark = opened(tmp_path, format="colmap", images="{scene}/images", model="{scene}/dslr_calibration_undistorted")
    table = benchmark.points()
    pq.write_table(table, tmp_path / "points.parquet")
    ids = dict(zip(table["name"].to_pylist(), table["id"].to_pylist(), strict=True))
    names = [f"{scene}/images/dslr_images_undistorted/DSC_{i}.JPG" for scene in ("courtyard", "pipes") for i in (0, 1)]
    assert [len(ids[name]) for name in names] == [4, 2, 4, 2]
    assert not {*ids[names[0]]} & {*ids[names[2]]}  # both models number their points from 1

    source = PointSupervision(str(tmp_path / "points.parquet"), SIZE)
    sizes = dict.fromkeys(ids, (trees.WIDTH, trees.HEIGHT))
    within, between = source.labels([pair_of(benchmark, sizes, *ends) for ends in (names[:2], (names[0], names[3]))])
    # Points 3 and 4 lie at (3.5, 3.5) and (4.5, 3.5) of 40 x 30 pixels, in both images: one patch, the second of a row.
    assert within.positive[0].nonzero().tolist() == [[17, 17]]
    assert within.counts[0, 17, 17] == 2
    assert within.known0[0].nonzero()[:, 0].tolist() == [17]
    assert not between.positive.any() and not between.known0.any()


def test_the_recipes_of_training_name_layouts_that_have_what_they_train_on(tmp_path):
    pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    trees.eth3d(tmp_path / "eth3d")
    trees.megadepth(tmp_path / "megadepth")
    assert opened(tmp_path / "eth3d", format="colmap", images="{scene}/images",
                  model="{scene}/dslr_calibration_undistorted").points is not None  # fmt: skip
    assert opened(tmp_path / "megadepth", format="megadepth").depths is not None
    trees.cameras_json(tmp_path / "plain" / "cameras.json", ["a/b.jpg"])
    trees.picture(tmp_path / "plain" / "a" / "b.jpg")
    plain = open_benchmark(configuration.load(images=str(tmp_path / "plain"), cameras=str(tmp_path / "plain")))
    assert plain.depths("a/b.jpg") == files.join(list_images(str(tmp_path / "plain")).root, "a/b.depth.png")
