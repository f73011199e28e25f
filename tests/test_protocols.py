"""The protocols on tables worked out by hand, and against their definition written for one query at a time."""

import math
import statistics

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop.metrics import pose_auc
from vop.pose.listed import Listed, queries_of
from vop.pose.protocols import POSES, Evaluation, evaluate, taken, thresholds
from vop.pose.results import MEAN, POOLED, RESULTS, markdown, metrics
from vop.schema import PoseConfig

INF = math.inf
ONE = PoseConfig(estimators=["opencv"], thresholds=[], threshold=1.0, ks=[1, 2])


def ranked_table(rows):
    """Rows (query, database, rank, scene)."""
    names = ("query", "database", "rank", "scene")
    types = (pa.string(), pa.string(), pa.int32(), pa.string())
    return pa.table(
        {n: pa.array([row[i] for row in rows], t) for i, (n, t) in enumerate(zip(names, types, strict=True))}
    )


def pose_row(a, b, inliers=None, rotation=None, translation=None, threshold=1.0, estimator="opencv", **more):
    """A row of poses; without inliers there is no pose."""
    row = {"image0": min(a, b), "image1": max(a, b), "estimator": estimator, "threshold": threshold, "matches": 50}
    row |= {"inliers": inliers, "rotation_error": rotation, "translation_error": translation, "unrelated": False}
    return row | {"truth": True, "reason": None if inliers is not None else "degenerate geometry"} | more


def poses_table(rows):
    return pa.Table.from_pylist(rows, schema=POSES)


def row_of(found: Evaluation, **wanted):
    rows = [row for row in found.results.to_pylist() if all(row[key] == value for key, value in wanted.items())]
    assert len(rows) == 1
    return rows[0]


RANKED = ranked_table(
    [
        # given out of order, as parts of a run may be
        ("q2", "d1", 1, "s"),
        ("q1", "d2", 1, "s"),
        ("q1", "d1", 0, "s"),
        ("q2", "d3", 0, "s"),
        ("q1", "d3", 2, "s"),
        ("q3", "d1", 0, "s"),
    ]
)
POSED = [
    pose_row("q1", "d1", 20, 3, 4),  # error 4
    pose_row("q1", "d2", 30, 1, 0.5),  # error 1
    pose_row("q1", "d3", 30, 8, 8),  # error 8, as many inliers as d2 but a worse rank
    pose_row("q2", "d3"),
    pose_row("q2", "d1", 10, 2, 7),  # error 7
    pose_row("q3", "d1", matches=3, reason="fewer than 5 matches"),
]


def test_by_hand():
    found = evaluate(RANKED, poses_table(POSED), ONE)
    # k = 1: q1 4, q2 no pose, q3 no pose. (0, 0) (4, 1/3), level to 5: 2/3 + 1/3 = 1; to 10: 2/3 + 2; to 20: 2/3 + 16/3
    first = row_of(found, scene="s", unit="query", k=1)
    assert [first[f"auc@{at}"] for at in (5, 10, 20)] == pytest.approx([1 / 5, 8 / 3 / 10, 6 / 20])
    assert (first["judged"], first["failed"], first["unrelated"], first["unjudged"], first["left_out"]) == (
        3,
        2,
        0,
        0,
        0,
    )
    assert first["median_rotation_deg"] is None  # the middle one of 3, inf, inf
    assert (first["median_inliers"], first["mean_matches"]) == (20, 50)
    assert (first["protocol"], first["estimator"], first["threshold_px"]) == ("fixed", "opencv", 1.0)
    # k = 2: q1 by d2 1, q2 by d1 7, q3 no pose. (1, 1/3), level to 5: 1/6 + 4/3; (7, 2/3), level to 10: 1/6 + 3 + 2
    second = row_of(found, scene="s", unit="query", k=2)
    assert [second["auc@5"], second["auc@10"]] == pytest.approx([(1 / 6 + 4 / 3) / 5, (1 / 6 + 3 + 2) / 10])
    assert (second["judged"], second["failed"]) == (3, 1)
    assert (second["median_rotation_deg"], second["median_translation_deg"]) == (2, 7)  # of 1, 2, inf; of 0.5, 7, inf
    assert second["median_inliers"] == 20  # of 30, 10
    # all: q1's d3 ties with d2 and loses by rank
    assert row_of(found, scene="s", unit="query", k=None)["auc@10"] == second["auc@10"]
    # pairs: errors 4, 1, 8, inf, 7, inf; to 5: (1, 1/6) (4, 2/6), level: 1/12 + 3/4 + 1/3
    pairs = row_of(found, scene="s", unit="pair")
    assert pairs["auc@5"] == pytest.approx((1 / 12 + 3 / 4 + 1 / 3) / 5)
    assert (pairs["judged"], pairs["failed"]) == (6, 2)
    assert pairs["median_inliers"] == 25  # of 20, 30, 30, 10
    assert pairs["mean_matches"] == pytest.approx((5 * 50 + 3) / 6)
    assert found.results.schema == RESULTS
    curve = found.errors["fixed", "opencv", 2]
    assert curve.tolist() == [1, 7, INF]
    assert [(label, errors.tolist()) for label, errors in found.curves(1)] == [("opencv, fixed, 1 px", [4, INF, INF])]


