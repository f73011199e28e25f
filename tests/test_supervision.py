"""Each source of labels on data small enough to know what it must say, and every reason to say nothing."""

import itertools
from dataclasses import fields

import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vop.cameras import Cameras, KnownCamera
from vop.config import load
from vop.datasets.colmap import POINTS
from vop.datasets.posed import encode_depth
from vop.datasets.rendered import render
from vop.geometry import relative_pose
from vop.training.labels import Correspondence, PatchLabels, depth_correspondence, patch_labels
from vop.training.supervision import (
    TOGETHER,
    DepthSupervision,
    HomographySupervision,
    LabelError,
    PointSupervision,
    PreparedSupervision,
    open_supervision,
    read_depth,
    warped,
)

SIZE, PATCHES = 112, 64  # 8 x 8 patches
NAMES = ("a/0.jpg", "a/1.jpg")


def pair(names=NAMES, sizes=((SIZE, SIZE),) * 2, side: int = SIZE, depths=(None, None), flip: bool = False) -> dict:
    """A pair of images of stored sizes (width, height), letterboxed to `side`."""
    row = {"overlap": 0.5}
    for number, (name, size, depth) in enumerate(zip(names, sizes, depths, strict=True)):
        scaled = [round(length * side / max(size)) for length in size]
        row |= {f"view{number}": name + "?flip" * flip, f"depth{number}": depth}
        row |= {f"width{number}": size[0], f"height{number}": size[1]}
        row |= {f"scaled_width{number}": scaled[0], f"scaled_height{number}": scaled[1]}
    return row


def places(matrix: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(place) for place in matrix[0].nonzero().tolist()}


def mirrored(patches: torch.Tensor) -> torch.Tensor:
    """(B, P) or (B, P, P) of images that fill the width, as their mirror images have it: columns 7 - column."""
    columns = int(patches.shape[-1] ** 0.5)
    order = torch.arange(patches.shape[-1]).view(columns, columns).flip(1).flatten()
    return patches[:, order] if patches.dim() == 2 else patches[:, order][:, :, order]


def equal(labels: PatchLabels, other: PatchLabels) -> None:
    for field in fields(PatchLabels):
        assert torch.equal(getattr(labels, field.name), getattr(other, field.name)), field.name


