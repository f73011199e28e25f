"""The renderer against its own geometry: what one image sees must be what another sees, moved by the cameras."""

import cv2
import numpy as np
import pytest

from vop.datasets.building import COLUMNS, Building
from vop.datasets.posed import PosedFolder, overlap_truth
from vop.datasets.raster import PHOTOGRAPHS, Light, Rectangles, draw, photographs
from vop.datasets.rendered import render, render_frame, scene_for, write
from vop.geometry import Camera, invert, overlap, overlap_matrix, project, relative_pose, transform, unproject

COUNT = 30


@pytest.fixture(scope="module")
def plain():
    return list(render(COUNT, seed=3, lighting=0.0, mixed=False))


def one_rectangle(origin, u, v, texture="chelsea", uv=(0, 1, 0, 1)) -> Rectangles:
    row = [np.array([value], float) for value in (origin, u, v)]
    return Rectangles(
        *row, np.array([PHOTOGRAPHS.index(texture)]), np.array([uv], float), np.zeros((1, 3)), np.ones((1, 3))
    )


def camera(width=64, height=48, focal=50.0) -> Camera:
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(K, np.eye(4), width, height)


def test_a_slanted_plane_has_the_depth_of_its_equation():
    """The plane through (0, 0, 3) with normal (0.5, 0.2, -1): z = n.p0 / (n.ray) for every pixel's ray."""
    cam, normal = camera(), np.array([0.5, 0.2, -1.0])
    u, v = np.array([1.0, 0, 0.5]) * 40, np.array([0, 1.0, 0.2]) * 40
    _, depth = draw(one_rectangle(np.array([0, 0, 3.0]) - (u + v) / 2, u, v), cam, Light(), np.random.default_rng(0))
    rays = unproject(np.ones((48, 64)), cam.K)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, normal[2] * 3 / (rays @ normal), rtol=1e-6)


def test_a_frontal_photograph_is_reproduced_upright():
    """A rectangle that fills the image shows the photograph, as an area filter reduces it."""
    cam = camera(128, 128, 64.0)
    rectangle = one_rectangle([-2, -2, 2], [4, 0, 0], [0, 4, 0])
    image, _ = draw(rectangle, cam, Light(), np.random.default_rng(0))
    expected = cv2.resize(photographs().texels[PHOTOGRAPHS.index("chelsea"), :512, :512], (128, 128), interpolation=3)
    dark = expected.max(2) < 180  # brighter values are bent by the film's shoulder
    assert np.abs(image.astype(float) - expected)[dark].mean() < 4
    assert np.abs(image[:, ::-1].astype(float) - expected)[dark].mean() > 12


def test_rectangles_are_seen_from_the_front_only():
    _, depth = draw(one_rectangle([2, -2, 2], [-4, 0, 0], [0, 4, 0]), camera(), Light(), np.random.default_rng(0))
    assert not depth.any()


def test_distant_textures_do_not_alias():
    """A fine texture 60 tiles wide, moved by a fraction of a tile, must give the same grey: no moire."""
    images = [
        draw(
            one_rectangle([-20, -20, 20], [40, 0, 0], [0, 40, 0], "gravel", (shift, 60, 0, 60)),
            *(camera(), Light(), np.random.default_rng(0)),
        )[0].astype(float)
        for shift in (0.0, 0.21)
    ]
    assert np.abs(images[0] - images[1]).mean() < 6
    assert images[0].std() < 10 < photographs().texels[PHOTOGRAPHS.index("gravel"), :512, :512].std()


def covisible(frame0, frame1):
    """Pixels of frame 0, their depth in frame 1's camera, and where they land there; only those seen by both."""
    points = transform(relative_pose(frame0.camera, frame1.camera), unproject(frame0.depth, frame0.camera.K))
    xy = np.nan_to_num(project(points, frame1.camera.K), nan=-1)
    h, w = frame1.depth.shape
    inside = (frame0.depth > 0) & (xy > 1).all(-1) & (xy[..., 0] < w - 1) & (xy[..., 1] < h - 1)
    return inside, points[..., 2], xy


def bilinear(image, xy):
    return cv2.remap(image, xy[..., 0].astype(np.float32) - 0.5, xy[..., 1].astype(np.float32) - 0.5, cv2.INTER_LINEAR)


def best_partner(frames, index):
    row = overlap_matrix([f.depth for f in frames], [f.camera for f in frames])[index].copy()
    row[index] = 0
    return int(row.argmax()), row.max()


