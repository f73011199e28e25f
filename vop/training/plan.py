"""What a training works on: which images train and which validate, their overlaps, the pairs of every epoch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import scipy.sparse as sparse

from vop.cameras import Cameras
from vop.datasets.image_sets import ImageSets, read_names
from vop.datasets.posed import OverlapTruth
from vop.geometry import Camera, overlap_matrix
from vop.schema import ConfigError, TrainConfig
from vop.training.sampling import VALIDATION, epoch_pairs, view_pairs
from vop.training.supervision import LabelError, posed_camera, read_depth

PART = 1024  # pairs of a part of labels, at most: the unit of work, and of what a kill can cost

Scenes = Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class Split:
    """Images by scene: those that train, and those that validate."""

    training: Scenes
    validation: Scenes

    @property
    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted(
            {name for scenes in (self.training, self.validation) for names in scenes.values() for name in names}
        )

    def only(self, known: set[str]) -> "Split":
        """Without images that are not among these."""
        return Split(*(
            {scene: kept for scene, names in scenes.items() if (kept := [name for name in names if name in known])}
            for scenes in (self.training, self.validation)
        ))  # fmt: skip


def split(sets: ImageSets, config: TrainConfig) -> Split:
    """Divide a collection by the lists of scenes or images of a config.

    Raises `ConfigError` for a line that is neither a scene nor an image, an image in both parts, or an empty part.
    """
    scene_of = {image.name: image.scene for image in sets.images}
    validation = _listed(config.validation, "train.validation", scene_of) if config.validation else set()
    training = _listed(config.scenes, "train.scenes", scene_of) if config.scenes else set(scene_of) - validation
    both = sorted(training & validation)
    if both:
        raise ConfigError(f"{len(both)} images are to train and to validate, such as {both[0]!r}: mend the lists")
    for part, of in ((training, "train on"), (validation, "validate on")):
        if not part and not (part is validation and config.validation is None):
            raise ConfigError(f"there is no image to {of}: {len(scene_of)} in all, {len(validation)} of them validate")
    return Split(*(_by_scene(part, scene_of) for part in (training, validation)))


def _listed(path: str, key: str, scene_of: Mapping[str, str]) -> set[str]:
    names, by_scene, chosen = sorted(scene_of), _by_scene(scene_of, scene_of), set()
    for line in read_names(path):
        if line in scene_of:
            chosen.add(line)
        elif line in by_scene:
            chosen |= {*by_scene[line]}
        elif below := [name for name in names if name.startswith(line.rstrip("/") + "/")]:
            chosen |= {*below}
        else:
            raise ConfigError(f"{key}={path} names {line!r}, which is neither an image, a scene nor a folder of the "
                              f"collection, such as {names[0]!r} and {next(iter(by_scene))!r}")  # fmt: skip
    return chosen


def _by_scene(names, scene_of: Mapping[str, str]) -> dict[str, list[str]]:
    scenes: dict[str, list[str]] = {}
    for name in sorted(names):
        scenes.setdefault(scene_of[name], []).append(name)
    return scenes


def depth_overlaps(names: Sequence[str], cameras: Cameras, depths: Mapping[str, str]) -> tuple[OverlapTruth, dict]:
    """True overlaps from depth maps and cameras, of the images that have both.

    Returns them, and how many images were left out for which reason. Images of different worlds share nothing.
    """
    worlds: dict[str, list[tuple[str, Camera]]] = {}
    reasons: dict[str, int] = {}
    for name in names:
        try:
            known = posed_camera(cameras, name)
            height, width = read_depth(depths[name]).shape
            if known.sized and (known.width, known.height) != (width, height):
                raise LabelError("depth map of another size than its image")
            worlds.setdefault(known.world, []).append((name, Camera(known.K, known.cam_from_world, width, height)))
        except (LabelError, KeyError) as error:
            reason = str(error) if isinstance(error, LabelError) else "depth map missing"
            reasons[reason] = reasons.get(reason, 0) + 1
    kept, blocks = [], []
    for _, members in sorted(worlds.items()):
        found, seen = zip(*members, strict=True)
        kept += found
        blocks.append(overlap_matrix(_Depths([depths[name] for name in found]), seen))
    matrix = sparse.block_diag(blocks, format="csr", dtype=np.float32) if blocks else sparse.csr_array((0, 0))
    return OverlapTruth(tuple(kept), sparse.csr_array(matrix)), reasons


class _Depths(Sequence):
    """Depth maps, read one at a time."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        depth = read_depth(self.paths[index])
        return np.where(np.isfinite(depth), depth, 0)


def pairs_of(
    epoch: int, chosen: Split, truth: OverlapTruth | None, config: TrainConfig, worlds: Mapping[str, str] | None
) -> pa.Table:
    """The pairs of an epoch, or of the validation (`vop.training.sampling.SCHEMA`)."""
    scenes = chosen.validation if epoch == VALIDATION else chosen.training
    return view_pairs(scenes, config, epoch) if truth is None else epoch_pairs(truth, scenes, config, epoch, worlds)


def parts_per_epoch(chosen: Split, config: TrainConfig) -> int:
    """Parts that the labels of an epoch, or of the validation, fit into."""
    training = len(chosen.training) * (config.positives_per_scene + config.negatives_per_scene)
    return math.ceil(max(1, training, 2 * len(chosen.validation) * config.validation_pairs) / PART)


def parts_of(epoch: int, per_epoch: int) -> range:
    """Numbers of the parts of an epoch's labels; those of the validation come first."""
    return range((epoch + 1) * per_epoch, (epoch + 2) * per_epoch)


def cut(pairs: pa.Table, per_epoch: int) -> Iterator[pa.Table]:
    """The pairs of an epoch in so many parts."""
    return (pairs.slice(part * PART, PART) for part in range(per_epoch))
