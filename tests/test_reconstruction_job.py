"""`vop reconstruct` end to end on painted boards: two scenes in one pool, a stranger among them."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import boards
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vop import config, pipeline
from vop.stages import reconstruct

pytest.importorskip("pycolmap", reason="pycolmap, of the extra `localize`, is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
COUNT, STRANGER, ALONE = 6, "one/noise.png", "two/alone.png"
RESULTS = ("registered.parquet", "models.parquet", "unregistered.parquet", "verified.parquet", "database.db")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    boards.write(root / "images", {"one": 0, "two": 1}, COUNT)
    for seed, name in enumerate((STRANGER, ALONE)):
        pixels = np.random.default_rng(seed).integers(0, 256, (120, 160, 3), np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(root / "images" / name)
    names = sorted(str(path.relative_to(root / "images")) for path in root.glob("images/*/*.*g"))
    listed = [pair for pair in combinations(names, 2) if ALONE not in pair]
    (root / "pairs.txt").write_text("".join(f"{a} {b}\n" for a, b in listed))
    return config.load(
        images=str(root / "images"), cameras=str(root / "images"), pair_list=str(root / "pairs.txt"),
        output=str(root / "run"),
        matching={"method": "sift+nn", "max_keypoints": 500, "extractors": 1, "matchers": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def job(told):
    return pipeline.reconstruct(told)


def everything(output) -> dict[str, bytes]:
    folder = Path(output)
    paths = [*(folder / name for name in RESULTS), *sorted(folder.glob("models/*/*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_two_scenes_become_two_models(job):
    models = job.counts["models"]
    assert [(model["images"], model["foreign"]) for model in models] == [(COUNT, 0), (COUNT, 0)]
    assert {model["world"] for model in models} == {"one", "two"}
    assert all(model["largest_error"] < 0.01 and model["track_length"] > 2.5 for model in models)
    assert all(model["reprojection_error"] < 1 for model in models)
    scores = json.loads(Path(job.path("metrics.json")).read_text())
    assert scores["largest_center_error"] == round(max(model["largest_error"] for model in models), 6)
    assert (scores["models"], scores["mixed_models"]) == (2, 0)


def test_images_in_no_model_have_a_reason(job):
    left = {row["image"]: row["reason"] for row in pq.read_table(job.path("unregistered.parquet")).to_pylist()}
    assert left == {STRANGER: "none of its pairs was verified", ALONE: "no pairs"}
    assert job.counts["images_registered"] == 2 * COUNT


def test_the_summary_tells_all_of_it(job):
    text = job.summary()
    assert "registered   12 of 14 images in 2 models" in text
    assert "1 images not registered: no pairs" in text
    assert f"{COUNT} images of one: cameras off by at most 0." in text


def test_a_finished_reconstruction_is_not_computed_again_and_a_killed_one_is_finished(told, job):
    before = everything(told.output)
    again = pipeline.reconstruct(told)
    assert (again.counts["verified_now"], "map" in again.timings) == (0, False)
    assert again.counts["models"] == job.counts["models"]
    assert everything(told.output) == before
    for name in ("registered.parquet", "models/0/images.bin"):  # killed while the models were written
        Path(told.output, name).unlink()
    shutil.rmtree(Path(told.output, "models/1"))
    assert "map" in pipeline.reconstruct(told).timings
    assert everything(told.output) == before


def test_a_mapping_that_no_node_can_run_is_an_error(told, monkeypatch):
    """Nodes with CPUs enough were there when it began, and are lost."""
    seen = iter([64])
    monkeypatch.setattr(reconstruct.cluster, "cpus_of_a_node", lambda: next(seen, 4))
    monkeypatch.setattr(reconstruct, "CHECKED_S", 0.1)
    asked = replace(
        told, reconstruct=replace(told.reconstruct, threads=64), cluster=replace(told.cluster, no_progress_timeout_s=1)
    )
    with pytest.raises(ConnectionError, match="no node of the cluster had the 64 CPUs that a mapper needs"):
        list(reconstruct.map_groups(asked, lambda number, names: len(names), {0: ["a.jpg", "b.jpg"]}))


def test_a_mapper_takes_no_more_threads_than_a_node_has_cpus(told):
    asked = replace(told, reconstruct=replace(told.reconstruct, threads=64))
    assert [
        *reconstruct.map_groups(asked, lambda number, names: len(names), {0: ["a.jpg"], 1: ["b.jpg", "c.jpg"]})
    ] == [2, 1]
