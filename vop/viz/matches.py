"""Drawings of overlap: which patches of two images match, and which patches of a query found support.

Drawings are SVG laid over photographs, in the pixels of the scaled image (long side 224), so a patch is 14 units wide.
They hold no photograph themselves: they refer to one by its id on the page, so that an image shown many times is
embedded once.
"""

import colorsys
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from vop.image import patch_box, patch_grid, patch_mask

PATCH = 14
GAP = 6
HEAT = colormaps["YlOrRd"]
NO_HEAT = Markup('fill="#000000" fill-opacity="0.62"')


@dataclass(frozen=True)
class Photo:
    """A photograph on the page."""

    name: str
    """Name in the collection; shown as text."""
    rgb: np.ndarray
    """(H, W, 3) uint8, upright, of any size; the report reduces it."""
    scaled_size: tuple[int, int]
    """(width, height) in the units of the drawing, of any scale."""

    def __post_init__(self):
        if self.rgb.ndim != 3 or self.rgb.shape[2] != 3 or self.rgb.dtype != np.uint8:
            raise ValueError(f"{self.name}: rgb is {self.rgb.dtype} {self.rgb.shape}, but must be uint8 (H, W, 3)")


@dataclass(frozen=True)
class Picture(Photo):
    """An image with its patches; its drawing's units are pixels inside the letterbox."""

    patches: np.ndarray
    """Unit descriptors of all P patches, padding included, (P, E) float; P is a square number."""

    def __post_init__(self):
        super().__post_init__()
        if self.patches.ndim != 2 or math.isqrt(len(self.patches)) ** 2 != len(self.patches):
            raise ValueError(
                f"{self.name}: patches have shape {self.patches.shape}, but must be (P, E) with P a square number, "
                "the patches of the whole letterbox"
            )

    @property
    def image_size(self) -> int:
        """Side of the letterbox in pixels."""
        return PATCH * math.isqrt(len(self.patches))

    @property
    def mask(self) -> np.ndarray:
        """Which patches are image and not padding, (P,) bool."""
        return patch_mask(*self.scaled_size, self.image_size)


def patch_similarities(query: Picture, match: Picture) -> np.ndarray:
    """Cosine similarity of every query patch (rows) to every patch of the match, (P, P) float32; padding is -inf."""
    similarity = query.patches.astype(np.float32) @ match.patches.astype(np.float32).T
    similarity[~query.mask] = -np.inf
    similarity[:, ~match.mask] = -np.inf
    return similarity


def matched_patches(similarity: np.ndarray, radius: float) -> np.ndarray:
    """Pairs of patches that vote for each other and are each other's best.

    Args:
        similarity: (P, P) as `patch_similarities` returns it.
        radius: cosine distance below which two patches vote for each other.

    Returns:
        (m, 2) int64 indices (query patch, patch of the match), by query patch. No patch is in two pairs; ties go to
        the lower index. A vote needs a hit only, so there may be more votes than pairs, never a pair without a vote.
    """
    best = similarity.argmax(axis=1)
    patches = np.arange(len(similarity))
    keep = (similarity.argmax(axis=0)[best] == patches) & (similarity[patches, best] > 1 - radius)
    return np.stack([patches[keep], best[keep]], axis=1)


def patch_support(similarity: np.ndarray, radius: float) -> np.ndarray:
    """Sum of the similarities of each query patch's hits in one image, (P,) float32, before any weight."""
    return np.where(similarity > 1 - radius, similarity, 0).sum(axis=1)


def position_colors(scaled_size: tuple[int, int], image_size: int) -> list[str]:
    """One colour for each patch of an image, smooth over it: the hue follows the column, the lightness the row.

    Args:
        scaled_size: (width, height) inside the letterbox; the colours span this part.
        image_size: side of the letterbox in pixels.

    Returns:
        P hexadecimal colours, row by row.
    """
    rows, cols = patch_grid(*scaled_size, image_size)
    side = image_size // PATCH

    def color(row: int, col: int) -> str:
        across, down = (min(i / max(n - 1, 1), 1) for i, n in ((col, cols), (row, rows)))
        return to_hex(colorsys.hls_to_rgb(0.85 * across, 0.72 - 0.34 * down, 0.95))

    return [color(*divmod(patch, side)) for patch in range(side * side)]


def heat_stops(n: int = 8) -> list[str]:
    """The colours of the overlap map from no support to the most, for its legend."""
    return [to_hex(HEAT(i / (n - 1))) for i in range(n)]


