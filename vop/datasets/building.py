"""A building of furnished rooms, made of textured rectangles: what the renderer draws and where its camera walks.

World axes: x east, y north, z up, metres, floor at z = 0. Rooms lie on a grid in a serpentine, so that consecutive
rooms share a door; more doors open at random. Walls, floors and pictures of a room depend on the seed and the room's
number, not on how many rooms there are, except where a door opens to a room that a smaller building lacks.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vop.datasets.raster import PHOTOGRAPHS, Rectangles, photographs

COLUMNS = 6  # rooms in a row of the grid
WALL = 0.2  # metres, thickness
UP = np.array([0.0, 0.0, 1.0])
SIDES = {"north": (0.0, 1.0), "east": (1.0, 0.0), "south": (0.0, -1.0), "west": (-1.0, 0.0)}
BRIGHTNESS = {"north": 1.0, "east": 0.9, "south": 0.95, "west": 0.85}  # light baked in, so that corners show
# photograph, metres per tile, contrast
WALLS = (
    *(("brick", 2.0, 0.5), ("brick", 1.3, 0.3), ("gravel", 2.5, 0.12), ("moon", 4.0, 0.3), ("grass", 2.0, 0.15)),
    *(("coins", 2.2, 0.15), ("immunohistochemistry", 2.5, 0.2), ("retina", 3.0, 0.2)),
)
FLOORS = (("gravel", 1.6, 0.4), ("grass", 1.5, 0.4), ("brick", 1.8, 0.5), ("immunohistochemistry", 2.0, 0.4))
PLASTER = ("gravel", 3.0, 0.25)
PICTURES = tuple(n for n in PHOTOGRAPHS if n not in ("brick", "grass", "gravel", "text", "moon", "colorwheel"))
BODIES = ("brick", "grass", "gravel", "immunohistochemistry", "coins", "hubble_deep_field", "retina")


@dataclass(frozen=True)
class Surface:
    """What a rectangle carries: a photograph, the metres it tiles by, and colour = tint + gain * photograph."""

    texture: int
    metres: float
    tint: np.ndarray
    gain: np.ndarray
    phase: np.ndarray


@dataclass(frozen=True)
class Door:
    """An opening between rooms a < b: its middle (x, y), width and height in metres, and the side of a it is on."""

    a: int
    b: int
    middle: np.ndarray
    width: float
    height: float
    side: str


class _Pieces:
    """Rectangles in the making."""

    def __init__(self):
        self.rows = []

    def add(self, origin, u, v, texture, uv, tint, gain):
        self.rows.append((origin, u, v, texture, uv, tint, gain))

    def tiled(self, origin, u, v, surface: Surface, brightness=1.0, start=(0.0, 0.0)):
        """Add a rectangle with a material that goes on across neighbouring pieces: `start` in metres along u, v."""
        s, t = (surface.phase + start) / surface.metres
        size = np.array([np.linalg.norm(u), np.linalg.norm(v)]) / surface.metres
        uv = (s, size[0], t, size[1])
        self.add(origin, u, v, surface.texture, uv, surface.tint * brightness, surface.gain * brightness)

    def plain(self, origin, u, v, color):
        self.add(origin, u, v, 0, (0, 0, 0, 0), color, np.zeros(3))

    def finish(self) -> Rectangles:
        columns = [np.array(column) for column in zip(*self.rows, strict=True)]
        return Rectangles(*(c if c.dtype == np.int64 else c.astype(np.float64) for c in columns))


@dataclass(frozen=True)
class Building:
    """A building of `rooms` rooms; the same seed gives the same building."""

    seed: int = 0
    rooms: int = 4

    def __post_init__(self):
        if self.rooms < 1:
            raise ValueError(f"a building of {self.rooms} rooms; it needs at least 1")

    def bounds(self, room: int) -> np.ndarray:
        """Inside of a room's walls: x0, x1, y0, y1."""
        row, column = _cell(room)
        x = np.cumsum([0.0] + [_rng(self.seed, 1, c).uniform(5.0, 7.5) for c in range(column + 1)])
        y = np.cumsum([0.0] + [_rng(self.seed, 2, r).uniform(5.0, 7.5) for r in range(row + 1)])
        return np.array([x[-2], x[-1], y[-2], y[-1]]) + np.array([1, -1, 1, -1]) * WALL / 2

    @cached_property
    def doors(self) -> tuple[Door, ...]:
        """All doors, those between consecutive rooms first to last, with the extra ones among them."""
        cells = {_cell(room): room for room in range(self.rooms)}
        found = []
        for room in range(self.rooms):
            row, column = _cell(room)
            neighbours = (("north", (row + 1, column)), ("east", (row, column + 1)), ("west", (row, column - 1)))
            for side, cell in neighbours:
                other = cells.get(cell, -1)
                rng = _rng(self.seed, 3, room, max(other, 0))
                if other == room + 1 or (other > room and rng.random() < 0.35):
                    found.append(self._door(room, other, side, rng))
        return tuple(found)

    def _door(self, a: int, b: int, side: str, rng) -> Door:
        x0, x1, y0, y1 = self.bounds(a)
        width, height, along = rng.uniform(1.1, 2.2), rng.uniform(2.1, 2.5), rng.uniform(0.3, 0.7)
        if side == "north":
            middle = (x0 + along * (x1 - x0), y1 + WALL / 2)
        else:
            middle = (x1 + WALL / 2 if side == "east" else x0 - WALL / 2, y0 + along * (y1 - y0))
        return Door(a, b, np.array(middle), width, height, side)

    def doors_of(self, room: int) -> dict[str, Door]:
        """Doors of a room by its own sides."""
        opposite = {"north": "south", "east": "west", "west": "east"}
        ours = {door.side: door for door in self.doors if door.a == room}
        return ours | {opposite[door.side]: door for door in self.doors if door.b == room}

    def path(self, room: int) -> np.ndarray:
        """Walk through a room from the door of the previous one to that of the next: points (4, 2)."""
        x0, x1, y0, y1 = self.bounds(room)
        rng = _rng(self.seed, 4, room)
        low, high = np.array([x0 + 1.3, y0 + 1.3]), np.array([x1 - 1.3, y1 - 1.3])
        inner = rng.uniform(low, high, (2, 2))
        ends = {}
        for door in self.doors:
            if room in (door.a, door.b):
                ends[door.a + door.b - room] = np.clip(door.middle, low - 0.7, high + 0.7)
        entry = ends.get(room - 1, rng.uniform(low, high))
        return np.stack([entry, *inner, ends.get(room + 1, rng.uniform(low, high))])

    @cached_property
    def rectangles(self) -> Rectangles:
        """All surfaces of the building."""
        pieces = _Pieces()
        for room in range(self.rooms):
            self._furnish(pieces, room)
        for door in self.doors:
            _passage(pieces, door, _rng(self.seed, 6, door.a, door.b))
        return pieces.finish()

    def _furnish(self, pieces: _Pieces, room: int) -> None:
        rng = _rng(self.seed, 5, room)
        bounds, doors = self.bounds(room), self.doors_of(room)
        court = rng.random() < 0.12  # open to the sky, its walls higher than any ceiling, so that none shows above
        height = rng.uniform(3.7, 4.2) if court else rng.uniform(2.7, 3.5)
        wall, floor = _material(rng, WALLS), _material(rng, FLOORS)
        feature, featured = _material(rng, WALLS), rng.choice(list(SIDES))  # one wall differs
        for side, direction in SIDES.items():
            surface = feature if side == featured else wall
            _wall(pieces, rng, bounds, np.array(direction), height, surface, BRIGHTNESS[side], doors.get(side))
        _level(pieces, bounds, 0.0, floor, 0.9)
        if not court:
            _ceiling(pieces, rng, bounds, height)
        keep_clear = [*_densify(self.path(room)), *(door.middle for door in doors.values())]
        for _ in range(rng.integers(4, 8)):
            _object(pieces, rng, bounds, height, np.array(keep_clear))


