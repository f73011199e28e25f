"""What `vop status` tells of a run, from files that a run would have left; real runs that die: test_interruption.py."""

import json
import os
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from vop import catalog, cli, config, files, run
from vop.config import ConfigError
from vop.parts import Parts
from vop.steps.status import Status
from vop.store import EmbeddingStore

FEATURES = {"backbone": {"name": "xfeat"}}
SHAPES = {"patches": 1, "width": 1, "global_width": 1, "token_width": 1, "dtype": "float16"}


def listing(names):
    return pa.table({"name": names, "scene": [""] * len(names), "size": [1] * len(names),
                     "modified_ns": [1] * len(names)})  # fmt: skip


def planned(path, images=10, size=2):
    store = EmbeddingStore.create(path, FEATURES, SHAPES, {})
    store.plan(listing([f"{i:02d}.jpg" for i in range(images)]), size, False, lambda name: name)
    return store


def written(store, number, bad=0, age_s=0.0):
    """The receipt of a shard, written so many seconds ago, and a table in the shard's place."""
    images = store.images().filter(pc.equal(store.images()["shard"], number))
    reasons = [
        {"image_id": line["image_id"], "name": line["name"], "content": None,
         "reason": f"'{line['name']}' cannot be decoded after {line['image_id']} bytes"}
        for line in images.slice(0, bad).to_pylist()
    ]  # fmt: skip
    facts = images.slice(bad).select(["image_id", "content", "width", "height", "scaled_width", "scaled_height"])
    pq.write_table(facts, files.join(store.path, f"shard-{number:05d}.parquet"))
    store.write_receipt(number, facts.num_rows, reasons, "0" * 64)
    then = time.time() - age_s
    os.utime(files.join(store.path, f"shard-{number:05d}.json"), (then, then))


@pytest.fixture
def told(tmp_path):
    return config.load(output=str(tmp_path / "run"), retrieval={"query_batch": 4})


def test_a_run_that_goes_on(told):
    with run.start(told, "embed") as job:
        job.started = "2020-01-01T00:00:00Z"
        run._recorded(job, run.RUNNING)
        store = planned(told.store_path)
        for number, age_s in enumerate((20, 10, 0)):
            written(store, number, bad=int(number == 1), age_s=age_s)
        found = Status.read(told.output)
        (stage,) = found.stages
        assert (found.outcome, found.holder["run"], found.record["run"]) == ("running", job.id, job.id)
        assert (stage.name, stage.unit, stage.done, stage.total, stage.bad) == ("embed", "images", 6, 10, 1)
        assert stage.reasons == {"... cannot be decoded after ... bytes": 1}
        assert stage.left_s == pytest.approx(20, abs=2)  # 4 images in 20 s, and 4 are left
        text = found.summary()
        assert "embed        6 of 10 images (60%), 1 without a result, 00:" in text
        assert "1: ... cannot be decoded" in text and f"process {os.getpid()} on" in text
    assert Status.read(told.output).outcome == "finished"


def test_receipts_of_an_earlier_run_say_nothing_of_the_present_rate(told):
    with run.start(told, "embed"):
        store = planned(told.store_path)
        for number, age_s in enumerate((7200, 7190, 7180)):
            written(store, number, age_s=age_s)
        assert Status.read(told.output).stages[0].left_s is None


def test_clocks_that_differ_give_no_negative_time(told):
    with run.start(told, "embed"):
        store = planned(told.store_path)
        for number, age_s in enumerate((-3600, -3500, -3600)):  # written in the future
            written(store, number, age_s=age_s)
        assert Status.read(told.output).stages[0].left_s > 0


def test_a_run_that_died_and_one_that_failed_and_one_that_was_interrupted(told):
    with run.start(told, "embed") as job:
        written(planned(told.store_path), 0)
    record = files.read_json(job.path("run.json"))
    files.write_json(job.path("run.json"), record | {"outcome": "running"})  # its last word
    found = Status.read(told.output)
    assert (found.outcome, found.holder) == ("died", None)
    assert "the same command continues" in found.summary() and found.stages[0].done == 2
    assert found.stages[0].left_s is None
    for error, outcome in ((RuntimeError("the roof is on fire"), "failed"), (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(type(error)), run.start(told, "embed"):
            raise error
        found = Status.read(told.output)
        assert found.outcome == outcome
        assert ("reason       the roof is on fire" in found.summary()) == (outcome == "failed")


def test_the_search_is_counted_by_its_parts(told):
    with run.start(told, "register") as job, job.progress("search", 10, 0, "queries") as bar:
        parts = Parts(told.output, "0123")
        for number in (0, 2):
            parts.write(number, pa.table({"query": ["a"]}))
        assert [(each.name, each.done, each.total) for each in Status.read(told.output).stages] == [("search", 8, 10)]
        parts.write(1, pa.table({"query": ["a"]}))
        assert Status.read(told.output).stages[0].done == 10  # the last part is a smaller one
        parts.remove()
        bar.update(10)
        assert Status.read(told.output).stages[0].done == 10


@pytest.mark.parametrize(("step", "unit"), [("verify", "pairs"), ("map", "images"), ("poses", "pairs")])
def test_what_only_the_run_knows_is_told_by_it(told, step, unit):
    with run.start(told, "reconstruct") as job:
        with job.progress(step, 10, 4, unit) as bar:
            (stage,) = Status.read(told.output).stages
            assert (stage.name, stage.unit, stage.done, stage.total) == (step, unit, 4, 10)
            bar.update(6)
        assert Status.read(told.output).stages[0].done == 10


def test_a_live_image_is_not_counted_twice_once_the_catalog_knows(told):
    with run.start(told, "embed"):
        store = planned(told.store_path, images=4)
        for number in (0, 1):
            written(store, number, bad=number)
        assert (before := Status.read(told.output).stages[0]).done == before.total == 4
        assert store.finish()["status"].to_pylist().count(catalog.QUARANTINED) == 1
        after = Status.read(told.output).stages[0]
        assert (after.done, after.bad, after.reasons) == (before.done, before.bad, before.reasons)


def test_the_journal_has_every_step_and_bears_the_runs_id(told):
    with run.start(told, "embed") as job, job.progress("embed", 3, 1, "images") as bar:
        bar.update(2, bad=1)
    lines = [json.loads(line) for line in files.read_bytes(job.path(f"logs/{job.id}.jsonl")).splitlines()]
    assert {line["run"] for line in lines} == {job.id}
    assert [line["event"] for line in lines] == ["started", "step", "step", "progress", "progress", "finished"]
    assert [line["step"] for line in lines if line["event"] == "step"] == ["total", "embed"]
    assert [(line["done"], line["bad"]) for line in lines if line["event"] == "progress"] == [(1, 0), (3, 1)]


def test_a_journal_that_cannot_be_written_does_not_end_the_run(told, capsys, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    with run.start(told, "embed") as job:
        monkeypatch.setattr("vop.journal.files.write_bytes", full)
        job.tell("a")
        job.tell("b")
        monkeypatch.undo()
    assert capsys.readouterr().err.count("cannot be written: [Errno 28] No space left") == 1


def test_where_no_run_wrote_nothing_is_told(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"no run has written in .*nothing"):
        Status.read(str(tmp_path / "nothing"))
    assert cli.main(["status", str(tmp_path / "nothing")]) == 2
    assert not (tmp_path / "nothing").exists()
