"""Progress for people: done, rate, time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(label: str, total: int, done: int, unit: str) -> Iterator[tqdm]:
    """A bar on standard error from `done` to `total`; in a log file (no terminal) a line at most every 10 s."""
    terminal = sys.stderr.isatty()
    with tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=f" {unit}",
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
        ascii=not terminal,
        file=sys.stderr,
        disable=total == done,
    ) as bar:
        yield bar
