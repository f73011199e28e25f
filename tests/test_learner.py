"""The training loop in plain PyTorch: loss, steps, checkpoints, resume."""

import dataclasses
import datetime
import itertools
import math
import multiprocessing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import load_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from vop.models.encoder import Encoder
from vop.schema import TrainConfig
from vop.training import checkpoint
from vop.training.batches import Batch
from vop.training.checkpoint import Progress
from vop.training.learner import LOSSES, Learner, LossError, learning_rate
from vop.training.loop import SCHEMA, Work, train
from vop.training.loss import overlap_loss
from vop.training.start import MatchedWhitening

P, D, E = 16, 12, 8
PER_EPOCH, SIZE = 5, 4
CONFIG = TrainConfig(epochs=4, batch_size=SIZE, descriptor_dim=E, dropout=0.5, learning_rate=1e-2, checkpoint_steps=2)


def batch(seed: int, size: int = SIZE) -> Batch:
    """Images whose patches appear in another order in the other image."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(size, P, D))
    order = np.argsort(rng.random((size, P)), axis=1)
    noise = rng.normal(size=(2, size, P, D)) * 0.3
    seen = np.take_along_axis(places, order[..., None], 1)
    tokens = [torch.from_numpy(each).float() for each in (places + noise[0], seen + noise[1])]
    positive = torch.from_numpy(order[:, None] == np.arange(P)[None, :, None])
    positive &= torch.from_numpy(rng.random((size, P, P)) < 0.7)
    negative = ~positive & torch.from_numpy(rng.random((size, P, P)) < 0.8)
    sizes = torch.full((size, 2), 56)
    return Batch(*tokens, sizes, sizes, positive, negative)


def learner(config: TrainConfig = CONFIG, **given) -> Learner:
    torch.manual_seed(config.seed)
    return Learner(Encoder(D, E, config.dropout), config, **given)


def work(folder, validate=None) -> Work:
    def batches(epoch: int, first: int):
        return (batch(100 * epoch + number) for number in range(first, PER_EPOCH))

    return Work(str(folder), lambda epoch: PER_EPOCH, batches, validate)


def weights(one: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in one.encoder.state_dict().items()}


def assert_equal(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_loss_is_that_of_loops_over_pairs_and_patches():
    given = batch(0, 3)
    given.positive[1] = False  # a pair without any match
    rng = np.random.default_rng(1)
    desc = [rng.normal(size=(3, P, E)) for _ in range(2)]
    expected = {"positive_loss": 0.0, "negative_loss": 0.0}
    for pair in range(3):
        terms = {"positive_loss": [], "negative_loss": []}
        for p, q in itertools.product(range(P), range(P)):
            x, y = desc[0][pair, p], desc[1][pair, q]
            s = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
            if given.positive[pair, p, q]:
                terms["positive_loss"].append((1 - s) ** 2)
            if given.negative[pair, p, q]:
                terms["negative_loss"].append(s**2)
        for name, values in terms.items():
            expected[name] += (sum(values) / len(values) if values else 0) / 3
    found = overlap_loss(*map(torch.from_numpy, desc), given.positive, given.negative)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5)
    assert found["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-5)


def test_a_batch_in_parts_gives_the_same_gradients():
    config = dataclasses.replace(CONFIG, dropout=0.0)
    whole, parts = learner(config), learner(dataclasses.replace(config, accumulate=3))  # 4 pairs: 2, 1 and 1
    losses = [one.step(batch(5), 0) for one in (whole, parts)]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    for a, b in zip(whole.encoder.parameters(), parts.encoder.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


def test_half_precision_is_that_of_the_step_and_not_of_the_weights():
    config = dataclasses.replace(CONFIG, dropout=0.0)
    full, half = learner(config), learner(dataclasses.replace(config, precision="bfloat16"))
    losses = [one.step(batch(5), 0) for one in (full, half)]
    for name in LOSSES:
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.01) and losses[1][name] != losses[0][name]
    assert {value.dtype for value in half.state().values()} == {torch.float32}
    full, half = (torch.cat([each.grad.flatten() for each in one.encoder.parameters()]) for one in (full, half))
    assert torch.linalg.vector_norm(half - full) < 0.02 * torch.linalg.vector_norm(full)


def test_training_lowers_the_loss_and_the_rate_follows_the_recipe(tmp_path):
    one = learner()
    train(one, CONFIG, work(tmp_path))
    history = pq.read_table(tmp_path / "training.parquet")
    assert history.schema.equals(SCHEMA)
    losses = history["loss"].to_pylist()
    assert losses[-1] < 0.8 * losses[0]
    assert history["step"].to_pylist() == [5, 10, 15, 20]
    published = TrainConfig()
    assert [learning_rate(published, epoch) for epoch in (0, 9)] == [1e-4, 1e-4]
    assert learning_rate(published, 10) == pytest.approx(1e-4 * 10**-0.1)
    assert learning_rate(published, 29) == pytest.approx(1e-4 * 10**-2)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 11])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, steps):
    whole = learner()
    train(whole, CONFIG, work(tmp_path / "whole"))

    class KilledError(Exception):
        pass

    counted = itertools.count()
    dying = learner()
    plain = dying.step

    def step(*given):
        if next(counted) == steps:
            raise KilledError
        return plain(*given)

    dying.step = step
    with pytest.raises(KilledError):
        train(dying, CONFIG, work(tmp_path / "killed"))
    again = learner(dataclasses.replace(CONFIG))
    torch.rand(steps)  # whatever the process did with its random numbers
    train(again, CONFIG, work(tmp_path / "killed"))
    assert_equal(weights(whole), weights(again))
    assert_equal(*(load_file(tmp_path / name / "best.safetensors") for name in ("whole", "killed")))
    kept = ["epoch", "step", "learning_rate", "loss", "positive_loss", "negative_loss"]
    whole_rows, rows = (
        pq.read_table(tmp_path / name / "training.parquet").select(kept) for name in ("whole", "killed")
    )
    same = [row for row in rows.to_pylist() if row["step"] % PER_EPOCH == 0]
    by_step = {row["step"]: row for row in whole_rows.to_pylist()}
    # A row holds the mean of the steps since the last row: of a resumed epoch, of those after the checkpoint.
    assert [row["step"] for row in same] == [*by_step]
    assert same[-1] == by_step[same[-1]["step"]]


def test_more_epochs_go_on_where_the_training_ended(tmp_path):
    train(learner(), dataclasses.replace(CONFIG, epochs=2), work(tmp_path / "a"))
    longer = learner()
    train(longer, CONFIG, work(tmp_path / "a"))
    whole = learner()
    train(whole, CONFIG, work(tmp_path / "b"))
    assert_equal(weights(whole), weights(longer))
    done = learner()
    assert train(done, CONFIG, work(tmp_path / "b")).step == 4 * PER_EPOCH  # nothing is left to do
    assert_equal(weights(whole), weights(done))


def test_the_best_step_is_kept(tmp_path):
    scores = iter([0.3, 0.7, 0.7, 0.5])
    seen = []

    def validate(one: Learner) -> dict[str, float]:
        seen.append(weights(one))
        return {"validation_loss": 1.0, "precision": next(scores)}

    progress = train(learner(), CONFIG, work(tmp_path, validate))
    assert (progress.best_score, progress.best_step) == (0.7, 2 * PER_EPOCH)  # the first of two equal ones
    assert_equal(load_file(tmp_path / "best.safetensors"), seen[1])


def test_a_loss_that_is_no_number_stops_and_leaves_its_batch(tmp_path):
    given = work(tmp_path)

    def batches(epoch: int, first: int):
        for number, each in enumerate(given.batches(epoch, first), start=first):
            if (epoch, number) == (1, 2):
                each.inputs1[1, 3] = math.nan
            yield each

    one = learner()
    with pytest.raises(LossError, match=r"step 7 has .* the loss nan.*nan-batch-0\.safetensors"):
        train(one, CONFIG, dataclasses.replace(given, batches=batches))
    saved = load_file(tmp_path / "nan-batch-0.safetensors")
    assert saved["inputs1"][1, 3].isnan().all() and saved["inputs0"].isfinite().all()
    assert_equal({name[14:]: value for name, value in saved.items() if name.startswith("state.encoder.")}, weights(one))
    assert checkpoint.latest(str(tmp_path / "checkpoints"))[0].step == 6  # what was learned before stays


def one_of_two_workers(rank: int, folder: str) -> None:
    """Learn from half of a batch, then of another from what only the second worker cannot learn from."""
    config = dataclasses.replace(CONFIG, dropout=0.0, accumulate=2, checkpoint_steps=1)
    patience = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder}/met", patience, world_size=2, rank=rank)
    try:
        shares = [batch(number).parts(2)[rank] for number in (5, 6)]
        shares[1].inputs0[1, 2] *= math.nan if rank else 1
        given = Work(folder, lambda epoch: 2, lambda epoch, first: iter(shares), workers=2)
        one = learner(config, wrap=DistributedDataParallel, rank=rank)
        with pytest.raises(LossError, match=f"step 1 has gradients that are not finite.*nan-batch-{rank}"):
            train(one, config, given)
        assert one.step_number == 1
    finally:
        distributed.destroy_process_group()


def test_two_workers_learn_as_one_and_stop_together(tmp_path):
    """Half a batch each, with PyTorch's own averaging of gradients, in another process; one share is not finite."""
    spawned = multiprocessing.get_context("spawn")
    second = spawned.Process(target=one_of_two_workers, args=(1, str(tmp_path)), daemon=True)
    second.start()
    one_of_two_workers(0, str(tmp_path))
    second.join(60)
    assert second.exitcode == 0

    alone = learner(dataclasses.replace(CONFIG, dropout=0.0))
    alone.step(batch(5), 0)
    saved = [load_file(tmp_path / f"nan-batch-{rank}.safetensors") for rank in (0, 1)]
    assert [tensors["inputs0"].isfinite().all().item() for tensors in saved] == [True, False]
    progress, kept = checkpoint.latest(str(tmp_path / "checkpoints"))
    assert progress.step == 1 and kept.keys() == alone.state().keys()
    for name, value in alone.state().items():
        assert torch.equal(saved[0][f"state.{name}"], saved[1][f"state.{name}"])
        assert torch.equal(saved[0][f"state.{name}"], kept[name])
        if name.endswith("exp_avg"):  # a tenth of the gradients of the only step
            torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-8)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    folder = str(tmp_path)
    for step in (2, 4, 6):
        checkpoint.write(folder, Progress(epoch=1, batch=step, step=step), {"a": torch.full((3,), float(step))})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}.{kind}" for step in (4, 6) for kind in ("json", "safetensors")
    ]
    whole = (tmp_path / "step-00000006.safetensors").read_bytes()
    (tmp_path / "step-00000006.safetensors").write_bytes(whole[:-1])
    progress, tensors = checkpoint.latest(folder)
    assert progress.step == 4 and tensors["a"].tolist() == [4, 4, 4]
    (tmp_path / "step-00000004.json").write_text("{")
    assert checkpoint.latest(folder) is None
    assert checkpoint.latest(str(tmp_path / "nowhere")) is None


