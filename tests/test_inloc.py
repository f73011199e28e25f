"""InLoc's scans: between the pixels, in MATLAB's files, in the world; and a phone's queries among rendered ones."""

import pickle
import shutil

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.linalg
import scipy.spatial
import torch
import trees

from vop import config as configuration
from vop import pipeline
from vop.datasets import rendered_inloc
from vop.datasets.scans import ScanError, Scans, interpolate, read_alignment, read_scan
from vop.geometry import project
from vop.image import decode, upright_size
from vop.schema import ConfigError

CUTOUT = "database/cutouts/DUC1/000/DUC_cutout_000_0_0.jpg"
WORLD_FROM_SCAN = trees.pose(3)


def scan_of(height=trees.HEIGHT, width=trees.WIDTH, seed=0):
    """Points that differ from pixel to pixel, one in five of which the scanner missed."""
    rng = np.random.default_rng(seed)
    scan = rng.normal(0, 5, (height, width, 3))
    scan[rng.random((height, width)) < 0.2] = np.nan
    return scan


def matlab(path, scan, variable="XYZcut", compressed=True):
    scipy.io.savemat(path, {variable: scan, "RGBcut": np.zeros((3, 3), np.uint8)}, do_compression=compressed)


def matlab73(path, scan):
    """As MATLAB writes -v7.3: HDF5 after 512 bytes of its own, axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("XYZcut", data=scan.transpose(2, 1, 0), compression="gzip")
        file["XYZcut"].attrs["MATLAB_class"] = np.bytes_("double")
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def alignment(root, lines=None):
    """Two matrices, as published: the second, after registration, is the one that counts."""
    rows = [" ".join(map(repr, row)) for row in WORLD_FROM_SCAN.tolist()]
    before = [" ".join(map(repr, row)) for row in trees.pose(1).tolist()]
    folder = root / "database/alignments/DUC1/transformations"
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["Before GICP:", *before, "", "After GICP:", *rows] if lines is None else lines)
    (folder / "DUC_trans_000.txt").write_text(text + "\n")


@pytest.fixture
def tree(tmp_path):
    """InLoc's layout with points behind one of its two cutouts."""
    trees.inloc(tmp_path)
    matlab(tmp_path / (CUTOUT + ".mat"), scan_of())
    alignment(tmp_path)
    return tmp_path


def grid_sampled(scan, keypoints):
    """The published rule, of hloc's `interpolate_scan`, with PyTorch: keypoints have centres at 0."""
    height, width = scan.shape[:2]
    grid = torch.from_numpy(keypoints / [width - 1, height - 1] * 2 - 1)[None, None]
    values = torch.from_numpy(scan).permute(2, 0, 1)[None]
    linear, near = (
        torch.nn.functional.grid_sample(values, grid, mode=mode, align_corners=True)[0, :, 0].T.numpy()
        for mode in ("bilinear", "nearest")
    )
    return np.where(np.isnan(linear), near, linear)


def test_points_between_pixels_are_those_of_the_published_rule():
    scan, rng = scan_of(), np.random.default_rng(1)
    inside = rng.uniform([0, 0], [trees.WIDTH - 1, trees.HEIGHT - 1], (4000, 2))
    found = interpolate(scan, inside + 0.5)  # ours have centres at +0.5
    np.testing.assert_allclose(found, grid_sampled(scan, inside), rtol=1e-9)
    share = np.isfinite(found).all(1).mean()
    assert 0.78 < share < 0.82  # as many as there are pixels with points: nearest fills in where bilinear cannot


def test_points_at_pixel_centres_are_exact_and_the_border_is_the_nearest_pixel():
    scan = scan_of()
    centers = np.stack(np.meshgrid(np.arange(trees.WIDTH) + 0.5, np.arange(trees.HEIGHT) + 0.5), -1).reshape(-1, 2)
    np.testing.assert_array_equal(interpolate(scan, centers), scan.reshape(-1, 3))
    scan = np.ones((2, 3, 3)) * np.arange(3)[None, :, None]  # x in every coordinate
    edges = np.array([[0.0, 0.0], [0.4, 2.0], [3.0, 1.0], [1.75, 1.0]])
    np.testing.assert_allclose(interpolate(scan, edges)[:, 0], [0, 0, 2, 1.25])
    assert interpolate(scan, np.empty((0, 2))).shape == (0, 3)
    assert interpolate(np.full((1, 1, 3), 7.0), np.array([[0.2, 0.9]])).tolist() == [[7, 7, 7]]


