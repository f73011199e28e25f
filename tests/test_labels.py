"""Labels of patches against the original's, and against slow loops over single pixels that share no code with vop."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from vop.training.labels import Correspondence, PatchLabels, depth_correspondence, patch_labels

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "golden_labels.npz"
CASES = ("", "zoom_", "letterbox_", "disjoint_", "sparse_", "offcentre_")
SIZE, PATCHES = 56, 16  # 4 x 4 patches
FOCAL, MIDDLE = 64.0, 28.0  # a power of two: shifts by half pixels are exact


def votes(found: Correspondence, row: int, size: int, swapped: bool) -> dict[tuple[int, int], int]:
    """Pixels of each pair of patches (of image 0, of image 1), in the order in which the pairs are met."""
    columns, counted = size // 14, {}
    for pixel, (x, y), valid in zip(found.pixels[row].tolist(), found.points[row].tolist(), found.valid[row].tolist(),
                                    strict=True):  # fmt: skip
        if valid:
            source = pixel // size // 14 * columns + pixel % size // 14
            target = int(y // 14) * columns + int(x // 14)
            ends = (target, source) if swapped else (source, target)
            counted[ends] = counted.get(ends, 0) + 1
    return counted


def choices(counted: dict[tuple[int, int], int], min_pixels: int) -> set[tuple[int, int]]:
    """What one direction chooses: every patch of image 0 its best, then every patch of image 1 the best of those."""
    best: dict[int, tuple[int, int]] = {}
    for (patch0, patch1), count in counted.items():
        if count >= min_pixels and count > best.get(patch0, (0, 0))[1]:
            best[patch0] = patch1, count
    kept: dict[int, tuple[int, int]] = {}
    for patch0, (patch1, count) in sorted(best.items()):
        if count > kept.get(patch1, (0, 0))[1]:
            kept[patch1] = patch0, count
    return {(patch0, patch1) for patch1, (patch0, _) in kept.items()}


def true_at(matrix: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(place) for place in matrix.nonzero().tolist()}


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"golden files are absent: {GOLDEN}")
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def correspondences(golden: dict, case: str) -> tuple[Correspondence, Correspondence]:
    """Both directions of a golden case, as the original finds them: without occlusion, limits from principal points."""
    depth0, depth1, K0, K1, pose = (
        torch.from_numpy(golden[case + name])[None] for name in ("depth0", "depth1", "K0", "K1", "T_0to1")
    )
    limits0, limits1 = (2 * K[:, :2, 2] - 1 for K in (K0, K1))
    forth = depth_correspondence(depth0, K0, None, K1, pose, limits1)
    return forth, depth_correspondence(depth1, K1, None, K0, torch.linalg.inv(pose), limits0)


@pytest.mark.parametrize("case", CASES)
def test_golden_labels_are_equal(golden, case):
    forth, back = correspondences(golden, case)
    for side, found in enumerate((forth, back)):
        np.testing.assert_array_equal(found.valid[0].view(224, 224), golden[f"{case}valid{side}"])
    for min_pixels, name in ((2, "gt_labels"), (1, "gt_labels_N0")):
        labels = patch_labels(forth, back, 224, min_pixels)
        np.testing.assert_array_equal(labels.positive[0].numpy(), golden[case + name] == 1)
        np.testing.assert_array_equal(labels.visible0[0].numpy(), golden[f"{case}gt_visible0"] == 1)
        np.testing.assert_array_equal(labels.visible1[0].numpy(), golden[f"{case}gt_visible1"] == 1)


@pytest.mark.parametrize("case", CASES)
def test_golden_confidences_are_the_counts(golden, case):
    """The original's are our counts, but 0 for one pixel, and for a choice of image 0 that image 1 does not share."""
    forth, back = correspondences(golden, case)
    labels = patch_labels(forth, back, 224)
    counts = labels.counts[0].numpy() * (labels.counts[0].numpy() >= 2)
    for patch0, patch1 in choices(votes(forth, 0, 224, False), 2):
        if labels.visible1[0, patch1] and not labels.positive[0, patch0, patch1]:
            counts[patch0, patch1] = 0
    np.testing.assert_array_equal(counts, golden[f"{case}label_confs"])


