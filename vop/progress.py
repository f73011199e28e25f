"""Progress: done, rate, time left; for people, and for whoever else watches."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Beat:
    """How far a step is: so many of its images, queries or pairs (`unit`) are done, and so many of these are bad.

    `added` counts what came since the last beat, `bad` the bad of this run; left_s: seconds, None: not known yet.
    """

    step: str
    unit: str
    total: int
    done: int
    added: int
    bad: int
    left_s: float | None


Observer = Callable[[Beat], None]


class Progress:
    """A bar that tells its observers of every update, and of its beginning."""

    def __init__(self, bar: tqdm, step: str, unit: str, total: int, done: int, observers: Iterable[Observer]):
        self._bar, self._step, self._unit, self._observers = bar, step, unit, tuple(observers)
        self._total, self.done, self._bad = total, done, 0
        self._tell(0)

    def update(self, added: int, bad: int = 0) -> None:
        """So many more are done, so many of them bad."""
        self._bar.update(added)
        self.done, self._bad = self.done + added, self._bad + bad
        self._tell(added)

    def note(self, text: str) -> None:
        """Words behind the bar, shown with its next update."""
        self._bar.set_postfix_str(text, refresh=False)

    def _tell(self, added: int) -> None:
        rate = self._bar.format_dict["rate"] if self._observers else None
        left = (self._total - self.done) / rate if rate else None
        for observer in self._observers:
            observer(Beat(self._step, self._unit, self._total, self.done, added, self._bad, left))


@contextmanager
def progress(step: str, total: int, done: int, unit: str, observers: Iterable[Observer] = ()) -> Iterator[Progress]:
    """A bar on standard error from `done` to `total`; in a log file (no terminal) a line at most every 10 s."""
    terminal = sys.stderr.isatty()
    with tqdm(
        desc=step,
        total=total,
        initial=done,
        unit=f" {unit}",
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
        ascii=not terminal,
        file=sys.stderr,
        disable=total == done,
    ) as bar:
        yield Progress(bar, step, unit, total, done, observers)
