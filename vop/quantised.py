"""Patch descriptors in one byte a number.

    q = rint(127 x / max|x|)    int8, what is stored for a unit vector x; the zero vector stays one
    q / |q|                     the unit vector that it stands for

No scale is stored: descriptors have unit length, so q alone says which one it stands for. |q|^2 is a whole number, and
the same q is therefore the same float32 vector everywhere, in `widen` as in the kernel of the votes. Each number of x
is rounded by at most max|x| / 254.
"""

import numpy as np

LEVEL = 127


def float_type(dtype: str) -> str:
    """The type in which a store with patches in `dtype` keeps its global descriptors and tokens."""
    return "float16" if dtype == "int8" else dtype


def stored(patches: np.ndarray, dtype: str) -> np.ndarray:
    """Unit vectors (..., E) in the type of a store: int8, float16 or float32."""
    return quantise(patches) if dtype == "int8" else patches.astype(dtype)


def quantise(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., E) float of any length as int8; the length is lost. Scaling by a power of two changes nothing.

    Raises ValueError where a number is not finite.
    """
    wide = vectors.astype(np.float64)  # 127 x is then exact for float32, and one rounding remains
    if not np.isfinite(wide).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(wide))} of {wide.size} numbers of the patches are not finite, and int8 "
            "has no such values: the model's numbers overflow; try embedding.precision=float32"
        )
    largest = np.abs(wide).max(axis=-1, keepdims=True)
    return np.rint(LEVEL * wide / np.where(largest > 0, largest, 1)).astype(np.int8)


def widen(patches: np.ndarray) -> np.ndarray:
    """Patches (..., E) as they are stored, in float32; int8 ones at unit length.

    int8: float32(q) * float32(1 / sqrt(sum q^2)), the root and the quotient in float64; zeros stay zeros.
    """
    if patches.dtype != np.int8:
        return patches.astype(np.float32)
    squares = np.einsum("...e,...e->...", patches, patches, dtype=np.int64)
    scale = np.divide(1.0, np.sqrt(squares), out=np.zeros(squares.shape), where=squares > 0).astype(np.float32)
    return patches.astype(np.float32) * scale[..., None]
