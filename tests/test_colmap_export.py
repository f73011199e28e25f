"""COLMAP databases of a scene that is known, read back and reconstructed by pycolmap."""

import re
import shutil
import sqlite3
import sys
from types import SimpleNamespace

import matched_runs
import numpy as np
import pytest
from matched_runs import BLANK, EXPORTED, NAMES, SIZE, K
from PIL import Image

import vop
from vop import colmap
from vop.cameras import Cameras, KnownCamera
from vop.config import ConfigError
from vop.geometry import project, transform

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap, of the extra `localize`, is not installed")
EXIF, MAKE, MODEL, FOCAL_35MM, ORIENTATION = 0x8769, 0x010F, 0x0110, 0xA405, 0x0112


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory beside its cameras.json."""
    return matched_runs.write(tmp_path_factory.mktemp("colmap"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A database with known cameras, and the record of the export."""
    path = tmp_path_factory.mktemp("database") / "scene.db"
    return path, vop.export_matches(
        output=run, cameras=run.replace("/run", "/cameras.json"), export={"colmap": str(path)}
    )


def test_images_keypoints_and_matches_come_back(exported):
    with pycolmap.Database.open(exported[0]) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        assert ids == {name: number for number, name in enumerate(sorted([*NAMES, BLANK]), 1)}
        for name, number in ids.items():
            np.testing.assert_array_equal(db.read_keypoints(number), matched_runs.local_features(name)[0].keypoints)
        assert db.num_matched_image_pairs() == len(EXPORTED)
        for name0, name1 in EXPORTED:
            found = db.read_matches(ids[name0], ids[name1])
            np.testing.assert_array_equal(found, matched_runs.matches(name0, name1).indices)


def test_pixel_conventions_are_colmaps_own(exported):
    """A point of the scene, projected by the camera in the database, lies at its keypoint: half a pixel would show."""
    with pycolmap.Database.open(exported[0]) as db:
        for i, name in enumerate(NAMES):
            image = db.read_image_with_name(name)
            camera, (_, points) = db.read_camera(image.camera_id), matched_runs.local_features(name)
            seen = transform(matched_runs.camera(i).cam_from_world, matched_runs.POINTS[points[points >= 0]])
            apart = db.read_keypoints(image.image_id)[points >= 0] - camera.img_from_cam(seen)
            assert np.abs(apart.mean(axis=0)).max() < 4 * matched_runs.NOISE / np.sqrt(len(seen))


def test_pairs_are_verified(exported):
    path, run = exported
    with pycolmap.Database.open(path) as db:
        ids = {image.name: image.image_id for image in db.read_all_images()}
        usable = 0
        for name0, name1 in EXPORTED:
            geometry = db.read_two_view_geometry(ids[name0], ids[name1])
            if BLANK in (name0, name1):
                assert geometry.config == pycolmap.TwoViewGeometryConfiguration.DEGENERATE
                continue
            usable += 1
            inliers = geometry.inlier_matches
            points = [matched_runs.local_features(name)[1] for name in (name0, name1)]
            true = points[0][inliers[:, 0]] == points[1][inliers[:, 1]]
            shared = np.intersect1d(*points)
            assert geometry.config == pycolmap.TwoViewGeometryConfiguration.CALIBRATED
            assert (true & (points[0][inliers[:, 0]] >= 0)).sum() > 0.95 * (len(shared) - 1)
    assert run.counts["colmap"]["verified"] == usable == len(EXPORTED) - 1
    assert f"7 images, {len(EXPORTED)} pairs, {usable} of them verified" in run.summary()


def test_cameras_that_are_known_and_one_that_is_not(exported):
    path, run = exported
    with pycolmap.Database.open(path) as db:
        cameras = {image.name: db.read_camera(image.camera_id) for image in db.read_all_images()}
        assert db.num_cameras() == db.num_rigs() == 2  # all known images share one
    for name in NAMES:
        np.testing.assert_array_equal(cameras[name].calibration_matrix(), K)
        assert cameras[name].has_prior_focal_length
    blank = cameras[BLANK]
    assert (blank.model_name, blank.params.tolist()) == ("SIMPLE_RADIAL", [1.2 * 640, 320, 240, 0])
    assert not blank.has_prior_focal_length
    assert run.counts["colmap"]["cameras"] == {"known": 6, "guessed as 1.2 x the long side": 1}
    assert "6 known, 1 guessed as 1.2 x the long side" in run.summary()


def test_the_scene_is_reconstructed_from_the_database(exported, run, tmp_path):
    with pycolmap.ostream():
        models = pycolmap.incremental_mapping(exported[0], run.replace("/run", "/images"), tmp_path)
    assert len(models) == 1
    images = {image.name: image for image in models[0].images.values() if image.has_pose}
    assert sorted(images) == sorted(NAMES)
    true = np.array([matched_runs.camera(i).center for i in range(len(NAMES))])
    found = np.array([images[name].projection_center() for name in NAMES])
    aligned = pycolmap.estimate_sim3d(found, true)
    extent = np.linalg.norm(true.max(axis=0) - true.min(axis=0))
    assert np.linalg.norm(aligned * found - true, axis=1).max() < 0.01 * extent


def test_a_relative_pose_run_keeps_the_cameras_that_it_used(run, tmp_path):
    """Its cameras.parquet, without a look at their source or at the images."""
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    for name in ("images", "cameras"):  # gone since
        text = (moved / "config.yaml").read_text()
        (moved / "config.yaml").write_text(re.sub(rf"^{name}: .*$", f"{name}: /gone", text, flags=re.MULTILINE))
    (moved / "run.json").write_text((moved / "run.json").read_text().replace('"match"', '"relative-pose"'))
    sized = {"width": 640, "height": 480}
    Cameras.of(KnownCamera(name, K, np.eye(4), **sized) for name in [*NAMES, BLANK]).write(f"{moved}/cameras.parquet")
    done = vop.export_matches(output=str(moved), export={"colmap": str(tmp_path / "used.db")})
    assert done.counts["colmap"]["cameras"] == {"known": 7}


