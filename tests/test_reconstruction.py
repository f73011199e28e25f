"""Reconstruction: pairs that contradict others, models of a scene that is known, and how they are judged."""

import dataclasses
from pathlib import Path

import matched_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matched_runs import NAMES, SIZE
from PIL import Image
from scipy.spatial.transform import Rotation

from vop.cameras import Cameras, KnownCamera
from vop.features import FeatureStore
from vop.geometry import Camera, invert
from vop.matches import MatchStore
from vop.pair_verification import PairVerification, image_cameras
from vop.parts import Parts
from vop.point_colors import paint
from vop.pose.alignment import judge, similarity
from vop.reconstruction import DATABASE, VERIFIED, DatabaseWriter, Mapper, place
from vop.schema import ReconstructConfig

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap, of the extra `localize`, is not installed")
CONFIG, KINDS = ReconstructConfig(), pycolmap.TwoViewGeometryConfiguration


@dataclasses.dataclass
class Scene:
    """A matched run whose scene is known, its pairs verified and its database written; images in `folder`."""

    folder: object
    output: str
    features: FeatureStore
    geometries: Parts
    count: int

    @property
    def images(self) -> str:
        return f"{self.output}/images.parquet"

    @property
    def known(self) -> dict[str, KnownCamera]:
        return {camera.name: camera for camera in Cameras.read(f"{self.folder}/run/cameras.parquet")}

    def write_database(self, config=CONFIG) -> pa.Table:
        DatabaseWriter(config, self.features, self.images, self.geometries, self.count, self.output)("inputs")
        return pq.read_table(f"{self.output}/{VERIFIED}")

    def models(self, folder, config=CONFIG) -> tuple[pa.Table, Parts]:
        parts = Parts(str(folder), "test", "mapping")
        Mapper(config, self.images, self.output, parts, 10**8)(0, sorted(NAMES))
        return parts.read_one(0), parts


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction")
    output = matched_runs.write(folder)
    features, matches = FeatureStore.open(f"{output}/features"), MatchStore.open(f"{output}/matches")
    Cameras.of(
        KnownCamera(name, matched_runs.K, matched_runs.camera(i).cam_from_world, "w", *SIZE)
        for i, name in enumerate(NAMES)
    ).write(f"{output}/cameras.parquet")
    live = features.live().sort_by("name")
    paths = [f"{folder}/images/{name}" for name in live["name"].to_pylist()]
    asked = live.select(["name", "width", "height"]).append_column("path", pa.array(paths))
    images = image_cameras(asked, f"{output}/cameras.parquet").append_column("path", asked["path"])
    for column in ("shard", "row"):
        images = images.append_column(column, live[column])
    pq.write_table(images, f"{output}/images.parquet")
    parts, receipts = Parts(output, "test", "geometries"), matches.receipts()
    verification = PairVerification(CONFIG, features, matches, f"{output}/images.parquet", parts)
    for number in receipts:
        rows = np.arange(matches.planned(number).num_rows)
        verification(pa.table({"part": [number] * len(rows), "shard": [number] * len(rows), "row": rows}))
    return Scene(folder, output, features, parts, len(receipts))


def test_every_pair_is_told_of(scene):
    pairs = {(row["image0"], row["image1"]): row for row in scene.write_database().to_pylist()}
    assert len(pairs) == len(matched_runs.EXPORTED) + 1
    assert pairs[matched_runs.FAILED]["reason"] == "matches or features unreadable"
    assert pairs["a/0.jpg", matched_runs.BLANK]["reason"] == "too few matches"
    good = [row for row in pairs.values() if row["reason"] is None]
    assert len(good) == len(pairs) - 2
    assert all(0.9 * row["matches"] < row["inliers"] < row["matches"] for row in good)


def test_the_database_holds_what_was_verified(scene):
    used = scene.write_database()
    used = used.filter(used["reason"].is_null()).to_pylist()
    with pycolmap.Database.open(f"{scene.output}/{DATABASE}") as db:
        assert db.num_images() == len(NAMES) + 1
        assert db.num_verified_image_pairs() == len(used)
        ids = {image.name: image.image_id for image in db.read_all_images()}
        for row in used:
            found = db.read_two_view_geometry(ids[row["image0"]], ids[row["image1"]])
            assert (found.config, len(found.inlier_matches)) == (KINDS.CALIBRATED, row["inliers"])
            truth = matched_runs.camera(NAMES.index(row["image1"])).cam_from_world @ invert(
                matched_runs.camera(NAMES.index(row["image0"])).cam_from_world
            )
            np.testing.assert_allclose(found.cam2_from_cam1.rotation.matrix(), truth[:3, :3], atol=0.01)


@pytest.mark.parametrize("mapper", ["incremental", "global"])
def test_the_scene_comes_back_the_same_twice(scene, tmp_path, mapper):
    scene.write_database()
    config = dataclasses.replace(CONFIG, mapper=mapper)
    registered, parts = scene.models(tmp_path / "one", config)
    again, others = scene.models(tmp_path / "two", config)
    assert registered["image"].to_pylist() == sorted(NAMES)
    assert registered.equals(again)
    paths = [Path(place(each, 0, 0)) for each in (parts, others)]
    assert {path.name for path in paths[0].iterdir()} >= {"cameras.bin", "images.bin", "points3D.bin"}
    for path in paths[0].iterdir():
        assert path.read_bytes() == (paths[1] / path.name).read_bytes(), path.name
    model = pycolmap.Reconstruction(paths[0])
    np.testing.assert_array_equal(model.cameras[1].calibration_matrix(), matched_runs.K)  # known: not refined
    centers = {image.name: image.projection_center() for image in model.images.values()}
    assert max(judge(centers, scene.known).errors.values()) < 0.01


