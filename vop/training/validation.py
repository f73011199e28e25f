"""How good an encoder is on images that it was not trained on: labelled pairs, and a search by overlap voting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vop import metrics
from vop.image import patch_mask
from vop.models.encoder import Encoder
from vop.retrieval.voting import best, scores, votes
from vop.training.batches import Batch
from vop.training.learner import Learner

KS = (1, 5)
RADII = tuple(number / 20 for number in range(2, 15))  # 0.1 to 0.7


@dataclass(frozen=True, eq=False)
class SearchSet:
    """Images of a scene among which each is searched for.

    names: N. tokens: (N, P, D). sizes: (N, 2) scaled widths and heights. overlap: (N, N) true overlaps.
    """

    names: Sequence[str]
    tokens: np.ndarray
    sizes: np.ndarray
    overlap: np.ndarray


@torch.inference_mode()
def validate(
    learner: Learner,
    pairs: Iterable[Batch],
    sets: Sequence[SearchSet],
    radius: float,
    weights: str,
    min_overlap: float,
) -> dict[str, float]:
    """Scores of the encoder: validation_loss, precision (`patch_precision`), and where there are sets recall@1, @5.

    radius, weights: of the votes, as in `vop.retrieval.voting`. recall@k: share of the images, of those that have an
    image with `min_overlap` or more, that find one among the first k; mean over the sets.
    """
    learner.encoder.eval()
    losses, right, asked, count = 0.0, 0, 0, 0
    for batch in pairs:
        batch = batch.to(learner.device)
        losses += learner.losses(batch)["loss"].item() * len(batch)
        count += len(batch)
        found = patch_precision(*(describe(learner.encoder, *side) for side in sides(batch)), batch.positive)
        right, asked = right + found[0], asked + found[1]
    scored = {"validation_loss": losses / max(count, 1), "precision": right / max(asked, 1)}
    recalls = [
        found
        for each in sets
        if (found := searched(patches_of(learner.encoder, each, learner.device), each, radius, weights, min_overlap))
    ]
    for k in KS if recalls else ():
        scored[f"recall@{k}"] = float(np.mean([found[f"recall@{k}"] for found in recalls]))
    return scored


def sides(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and sizes of either image of a batch."""
    return [(batch.inputs0, batch.sizes0), (batch.inputs1, batch.sizes1)]


def describe(encoder: Encoder | None, tokens: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Unit descriptors (B, P, E); without an encoder of the tokens themselves."""
    desc = tokens.float() if encoder is None else encoder(tokens.float(), sizes)
    return nn.functional.normalize(desc, dim=-1)


def patch_precision(desc0: torch.Tensor, desc1: torch.Tensor, positive: torch.Tensor) -> tuple[int, int]:
    """Of the patches of image 0 that have a match, how many find it as their nearest, or one of the 8 beside it.

    Args:
        desc0, desc1: (B, P, E) unit descriptors. positive: (B, P, P) bool.

    Returns:
        How many are right, and how many have a match.
    """
    side = int(positive.shape[-1] ** 0.5)
    nearest = (desc0 @ desc1.mT).argmax(2)
    has, match = positive.any(2), positive.int().argmax(2)
    steps = torch.stack([(nearest // side - match // side).abs(), (nearest % side - match % side).abs()])
    return int((has & (steps.amax(0) <= 1)).sum()), int(has.sum())


def patches_of(encoder: Encoder, images: SearchSet, device: torch.device) -> list[np.ndarray]:
    """Unit descriptors of the image patches of every image, (P_i, E) float32 each."""
    found = []
    for start in range(0, len(images.names), 16):
        tokens, sizes = (torch.from_numpy(np.array(each[start : start + 16])) for each in (images.tokens, images.sizes))
        desc = describe(encoder, tokens.to(device), sizes.to(device)).cpu().numpy()
        size = 14 * int(desc.shape[1] ** 0.5)
        found += [each[patch_mask(*map(int, box), size)] for each, box in zip(desc, sizes, strict=True)]
    return found


def searched(
    patches: list[np.ndarray], images: SearchSet, radius: float, weights: str, min_overlap: float
) -> dict[str, float] | None:
    """`vop.metrics.retrieval` of votes among all images of a set; None where no two of them overlap enough."""
    relevant = images.overlap >= min_overlap
    np.fill_diagonal(relevant, False)
    if not relevant.any():
        return None
    ranked = {}
    for query, name in enumerate(images.names):
        others = np.delete(np.arange(len(images.names)), query)
        found = votes(patches[query], [patches[row] for row in others], radius, others)
        first = best(scores(found, weights), found.rows, max(KS))
        ranked[name] = [images.names[row] for row in found.rows[first]]
    return metrics.retrieval(ranked, images.names, images.overlap, min_overlap, ks=KS)


@torch.inference_mode()
def best_radius(encoder: Encoder, sets: Sequence[SearchSet], weights: str, min_overlap: float) -> float | None:
    """The radius of `RADII` that finds most among the sets: the highest mean of precision@1 and @5, the smallest of
    equal ones. None where no two images overlap enough.
    """
    means: dict[float, list[float]] = {}
    for images in sets:
        patches = patches_of(encoder.eval(), images, torch.device("cpu"))
        for radius in RADII:
            if found := searched(patches, images, radius, weights, min_overlap):
                means.setdefault(radius, []).append(sum(found[f"precision@{k}"] for k in KS))
    return max(means, key=lambda radius: (np.mean(means[radius]), -radius)) if means else None
