"""The default settings on photographs with known overlaps, which are not part of the project."""

from pathlib import Path

import numpy as np
import pytest

import vop
from vop import metrics
from vop.datasets.posed import overlap_truth
from vop.evaluation import ranked_names

OFFICE = Path(__file__).resolve().parents[2] / "shared" / "data" / "rgbd_office"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OFFICE.is_dir(), reason=f"the photographs of {OFFICE} are not here"),
]


@pytest.fixture(scope="module")
def truth():
    return overlap_truth(OFFICE)


@pytest.fixture(scope="module")
def registered(local_ray, tmp_path_factory):
    """A run with the default settings on all frames, judged by itself."""
    output = tmp_path_factory.mktemp("office")
    return vop.register(images=str(OFFICE), truth=str(OFFICE), output=str(output), report={"queries": 0})


def assert_good(ranked, truth, names):
    judged = metrics.retrieval({name: ranked[name] for name in names}, truth.names, truth.matrix, min_overlap=0.3)
    assert judged["precision@1"] >= 0.96
    assert judged["precision@5"] >= 0.87


@pytest.mark.parametrize("part", [slice(None), slice(0, None, 2), slice(1, None, 2)], ids=["all", "even", "odd"])
def test_first_and_top_five_overlap_by_thirty_percent(registered, truth, part):
    assert_good(ranked_names(registered.path("pairs.parquet")), truth, sorted(truth.names)[part])


def test_frames_that_the_whitening_was_not_fitted_on(local_ray, truth, tmp_path):
    """A store calibrated on the even frames takes in the others without a new calibration."""
    names = sorted(truth.names)
    (tmp_path / "even.txt").write_text("".join(f"{OFFICE / name}\n" for name in names[::2]))
    store = str(tmp_path / "store")
    vop.embed(images=str(tmp_path / "even.txt"), store=store, output=str(tmp_path / "even"))
    run = vop.register(images=str(OFFICE), store=store, output=str(tmp_path / "all"), report={"queries": 0})
    assert run.counts["embedded_now"] == len(names[1::2])
    assert_good(ranked_names(run.path("pairs.parquet")), truth, names[1::2])


def test_patches_of_one_byte_a_number_rank_as_well(local_ray, truth, tmp_path):
    run = vop.register(images=str(OFFICE), output=str(tmp_path), embedding={"dtype": "int8"}, report={"queries": 0})
    assert_good(ranked_names(run.path("pairs.parquet")), truth, truth.names)


def test_an_order_that_knows_nothing_is_far_below(truth):
    """So the bounds say something about the ranking, and not about the truth."""
    rng = np.random.default_rng(0)
    shuffled = {query: list(rng.permutation([name for name in truth.names if name != query])) for query in truth.names}
    judged = metrics.retrieval(shuffled, truth.names, truth.matrix, min_overlap=0.3)
    assert judged["precision@1"] < 0.3
    assert judged["precision@5"] < 0.3


def test_the_run_judges_itself_alike(registered, truth):
    ranked = ranked_names(registered.path("pairs.parquet"))
    assert registered.counts["queries"] == registered.counts["queries_with_pairs"] == len(ranked) == 93
    judged = metrics.retrieval(ranked, truth.names, truth.matrix, min_overlap=0.3)
    assert {key: registered.metrics[key] for key in judged} == judged