def test_points_have_the_colour_of_their_pixels(scene, tmp_path):
    """Photographs that are half red, half blue: no keypoint moves by more than the noise."""
    for name in NAMES:
        pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
        pixels[:, :, 0], pixels[:, SIZE[0] // 2 :, 0], pixels[:, SIZE[0] // 2 :, 2] = 255, 0, 255
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name, format="PNG")
    scene.write_database()
    _, parts = scene.models(tmp_path / "models")
    model = pycolmap.Reconstruction(place(parts, 0, 0))
    assert {tuple(point.color) for point in model.points3D.values()} == {(0, 0, 0)}  # blank images
    paint(model, {name: str(tmp_path / name) for name in NAMES}, 10**8)
    checked = 0
    for point in model.points3D.values():
        at = [model.image(e.image_id).point2D(e.point2D_idx).xy[0] for e in point.track.elements]
        for side, color in ((np.array(at) < SIZE[0] / 2, (255, 0, 0)), (np.array(at) >= SIZE[0] / 2, (0, 0, 255))):
            if side.all():
                assert tuple(point.color) == color
                checked += 1
    assert checked > 50


def test_guessed_intrinsics_are_refined(scene, tmp_path):
    """Of a database whose cameras are not known, beside one that is."""
    images = pq.read_table(scene.images)
    guessed = image_cameras(images.select(["name", "width", "height", "path"]), None)
    assert set(guessed["source"].to_pylist()) == {"guessed as 1.2 x the long side"}
    for column in ("path", "shard", "row"):
        guessed = guessed.append_column(column, images[column])
    other = dataclasses.replace(scene, output=str(tmp_path))
    pq.write_table(guessed, other.images)
    other.write_database()
    other.models(tmp_path / "models")
    model = pycolmap.Reconstruction(place(Parts(str(tmp_path / "models"), "test", "mapping"), 0, 0))
    focal = np.median([camera.params[0] for camera in model.cameras.values()])
    assert abs(focal - 600) < 0.1 * 600 < 1.2 * 640 - 600


def known(centers: np.ndarray, world: str) -> dict[str, KnownCamera]:
    """Cameras at these places (n, 3), looking anywhere."""
    turns = Rotation.random(len(centers), random_state=len(centers)).as_matrix()
    poses = [
        Camera.from_rt(np.eye(3), R, -R @ center, 1, 1).cam_from_world for R, center in zip(turns, centers, strict=True)
    ]
    names = [f"{world}/{i}.jpg" for i in range(len(centers))]
    return {name: KnownCamera(name, None, pose, world) for name, pose in zip(names, poses, strict=True)}


RNG = np.random.default_rng(0)
PLACES = RNG.uniform(-3, 3, (12, 3))
TURN = Rotation.from_rotvec([0.4, -1.1, 2.0]).as_matrix()


def moved(points):
    return 0.3 * points @ TURN.T + [5, -2, 11]


def test_a_similarity_is_found():
    found = similarity(PLACES, moved(PLACES))
    assert found.scale == pytest.approx(0.3)
    np.testing.assert_allclose(found.R, TURN, atol=1e-12)
    np.testing.assert_allclose(found(PLACES), moved(PLACES), atol=1e-12)


@pytest.mark.parametrize("places", [PLACES[:2], np.outer(np.arange(5.0), [1, 2, 3]), np.ones((4, 3))])
def test_no_similarity_of_too_few_places_or_of_places_on_a_line(places):
    assert similarity(places, moved(places)) is None
    centers = dict(zip(known(places, "w"), places, strict=True))
    assert judge(centers, known(places, "w")).errors is None


def test_a_mirrored_scene_is_not_taken_for_the_scene():
    assert np.linalg.det(similarity(PLACES, PLACES * [1, 1, -1]).R) == pytest.approx(1)


def test_a_model_is_judged_by_the_world_of_most_of_its_images():
    truth = known(moved(PLACES), "castle") | known(moved(PLACES[:4]) + 100, "church")
    centers = dict(zip(known(PLACES, "castle"), PLACES, strict=True))
    found = judge(centers | {"stranger.jpg": np.zeros(3)}, truth)
    assert (found.world, found.images, found.foreign) == ("castle", 12, 0)
    assert max(found.errors.values()) < 1e-12
    mixed = judge(centers | {"church/0.jpg": np.zeros(3)}, truth)
    assert (mixed.world, mixed.images, mixed.foreign) == ("castle", 12, 1)
    assert judge({"stranger.jpg": np.zeros(3)}, truth).world is None


def test_errors_are_shares_of_the_scene_and_not_of_the_model():
    """One camera is off by a twentieth of the model, which holds half of the scene."""
    line = np.array([[x, x**2 / 7, 0.0] for x in np.linspace(-1, 1, 200)])
    centers = dict(zip(known(line, "w"), line, strict=True))
    last = max(centers)
    off = {name: place + ([0, 0, 0.1] if name == last else 0) for name, place in list(centers.items())}
    size = np.linalg.norm(line[0] - line[-1])
    errors = judge(off, known(line, "w")).errors
    assert errors[last] == pytest.approx(0.1 / size, rel=0.05)
    assert np.median(list(errors.values())) < 0.1 * errors[last]
    far = known(line, "w") | {
        "far": KnownCamera("far", None, Camera.from_rt(np.eye(3), np.eye(3), [0, 0, 10], 1, 1).cam_from_world, "w")
    }
    assert judge(off, far).errors[last] < 0.5 * errors[last]
