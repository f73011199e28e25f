"""Checkpoints of a training: all that it takes to go on, in files that run no code.

checkpoints/step-00000400.safetensors    weights and what the optimizer remembers of them
checkpoints/step-00000400.json           epoch, place in it, step, best score; written last, with the other's hash
"""

import hashlib
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vop import files

KEPT = 2  # the latest, and the one before it


@dataclass(frozen=True)
class Progress:
    """Where a training stands: batches done in an epoch, steps in all, the best validation so far and its step."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_score: float | None = None
    best_step: int | None = None


def write(folder: str, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint, then delete those before the last two."""
    name = f"step-{progress.step:08d}"
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    files.write_bytes(files.join(folder, f"{name}.safetensors"), data)
    files.write_json(files.join(folder, f"{name}.json"), asdict(progress) | {"sha256": digest})
    for old in _names(folder)[:-KEPT]:
        for suffix in (".json", ".safetensors"):
            files.remove(files.join(folder, old + suffix))


def latest(folder: str) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """The latest checkpoint that is whole, or None."""
    for name in reversed(_names(folder)):
        try:
            record = files.read_json(files.join(folder, f"{name}.json"))
            data = files.read_bytes(files.join(folder, f"{name}.safetensors"))
            if record.pop("sha256") == hashlib.sha256(data).hexdigest():
                return Progress(**record), load(data)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError):
            continue
    return None


def _names(folder: str) -> list[str]:
    """Checkpoints in a folder, by step."""
    return sorted(name.removesuffix(".json") for name in files.listing(folder) if name.endswith(".json"))
