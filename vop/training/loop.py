"""The training itself: epochs of steps, checkpoints, validation. Plain Python; Ray calls it, and so can anyone."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save

from vop import files
from vop.schema import TrainConfig
from vop.training import checkpoint
from vop.training.batches import Batch
from vop.training.checkpoint import Progress
from vop.training.learner import LOSSES, Learner, LossError, learning_rate

HISTORY = "training.parquet"
SCORES = ("validation_loss", "precision", "recall@1", "recall@5")
COLUMNS = {"epoch": pa.int32(), "step": pa.int64(), "learning_rate": pa.float64(), "pairs_per_s": pa.float64()}
SCHEMA = pa.schema([*COLUMNS.items(), *((name, pa.float64()) for name in (*LOSSES, *SCORES))])
EVERY = 10  # steps of which the history has the mean


@dataclass(frozen=True, eq=False)
class Work:
    """What a worker's loop is given.

    batches: this worker's shares of the batches of an epoch, from a place in it on. validate: scores of the encoder,
    called after each epoch on the first worker; None: no validation. told: given each row of the history, on the first
    worker. together: waits for all workers, after every epoch. workers: their number.
    """

    folder: str
    steps: Callable[[int], int]
    batches: Callable[[int, int], Iterable[Batch]]
    validate: Callable[[Learner], dict[str, float]] | None = None
    told: Callable[[dict], None] = lambda row: None
    workers: int = 1
    together: Callable[[], None] = lambda: None


def train(learner: Learner, config: TrainConfig, work: Work) -> Progress:
    """Train until `config.epochs` are done, from the latest checkpoint in the folder on.

    The first worker (rank 0) writes checkpoints, the history and the best weights. Raises `LossError`, on all workers,
    for a loss that is not a number, after each saved its share of the batch as `nan-batch-RANK.safetensors`.
    """
    found, first = checkpoint.latest(files.join(work.folder, "checkpoints")), learner.rank == 0
    progress = Progress()
    if found is not None:
        progress, tensors = found
        learner.load(tensors, progress.step)
    history = History(work.folder, progress.step) if first else None
    while progress.epoch < config.epochs:
        epoch, total = progress.epoch, work.steps(progress.epoch)
        means = _Means()
        for batch in work.batches(epoch, progress.batch):
            losses = _learned(learner, batch, epoch, work.folder)
            progress = replace(progress, batch=progress.batch + 1, step=learner.step_number)
            means.add(losses, len(batch) * work.workers)
            if progress.step % EVERY == 0 or progress.batch == total:
                row = {
                    "epoch": epoch,
                    "step": progress.step,
                    "learning_rate": learning_rate(config, epoch),
                } | means.row()
                if first:
                    history.add(row)
                    work.told(row)
            if first and progress.step % config.checkpoint_steps == 0 and progress.batch < total:
                history.write()
                checkpoint.write(files.join(work.folder, "checkpoints"), progress, learner.state())
        if progress.batch < total:
            raise RuntimeError(f"epoch {epoch} ended after {progress.batch} of {total} batches")
        progress = replace(progress, epoch=epoch + 1, batch=0)
        if first:
            progress = _validated(learner, config, work, history, progress)
            history.write()
            checkpoint.write(files.join(work.folder, "checkpoints"), progress, learner.state())
        work.together()
    return progress


def _learned(learner: Learner, batch: Batch, epoch: int, folder: str) -> dict[str, float]:
    try:
        return learner.step(batch, epoch)
    except LossError as error:
        path = files.join(folder, f"nan-batch-{learner.rank}.safetensors")
        names = ("inputs0", "inputs1", "sizes0", "sizes1", "positive", "negative")
        tensors = {name: getattr(batch, name).cpu().clone() for name in names}  # clone: files hold no shared memory
        tensors |= {f"state.{name}": value for name, value in learner.state().items()}
        files.write_bytes(path, save(tensors))
        raise LossError(
            f"{error}: the learning rate (train.learning_rate={learner.config.learning_rate:g}) is too high, or the "
            f"tokens of a worker hold numbers that are not finite. The weights and what this worker was given are in "
            f"{path}, what others were given likewise; the checkpoints stay"
        ) from error


def _validated(learner: Learner, config: TrainConfig, work: Work, history: "History", progress: Progress) -> Progress:
    """After an epoch: scores into the history, and the weights kept if they are the best so far."""
    if work.validate is None:
        files.write_bytes(files.join(work.folder, "best.safetensors"), save(_weights(learner)))
        return replace(progress, best_step=progress.step)
    scores = work.validate(learner)
    history.add({"epoch": progress.epoch - 1, "step": progress.step} | scores)
    work.told(history.rows[-1])
    score = scores["validation_loss" if config.best == "loss" else config.best]
    score = -score if config.best == "loss" else score
    if progress.best_score is not None and score <= progress.best_score:
        return progress
    files.write_bytes(files.join(work.folder, "best.safetensors"), save(_weights(learner)))
    return replace(progress, best_score=score, best_step=progress.step)


def _weights(learner: Learner) -> dict:
    return {name: value.detach().cpu().contiguous() for name, value in learner.encoder.state_dict().items()}


class History:
    """The rows of `training.parquet`: losses every few steps, scores after every epoch."""

    def __init__(self, folder: str, step: int):
        self.path = files.join(folder, HISTORY)
        self.rows: list[dict] = []
        if files.exists(self.path):
            with files.opened(self.path) as file:
                rows = pq.read_table(file).to_pylist()
            self.rows = [row for row in rows if row["step"] <= step]  # later ones are done again

    def add(self, row: dict) -> None:
        """Add a row; it is on disk after `write`."""
        self.rows.append(row)

    def write(self) -> None:
        """Replace the file."""
        with files.atomic(self.path) as (filesystem, inner):
            pq.write_table(pa.Table.from_pylist(self.rows, schema=SCHEMA), inner, filesystem=filesystem)


class _Means:
    """Losses of several steps."""

    def __init__(self):
        self.rows, self.pairs, self.since = [], 0, time.monotonic()

    def add(self, losses: dict[str, float], pairs: int) -> None:
        self.rows.append(losses)
        self.pairs += pairs

    def row(self) -> dict[str, float]:
        """The means since the last row."""
        now = time.monotonic()
        rate = self.pairs / max(now - self.since, 1e-9)
        means = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in LOSSES}
        self.rows, self.pairs, self.since = [], 0, now
        return means | {"pairs_per_s": rate}
