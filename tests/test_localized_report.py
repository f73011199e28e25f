"""Localized queries and models in the report: the section, the map from above, and the picture by itself."""

import dataclasses
import re
from pathlib import Path

import cv2
import localized_runs
import numpy as np
import pytest
from localized_runs import OTHER, WORLD, looking, recorded, ring, shifted
from matplotlib.colors import LogNorm
from scipy.spatial.transform import Rotation
from test_pose_report import EVIL
from test_report import Page

from vop import pipeline
from vop.pose.localized import RECALLS, UNJUDGED, center, metrics
from vop.run import Run
from vop.steps.report import reported
from vop.viz.above import ERROR, FLATTEST, INLIERS, Above, Frame, upright
from vop.viz.above_plot import CAMERAS, above_file, draw, scale_of
from vop.viz.localized import LISTED, WORLDS, localized_report, localized_views, model_views
from vop.viz.localized_report import LocalizedReport, number
from vop.viz.report import Report, write_report


def turned(poses, seed=1):
    """The same cameras in a world that was turned and moved, and how points are turned with it: (n, 3) -> (n, 3)."""
    R, t = Rotation.random(random_state=seed).as_matrix(), np.array([1000.0, -500, 30])
    new = np.array(poses, float)[:, :3].copy()
    new[:, :, :3] = poses[:, :3, :3] @ R.T
    new[:, :, 3] -= new[:, :, :3] @ t
    return new, lambda points: points @ R.T + t


@pytest.mark.parametrize("seed", range(4))
def test_up_is_found_in_any_world_and_pictures_are_not_mirrored(seed):
    poses, turn = turned(ring(40), seed)
    axes = upright(poses)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) > 0
    x, _, z = turn(np.eye(3)) - turn(np.zeros((1, 3)))
    assert axes[2] @ z > 0.99
    assert abs(axes[0] @ x) > 0.99  # the room is longest along x


def test_pictures_taken_straight_down_are_seen_across_their_plane():
    rng = np.random.default_rng(0)
    at = rng.uniform([-50, -20, 30], [50, 20, 31], (60, 3))
    spin = [Rotation.from_euler("z", angle).as_matrix() for angle in rng.uniform(0, 2 * np.pi, 60)]
    rotations = np.array([np.diag([1.0, -1, -1]) @ each for each in spin])
    poses = np.concatenate([rotations, -rotations @ at[:, :, None]], axis=2)
    assert abs(upright(poses)[2] @ [0, 0, 1]) > 0.999
    assert abs(upright(poses)[0] @ [1, 0, 0]) > 0.99


def test_the_box_holds_the_map_and_what_is_near():
    poses = ring(60)[:, :3]
    queries = np.array([shifted(ring(60)[0], by)[:3] for by in ([1, 0, 0], [500, 0, 0])])
    frame = Frame.of(Above("", poses, queries=queries, values=np.zeros(2)))
    assert frame.inside(frame.flat(center(poses))).all()
    np.testing.assert_array_equal(frame.inside(frame.flat(center(queries))), [True, False])
    assert frame.size[0] < 20
    (edge,) = frame.border(frame.flat(center(queries))[1:])
    assert min(*np.abs(edge), *np.abs(edge - frame.size)) < 1e-9
    assert ((edge >= -1e-9) & (edge <= frame.size + 1e-9)).all()


def test_the_box_of_a_street_and_of_one_camera():
    street = np.array([looking([x, 0, 1], [x + 1, 0.1, 1])[:3] for x in np.linspace(0, 100, 30)])
    size = Frame.of(Above("", street)).size
    np.testing.assert_allclose(size[1], FLATTEST * size[0])
    assert (Frame.of(Above("", street[:1])).size > 1).all()
    assert (Frame.of(Above("", np.zeros((0, 3, 4)))).size > 1).all()


def test_cones_open_the_way_cameras_look():
    poses = ring(12)[:, :3]
    frame = Frame.of(Above("", poses))
    for cone, pose in zip(frame.cones(poses, 0.5), poses, strict=True):
        at, ahead = frame.flat(np.stack([center(pose), center(pose) + pose[2, :3]]))
        np.testing.assert_allclose(cone[0], at)
        middle, way = cone[1:].mean(axis=0) - at, ahead - at
        assert middle @ way / np.linalg.norm(middle) / np.linalg.norm(way) > 0.9999
        assert np.linalg.norm(middle) <= 0.5 + 1e-9


def example(errors=(0.01, 0.5, np.nan, np.inf), title="a world", measured=ERROR):
    true = ring(6, seed=2)[: len(errors)]
    queries = np.array([shifted(pose, [0.4, 0, 0])[:3] for pose in true]).reshape(-1, 3, 4)
    return Above(title, ring(30)[:, :3], np.random.default_rng(0).normal(size=(200, 3)), queries, np.array(errors),
                 center(true), measured)  # fmt: skip