def scattered(rng: np.random.Generator, pairs: int, pixels: int, targets: int) -> Correspondence:
    """Random counterparts that fall into few patches, so that most decisions are between equals."""
    chosen = np.stack([np.sort(rng.choice(SIZE * SIZE, pixels, replace=False)) for _ in range(pairs)])
    into = rng.integers(targets, size=(pairs, pixels))
    corners = np.stack([into % 4, into // 4], -1) * 14
    points = (corners + rng.choice([0, 0.25, 7, 13.75], (pairs, pixels, 2))).astype(np.float32)
    known = rng.random((pairs, pixels)) < 0.9
    valid = known & (rng.random((pairs, pixels)) < 0.8)
    return Correspondence(*map(torch.from_numpy, (chosen, points, known, valid)))


@pytest.mark.parametrize("min_pixels", [1, 2, 3])
@pytest.mark.parametrize(("pixels", "targets"), [(60, 16), (60, 4), (160, 16), (400, 7)])
def test_labels_are_those_of_plain_loops(pixels, targets, min_pixels):
    rng = np.random.default_rng([pixels, targets])
    pairs, found = 12, 0
    forth, back = scattered(rng, pairs, pixels, targets), scattered(rng, pairs, pixels, targets)
    # image 1 mostly sees the reverse of what image 0 sees: else the directions hardly ever agree
    for row in range(0, pairs, 2):
        cells = torch.div(forth.points[row].flip(1), 1, rounding_mode="floor").long() @ torch.tensor([SIZE, 1])
        back.pixels[row], back.valid[row] = cells, forth.valid[row]
        back.points[row] = torch.stack([forth.pixels[row] % SIZE, forth.pixels[row] // SIZE], 1).float()
        order = back.pixels[row].argsort(stable=True)
        for values in (back.pixels, back.points, back.valid):
            values[row] = values[row][order]
    labels = patch_labels(forth, back, SIZE, min_pixels)
    for row in range(pairs):
        ahead, behind = votes(forth, row, SIZE, False), votes(back, row, SIZE, True)
        expected = choices(ahead, min_pixels) & choices(behind, min_pixels)
        assert true_at(labels.positive[row]) == expected
        assert {ends: int(labels.counts[row][ends]) for ends in true_at(labels.counts[row])} == ahead
        assert true_at(labels.shared[row]) == {*ahead, *behind}
        assert true_at(labels.visible0[row]) == {(patch0,) for patch0, _ in ahead}
        assert true_at(labels.visible1[row]) == {(patch1,) for _, patch1 in behind}
        for side, each in (("known0", forth), ("known1", back)):
            places = each.pixels[row][each.known[row]].tolist()
            assert true_at(getattr(labels, side)[row]) == {(at // SIZE // 14 * 4 + at % SIZE // 14,) for at in places}
        found += len(expected)
    assert found > pairs / 2 or min_pixels == 3


def intrinsics(pairs: int = 1) -> torch.Tensor:
    return torch.tensor([[FOCAL, 0, MIDDLE], [0, FOCAL, MIDDLE], [0, 0, 1]]).repeat(pairs, 1, 1)


def shifted(x: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """A camera moved so that what is a metre away moves by x pixels in the image."""
    pose = torch.eye(4)[None]
    pose[0, 0, 3], pose[0, 2, 3] = x / FOCAL, z
    return pose


def warp(depth0, pose, depth1=None, tolerance=0.0, limit=SIZE - 1) -> Correspondence:
    limits = torch.full((len(pose), 2), float(limit))
    return depth_correspondence(depth0, intrinsics(len(pose)), depth1, intrinsics(len(pose)), pose, limits, tolerance)


def wall(z: float = 1.0) -> torch.Tensor:
    return torch.full((1, SIZE, SIZE), z)


def equal(labels: PatchLabels, other: PatchLabels) -> None:
    for field in fields(PatchLabels):
        assert torch.equal(getattr(labels, field.name), getattr(other, field.name)), field.name


def test_a_batch_is_its_pairs_one_by_one():
    torch.manual_seed(0)
    depths = [torch.rand(6, SIZE, SIZE) + 1 for _ in range(2)]
    depths[0][2], depths[1][3, :20] = 0, 0  # nothing known, and less of it
    poses = torch.cat([shifted(x, z) for x, z in ((0, 0), (5, 0), (0, 0), (-9, 0.1), (200, 0), (3, -3))])
    forth = warp(depths[0], poses, depths[1], 0.5)
    back = warp(depths[1], torch.linalg.inv(poses), depths[0], 0.5)
    together = patch_labels(forth, back, SIZE)
    assert together.positive.flatten(1).sum(1)[[0, 1, 3]].min() > 4
    assert not together.positive[[2, 4, 5]].any()
    for row in range(6):
        pose = poses[row : row + 1]
        alone = warp(depths[0][row : row + 1], pose, depths[1][row : row + 1], 0.5)
        reverse = warp(depths[1][row : row + 1], torch.linalg.inv(pose), depths[0][row : row + 1], 0.5)
        equal(together.of(row), patch_labels(alone, reverse, SIZE))


def test_an_image_matches_itself_patch_by_patch():
    found = warp(1 + torch.rand(1, SIZE, SIZE), shifted())
    labels = patch_labels(found, found, SIZE)
    np.testing.assert_array_equal(labels.positive[0], np.eye(PATCHES, dtype=bool))
    assert labels.counts[0, 0, 0] == 14 * 14 and labels.counts[0, 15, 15] == 13 * 13  # beyond S - 1 nothing counts
    assert labels.known0.all() and labels.visible0.all() and labels.visible1.all()


def test_a_shift_by_patches_shifts_the_labels():
    forth, back = warp(wall(), shifted(28)), warp(wall(), shifted(-28))
    expected = {(row * 4 + column, row * 4 + column + 2) for row in range(4) for column in range(2)}
    labels = patch_labels(forth, back, SIZE)
    assert true_at(labels.positive[0]) == expected
    assert true_at(labels.visible0[0]) == {(patch0,) for patch0, _ in expected}
    assert true_at(labels.visible1[0]) == {(patch1,) for _, patch1 in expected}
    assert labels.known0.all()  # it is known of the others that they match nothing


def test_what_stands_behind_something_else_has_no_counterpart():
    """Image 1 sees a near plane in its left half, image 0, through it, the wall behind."""
    near = wall(4)
    near[:, :, :28] = 1
    inside = torch.ones(SIZE, SIZE, dtype=torch.bool)
    inside[-1], inside[:, -1] = False, False
    assert torch.equal(warp(wall(4), shifted()).valid.view(SIZE, SIZE), inside)
    seen = warp(wall(4), shifted(), near, 0.1)
    assert seen.known.all()
    hidden = inside.clone()
    hidden[:, :28] = False
    assert torch.equal(seen.valid.view(SIZE, SIZE), hidden)
    # the plane itself is not the wall either
    back = warp(near, shifted(), wall(4), 0.1)
    assert torch.equal(back.valid.view(SIZE, SIZE), hidden)
    labels = patch_labels(seen, back, SIZE)
    assert true_at(labels.positive[0]) == {(patch, patch) for patch in range(PATCHES) if patch % 4 >= 2}


@pytest.mark.parametrize(("there", "tolerance", "seen"), [
    (4.2, 0.1, True), (4.2, 0.04, False), (3.8, 0.1, True), (3.8, 0.04, False), (4.0, 0.0, True),
    (0.0, 0.5, False), (float("nan"), 0.5, False), (float("inf"), 0.5, False),
])  # fmt: skip
def test_the_depth_found_there_must_agree(there, tolerance, seen):
    assert warp(wall(4), shifted(), wall(there), tolerance).valid.any() == seen


def columns_seen(found: Correspondence) -> list[int]:
    return sorted(true_at(found.valid[0].view(SIZE, SIZE).any(0)))


def test_a_pixel_on_the_limit_is_inside():
    last = float(np.nextafter(np.float32(55), np.float32(0)))
    assert columns_seen(warp(wall(), shifted(0.5))) == [(column,) for column in range(55)]  # column 54 falls onto 55.0
    assert columns_seen(warp(wall(), shifted(0.5), limit=last)) == [(column,) for column in range(54)]
    assert columns_seen(warp(wall(), shifted(-1.5)))[0] == (1,)  # onto 0.0
    assert columns_seen(warp(wall(), shifted(-1.75)))[0] == (2,)  # column 1 falls onto -0.25
    assert not warp(wall(), shifted(56)).valid.any()


def test_double_precision_is_brought_to_the_originals():
    torch.manual_seed(1)
    depth, K, pose = 1 + torch.rand(1, SIZE, SIZE), intrinsics(), shifted(3.3, 0.2)
    limits = torch.full((1, 2), SIZE - 1.0)
    single = depth_correspondence(depth, K, depth, K, pose, limits, 0.2)
    double = depth_correspondence(
        depth.double(), K.double(), depth.double(), K.double(), pose.double(), limits.double(), 0.2
    )
    assert torch.equal(single.points, double.points) and torch.equal(single.valid, double.valid)
    assert single.valid.any() and double.points.dtype == torch.float32


@pytest.mark.parametrize("nothing", [0.0, -1.0, float("nan"), float("inf")])
def test_without_depth_nothing_is_known(nothing):
    found = warp(wall(nothing), shifted())
    assert not found.known.any() and not found.valid.any()
    labels = patch_labels(found, warp(wall(), shifted()), SIZE)
    assert not labels.positive.any() and not labels.visible0.any() and not labels.known0.any()
    assert labels.visible1.all() and labels.known1.all()
    unknown = patch_labels(found, found, SIZE, min_pixels=1)
    assert not any(getattr(unknown, field.name).any() for field in fields(PatchLabels))


def test_what_lies_behind_the_other_camera_has_no_counterpart():
    found = warp(wall(1), shifted(z=-2))
    assert found.known.all() and not found.valid.any()
    assert not warp(wall(1), shifted(z=-1)).valid.any()  # in its very centre


def test_few_pixels_do_not_match():
    depth = torch.zeros(1, SIZE, SIZE)
    depth[0, 0, 0], depth[0, 20, 20:22] = 1, 1
    found = warp(depth, shifted())
    assert true_at(patch_labels(found, found, SIZE, 1).positive[0]) == {(0, 0), (5, 5)}
    assert true_at(patch_labels(found, found, SIZE, 2).positive[0]) == {(5, 5)}
    once = patch_labels(found, found, SIZE, 3)
    assert not once.positive.any()
    assert true_at(once.shared[0]) == {(0, 0), (5, 5)}  # hence no clear negatives either
