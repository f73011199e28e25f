"""Where training starts from: a projection of tokens in which what matches is alike, fitted in closed form."""

from collections.abc import Iterable

import numpy as np
import scipy.linalg

from vop.models.whitening import Whitening
from vop.training.batches import Batch

SHRINKAGE = 0.3  # of the covariance of differences towards a multiple of the identity: few matches show few directions


class MatchedWhitening:
    """Sums over matched patches, from which `fit` makes the projection.

    The tokens are whitened by the covariance of the differences between matching patches, so that what changes from
    one view of a place to another counts little, and of the result the directions are kept along which different
    places vary most: linear discriminant analysis with every match a class of its own (Mikolajczyk and Matas, Improving
    Descriptors for Fast Tree Matching by Optimal Linear Projection, ICCV 2007).
    """

    def __init__(self, width: int):
        self.count, self.sum, self.squares = 0, np.zeros(width), np.zeros((width, width))
        self.matches, self.differences = 0, np.zeros((width, width))

    def add(self, batches: Iterable[Batch]) -> None:
        """Add the patches and the matches of batches of tokens."""
        for batch in batches:
            tokens = [side.float().numpy() for side in (batch.inputs0, batch.inputs1)]
            seen = (batch.positive | batch.negative).any(2), (batch.positive | batch.negative).any(1)
            for side, chosen in zip(tokens, seen, strict=True):
                patches = side[chosen.numpy()]
                self.count += len(patches)
                self.sum += patches.sum(0, dtype=np.float64)
                self.squares += patches.T @ patches
            pair, patch0, patch1 = batch.positive.numpy().nonzero()
            difference = tokens[0][pair, patch0] - tokens[1][pair, patch1]
            self.matches += len(difference)
            self.differences += difference.T @ difference

    def fit(self, width: int) -> Whitening:
        """The projection to `width` numbers. Raises `ValueError` where there are fewer matches than numbers."""
        full = len(self.sum)
        if width > full or self.matches <= width:
            raise ValueError(f"a projection of {full} numbers to {width} cannot be fitted to {self.matches} matches: "
                             "set train.start=random, or a smaller train.descriptor_dim")  # fmt: skip
        mean = self.sum / self.count
        total = self.squares / self.count - np.outer(mean, mean)
        within = self.differences / (2 * self.matches)
        within = (1 - SHRINKAGE) * within + SHRINKAGE * np.trace(within) / full * np.eye(full)
        ratios, axes = scipy.linalg.eigh(total, within)
        axes = axes[:, np.argsort(-ratios, kind="stable")[:width]]
        axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(width)])
        return Whitening(mean.astype(np.float32), axes.astype(np.float32))