def test_a_pair_of_two_queries_is_judged_from_both_sides():
    """The poses hold it once, whichever of the two ranked the other."""
    ranked = ranked_table([("b", "a", 0, "s"), ("a", "b", 0, "s")])
    found = evaluate(ranked, poses_table([pose_row("a", "b", 9, 1, 2), pose_row("a", "c", 99, 9, 9)]), ONE)
    assert found.errors["fixed", "opencv", 1].tolist() == [2, 2]
    assert row_of(found, scene="s", unit="pair")["judged"] == 2


def test_another_world_is_a_failure_with_inliers():
    ranked = ranked_table([("q1", "far", 0, "s"), ("q1", "near", 1, "s"), ("q2", "far", 0, "s"), ("q3", "far", 0, "s")])
    poses = [
        pose_row("q1", "far", 12, unrelated=True),
        pose_row("q1", "near", 11, 1, 1),
        pose_row("q2", "far", unrelated=True),  # no pose: that alone is what failed
        pose_row("q3", "far", 80, 2, 2),
    ]
    found = evaluate(ranked, poses_table(poses), ONE)
    for k, unit in ((2, "query"), (None, "query"), (None, "pair")):
        row = row_of(found, scene="s", unit=unit, k=k)
        assert (row["failed"], row["unrelated"], row["unjudged"]) == (1, 1, 0)
    assert found.errors["fixed", "opencv", 2].tolist() == [2, INF, INF]  # q1 takes `far`, which has more inliers


def test_without_a_true_direction_nothing_is_judged():
    """q1's pair has no baseline, q2's database image no known pose: both are left out, and counted."""
    ranked = ranked_table([("q1", "d1", 0, "s"), ("q2", "d2", 0, "s"), ("q3", "d3", 0, "s")])
    unknown = pose_row("q1", "d1", 40, 2, None, truth=False)
    poses = [unknown, pose_row("q2", "d2", 30, truth=False), pose_row("q3", "d3", 20, 1, 2.5)]
    poses = evaluate(ranked, poses_table(poses), ONE)
    row = row_of(poses, scene="s", unit="query", k=1)
    assert (row["judged"], row["failed"], row["unjudged"]) == (1, 0, 2)
    assert row["auc@5"] == pytest.approx((1.25 + 2.5) / 5)
    assert (row["median_rotation_deg"], row["median_translation_deg"]) == (1, 2.5)
    none = evaluate(ranked_table([("q1", "d1", 0, "s")]), poses_table([unknown]), ONE)
    row = row_of(none, scene=MEAN, unit="query", k=1)
    assert (row["judged"], row["auc@5"], row["median_rotation_deg"]) == (0, None, None)


