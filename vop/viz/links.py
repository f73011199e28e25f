"""Drawings of local matches: two photographs side by side, a line for each match that a relative pose rests on."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from vop.catalog import evenly_spread
from vop.viz.matches import GAP, Photo, cell_size, layer, side_by_side, svg, use

DRAWN = 60  # lines, and as many dots, at most
FEW = 20  # lines; so many or fewer are drawn bolder
LONG_SIDE = 448  # units of a drawing


@dataclass(frozen=True, eq=False)
class Links:
    """The matches of two images, in the order of their keypoints' scores.

    left, right: (m, 2) points as shares of the width and the height, 0 to 1. linked: (m,) bool, those that are drawn as
    lines: the inliers of a pose, or all matches where there is no pose. true: (m,) bool, whether a match agrees with
    the true pose; None: that is not known.
    """

    left: np.ndarray
    right: np.ndarray
    linked: np.ndarray
    true: np.ndarray | None = None

    def __post_init__(self):
        lengths = {len(each) for each in (self.left, self.right, self.linked, self.true) if each is not None}
        if len(lengths) != 1:
            raise ValueError(f"points, linked and true have {sorted(lengths)} entries, but must have one per match")

    def __len__(self) -> int:
        return len(self.linked)

    @property
    def count(self) -> int:
        """How many matches lines stand for."""
        return int(self.linked.sum())

    @property
    def false(self) -> int | None:
        """Of these, how many contradict the true pose; None: not known."""
        return None if self.true is None else int((self.linked & ~self.true).sum())


def drawing_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of an image in the units of a drawing."""
    scale = LONG_SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_links(left: Photo, right: Photo, links: Links, images: tuple[str, str]) -> Markup:
    """Two photographs with up to `DRAWN` lines, evenly chosen, and as many dots for the matches that have no line.

    A line is of the class true, false (dashed, and on top) or open (its truth is not known). `images` are ids on the
    page.
    """
    cell = cell_size([left, right])
    corners = side_by_side(left, right, cell)
    places = [
        points * photo.scaled_size + corner
        for points, photo, corner in zip((links.left, links.right), (left, right), corners, strict=True)
    ]
    dots = [_dot(place[row]) for row in _chosen(~links.linked) for place in places]
    shown = sorted(_chosen(links.linked), key=lambda row: _kind(links, row) == "false")
    lines = [_line(_kind(links, row), *(place[row] for place in places)) for row in shown]
    photos = [use(image, corner) for image, corner in zip(images, corners, strict=True)]
    label = f"{left.name} at the left, {right.name} at the right: {len(lines)} of {links.count} matches drawn"
    name = "links few" if len(lines) <= FEW else "links"
    return svg((2 * cell[0] + GAP, cell[1]), label, *photos, layer(name, [*dots, *lines]))


def _dot(place: np.ndarray) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="1.6"/>').format(*place)


def _line(kind: str, start: np.ndarray, end: np.ndarray) -> Markup:
    ends = _dot(start) + _dot(end)
    line = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(*start, *end)
    return Markup('<g class="{}">{}{}</g>').format(kind, line, ends)


def _chosen(wanted: np.ndarray) -> list[int]:
    rows = np.flatnonzero(wanted)
    return rows[evenly_spread(len(rows), DRAWN)].tolist()


def _kind(links: Links, row: int) -> str:
    return "open" if links.true is None else "true" if links.true[row] else "false"
