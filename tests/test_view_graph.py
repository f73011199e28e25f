"""Pairs of look-alikes among true ones: a ring of cameras whose truth is known, with false pairs planted."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vop import view_graph
from vop.view_graph import ViewGraph, averaged_rotations, distrusted, rotation_residuals

COUNT, POINTS, STRENGTH = 24, 400, 0.25
RNG = np.random.default_rng(0)
TURNS = Rotation.from_rotvec(np.outer(2 * np.pi * np.arange(COUNT) / COUNT, [0, 1, 0])).as_matrix()
POINT = [np.arange(i * 100, i * 100 + POINTS) % (COUNT * 100) for i in range(COUNT)]  # what image i sees
ROWS = [RNG.permutation(POINTS) for _ in range(COUNT)]  # where its keypoints have it
KEYPOINTS = [RNG.uniform(0, 1000, (POINTS, 2)).astype(np.float32) for _ in range(COUNT)]


def relative(i, j, noise=0.2):
    """The rotation of a true pair, off by fractions of a degree."""
    off = Rotation.from_rotvec(np.deg2rad(RNG.normal(0, noise, 3))).as_matrix()
    return off @ TURNS[j] @ TURNS[i].T


def true_pair(i, j):
    shared, at0, at1 = np.intersect1d(POINT[i], POINT[j], return_indices=True)
    found = np.stack([ROWS[i][at0], ROWS[j][at1]], axis=1)[RNG.random(len(shared)) < 0.9]
    return (i, j), found, relative(i, j)


def true_pairs():
    return [true_pair(*sorted((i, (i + step) % COUNT))) for i in range(COUNT) for step in (1, 2)]


def false_pair(i, j, size, shift=0, turn=None):
    """Points of one image matched with those of the other that come `shift` later in its order; the pose is any."""
    places = np.arange(max(0, -shift), POINTS - max(0, shift))
    places = RNG.choice(places, min(size, len(places)), replace=False)
    turn = Rotation.random(random_state=i * COUNT + j).as_matrix() if turn is None else turn
    return (i, j), np.stack([ROWS[i][places], ROWS[j][places + shift]], axis=1), turn


def graph(pairs, calibrated=True) -> ViewGraph:
    ends, inliers, rotations = zip(*pairs, strict=True)
    known = np.full(COUNT, calibrated)
    return ViewGraph(np.array(ends), [each.astype(np.int32) for each in inliers], np.array(rotations), KEYPOINTS, known)


def test_true_pairs_are_all_trusted():
    assert distrusted(graph(true_pairs()), STRENGTH).tolist() == [None] * (2 * COUNT)


def test_a_weak_look_alike_that_no_loop_confirms_is_left_aside():
    found = distrusted(graph([*true_pairs(), false_pair(2, 13, 60)]), STRENGTH)
    assert found.tolist() == [None] * (2 * COUNT) + [view_graph.WEAK]
    assert distrusted(graph([*true_pairs(), false_pair(2, 13, 60)]), 0.0)[-1] == view_graph.TURNED


def test_a_look_alike_beside_true_pairs_breaks_their_loops():
    """Its rotation is right, as that of the same wall by one window on: only its keypoints arrive elsewhere."""
    pairs = [pair for pair in true_pairs() if pair[0] != (4, 6)]
    found = distrusted(graph([*pairs, false_pair(4, 6, 150, shift=7, turn=relative(4, 6))]), STRENGTH)
    assert found.tolist() == [None] * len(pairs) + [view_graph.BROKEN]


def test_a_wrong_rotation_breaks_a_loop_although_its_keypoints_agree():
    pairs = [pair for pair in true_pairs() if pair[0] != (4, 6)]
    ends, inliers, turn = true_pair(4, 6)
    wrong = (ends, inliers[:100], Rotation.from_rotvec([0, np.deg2rad(12), 0]).as_matrix() @ turn)
    assert distrusted(graph([*pairs, wrong]), STRENGTH)[-1] == view_graph.BROKEN
    assert (
        distrusted(graph([*pairs, wrong], calibrated=False), STRENGTH)[-1] is None
    )  # a guessed focal length may do it


def test_look_alikes_that_agree_with_each_other_are_found_by_longer_loops():
    """One image mistaken for its double three times, the same way: every loop of three holds."""
    turn = Rotation.random(random_state=5).as_matrix()
    false = [false_pair(1, j, 260, shift=-100 * (j - 12), turn=relative(12, j) @ turn) for j in (12, 13, 14)]
    found = distrusted(graph([*true_pairs(), *false]), STRENGTH)
    assert found.tolist() == [None] * (2 * COUNT) + [view_graph.TURNED] * 3


@pytest.mark.parametrize("seed", range(5))
def test_many_false_pairs(seed):
    rng = np.random.default_rng(seed)
    ends = {tuple(sorted(rng.choice(COUNT, 2, replace=False).tolist())) for _ in range(60)}
    true = true_pairs()
    ends -= {pair[0] for pair in true}
    false = [false_pair(i, j, int(rng.integers(20, 120)), int(rng.integers(-200, 200))) for i, j in sorted(ends)]
    order = rng.permutation(len(true) + len(false))
    pairs = [[*true, *false][at] for at in order]
    trusted = np.array([reason is None for reason in distrusted(graph(pairs), STRENGTH)])
    np.testing.assert_array_equal(trusted, order < len(true))


def test_two_scenes_are_not_joined_by_a_look_alike():
    apart = [pair for pair in true_pairs() if (pair[0][0] < 12) == (pair[0][1] < 12)]
    found = distrusted(graph([*apart, false_pair(3, 20, 60), false_pair(4, 21, 60)]), STRENGTH)
    assert found.tolist() == [None] * len(apart) + [view_graph.WEAK] * 2


def test_no_pairs_and_one():
    nothing = ViewGraph(np.empty((0, 2), int), [], np.empty((0, 3, 3)), KEYPOINTS, np.ones(COUNT, bool))
    assert distrusted(nothing, STRENGTH).tolist() == []
    assert distrusted(graph([true_pair(0, 1)]), STRENGTH).tolist() == [None]


def test_rotations_are_averaged_in_spite_of_false_ones():
    true = true_pairs()
    ends = np.array([pair[0] for pair in true] + [(0, 12), (3, 17), (5, 9)])
    false = Rotation.random(3, random_state=1).as_matrix()
    rotations = np.concatenate([np.array([pair[2] for pair in true]), false])
    weights = np.concatenate([np.full(len(true), 300.0), np.full(3, 200.0)])
    found = averaged_rotations(COUNT, ends, rotations, weights)
    off = rotation_residuals(ends, rotations, found)
    assert off[: len(true)].max() < 2 < 10 < off[len(true) :].min()
    world = found[0].T @ TURNS[0]  # known but for one rotation
    np.testing.assert_allclose(found @ world, TURNS, atol=np.deg2rad(2))