@pytest.mark.parametrize("kind", ["v5", "v7", "v7.3", "single"])
def test_every_format_of_matlab_gives_the_same_points(tmp_path, kind):
    path, scan = tmp_path / "a.mat", scan_of()
    if kind == "single":
        scan = scan.astype(np.float32)
    matlab73(path, scan) if kind == "v7.3" else matlab(path, scan, compressed=kind != "v5")
    found = read_scan(path.read_bytes(), (trees.WIDTH, trees.HEIGHT), str(path))
    assert found.dtype == scan.dtype
    np.testing.assert_array_equal(found, scan)


def broken(path, how):
    scan = scan_of()
    match how:
        case "truncated":
            matlab(path, scan)
            path.write_bytes(path.read_bytes()[:2000])
        case "truncated 7.3":
            matlab73(path, scan)
            path.write_bytes(path.read_bytes()[:3000])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"no scan " * 100)
        case "integers":
            matlab(path, np.zeros(scan.shape, np.int32))
        case "cells":
            matlab(path, np.array([1, "a"], object))
        case "turned":
            matlab(path, scan.transpose(1, 0, 2))
        case "turned 7.3":
            matlab73(path, scan.transpose(1, 0, 2))
        case "other":
            matlab(path, scan, "XYZ")
        case "linked":
            with h5py.File(path, "w") as file:
                file["XYZcut"] = h5py.ExternalLink("elsewhere.h5", "XYZcut")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        *((how, "damaged") for how in ("truncated", "truncated 7.3", "empty", "text")),
        *((how, "of another shape") for how in ("integers", "cells", "turned", "turned 7.3")),
        ("other", "without the variable XYZcut"),
        ("linked", "is a link to elsewhere.h5"),
    ],
)
def test_an_unusable_scan_says_why(tmp_path, how, said):
    path = tmp_path / "a.mat"
    broken(path, how)
    with pytest.raises(ScanError, match=said) as error:
        read_scan(path.read_bytes(), (trees.WIDTH, trees.HEIGHT), str(path))
    assert str(path) in str(error.value)


