"""`vop train` under Ray: against the plain loop, on two workers, killed, gone on with."""

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from processes import Job
from safetensors.torch import load_file

from vop import config, pipeline
from vop.config import ConfigError
from vop.models.encoder import load_encoder
from vop.schema import ClusterConfig
from vop.stages import train as stage
from vop.steps import training
from vop.training import checkpoint, loop
from vop.training.learner import LossError
from vop.training.loop import Work
from vop.training.place import Place

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def asked(images: Path, output: Path, **train) -> config.Config:
    listed = output.parent / "validation.txt"
    names = sorted(path.name for path in images.glob("*.jpg"))
    listed.write_text("".join(f"{name}\n" for name in names[1::4]))
    given = {"validation": str(listed), "epochs": 2, "batch_size": 8, "descriptor_dim": 32, "dropout": 0.0,
             "positives_per_scene": 24, "negatives_per_scene": 16, "validation_pairs": 10, "checkpoint_steps": 2,
             "learning_rate": 1e-3, "start": "matches", "cache": str(output.parent / "cache")}  # fmt: skip
    return config.load(
        images=str(images),
        cameras=str(images),
        output=str(output),
        min_overlap=0.1,
        train=given | train,
        report={"queries": 0},
    )


def finished(told: config.Config):
    """A finished run, and the place that its workers were given."""
    places = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", lambda place, told: (places.append(place), stage.fit(place, told))[1])
        job = pipeline.train(told)
    return job, places[0]


@pytest.fixture(scope="module")
def trained(rendered_collection, tmp_path_factory):
    """A finished run, and the place that its workers were given."""
    return finished(asked(rendered_collection, tmp_path_factory.mktemp("trained") / "run"))


def elsewhere(place: Place, folder: Path, **train) -> Place:
    """The same tokens and labels, a training of its own."""
    told = dataclasses.replace(place.config, output=str(folder), train=dataclasses.replace(place.config.train, **train))
    folder.mkdir()
    (folder / "start.safetensors").write_bytes(Path(place.config.output, "start.safetensors").read_bytes())
    return dataclasses.replace(place, config=told)


def plain(place: Place) -> None:
    """Train without Ray."""
    learner, read = place.learner(), place.reader()

    def batches(epoch: int, first: int):
        return (place.batch(read(rows)) for rows in place.shares(epoch, first, 0, 1))

    work = Work(place.folder, lambda epoch: place.steps(1, epoch), batches, place.validation())
    loop.train(learner, place.config.train, work)


def curve(folder) -> np.ndarray:
    history = pq.read_table(Path(folder) / "training.parquet")
    return np.array(history["loss"].drop_null().to_pylist())


def assert_same_weights(one, other, **tolerance) -> None:
    one, other = (load_file(Path(folder) / "best.safetensors") for folder in (one, other))
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


def test_a_training_ends_with_an_encoder_that_register_takes(trained, rendered_collection, tmp_path):
    job, place = trained
    encoder = load_encoder(job.counts["encoder"])
    assert (encoder.input_dim, encoder.descriptor_dim) == (256, 32)
    assert place.store.manifest["width"] == 0, "training stores no patches"
    assert encoder.trained_with["backbone"] == place.store.manifest["features"]["backbone"]
    assert job.counts["steps"] == sum(place.steps(1, epoch) for epoch in range(2))
    assert 0 < job.metrics["precision"] <= 1 and "recall@1" in job.metrics
    card = Path(job.counts["encoder"], "README.md").read_text()
    assert "not stated" in card and f"{job.metrics['precision']:.4f}" in card
    registered = pipeline.register(
        config.load(
            images=str(rendered_collection),
            output=str(tmp_path / "run"),
            encoder=job.counts["encoder"],
            truth=str(rendered_collection),
            min_overlap=0.1,
            report={"queries": 0},
        )
    )
    assert registered.metrics["precision@1"] > 2 * registered.metrics["chance"]