def _cell(room: int) -> tuple[int, int]:
    row, column = divmod(room, COLUMNS)
    return row, column if row % 2 == 0 else COLUMNS - 1 - column


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _densify(path: np.ndarray, steps: int = 12) -> np.ndarray:
    f = np.linspace(0, 1, steps)[:, None]
    return np.concatenate([p * (1 - f) + q * f for p, q in itertools.pairwise(path)])


def _color(rng, low=0.35, high=0.95) -> np.ndarray:
    """Draw a colour, not too saturated."""
    return rng.uniform(low, high) * (1 - rng.uniform(0, 0.45) * rng.random(3))


def _material(rng, choices, low=0.35) -> Surface:
    name, metres, contrast = choices[rng.integers(len(choices))]
    texture, color = PHOTOGRAPHS.index(name), _color(rng, low)
    gain = contrast * color / np.maximum(photographs().mean[texture], 0.15)
    return Surface(texture, metres * rng.uniform(0.8, 1.25), color * (1 - contrast), gain, rng.uniform(0, 10, 2))


def _right(direction: np.ndarray) -> np.ndarray:
    """Give the right-hand side of a viewer who looks along `direction`, both (2,)."""
    return np.array([direction[1], -direction[0]])


def _upright(start, right, length, top, bottom):
    """Origin, u, v of a standing rectangle: `start` (x, y) is its left end as its viewer sees it."""
    return np.array([*start, top]), np.array([*right, 0.0]) * length, UP * (bottom - top)


