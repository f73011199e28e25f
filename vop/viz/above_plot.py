"""The picture of cameras from above: those of a map in grey, queries coloured by how well they were found. Pure."""

import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import ListedColormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullLocator

from vop.catalog import evenly_spread
from vop.pose.localized import center
from vop.viz.above import ERROR, UNITS, Above, Frame
from vop.viz.plots import ACCENT, INK, PAPER, SLIDE_COLORS, STYLE, as_file, inline

CAMERAS, QUERIES, POINTS = 1500, 1500, 20_000  # drawn at most
GREY = "#8b94a3"  # of the map: as faint on white as on black
COLORS = ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.04, 0.84, 64)))  # blue to orange: seen on both
WIDTH, BESIDE, BELOW, ABOVE = 8.2, 1.3, 1.0, 0.3  # inches: the axes, bar, legend, title
HIGHEST = 0.8  # height of the axes at most, of WIDTH
LARGE = 0.01  # an error that is shown as a large one whatever the others are: share of the picture
CONE, DOT = 0.45, 0.22  # opacity of a cone; radius of the dot where a camera stands, in lengths of the cone


def draw(view: Above, scale: Normalize | None = None) -> Markup:
    """The view as inline SVG in the colours of the page; the same view gives the same text. `scale`: see `scale_of`."""
    frame = Frame.of(view)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_size(frame, view), layout="constrained")
        _draw(figure, frame, view, scale or scale_of([view]), ACCENT)
        return inline(figure, f"{view.title} from above: {view.told}".strip())


def above_file(views: Sequence[Above], suffix: str) -> bytes:
    """Views, at least one, as one picture by itself on white, one below the other; png or svg."""
    frames, scale = [Frame.of(view) for view in views], scale_of(views)
    sizes = [_size(frame, view) for frame, view in zip(frames, views, strict=True)]
    heights = [height + ABOVE for _, height in sizes]
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(max(width for width, _ in sizes), sum(heights)), layout="constrained")
        parts = figure.subfigures(len(views), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, frame, view in zip(parts, frames, views, strict=True):
            _draw(part, frame, view, scale, SLIDE_COLORS[0])
            title = f"{textwrap.shorten(view.title, 48, placeholder=' …')}: {view.told}".removeprefix(": ")
            part.suptitle(title, fontsize=10, parse_math=False)
        return as_file(figure, suffix)


def scale_of(views: Sequence[Above]) -> Normalize:
    """From values to colours, one for several views: errors by their logarithm, inliers from 0.

    Errors reach the last colour at `LARGE` of the widest picture or beyond, so that small ones do not look like large.
    """
    values = np.concatenate([view.known for view in views])
    if not len(values):
        return Normalize(0, 1)
    low, high = np.percentile(values, [2, 98])
    if views[0].measured != ERROR:
        return Normalize(0, max(high, 1))
    high = max(high, LARGE * max(Frame.of(view).size.max() for view in views))
    return LogNorm(min(max(low, high / 1e4), high / 10), high)


def share(view: Above) -> float:
    """Width of the drawing as a share of the widest, so that the writing in all is of one size on a page."""
    return _size(Frame.of(view), view)[0] / (WIDTH + BESIDE)


def _size(frame: Frame, view: Above) -> tuple[float, float]:
    """Width and height of the figure, inches."""
    width, height = frame.size
    wide = WIDTH * min(1, HIGHEST * width / height)
    return wide + (BESIDE if len(view.known) else 0.5), wide * height / width + BELOW


def _draw(figure: FigureBase, frame: Frame, view: Above, scale: Normalize, accent: str) -> None:
    axes = figure.add_subplot()
    widest = frame.size.max()
    length = widest * np.clip(0.035 * np.sqrt(60 / max(len(view.database), 1)), 0.008, 0.032)
    plain = not len(view.queries)  # without queries it is the cameras of the map that are looked at
    handles = _database(axes, frame, view, length, accent if plain else GREY)
    handles += _queries(axes, frame, view, max(1.25 * length, 0.022 * widest), scale)
    if len(view.points):
        some = frame.flat(view.points[evenly_spread(len(view.points), POINTS)])
        axes.scatter(
            *some.T, s=np.clip(4000 / len(some), 1.2, 4), color=GREY, alpha=0.3, linewidths=0, zorder=0, rasterized=True
        )
    if len(view.known):
        _bar(figure, axes, view, scale)
    axes.set_xlim(0, frame.size[0])
    axes.set_ylim(0, frame.size[1])
    axes.set_aspect("equal")
    step = np.diff(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, widest))[0]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(step))
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel(UNITS)
    axes.grid()
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    if handles:
        columns = 3 if sum(len(handle.get_label()) for handle in handles[:3]) < 100 else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _database(axes: Axes, frame: Frame, view: Above, length: float, color: str) -> list[Line2D]:
    """Draw the cameras of the map, as two paths: elements of thousands would make the page slow."""
    if not len(view.database):
        return []
    shown = view.database[evenly_spread(len(view.database), CAMERAS)]
    turns = np.linspace(0, 2 * np.pi, 7)[:-1]
    dot = DOT * length * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    dots = frame.flat(center(shown))[:, None] + dot
    for shapes, opacity in ((frame.cones(shown, length), 0.4), (dots, 0.75)):
        axes.add_patch(PathPatch(_path(shapes), facecolor=color, alpha=opacity, linewidth=0, zorder=1))
    label = "camera of the database" if len(view.queries) else "camera"
    if len(shown) < len(view.database):
        label += f" ({len(shown):,} of {len(view.database):,} are drawn)"
    return [_key(f"{label}, and the way it looks", color=color, markeredgewidth=0)]