def test_one_worker_learns_what_plain_pytorch_learns(trained, tmp_path):
    _, place = trained
    plain(elsewhere(place, tmp_path / "plain"))
    np.testing.assert_allclose(curve(place.folder), curve(tmp_path / "plain"), rtol=1e-5)
    assert_same_weights(place.folder, tmp_path / "plain", rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc")
def test_a_killed_training_goes_on_with_two_workers_one_of_them_killed_to_the_same_weights(
    trained, rendered_collection, local_ray, tmp_path, monkeypatch
):
    """The driver dies, and the cluster it used goes on. Tokens and labels are those of the undisturbed run."""
    output = trained[0].output
    asked_for = dataclasses.replace(
        asked(rendered_collection, tmp_path / "run"), tokens=f"{output}/tokens", pair_labels=output
    )
    driver = Job("train", dataclasses.replace(asked_for, cluster=ClusterConfig(address=local_ray)), tmp_path)
    try:
        driver.wait_until(lambda: any((tmp_path / "run" / "checkpoints").glob("*.json")))
    finally:
        driver.kill()
    killed = []

    def fit(place: Place, told) -> None:
        def told_and_killed(row: dict) -> None:
            told(row)
            if not killed:
                killed.append(kill_a_worker())

        stage.fit(place, told_and_killed)

    monkeypatch.setattr(training, "fit", fit)
    job = pipeline.train(dataclasses.replace(asked_for, train=dataclasses.replace(asked_for.train, workers=2)))
    assert killed, "no worker was found that could be killed"
    assert 0 < job.counts["steps_now"] < trained[0].counts["steps"] == job.counts["steps"]
    assert not [*(tmp_path / "run").glob("labels-*")] and job.counts["embedded_now"] == 0
    assert_same_weights(output, tmp_path / "run", rtol=1e-3, atol=1e-5)


def test_a_share_that_is_not_finite_stops_all_workers_at_once(trained, tmp_path):
    """The fourth batch, of which the second worker's share is spoilt: nobody learns from it, nobody tries again."""
    place = elsewhere(trained[1], tmp_path / "nan", workers=2)
    spoilt = next(place.shares(0, 3, 1, 2))["view0"].to_pylist()

    class Spoilt(Place):
        def learner(self, *given):
            learner = super().learner(*given)
            (tmp_path / f"started-{learner.rank}-{os.getpid()}").touch()
            return learner

        def batch(self, rows):
            batch = super().batch(rows)
            if rows["view0"].to_pylist() == spoilt:
                batch.inputs1[0, 0] = math.nan
            return batch

    rows = []
    with pytest.raises(LossError, match=r"step 3 has .*learning_rate=0\.001.*nan/nan-batch-[01]\.safetensors"):
        stage.fit(Spoilt(**vars(place)), rows.append)
    assert sorted(path.name[:9] for path in tmp_path.glob("started-*")) == ["started-0", "started-1"]
    saved = [load_file(tmp_path / "nan" / f"nan-batch-{rank}.safetensors") for rank in (0, 1)]
    assert [tensors["inputs1"].isfinite().all().item() for tensors in saved] == [True, False]
    progress, tensors = checkpoint.latest(str(tmp_path / "nan" / "checkpoints"))
    assert progress.step == 2 and all(value.isfinite().all() for value in tensors.values())
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0] if name.startswith("state."))


def test_another_training_is_refused_where_one_ended(trained, rendered_collection):
    folder = Path(trained[0].output)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = asked(rendered_collection, folder, learning_rate=2e-3, epochs=3)
    with pytest.raises(ConfigError, match=r"other settings:\n  train\.learning_rate: the run has 0\.001, now 0\.002\n"):
        pipeline.train(other)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    training.check_same(asked(rendered_collection, folder, epochs=3, workers=2))  # more of the same is welcome


def test_photographs_alone_teach_under_changing_light(rendered_collection, tmp_path):
    """Homographies between views, and the backbone in every step: no truth, no cached tokens."""
    names = sorted(path.name for path in rendered_collection.glob("*.jpg"))
    lists = {"scenes": names[:8], "validation": names[12:15]}
    for key, listed in lists.items():
        (tmp_path / key).write_text("".join(f"{name}\n" for name in listed))
    job, place = finished(asked(
        rendered_collection, tmp_path / "run", **{key: str(tmp_path / key) for key in lists}, supervision="homography",
        cached=False, warps=2, epochs=1, start="random", learning_rate=3e-3,
    ))  # fmt: skip
    assert job.counts["steps"] == 3 and not job.counts["pairs_without_labels"]
    assert np.isfinite(curve(job.output)).all()
    assert load_encoder(job.counts["encoder"]).descriptor_dim == 32
    untrained = place.validation()(place.learner())
    assert job.metrics["validation_loss"] < 0.95 * untrained["validation_loss"]
    assert job.metrics["precision"] > 0.2  # vectors of chance find 9 of 256 patches


def kill_a_worker() -> int:
    """SIGKILL of the last of Ray Train's workers on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::RayTrainWorker"):
                found.append(int(entry.name))
    os.kill(max(found), signal.SIGKILL)
    return max(found)
