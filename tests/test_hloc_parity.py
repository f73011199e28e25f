"""Our exports through hloc's own programs, unchanged, where hloc can be imported (a checkout in PYTHONPATH is enough).

`tests/test_hloc_export.py` and `tests/test_hloc_import.py` say the same of the files without hloc.
"""

import pickle
from pathlib import Path

import matched_runs
import numpy as np
import pyarrow.parquet as pq
import pytest
from matched_runs import NAMES, POINTS, SIZE, K

pytest.importorskip("hloc", reason="hloc is on no package index: docs/hloc.md says how to get it")
pytest.importorskip("pycolmap", reason="needs the extra localize")

import pycolmap
from hloc import localize_inloc, localize_sfm, reconstruction, triangulation

import vop
from vop import config as configuration
from vop import pipeline
from vop.cameras import KnownCamera
from vop.colmap import known_camera
from vop.datasets import rendered_inloc
from vop.geometry import Camera
from vop.lift import Lifted
from vop.localization import QueryPair, localize
from vop.schema import LocalizeConfig
from vop.triangulation import PosedImage, triangulate

QUERIES, DATABASE = ["a/0.jpg", "b/5.jpg"], NAMES[1:5]


def error(found: pycolmap.Rigid3d, true: Camera) -> tuple[float, float]:
    """Degrees and world units between a pose and the true one."""
    turned = found.rotation.matrix().T @ true.rotation
    angle = np.degrees(np.arccos(np.clip((np.trace(turned) - 1) / 2, -1, 1)))
    return angle, float(np.linalg.norm(-found.rotation.matrix().T @ found.translation - true.center))