# Depth


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Rendered rooms three times as large as the letterbox, so that a pixel's centre is that of its middle pixel."""
    folder = tmp_path_factory.mktemp("rooms")
    frames = list(render(12, 3, 3 * SIZE, 3 * SIZE * 3 // 4, lighting=0))
    for frame in frames:
        (folder / f"{frame.name}.depth.png").write_bytes(encode_depth(frame.depth))
    path = str(folder / "cameras.parquet")
    Cameras.of(
        KnownCamera(frame.name, frame.camera.K, frame.camera.cam_from_world, "w", frame.camera.width,
                    frame.camera.height) for frame in frames
    ).write(path)  # fmt: skip
    return folder, path, frames


def room_pairs(rooms, flip: bool = False) -> tuple[list[tuple], list[dict]]:
    """Frames that follow each other, and the pairs that they make."""
    folder, _, frames = rooms
    ends = list(itertools.pairwise(frames))
    return ends, [
        pair([f.name for f in of], [(f.camera.width, f.camera.height) for f in of],
             depths=[str(folder / f"{f.name}.depth.png") for f in of], flip=flip) for of in ends
    ]  # fmt: skip


def directly(rooms, frame0, frame1, tolerance: float | None) -> list[Correspondence]:
    """Both directions from what was written, by way of the labels' own functions."""
    folder, depths, K, limits = rooms[0], [], [], []
    for frame in (frame0, frame1):
        width, height = frame.camera.width // 3, frame.camera.height // 3
        depth = torch.zeros(1, SIZE, SIZE)
        depth[0, :height, :width] = torch.from_numpy(read_depth(str(folder / f"{frame.name}.depth.png"))[1::3, 1::3])
        depths.append(depth)
        K.append(torch.from_numpy(np.diag([1 / 3, 1 / 3, 1]) @ frame.camera.K)[None])
        limits.append(torch.tensor([[width - 1.0, height - 1.0]]))
    pose = torch.from_numpy(relative_pose(frame0.camera, frame1.camera))[None].float()
    unseen = [None, None] if tolerance is None else depths
    forth = depth_correspondence(depths[0], K[0], unseen[1], K[1], pose, limits[1], tolerance or 0.0)
    back = depth_correspondence(depths[1], K[1], unseen[0], K[0], torch.linalg.inv(pose), limits[0], tolerance or 0.0)
    return [forth, back]


@pytest.mark.parametrize("tolerance", [0.05, None])
def test_depth_gives_the_labels_of_its_warp(rooms, tolerance):
    """More pairs than are warped at a time; landscape, portrait and wide ones among them."""
    ends, pairs = room_pairs(rooms)
    assert len(pairs) > TOGETHER and len({tuple(f.image.shape) for f in rooms[2]}) > 1
    found = DepthSupervision(rooms[1], SIZE, tolerance, 2).labels(pairs)
    for labels, (frame0, frame1) in zip(found, ends, strict=True):
        equal(labels, patch_labels(*directly(rooms, frame0, frame1, tolerance), SIZE, 2))
    matches = [int(labels.positive.sum()) for labels in found]
    assert np.median(matches) > 8 and max(matches) > 20


def reflected(found: Correspondence, source_width: int, target_width: int) -> Correspondence:
    """The same correspondence between the mirror images."""
    columns, rows = found.pixels % SIZE, found.pixels // SIZE
    inside = columns < source_width
    pixels = torch.where(inside, rows * SIZE + source_width - 1 - columns, found.pixels)
    points = torch.stack([target_width - found.points[..., 0], found.points[..., 1]], 2)
    valid = found.valid & (points[..., 0] >= 0) & (points[..., 0] <= target_width - 1)
    return Correspondence(pixels, points, found.known, valid)


def test_mirrored_images_have_the_labels_of_their_mirror_images(rooms):
    """But for pixels on borders between patches, and those that leave by the other side."""
    ends, pairs = room_pairs(rooms, flip=True)
    shared, either = 0, 0
    for labels, (frame0, frame1) in zip(DepthSupervision(rooms[1], SIZE, 0.05, 2).labels(pairs), ends, strict=True):
        forth, back = directly(rooms, frame0, frame1, 0.05)
        widths = frame0.camera.width // 3, frame1.camera.width // 3
        expected = patch_labels(reflected(forth, *widths), reflected(back, *widths[::-1]), SIZE, 2)
        assert torch.equal(labels.known0, expected.known0) and torch.equal(labels.known1, expected.known1)
        shared += int((labels.positive & expected.positive).sum())
        either += int((labels.positive | expected.positive).sum())
    assert either > 100 and shared > 0.93 * either


def plane(folder, shift: float = 20, **second) -> tuple[str, list[str]]:
    """Two images of a wall two metres away, the camera of the second moved so that it slides by `shift` pixels.

    Returns the table of cameras and the depth maps. `second`: what the table says otherwise of the second camera.
    """
    depths, known = [], []
    K = np.array([[64.0, 0, SIZE / 2], [0, 64, SIZE / 2], [0, 0, 1]])
    for number, name in enumerate(NAMES):
        depths.append(str(folder / f"{number}.depth.png"))
        (folder / f"{number}.depth.png").write_bytes(encode_depth(np.full((SIZE, SIZE), 2.0)))
        pose = np.eye(4)
        pose[0, 3] = number * 2 * shift / 64
        fields = {"K": K, "cam_from_world": pose, "world": "w", "width": SIZE, "height": SIZE}
        known.append(KnownCamera(name, **fields | (second if number else {})))
    Cameras.of(known).write(str(folder / "cameras.parquet"))
    return str(folder / "cameras.parquet"), depths


@pytest.mark.parametrize("shift", [20, -33, 0])
def test_a_mirrored_pair_has_mirrored_labels(tmp_path, shift):
    cameras, depths = plane(tmp_path, shift)
    labels, flipped = DepthSupervision(cameras, SIZE, 0.1, 2).labels(
        [pair(depths=depths, flip=flip) for flip in (False, True)]
    )
    assert {patch1 - patch0 for patch0, patch1 in places(labels.positive)} == {round(shift / 14)}
    for name in ("positive", "visible0", "visible1", "known0", "known1"):
        assert torch.equal(getattr(flipped, name), mirrored(getattr(labels, name))), name
    assert (shift == 0) == torch.equal(flipped.positive, labels.positive)


def test_images_of_unrelated_worlds_match_nothing_but_are_known(tmp_path):
    cameras, depths = plane(tmp_path, world="elsewhere")
    itself = pair((NAMES[0],) * 2, depths=(depths[0],) * 2)
    apart, same = DepthSupervision(cameras, SIZE, 0.1, 2).labels([pair(depths=depths), itself])
    assert not any(getattr(apart, name).any() for name in ("positive", "counts", "shared", "visible0", "visible1"))
    assert apart.known0.all() and apart.known1.all()
    assert places(same.positive) == {(patch, patch) for patch in range(PATCHES)}


def test_depth_as_hdf5_is_depth(tmp_path):
    cameras, depths = plane(tmp_path)
    as_h5 = str(tmp_path / "1.h5")
    with h5py.File(as_h5, "w") as file:
        file["depth"] = read_depth(depths[1])
    source = DepthSupervision(cameras, SIZE, 0.1, 2)
    equal(*source.labels([pair(depths=depths), pair(depths=(depths[0], as_h5))]))


def depth_file(path, values) -> str:
    """A depth map as HDF5, which unlike PNG can hold anything; a path without it for None."""
    with h5py.File(path, "w") as file:
        if values is not None:
            file["depth"] = values
    return str(path)


WHOLE = np.full((SIZE, SIZE), 2.0, np.float32)
BAD_DEPTHS = {
    "another size": (lambda path: depth_file(path, WHOLE[:-1]), "depth map of another size than its image"),
    "turned": (lambda path: depth_file(path, WHOLE[:, :-1].T), "depth map of another size than its image"),
    "NaN": (lambda path: depth_file(path, np.where(np.eye(SIZE), np.nan, WHOLE)), "depth map with NaN or infinite"),
    "infinite": (
        lambda path: depth_file(path, np.where(np.eye(SIZE), np.inf, WHOLE)),
        "depth map with NaN or infinite",
    ),
    "not there": (lambda path: str(path), "depth map missing"),
    "not given": (lambda path: None, "depth map missing"),
    "without depth": (lambda path: depth_file(path, None), "depth map cannot be read"),
    "three axes": (lambda path: depth_file(path, WHOLE[None]), "depth map cannot be read"),
    "garbage": (lambda path: path.write_bytes(b"no depth") and str(path), "depth map cannot be read"),
    "empty": (lambda path: path.write_bytes(b"") or str(path), "depth map cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_DEPTHS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_depth_map_costs_its_pairs_only(tmp_path, kind, side):
    cameras, depths = plane(tmp_path)
    make, reason = BAD_DEPTHS[kind]
    bad = list(depths)
    bad[side] = make(tmp_path / "bad.h5")
    source = DepthSupervision(cameras, SIZE, 0.1, 2)
    first, error, last = source.labels([pair(depths=depths), pair(depths=bad), pair(depths=depths)])
    assert isinstance(error, LabelError) and str(error).startswith(reason)
    equal(first, last)
    assert first.positive.any()
    assert [str(each) for each in source.labels([pair(depths=bad)])] == [
        str(error)
    ]  # none at all is no case of its own


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: b"\x89PNG\r\n\x1a\nno depth", lambda data: data[:-30],
    lambda data: encode_8_bit(),
])  # fmt: skip
def test_a_damaged_png_cannot_be_read(tmp_path, damage):
    cameras, depths = plane(tmp_path)
    path = tmp_path / "bad.depth.png"
    path.write_bytes(damage((tmp_path / "0.depth.png").read_bytes()))
    (error,) = DepthSupervision(cameras, SIZE, 0.1, 2).labels([pair(depths=(depths[0], str(path)))])
    assert isinstance(error, LabelError) and str(error) == "depth map cannot be read"


def encode_8_bit() -> bytes:
    return cv2.imencode(".png", np.full((SIZE, SIZE), 200, np.uint8))[1].tobytes()


@pytest.mark.parametrize(("second", "reason"), [
    ({"K": None}, "camera missing"),
    ({"cam_from_world": None}, "camera missing"),
    ({"cam_from_world": np.diag([1.0, 1, 0, 1])}, "pose is not a rotation or K not a calibration"),
    ({"cam_from_world": np.full((4, 4), np.nan)}, "pose is not a rotation or K not a calibration"),
    ({"K": np.diag([64.0, 0, 1])}, "pose is not a rotation or K not a calibration"),
    ({"width": SIZE // 2}, "camera does not fit the image"),
    ({"model": "SIMPLE_RADIAL", "params": (64.0, 56.0, 56.0, 0.1)}, "image is distorted: undistort it first"),
])  # fmt: skip
def test_a_bad_camera_costs_its_pairs_only(tmp_path, second, reason):
    cameras, depths = plane(tmp_path, **second)
    itself = pair((NAMES[0],) * 2, depths=(depths[0],) * 2)
    found = DepthSupervision(cameras, SIZE, 0.1, 2).labels(
        [pair(depths=depths), itself, pair(NAMES[::-1], depths=depths[::-1])]
    )
    assert [str(found[number]) for number in (0, 2)] == [reason] * 2
    assert places(found[1].positive) == {(patch, patch) for patch in range(PATCHES)}


def test_an_image_without_a_camera_has_no_labels(tmp_path):
    cameras, depths = plane(tmp_path)
    (error,) = DepthSupervision(cameras, SIZE, 0.1, 2).labels([pair((NAMES[0], "b.jpg"), depths=depths)])
    assert isinstance(error, LabelError) and str(error) == "camera missing"


def test_a_camera_of_the_image_before_it_was_reduced_is_scaled(tmp_path):
    """A camera for images twice as large says the same."""
    plain, double = tmp_path / "plain", tmp_path / "double"
    plain.mkdir(), double.mkdir()
    cameras, depths = plane(plain)
    K = np.array([[128.0, 0, SIZE], [0, 128, SIZE], [0, 0, 1]])
    larger, _ = plane(double, K=K, width=2 * SIZE, height=2 * SIZE)
    found = [DepthSupervision(path, SIZE, 0.1, 2).labels([pair(depths=depths)])[0] for path in (cameras, larger)]
    assert found[0].positive.any()
    equal(*found)


# Points of a model: two images of 112 x 56 pixels, in letterboxes of 56: 4 x 2 patches of the 4 x 4 are image


def points_source(folder, seen: dict[str, list[tuple[int, float, float]]]) -> PointSupervision:
    rows = [{"name": name, "id": [p[0] for p in points], "x": [p[1] for p in points], "y": [p[2] for p in points]}
            for name, points in seen.items()]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=POINTS), folder / "points.parquet")
    return PointSupervision(str(folder / "points.parquet"), 56)


def point_pair(names=NAMES, **more) -> dict:
    return pair(names, ((112, 56),) * 2, 56, **more)


SEEN = {  # stored pixels are twice those of the letterbox, a patch is 28 of them
    NAMES[0]: [(1, 3.0, 3.0), (2, 30.0, 3.0), (3, 31.0, 5.0), (4, 33.0, 9.0), (5, 100.0, 50.0), (6, 60.0, 10.0)],
    NAMES[1]: [(4, 5.0, 40.0), (3, 90.0, 8.0), (2, 88.0, 9.0), (1, 70.0, 30.0), (7, 60.0, 10.0), (5, 111.9, 55.9)],
    "lonely.jpg": [(9, 3.0, 3.0)],
    "blind.jpg": [],
}


def test_shared_points_are_matches(tmp_path):
    (labels,) = points_source(tmp_path, SEEN).labels([point_pair()])
    assert places(labels.positive) == {(0, 6), (1, 3), (7, 7)}  # one point is enough, two outweigh one
    counted = {place: int(labels.counts[(0, *place)]) for place in places(labels.counts)}
    assert counted == {(0, 6): 1, (1, 3): 2, (1, 4): 1, (7, 7): 1}
    assert places(labels.shared) == {*counted}
    assert places(labels.known0) == places(labels.visible0) == {(0,), (1,), (7,)}
    assert places(labels.known1) == places(labels.visible1) == {(3,), (4,), (6,), (7,)}


def test_points_of_mirrored_images_are_mirrored(tmp_path):
    source = points_source(tmp_path, SEEN)
    labels, flipped = source.labels([point_pair(), point_pair(flip=True)])
    for field in fields(PatchLabels):
        assert torch.equal(getattr(flipped, field.name), mirrored(getattr(labels, field.name))), field.name


def test_points_the_other_way_round(tmp_path):
    labels, back = points_source(tmp_path, SEEN).labels([point_pair(), point_pair(NAMES[::-1])])
    assert torch.equal(back.positive, labels.positive.mT) and torch.equal(back.counts, labels.counts.mT)


def test_images_that_share_no_point_have_labels_without_matches(tmp_path):
    source = points_source(tmp_path, SEEN)
    for labels in source.labels([point_pair((NAMES[0], "lonely.jpg")), point_pair(("blind.jpg", "lonely.jpg"))]):
        assert not labels.positive.any() and not labels.shared.any() and not labels.known0.any()


def test_points_outside_the_image_do_not_count(tmp_path):
    outside = {NAMES[0]: [(1, 3.0, 3.0), (2, -0.5, 9.0), (3, 30.0, 30.0)],
               NAMES[1]: [(1, 112.0, 3.0), (2, 9.0, 9.0), (3, 30.0, 56.5)]}  # fmt: skip
    (labels,) = points_source(tmp_path, outside).labels([point_pair()])
    assert not labels.shared.any()


def test_an_image_that_the_model_lacks_has_no_labels(tmp_path):
    found = points_source(tmp_path, SEEN).labels([point_pair((NAMES[0], "absent.jpg")), point_pair()])
    assert isinstance(found[0], LabelError) and str(found[0]) == "image not in the model"
    assert found[1].positive.any()


# Prepared labels


@pytest.fixture
def prepared(tmp_path):
    """A file of labels of a/0.jpg with a/1.jpg, b.jpg (without counts) and c.jpg (bad); and what it holds."""
    rng = np.random.default_rng(0)
    matrix = np.zeros((PATCHES, PATCHES), np.int8)
    matrix[rng.permutation(PATCHES)[:20], rng.permutation(PATCHES)[:20]] = 1
    counts = (matrix * 9 + (rng.random(matrix.shape) < 0.02) * 3).astype(np.int16)
    with h5py.File(tmp_path / "labels.h5", "w") as file:
        file["a-0.jpg/a-1.jpg/gt_labels"], file["a-0.jpg/a-1.jpg/label_confs"] = matrix, counts
        file["a-0.jpg/b.jpg/gt_labels"] = matrix
        file["a-0.jpg/small.jpg/gt_labels"] = matrix[:9, :9]
        file["a-0.jpg/uneven.jpg/gt_labels"], file["a-0.jpg/uneven.jpg/label_confs"] = matrix, counts[:9, :9]
        file["a-0.jpg/empty.jpg/neg_labels"] = matrix
        file["a-0.jpg/flat.jpg"] = matrix
    return PreparedSupervision(str(tmp_path / "labels.h5"), SIZE), torch.from_numpy(matrix), torch.from_numpy(counts)


def test_prepared_labels_are_taken_as_they_are(prepared):
    source, matrix, counts = prepared
    labels, plain = source.labels([pair(), pair((NAMES[0], "b.jpg"))])
    assert torch.equal(labels.positive[0], matrix == 1) and torch.equal(labels.counts[0], counts.int())
    assert torch.equal(labels.shared[0], counts > 0)
    assert torch.equal(labels.visible0[0], (counts > 0).any(1)) and torch.equal(labels.known0, labels.visible0)
    assert torch.equal(labels.visible1[0], (counts > 0).any(0)) and torch.equal(labels.known1, labels.visible1)
    assert torch.equal(plain.positive[0], matrix == 1) and torch.equal(plain.shared[0], matrix == 1)


def test_prepared_labels_of_the_reversed_pair_are_transposed(prepared):
    source, matrix, counts = prepared
    (labels,) = source.labels([pair(NAMES[::-1])])
    assert torch.equal(labels.positive[0], matrix.T == 1) and torch.equal(labels.counts[0], counts.T.int())
    assert torch.equal(labels.visible0[0], (counts > 0).any(0))


def test_prepared_labels_of_mirrored_images_are_mirrored(prepared):
    source, _, _ = prepared
    for names in (NAMES, NAMES[::-1]):
        labels, flipped = source.labels([pair(names), pair(names, flip=True)])
        for field in fields(PatchLabels):
            assert torch.equal(getattr(flipped, field.name), mirrored(getattr(labels, field.name))), field.name
        assert not torch.equal(flipped.positive, labels.positive)


def test_prepared_labels_that_cannot_be_used(prepared):
    source, _, _ = prepared
    reasons = {
        "absent.jpg": "pair not in the file of labels",
        "small.jpg": "labels of shape (9, 9), not (64, 64)",
        "uneven.jpg": "labels of shape (9, 9), not (64, 64)",
        "empty.jpg": "labels cannot be read",
        "flat.jpg": "labels cannot be read",
    }
    found = source.labels([pair((NAMES[0], name)) for name in reasons] + [pair()])
    assert {name: str(error) for name, error in zip(reasons, found, strict=False)} == reasons
    assert all(isinstance(error, LabelError) for error in found[:-1]) and found[-1].positive.any()
    portrait = [pair(sizes=((SIZE, SIZE), (50, SIZE)), flip=flip) for flip in (True, False)]
    found = source.labels(portrait)
    assert str(found[0]) == "a mirrored image that does not fill the letterbox"
    assert found[1].positive.any()


def test_a_file_of_labels_that_is_none_is_refused(tmp_path):
    (tmp_path / "labels.h5").write_bytes(b"no labels")
    with pytest.raises(OSError):
        PreparedSupervision(str(tmp_path / "labels.h5"), SIZE).labels([pair()])


# Views


def test_a_view_matches_itself():
    source = HomographySupervision(SIZE, 2)
    wide = ((160, 80), (160, 80))  # the upper half of the letterbox
    for view in ("a.jpg", "a.jpg?warp=1"):
        whole, half = source.labels([pair((view, view)), pair((view, view), wide)])
        assert places(whole.positive) == {(patch, patch) for patch in range(PATCHES)}
        assert places(half.positive) == {(patch, patch) for patch in range(PATCHES // 2)}
        assert places(half.known0) == places(half.visible1) == {(patch,) for patch in range(PATCHES // 2)}


def test_a_view_and_its_mirror_image():
    (labels,) = HomographySupervision(SIZE, 2).labels([pair(("a.jpg", "a.jpg?flip"))])
    assert places(labels.positive) == {(patch, patch // 8 * 8 + 7 - patch % 8) for patch in range(PATCHES)}


@pytest.mark.parametrize(
    "ends", [("a.jpg", "a.jpg?warp=0"), ("a.jpg?warp=2", "a.jpg"), ("a.jpg?warp=3", "a.jpg?warp=4")]
)
def test_matches_of_warped_views_lie_on_each_other(ends):
    sizes = ((320, 240), (320, 240))
    source = HomographySupervision(SIZE, 2)
    labels, back = source.labels([pair(ends, sizes), pair(ends[::-1], sizes)])
    assert len(places(labels.positive)) > 8
    for patch0, patch1 in places(labels.positive):
        center = np.array([[patch0 % 8, patch0 // 8]]) * 14.0 + 7
        there = warped(center / [112, 84], *ends)[0] * [112, 84]
        assert np.abs(there - (np.array([patch1 % 8, patch1 // 8]) * 14 + 7)).max() < 18
    assert not labels.known0[0, 48:].any()  # padding
    # of the pixels that one view shows of the other the counts tell which share
    share = int(labels.counts.sum()) / (112 * 84)
    along = (np.arange(200) + 0.5) / 200
    inside = warped(np.stack(np.meshgrid(along, along), -1).reshape(-1, 2), *ends)
    assert share == pytest.approx(((inside >= 0) & (inside <= 1)).all(1).mean(), abs=0.03)
    assert torch.equal(labels.visible0, back.visible1) and torch.equal(labels.shared, back.shared.mT)


def test_views_of_two_images_share_nothing():
    found = HomographySupervision(SIZE, 2).labels([pair(("a.jpg", "b.jpg")), pair(("a.jpg?warp=1", "b.jpg?warp=1"))])
    for labels in found:
        assert not labels.shared.any() and not labels.visible0.any()
        assert labels.known0.all() and labels.known1.all()


# The choice of a source


def test_the_config_names_the_source(tmp_path):
    points_source(tmp_path, SEEN)
    cameras, _ = plane(tmp_path)
    prepared = str(tmp_path / "labels.h5")
    for kind, expected, told in (
        ("depth", DepthSupervision, {"occlusion": 0.2, "min_pixels": 5}),
        ("points", PointSupervision, {}),
        ("labels", PreparedSupervision, {"labels": prepared}),
        ("homography", HomographySupervision, {"min_pixels": 5}),
    ):
        config = load(train={"supervision": kind} | told, embedding={"image_size": SIZE})
        source = open_supervision(config, {"cameras": cameras, "points": str(tmp_path / "points.parquet")})
        assert type(source) is expected and source.size == SIZE
        assert getattr(source, "min_pixels", 5) == 5
        assert getattr(source, "occlusion", 0.2) == 0.2 and getattr(source, "path", prepared) == prepared
