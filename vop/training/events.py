"""The history as TensorBoard shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vop import files


@contextmanager
def tensorboard(folder: str, step: int) -> Iterator[Callable[[dict], None] | None]:
    """A function that adds a row of the history to the events in a local folder, hiding those after `step`.

    None where the package tensorboard is not installed (the extra `train`), or the folder is in a bucket.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    if files.is_uri(folder):
        yield None
        return
    with SummaryWriter(folder, purge_step=step + 1) as writer:

        def add(row: dict) -> None:
            for name, value in row.items():
                if name not in ("epoch", "step") and value is not None:
                    writer.add_scalar(name, value, row["step"])
            writer.flush()

        yield add
