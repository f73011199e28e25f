"""The pairs of an epoch, and how the batches of an epoch are shared among workers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sparse

from vop.datasets.layout import symmetric
from vop.datasets.posed import OverlapTruth
from vop.schema import TrainConfig
from vop.training.batches import share_of, steps_of
from vop.training.sampling import SCHEMA, VALIDATION, epoch_pairs, view_overlap, view_pairs
from vop.training.views import FLIP, flipped, homography, image_of

CONFIG = TrainConfig(positives_per_scene=60, negatives_per_scene=40, validation_pairs=25)
SCENES = {scene: [f"{scene}/{number:02d}.jpg" for number in range(30)] for scene in ("b", "a", "c")}
NAMES = sorted(name for names in SCENES.values() for name in names)


def truth_of(values, names=NAMES) -> OverlapTruth:
    """Truth from a function of two names, asked in order of the names."""
    matrix = np.eye(len(names), dtype=np.float32)
    for i, first in enumerate(names):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = values(names[j], first)
    return OverlapTruth(tuple(names), matrix)


@pytest.fixture(scope="module")
def truth() -> OverlapTruth:
    """Overlaps of all sizes within a scene, a third of them none; images of two scenes share nothing."""
    rng = np.random.default_rng(0)
    return truth_of(lambda a, b: max(0, rng.uniform(-0.5, 1)) if a[0] == b[0] else 0)


def drawn(table) -> list[tuple[str, str, float]]:
    assert table.schema == SCHEMA
    return [(row["view0"], row["view1"], row["overlap"]) for row in table.to_pylist()]


def ends(row) -> frozenset[str]:
    return frozenset(map(image_of, row[:2]))


def overlaps(rows, scene: str | None = None) -> np.ndarray:
    return np.array([row[2] for row in rows if row[2] > 0 and (scene is None or row[0].startswith(scene))])


def test_pairs_are_drawn_evenly_from_the_bins(truth):
    rows = drawn(epoch_pairs(truth, SCENES, CONFIG, 0))
    assert len(rows) == 3 * (60 + 40)
    for scene in SCENES:
        counts, _ = np.histogram(overlaps(rows, scene), [0.1, 0.3, 0.5, 0.7])
        assert counts.tolist() == [20, 20, 20]
    more = replace(CONFIG, overlap_bins=4, min_overlap=0.2, max_overlap=1.0, positives_per_scene=10)
    counts, _ = np.histogram(overlaps(drawn(epoch_pairs(truth, SCENES, more, 0)), "a"), [0.2, 0.4, 0.6, 0.8, 1.0])
    assert sorted(counts) == [2, 2, 3, 3]


def test_what_one_bin_lacks_the_others_give():
    rare = iter([0.6] * 7 + [0.2] * 30)
    truth = truth_of(lambda a, b: next(rare, 0.4), SCENES["a"])
    rows = drawn(epoch_pairs(truth, {"a": SCENES["a"]}, CONFIG, 0))
    assert Counter(np.round(overlaps(rows), 1).tolist()) in ({0.6: 7, 0.2: 26, 0.4: 27}, {0.6: 7, 0.2: 27, 0.4: 26})
    everything = replace(CONFIG, positives_per_scene=1000)
    assert len(drawn(epoch_pairs(truth, {"a": SCENES["a"]}, everything, 0))) == 30 * 29 / 2


def test_overlaps_are_the_true_ones_and_within_bounds(truth):
    index = {name: row for row, name in enumerate(truth.names)}
    for view0, view1, overlap in drawn(epoch_pairs(truth, SCENES, CONFIG, 3)):
        assert overlap == truth.matrix[index[image_of(view0)], index[image_of(view1)]]
        assert overlap == 0 or 0.1 <= overlap <= 0.7
        assert view0.split("/")[0] == view1.split("/")[0] and image_of(view0) != image_of(view1)


def test_the_bounds_belong_to_the_bins():
    values = {("a/00.jpg", "a/01.jpg"): 0.1, ("a/00.jpg", "a/02.jpg"): 0.7, ("a/01.jpg", "a/02.jpg"): 0.0999,
              ("a/00.jpg", "a/03.jpg"): 0.7001, ("a/01.jpg", "a/03.jpg"): 1.0}  # fmt: skip
    truth = truth_of(lambda a, b: values.get((a, b), 0), SCENES["a"][:4])
    rows = drawn(epoch_pairs(truth, {"a": SCENES["a"][:4]}, CONFIG, 0))
    assert sorted(np.round(overlaps(rows), 4).tolist()) == [0.1, 0.7]
    assert {ends(row) for row in rows if not row[2]} == {frozenset(["a/02.jpg", "a/03.jpg"])}  # the only one with none


def test_negatives_are_of_one_world(truth):
    worlds = {name: f"{name[0]}{int(name[2:4]) % 2}" for name in NAMES}
    rows = drawn(epoch_pairs(truth, SCENES, CONFIG, 0, worlds))
    negatives = [row for row in rows if row[2] == 0]
    assert len(negatives) == 3 * 40
    assert all(worlds[image_of(view0)] == worlds[image_of(view1)] for view0, view1, _ in negatives)
    mixed = [row for row in drawn(epoch_pairs(truth, SCENES, CONFIG, 0)) if row[2] == 0]
    assert any(worlds[image_of(view0)] != worlds[image_of(view1)] for view0, view1, _ in mixed)


def test_negatives_are_all_that_share_nothing_where_all_are_asked_for(truth):
    worlds = {name: str(int(name[2:4]) % 3) for name in NAMES}
    everything = replace(CONFIG, negatives_per_scene=10**4)
    rows = [row for row in drawn(epoch_pairs(truth, {"a": SCENES["a"]}, everything, 0, worlds)) if row[2] == 0]
    index = {name: row for row, name in enumerate(truth.names)}
    expected = {frozenset((a, b)) for a in SCENES["a"] for b in SCENES["a"]
                if a < b and worlds[a] == worlds[b] and not truth.matrix[index[a], index[b]]}  # fmt: skip
    assert len(rows) == len(expected) > 30 and {ends(row) for row in rows} == expected


def test_a_scene_of_60000_images_needs_no_square_of_them():
    """A square of float32 would take 14 GB."""
    rows = np.arange(60_000 - 1)
    names = tuple(f"{number:05d}.jpg" for number in range(60_000))
    truth = OverlapTruth(names, symmetric(60_000, rows, rows + 1, np.full(60_000 - 1, 0.5)))
    pairs = drawn(epoch_pairs(truth, {"": names}, CONFIG, 0))
    apart = [abs(int(image_of(a)[:5]) - int(image_of(b)[:5])) for a, b, _ in pairs]
    assert [overlap > 0 for _, _, overlap in pairs] == [each == 1 for each in apart] and len(pairs) == 60 + 40
    assert np.median([each for each in apart if each > 1]) > 10_000  # from everywhere


def test_a_scene_without_negatives_takes_them_of_others():
    """Of all scenes at once: what one scene draws of another must not be what that one draws of it."""
    truth = truth_of(lambda a, b: 0.4 if a[0] == b[0] else 0)
    for wanted in (40, 700):
        rows = drawn(epoch_pairs(truth, SCENES, replace(CONFIG, negatives_per_scene=wanted), 0))
        negatives = [row for row in rows if row[2] == 0]
        assert 3 * min(wanted, 300) * 0.9 < len(negatives) <= 3 * wanted
        assert all(image_of(row[0])[0] != image_of(row[1])[0] for row in negatives)
        assert len({ends(row) for row in rows}) == len(rows)
    alone = drawn(epoch_pairs(truth, {"a": SCENES["a"]}, CONFIG, 0))
    assert len(alone) == 60 and all(row[2] > 0 for row in alone)


def test_images_of_other_scenes_that_overlap_are_no_negatives():
    """Scenes by folder may show one place: its images by day and by night."""
    truth = truth_of(lambda a, b: 0.4 if {a[0], b[0]} != {"a", "c"} else 0)
    negatives = [ends(row) for row in drawn(epoch_pairs(truth, SCENES, CONFIG, 0)) if row[2] == 0]
    assert negatives and all({name[0] for name in pair} == {"a", "c"} for pair in negatives)


def test_no_pair_stands_twice_in_an_epoch(truth):
    generous = replace(CONFIG, positives_per_scene=500, negatives_per_scene=500)
    rows = drawn(epoch_pairs(truth, SCENES, generous, 0))
    assert len({ends(row) for row in rows}) == len(rows) > 3 * 250


def test_seed_and_epoch_decide_and_nothing_else(truth):
    rows = drawn(epoch_pairs(truth, SCENES, CONFIG, 4))
    assert drawn(epoch_pairs(truth, SCENES, CONFIG, 4)) == rows
    elsewise = {scene: SCENES[scene][::-1] for scene in reversed(SCENES)}
    assert drawn(epoch_pairs(truth, elsewise, CONFIG, 4)) == rows
    order = np.random.default_rng(1).permutation(len(NAMES))
    turned = OverlapTruth(tuple(NAMES[at] for at in order), truth.matrix[np.ix_(order, order)])
    assert drawn(epoch_pairs(turned, SCENES, CONFIG, 4)) == rows
    others = [
        drawn(epoch_pairs(truth, SCENES, CONFIG, 5)),
        drawn(epoch_pairs(truth, SCENES, replace(CONFIG, seed=1), 4)),
    ]
    for other in others:
        same = {ends(row) for row in rows} & {ends(row) for row in other}
        assert 0 < len(same) < 0.6 * len(rows)
    scene_alone = {ends(row) for row in drawn(epoch_pairs(truth, {"a": SCENES["a"]}, CONFIG, 4))}
    assert scene_alone == {ends(row) for row in rows if row[0].startswith("a/")}  # a scene does not move the others


def test_pairs_are_mixed_and_half_of_them_mirrored(truth):
    rows = drawn(epoch_pairs(truth, SCENES, CONFIG, 0))
    assert all(flipped(view0) == flipped(view1) for view0, view1, _ in rows)
    assert 0.4 < np.mean([flipped(row[0]) for row in rows]) < 0.6
    for kind in ([row[0][0] == "a" for row in rows], [row[2] > 0 for row in rows]):
        changes = np.count_nonzero(np.diff(np.array(kind, int)))
        assert changes > len(rows) / 5
    plain = drawn(epoch_pairs(truth, SCENES, replace(CONFIG, flip=False), 0))
    assert [ends(row) for row in plain] == [ends(row) for row in rows]
    assert not any(FLIP in row[0] + row[1] for row in plain)


def test_the_validation_sees_images_as_they_are(truth):
    rows = drawn(epoch_pairs(truth, SCENES, CONFIG, VALIDATION))
    assert not any(flipped(view) for row in rows for view in row[:2])
    assert Counter((row[0][0], row[2] > 0) for row in rows) == {(s, kind): 25 for s in SCENES for kind in (True, False)}
    without = drawn(epoch_pairs(truth, SCENES, replace(CONFIG, negatives_per_scene=0), VALIDATION))
    assert len(without) == 75 and all(row[2] > 0 for row in without)


def test_sparse_truth_gives_the_same_pairs(truth):
    compact = OverlapTruth(truth.names, sparse.csr_array(truth.matrix))
    for epoch in (VALIDATION, 0):
        assert drawn(epoch_pairs(compact, SCENES, CONFIG, epoch)) == drawn(epoch_pairs(truth, SCENES, CONFIG, epoch))
    none = truth_of(lambda a, b: 0.4 if a[0] == b[0] else 0)
    compact = OverlapTruth(none.names, sparse.csr_array(none.matrix))
    assert drawn(epoch_pairs(compact, SCENES, CONFIG, 0)) == drawn(epoch_pairs(none, SCENES, CONFIG, 0))


def test_a_scene_of_one_image_and_no_scene_at_all(truth):
    rows = drawn(epoch_pairs(truth, {"a": SCENES["a"][:1], "b": SCENES["b"][:1]}, CONFIG, 0))
    assert {ends(row) for row in rows} == {frozenset(["a/00.jpg", "b/00.jpg"])} and len(rows) == 1
    assert drawn(epoch_pairs(truth, {"a": SCENES["a"][:1]}, CONFIG, 0)) == []
    assert drawn(epoch_pairs(truth, {}, CONFIG, 0)) == drawn(view_pairs({}, CONFIG, 0)) == []


def test_pairs_of_views_are_of_one_image_that_both_show():
    config = replace(CONFIG, warps=3, positives_per_scene=35)
    rows = drawn(view_pairs(SCENES, config, 0))
    assert drawn(view_pairs(SCENES, config, 0)) == rows != drawn(view_pairs(SCENES, config, 1))
    positives, negatives = ([row for row in rows if (row[2] > 0) == kind] for kind in (True, False))
    assert len(positives) == 3 * 35 and len(negatives) > 3 * 35
    assert len({row[:2] for row in positives}) == len(positives)
    for view0, view1, overlap in positives:
        assert image_of(view0) == image_of(view1) and view0 != view1 and not flipped(view0) and not flipped(view1)
        assert overlap >= config.min_overlap and overlap == np.float32(view_overlap(view0, view1))
    assert {image_of(row[0]) for row in positives} == {*NAMES}  # every image takes part
    assert all(row[0][0] != row[1][0] and {*row[:2]} <= {*NAMES} for row in negatives)
    assert len({ends(row) for row in negatives}) == len(negatives)
    assert all(row[2] > 0 for row in drawn(view_pairs({"a": SCENES["a"]}, config, 0)))


def test_pairs_of_views_of_a_few_images():
    rows = drawn(view_pairs({"": ["a.jpg", "b.jpg"]}, replace(CONFIG, warps=2), VALIDATION))
    assert 1 <= len(rows) <= 6  # three pairs of views of each image
    assert len({row[:2] for row in rows}) == len(rows)


def test_the_overlap_of_views_is_the_smaller_share():
    assert view_overlap("a.jpg", "a.jpg") == view_overlap("a?warp=1", "a?warp=1") == 1
    assert view_overlap("a.jpg", "a.jpg?flip") == 1
    for number in range(20):
        view = f"a.jpg?warp={number}"
        corners = np.linalg.inv(homography(view)) @ np.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
        x, y = corners[:2] / corners[2]
        area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2  # the copy lies inside the image
        assert view_overlap("a.jpg", view) == pytest.approx(area, abs=0.03)
        assert view_overlap("a.jpg", view) == view_overlap(view, "a.jpg")


@pytest.mark.parametrize("pairs", [0, 1, 3, 4, 31, 32, 33, 100, 128])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_workers_share_every_batch(pairs, batch_size):
    steps = {workers: steps_of(pairs, batch_size, workers) for workers in (1, 2, 4)}
    for workers, of in steps.items():
        taken = [
            [row for rank in range(workers) for row in range(*share_of(start, stop, rank, workers))]
            for start, stop in of
        ]
        # in the order of ranks the shares are the batch, each pair once; batches follow each other
        assert taken == [list(range(start, stop)) for start, stop in of]
        sizes = {share_of(*batch, rank, workers)[1] - share_of(*batch, rank, workers)[0]
                 for batch in of for rank in range(workers)}  # fmt: skip
        assert len(sizes) <= 1 and 0 not in sizes
        assert sum(map(len, taken)) == (pairs - pairs % batch_size if pairs >= batch_size else pairs - pairs % workers)
        assert [row for batch in taken for row in batch] == list(range(sum(map(len, taken))))
    if pairs >= batch_size:
        assert steps[1] == steps[2] == steps[4]