@pytest.mark.parametrize("index", [2, 11, 20])
def test_two_images_agree_in_depth_and_colour(plain, index):
    other, shared = best_partner(plain, index)
    assert shared > 0.3
    frame0, frame1 = plain[index], plain[other]
    inside, z, xy = covisible(frame0, frame1)
    found = bilinear(1 / np.maximum(frame1.depth, 1e-3), xy)  # 1/z is affine on a plane, so this is exact there
    error = np.abs(z * found - 1)
    assert np.median(error[inside & (error < 0.1)]) < 1e-5
    same = inside & (error < 1e-4)
    assert same.mean() > 0.15
    colors = np.abs(frame0.image.astype(float) - bilinear(frame1.image.astype(np.float32), xy))
    shuffled = np.abs(frame0.image.astype(float) - bilinear(frame1.image.astype(np.float32)[:, ::-1], xy))
    assert np.median(colors[same]) < 5
    assert np.median(colors[same]) < 0.4 * np.median(shuffled[same])


def test_the_light_changes_the_image_but_not_the_geometry(plain):
    lit = render_frame(scene_for(COUNT, 3), 4, lighting=1.0, mixed=False)
    np.testing.assert_array_equal(lit.depth, plain[4].depth)
    np.testing.assert_array_equal(lit.camera.cam_from_world, plain[4].camera.cam_from_world)
    assert np.abs(lit.image.astype(float) - plain[4].image).mean() > 3


def test_an_image_depends_on_its_number_only():
    scene = scene_for(COUNT, 1)
    alone = render_frame(Building(1, scene.rooms), 17, 96, 72)
    for frame in render(COUNT, 1, 96, 72):
        if frame.name == alone.name:
            break
    np.testing.assert_array_equal(frame.image, alone.image)
    np.testing.assert_array_equal(frame.depth, alone.depth)
    assert not np.array_equal(render_frame(scene_for(COUNT, 2), 17, 96, 72, mixed=False).depth[0], alone.depth[0])


def test_a_path_wanders_through_every_room_and_overlaps_vary(plain):
    matrix = overlap_matrix([f.depth for f in plain], [f.camera for f in plain])
    others = matrix[~np.eye(COUNT, dtype=bool)]
    assert (others == 0).mean() > 0.2
    assert (others > 0.6).any()
    assert ((matrix > 0.3).sum(1) > 1).mean() > 0.8
    one_way = [overlap(plain[a].depth, plain[a].camera, plain[b].depth, plain[b].camera) for a, b in ((2, 3), (3, 2))]
    assert matrix[2, 3] == pytest.approx(min(one_way), abs=0.05)
    for frame in plain:  # the camera stands free, inside the building, and level
        assert frame.depth[frame.depth > 0].min() > 0.2
        assert (frame.depth > 0).mean() > 0.5
        assert invert(frame.camera.cam_from_world)[2, 3] > 1


@pytest.mark.parametrize("rooms", [1, 2, COLUMNS + 3])
def test_consecutive_rooms_share_a_door(rooms):
    building = Building(0, rooms)
    pairs = {(door.a, door.b) for door in building.doors}
    assert {(room, room + 1) for room in range(rooms - 1)} <= pairs
    for door in building.doors:  # its middle lies on both rooms' outlines, half a wall outside
        for room in (door.a, door.b):
            x0, x1, y0, y1 = building.bounds(room) + np.array([-1, 1, -1, 1]) * 0.1001
            assert x0 <= door.middle[0] <= x1 and y0 <= door.middle[1] <= y1


def test_a_larger_building_contains_the_smaller():
    small, large = Building(4, 2), Building(4, 9)
    for room in range(2):
        np.testing.assert_array_equal(small.bounds(room), large.bounds(room))
    assert len(large.rectangles) > len(small.rectangles)


def test_any_number_of_images_and_sizes():
    scene = scene_for(2, 0)
    frame = render_frame(scene, 1000, 64, 48)  # later laps through the same rooms
    assert frame.name == "1000.jpg"
    shapes = {f.image.shape[:2] for f in render(40, 0, 64, 48)}
    assert shapes == {(48, 64), (64, 48), (36, 64)}
    with pytest.raises(ValueError, match="0 images"):
        scene_for(0)
    with pytest.raises(ValueError, match="negative"):
        render_frame(scene, -1)


def test_write_is_read_back_and_repeats_itself(tmp_path):
    truth = write(tmp_path, 8, seed=5, width=96, height=72)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(first) == 2 * 8 + 2
    again = write(tmp_path, 8, seed=5, width=96, height=72)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    np.testing.assert_array_equal(truth.matrix, again.matrix)
    folder = PosedFolder.open(tmp_path)
    assert folder.names == truth.names == tuple(f"{i:04d}.jpg" for i in range(8))
    for frame in render(8, 5, 96, 72):
        np.testing.assert_allclose(folder.depth(frame.name), frame.depth, atol=0.000501)
        assert np.abs(folder.image(frame.name).astype(float) - frame.image).mean() < 12
        np.testing.assert_allclose(folder.camera(frame.name).cam_from_world, frame.camera.cam_from_world)
    stored = overlap_truth(tmp_path)
    assert stored.names == truth.names
    np.testing.assert_array_equal(stored.matrix.toarray(), truth.matrix)
    np.testing.assert_allclose(folder.overlap_matrix(), truth.matrix, atol=0.01)  # millimetres
