"""The loss: patches that show the same should be alike, others orthogonal."""

import torch
from torch import nn


def overlap_loss(
    desc0: torch.Tensor, desc1: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
) -> dict[str, torch.Tensor]:
    """(1 - s)^2 of positives and s^2 of negatives, s the cosine similarity, each averaged over its own number.

    Averages are of one pair of images, and the mean over the pairs follows: so the loss of a batch is the mean of the
    losses of its equal parts, however it is divided among workers. A pair without positives (or negatives) adds 0.
    Breaking the Frame, section 3.2 (contrastive loss).

    Args:
        desc0, desc1: (B, P, E), not normalised.
        positive, negative: (B, P, P) bool.

    Returns:
        loss, positive_loss, negative_loss: scalars, the first the sum of the others.
    """
    desc0, desc1 = (nn.functional.normalize(desc.float(), dim=-1) for desc in (desc0, desc1))
    similarity = desc0 @ desc1.mT
    losses = {"positive_loss": _mean((1 - similarity) ** 2, positive), "negative_loss": _mean(similarity**2, negative)}
    return {"loss": losses["positive_loss"] + losses["negative_loss"]} | losses


def _mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return ((values * chosen).sum((1, 2)) / chosen.sum((1, 2)).clamp(min=1)).mean()
