"""Relative poses in the report: curves, drawings, the section's numbers, and the page of a run without a ranking."""

import dataclasses
import math
import re
import shutil
from pathlib import Path

import cv2
import matched_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trees
from matched_runs import FAILED, LISTED, LOST, NAMES, SIZE, K
from test_report import Page

from vop import config, pairs
from vop.cameras import Cameras, KnownCamera
from vop.datasets.benchmark import open_benchmark
from vop.datasets.posed import OverlapTruth, write_overlap
from vop.geometry import pose_from_rt
from vop.image import decode
from vop.pose.protocols import evaluate
from vop.pose.results import COUNTS, MEAN, POOLED, RESULTS, SCORES
from vop.pose_estimation import FEW, QUARANTINED, SCHEMA, UNKNOWN
from vop.run import Run
from vop.schema import PoseConfig
from vop.steps.report import known_overlaps
from vop.viz.epipolar import agreeing
from vop.viz.links import DRAWN, Links, draw_links, drawing_size
from vop.viz.matches import GAP, Photo
from vop.viz.page import write_curves, write_page
from vop.viz.plots import DASHES, STEPS, curves_file, error_curves, recall_steps
from vop.viz.pose_report import PosedQuery, PoseReport, choice, ks_of
from vop.viz.posed import illustrated, shown_pairs, worst_first
from vop.viz.report import Report, write_report

INF = math.inf
EVIL = "a b/<script>alert(1)</script> \"Ünïcödé\" & 'x'.jpg"


def some_errors(n, seed=0, failures=3):
    errors = np.random.default_rng(seed).uniform(0, 30, n).round(1)  # with ties, and beyond the axis
    return np.sort(np.concatenate([errors, np.full(failures, INF)]))


@pytest.mark.parametrize("errors", [some_errors(40), np.array([INF]), np.array([0.0, 0.0]), np.array([20.0, 5.0])])
def test_steps_are_the_recall_everywhere(errors):
    errors = np.sort(errors)
    x, recall = recall_steps(errors)
    assert x[0] == 0
    assert x[-1] == 20
    assert (np.diff(x) > 0).all()
    for at in [*np.linspace(0, 20, 333), *errors[errors <= 20]]:
        held = recall[np.searchsorted(x, at, side="right") - 1]
        assert held == np.mean([error <= at for error in errors])


def test_many_steps_are_merged_and_exact_at_the_corners():
    errors = np.sort(np.random.default_rng(1).uniform(0, 40, 20_000))
    x, recall = recall_steps(errors)
    assert len(x) == STEPS + 1
    np.testing.assert_array_equal(recall, [(errors <= at).mean() for at in x])


def curve_paths(svg):
    return [attrs for attrs in Page(svg).all("path") if "var(--curve-" in attrs.get("style", "")]


def test_curves_pass_through_every_corner():
    errors = some_errors(25, failures=5)
    svg = error_curves([("opencv, fixed, 1.5 px", errors)], "Queries", "alt & text")
    assert Page(svg).all("svg")[0]["aria-label"] == "alt & text"
    path, legend = curve_paths(svg)
    points = np.array([[float(v) for v in point] for point in re.findall(r"[ML] (\S+) (\S+)", path["d"])])
    corners, recall = recall_steps(errors)
    left, right = points[0, 0], points[-1, 0]
    assert left < right
    found = {round(x, 3): y for x, y in points}  # of two points at one x the later is the upper one
    heights = np.array([found[round(left + (right - left) * at / 20, 3)] for at in corners])
    scale = (heights[0] - heights[-1]) / (recall[-1] - recall[0])
    np.testing.assert_allclose((heights[0] - heights) / scale, recall - recall[0], atol=1e-4)
    moves = np.diff(points, axis=0)
    assert (np.abs(moves).min(axis=1) < 1e-6).all(), "a step goes right or up, never along a slope"
    assert float(re.findall(r"M \S+ (\S+)", legend["d"])[0]) > points[:, 1].max(), "the legend stands below the curves"


def test_curves_are_told_apart_without_colour():
    curves = [(f"estimator {i}", some_errors(30, i)) for i in range(len(DASHES))]
    page = error_curves(curves, "Queries", "alt")
    dashes = [re.search(r"stroke-dasharray: ([^;]*)", attrs["style"]) for attrs in curve_paths(page)]
    of_curves = [found and found.group(1) for found in dashes[: len(curves)]]
    assert len({*of_curves}) == len(curves)
    assert of_curves == [found and found.group(1) for found in dashes[len(curves) :]], "the legend shows the same"
    words = Page(page).words
    assert all(label in words for label, _ in curves)


