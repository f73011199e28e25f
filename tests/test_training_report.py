"""What a person sees of a training: its page, its curves, and the lines of its summary."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import Page

import vop
from vop import config, files
from vop.config import ConfigError
from vop.image import decode
from vop.run import Run
from vop.training.card import card_rows, model_card
from vop.training.learner import LOSSES
from vop.training.loop import EVERY, SCHEMA, SCORES, History
from vop.viz.trained import write_training_curves, write_training_page
from vop.viz.training_curves import POINTS, epochs_of, loss_rows, throughput, training_file, training_plots
from vop.viz.training_report import TrainingReport, write_training_report

EVIL = "a b/<script>alert(1)</script> \"Ünïcödé\" & 'x'.jpg"
BATCH = 32


class Training:
    """A training as it may have gone: losses and seconds of every step, and the rows that the loop makes of them."""

    def __init__(self, epochs=3, steps=24, validated=("validation_loss", "precision", "recall@1", "recall@5"), seed=0):
        rng = np.random.default_rng(seed)
        self.epochs, self.steps = epochs, steps
        self.positive, self.negative = rng.uniform(0.1, 0.3, (2, epochs, steps))
        self.seconds = rng.uniform(0.5, 3, (epochs, steps))
        self.scores = [dict(zip(validated, rng.uniform(0.2, 0.8, len(validated)), strict=True)) for _ in range(epochs)]

    def losses(self, epoch, rows):
        positive, negative = (float(each[epoch, rows].mean()) for each in (self.positive, self.negative))
        return dict(zip(LOSSES, (positive + negative, positive, negative), strict=True))

    def rows(self, first=0, last=None):
        """Rows of the steps after `first` up to `last`, as one run of the loop adds them."""
        found = []
        for epoch in range(self.epochs):
            start = 0
            for batch in range(self.steps):
                step = epoch * self.steps + batch + 1
                if step <= first:
                    start = batch + 1
                elif step % EVERY == 0 or batch + 1 == self.steps:
                    rows = slice(start, batch + 1)
                    rate = BATCH * (batch + 1 - start) / float(self.seconds[epoch, rows].sum())
                    row = {"epoch": epoch, "step": step, "learning_rate": 1e-4 / (epoch + 1), "pairs_per_s": rate}
                    found.append(row | self.losses(epoch, rows))
                    start = batch + 1
            if (epoch + 1) * self.steps > first and self.scores[epoch]:
                found.append({"epoch": epoch, "step": (epoch + 1) * self.steps} | self.scores[epoch])
        return [row for row in found if last is None or row["step"] <= last]

    def history(self, *args):
        return pa.Table.from_pylist(self.rows(*args), schema=SCHEMA)


def report(training, **changes):
    told = {
        "title": "vop train: photos",
        "history": training.history(),
        "kept": 2 * training.steps,
        "best": "precision",
        "summary": [("pairs an epoch", "797")],
        "left_out": [("pairs", "depth map missing", 1200), ("images", "camera missing", 34)],
        "card": [("backbone", "xfeat")],
        "use": "vop register images=DIR output=DIR backbone=xfeat encoder=/data/run/encoder",
        "timings": [("labels", 61.0), ("train", 200.0)],
        "config_yaml": "train:\n  epochs: 3\n",
        "versions": {"vop": "0.1.0"},
    }
    return TrainingReport(**told | changes)


def words(*args, **changes):
    return Page(write_training_report(report(*args, **changes))).words


def test_means_and_rates_of_an_epoch_are_those_of_its_steps():
    training = Training(epochs=3, steps=24)
    found = epochs_of(training.history())
    assert [(epoch.number, epoch.first, epoch.last) for epoch in found] == [(1, 1, 24), (2, 25, 48), (3, 49, 72)]
    for number, epoch in enumerate(found):
        assert epoch.losses == pytest.approx(training.losses(number, slice(None)))
        assert epoch.pairs_per_s == pytest.approx(BATCH * 24 / training.seconds[number].sum())
        assert epoch.scores == training.scores[number]
        assert epoch.learning_rate == 1e-4 / (number + 1)
    assert throughput(found) == pytest.approx(BATCH * 72 / training.seconds.sum())


def test_a_page_is_well_formed_complete_and_loads_nothing():
    html = write_training_report(report(Training()))
    page = Page(html)
    assert not page.all("script")
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs[key][1:] for _, attrs in page.elements for key in ("href", "xlink:href") if attrs.get(key)}
    assert {link for link in links if not link.startswith("ata:")} <= set(ids)
    assert len(page.all("svg", role="img")) == 3
    assert all(svg["aria-label"] for svg in page.all("svg", role="img"))
    for text in ("vop train: photos", "pairs an epoch 797", "depth map missing 1,200", "Left out (1,234)",
                 "backbone xfeat", "encoder=/data/run/encoder", "labels 1 min 01 s", "epochs: 3",
                 "vop 0.1.0"):  # fmt: skip
        assert text in page.words
    assert html == write_training_report(report(Training()))


def test_the_kept_epoch_is_marked_with_its_scores():
    training = Training()
    shown = words(training)
    scores = training.scores[1]
    assert "kept epoch 2 after step 48" in shown
    assert f"precision {scores['precision']:.1%} decides what is kept" in shown
    assert f"recall@1 {scores['recall@1']:.1%} of these weights" in shown
    assert f"validation loss {scores['validation_loss']:.4f} of these weights" in shown
    assert shown.count("✓ kept") == 1
    row = re.search(r" 2 48 (.*?)✓ kept", shown).group(1)
    means = training.losses(1, slice(None)).values()
    assert row.split()[1:8] == [*(f"{value:.4f}" for value in means), f"{scores['validation_loss']:.4f}",
                                *(f"{scores[name]:.1%}" for name in SCORES[1:])]  # fmt: skip
    by_loss = words(training, best="loss")
    assert f"validation loss {scores['validation_loss']:.4f} decides what is kept" in by_loss
    assert "the epoch with the best validation loss" in by_loss


def test_without_validation_the_losses_are_all_there_is():
    training = Training(validated=())
    page = Page(write_training_report(report(training, kept=72)))
    assert len(page.all("svg", role="img")) == 1
    assert "There was no validation" in page.words
    assert "The weights after the last step" in page.words
    assert "kept epoch 3 after step 72" in page.words
    assert "precision –" not in page.words
    assert not any(epoch.scores for epoch in epochs_of(training.history()))


def test_without_overlaps_there_is_no_recall():
    shown = words(Training(validated=("validation_loss", "precision")))
    assert "recall@1 " not in shown
    assert "decides what is kept" in shown


def test_a_resumed_history_shows_every_epoch_once(tmp_path):
    training = Training(epochs=3, steps=24)
    killed = History(str(tmp_path), 0)
    for row in training.rows(0, 45):
        killed.add(row)
    killed.write()  # at step 45; the last checkpoint was at step 33
    resumed = History(str(tmp_path), 33)
    for row in training.rows(33):
        resumed.add(row)
    resumed.write()
    history = pq.read_table(tmp_path / "training.parquet")
    whole = loss_rows(training.history())["step"].to_pylist()
    assert loss_rows(history)["step"].to_pylist() == whole  # nothing twice, nothing lost
    found = epochs_of(history)
    assert [(epoch.first, epoch.last) for epoch in found] == [(1, 24), (25, 48), (49, 72)]
    assert [epoch.scores for epoch in found] == training.scores
    for number in (0, 2):  # of the second, the losses of steps 31 to 33 are not known any more
        assert found[number].losses == pytest.approx(training.losses(number, slice(None)))
    page = Page(write_training_report(report(training, history=history)))
    assert page.words.count("✓ kept") == 1


def test_more_epochs_are_added_to_those_before(tmp_path):
    first, longer = Training(epochs=2), Training(epochs=4)
    for training, done in ((first, 0), (longer, 48)):
        history = History(str(tmp_path), done)
        for row in training.rows(done):
            history.add(row)
        history.write()
    found = epochs_of(pq.read_table(tmp_path / "training.parquet"))
    assert [epoch.number for epoch in found] == [1, 2, 3, 4]
    assert [epoch.scores for epoch in found] == first.scores + longer.scores[2:]


def test_a_training_that_has_not_ended_keeps_nothing_yet():
    training = Training()
    shown = words(training, history=training.history(0, 40), kept=None, card=[], use=None)
    assert "There is none yet: the training has not ended" in shown
    assert "✓ kept" not in shown
    assert "kept epoch" not in shown
    nothing = words(training, history=SCHEMA.empty_table(), kept=None, card=[], use=None, left_out=[])
    assert "No step has been recorded" in nothing
    assert "every pair that was drawn has labels" in nothing


def test_names_and_reasons_are_text_never_markup():
    changes = {"title": EVIL, "left_out": [("pairs", EVIL, 1)], "card": [(EVIL, EVIL)], "use": EVIL,
               "quarantined": [(EVIL, EVIL)], "timings": [(EVIL, 1.0)], "config_yaml": EVIL}  # fmt: skip
    page = Page(write_training_report(report(Training(), **changes)))
    assert not page.all("script")
    assert page.words.count(EVIL) >= 8


def drawn_lines(svg):
    """Points of the coloured lines of a plot, by colour; those of the legend lie lower and are left out."""
    found = {}
    for attrs in Page(svg).all("path"):
        color = re.search(r"stroke: var\(--curve-(\d)\)", attrs.get("style", ""))
        if color and "fill: none" in attrs["style"]:
            points = [[float(value) for value in point] for point in re.findall(r"[ML] (\S+) (\S+)", attrs["d"])]
            found.setdefault(int(color.group(1)), np.array(points))
    return found


def assert_affine(drawn, values, places):
    """Points are where these values at these places belong, in some linear scale of either axis."""
    for got, wanted in zip(drawn.T, (places, values), strict=True):
        scale, offset = np.polyfit(wanted, got, 1)
        np.testing.assert_allclose(got, scale * np.asarray(wanted) + offset, atol=0.01)
        assert scale > 0 if wanted is places else scale < 0


def test_curves_pass_through_the_means_and_the_scores():
    training = Training(epochs=6)
    losses, scores, compared = map(drawn_lines, training_plots(training.history(), 48))
    epochs = np.arange(6)
    for number, name in enumerate(LOSSES):
        means = [training.losses(epoch, slice(None))[name] for epoch in epochs]
        assert_affine(losses[number], means, 24 * epochs + 12.5)
    for number, name in enumerate(SCORES[1:]):
        assert_affine(scores[number], [each[name] for each in training.scores], epochs + 1)
    assert_affine(compared[3], [each["validation_loss"] for each in training.scores], epochs + 1)


@pytest.mark.parametrize("steps", [24, 3000])
def test_every_recorded_loss_is_a_dot_up_to_a_number(steps):
    history = Training(epochs=2, steps=steps, validated=()).history()
    (svg,) = training_plots(history, 2 * steps)
    dots = [attrs for attrs in Page(svg).all("use") if "opacity: 0.4" in attrs.get("style", "")]
    assert len(dots) == 3 * min(POINTS, loss_rows(history).num_rows)


def test_curves_as_files_are_pictures_and_always_the_same():
    history = Training().history()
    png = training_file(history, 48, "png")
    picture = decode(png)
    assert picture.shape[1] > 3 * picture.shape[0]
    assert (picture[0] == 255).all()
    assert png == training_file(history, 48, "png")
    svg = training_file(history, 48, "svg")
    assert svg == training_file(history, 48, "svg")
    assert b"<text" not in svg, "letters are outlines: any program shows the same"


def noted(**changes):
    scores = {"validation_loss": 0.5, "precision": 0.25}
    data = {"source": "/data/photos", "licence": None, "training_scenes": 2, "training_images": 171,
            "validation_scenes": 1, "validation_images": 17}  # fmt: skip
    return {"backbone": {"name": "xfeat", "weights_sha256": "0f5187fd7bedd26c"}, "data": data, "metrics": scores,
            "train": {"descriptor_dim": 128, "supervision": "depth"}, "steps": 72,
            "best_step": 48, "radius": 0.35} | changes  # fmt: skip


def test_the_page_and_the_model_card_hold_the_same_table():
    card = model_card(noted())
    for label, text in card_rows(noted()):
        assert f"| {label} | {text} |" in card
    assert "| precision | 0.2500 |" in card
    assert "validated on | 17 other images of 1 scenes |" in card
    nothing = noted(metrics={}, data=noted()["data"] | {"validation_images": 0, "validation_scenes": 0})
    assert "| validated on | nothing |" in model_card(nothing)
    assert "It was not validated" in model_card(nothing)


@pytest.fixture
def run(tmp_path):
    """The directory of a training that has ended; its tokens were deleted."""
    training = Training()
    cfg = config.load([], images=str(tmp_path / "photos"), output=str(tmp_path / "out"))
    job = Run(cfg.output, "train", counts(cfg.output), {"labels": 61.0, "train": 200.0, "total": 300.0})
    job.metrics = training.scores[1] | {"best_step": 48}
    files.write_bytes(job.path("config.yaml"), config.to_yaml(cfg).encode())
    files.write_json(job.path("run.json"), job.record())
    files.write_json(job.path("metrics.json"), job.metrics)
    files.write_json(job.path("encoder/config.json"), {"trained_with": noted()})
    pq.write_table(training.history(), job.path("training.parquet"))
    return cfg, job


def counts(output, **changes):
    return {
        "images_without_overlap": {"camera missing": 3}, "images": 513, "embedded_now": 513, "quarantined": 0,
        "root": "/data/photos", "store": f"{output}/tokens", "skipped": {},
        "pairs_labelled": 2243, "pairs_of_an_epoch": 797, "validation_pairs": 649,
        "pairs_without_labels": {"depth map missing": 12}, "steps": 72, "steps_now": 72,
        "encoder": f"{output}/encoder", "use": f"backbone=xfeat encoder={output}/encoder",
    } | changes  # fmt: skip


def test_the_page_is_written_from_the_directory_of_a_run(run):
    cfg, job = run
    write_training_curves(job)
    for name in ("training.png", "training.svg"):
        assert files.exists(job.path(name))
    assert write_training_page(cfg, job) == job.path("report.html")
    shown = Page(files.read_bytes(job.path("report.html")).decode()).words
    for text in ("vop train: photos", "views with tokens 513", "pairs left out 12", "steps 72", "kept epoch 2",
                 "pairs depth map missing 12", "images camera missing 3", "trained on 171 images of 2 scenes",
                 f"encoder={job.output}/encoder"):  # fmt: skip
        assert text in shown


def test_the_report_command_knows_a_training(run):
    cfg, job = run
    again = vop.report(output=cfg.output)
    assert again.report == job.path("report.html")
    assert f"  report       {job.path('report.html')}" in again.summary()


def test_the_page_of_a_training_that_failed(run):
    cfg, job = run  # of an earlier one there are an encoder and metrics
    failed = Run(cfg.output, "train", {"images": 513, "root": "/data/photos"}, {"labels": 61.0}, job.metrics)
    shown = Page(files.read_bytes(write_training_page(cfg, failed)).decode()).words
    assert "the training has not ended" in shown
    assert "✓ kept" not in shown
    files.remove(job.path("training.parquet"))
    assert "No step has been recorded" in Page(files.read_bytes(write_training_page(cfg, failed)).decode()).words


def test_other_runs_without_pairs_still_have_no_report(run):
    cfg, job = run
    files.write_json(job.path("run.json"), Run(cfg.output, "embed").record())
    with pytest.raises(ConfigError, match=r"the last run in .* was `embed`"):
        vop.report(output=cfg.output)


def summary(metrics, **changes):
    return Run("/data/run", "train", counts("/data/run", **changes), {"train": 1.5, "total": 2.0}, metrics).summary()


def test_the_summary_of_a_training():
    scores = {"precision": 0.1212, "recall@1": 0.4, "recall@5": 0.772, "validation_loss": 0.51366, "best_step": 48}
    lines = summary(scores).splitlines()
    assert lines == [
        "vop train: done in 2.0 s",
        "  tokens       of 513 views of images (513 computed by this run), 0 in quarantine",
        "  left out     3 images: camera missing",
        "  labels       of 2243 pairs: 797 in an epoch, 649 for the validation",
        "                 12 pairs left out: depth map missing",
        "  steps        72 (72 by this run), kept: the weights after step 48",
        "  validation   precision 12.1%, recall@1 40.0%, recall@5 77.2%, loss 0.5137",
        "  encoder      /data/run/encoder: beside model.safetensors a README.md, its model card",
        "               vop register images=DIR output=DIR backbone=xfeat encoder=/data/run/encoder",
        "  seconds      train 1.5",
        "  output       /data/run",
    ]


def test_the_summary_of_a_training_that_had_nothing_to_do():
    shown = summary({"precision": 0.1212, "best_step": 48}, steps_now=0, embedded_now=0)
    assert "(0 computed by this run)" in shown
    assert "  steps        72, all of them done before (more: train.epochs), kept: the weights after step 48" in shown


def test_the_summary_of_a_training_without_validation():
    shown = summary({"best_step": 72}, validation_pairs=0, pairs_without_labels={}, images_without_overlap={})
    assert "  labels       of 2243 pairs: 797 in an epoch\n  steps " in shown
    assert "  validation   none: what the last step left is kept (train.validation=FILE)" in shown
    assert "left out" not in shown and "TensorBoard" not in shown
    assert "not in TensorBoard: no extra `train`" in summary({"best_step": 72}, tensorboard=False)
