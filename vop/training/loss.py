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
    pair, patch0, patch1 = positive.nonzero(as_tuple=True)
    # of the few positives only their own products; the matrix of all is gone through as rarely as can be
    apart = (1 - (desc0[pair, patch0] * desc1[pair, patch1]).sum(-1)) ** 2
    alike = (desc0 @ desc1.mT) * negative
    sums = {
        "positive_loss": apart.new_zeros(len(positive)).index_add(0, pair, apart),
        "negative_loss": (alike * alike).sum((1, 2)),
    }
    counts = {"positive_loss": positive.sum((1, 2)), "negative_loss": negative.sum((1, 2))}
    losses = {name: (total / counts[name].clamp(min=1)).mean() for name, total in sums.items()}
    return {"loss": losses["positive_loss"] + losses["negative_loss"]} | losses