def _picture(pieces: _Pieces, rng, origin, u, v, brightness=1.0) -> None:
    """Add a crop of a photograph that fills the rectangle at the photograph's own aspect, as far as it reaches."""
    texture = PHOTOGRAPHS.index(PICTURES[rng.integers(len(PICTURES))])
    shape = np.linalg.norm(u) / np.linalg.norm(v) / photographs().aspect[texture]
    ds, dt = np.array([min(shape, 1.0), min(1 / shape, 1.0)]) * rng.uniform(0.5, 0.98)
    s0, t0 = rng.uniform(0, 1 - ds), rng.uniform(0, 1 - dt)
    s0, ds = (s0 + ds, -ds) if rng.random() < 0.4 else (s0, ds)
    dark, bright = 0.12 * rng.random(3), rng.uniform(0.75, 1.0, 3)
    pieces.add(origin, u, v, texture, (s0, ds, t0, dt), dark * brightness, (bright - dark) * brightness)


def _wall(pieces, rng, bounds, direction, height, surface, brightness, door) -> None:
    """One side of a room: the wall around its door, and the pictures on it."""
    x0, x1, y0, y1 = bounds
    right = _right(direction)
    middle, half = np.array([x0 + x1, y0 + y1]) / 2, np.array([x1 - x0, y1 - y0]) / 2
    length = 2 * abs(right @ half)
    start = middle + direction * abs(direction @ half) - right * length / 2
    spans = [(0.0, length)]
    if door is not None:
        center = right @ (door.middle - start)
        left, end = center - door.width / 2, center + door.width / 2
        spans = [(0.0, left), (end, length)]
        pieces.tiled(
            *_upright(start + right * left, right, door.width, height, door.height), surface, brightness, (left, 0)
        )
    for a, b in spans:
        pieces.tiled(*_upright(start + right * a, right, b - a, height, 0), surface, brightness, (a, 0))
        _hang(pieces, rng, start, right, direction, (a, b), height, brightness)


def _hang(pieces, rng, start, right, direction, span, height, brightness) -> None:
    """Hang pictures side by side along a stretch of wall, some above each other."""
    x = span[0] + rng.uniform(0.05, 0.4)
    while True:
        width = rng.uniform(0.5, 1.7)
        if x + width > span[1] - 0.1:
            return
        top = min(height - 0.15, rng.uniform(1.7, 2.5))
        tall = min(width * rng.uniform(0.6, 1.4), top - 0.3)
        _framed(pieces, rng, start + right * x, right, direction, width, top, top - tall, brightness)
        if top - tall > 1.0 and rng.random() < 0.7:
            low = rng.uniform(0.15, 0.4)
            _framed(pieces, rng, start + right * x, right, direction, width, top - tall - 0.12, low, brightness)
        x += width + rng.uniform(0.05, 0.4)


def _framed(pieces, rng, start, right, direction, width, top, bottom, brightness) -> None:
    """Add a picture 1.5 cm before the wall on a frame of a plain colour."""
    edge = rng.uniform(0.015, 0.05)
    frame = _upright(start - direction * 0.01, right, width, top, bottom)
    pieces.plain(*frame, _color(rng, 0.05, 0.9) * brightness)
    inner = _upright(start - direction * 0.015 + right * edge, right, width - 2 * edge, top - edge, bottom + edge)
    _picture(pieces, rng, *inner, brightness)


def _level(pieces, bounds, z, surface, brightness=1.0) -> None:
    """Add a floor, seen from above."""
    x0, x1, y0, y1 = bounds
    pieces.tiled(np.array([x0, y1, z]), np.array([x1 - x0, 0, 0]), np.array([0, y0 - y1, 0]), surface, brightness)


