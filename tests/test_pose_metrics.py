"""Errors of relative poses and the area under their curve, against cases worked out by hand and other formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vop.metrics import MIN_BASELINE, pose_auc, pose_error, rotation_error, translation_error


@pytest.mark.parametrize("degrees", [0, 1e-10, 1e-7, 1e-3, 1, 45, 90, 135, 179, 180 - 1e-7, 180])
def test_a_known_rotation_is_measured(degrees):
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(50, 3))
    turn = Rotation.from_rotvec(np.radians(degrees) * axes / np.linalg.norm(axes, axis=1, keepdims=True))
    base = Rotation.random(50, random_state=0)
    measured = rotation_error((turn * base).as_matrix(), base.as_matrix())
    np.testing.assert_allclose(measured, degrees, atol=1e-12)
    np.testing.assert_allclose(rotation_error(base.as_matrix(), (turn * base).as_matrix()), degrees, atol=1e-12)


def test_rotations_in_any_number_of_axes():
    rotations = Rotation.random(6, random_state=1).as_matrix().reshape(2, 3, 3, 3)
    assert rotation_error(rotations, rotations[0, 0]).shape == (2, 3)
    assert rotation_error(rotations[0, 0], rotations[0, 0]).shape == ()
    each = [[rotation_error(rotations[i, j], rotations[0, 0]) for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(rotation_error(rotations, rotations[0, 0]), each)


@pytest.mark.parametrize(
    ("degrees", "folded"), [(0, 0), (1e-9, 1e-9), (30, 30), (90, 90), (91, 89), (150, 30), (180 - 1e-9, 1e-9), (180, 0)]
)
def test_a_translation_counts_up_to_its_sign(degrees, folded):
    angle = np.radians(degrees)
    t = 7 * np.array([np.cos(angle), np.sin(angle), 0])
    assert translation_error(t, [0.01, 0, 0]) == pytest.approx(folded, abs=1e-12)
    assert translation_error([2, 0, 0], t) == pytest.approx(folded, abs=1e-12)


def test_no_baseline_no_direction():
    assert np.isnan(translation_error([1, 0, 0], [0, 0, 0]))
    assert np.isnan(translation_error([1, 0, 0], [0.9 * MIN_BASELINE, 0, 0]))
    assert translation_error([1, 0, 0], [MIN_BASELINE, 0, 0]) == 0
    assert np.isnan(translation_error([0, 0, 0], [1, 0, 0]))
    np.testing.assert_array_equal(
        translation_error([[1, 0, 0], [0, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 0, 0], [0, 0, 0]]), [0, 90, np.nan]
    )


def test_the_pose_error_is_the_larger_one():
    pose = np.tile(np.eye(4), (3, 1, 1))
    pose[:, :3, 3] = [1, 0, 0]
    true = pose.copy()
    true[0, :3, :3] = Rotation.from_rotvec([0, np.radians(3), 0]).as_matrix()
    true[1, :3, 3] = [np.cos(np.radians(8)), np.sin(np.radians(8)), 0]
    true[2, :3, 3] = 0
    np.testing.assert_allclose(pose_error(pose, true), [3, 8, np.nan], atol=1e-12)


INF = float("inf")


@pytest.mark.parametrize(
    ("errors", "threshold", "area"),
    [
        # (0, 0) (1, 1/4) (3, 2/4) then level to 5: 1/8 + 3/4 + 1 = 15/8
        ([1, 3, 7, INF], 5, 15 / 8 / 5),
        # ... (7, 3/4) then level to 10: 1/8 + 3/4 + 4 * 5/8 + 3 * 3/4 = 45/8
        ([7, INF, 1, 3], 10, 45 / 8 / 10),
        ([1, 3, 7, INF], 20, (1 / 8 + 3 / 4 + 5 / 2 + 13 * 3 / 4) / 20),
        ([0, 0], 5, 1),  # straight up at 0, then level at 1
        ([INF, INF], 5, 0),
        ([5.1, 90], 5, 0),
        ([2, 2], 5, (0.5 + 3) / 5),  # (2, 1/2) and (2, 1): the second segment is upright and has no area
        ([5], 5, 0),  # at the threshold: not below it
        ([2, 5], 5, (0.5 + 1.5) / 5),  # (0, 0) (2, 1/2), level to 5
        ([2, 4.999999999], 5, (0.5 + 3 * 0.75) / 5),
        ([2.5], 5, (1.25 + 2.5) / 5),
        ([1, np.nan, 3, 7, np.nan, INF], 5, 15 / 8 / 5),  # not judged: not in n
    ],
)
def test_area_by_hand(errors, threshold, area):
    assert pose_auc(np.array(errors), [threshold]) == [pytest.approx(area, abs=1e-9)]


def test_nothing_judged_has_no_area():
    assert np.isnan(pose_auc(np.array([]))).all()
    assert np.isnan(pose_auc(np.array([np.nan]))).all()
    assert len(pose_auc(np.array([1.0]))) == 3


@settings(max_examples=100)
@given(st.lists(st.one_of(st.floats(0, 40), st.just(INF), st.sampled_from([5.0, 10.0])), min_size=1, max_size=12))
def test_area_segment_by_segment(errors):
    for threshold, area in zip((5, 10, 20), pose_auc(np.array(errors)), strict=True):
        total, x, y = 0.0, 0.0, 0.0
        for i, error in enumerate(sorted(errors)):
            if error < threshold:
                total += (error - x) * (y + (i + 1) / len(errors)) / 2
                x, y = error, (i + 1) / len(errors)
        assert area == pytest.approx((total + (threshold - x) * y) / threshold, abs=1e-12)
        assert 0 <= area <= 1
