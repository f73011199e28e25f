"""Training with Ray: labels as a Ray Data job, then Ray Train workers that each read their share of every batch."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import ray
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from vop import files
from vop.config import Config, ConfigError
from vop.parts import Parts
from vop.stages import cluster
from vop.training.batches import Batch
from vop.training.labelling import Labelling
from vop.training.learner import LossError
from vop.training.loop import Work, train
from vop.training.place import Place

CACHED_READERS = 2  # tasks of each worker that read tokens ahead: copying from memory, which is quick


def label_parts(config: Config, places: dict[str, str], parts: Parts, planned: Iterable[pa.Table]) -> Iterator[dict]:
    """Make the labels of planned parts; yields part and pairs as each is written."""
    planned = list(planned)
    if not planned:
        return
    workers = min(cluster.cpus(), len(planned))
    with cluster.whole_blocks(config.cluster):
        labelled = cluster.by_shards(
            ray.data.from_arrow(planned),
            Labelling,
            fn_constructor_args=(config, places, parts),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=min(0.9, 0.9 * cluster.cpus() / workers),
        )
        yield from cluster.rows(labelled)


@dataclass(frozen=True)
class Share:
    """What a worker is given: the place of the training, and the board that it writes its progress on."""

    place: Place
    board: ray.actor.ActorHandle
    threads: int


class Board:
    """What workers tell the driver: rows of the history, and losses that are not numbers."""

    def __init__(self):
        self.rows: list[dict] = []
        self.errors: list[LossError] = []

    def add(self, row: dict) -> None:
        """Write a row."""
        self.rows.append(row)

    def take(self) -> list[dict]:
        """The rows that were not taken yet."""
        taken, self.rows = self.rows, []
        return taken

    def fail(self, error: LossError) -> None:
        """Tell why a worker ended."""
        self.errors.append(error)

    def failed(self) -> LossError | None:
        """Why the worker that ended first did, if any did."""
        return self.errors[0] if self.errors else None


def fit(place: Place, told: Callable[[dict], None]) -> None:
    """Train on Ray Train's workers until all epochs are done; `told` is given each row of the history as it comes.

    A worker that dies is started again, at most `max_failures` times, and goes on from the last checkpoint. Raises what
    a worker raised; `LossError` at once, since it would come again.
    """
    config, train_config = place.config, place.config.train
    gpu = cluster.gpu_share(train_config.gpus_per_worker)
    workers = train_config.workers or (cluster.replicas(None, gpu) if gpu else 1)
    if train_config.batch_size % workers:
        raise ConfigError(f"train.batch_size={train_config.batch_size} cannot be shared by {workers} workers equally")
    board = ray.remote(num_cpus=0)(Board).remote()
    records = files.join(config.output, "ray")  # of Ray Train itself: nothing that a later run goes on from
    files.remove(records)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"share": Share(place, board, max(1, cluster.cpus() // workers))},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu > 0,
            resources_per_worker={"CPU": cluster.model_cpus(workers)} | ({"GPU": gpu} if gpu else {}),
        ),
        run_config=RunConfig(
            name="ray", storage_path=config.output, failure_config=FailureConfig(max_failures=train_config.max_failures)
        ),
    )
    ended: queue.Queue[BaseException | None] = queue.Queue(1)
    # a daemon: who interrupts the driver is not kept waiting for the end of the training
    threading.Thread(target=_fitted, args=(trainer, ended), daemon=True).start()
    error = _awaited(ended, board, told, config.cluster.no_progress_timeout_s)
    files.remove(records)
    if isinstance(error, WorkerGroupError):
        raise _reason(error) from None
    error = error or ray.get(board.failed.remote(), timeout=config.cluster.no_progress_timeout_s)
    if error is not None:
        raise error


def _fitted(trainer: TorchTrainer, ended: queue.Queue) -> None:
    try:
        trainer.fit()
        ended.put(None)
    except BaseException as error:
        ended.put(error)


def _awaited(ended: queue.Queue, board, told: Callable[[dict], None], patience_s: float) -> BaseException | None:
    """Pass on the rows of the board until the training has ended; returns what it ended with, None: well.

    Raises `TimeoutError` if no row comes for `patience_s` seconds.
    """
    since = time.monotonic()
    while True:
        try:
            error = ended.get(timeout=1.0)
            over = True
        except queue.Empty:
            error, over = None, False
        # all the patience there is: on a busy machine the board's own process takes minutes to start
        rows = ray.get(board.take.remote(), timeout=patience_s)
        for row in rows:
            told(row)
        if over:
            return error
        since = time.monotonic() if rows else since
        if time.monotonic() - since > patience_s:
            raise TimeoutError(
                f"training has not moved for {patience_s:g} s (cluster.no_progress_timeout_s): are there too few CPUs "
                "or GPUs for its workers, or is a disk full? The same command goes on from the last checkpoint"
            )


def _reason(error: WorkerGroupError) -> Exception:
    """What the first worker that failed raised."""
    failures = list(error.worker_failures.values())
    cause = next((failure for failure in failures if isinstance(failure, (ValueError, OSError))), failures[0])
    return getattr(cause, "cause", None) or cause


def _work(given: dict) -> None:
    """What a worker does."""
    share: Share = given["share"]
    place, context = share.place, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(share.threads)
    device = ray.train.torch.get_device()
    learner = place.learner(device, partial(ray.train.torch.prepare_model, move_to_device=False), rank)
    work = Work(
        folder=place.folder,
        steps=partial(place.steps, workers),
        batches=partial(_batches, place, rank, workers),
        validate=place.validation() if rank == 0 else None,
        told=share.board.add.remote,
        together=lambda: ray.train.report({}),
        workers=workers,
    )
    try:
        train(learner, place.config.train, work)
    except LossError as error:  # to the driver; a worker that raises is started again, and would fail again
        ray.get(share.board.fail.remote(error))


def _batches(place: Place, rank: int, workers: int, epoch: int, first: int) -> Iterator[Batch]:
    """A worker's shares of the batches of an epoch, read ahead by Ray Data: one block is one share."""
    shares, cached = list(place.shares(epoch, first, rank, workers)), place.config.train.cached
    with cluster.whole_blocks(place.config.cluster):
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        rows = cluster.by_shards(
            ray.data.from_arrow(shares),
            place.reader(),
            compute=ray.data.TaskPoolStrategy(size=CACHED_READERS) if cached else None,
            num_cpus=min(0.5, 0.1 * cluster.cpus()) if cached else 0.5,
        )
        for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            yield place.batch(block)
