"""Batches of labelled pairs: from rows of a table to tensors."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from vop.models.descriptor import patch_masks
from vop.store import tensor_values
from vop.training.labels import PatchLabels

LABELS = pa.schema(
    [
        ("view0", pa.string()),
        ("view1", pa.string()),
        ("overlap", pa.float32()),
        ("positive", pa.list_(pa.int32())),  # patch0 * P + patch1 of the pairs of patches that match
        ("shared", pa.list_(pa.int32())),  # likewise of those that share any pixel, the positive ones among them
        (
            "known0",
            pa.binary(),
        ),  # a bit for each patch: whether it is known what it matches, or that it matches nothing
        ("known1", pa.binary()),
    ]
)


def label_row(pair: dict, labels: PatchLabels, negatives: str) -> dict:
    """A row of the table of labels (`LABELS`) from those of one pair (B = 1); `negatives` as in `TrainConfig`."""
    visible_only = negatives == "visible" and pair["overlap"] > 0
    known = (labels.visible0, labels.visible1) if visible_only else (labels.known0, labels.known1)
    flat = {name: getattr(labels, name)[0].flatten().nonzero()[:, 0].numpy() for name in ("positive", "shared")}
    bits = {f"known{side}": np.packbits(each[0].numpy()).tobytes() for side, each in enumerate(known)}
    return {name: pair[name] for name in ("view0", "view1", "overlap")} | flat | bits


@dataclass(frozen=True, eq=False)
class Batch:
    """B pairs of images with labels.

    inputs0, inputs1: tokens (B, P, D), float16 or float32, or letterboxed pixels (B, S, S, 3) uint8. sizes0, sizes1:
    (B, 2) int64, scaled widths and heights. positive, negative: (B, P, P) bool, patches that match and that do not.
    """

    inputs0: torch.Tensor
    inputs1: torch.Tensor
    sizes0: torch.Tensor
    sizes1: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs0)

    def _tensors(self) -> list[torch.Tensor]:
        return [self.inputs0, self.inputs1, self.sizes0, self.sizes1, self.positive, self.negative]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def parts(self, count: int) -> list["Batch"]:
        """The batch cut into at most `count` parts of almost equal size."""
        return [Batch(*cut) for cut in zip(*(tensor.tensor_split(min(count, len(self))) for tensor in self._tensors()),
                                           strict=True)]  # fmt: skip


def batch_of(table: pa.Table, image_size: int, negatives: str) -> Batch:
    """A batch from rows of labels with what a reader added; `negatives` as in `TrainConfig`."""
    inputs = [torch.from_numpy(np.array(tensor_values(table[f"inputs{side}"]))) for side in (0, 1)]
    sizes = [torch.from_numpy(np.array(tensor_values(table[f"sizes{side}"]))) for side in (0, 1)]
    P = (image_size // 14) ** 2
    positive, shared = (_matrices(table[name], P) for name in ("positive", "shared"))
    known = []
    for side in (0, 1):
        bits = np.frombuffer(b"".join(table[f"known{side}"].to_pylist()), np.uint8).reshape(len(table), -1)
        of_labels = torch.from_numpy(np.unpackbits(bits, axis=1, count=P)).bool()
        known.append(of_labels & patch_masks(sizes[side], image_size))
    negative = known[0][:, :, None] & known[1][:, None] & ~(positive if negatives == "visible" else shared)
    return Batch(*inputs, *sizes, positive, negative)


def _matrices(column: pa.ChunkedArray, P: int) -> torch.Tensor:
    """(n, P, P) bool, true at the flat places that each row lists."""
    column = column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    matrix = np.zeros((len(column), P * P), bool)
    matrix[np.repeat(np.arange(len(column)), lengths), column.flatten().to_numpy()] = True
    return torch.from_numpy(matrix).view(-1, P, P)


def steps_of(pairs: int, batch_size: int, workers: int) -> list[tuple[int, int]]:
    """Where the batches of an epoch begin and end among its pairs; the last pairs, too few for a batch, are left out.

    Of an epoch with fewer pairs than a batch as many as `workers` can share.
    """
    if pairs < batch_size:
        whole = pairs - pairs % workers
        return [(0, whole)] if whole else []
    return [(start, start + batch_size) for start in range(0, pairs - batch_size + 1, batch_size)]


def share_of(start: int, stop: int, rank: int, workers: int) -> tuple[int, int]:
    """The part of a batch that a worker takes: the parts are equal, and follow each other in the order of ranks."""
    size = (stop - start) // workers
    return start + rank * size, start + (rank + 1) * size