def test_curves_as_files_are_pictures_and_always_the_same():
    panels = {"one <pair>": [("a", some_errors(9)), ("b", some_errors(9, 1))], "five pairs": [("a", some_errors(9, 2))]}
    png = curves_file(panels, "png")
    picture = decode(png)
    assert picture.shape[1] > 2 * picture.shape[0]
    assert (picture[0] == 255).all()
    assert png == curves_file(panels, "png")
    svg = curves_file(panels, "svg")
    assert svg == curves_file(panels, "svg")
    assert b"<text" not in svg, "letters are outlines: any program shows the same"
    assert not re.search(rb"<dc:date>", svg)


def scene(seed=0, n=50):
    rng = np.random.default_rng(seed)
    world = rng.uniform([-2, -2, 4], [2, 2, 8], (n, 3))
    R = cv2.Rodrigues(rng.normal(0, 0.1, 3))[0]
    pose = pose_from_rt(R, rng.normal(0, 1, 3))
    K1 = np.array([[800.0, 0, 500], [0, 820, 400], [0, 0, 1]])
    other = world @ R.T + pose[:3, 3]
    points = [(seen @ k.T)[:, :2] / seen[:, 2:] for seen, k in ((world, K), (other, K1))]
    return points, K1, pose


def test_matches_agree_up_to_opencvs_sampson_distance():
    (points0, points1), K1, pose = scene()
    points1 = points1 + np.random.default_rng(1).normal(0, 2, points1.shape)
    t = pose[:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(K1).T @ cross @ pose[:3, :3] @ np.linalg.inv(K)
    distance = [
        np.sqrt(cv2.sampsonDistance(np.append(a, 1.0)[:, None], np.append(b, 1.0)[:, None], F))
        for a, b in zip(points0, points1, strict=True)
    ]
    found = agreeing(points0, points1, K, K1, pose, 1.0)
    assert found.tolist() == [d <= 1 for d in distance]
    assert 0 < found.sum() < len(found)
    scaled = pose_from_rt(pose[:3, :3], 7 * t)
    np.testing.assert_array_equal(agreeing(points0, points1, K, K1, scaled, 1.0), found)


def test_matches_behind_a_camera_or_without_a_place_agree_with_nothing():
    (points0, points1), K1, pose = scene()
    assert agreeing(points0, points1, K, K1, pose, 1e-6).all()
    assert not agreeing(points0, points1, K, K1, pose_from_rt(pose[:3, :3], -pose[:3, 3]), 1.0).any()
    points0[3] = np.nan
    assert np.flatnonzero(~agreeing(points0, points1, K, K1, pose, 1e-6)).tolist() == [3]
    assert not agreeing(points0, points1, K, K1, pose_from_rt(np.eye(3), np.zeros(3)), 1.0).any()


def photo(name="a.jpg", size=(640, 480), grey=90):
    return Photo(name, np.full((size[1], size[0], 3), grey, np.uint8), drawing_size(*size))


def test_lines_join_the_places_of_a_match_in_both_photographs():
    left, right = photo(), photo("b.jpg", (300, 600))
    links = Links(
        np.array([[0, 0], [0.5, 0.5], [1, 1], [0.25, 0.75]]),
        np.array([[1, 1], [0.5, 0.25], [0, 0], [0.1, 0.2]]),
        np.array([True, True, True, False]),
        np.array([True, False, True, True]),
    )
    page = Page(draw_links(left, right, links, ("x", "y")))
    width, height = left.scaled_size
    assert (width, height) == (448, 336)
    assert right.scaled_size == (224, 448)
    top, shift = (448 - 336) / 2, width + GAP
    found = [[float(line[key]) for key in ("x1", "y1", "x2", "y2")] for line in page.all("line")]
    # the false match is drawn last, over the others
    assert found == [
        [0, top, shift + 224, 448],
        [448, top + 336, shift, 0],
        [224, top + 168, shift + 112, 112],
    ]
    assert [attrs["class"] for attrs in page.all("g")[1:]] == ["true", "true", "false"]
    (dot, other), ends = page.all("circle")[:2], page.all("circle")[2:]
    assert [float(dot["cx"]), float(dot["cy"])] == [112, top + 252]
    assert [float(other["cx"]), float(other["cy"])] == pytest.approx([shift + 22.4, 89.6])
    assert len(ends) == 6
    assert (links.count, links.false) == (3, 1)


def test_of_many_matches_some_are_drawn_and_all_are_counted():
    points = np.random.default_rng(0).random((500, 2))
    links = Links(points, points, np.arange(500) < 300)
    page = Page(draw_links(photo(), photo(), links, ("x", "y")))
    assert len(page.all("line")) == DRAWN
    assert len(page.all("circle")) == 4 * DRAWN
    assert {attrs["class"] for attrs in page.all("g")[1:]} == {"open"}
    assert f"{DRAWN} of 300 matches drawn" in page.all("svg")[0]["aria-label"]
    assert links.false is None
    with pytest.raises(ValueError, match="one per match"):
        Links(points, points[:3], np.ones(500, bool))


def random_run(seed):
    """A ranking of some queries, and a pose or none for each pair."""
    rng = np.random.default_rng(seed)
    listed, names = [], [f"{i}.jpg" for i in range(9)]
    for query in names[:7]:
        others = rng.permutation([name for name in names if name != query])[: rng.integers(1, 6)]
        listed += [{"query": query, "database": other, "rank": rank} for rank, other in enumerate(others)]
    listed = pa.Table.from_pylist(listed).set_column(2, "rank", pa.array([row["rank"] for row in listed], pa.int32()))
    rows = []
    for image0, image1 in sorted({tuple(sorted((r["query"], r["database"]))) for r in listed.to_pylist()}):
        row = {"image0": image0, "image1": image1, "estimator": "opencv", "threshold": 1.5, "unrelated": False}
        row |= {"matches": 20, "inliers": int(rng.integers(5, 9)), "truth": True}  # ties are common
        kind = rng.integers(6)
        if kind == 0:
            row |= {"inliers": 0, "reason": FEW, "truth": bool(rng.integers(2))}
        elif kind == 1:
            row["unrelated"] = True
        elif kind == 2:
            row["truth"] = False
        else:
            row |= {"rotation_error": rng.uniform(0, 9), "translation_error": rng.uniform(0, 9)}
        rows.append(row)
    queries = pa.table({"query": names, "scene": [str(i % 2) for i in range(9)]})  # two of them list nothing
    for column, share in (("known", 0.9), ("truth", 0.8)):
        queries = queries.append_column(column, pa.array(rng.random(9) < share))
    return listed, pa.Table.from_pylist(rows, schema=SCHEMA), queries


@pytest.mark.parametrize("seed", range(8))
def test_queries_are_shown_with_the_pair_that_they_are_judged_by(seed):
    listed, poses, queries = random_run(seed)
    listing = queries.filter(pa.compute.is_in(queries["query"], pa.array(listed["query"].unique())))
    settings = PoseConfig(estimators=["opencv"], thresholds=[], threshold=1.5, ks=[1, 3])
    evaluation = evaluate(listed, poses, settings, listing)
    for k in (1, 3, None):
        chosen = shown_pairs(listed, poses, queries, k)
        known = listing.filter(listing["known"])["query"].to_pylist()
        assert sorted(chosen["query"].to_pylist()) == known
        assert {(row["query"], row["database"], row["rank"]) for row in chosen.to_pylist()} <= {
            (row["query"], row["database"], row["rank"]) for row in listed.to_pylist() if k is None or row["rank"] < k
        }
        shown = worst_first(chosen, judged=True)
        errors = [
            INF if row["reason"] or row["unrelated"] else max(row["rotation_error"], row["translation_error"])
            for row in shown.to_pylist()
        ]
        np.testing.assert_allclose(errors[::-1], evaluation.errors["fixed", "opencv", k])


def test_without_truth_the_fewest_inliers_come_first():
    listed, poses, queries = random_run(1)
    shown = worst_first(shown_pairs(listed, poses, queries, None), judged=False).to_pylist()
    inliers = [-1 if row["reason"] else row["inliers"] for row in shown]
    assert inliers == sorted(inliers)
    asking = {*listed["query"].to_pylist()} & {row["query"] for row in queries.to_pylist() if row["known"]}
    assert sorted(row["query"] for row in shown) == sorted(asking)


def test_a_query_that_cannot_be_judged_is_not_shown_among_the_judged():
    listed, poses, queries = random_run(5)
    poses = poses.set_column(poses.schema.get_field_index("truth"), "truth", poses["unrelated"])
    shown = worst_first(shown_pairs(listed, poses, queries, None), judged=True).to_pylist()
    assert shown
    assert all(row["reason"] or row["unrelated"] for row in shown)
    truth = dict(zip(queries["query"].to_pylist(), queries["truth"].to_pylist(), strict=True))
    assert all(truth[row["query"]] for row in shown)


SIX = ("worst", "2", "3", "4", "median", "best")


@pytest.mark.parametrize(
    ("total", "count", "rows"),
    [(20, 12, [0, 1, 2, 3, 10, 19]), (20, 2, [0, 19]), (20, 1, [0]), (20, 0, []), (1, 9, [0]), (0, 6, []),
     (3, 6, [0, 1, 2]), (7, 6, [0, 1, 2, 3, 6])],
)  # fmt: skip
def test_the_worst_the_median_and_the_best_are_shown(total, count, rows):
    found = illustrated(range(total), count, SIX)
    assert [row for _, row in found] == rows
    assert all(why == "best" for why, row in found if row == total - 1 > 0)


def test_a_pair_is_shown_once_whichever_image_asks():
    pairs_ = ["ab", "ab", "cd", "ef", "ab", "ef", "gh"]
    assert illustrated(pairs_, 6, SIX) == [("worst", 0), ("2", 2), ("median", 3), ("best", 6)]


def result_row(scene, protocol, k, unit="query", seed=0, **more):
    rng = np.random.default_rng([seed, *f"{scene}{protocol}{k}{unit}".encode()])
    row = {"scene": scene, "unit": unit, "k": k, "protocol": protocol, "estimator": "opencv"}
    row |= {"threshold_px": 1.5 if protocol == "fixed" else 0.5}
    row |= {name: int(rng.integers(100, 10_000)) for name in COUNTS}
    return row | {name: float(rng.random() * (1 if "@" in name else 900)) for name in SCORES} | more


def example(**changes):
    rows = [
        result_row(scene, protocol, k, unit)
        for unit, k in (("query", 1), ("query", 5), ("query", None), ("pair", None))
        for protocol in ("paper", "fixed")
        for scene in ("castle", "fountain", MEAN, POOLED)
    ]
    points = np.random.default_rng(0).random((9, 2))
    links = Links(points, points, np.arange(9) < 7, np.arange(9) < 4)
    queries = [
        PosedQuery("worst", photo("q0.jpg"), photo("d0.jpg"), 1, 9, 0, links, reason=FEW),
        PosedQuery("second worst", photo("q1.jpg"), photo("d1.jpg"), 1, 9, 7, links, unrelated=True),
        PosedQuery("median", photo("q2.jpg"), photo("d2.jpg"), 2, 9, 7, links, 6.25, 1.5),
        PosedQuery("best", photo("q3.jpg"), photo("d3.jpg"), 3, 1234, 777, None, 0.25, 0.125),
    ]
    report = PoseReport(
        results=pa.Table.from_pylist(rows, schema=RESULTS),
        headline=("fixed", "opencv", 1),
        judged=True,
        curves={k: [("opencv, paper, 0.5 px", some_errors(9)), ("opencv, fixed, 1.5 px", some_errors(9, 1))]
                for k in (1, 5, None)},
        reasons={FEW: 31, UNKNOWN: 4},
        pairs=1234,
        queries=queries,
    )  # fmt: skip
    return Report(title="A run", radius=None, poses=dataclasses.replace(report, **changes))


def test_every_number_of_the_results_is_in_the_table():
    report = example()
    words = Page(write_report(report)).words
    for row in report.poses.results.to_pylist():
        numbers = [f"{100 * row[f'auc@{at}']:.1f}" for at in (5, 10, 20)]
        numbers += [f"{row[f'median_{kind}_deg']:.2f}" for kind in ("rotation", "translation")]
        numbers += [f"{row['median_inliers']:.0f}", f"{row['mean_matches']:.0f}"]
        numbers += [str(row[key]) for key in ("judged", "failed", "unrelated", "unjudged", "left_out")]
        name = {MEAN: "mean of the scenes", POOLED: "all in one"}.get(row["scene"], row["scene"])
        assert f"{name} {' '.join(numbers)}" in words


def test_the_headline_names_protocol_estimator_threshold_and_choice():
    report = example()
    words = Page(write_report(report)).words
    assert (
        "protocol fixed , estimator opencv , threshold 1.5 px , queries judged by the first pair ; mean over 2" in words
    )
    (top,) = (row for row in report.poses.results.to_pylist()
              if (row["scene"], row["protocol"], row["k"]) == (MEAN, "fixed", 1))  # fmt: skip
    for at in (5, 10, 20):
        assert f"AUC@{at}° {100 * top[f'auc@{at}']:.1f} %" in words
    assert f"queries without a pose {top['failed']:,} of {top['judged']:,} judged" in words
    assert re.search(r"paper · opencv · 0.5 px \(chosen on these queries: optimistic\)", words)
    assert "Pairs without a pose: 35 of 1,234" in words
    assert f"{FEW} 31 {UNKNOWN} 4" in words


def test_queries_are_shown_with_their_errors():
    words = Page(write_report(example())).words
    for text in (
        f"worst ✗ no pose: {FEW} 9 matches, 3 of them false q0.jpg with its pair #1, d0.jpg",
        "second worst ✗ a pose between scenes 7 inliers of 9 matches, 3 of the inliers false",
        "median ✗ pose error 6.25° rotation 6.25°, translation 1.50° 7 inliers of 9 matches, 3 of the inliers false",
        "best ✓ pose error 0.25° rotation 0.25°, translation 0.12° 777 inliers of 1,234 matches, which cannot be read",
    ):
        assert text in words


def test_the_page_of_a_given_list_has_no_ranking_and_is_whole():
    html = write_report(example())
    page = Page(html)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {"poses", "timings", "quarantine", "run"} <= {*ids}
    assert not {"queries", "scores"} & {*ids}
    links = [attrs["href"][1:] for _, attrs in page.elements if attrs.get("href", "").startswith("#")]
    assert {*links} <= {*ids}
    assert "vote for each other" not in page.words
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert html == write_report(example())
    ranked_page = Page(write_report(dataclasses.replace(example(), radius=0.2)))
    assert {"poses", "queries", "scores"} <= {attrs["id"] for _, attrs in ranked_page.elements if "id" in attrs}


def test_names_and_reasons_are_text_never_markup():
    query = PosedQuery("worst", photo(EVIL), photo(EVIL), 1, 9, 0, reason=EVIL)
    results = pa.Table.from_pylist([result_row(s, "fixed", 1) for s in (EVIL, MEAN, POOLED)], schema=RESULTS)
    curves = {1: [(EVIL, some_errors(5))]}
    page = Page(write_report(example(results=results, queries=[query], reasons={EVIL: 2}, curves=curves)))
    assert len(page.all("script")) == 1
    assert page.words.count(EVIL) >= 5


def test_all_pairs_are_a_case_of_their_own_only_where_they_differ():
    rows = [result_row(scene, "fixed", 5) for scene in ("s", MEAN, POOLED)]
    both = pa.Table.from_pylist(rows + [row | {"k": None} for row in rows], schema=RESULTS)
    assert ks_of(both) == [5]
    other = [row | {"k": None, "failed": row["failed"] + 1} for row in rows]
    assert ks_of(pa.Table.from_pylist(rows + other, schema=RESULTS)) == [5, None]
    assert choice(None) == "by the best of all pairs"


def test_without_truth_inliers_are_told_and_no_score():
    rows = [
        result_row(scene, protocol, 1, **{name: None for name in SCORES if "@" in name or name.endswith("deg")})
        for protocol in ("paper", "fixed")
        for scene in ("s", MEAN, POOLED)
    ]
    report = example(judged=False, results=pa.Table.from_pylist(rows, schema=RESULTS), curves={})
    page = Page(write_report(report))
    assert "no true poses of these images are known" in page.words
    pooled = rows[-1]
    assert f"median inliers {pooled['median_inliers']:.0f} mean matches {pooled['mean_matches']:.0f}" in page.words
    assert f"queries without a pose {pooled['unposed']:,} of {pooled['unjudged']:,}" in page.words
    assert "AUC" not in page.words
    assert "paper" not in page.words
    assert not [svg for svg in page.all("svg") if svg.get("class") == "plot"]


def known_cameras(posed=True):
    made = [matched_runs.camera(i) for i in range(len(NAMES))]
    poses = [camera.cam_from_world if posed else None for camera in made]
    return Cameras.of(
        KnownCamera(name, camera.K, pose, "other" if name == STRANGER else "", *SIZE)
        for name, camera, pose in zip(NAMES, made, poses, strict=True)
    )


WRONG, STRANGER = ("a/0.jpg", "a/1.jpg"), "b/deep/4.jpg"


@pytest.fixture
def run(tmp_path):
    """A relative-pose run that was given its pairs: true poses but for `WRONG`, and `STRANGER` is of another world."""
    output = matched_runs.write(tmp_path)
    cfg = config.load([f"{output}/config.yaml"], [], pose={"thresholds": [], "ks": [1]})
    cameras = known_cameras()
    cameras.write(f"{output}/cameras.parquet")
    listed = pairs.ranked(pa.table({"query": [a for a, _ in LISTED], "database": [b for _, b in LISTED]}))
    rows = []
    for pair in pairs.unordered(listed).to_pylist():
        names = pair["image0"], pair["image1"]
        row = pair | {"estimator": "opencv", "threshold": 1.5, "unrelated": False, "matches": 0, "inliers": 0}
        row["truth"] = {*names} <= {*NAMES} and names[0] != names[1]
        if LOST in names:
            row["reason"] = QUARANTINED
        elif not {*names} <= {*NAMES} or names == FAILED or names[0] == names[1]:
            row["reason"] = FEW
        else:
            made = [cameras.get(name).cam_from_world for name in names]
            pose = made[1] @ np.linalg.inv(made[0])
            if names == WRONG:
                pose = pose @ pose_from_rt(cv2.Rodrigues(np.radians([0, 0, 30.0]))[0], np.zeros(3))
            pose[:3, 3] /= np.linalg.norm(pose[:3, 3])
            row |= {"cam1_from_cam0": pose[:3].ravel(), "inliers": 500 if names == WRONG else 50, "matches": 270}
            row["unrelated"] = STRANGER in names
            if not row["unrelated"]:
                row |= {"rotation_error": 30.0 if names == WRONG else 0.0, "translation_error": 0.0}
        rows.append(row)
    poses = pa.Table.from_pylist(rows, schema=SCHEMA)
    queries = pa.table({"query": NAMES, "scene": [name[0] for name in NAMES], "known": [True] * len(NAMES)})
    queries = queries.append_column("truth", queries["known"])
    listed = listed.filter(pa.compute.is_in(listed["query"], pa.array(NAMES)))
    for name, table in (("listed", listed), ("poses", poses), ("queries", queries)):
        pq.write_table(table, f"{output}/{name}.parquet")
    counts = {"root": str(tmp_path / "images"), "features": cfg.features_path, "matches": cfg.matches_path}
    counts |= {"images_with_features": 8, "pairs_matched": 16, "pairs_unmatched": {UNKNOWN: 1, QUARANTINED: 1}}
    job = Run(output, "relative-pose", counts | {"pairs_without_pose": {FEW: 3}}, {"matching": 2.0})
    return cfg, job, evaluate(listed, poses, cfg.pose, queries)


def figures(html):
    """(caption, classes of the lines) of every drawn pair."""
    found = []
    for text in re.findall(r'<figure class="card">.*?</figure>', html, re.DOTALL):
        page = Page(text)
        found.append(
            (page.words, [attrs["class"] for attrs in page.all("g") if attrs["class"] in ("true", "false", "open")])
        )
    return found


def test_the_page_is_written_from_the_directory_of_a_run_without_a_ranking(run):
    cfg, job, evaluation = run
    html = Path(write_page(cfg, job, None, evaluation)).read_text()
    page = Page(html)
    assert "images 8 pairs 18 quarantined files 1" in page.words
    assert f"{LOST} torn" in page.words
    drawn = figures(html)
    stranger, failed, wrong = drawn[:3]
    assert "a pose between scenes" in stranger[0]
    assert f"{STRANGER} with its pair #1, a/0.jpg" in stranger[0]
    assert {*stranger[1]} == {"false"}
    assert failed == (f"second worst ✗ no pose: {FEW} 0 matches b/5.jpg with its pair #1, a/0.jpg", [])
    assert wrong[0].startswith("median ✗ pose error 30.00° rotation 30.00°, translation 0.00° 500 inliers of 270")
    assert "a/0.jpg with its pair #1, a/1.jpg" in wrong[0]
    assert len(wrong[1]) < 20, "hardly a match agrees with a wrong pose"
    best, kinds = drawn[-1]
    assert best.startswith("best ✓ pose error 0.00°")
    assert kinds.count("true") > 40
    assert kinds.count("false") == 0, "what agrees with the true pose is no false match"


def test_wrong_pair_is_shown_once_though_both_images_ask(run):
    cfg, job, evaluation = run
    captions = [caption for caption, _ in figures(Path(write_page(cfg, job, None, evaluation)).read_text())]
    assert sum("30.00°" in caption for caption in captions) == 1


def test_the_page_says_so_where_stores_and_photographs_are_gone(run, tmp_path):
    cfg, job, evaluation = run
    shutil.rmtree(tmp_path / "images")
    for number in range(9):
        (tmp_path / "run" / "matches" / f"shard-{number:05d}.parquet").unlink(missing_ok=True)
    html = Path(write_page(cfg, job, None, evaluation)).read_text()
    drawn = figures(html)
    assert drawn
    assert all("which cannot be read now" in caption and not kinds for caption, kinds in drawn)
    assert "(the file cannot be read now)" in html


def test_the_page_of_a_run_whose_truth_is_unknown(run):
    cfg, job, _ = run
    known_cameras(posed=False).write(job.path("cameras.parquet"))
    listed, poses, queries = (pq.read_table(job.path(f"{name}.parquet")) for name in ("listed", "poses", "queries"))
    nothing = {"truth": False, "unrelated": False, "rotation_error": None, "translation_error": None}
    poses = pa.Table.from_pylist([row | nothing for row in poses.to_pylist()], schema=SCHEMA)
    queries = queries.set_column(3, "truth", pa.array([False] * len(NAMES)))
    for name, table in (("poses", poses), ("queries", queries)):
        pq.write_table(table, job.path(f"{name}.parquet"))
    evaluation = evaluate(listed, poses, cfg.pose, queries)
    html = Path(write_page(cfg, job, None, evaluation)).read_text()
    drawn = figures(html)
    assert drawn[0][0].startswith("fewest inliers")
    assert {kind for _, kinds in drawn for kind in kinds} == {"open"}
    assert "no true poses of these images are known" in Page(html).words
    write_curves(job, evaluation)
    assert not Path(job.path("curves.png")).exists()


def test_curves_are_files_of_the_run(run):
    _, job, evaluation = run
    write_curves(job, evaluation)
    assert decode(Path(job.path("curves.png")).read_bytes()).shape[2] == 3
    assert Path(job.path("curves.svg")).read_bytes().startswith(b"<?xml")


def test_a_page_written_again_shows_the_overlaps_that_its_run_knew(tmp_path):
    trees.megadepth(tmp_path / "benchmark")
    cfg = config.load(
        output=str(tmp_path / "run"), dataset={"format": "megadepth", "root": str(tmp_path / "benchmark")}
    )
    ranked_run, given = Run(cfg.output, "register", {"pairs": 3}), Run(cfg.output, "relative-pose", {})
    truth = open_benchmark(cfg).truth

    def same(found):
        return found.names == truth.names and np.array_equal(found.matrix.toarray(), truth.matrix.toarray())

    assert same(known_overlaps(cfg, ranked_run))
    assert known_overlaps(cfg, given) is None  # no page of it shows overlaps
    first, *others = (tmp_path / "benchmark").rglob("*.jpg")
    for path in others:
        path.unlink()
    assert same(known_overlaps(cfg, ranked_run)), "images that are gone are not missed"
    write_overlap(tmp_path / "overlap.parquet", OverlapTruth(truth.names, np.eye(len(truth.names), dtype=np.float32)))
    own = dataclasses.replace(cfg, truth=str(tmp_path / "overlap.parquet"))
    assert known_overlaps(own, ranked_run).matrix.sum() == len(truth.names), (
        "what the user gave comes before the benchmark's own"
    )
    first.unlink()
    with pytest.warns(UserWarning, match="without the true overlaps: none of the 3 images"):
        assert known_overlaps(cfg, ranked_run) is None
    shutil.rmtree(tmp_path / "benchmark")
    with pytest.warns(UserWarning, match="without the true overlaps: nothing at dataset.root"):
        assert known_overlaps(cfg, ranked_run) is None
    (tmp_path / "overlap.parquet").unlink()
    with pytest.warns(UserWarning, match="without the true overlaps"):
        assert known_overlaps(own, ranked_run) is None
    plain = dataclasses.replace(cfg, dataset=config.load().dataset)
    assert known_overlaps(plain, ranked_run) is None