# (true pose of the query known, its pair: inliers or None, truth, unrelated) -> count, error
CASES = {
    "failed": (True, None, True, False, "failed", INF),
    "failed, and no pair could have been judged": (True, None, False, False, "failed", INF),
    "failed, and no pose could have been true": (True, None, True, True, "failed", INF),
    "an invention": (True, 9, True, True, "unrelated", INF),
    "right": (True, 9, True, False, None, 3),
    "with an image of unknown pose": (True, 9, False, False, "unjudged", None),
    "unknown, posed": (False, 9, False, False, "unjudged", None),
    "unknown, not posed": (False, None, False, False, "unposed", None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_judged_depends_on_the_truth_and_not_on_success(case):
    known, inliers, truth, unrelated, count, error = CASES[case]
    errors = (2, 3) if truth and inliers and not unrelated else (None, None)
    poses = poses_table([pose_row("q", "d", inliers, *errors, truth=truth, unrelated=unrelated)])
    queries = pa.table({"query": ["q"], "scene": ["s"], "known": [True], "truth": [known]})
    found = evaluate(ranked_table([("q", "d", 0, "s")]), poses, ONE, queries)
    row = row_of(found, scene="s", unit="query", k=1)
    names = ("judged", "failed", "unrelated", "unjudged", "unposed")
    expected = {"judged": error is not None, "unjudged": error is None} | ({count: True} if count else {})
    assert [row[name] for name in names] == [expected.get(name, False) for name in names]
    assert found.errors["fixed", "opencv", 1].tolist() == ([] if error is None else [error])
    assert row["auc@5"] == (None if error is None else pytest.approx(0 if error == INF else (1.5 + 2) / 5))
    assert found.judged == (error is not None or truth)
    # the pair by itself: that its query failed says nothing where nobody knows what is true
    pair = row_of(found, scene="s", unit="pair")
    if not truth:
        count = "unjudged" if inliers else "unposed"
    expected = {"judged": truth, "unjudged": not truth} | ({count: True} if count else {})
    assert [pair[name] for name in names] == [expected.get(name, False) for name in names]


def test_a_run_without_any_true_pose_has_no_score():
    """Its failures alone would make an AUC of 0."""
    poses = poses_table([row | {"truth": False, "rotation_error": None, "translation_error": None} for row in POSED])
    queries = pa.table({"query": ["q1", "q2", "q3"], "scene": ["s"] * 3, "known": [True] * 3, "truth": [False] * 3})
    found = evaluate(RANKED, poses, ONE, queries)
    assert not found.judged
    assert found.curves(1) == []
    flat = metrics(found.results, ONE)
    assert (flat["auc@5"], flat["judged"], flat["failed"], flat["unjudged"], flat["unposed"]) == (None, 0, 0, 3, 2)
    assert [row["median_inliers"] for row in found.results.to_pylist() if row["scene"] == "s"] == [20, 20, 20, 25]
    text = markdown(found.results)
    assert "Nothing could be judged" in text
    assert "AUC@5" not in text
    assert (
        "| protocol | estimator | px | scene | median inliers | mean matches | unjudged | unjudged, no pose |" in text
    )


def test_ties_are_settled_by_rank_and_queries_without_a_pose_take_no_pair():
    listed = Listed.of(RANKED, queries_of(RANKED))
    inliers = {("d1", "q1"): 20, ("d2", "q1"): 30, ("d3", "q1"): 30, ("d1", "q2"): 10}
    pair = listed.positions(pa.chunked_array([[a for a, _ in inliers]]), pa.chunked_array([[b for _, b in inliers]]))
    of_keys = np.full(len(listed.keys), -1)
    of_keys[pair] = [*inliers.values()]
    first, second, every = (taken(listed, of_keys, k) for k in (1, 2, None))
    rows = [[None if row < 0 else int(listed.rows[row]) for row in found] for found in (first, second, every)]
    assert rows == [[2, None, None], [1, 0, None], [1, 0, None]]  # rows of RANKED, of q1, q2, q3


def test_poses_of_another_version_are_refused():
    with pytest.raises(ValueError, match=r"lack the columns \['truth'\].*Run relative-pose again"):
        evaluate(RANKED, poses_table(POSED).drop_columns("truth"), ONE)


def test_queries_without_pairs_or_camera():
    queries = pa.table(
        {
            "query": ["q1", "q2", "q3", "alone", "lost"],
            "scene": ["s", "s", "s", "s", "other"],
            "known": [True, False, True, True, False],
        }
    )
    ranked = RANKED.append_column("extra", pa.array(range(6)))  # other columns do no harm
    found = evaluate(ranked, poses_table(POSED), ONE, queries)
    row = row_of(found, scene="s", unit="query", k=2)
    assert (row["judged"], row["failed"], row["left_out"]) == (3, 2, 1)  # q3 and `alone` have no pose
    assert found.errors["fixed", "opencv", 2].tolist() == [1, INF, INF]
    pairs = row_of(found, scene="s", unit="pair")
    assert (pairs["judged"], pairs["left_out"]) == (4, 2)
    empty = row_of(found, scene="other", unit="query", k=1)
    assert (empty["judged"], empty["left_out"], empty["auc@5"]) == (0, 1, None)
    # a scene without a judged query is not in the mean; its counts are
    assert row_of(found, scene=MEAN, unit="query", k=2)["auc@5"] == row["auc@5"]
    assert row_of(found, scene=MEAN, unit="query", k=2)["left_out"] == 2
    with pytest.raises(ValueError, match="pairs are ranked for 'q2', which is not among the 1 queries"):
        evaluate(RANKED, poses_table(POSED), ONE, queries.slice(0, 1))


def test_the_paper_takes_the_best_threshold_of_the_mean():
    """One query in scene a, two in scene b; AUC@5 of an error e < 5 is (5 - e / 2) / 5."""
    ranked = ranked_table([("a1", "d", 0, "a"), ("b1", "d", 0, "b"), ("b2", "d", 0, "b")])
    by_threshold = {
        0.5: (2, 4, 4),  # a 0.8; b (0, 0) (4, 1/2) (4, 1), level: 1 + 1 of 5: 0.4; mean 0.6
        1.5: (4, 1, 9),  # a 0.6; b (0, 0) (1, 1/2), level: 1/4 + 2 of 5: 0.45; mean 0.525
        2.0: (4, 1, 1),  # a 0.6; b 1/4 + 4: 0.85; mean 0.725: the best, though 3 px is no worse
        3.0: (4, 1, 1),
    }
    poses = [
        pose_row(query, "d", 10, error, 0, threshold)
        for threshold, errors in by_threshold.items()
        for query, error in zip(("a1", "b1", "b2"), errors, strict=True)
    ]
    config = PoseConfig(estimators=["opencv"], ks=[1])
    assert thresholds(config) == [0.5, 1.5, 2, 3]
    found = evaluate(ranked, poses_table(poses), config)
    paper, fixed = (row_of(found, scene=MEAN, unit="query", k=1, protocol=name) for name in ("paper", "fixed"))
    assert (paper["threshold_px"], paper["auc@5"]) == (2, pytest.approx(0.725))
    assert (fixed["threshold_px"], fixed["auc@5"]) == (1.5, pytest.approx(0.525))
    assert row_of(found, scene="b", unit="query", k=1, protocol="paper")["threshold_px"] == 2  # the same in every scene
    # pooled: 1, 1, 4 of 3 queries: (1, 1/3) (1, 2/3) (4, 1), level: 1/6 + 5/2 + 1
    pooled = row_of(found, scene=POOLED, unit="query", k=1, protocol="paper")
    assert (pooled["auc@5"], pooled["judged"]) == (pytest.approx((1 / 6 + 5 / 2 + 1) / 5), 3)
    assert [label for label, _ in found.curves(1)] == ["opencv, fixed, 1.5 px", "opencv, paper, 2 px"]
    assert found.results["protocol"].to_pylist()[0] == "fixed"
    flat = metrics(found.results, config)
    assert flat["paper/opencv/k1/auc@5"] == flat["paper/opencv/pairs/auc@5"] == 0.725
    assert flat["paper/opencv/k1/threshold_px"] == 2
    assert flat["fixed/opencv/all/auc@5"] == flat["auc@5"] == 0.525
    assert (flat["protocol"], flat["estimator"], flat["threshold_px"], flat["k"]) == ("fixed", "opencv", 1.5, 1)
    assert (flat["judged"], flat["failed"], flat["median_rotation_deg"]) == (3, 0, 4.5)  # of 4, and of 1 and 9


def test_a_pair_without_a_row_is_an_error():
    with pytest.raises(
        ValueError, match=r"1 of 6 ranked pairs have no row for opencv at 1 px, the first 'q3' and 'd1'"
    ):
        evaluate(RANKED, poses_table(POSED[:-1]), ONE)
    with pytest.raises(ValueError, match="6 of 6 ranked pairs have no row for poselib"):
        evaluate(RANKED, poses_table(POSED), PoseConfig(estimators=["poselib"], thresholds=[], threshold=1.0))


def test_nothing_ranked():
    found = evaluate(RANKED.slice(0, 0), poses_table([]), ONE)
    assert row_of(found, scene=MEAN, unit="query", k=1)["auc@5"] is None
    queries = pa.table({"query": ["q"], "scene": [""], "known": [True]})
    found = evaluate(RANKED.slice(0, 0), poses_table([]), ONE, queries)
    row = row_of(found, scene="", unit="query", k=1)
    assert (row["auc@5"], row["judged"], row["failed"], row["median_inliers"], row["mean_matches"]) == (
        0,
        1,
        1,
        None,
        None,
    )
    assert found.errors["fixed", "opencv", 1].tolist() == [INF]


def test_tables_to_read():
    text = markdown(evaluate(RANKED, poses_table(POSED), ONE).results)
    head, *sections = text.split("### ")
    assert [section.splitlines()[0] for section in sections] == [
        "Queries, by their first pair",
        "Queries, by the best of their first 2 pairs",
        "Every listed pair",
    ]
    assert "The best of all their pairs gives the same table." in sections[1]
    assert "`fixed`" in head and "`paper`" not in head  # of which there is none
    assert MEAN not in text  # of one scene it would only repeat it
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    titles = ["protocol", "estimator", "px", "scene", "AUC@5°", "@10°", "@20°", "median R (°)", "median t (°)"]
    titles += ["median inliers", "mean matches", "judged", "no pose"]  # nothing else has anything to tell
    assert rows[0] == titles
    assert rows[2] == ["fixed", "opencv", "1", "s", "20.0", "26.7", "30.0", "–", "–", "20", "50", "3", "2"]


def test_tables_of_several_scenes_and_protocols():
    ranked = ranked_table([("q1", "d", 0, "a|b"), ("q2", "d", 0, "c")])
    config = PoseConfig(estimators=["opencv"], thresholds=[1.0], threshold=1.0, ks=[1, 5])
    poses = [pose_row("q1", "d", 9, 1, 1), pose_row("q2", "d", 9, 1, 1, unrelated=True)]
    text = markdown(evaluate(ranked, poses_table(poses), config).results)
    assert "very queries or pairs" in text  # how `paper` chooses
    assert text.count("### ") == 2
    assert "The best of their first 5 pairs or of all their pairs gives the same table." in text
    rows = [line for line in text.splitlines() if line.startswith(("| fixed", "| paper"))]
    assert [row.split(" | ")[3] for row in rows[:4]] == ["a\\|b", "c", MEAN, POOLED]
    assert [row.split(" | ")[0] for row in rows[:8]] == ["| fixed"] * 4 + ["| paper"] * 4
    assert [row.split(" | ")[-1] for row in rows[:4]] == ["0 |", "1 |", "1 |", "1 |"]  # wrong world
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def brute_force(ranked, poses, queries, k, estimator, threshold, unit):
    """By scene: (errors of the judged, failed, unrelated, unjudged, unposed, left out), one query at a time."""
    scenes = {}
    for query, scene, known, truth in queries:
        errors, *counts = scenes.setdefault(scene, ([], [0], [0], [0], [0], [0]))
        listed = sorted((rank, database) for q, database, rank in ranked if q == query)
        if not known:
            counts[4][0] += 1 if unit == "query" else len(listed)
            continue
        found = [poses[min(query, d), max(query, d), estimator, threshold] for _, d in listed]
        if unit == "query":
            best = None
            for row in found[:k]:
                if row["reason"] is None and (best is None or row["inliers"] > best["inliers"]):
                    best = row
            found = [best]
        for row in found:
            posed = row is not None and row["reason"] is None
            of_what = truth if unit == "query" else row["truth"]
            if not of_what or (posed and not row["truth"]):
                counts[2][0] += 1
                counts[3][0] += not posed
            elif not posed:
                counts[0][0] += 1
                errors.append(INF)
            elif row["unrelated"]:
                counts[1][0] += 1
                errors.append(INF)
            else:
                errors.append(max(row["rotation_error"], row["translation_error"]))
    return {scene: (sorted(errors), *(count[0] for count in counts)) for scene, (errors, *counts) in scenes.items()}


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    names = [f"n{i}" for i in range(rng.integers(2, 9))]
    chances = [(name, *rng.random(3)) for name in names]
    queries = [(n, f"s{rng.integers(3)}", bool(a < 0.85), bool(b < 0.8)) for n, a, b, c in chances if c < 0.8]
    ranked = []
    for query, *_ in queries:
        others = rng.permutation([name for name in names if name != query])[: rng.integers(0, 6)]
        ranked += [(query, str(other), rank) for rank, other in enumerate(others)]
    ranked = [ranked[i] for i in rng.permutation(len(ranked))]
    config = PoseConfig(estimators=["opencv", "poselib"], thresholds=[0.5, 3.0], threshold=0.7, ks=[1, 3])
    rows = []
    for a in names:
        for b in names:
            for estimator in config.estimators if a < b else ():
                for threshold in thresholds(config):
                    row = pose_row(
                        a, b, int(rng.integers(5, 8)), float(rng.integers(0, 24)) / 2, float(rng.integers(0, 24)) / 2
                    )
                    kind = rng.random()
                    if kind < 0.2:
                        row = pose_row(a, b, unrelated=bool(rng.random() < 0.5))
                    elif kind < 0.3:
                        row |= {"unrelated": True, "rotation_error": None, "translation_error": None}
                    elif kind < 0.4:
                        row |= {"translation_error": None, "truth": False}
                    elif kind < 0.5:
                        row = pose_row(a, b, [None, 6][rng.integers(2)], truth=False)
                    rows.append(row | {"estimator": estimator, "threshold": threshold})
    by_key = {(row["image0"], row["image1"], row["estimator"], row["threshold"]): row for row in rows}
    columns = list(zip(*queries, strict=True)) or [(), (), (), ()]
    types = {"query": pa.string(), "scene": pa.string(), "known": pa.bool_(), "truth": pa.bool_()}
    query_table = pa.table({n: pa.array(c, t) for (n, t), c in zip(types.items(), columns, strict=True)})
    table = ranked_table([(*row, "") for row in ranked])
    found = evaluate(table, poses_table([rows[i] for i in rng.permutation(len(rows))]), config, query_table)
    keys = ("scene", "unit", "k", "estimator", "protocol")
    by_case = {tuple(row[key] for key in keys): row for row in found.results.to_pylist()}
    cases = [("query", 1), ("query", 3), ("query", None), ("pair", None)]
    for estimator in config.estimators:
        for unit, k in cases:
            tried = {at: brute_force(ranked, by_key, queries, k, estimator, at, unit) for at in thresholds(config)}
            means = {}
            for at, scenes in tried.items():
                judged = [pose_auc(np.array(errors))[0] for errors, *_ in scenes.values() if errors]
                means[at] = statistics.fmean(judged) if judged else 0.0
            paper = 0.5 if means[0.5] >= means[3.0] else 3.0
            for protocol, at in (("fixed", 0.7), ("paper", paper)):
                case = (unit, k, estimator, protocol)
                for scene, (errors, *counts) in tried[at].items():
                    row = by_case[(scene, *case)]
                    assert row["threshold_px"] == at
                    names = ("failed", "unrelated", "unjudged", "unposed", "left_out")
                    assert [row[key] for key in names] == counts
                    assert row["judged"] == len(errors)
                    if errors:
                        assert [row[f"auc@{at}"] for at in (5, 10, 20)] == pytest.approx(pose_auc(np.array(errors)))
                if means[at]:
                    assert by_case[(MEAN, *case)]["auc@5"] == pytest.approx(means[at])
                every = sorted(error for errors, *_ in tried[at].values() for error in errors)
                if unit == "query":
                    assert found.errors[protocol, estimator, k].tolist() == every
                assert by_case[(POOLED, *case)]["judged"] == len(every)