def draw_overlap(query: Picture, support: np.ndarray, image: str) -> Markup:
    """The overlap map of a query: its patches coloured by the support they found, the others darkened.

    Args:
        query: the image.
        support: (P,) not negative; 0 = found none. The colours follow its square root, up to its maximum.
        image: id of the photograph on the page.

    Returns:
        An `<svg>`; `data-p` of a box is its patch.
    """
    peak = max(float(support[query.mask].max()), np.finfo(np.float32).tiny)
    level = np.sqrt(support / peak)
    boxes = [
        _box(query, p, (0, 0), p, _heat(level[p]) if level[p] > 0 else NO_HEAT)
        for p in np.flatnonzero(query.mask).tolist()
    ]
    found = np.count_nonzero(support[query.mask])
    label = f"Overlap map of {query.name}: {found} of {len(boxes)} patches found support"
    return svg(query.scaled_size, label, use(image, (0, 0)), layer("heat", boxes))


def draw_match(
    query: Picture,
    match: Picture,
    pairs: np.ndarray,
    strength: np.ndarray,
    images: tuple[str, str],
    cell: tuple[int, int] | None = None,
) -> Markup:
    """Two images side by side; each pair of matched patches has one colour, that of its place in the query.

    Args:
        query: drawn at the left.
        match: drawn at the right.
        pairs: (m, 2) patch indices (query, match).
        strength: (m,) from 0 to 1, how much each pair counts; stronger pairs are filled more.
        images: ids of the two photographs on the page.
        cell: (width, height) of the space kept for each image, so that drawings of a row have one scale; None: as
            large as both need.

    Returns:
        An `<svg>`; the two boxes of a pair share `data-p`, the query's patch.
    """
    cell = cell or cell_size([query, match])
    colors = position_colors(query.scaled_size, query.image_size)
    origins = side_by_side(query, match, cell)
    boxes = [
        _box(picture, patch, origin, p, _tint(colors[p], level))
        for (p, s), level in zip(pairs.tolist(), strength.tolist(), strict=True)
        for picture, patch, origin in zip((query, match), (p, s), origins, strict=True)
    ]
    photos = [use(image, origin) for image, origin in zip(images, origins, strict=True)]
    label = f"{query.name} at the left, {match.name} at the right: {len(pairs)} matched patches"
    return svg((2 * cell[0] + GAP, cell[1]), label, *photos, layer("pairs", boxes))


def cell_size(photos: Iterable[Photo]) -> tuple[int, int]:
    """The smallest (width, height) that holds each of the scaled images."""
    widths, heights = zip(*(photo.scaled_size for photo in photos), strict=True)
    return max(widths), max(heights)


def side_by_side(left: Photo, right: Photo, cell: tuple[int, int]) -> list[tuple[float, float]]:
    """Upper left corners of two photographs: next to each other, each in the middle of the cell's height."""
    return [(x, (cell[1] - photo.scaled_size[1]) / 2) for x, photo in ((0, left), (left.scaled_size[0] + GAP, right))]


def use(image: str, origin: tuple[float, float]) -> Markup:
    """The photograph of this id at a place of the drawing."""
    return Markup('<use href="#{}" x="{:g}" y="{:g}"/>').format(image, *origin)


def _box(picture: Picture, patch: int, origin: tuple[float, float], key: int, paint: Markup) -> Markup:
    x0, y0, x1, y1 = patch_box(patch, picture.scaled_size, picture.scaled_size, picture.image_size)
    return Markup('<rect data-p="{}" x="{:g}" y="{:g}" width="{:g}" height="{:g}" {}/>').format(
        key, x0 + origin[0], y0 + origin[1], x1 - x0, y1 - y0, paint
    )


def _heat(level: float) -> Markup:
    return Markup('fill="{}" fill-opacity="{:.2f}"').format(to_hex(HEAT(level)), 0.12 + 0.6 * level)


def _tint(color: str, level: float) -> Markup:
    return Markup('fill="{0}" stroke="{0}" fill-opacity="{1:.2f}"').format(color, 0.1 + 0.5 * level)


def layer(name: str, marks: Iterable[Markup]) -> Markup:
    """What is drawn over photographs; a reader can switch it off."""
    return Markup('<g class="overlay {}">{}</g>').format(name, Markup("").join(marks))


def svg(size: tuple[int, int], label: str, *parts: Markup) -> Markup:
    """A drawing of this (width, height); the label is for those who cannot see it."""
    return Markup('<svg role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>').format(
        *size, label, Markup("").join(parts)
    )