def test_batches_that_end_early_are_an_error(tmp_path):
    short = dataclasses.replace(work(tmp_path), steps=lambda epoch: PER_EPOCH + 1)
    with pytest.raises(RuntimeError, match="epoch 0 ended after 5 of 6 batches"):
        train(learner(), CONFIG, short)


def test_the_start_is_the_discriminant_analysis_of_matches_and_survives_its_file():
    batches = [batch(seed, 16) for seed in range(30)]
    fitting = MatchedWhitening(D)
    fitting.add(batches)
    fitted = fitting.fit(5)
    written = load(save(fitted.arrays()))
    np.testing.assert_array_equal(written["projection"], fitted.projection)

    pairs, patches = [], []
    for each in batches:
        pair, p, q = each.positive.nonzero(as_tuple=True)
        pairs.append((each.inputs0[pair, p] - each.inputs1[pair, q]).numpy())
        for side, axis in ((each.inputs0, 2), (each.inputs1, 1)):
            patches.append(side[(each.positive | each.negative).any(axis)].numpy())
    pairs, patches = np.concatenate(pairs), np.concatenate(patches)
    within = pairs.T @ pairs / (2 * len(pairs))
    within = 0.7 * within + 0.3 * np.trace(within) / D * np.eye(D)
    # what the projection makes of them: differences of variance 1 in every direction, uncorrelated, and the directions
    # in which all patches vary most beside them
    made = fitted.projection.T @ within @ fitted.projection
    np.testing.assert_allclose(made, np.eye(5), atol=1e-4)
    spread = np.diag(fitted.projection.T @ np.cov(patches.T, bias=True) @ fitted.projection)
    inverse = np.linalg.inv(np.linalg.cholesky(within))
    expected = np.linalg.eigvalsh(inverse @ np.cov(patches.T, bias=True) @ inverse.T)[::-1][:5]
    np.testing.assert_allclose(spread, expected, rtol=1e-3)
    with pytest.raises(ValueError, match=r"12 numbers to 13 cannot be fitted"):
        fitting.fit(13)
