"""Which patches of two images show the same surface: labels from pixels whose place in the other image is known.

Breaking the Frame, section 3.2, with the rules of the original: every pixel of an image that has a counterpart votes
for the pair of patches that the two lie in; a pair of patches is positive if each is the other's best in both
directions. All functions take B pairs of images at a time and run where their tensors lie. Images are letterboxed to a
square of S pixels, patches are 14 x 14 pixels, row by row, P of them; pixel centres lie at +0.5 (`vop.geometry`).
"""

from dataclasses import dataclass, fields

import torch

NEAREST_Z = 1e-4  # metres: a point closer to the other camera, or behind it, has no counterpart


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Where pixels of one image lie in the other.

    pixels: (B, M) int64, y * S + x of M pixels of the source image, in row-major order. points: (B, M, 2) float32, x
    and y in the target image. known: (B, M) bool, whether it is known what the pixel shows; valid: (B, M) bool, whether
    the target image shows it too, at this point.
    """

    pixels: torch.Tensor
    points: torch.Tensor
    known: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, eq=False)
class PatchLabels:
    """What is known of the patches of B pairs.

    positive: (B, P, P) bool, patches of image 0 by patches of image 1 that show the same. counts: (B, P, P) int32, how
    many pixels of image 0 in one lie in the other. shared: (B, P, P) bool, whether any pixel of either does. visible0,
    visible1: (B, P) bool, patches of which any pixel has a counterpart. known0, known1: (B, P) bool, patches of which
    it is known of any pixel what it shows.
    """

    positive: torch.Tensor
    counts: torch.Tensor
    shared: torch.Tensor
    visible0: torch.Tensor
    visible1: torch.Tensor
    known0: torch.Tensor
    known1: torch.Tensor

    def of(self, row: int) -> "PatchLabels":
        """The labels of one of the pairs, with B = 1."""
        return PatchLabels(*(getattr(self, field.name)[row : row + 1] for field in fields(self)))


def patch_labels(
    forth: Correspondence, back: Correspondence, size: int, min_pixels: int = 2, patch_size: int = 14
) -> PatchLabels:
    """Labels from the counterparts of image 0's pixels in image 1 (`forth`) and the reverse (`back`).

    A patch of image 0 chooses the patch of image 1 in which most of its pixels lie, at least `min_pixels` (among
    equals the one met first, pixels taken row by row); of those that chose the same patch the one with most pixels
    stays (the first). The same with the pixels of image 1, where too a patch of image 0 chooses first, as in the
    original; positive is what both directions chose.

    Args:
        size: S, side of the letterbox in pixels, a multiple of 14.
    """
    counts, first = _counted(forth, size, patch_size)
    counts1, first1 = _counted(back, size, patch_size)
    chosen = _chosen(counts, first, min_pixels) & _chosen(counts1.mT.contiguous(), first1.mT.contiguous(), min_pixels)
    shared = (counts > 0) | (counts1.mT > 0)
    known = (_patches_of(found, found.known, size, patch_size) for found in (forth, back))
    return PatchLabels(chosen, counts.int(), shared, counts.any(2), counts1.any(2), *known)


def depth_correspondence(
    depth0: torch.Tensor,
    K0: torch.Tensor,
    depth1: torch.Tensor | None,
    K1: torch.Tensor,
    cam1_from_cam0: torch.Tensor,
    limits1: torch.Tensor,
    tolerance: float = 0.0,
) -> Correspondence:
    """Warp every pixel of image 0 into image 1 by its depth.

    Args:
        depth0: (B, S, S) float32, metres along z, 0 or not finite: none. Letterboxed as the image is.
        K0, K1: (B, 3, 3), pixels of the letterboxed images.
        depth1: as depth0, for the test of occlusion; None: without.
        cam1_from_cam0: (B, 4, 4).
        limits1: (B, 2), greatest x and y that lie inside image 1: its scaled size - 1. The original takes twice the
            principal point for the size.
        tolerance: greatest relative difference between the depth that a pixel arrives with and the one found there.
    """
    batch, side = len(depth0), depth0.shape[-1]
    pixels = torch.arange(side * side, device=depth0.device)
    # float32, in these steps, as the original: what a pixel on a border between patches counts for depends on it
    centers = torch.stack([pixels % side, pixels // side], 1).float() + 0.5
    z0 = depth0.reshape(batch, -1, 1).float()
    rays = (centers - K0[:, None, :2, 2].float()) / _focal(K0)
    points = torch.cat([rays * z0, z0], 2)
    points = points @ cam1_from_cam0[:, :3, :3].float().mT + cam1_from_cam0[:, None, :3, 3].float()
    z = points[..., 2]
    seen = points[..., :2] / z[..., None].clamp(min=NEAREST_Z) * _focal(K1) + K1[:, None, :2, 2].float()
    known = _is_depth(z0[..., 0])
    there = known & (z > NEAREST_Z) & ((seen >= 0) & (seen <= limits1[:, None])).all(2)
    if depth1 is not None:
        pair, place = there.nonzero(as_tuple=True)
        column, row = seen[pair, place].long().unbind(1)
        found = depth1[pair, row, column]
        there[pair, place] = _is_depth(found) & ((z[pair, place] - found).abs() <= tolerance * found)
    return Correspondence(pixels.expand(batch, -1), seen, known, there)


def _is_depth(z: torch.Tensor) -> torch.Tensor:
    return (z > 0) & (z < torch.inf)


def _focal(K: torch.Tensor) -> torch.Tensor:
    return K[:, None, [0, 1], [0, 1]].float()


def _counted(found: Correspondence, size: int, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of each source patch in each target patch, (B, P, P) int64, and the first of them (S * S: none)."""
    columns = size // patch_size
    patches, batch = columns * columns, len(found.pixels)
    pair, place = found.valid.nonzero(as_tuple=True)
    pixels, points = found.pixels[pair, place], found.points[pair, place]
    column, row = (points[:, axis].int() // patch_size for axis in (0, 1))  # a valid point is inside, so not negative
    cell = (pair * patches + _patch(pixels, size, patch_size)) * patches + row * columns + column
    counts = torch.bincount(cell, minlength=batch * patches * patches)
    first = torch.full_like(counts, size * size).scatter_reduce_(0, cell, pixels, "amin")
    return counts.view(batch, patches, patches), first.view(batch, patches, patches)


def _patch(pixels: torch.Tensor, size: int, patch_size: int) -> torch.Tensor:
    """The patch that a pixel, y * S + x, lies in."""
    pixels = pixels.int()  # divided twice as fast as 64 bits
    row = pixels // size
    return row // patch_size * (size // patch_size) + (pixels - row * size) // patch_size


def _patches_of(found: Correspondence, chosen: torch.Tensor, size: int, patch_size: int) -> torch.Tensor:
    """Patches with any of the chosen source pixels, (B, P) bool."""
    pair, place = chosen.nonzero(as_tuple=True)
    patches, batch = (size // patch_size) ** 2, len(chosen)
    seen = torch.zeros(batch * patches, dtype=torch.bool, device=chosen.device)
    seen[pair * patches + _patch(found.pixels[pair, place], size, patch_size)] = True
    return seen.view(batch, patches)


def _chosen(counts: torch.Tensor, first: torch.Tensor, min_pixels: int) -> torch.Tensor:
    """Pairs of patches that one direction chooses, (B, P, P) bool, from counts and first pixels by image 0, image 1."""
    batch, patches, _ = counts.shape
    best = (counts * (first.max() + 1) + (first.max() - first)).argmax(2)
    most = counts.gather(2, best[..., None])[..., 0]
    order = torch.arange(patches, device=counts.device)
    claim = torch.where(most >= min_pixels, most * patches + (patches - 1 - order), -1)
    strongest = torch.full((batch, patches), -1, dtype=torch.int64, device=counts.device)
    strongest.scatter_reduce_(1, best, claim, "amax")
    stays = (claim >= 0) & (claim == strongest.gather(1, best))
    return torch.zeros_like(counts, dtype=torch.bool).scatter_(2, best[..., None], stays[..., None])