def _path(shapes: np.ndarray) -> Path:
    """Polygons (n, m, 2) as one path."""
    count, corners, _ = shapes.shape
    closed = np.concatenate([shapes, shapes[:, :1]], axis=1)
    codes = np.tile([Path.MOVETO, *[Path.LINETO] * (corners - 1), Path.CLOSEPOLY], count)
    return Path(closed.reshape(-1, 2), codes)


def _queries(axes: Axes, frame: Frame, view: Above, length: float, scale: Normalize) -> list[Line2D]:
    """Draw the queries, the worst on top."""
    some = evenly_spread(len(view.queries), QUERIES)
    order = np.nan_to_num(view.values[some]) * (1 if view.measured == ERROR else -1)
    some = some[np.argsort(order, kind="stable")]
    poses, values = view.queries[some], view.values[some]
    at, cones = frame.flat(center(poses)), frame.cones(poses, length)
    inside, finite = frame.inside(at), np.isfinite(values)
    at[~inside] = frame.border(at[~inside])
    colors = COLORS(scale(np.where(finite, np.maximum(values, scale.vmin), scale.vmin)))  # 0 has no logarithm
    colors[np.isnan(values)] = to_rgba(GREY)
    faces = list(colors)
    for row in np.flatnonzero(np.isinf(values)):
        faces[row] = INK
    handles = _moved(axes, at, frame.flat(view.truth[some]), colors, 0.4 * length) if len(view.truth) else []
    drawn = np.flatnonzero(inside)
    shades = [faces[row] for row in drawn]
    axes.add_collection(PolyCollection(cones[drawn], facecolors=shades, alpha=CONE, linewidths=0, zorder=3))
    axes.scatter(*at[drawn].T, s=30, facecolors=shades, edgecolors=INK, linewidths=0.6, zorder=4)
    each = "query" if len(some) == len(view.queries) else f"query ({len(some):,} of {len(view.queries):,} are drawn)"
    edge = {"markeredgecolor": INK, "markeredgewidth": 0.6}
    for which, label, color in (
        (finite, each, COLORS(0.3)),
        (np.isnan(values), f"{each}, true pose unknown", GREY),
        (np.isinf(values), f"{each}, in another world than it truly is", INK),
    ):
        if (which & inside).any():
            handles.append(_key(label, markerfacecolor=color, **edge))
    if not inside.all():
        border, shades = at[~inside], [faces[row] for row in np.flatnonzero(~inside)]
        axes.scatter(*border.T, s=36, marker="X", facecolors=shades, edgecolors=INK, linewidths=0.5, zorder=5,
                     clip_on=False)  # fmt: skip
        handles.append(_key(f"{len(border):,} far outside, this way", marker="X", markerfacecolor=GREY, **edge))
    return handles


def _moved(axes: Axes, at: np.ndarray, true: np.ndarray, colors: np.ndarray, least: float) -> list[Line2D]:
    """Draw lines to where the queries truly stood, where that is farther than `least`; NaN: unknown."""
    apart = np.linalg.norm(at - true, axis=1) > least
    if not apart.any():
        return []
    shown, ends = colors[apart], np.stack([at, true], axis=1)[apart]
    axes.add_collection(LineCollection(ends, colors=shown, linewidths=1.1, zorder=2))
    axes.scatter(*ends[:, 1].T, s=11, marker="s", facecolors="none", edgecolors=shown, linewidths=0.9, zorder=2)
    return [_key("where it truly stood", marker="s", markersize=4.5, markerfacecolor="none", color=COLORS(0.3))]


def _key(label: str, **look: object) -> Line2D:
    return Line2D([], [], label=label, **({"linestyle": "none", "marker": "o", "markersize": 6} | look))


def _bar(figure: FigureBase, axes: Axes, view: Above, scale: Normalize) -> None:
    """The bar that tells the colours apart."""
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = ends[bool((view.known < scale.vmin).any()), bool((view.known > scale.vmax).any())]
    bar = figure.colorbar(ScalarMappable(scale, COLORS), ax=axes, extend=extend, aspect=28, pad=0.02, fraction=0.06)
    bar.set_label(f"{view.measured}, {UNITS}" if view.measured == ERROR else view.measured)
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    ticks = MaxNLocator(6, integer=True)
    if isinstance(scale, LogNorm):
        ticks = LogLocator(subs=(1,) if scale.vmax > 300 * scale.vmin else (1, 2, 5))
    bar.ax.yaxis.set_major_locator(ticks)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.tick_params(length=0, pad=4)