def content(path):
    with sqlite3.connect(path) as database:
        return list(database.iterdump())


def test_a_repeated_export_gives_the_same_content(exported, run, tmp_path):
    (tmp_path / "again.db").write_bytes(b"another program's")
    (tmp_path / "again.db-wal").write_bytes(b"its journal")
    cameras = run.replace("/run", "/cameras.json")
    vop.export_matches(output=run, cameras=cameras, export={"colmap": str(tmp_path / "again.db")})
    assert [path.name for path in tmp_path.iterdir()] == ["again.db"]
    assert content(tmp_path / "again.db") == content(exported[0])


def test_a_database_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "x.db").write_bytes(b"older")
    with pytest.raises(OSError, match="torn"), colmap.database(str(tmp_path / "x.db")) as db:
        colmap.add_images(db, {"a.jpg": colmap.guessed_camera("nowhere", SIZE)})
        raise OSError("torn")
    assert [path.name for path in tmp_path.iterdir()] == ["x.db"]
    assert (tmp_path / "x.db").read_bytes() == b"older"


def photograph(path, size=(64, 48), model="One", orientation=1, focal=28):
    exif = Image.Exif()
    exif[MAKE], exif[MODEL], exif[ORIENTATION] = "Acme", model, orientation
    exif.get_ifd(EXIF)[FOCAL_35MM] = focal
    Image.new("RGB", size).save(path, exif=exif)
    return str(path)


def test_cameras_are_guessed_from_exif_and_shared(tmp_path, store):
    one, other = (photograph(tmp_path / f"{name}.jpg") for name in ("one", "other"))
    turned = photograph(tmp_path / "turned.jpg", orientation=6)
    second = photograph(tmp_path / "second.jpg", model="Two")
    guesses = {path: colmap.guessed_camera(path, (64, 48)) for path in (one, other, second)}
    guesses |= {turned: colmap.guessed_camera(turned, (48, 64))}
    guesses |= {
        path: colmap.guessed_camera(path, (64, 48)) for path in (str(tmp_path / "gone.jpg"), store.uri("y.jpg"))
    }
    expected = pycolmap.infer_camera_from_image(one)
    for path in (one, other, second, turned):
        assert guesses[path].source == colmap.EXIF
        assert guesses[path].camera.focal_length == pytest.approx(expected.focal_length, rel=1e-12)
    np.testing.assert_allclose(guesses[one].camera.params, expected.params)
    assert guesses[turned].camera.params[1:].tolist() == [24, 32, 0]
    with colmap.database(str(tmp_path / "x.db")) as db:
        colmap.add_images(db, guesses)
        ids = {image.name: image.camera_id for image in db.read_all_images()}
    assert ids[one] == ids[other]
    assert len(set(ids.values())) == 5  # unlike ones, and unknown ones, have cameras of their own


def known(K=K, **settings):
    return KnownCamera("x.jpg", np.array(K, float), None, **({"width": 640, "height": 480} | settings))


def test_known_cameras_keep_their_model_and_fit_the_image():
    pinhole = colmap.known_camera(known([[600, 0, 322], [0, 610, 239], [0, 0, 1]]), (320, 240)).camera
    assert (pinhole.model_name, pinhole.params.tolist()) == ("PINHOLE", [300, 305, 161, 119.5])
    assert (pinhole.width, pinhole.height) == (320, 240)
    params = (600.0, 322.0, 239.0, -0.1)
    radial = colmap.known_camera(known(model="SIMPLE_RADIAL", params=params), SIZE).camera
    assert (radial.model_name, tuple(radial.params)) == ("SIMPLE_RADIAL", params)


def test_cameras_that_do_not_fit_are_guessed_and_counted_and_skew_is_refused():
    turned = colmap.camera_of(known(), (480, 640), lambda: "nowhere")
    assert turned.source == colmap.MISFIT
    assert turned.camera.params.tolist() == [1.2 * 640, 240, 320, 0]
    slight = known([[600, 0.1, 322], [0, 600, 239], [0, 0, 1]])
    assert colmap.camera_of(slight, SIZE, lambda: "nowhere").source == colmap.KNOWN
    with pytest.raises(colmap.ColmapError, match=r"skew 3, which moves points by up to 1.2 pixels \(at most 0.5\)"):
        colmap.camera_of(known([[600, 3, 322], [0, 600, 239], [0, 0, 1]]), SIZE, lambda: "nowhere")


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (None, r"need pycolmap: pip install 'vop\[localize\]'"),
        (SimpleNamespace(__version__="3.11.1"), "pycolmap 3.11.1 is installed, but 4.1 up to 5 is needed"),
    ],
)
def test_without_pycolmap_the_error_names_the_extra_before_any_work(monkeypatch, tmp_path, module, complaint):
    monkeypatch.setitem(sys.modules, "pycolmap", module)
    with pytest.raises(ConfigError, match=complaint):
        vop.export_matches(output=str(tmp_path), export={"colmap": str(tmp_path / "x.db")})


def test_projected_points_of_the_fixture_are_in_the_images():
    """The scene is worth something only if it is seen."""
    for i, name in enumerate(NAMES):
        points = matched_runs.local_features(name)[1]
        assert (points >= 0).sum() > 150
        seen = project(transform(matched_runs.camera(i).cam_from_world, matched_runs.POINTS), K)
        assert ((seen > 0) & (seen < SIZE)).all(axis=1).sum() > 150
