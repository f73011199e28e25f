"""`vop train` under Ray: against the plain loop, on two workers, killed, gone on with."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from vop import config, pipeline
from vop.models.encoder import load_encoder
from vop.stages import train as stage
from vop.steps import training
from vop.training import loop
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


@pytest.fixture(scope="module")
def trained(rendered_collection, tmp_path_factory):
    """A finished run, and the place that its workers were given."""
    output = tmp_path_factory.mktemp("trained") / "run"
    places = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", lambda place, told: (places.append(place), stage.fit(place, told))[1])
        job = pipeline.train(asked(rendered_collection, output))
    return job, places[0]


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


def test_two_workers_one_of_them_killed_learn_the_same(trained, tmp_path):
    _, place = trained
    shared = elsewhere(place, tmp_path / "two", workers=2)
    killed = []

    def told(row: dict) -> None:
        if row["step"] >= 3 and not killed:
            killed.append(kill_a_worker())

    stage.fit(shared, told)
    assert killed, "no worker was found that could be killed"
    assert_same_weights(place.folder, tmp_path / "two", rtol=1e-3, atol=1e-5)


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
