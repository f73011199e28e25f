"""Descriptors of photographs that were never taken: for tests and benchmarks at sizes where nobody has the photographs.

Cameras walk along streets, each street several times. A photograph shows, by its patches,

    half      the stretch of street before it: landmarks of a few patches each; photographs taken close to each other
              share part of the stretch, so that their overlap is known, and falls with the distance
    quarter   a few of 64 things that are everywhere, such as sky, asphalt and leaves: unrelated images share some
    quarter   what no other image shows

and each patch sees its thing more or less well, so that the similarities of true matches spread around any useful
radius. Every number follows from (seed, number of the image) alone: any image can be made on its own, in any order,
and a collection of any size in the memory of one shard.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vop.progress import progress
from vop.quantised import float_type, stored
from vop.store import EmbeddingStore, tensor_column

PATCH_SIZE = 14
LANDMARKS, VIEWS = 16, 12  # landmarks in view; steps of a walk after which nothing of the stretch is in view any more
THINGS, THINGS_SEEN = 64, 8  # things that are everywhere, and how many of them an image shows
BLUR = 0.1, 0.6  # least and greatest squared length of what disturbs a patch, whose thing has length 1
GLOBAL_BLUR = 0.25  # the same for the global descriptor
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# What a hash is taken of: numbers of different kinds of things must not give the same vectors.
LANDMARK, THING, CHOICE, SHARPNESS, NOISE, GLOBAL_NOISE = range(6)


@dataclass(frozen=True)
class World:
    """A collection of `images` images, numbered from 0; a larger one begins with the same images.

    patches       P, a square number: the images count as square, without padding
    width         E; global_width: G
    walk          images of a walk
    visits        walks along each street, one after the other, with viewpoints between those of the others
    """

    images: int
    patches: int = 256
    width: int = 256
    global_width: int = 256
    seed: int = 0
    walk: int = 500
    visits: int = 2

    def __post_init__(self):
        for name in ("images", "patches", "width", "global_width", "walk", "visits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if math.isqrt(self.patches) ** 2 != self.patches or self.patches < 16:
            raise ValueError(f"patches is {self.patches}, but must be a square number from 16: 16, 25, 36, ..., 256")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to 2**32 - 1")

    def name(self, number: int) -> str:
        """Name of an image; the order of names is that of numbers (up to 10,000 walks)."""
        return f"walk-{number // self.walk:04d}/{number:07d}.jpg"

    @staticmethod
    def number(name: str) -> int:
        """The image of a name."""
        return int(name.rpartition("/")[2].removesuffix(".jpg"))

    def overlap(self, a: int | np.ndarray, b: int | np.ndarray) -> np.ndarray:
        """Share of the stretch of street before image `a` that is also before `b`, 0 to 1; arrays of numbers too."""
        (street_a, start_a), (street_b, start_b) = self._view(a), self._view(b)
        shared = np.maximum(0, self._stretch - np.abs(start_a - start_b)) / self._stretch
        return np.where(street_a == street_b, shared, 0.0)

    def descriptors(self, numbers: Sequence[int] | np.ndarray, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
        """Global descriptors (n, G) and patches (n, P, E) of these images, as a store in `dtype` has them."""
        numbers = np.asarray(numbers, np.int64)
        self._check(numbers)
        globals_ = np.empty((len(numbers), self.global_width), float_type(dtype))
        patches = np.empty((len(numbers), self.patches, self.width), dtype)
        for i, number in enumerate(numbers):  # one at a time: it stays in the cache, and no chunking changes its bits
            globals_[i], described = self._describe(number)
            patches[i] = stored(described, dtype)
        return globals_, patches

    @property
    def features(self) -> dict:
        """What the manifest of a store says. The number of images is no part of it: a world may grow."""
        made_by = {name: getattr(self, name) for name in ("seed", "walk", "visits", "width", "global_width")}
        return {
            "backbone": {"name": "imported", "synthetic": made_by},  # imported: no images are at hand
            "encoder": None,
            "preprocessing": {"image_size": self.image_size},
            "whiten": None,
            "normalize_global": True,
            "tokens": False,
        }

    @property
    def image_size(self) -> int:
        """Side of the images that have so many patches, pixels."""
        return PATCH_SIZE * math.isqrt(self.patches)

    @property
    def _stretch(self) -> int:
        """Columns of street in view: one patch each."""
        return self.patches // 2

    def _check(self, numbers: np.ndarray) -> None:
        outside = numbers[(numbers < 0) | (numbers >= self.images)]
        if len(outside):
            raise IndexError(f"image {outside[0]} of a world of {self.images} images")

    def _view(self, number: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The street that an image shows, and the first column of it in view."""
        walk, step = np.divmod(number, self.walk)
        street, visit = np.divmod(walk, self.visits)
        # In whole columns, and of whole numbers: `step` plus the visit's share of a step, times stretch / VIEWS.
        return street, (step * self.visits + visit) * self._stretch // (self.visits * VIEWS)

    def _describe(self, number: np.int64) -> tuple[np.ndarray, np.ndarray]:
        """Global descriptor (G,) and patches (P, E) of an image, float32."""
        street, start = self._view(number)
        columns = start + np.arange(self._stretch)
        landmarks, of_column = np.unique(columns * LANDMARKS // self._stretch, return_inverse=True)
        landmarks = landmarks + (street << 32)
        everywhere = self.patches // 4
        things = self._hashed(CHOICE, [number], THINGS)[0].argsort(kind="stable")[: min(THINGS_SEEN, everywhere)]
        of_everywhere = len(landmarks) + np.arange(everywhere) * len(things) // everywhere
        shown = np.concatenate([of_column, of_everywhere])

        blur = BLUR[0] + (BLUR[1] - BLUR[0]) * (self._hashed(SHARPNESS, [number], self.patches)[0] + 1) / 2
        patches = self._hashed(NOISE, [number], self.patches * self.width).reshape(self.patches, self.width)
        patches *= np.sqrt(blur * 3 / self.width)[:, None]  # squared length 1/3 each number
        patches[: len(shown)] += self._vectors(landmarks, things, self.width)[shown]

        share = np.bincount(shown)[:, None].astype(np.float32)
        seen = _unit((self._vectors(landmarks, things, self.global_width) * share).sum(axis=0))
        noise = self._hashed(GLOBAL_NOISE, [number], self.global_width)[0]
        return _unit(seen + np.float32(math.sqrt(GLOBAL_BLUR * 3 / self.global_width)) * noise), _unit(patches)

    def _vectors(self, landmarks: np.ndarray, things: np.ndarray, width: int) -> np.ndarray:
        """Unit vectors of landmarks, then of things, float32: almost orthogonal, as random directions are."""
        return _unit(np.concatenate([self._hashed(LANDMARK, landmarks, width), self._hashed(THING, things, width)]))

    def _hashed(self, kind: int, ids: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
        """`count` numbers for each id, uniform from -1 to 1, (n, count) float32: a hash, so the same wherever it runs.

        SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), each id with
        a sequence of its own; every 64-bit output gives four numbers.
        """
        family = _mixed(np.array([self.seed << 8 | kind], np.uint64))
        start = _mixed(np.asarray(ids, np.uint64) + family)
        state = start[:, None] + GOLDEN * np.arange(1, -(-count // 4) + 1, dtype=np.uint64)
        bits = _mixed(state).astype("<u8", copy=False).view("<i2")[:, :count]
        return bits.astype(np.float32) * np.float32(2.0**-15)


def _mixed(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64; overwrites `state`."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return state


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.einsum("...e,...e->...", vectors, vectors))[..., None]


def write_store(
    path: str, world: World, shard_size: int = 256, dtype: str = "float16", numbers: Iterable[int] | None = None
) -> EmbeddingStore:
    """Write images of a world, by default all, to a store, or add those that it lacks; holds one shard in memory.

    Goes on where a killed call stopped. What an earlier call wrote stays, in its shards: write ``range(0, n, 2)``, then
    ``range(n)``, and the new images lie between the old ones by name. Raises `StoreError` if the store was made
    otherwise, IndexError for an image that the world does not have.
    """
    features = world.features | {"dtype": dtype}
    if EmbeddingStore.exists(path):
        store = EmbeddingStore.open(path)
        store.check_features(features)
    else:
        shapes = {"patches": world.patches, "width": world.width, "global_width": world.global_width}
        store = EmbeddingStore.create(path, features, shapes | {"token_width": world.width, "dtype": dtype}, {})
    planned, pending = store.plan(_listing(world, numbers), shard_size, False, lambda name: None)
    total, waiting = planned.images.num_rows, sum(shard.num_rows for shard in pending.values())
    with progress("write", total, total - waiting, "images") as bar:
        for number, shard in pending.items():
            bar.update(store.write_shard(number, _rows(world, shard, dtype), [])["rows"])
    store.finish()
    return store


def _listing(world: World, numbers: Iterable[int] | None) -> pa.Table:
    """What `vop.catalog.plan` takes; there are no files, so sizes and times are 0."""
    numbers = np.arange(world.images) if numbers is None else np.fromiter(numbers, np.int64)
    world._check(numbers)
    names = [world.name(number) for number in numbers]
    nothing = np.zeros(len(names), np.int64)
    return pa.table(
        {"name": pa.array(names, pa.string()), "scene": [name.split("/")[0] for name in names]}
        | {"size": nothing, "modified_ns": nothing}
    )


def _rows(world: World, shard: pa.Table, dtype: str) -> pa.Table:
    """A planned shard as `EmbeddingStore.write_shard` takes it."""
    numbers = [world.number(name) for name in shard["name"].to_pylist()]
    globals_, patches = world.descriptors(numbers, dtype)
    side = pa.array(np.full(len(numbers), world.image_size))
    sizes = dict.fromkeys(("width", "height", "scaled_width", "scaled_height"), side)
    columns = {
        "image_id": shard["image_id"],
        "name": shard["name"],
        **sizes,
        "content": pa.nulls(len(numbers), "string"),
    }
    return pa.table(columns | {"global": tensor_column(globals_), "patches": tensor_column(patches)})
