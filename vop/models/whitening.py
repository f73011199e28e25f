"""PCA whitening of backbone tokens: where there is no trained encoder, a shorter and better spread descriptor."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Whitening:
    """An affine map `(token - mean) @ projection` after which the sample's covariance is the identity.

    mean: (D,) float32. projection: (D, E) float32, principal axes by falling variance, each over its deviation.
    """

    mean: np.ndarray
    projection: np.ndarray

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whiten tokens (..., D) to (..., E), float32."""
        mean, projection = (torch.tensor(array).to(tokens.device) for array in (self.mean, self.projection))
        return (tokens - mean) @ projection

    def arrays(self) -> dict[str, np.ndarray]:
        """The two arrays by name, each in C order; `Whitening(**arrays)` builds it again."""
        # safetensors writes arrays of any other order scrambled, without a word
        return {name: np.ascontiguousarray(array) for name, array in vars(self).items()}


def fit_whitening(tokens: np.ndarray, width: int) -> Whitening:
    """Fit a whitening to sampled tokens (n, D) that keeps `width` (E) numbers. Computed in float64.

    The same sample gives the same map: the sign of each axis is the one that makes its largest entry positive.
    Raises `ValueError` if the sample does not vary in `width` directions.
    """
    n, full = tokens.shape
    if not 1 <= width <= full:
        raise ValueError(f"whitening to {width} numbers, but the tokens have {full}: choose 1 to {full}")
    mean = tokens.mean(0, dtype=np.float64)
    covariance = np.zeros((full, full))
    for start in range(0, n, 8192):  # in pieces, because a float64 copy of a whole sample can take gigabytes
        centred = tokens[start : start + 8192] - mean
        covariance += centred.T @ centred / n
    variances, axes = np.linalg.eigh(covariance)
    variances, axes = variances[::-1][:width], axes[:, ::-1][:, :width]
    if n <= width or variances[-1] <= 1e-12 * variances[0]:
        raise ValueError(
            f"{n} sampled tokens vary in fewer than {width} directions: sample more images, or whiten to fewer numbers"
        )
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(width)])
    return Whitening(mean.astype(np.float32), (axes / np.sqrt(variances)).astype(np.float32))
