"""Timing for rates: medians of ways that take turns, in seconds of a core where a core is what they need."""

import threading
import time
from collections.abc import Callable, Hashable, Mapping

import numpy as np
import torch

from vop.models.embedder import THREADS

ROUNDS = 3


def in_turns(
    ways: Mapping[Hashable, Callable[[], object]],
    clock: Callable[[], float] = time.process_time,
    of_rounds: Callable[[list[float]], float] = np.median,
) -> dict[Hashable, float]:
    """Median seconds of every way; each has been called once before, for what is compiled or loaded then.

    By default seconds of this process on a core, so that what else runs on the machine does not count;
    `time.perf_counter` for work that waits for a disk or a card.
    """
    for way in ways.values():
        way()
    took: dict[Hashable, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = clock()
            way()
            took[name].append(clock() - start)
    return {name: float(of_rounds(seconds)) for name, seconds in took.items()}


def line(few: tuple[float, float], many: tuple[float, float]) -> tuple[float, float]:
    """(at nothing, for each) of a cost that is known for two amounts, (amount, seconds) each; neither below 0."""
    each = max(0.0, (many[1] - few[1]) / (many[0] - few[0])) if many[0] > few[0] else many[1] / many[0]
    return max(0.0, few[1] - each * few[0]), each


def on_cores(work: Callable[[], object], cores: int) -> Callable[[], None]:
    """The same work on so many threads at once, as replicas of one thread each do it."""

    def alone() -> None:
        torch.set_num_threads(THREADS)  # a setting of the thread
        work()

    def together() -> None:
        threads = [threading.Thread(target=alone) for _ in range(cores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return together
