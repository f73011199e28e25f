"""`vop localize` from end to end, on rendered photographs and on real ones whose poses are known."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("pycolmap", reason="needs the extra localize")

import vop
from vop import config
from vop.datasets import rendered
from vop.datasets.posed import write_cameras
from vop.image import to_jpeg
from vop.steps.status import Status

SIFT = {"matching": {"method": "sift+nn"}, "report": {"queries": 2}}
STRECHA = Path(__file__).resolve().parents[1].parent / "shared/data/strecha/fountain-P11"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Photographs of a walk: ten of a database, and queries in two folders; cameras.json has all their poses."""
    root = tmp_path_factory.mktemp("rooms")
    scene, cameras = rendered.scene_for(20, seed=1), {}
    for index in range(13):
        frame = rendered.render_frame(scene, index, 320, 240, 0.3, mixed=False)
        folder = {3: "monday", 9: "monday", 6: "tuesday"}.get(index, "map")
        (root / folder).mkdir(exist_ok=True)
        (root / folder / frame.name).write_bytes(to_jpeg(frame.image, 95))
        cameras[f"{folder}/{frame.name}"] = frame.camera
    (root / "tuesday" / "torn.jpg").write_bytes(b"no image")
    write_cameras(root, cameras)
    return root


def asked(root: Path, queries: str, output: Path, **more) -> dict:
    shared = {name: str(root / f"{name}-store") for name in ("store", "features", "matches", "map")}
    told = {"queries": str(root / queries), "database": str(root / "map"), "root": str(root), "cameras": str(root)}
    return told | shared | {"output": str(output), "embedding": {"max_bad_fraction": 0.5}} | SIFT | more


def test_queries_are_localized_and_a_map_serves_the_next_queries_too(local_ray, rooms, tmp_path):
    first = vop.localize(**asked(rooms, "monday", tmp_path / "monday"))
    assert (first.metrics["queries"], first.metrics["localized"]) == (2, 2)
    assert first.metrics["median_rotation_error"] < 0.5
    assert first.metrics["median_translation_error"] < 0.05  # metres, in a room
    assert first.counts["map"]["triangulated_now"] == 10
    told = first.summary()
    assert "localized    2 of 2 queries" in told
    assert "median error" in told
    assert json.loads((tmp_path / "monday/metrics.json").read_text())["recall@0.25m_2deg"] == 1

    second = vop.localize(**asked(rooms, "tuesday", tmp_path / "tuesday"))
    assert second.counts["map"]["triangulated_now"] == second.counts["map"]["matched_now"] == 0
    assert second.counts["map"]["extracted_now"] == 0
    assert second.counts["embedded_now"] == 2  # the new queries
    assert second.metrics["median_translation_error"] < 0.05
    rows = {row["query"]: row["reason"] for row in pq.read_table(tmp_path / "tuesday/localized.parquet").to_pylist()}
    assert rows == {"tuesday/0006.jpg": None, "tuesday/torn.jpg": "image in quarantine"}
    stages = {stage.name: stage for stage in Status.read(str(tmp_path / "tuesday")).stages}
    assert (stages["localize"].done, stages["localize"].total) == (2, 2)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pairs": {"budget": 5}}, "pairs"),
        ({"embedding": {"patches": False, "tokens": True}}, "embedding.patches"),
        ({"matching": {"method": "sift+n"}}, "did you mean 'sift\\+nn'"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(tmp_path, settings, complaint):
    told = {"queries": str(tmp_path), "database": str(tmp_path), "output": str(tmp_path / "run")}
    with pytest.raises(config.ConfigError, match=complaint):
        vop.localize(**(told | settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not STRECHA.exists(), reason="needs ../shared/data")
def test_real_photographs_of_a_facade(local_ray, tmp_path):
    names = sorted(path.name for path in (STRECHA / "images").glob("*.jpg"))
    for side, chosen in (("queries", names[2::4]), ("database", [n for n in names if n not in names[2::4]])):
        (tmp_path / f"{side}.txt").write_text("".join(f"{STRECHA / 'images' / name}\n" for name in chosen))
    told = {side: str(tmp_path / f"{side}.txt") for side in ("queries", "database")}
    run = vop.localize(**told, cameras=str(STRECHA), output=str(tmp_path / "run"), **SIFT)
    assert run.metrics["localized"] == run.metrics["queries"] == len(names[2::4])
    assert run.metrics["median_translation_error"] < 0.02
    assert run.metrics["median_rotation_error"] < 0.1
    assert np.isfinite(run.metrics["median_inliers"])