def _ceiling(pieces, rng, bounds, height) -> None:
    """Add plaster and a few bright panels, seen from below."""
    x0, x1, y0, y1 = bounds
    pieces.tiled(
        *(np.array([x0, y0, height]), np.array([x1 - x0, 0, 0]), np.array([0, y1 - y0, 0])),
        *(_material(rng, (PLASTER,), 0.7), 0.85),
    )
    size = rng.uniform(0.3, 1.2, 2)
    for x in np.linspace(x0 + 1, x1 - 1 - size[0], rng.integers(1, 4)):
        for y in np.linspace(y0 + 1, y1 - 1 - size[1], rng.integers(1, 3)):
            corner, u, v = np.array([x, y, height - 0.01]), np.array([size[0], 0, 0]), np.array([0, size[1], 0])
            pieces.plain(corner, u, v, np.array([0.97, 0.96, 0.92]))


def _passage(pieces, door: Door, rng) -> None:
    """Line the thickness of the wall in a doorway."""
    across = np.array([WALL, door.width]) / 2 if door.side != "north" else np.array([door.width, WALL]) / 2
    (x0, y0), (x1, y1) = door.middle - across, door.middle + across
    surface = _material(rng, (PLASTER,))
    for side in ("east", "west") if door.side == "north" else ("north", "south"):
        direction = np.array(SIDES[side])
        right = _right(direction)
        start = door.middle + direction * abs(direction @ across) - right * WALL / 2
        pieces.tiled(*_upright(start, right, WALL, door.height, 0), surface, BRIGHTNESS[side])
    _level(pieces, (x0, x1, y0, y1), 0.0, surface, 0.8)
    pieces.tiled(np.array([x0, y0, door.height]), np.array([x1 - x0, 0, 0]), np.array([0, y1 - y0, 0]), surface, 0.7)


def _object(pieces, rng, bounds, height, keep_clear) -> None:
    """Place a crate, a cabinet, a pillar or a partition, turned at random, where it blocks no path; or give up."""
    kinds = {
        "crate": (*rng.uniform(0.4, 1.1, 2), rng.uniform(0.4, 1.1)),
        "cabinet": (rng.uniform(0.35, 0.6), rng.uniform(0.8, 1.8), rng.uniform(1.2, 2.1)),
        "pillar": (*rng.uniform(0.3, 0.55, 2), height),
        "partition": (0.12, rng.uniform(1.2, 2.4), rng.uniform(1.7, 2.3)),
    }
    size = np.array(kinds[rng.choice(list(kinds))])
    x0, x1, y0, y1 = bounds
    for _ in range(10):
        yaw = rng.choice([0.0, np.pi / 2]) if rng.random() < 0.5 else rng.uniform(0, np.pi)
        forward = np.array([np.cos(yaw), np.sin(yaw)])
        reach = np.abs(forward * size[0]) / 2 + np.abs(_right(forward) * size[1]) / 2 + 0.03
        center = rng.uniform(np.array([x0, y0]) + reach, np.array([x1, y1]) - reach)
        local = np.abs((keep_clear - center) @ np.stack([forward, _right(forward)], axis=1)) - size[:2] / 2
        if np.linalg.norm(np.maximum(local, 0), axis=1).min() > 0.8:
            _block(pieces, rng, center, forward, size)
            return


def _block(pieces, rng, center, forward, size) -> None:
    """Add the sides and top of an upright block; its larger sides may carry a picture."""
    texture = BODIES[rng.integers(len(BODIES))]
    surface = _material(rng, ((texture, rng.uniform(0.5, 1.5), rng.uniform(0.4, 0.9)),))
    pictured, direction = rng.random() < 0.7, forward
    for quarter, brightness in enumerate((1.0, 0.85, 0.95, 0.8)):
        direction_right = _right(direction)
        deep, wide = (size[0], size[1]) if quarter % 2 == 0 else (size[1], size[0])
        start = center - direction * deep / 2 - direction_right * wide / 2
        pieces.tiled(*_upright(start, direction_right, wide, size[2], 0), surface, brightness, (quarter * 0.7, 0))
        if pictured and wide > 0.6:
            top = size[2] - 0.08
            inner = start + direction_right * 0.06
            _framed(pieces, rng, inner, direction_right, direction, wide - 0.12, top, max(0.05, top - 1.4), brightness)
        direction = direction_right
    right = _right(forward)
    corner = center - right * size[1] / 2 + forward * size[0] / 2
    u, v = np.array([*right, 0]) * size[1], np.array([*-forward, 0]) * size[0]
    pieces.tiled(np.array([*corner, size[2]]), u, v, surface, 1.0)