def reference(folder: Path, names) -> Path:
    """A COLMAP model of the images with their true poses, without points."""
    made = pycolmap.Reconstruction()
    camera = pycolmap.Camera(model="PINHOLE", width=SIZE[0], height=SIZE[1], camera_id=1,
                             params=[K[0, 0], K[1, 1], K[0, 2], K[1, 2]])  # fmt: skip
    made.add_camera_with_trivial_rig(camera)
    for number, name in enumerate(names, 1):
        pose = pycolmap.Rigid3d(matched_runs.camera(NAMES.index(name)).cam_from_world[:3])
        image = pycolmap.Image(name=name, camera_id=1, image_id=number)
        made.add_image_with_trivial_frame(image, pose)
    folder.mkdir()
    made.write(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run whose pairs are known, its export, and pair lists for the map and for the queries."""
    folder = tmp_path_factory.mktemp("hloc")
    run = matched_runs.write(folder)
    vop.export_matches(output=run, export={"hloc": str(folder / "out")})
    couples = [line.split() for line in (folder / "out" / "pairs.txt").read_text().splitlines()]
    for name, first, second in (("map", DATABASE, DATABASE), ("loc", QUERIES, DATABASE)):
        lines = [f"{q} {d}\n" for q, d in couples if q in first and d in second]
        (folder / f"pairs-{name}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(exported):
    """What hloc triangulates at the true poses.

    Its default check by these poses writes two-view geometries without a configuration, which pycolmap 4.2 leaves out:
    no point comes of it. With `estimate_two_view_geometries` COLMAP writes them.
    """
    return triangulation.main(
        exported / "sfm", reference(exported / "reference", DATABASE), exported / "images", exported / "pairs-map.txt",
        exported / "out" / "features.h5", exported / "out" / "matches.h5", estimate_two_view_geometries=True,
    )  # fmt: skip


def features(name):
    return matched_runs.local_features(name)[0]


def test_hloc_triangulates_the_points_that_we_do(model):
    images = {}
    for name in DATABASE:
        known = matched_runs.camera(NAMES.index(name))
        camera = known_camera(KnownCamera(name, known.K, known.cam_from_world, "w", *SIZE), SIZE)
        images[name] = PosedImage(features(name).keypoints, camera, known.cam_from_world)
    couples = [(a, b, matched_runs.matches(a, b).indices) for a in DATABASE for b in DATABASE if a < b]
    seen = triangulate(images, couples, 1.5)
    ours = {point: xyz for each in seen.values() for point, xyz in zip(each.ids.tolist(), each.xyz, strict=True)}
    assert len(ours) == pytest.approx(len(model.points3D), rel=0.05)
    places = np.array([point.xyz for point in model.points3D.values()])
    for found in (places, np.array([*ours.values()])):
        nearest = np.linalg.norm(found[:, None] - POINTS[None], axis=2).min(axis=1)
        assert np.median(nearest) < 0.02


class Model:
    """The points of a COLMAP model as a lift."""

    def __init__(self, model):
        self.images = {image.name: image for image in model.images.values()}
        self.points = model.points3D

    def __call__(self, name, rows, points):
        ids = np.array([p.point3D_id if p.has_point3D() else -1 for p in self.images[name].points2D], np.int64)[rows]
        return Lifted(np.array([self.points[i].xyz if i >= 0 else [np.nan] * 3 for i in ids.tolist()]), ids)

    def world(self, name):
        return "w"


def test_hloc_localizes_as_we_do(exported, model):
    """Same matches and map: as many correspondences, and poses no further apart than RANSAC makes them."""
    lines = [f"{name} PINHOLE {SIZE[0]} {SIZE[1]} {K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]}\n" for name in QUERIES]
    (exported / "queries.txt").write_text("".join(lines))
    results = exported / "results.txt"
    localize_sfm.main(
        model, exported / "queries.txt", exported / "pairs-loc.txt", exported / "out" / "features.h5",
        exported / "out" / "matches.h5", results,
    )  # fmt: skip
    logs = pickle.loads(Path(f"{results}_logs.pkl").read_bytes())["loc"]
    for name in QUERIES:
        pairs = []
        for database in (line.split()[1] for line in (exported / "pairs-loc.txt").read_text().splitlines()
                         if line.split()[0] == name):  # fmt: skip
            found = matched_runs.matches(*sorted((name, database))).indices
            pairs.append(
                QueryPair(database, found if name < database else found[:, ::-1], features(database).keypoints)
            )
        camera = pycolmap.Camera(model="PINHOLE", width=SIZE[0], height=SIZE[1], params=K[[0, 1, 0, 1], [0, 1, 2, 2]])
        row = localize(pairs, features(name).keypoints, camera, Model(model), LocalizeConfig(min_matches=1))
        assert row["correspondences"] == len(logs[name]["keypoints_query"]) > 100
        theirs, true = logs[name]["PnP_ret"], matched_runs.camera(NAMES.index(name))
        assert abs(row["inliers"] - theirs["num_inliers"]) <= 2
        ours = pycolmap.Rigid3d(np.array(row["cam_from_world"]).reshape(3, 4))
        for pose in (ours, theirs["cam_from_world"]):
            turned, away = error(pose, true)
            assert turned < 0.05
            assert away < 0.01
        between = theirs["cam_from_world"] * ours.inverse()
        assert np.degrees(between.rotation.angle()) < 0.01
        assert np.linalg.norm(between.translation) < 0.002
    written = [line.split() for line in results.read_text().splitlines()]
    assert [line[0] for line in written] == [name.rpartition("/")[2] for name in QUERIES]


def test_hloc_reconstructs_from_our_export(exported):
    (exported / "pairs-all.txt").write_text(
        "".join(f"{a} {b}\n" for i, a in enumerate(NAMES) for b in NAMES[i + 1 :] if (a, b) != matched_runs.FAILED)
    )
    made = reconstruction.main(
        exported / "rec", exported / "images", exported / "pairs-all.txt", exported / "out" / "features.h5",
        exported / "out" / "matches.h5", camera_mode=pycolmap.CameraMode.SINGLE, image_list=NAMES,
    )  # fmt: skip
    assert made.num_reg_images() == len(NAMES)
    centers = {image.name: image.projection_center() for image in made.images.values()}
    true = [matched_runs.camera(i).center for i in range(len(NAMES))]
    aligned = pycolmap.estimate_sim3d(np.array([centers[name] for name in NAMES]), np.array(true))
    errors = [np.linalg.norm(aligned * centers[name] - center) for name, center in zip(NAMES, true, strict=True)]
    assert max(errors) < 0.01 * np.linalg.norm(np.ptp(true, axis=0))


@pytest.mark.slow
def test_inloc_of_hloc_has_as_many_correspondences_as_ours(tmp_path, local_ray):
    """One floor, since hloc puts the frames of several into one estimate."""
    tree = rendered_inloc.Tree(floors=("DUC1",), scans=1, queries=3, yaws=8, cutout=(480, 360), phone=(480, 360))
    truth = rendered_inloc.write(str(tmp_path / "tree"), tree)
    cutouts = sorted(
        str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree" / "database").rglob("*.jpg")
    )
    (tmp_path / "pairs.txt").write_text("".join(f"{query} {cutout}\n" for query in truth for cutout in cutouts))
    job = pipeline.localize(configuration.load(
        ["configs/dataset/inloc.yaml"], output=str(tmp_path / "run"), pair_list=str(tmp_path / "pairs.txt"),
        cameras=str(tmp_path / "tree" / "truth"), dataset={"root": str(tmp_path / "tree")},
        matching={"method": "sift+nn", "max_keypoints": 800, "extractors": 1, "matchers": 1},
    ))  # fmt: skip
    vop.export_matches(output=job.output, export={"hloc": str(tmp_path / "out")})
    out, results = tmp_path / "out", tmp_path / "results.txt"
    localize_inloc.main(
        tmp_path / "tree", out / "pairs.txt", out / "features.h5", out / "matches.h5", results, skip_matches=20
    )
    logs = pickle.loads(Path(f"{results}_logs.pkl").read_bytes())["loc"]
    table = {row["query"]: row for row in pq.read_table(job.path("localized.parquet")).to_pylist()}
    assert [*table] == sorted(truth) == sorted(logs)
    for name, row in table.items():
        assert row["reason"] is None
        assert row["matches"] == logs[name]["num_matches"]
        assert row["correspondences"] == len(logs[name]["keypoints_query"])