def test_colours_tell_errors_by_their_logarithm_and_inliers_from_0():
    scale = scale_of([example((0.01, 0.02)), example((5.0, np.inf, np.nan))])
    assert isinstance(scale, LogNorm)
    assert 0.01 <= scale.vmin < 0.02
    assert scale.vmax == pytest.approx(5, rel=0.1)
    assert scale_of([example((12, 80), measured=INLIERS)]).vmin == 0
    assert scale_of([example((0.001, 0.002))]).vmax > 0.1  # of a room of 12: no error to be alarmed by
    for errors in ((), (np.nan,), (0.0,), (0.0, 0.0), (0.3,)):
        scale = scale_of([example(errors)])
        assert scale.vmin < scale.vmax


def test_the_drawing_tells_what_it_shows_and_is_the_same_again():
    svg = draw(example())
    page = Page(svg)
    (head,) = page.all("svg")
    assert head["aria-label"] == (
        "a world from above: 30 cameras of the database, 4 of queries, position error 0.01 to 0.5 units of the map"
    )
    for said in ("camera of the database, and the way it looks", "query, true pose unknown", "where it truly stood",
                 "query, in another world than it truly is", "position error, units of the map"):  # fmt: skip
        assert said in page.words
    assert draw(example()) == svg
    assert "currentColor" in svg
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)
    plain = Page(draw(Above("models/0", ring(30)[:, :3])))
    assert "camera, and the way it looks" in plain.words
    assert "query" not in plain.words


@pytest.mark.parametrize(
    ("errors", "database", "points", "true"),
    [
        ((), 1, 0, 0),
        ((np.nan,), 0, 0, 0),
        ((np.inf,), 30, 9, 1),
        ((0.0,), 1, 9, 1),
        ((1e-12, 1e9), 0, 9, 0),
        ((), 0, 0, 0),
    ],
)
def test_whatever_there_is_is_drawn(errors, database, points, true):
    view = example(errors)
    truth = view.truth if true else np.full((len(errors), 3), np.nan)
    Page(draw(dataclasses.replace(view, database=view.database[:database], points=view.points[:points], truth=truth)))


def test_many_cameras_are_thinned_and_it_is_said():
    svg = draw(Above("", ring(CAMERAS + 500)[:, :3]))
    assert f"({CAMERAS:,} of {CAMERAS + 500:,} are drawn)" in Page(svg).words
    assert len(svg) < 1e6


def test_the_picture_by_itself():
    views = [example(), example(title=f"{EVIL} $\\frac{{x}}$ {'long ' * 40}")]
    png, svg = (above_file(views, kind) for kind in ("png", "svg"))
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[1] > 1500
    assert len({*map(tuple, picture[::5, ::5].reshape(-1, 3).tolist())}) > 50
    assert svg.startswith(b"<?xml")
    assert b"<script>" not in svg


