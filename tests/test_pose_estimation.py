"""What the pose stage writes of a pair: its pose, its errors, and whether anybody knows what is true."""

import matched_runs
import numpy as np
import pyarrow as pa
import pytest
from matched_runs import BLANK, FAILED, NAMES, SIZE

from vop import config, run
from vop.cameras import Cameras, KnownCamera
from vop.config import Config
from vop.datasets.image_sets import open_image_sets
from vop.datasets.layout import Benchmark
from vop.features import FeatureStore
from vop.matches import MatchStore
from vop.parts import Parts
from vop.pose_estimation import FEW, NO_CAMERA, SCHEMA, UNKNOWN, UNREADABLE, PoseEstimation, unmatched
from vop.schema import PoseConfig
from vop.steps import poses as steps

NO_POSE, OTHER, TWIN, NO_K = NAMES[1], NAMES[3], NAMES[4], NAMES[5]  # TWIN stands where NAMES[0] does
ONE = PoseConfig(estimators=["opencv"], thresholds=[], threshold=1.5)


def known_cameras() -> Cameras:
    """Of all images but `BLANK`, each with what its name above says."""
    made = {name: matched_runs.camera(i) for i, name in enumerate(NAMES)}
    poses = {name: camera.cam_from_world for name, camera in made.items()}
    poses[TWIN] = np.vstack([poses[TWIN][:3], [0, 0, 0, 1]])
    poses[TWIN][:3, 3] = -poses[TWIN][:3, :3] @ made[NAMES[0]].center
    poses[NO_POSE] = None
    return Cameras.of(
        KnownCamera(name, None if name == NO_K else made[name].K, poses[name], "other" if name == OTHER else "", *SIZE)
        for name in NAMES
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(image0, image1) -> row, of every pair that was matched."""
    folder = tmp_path_factory.mktemp("run")
    cfg = config.load([f"{matched_runs.write(folder)}/config.yaml"])
    known_cameras().write(cfg.output + "/cameras.parquet")
    features, matches = FeatureStore.open(cfg.features_path), MatchStore.open(cfg.matches_path)
    parts = Parts(cfg.output, "made", "poses")
    estimate = PoseEstimation(ONE, features, matches, cfg.output + "/cameras.parquet", parts)
    shards = sorted(matches.receipts())
    for part, shard in enumerate(shards):
        count = matches.planned(shard).num_rows
        estimate(pa.table({"part": [part] * count, "shard": [shard] * count, "row": range(count)}))
    table = pa.concat_tables(parts.read(len(shards)))
    assert table.schema.equals(SCHEMA)
    return {(row["image0"], row["image1"]): row for row in table.to_pylist()}


def test_the_truth_of_a_pair_is_what_its_cameras_tell_whether_it_has_a_pose_or_not(found):
    assert len(found) == 16
    for names, row in found.items():
        nothing = BLANK in names or NO_POSE in names or names == (NAMES[0], TWIN)  # no pose known, or no baseline
        unrelated = not nothing and OTHER in names
        assert (row["truth"], row["unrelated"]) == (not nothing, unrelated), names
        assert (row["translation_error"] is not None) == (row["truth"] and not unrelated and row["reason"] is None)


def test_reasons_do_not_hide_the_truth(found):
    assert (found[FAILED]["reason"], found[FAILED]["truth"]) == (UNREADABLE, True)
    without_k = found[NAMES[2], NO_K]
    assert (without_k["reason"], without_k["truth"]) == (NO_CAMERA, True)
    assert (found[NAMES[0], BLANK]["reason"], found[NAMES[0], BLANK]["truth"]) == (NO_CAMERA, False)


def test_a_pair_from_one_place_has_a_rotation_but_no_direction_to_compare(found):
    row = found[NAMES[0], TWIN]
    assert row["reason"] is None
    assert row["rotation_error"] is not None
    assert row["translation_error"] is None  # null: not a number would be one to a program


@pytest.mark.parametrize(
    ("pair", "truth", "unrelated"),
    [
        ((NAMES[0], NAMES[2]), True, False),
        ((NAMES[0], OTHER), True, True),
        ((NAMES[0], NO_POSE), False, False),
        ((NAMES[0], "never/seen.jpg"), False, False),
        ((NAMES[0], NAMES[0]), False, False),
        ((NAMES[0], TWIN), False, False),
    ],
)
def test_pairs_that_were_never_matched(pair, truth, unrelated):
    two = PoseConfig(estimators=["opencv", "poselib"], thresholds=[3.0], threshold=1.5)
    rows = [*unmatched(*pair, UNKNOWN, two, known_cameras())]
    assert [(row["estimator"], row["threshold"]) for row in rows] == [
        (name, at) for name in two.estimators for at in (1.5, 3.0)
    ]
    assert all((row["image0"], row["image1"], row["reason"]) == (*pair, UNKNOWN) for row in rows)
    assert {(row["truth"], row["unrelated"]) for row in rows} == {(truth, unrelated)}
    pa.Table.from_pylist(rows, schema=SCHEMA)


def judged(cfg: Config, listed: list[tuple[str, str]], **counts):
    """What the step makes of pairs without any pose, and the queries that it judged."""
    benchmark = Benchmark(open_image_sets(cfg), known_cameras())
    pairs = pa.table({"query": [a for a, _ in listed], "database": [b for _, b in listed], "rank": [0] * len(listed)})
    rows = [row for a, b in listed for row in unmatched(*sorted((a, b)), FEW, cfg.pose, benchmark.cameras)]
    job = run.Run(cfg.output, "relative-pose", counts | {"pairs_without_pose": {FEW: len(listed)}})
    steps.judged(cfg, job, benchmark, pairs, pa.Table.from_pylist(rows, schema=SCHEMA))
    return job, {row["query"]: row for row in pa.parquet.read_table(job.path("queries.parquet")).to_pylist()}


@pytest.fixture
def cfg(tmp_path):
    output = matched_runs.write(tmp_path)
    return config.load([f"{output}/config.yaml"], [], pose={"thresholds": [], "ks": [1]})


def test_queries_that_a_ranking_found_nothing_for_have_failed(cfg):
    listed = [(NAMES[0], NAMES[2])]
    job, queries = judged(cfg, listed)
    assert [*queries] == [NAMES[0]]  # a list that was given says itself who asks
    assert (job.metrics["judged"], job.metrics["failed"]) == (1, 1)
    job, queries = judged(cfg, listed, pairs=1)
    assert [*queries] == sorted([*NAMES, BLANK, matched_runs.LOST])
    assert {name for name, row in queries.items() if not row["known"]} == {NO_K, BLANK, matched_runs.LOST}
    assert {name for name, row in queries.items() if not row["truth"]} == {NO_POSE, BLANK, matched_runs.LOST}
    assert [job.metrics[name] for name in ("judged", "failed", "unjudged", "unposed", "left_out")] == [4, 4, 1, 1, 3]
    del job.counts["pairs"]  # there was no ranking to sum up
    summary = job.summary()
    assert (
        "relative poses of 4 queries judged: 4 without one, 0 with one between scenes; 1 more cannot be judged "
        "for want of a true pose; 3 more have no known intrinsics" in summary
    )
    assert "AUC@5 0.0" in summary


def test_the_summary_says_that_nothing_could_be_judged(cfg):
    job, _ = judged(cfg, [(NO_POSE, NAMES[0]), (NO_POSE, NAMES[2]), (NO_K, NAMES[0])])
    assert job.metrics["auc@5"] is None
    summary = job.summary()
    assert "relative poses of 0 of 1 queries were estimated; 1 more have no known intrinsics" in summary
    assert "nothing could be judged: no true pose is known" in summary
    assert "AUC" not in summary