def test_a_scan_of_another_size_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.mat"
    matlab(path, scan_of())
    monkeypatch.setattr(scipy.io, "loadmat", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(ScanError, match=r"needs \(31, 40, 3\)"):
        read_scan(path.read_bytes(), (40, 31), str(path))


def test_the_alignment_is_the_matrix_after_registration(tree):
    path = tree / "database/alignments/DUC1/transformations/DUC_trans_000.txt"
    np.testing.assert_array_equal(read_alignment(path.read_bytes(), ""), WORLD_FROM_SCAN)
    for text in (b"", b"After:\n1 0 0 0\n0 1 0 0\n0 0 1 0\n", b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 2\n", b"\xff\x00" * 9):
        with pytest.raises(ScanError, match="alignment without a matrix"):
            read_alignment(text, "a.txt")


def test_keypoints_are_lifted_into_the_world_of_their_floor(tree):
    scans = Scans(str(tree))
    points = np.array([[3.5, 4.5], [10.2, 20.7]])
    lifted = scans(CUTOUT, np.array([8, 9], np.int32), points)
    expected = np.hstack([interpolate(scan_of(), points), np.ones((2, 1))]) @ WORLD_FROM_SCAN.T
    np.testing.assert_allclose(lifted.xyz, expected[:, :3], rtol=1e-12)
    assert (lifted.ids.tolist(), lifted.ids.dtype, lifted.reason) == ([-1, -1], np.int64, None)
    assert (
        scans.world(CUTOUT) == "DUC1" and scans.world("database/cutouts/DUC2/046/DUC_cutout_046_30_-30.jpg") == "DUC2"
    )
    for other in (
        "query/iphone7/IMG_0731.JPG",
        "database/cutouts/DUC1/000/photo.jpg",
        "cutouts/DUC1/000/DUC_cutout_0.jpg",
    ):
        assert scans.world(other) is None


@pytest.mark.parametrize(
    ("removed", "said"), [(CUTOUT + ".mat", "no scan"), ("database/alignments", "no alignment"), (CUTOUT, "no image")]
)
def test_what_is_missing_leaves_points_out_with_a_reason(tree, removed, said):
    (tree / removed).rename(tree / "elsewhere")
    lifted = Scans(str(tree))(CUTOUT, np.zeros(3, np.int32), np.ones((3, 2)))
    assert np.isnan(lifted.xyz).all() and lifted.xyz.shape == (3, 3) and said in lifted.reason


def test_cutouts_without_scan_or_alignment_are_known_before_the_work(tree):
    scans, names = Scans(str(tree)), [CUTOUT, "database/cutouts/DUC2/046/DUC_cutout_046_0_0.jpg", "a.jpg"]
    assert scans.lacking(names[:1]) == {}
    found = scans.lacking(names)
    assert list(found) == names[1:] and found[names[1]] == f"nothing at {tree}/{names[1]}.mat"
    (tree / "database/alignments").rename(tree / "elsewhere")
    assert scans.lacking(names)[CUTOUT].endswith("/database/alignments/DUC1/transformations/DUC_trans_000.txt")


def test_workers_get_paths_and_keep_a_bounded_number_of_scans(tree):
    names = [f"database/cutouts/DUC1/000/DUC_cutout_000_{yaw}_0.jpg" for yaw in (0, 30, 60)]
    for name in names[1:]:
        trees.picture(tree / name)
        matlab(tree / (name + ".mat"), scan_of())
    for memory, kept in ((1e9, 3), (2.5 * scan_of().nbytes, 2), (0, 1)):
        scans = Scans(str(tree), memory)
        for name in (*names, names[0]):
            assert scans(name, np.zeros(1, np.int32), np.ones((1, 2))).reason is None
        assert len(scans.kept) == kept and names[0] in scans.kept
        assert len(pickle.dumps(scans)) < 1000


def test_the_recipe_holds_the_values_of_the_benchmark():
    config = configuration.load(["configs/dataset/inloc.yaml"], output="run")
    assert (config.dataset.format, config.retrieval.k, config.retrieval.shortlist) == ("inloc", 40, 100)
    assert (config.retrieval.radius, config.retrieval.weights) == (0.3, "none")
    assert config.localize.focal * 4032 == pytest.approx(4032 * 28 / 36)
    assert (config.localize.threshold, config.localize.min_matches, config.localize.exif) == (48, 20, False)


SMALL = rendered_inloc.Tree(scans=2, queries=3, yaws=6, cutout=(480, 360), phone=(480, 360))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A rendered tree and the true cameras of its queries."""
    root = tmp_path_factory.mktemp("inloc")
    return root, rendered_inloc.write(str(root), SMALL)


def resected(pixels, points):
    """The camera (3, 4) that sees points (n, 3) at pixels (n, 2): linear, for exact data of more than one plane."""
    center, scale = points.mean(0), points.std()
    X = np.hstack([(points - center) / scale, np.ones((len(points), 1))])
    zero = np.zeros_like(X)
    rows = np.concatenate([np.hstack([X, zero, -pixels[:, :1] * X]), np.hstack([zero, X, -pixels[:, 1:] * X])])
    P = np.linalg.svd(rows)[2][-1].reshape(3, 4)
    P *= np.sign((X @ P[2]).mean())  # points lie before the camera
    return P @ np.block([[np.eye(3) / scale, -center[:, None] / scale], [np.zeros(3), 1]])


def test_rendered_cutouts_see_their_points_where_their_pixels_are(rendered):
    """The camera that the points of a cutout demand is the one it was rendered with: half a pixel would show."""
    root, _ = rendered
    scans, rng, found = Scans(str(root)), np.random.default_rng(0), []
    paths = sorted(root.glob("database/cutouts/DUC1/000/*.jpg"))
    assert len(paths) == SMALL.yaws
    for path in paths:
        pixels = rng.uniform(0.5, [479.5, 359.5], (400, 2))
        points = scans(str(path.relative_to(root)), np.arange(400), pixels).xyz
        known = np.isfinite(points).all(1)
        assert 0.9 < known.mean() < 1
        centers = np.floor(pixels[known]) + 0.5
        points = scans(str(path.relative_to(root)), np.arange(len(centers)), centers).xyz
        known = np.isfinite(points).all(1)
        P = resected(centers[known], points[known])
        assert np.abs(project(points[known] @ P[:, :3].T + P[:, 3], np.eye(3)) - centers[known]).max() < 0.02
        K = scipy.linalg.rq(P[:, :3])[0]
        K = K * np.sign(np.diag(K)) / abs(K[2, 2])
        found.append([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
    np.testing.assert_allclose(np.median(found, axis=0), [480 / 2 / np.tan(np.pi / 6)] * 2 + [240, 180], atol=0.05)


def test_rendered_queries_are_a_phones(rendered):
    root, truth = rendered
    assert len(truth) == 6
    for query, camera in truth.items():
        data = (root / query).read_bytes()
        assert decode(data).shape == (camera.height, camera.width, 3)  # upright, whatever the EXIF tag says
        assert upright_size(data) == (camera.width, camera.height)
        assert camera.K[0, 0] == pytest.approx(28 / 36 * 480)
    assert {camera.width for camera in truth.values()} == {480, 360}


@pytest.fixture(scope="module")
def damaged(rendered, tmp_path_factory):
    """The rendered tree with a cutout whose scan is damaged, and one without; the name of the first."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(rendered[0], root, dirs_exist_ok=True)
    bad = "database/cutouts/DUC2/002/DUC_cutout_002_0_0.jpg"  # that a query has many matches with, and not it alone
    (root / (bad + ".mat")).write_bytes(b"damaged")
    (root / "database/cutouts/DUC1/000/DUC_cutout_000_120_0.jpg.mat").unlink()
    return root, bad


@pytest.mark.slow
def test_a_phone_is_localized_among_rendered_scans(rendered, damaged, tmp_path, local_ray):
    """By the recipe's own values, in proportion to the size of the images; all pairs are matched, without a ranking."""
    pytest.importorskip("pycolmap", reason="needs the extra localize")
    root, broken = damaged
    cutouts = sorted(str(path.relative_to(root)) for path in root.glob("database/cutouts/*/*/*.jpg"))
    (tmp_path / "pairs.txt").write_text("".join(f"{query} {cutout}\n" for query in rendered[1] for cutout in cutouts))
    asked = configuration.load(
        ["configs/dataset/inloc.yaml"],
        output=str(tmp_path / "run"),
        pair_list=str(tmp_path / "pairs.txt"),
        cameras=str(root / "truth"),
        dataset={"root": str(root)},
        matching={"method": "sift+nn", "max_keypoints": 800, "extractors": 1, "matchers": 1},
        localize={"threshold": 48 * 480 / 4032},
    )
    job = pipeline.localize(asked)
    table = pq.read_table(job.path("localized.parquet"))
    assert table["query"].to_pylist() == sorted(rendered[1])
    assert job.metrics["median_translation_error"] < 0.05 and job.metrics["median_rotation_error"] < 0.5
    assert job.metrics["judged"] == job.metrics["localized"] == 6 and job.metrics["wrong_world"] == 0
    assert set(table["camera"].to_pylist()) == {"guess"}  # of the recipe, not the 28 mm of EXIF
    assert [row[0] for row in table["params"].to_pylist()] == pytest.approx([28 / 36 * 480] * 6)
    assert job.counts["database_without_geometry"] == 1  # and it is no one's pair
    faults = [fault for row in table["faults"].to_pylist() for fault in row]
    assert faults and all(fault.startswith(f"{broken}: scan damaged") for fault in faults)
    assert job.counts["pairs_without_points"] == {"scan damaged, or no file of MATLAB's": len(faults)}
    lines = [line.split() for line in (tmp_path / "run/poses.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == [name.rpartition("/")[2] for name in sorted(rendered[1])]
    w, x, y, z, *t = map(float, lines[0][1:])
    camera = rendered[1][sorted(rendered[1])[0]]
    R = scipy.spatial.transform.Rotation.from_quat([x, y, z, w]).as_matrix()
    np.testing.assert_allclose(-R.T @ t, camera.center, atol=0.1)  # world to camera


def test_nothing_is_localized_without_any_scan(rendered, tmp_path, local_ray):
    pytest.importorskip("pycolmap", reason="needs the extra localize")
    root = tmp_path / "tree"
    shutil.copytree(rendered[0], root, ignore=shutil.ignore_patterns("*.mat", "[1-3]*", "*_[1-9]*_0.jpg"))
    asked = configuration.load(
        ["configs/dataset/inloc.yaml"], output=str(tmp_path / "run"), dataset={"root": str(root)}
    )
    with pytest.raises(
        ConfigError, match=r"none of \d+ database images has the geometry .*_0_0\.jpg: nothing at .*\.mat"
    ):
        pipeline.localize(asked)


def test_the_same_tree_is_rendered_again(tmp_path):
    tiny = rendered_inloc.Tree(("DUC1",), scans=1, queries=1, yaws=1, cutout=(40, 30), phone=(40, 30))
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        rendered_inloc.write(str(folder), tiny)
        contents.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert contents[0] == contents[1] and len(contents[0]) == 5
