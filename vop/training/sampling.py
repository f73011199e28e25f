"""Which pairs an epoch learns from, in which order: arithmetic on names, overlaps and a seed.

The pairs of an epoch follow from the seed and its number alone, so that a run that is cut off, or goes on with another
number of workers, sees what an undisturbed one would have seen.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import scipy.sparse as sparse

from vop.datasets.posed import OverlapTruth
from vop.schema import TrainConfig
from vop.training.supervision import warped
from vop.training.views import FLIP, view_names

SCHEMA = pa.schema([("view0", pa.string()), ("view1", pa.string()), ("overlap", pa.float32())])
VALIDATION = -1  # the epoch whose pairs the validation looks at
GRID = 24  # points along each side by which the overlap of two views of an image is measured


def epoch_pairs(
    truth: OverlapTruth,
    scenes: Mapping[str, Sequence[str]],
    config: TrainConfig,
    epoch: int,
    worlds: Mapping[str, str] | None = None,
) -> pa.Table:
    """The pairs of an epoch (`SCHEMA`) from known overlaps, shuffled.

    Of each scene up to `positives_per_scene` pairs whose overlap lies in one of `overlap_bins` equal bins between
    `min_overlap` and `max_overlap`, evenly from the bins that have any, and `negatives_per_scene` without overlap.
    Every pair is unordered, drawn at most once an epoch, and by half mirrored (`flip`).

    Args:
        scenes: the images of each scene, all of them known to `truth`.
        epoch: its number; `VALIDATION`: nothing is mirrored, and `validation_pairs` of each kind are drawn.
        worlds: the reconstruction that an image belongs to: images of one scene and several worlds may well show the
            same, hence are no pair. None: a scene is one.
    """
    index = {name: row for row, name in enumerate(truth.names)}
    positives, negatives = _wanted(config, epoch)
    everything = sorted({name for names in scenes.values() for name in names})
    matrix, drawn = sparse.csr_array(truth.matrix), []
    for scene, names in sorted(scenes.items()):
        rng = _random(config.seed, epoch, scene)
        names = sorted(names)
        rows = np.array([index[name] for name in names])
        overlap = sparse.triu(matrix[rows][:, rows], 1, format="csr")
        overlap.sum_duplicates()  # and sorted by row and column
        first, second = overlap.nonzero()
        values = overlap.data[overlap.data != 0]
        for at in _spread(values, positives, config, rng):
            drawn.append((names[first[at]], names[second[at]], values[at]))
        world = np.unique([worlds.get(name, "") if worlds else "" for name in names], return_inverse=True)[1]
        apart = _apart(overlap, world, negatives, rng)
        drawn += [(names[a], names[b], 0.0) for a, b in apart]
        if not apart:
            found = _elsewhere(names, everything, negatives, rng)
            drawn += [pair for pair in found if not matrix[index[pair[0]], index[pair[1]]]]
    return _ordered(drawn, config, epoch)


def view_pairs(scenes: Mapping[str, Sequence[str]], config: TrainConfig, epoch: int) -> pa.Table:
    """The pairs of an epoch (`SCHEMA`) without any truth: views of one image, shuffled.

    Positives are two views of an image that overlap by `min_overlap` or more; negatives are images of different scenes,
    of which nothing is known but that; where there is one scene there are none.
    """
    positives, negatives = _wanted(config, epoch)
    everything = sorted({name for names in scenes.values() for name in names})
    drawn = []
    for scene, names in sorted(scenes.items()):
        rng, names = _random(config.seed, epoch, scene), sorted(names)
        seen = set()
        for number in range(4 * positives):
            if len(seen) == positives:
                break
            views = view_names(names[number % len(names)], False, config.warps)
            pair = tuple(sorted(rng.choice(len(views), 2, replace=False)))
            ends = views[pair[0]], views[pair[1]]
            if ends not in seen and (overlap := view_overlap(*ends)) >= config.min_overlap:
                seen.add(ends)
                drawn.append((*ends, overlap))
        drawn += _elsewhere(names, everything, negatives, rng)
    return _ordered(drawn, dataclasses.replace(config, flip=False), epoch)


def _wanted(config: TrainConfig, epoch: int) -> tuple[int, int]:
    """Pairs with and without overlap that an epoch takes of each scene."""
    if epoch == VALIDATION:
        return config.validation_pairs, config.validation_pairs if config.negatives_per_scene else 0
    return config.positives_per_scene, config.negatives_per_scene


def view_overlap(view0: str, view1: str) -> float:
    """The smaller of the shares of two views of an image that the other shows too."""
    along = (np.arange(GRID) + 0.5) / GRID
    shares = np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)
    inside = [((points >= 0) & (points <= 1)).all(1).mean() for points in
              (warped(shares, view0, view1), warped(shares, view1, view0))]  # fmt: skip
    return float(min(inside))


def _spread(values: np.ndarray, wanted: int, config: TrainConfig, rng: np.random.Generator) -> np.ndarray:
    """Positions of up to `wanted` pairs, from the bins of overlap evenly; what one bin lacks the others give."""
    edges = np.linspace(config.min_overlap, config.max_overlap, config.overlap_bins + 1)
    inside = np.flatnonzero((values >= edges[0]) & (values <= edges[-1]))
    bin_of = np.clip(np.searchsorted(edges, values[inside], side="right") - 1, 0, config.overlap_bins - 1)
    shuffled = rng.permutation(len(inside))
    # the n-th pair of every bin comes before the (n+1)-th of any: the first `wanted` are spread evenly
    turn = np.empty(len(inside), int)
    for number in range(config.overlap_bins):
        members = shuffled[bin_of[shuffled] == number]
        turn[members] = np.arange(len(members))
    order = np.lexsort((rng.permutation(len(inside)), turn))
    return inside[order[:wanted]]


def _apart(
    overlap: sparse.csr_array, world: np.ndarray, wanted: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Up to `wanted` pairs of rows of one world without an entry, drawn evenly from all there are.

    They are numbered row by row and only those that are drawn are looked up: a scene of 50,000 images has a billion.

    Args:
        overlap: (n, n), its entries above the diagonal. world: (n,) int.
    """
    later = np.zeros(len(world), np.int64)  # images of its world behind each
    for number in np.unique(world):
        members = np.flatnonzero(world == number)
        later[members] = np.arange(len(members))[::-1]
    row, column = overlap.nonzero()
    ends = np.cumsum(later - np.bincount(row[world[row] == world[column]], minlength=len(world)))
    found = []
    for at in rng.choice(ends[-1], min(wanted, ends[-1]), replace=False) if ends[-1] else ():
        a = int(np.searchsorted(ends, at, side="right"))
        others = a + 1 + np.flatnonzero(world[a + 1 :] == world[a])
        others = np.setdiff1d(others, overlap[[a]].nonzero()[1], assume_unique=True)
        found.append((a, int(others[at - (ends[a - 1] if a else 0)])))
    return found


def _elsewhere(names: list[str], everything: list[str], wanted: int, rng: np.random.Generator) -> list[tuple]:
    """Pairs of images of a scene with images of other scenes."""
    others = sorted(set(everything) - set(names))
    if not others:
        return []
    ends = zip(rng.integers(len(names), size=wanted), rng.integers(len(others), size=wanted), strict=True)
    return [(names[a], others[b], 0.0) for a, b in dict.fromkeys(ends)]


def _ordered(drawn: list[tuple], config: TrainConfig, epoch: int) -> pa.Table:
    # two scenes may have drawn the same pair of their images, each its own first
    drawn = list({frozenset(pair[:2]): pair for pair in drawn}.values())
    rng = _random(config.seed, epoch, "order")
    mirrored = rng.random(len(drawn)) < 0.5 * (config.flip and epoch != VALIDATION)
    rows = []
    for at in rng.permutation(len(drawn)):
        view0, view1, overlap = drawn[at]
        suffix = FLIP if mirrored[at] else ""
        rows.append({"view0": view0 + suffix, "view1": view1 + suffix, "overlap": float(overlap)})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _random(seed: int, epoch: int, what: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(f"{seed} {epoch} {what}".encode()).digest()))