def test_numbers_are_short():
    assert [number(value) for value in (None, np.inf, 0.0123456, 12.345, 123456.0)] == [
        "–",
        "∞",
        "0.0123",
        "12.3",
        "123,456",
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that localized queries, one of a hostile name, with its report and pictures."""
    cfg, job, table = localized_runs.localized(tmp_path_factory.mktemp("localized"), EVIL)
    reported(cfg, job, None, localized=table)
    del job.timings["report"]  # which the page does not tell
    recorded(cfg, job)
    return cfg, job, table


def test_the_section_says_how_good_the_poses_are(run):
    _, job, table = run
    html = Path(job.report).read_text()
    page, scores = Page(html), metrics(table)
    assert scores["localized"] == 9
    assert "localized 9 of 11 queries" in page.words
    assert "in a wrong world 1 counted as failures" in page.words
    assert f"median position error {scores['median_translation_error']:.3g}" in page.words
    for key, (units, degrees) in RECALLS.items():
        assert f"{units:g} m and {degrees}° {100 * scores[key]:.1f}%" in page.words
    assert "Queries without a pose: 2 of 11" in page.words
    for row in ("RANSAC failed 1", "no pairs 1", "q/lost.jpg RANSAC failed 3 90", "q/nowhere.jpg no pairs 0 0"):
        assert row in page.words
    assert "Intrinsics of the queries: 6 from list, 4 from EXIF" in page.words
    order = [page.words.index(f"q/{number}.jpg 0.{number} ") for number in (7, 6, 5, 1)]
    assert order == sorted(order)
    assert "q/yard.jpg ∞ ∞" in page.words
    assert page.all("section", id="localized")
    assert page.all("a", href="#localized")


def test_hostile_names_are_text(run):
    html = Path(run[1].report).read_text()
    assert "<script>alert" not in html
    assert "Ünïcödé" in html
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)


def test_every_world_is_drawn_with_its_own(run):
    cfg, job, table = run
    hall, yard = localized_views(cfg, job, table)
    assert (hall.title, len(hall.database), len(hall.queries), len(hall.points)) == (WORLD, 40, 8, 900)
    assert (yard.title, len(yard.database), len(yard.queries), len(yard.points)) == (OTHER, 5, 1, 0)
    np.testing.assert_allclose(hall.values, np.linalg.norm(center(hall.queries) - hall.truth, axis=1), atol=1e-9)
    assert np.isinf(yard.values).all()
    assert np.isnan(yard.truth).all()  # it truly stood in the other
    plots = [attrs["aria-label"] for attrs in Page(Path(job.report).read_text()).all("svg", class_="plot")]
    assert sum("from above" in each for each in plots) == 2
    assert "40 cameras of the database, 8 of queries" in " ".join(plots)
    for name in ("localized.png", "localized.svg"):
        assert Path(job.path(name)).stat().st_size > 10_000


def test_the_report_is_written_again(run):
    cfg, job, _ = run
    before = Path(job.report).read_text()
    Path(job.report).unlink()
    again = pipeline.report(cfg)
    assert Path(again.report).read_text() == before
    assert again.command == "localize"


def test_without_truth_inliers_are_told(tmp_path):
    cfg, job, table = localized_runs.localized(tmp_path, truth=False)
    reported(cfg, job, None, localized=table)
    page = Page(Path(job.report).read_text())
    assert metrics(table)["unjudged"] == UNJUDGED
    assert "Nothing could be judged: the true pose of no query is known" in page.words
    assert "both errors below" not in page.words
    assert "Queries to look at, the fewest inliers first query" in page.words
    assert {view.measured for view in localized_views(cfg, job, table)} == {INLIERS}
    assert "8 of queries, inliers 10 to 80" in page.words


def test_a_run_without_any_pose_has_a_section_and_no_picture(tmp_path):
    cfg, job, table = localized_runs.localized(tmp_path)
    Path(job.path("localized.png")).write_text("of a run before")
    failed = table.filter(table["reason"].is_valid())
    reported(cfg, job, None, localized=failed)
    assert not Path(job.path("localized.png")).exists()
    page = Page(Path(job.report).read_text())
    assert "localized 0 of 2 queries" in page.words
    assert "The map from above" not in page.words


def test_without_a_map_or_cameras_queries_are_drawn_alone(tmp_path):
    cfg, job, table = localized_runs.localized(tmp_path)
    for name in ("map/map.parquet", "map/cameras.parquet", "cameras.parquet"):
        Path(job.path(name)).unlink()
    views = localized_views(cfg, job, table)
    assert [(len(view.database), len(view.points), len(view.queries)) for view in views] == [(0, 0, 8), (0, 0, 1)]


def test_of_many_worlds_some_are_drawn_and_of_many_failures_some_listed(run):
    cfg, job, table = run
    some = table.filter(table["reason"].is_null()).slice(0, 8).to_pylist()
    rows = [row | {"world": f"w{number}"} for number, row in enumerate(some)]
    wrong = {"reason": "RANSAC failed", "world": None, "cam_from_world": None}
    wrong |= dict.fromkeys(("rotation_error", "translation_error"), np.inf)
    lost = [some[0] | wrong | {"query": f"lost{number}"} for number in range(LISTED + 5)]
    report = localized_report(cfg, job, type(table).from_pylist([*rows, *lost], schema=table.schema))
    assert (len(report.views), report.hidden) == (WORLDS, 2)
    page = Page(write_report(Report("title", None, localized=report)))
    assert "The 6 worlds with most queries; 2 more are not drawn." in page.words
    assert f"The first {LISTED}; localized.parquet lists all of them." in page.words


def test_a_section_of_nothing():
    empty = {"queries": 0, "localized": 0, "median_inliers": None, "judged": 0, "unjudged": UNJUDGED}
    page = Page(write_report(Report("title", None, localized=LocalizedReport(empty))))
    assert "localized 0 of 0 queries" in page.words


def test_models_are_told_and_drawn(tmp_path):
    cfg, job = localized_runs.reconstructed(tmp_path, EVIL)
    reported(cfg, job, None, models=True)
    del job.timings["report"]  # which the page does not tell
    recorded(cfg, job)
    html = Path(job.report).read_text()
    page = Page(html)
    assert "Models (2)" in page.words
    assert "models/0 30 30,000 0.512 px 3.5 models/1 6 6,000" in page.words
    assert "Images in no model: 2" in page.words
    assert "<script>alert" not in html
    assert [(view.title, len(view.database)) for view in model_views(job)] == [("models/0", 30), ("models/1", 6)]
    for name in ("models.png", "models.svg"):
        assert Path(job.path(name)).stat().st_size > 5_000
    assert Path(pipeline.report(cfg).report).read_text() == html


def test_points_of_a_model_are_drawn(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    _, job = localized_runs.reconstructed(tmp_path)
    model = pycolmap.Reconstruction()
    points = np.random.default_rng(0).normal(size=(50, 3))
    for point in points:
        model.add_point3D(point, pycolmap.Track(), np.zeros(3, np.uint8))
    folder = Path(job.path("models")) / "0"
    folder.mkdir(parents=True)
    model.write_binary(folder)
    first, second = model_views(Run.read(job.output))
    np.testing.assert_array_equal(first.points, points)
    assert len(second.points) == 0
