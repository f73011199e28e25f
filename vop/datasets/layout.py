"""What an adapter of a benchmark's layout gives back, and what it needs to find its way on the disk.

An adapter is a module with two functions of the config's section `dataset`: `missing(dataset)` lists what the layout
lacks, one sentence each, and `read(dataset)` gives a `Benchmark`. docs/datasets.md holds a complete example.
"""

import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import scipy.sparse as sparse

from vop import files
from vop.cameras import Cameras
from vop.datasets.folder import ImageFile
from vop.datasets.image_sets import ImageSets
from vop.datasets.posed import OverlapTruth
from vop.lift import Lift
from vop.names import checked
from vop.schema import DatasetConfig

SCENE = "{scene}"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Images, and what is known of them; names are relative to `sets.root` throughout.

    cameras: calibrations and poses, None: no camera is known. overlaps: gives the true overlaps when first asked, None:
    unknown. pairs: the pairs that the benchmark itself prescribes, None: it leaves them to retrieval. withheld: what
    the benchmark keeps to its own server and so cannot be measured here, for the user to read; None: nothing. depths:
    the path of an image's depth map, None: there are none. points: gives the points that the images of COLMAP models
    see (`vop.datasets.colmap.POINTS`), None: none are known. lift: where keypoints of the database lie in the world
    (of scans, say), None: they are triangulated. written: how the benchmark's server names images in lists of poses
    (one of `vop.schema.localization.WRITTEN`).
    """

    sets: ImageSets
    cameras: Cameras | None = None
    overlaps: Callable[[], OverlapTruth] | None = None
    pairs: tuple[tuple[str, str], ...] | None = None
    withheld: str | None = None
    depths: Callable[[str], str] | None = None
    points: Callable[[], pa.Table] | None = None
    lift: Lift | None = None
    written: str = "name"

    @cached_property
    def truth(self) -> OverlapTruth | None:
        """The true overlaps, or None where they are unknown."""
        return None if self.overlaps is None else self.overlaps()


def place(dataset: DatasetConfig, template: str, scene: str = "") -> str:
    """Where a template of the config leads: below the root, {scene} filled in."""
    path = template.replace(SCENE, scene).strip("/")
    return files.join(dataset.root, path) if path not in ("", ".") else dataset.root


def below_root(dataset: DatasetConfig, template: str, scene: str = "") -> str:
    """What stands before a file's name to make it relative to the root: `courtyard/images/`, or nothing."""
    return (place(dataset, template, scene) + "/").removeprefix(dataset.root.rstrip("/") + "/")


def scenes(dataset: DatasetConfig, template: str, problems: list[str] | None = None) -> list[str]:
    """The scenes asked for, or every one that has what `template` names; without {scene} the root is the only one.

    None found is added to `problems`.
    """
    if SCENE not in template:
        return [posixpath.basename(dataset.root.rstrip("/"))]
    if dataset.scenes is not None:
        return list(dataset.scenes)
    head, tail = template.split(SCENE, 1)
    folder, prefix = posixpath.split(head)
    suffix = tail.split("/", 1)[0]
    parent = place(dataset, folder)
    found = sorted(
        name[len(prefix) : len(name) - len(suffix)]
        for name in _entries(parent)
        if name.startswith(prefix) and name.endswith(suffix) and len(name) > len(prefix) + len(suffix)
    )
    found = [scene for scene in found if files.exists(place(dataset, template, scene))]
    if not found and problems is not None:
        problems.append(f"no scene in {parent}: expected {place(dataset, template, SCENE)} with a name for {SCENE}")
    return found


def _entries(folder: str) -> list[str]:
    """Names of files and folders directly in a folder; none if it is not there."""
    return [info.base_name for info in files.entries(folder)]


def lacking(path: str, holds: str) -> list[str]:
    """One sentence if nothing is at a path: `holds` says what belongs there."""
    return [] if files.exists(path) else [f"nothing at {path}: {holds}"]


def image_files(dataset: DatasetConfig, names: Iterable[str], scene: str = "") -> list[ImageFile]:
    """The images of these names below the root, each once; those that are not on disk have size -1, as in a list.

    Raises `vop.names.UnsafeNameError` for a name that leads out of the root.
    """
    found, listed = [], {}
    for name in checked(dict.fromkeys(names), f"the dataset at {dataset.root}"):
        path = files.join(dataset.root, name)
        folder, base = posixpath.split(path)
        if folder not in listed:
            listed[folder] = {info.base_name: info for info in files.entries(folder) if info.is_file}
        info = listed[folder].get(base)
        size, modified = (-1, -1) if info is None else (info.size, -1 if info.mtime_ns is None else info.mtime_ns)
        found.append(ImageFile(name, path, size, modified, scene))
    return found


def one_set(dataset: DatasetConfig, images: Iterable[ImageFile]) -> ImageSets:
    """Images that are queries and database alike."""
    ordered = tuple(sorted(images, key=lambda image: image.name))
    names = tuple(image.name for image in ordered)
    return ImageSets(dataset.root, ordered, names, names, {})


def two_sets(dataset: DatasetConfig, queries: Sequence[ImageFile], database: Sequence[ImageFile]) -> ImageSets:
    """Queries to be found in a database."""
    images = {image.name: image for image in (*database, *queries)}
    ordered = tuple(images[name] for name in sorted(images))
    names = (tuple(sorted(image.name for image in side)) for side in (queries, database))
    return ImageSets(dataset.root, ordered, *names, {})


def symmetric(count: int, rows: np.ndarray, columns: np.ndarray, overlap: np.ndarray) -> sparse.csr_array:
    """A sparse matrix (count, count) float32 of unordered pairs of rows (M,) and their overlaps, ones on the diagonal.

    A pair that is given more than once keeps its first value.
    """
    low, high = np.minimum(rows, columns).astype(np.int64), np.maximum(rows, columns).astype(np.int64)
    _, first = np.unique(low * count + high, return_index=True)
    low, high, diagonal = low[first], high[first], np.arange(count)
    values = np.concatenate([overlap[first], overlap[first], np.ones(count)]).astype(np.float32)
    ends = (np.concatenate([low, high, diagonal]), np.concatenate([high, low, diagonal]))
    return sparse.csr_array((values, ends), shape=(count, count))
