"""The history as TensorBoard's events."""

import pytest

from vop.training.events import tensorboard


def test_what_a_resumed_training_repeats_is_shown_once(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra train is not installed"
    )
    for done, steps in ((0, (10, 20, 30)), (20, (30, 40))):  # killed after step 30, the last checkpoint at 20
        with tensorboard(str(tmp_path), done) as add:
            for step in steps:
                add({"epoch": 0, "step": step, "loss": step + done / 100, "precision": None})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    found = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert found == [(10, 10.0), (20, 20.0), (30, 30.2), (40, 40.2)]


def test_there_are_no_events_in_a_bucket():
    with tensorboard("s3://bucket/run/tensorboard", 0) as add:
        assert add is None
