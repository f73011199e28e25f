"""Files of hloc as others wrote them: local features, matches and global descriptors, by the rules of `vop.hloc`.

Besides what `vop.hloc` writes, hloc has

    features        no `descriptors` or `scores` where a method has none; `image_size` of the image as it is stored, for
                    hloc leaves EXIF orientation out: keypoints of a turned photograph are turned here as it is
    matches         older files: one group `<name 0>_<name 1>`, no scores
    global features <name of the image>/global_descriptor   (G,)

All are looked up in several files at once: queries and database often have files of their own. Where several files
hold an image or a pair, the first one by name counts. Files are read without following what leads out of them
(`vop.foreign_hdf5`).
"""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import h5py
import numpy as np

from vop import files
from vop.features import LocalFeatures
from vop.foreign_hdf5 import member
from vop.hloc import ORIENTATION, UPRIGHT, key
from vop.image import Header, upright_points
from vop.matches import Matches
from vop.names import checked

KEYPOINTS, MATCHES0, SCORES0, GLOBAL = "keypoints", "matches0", "matching_scores0", "global_descriptor"
FINEST, COARSEST = 1e-3, 1e3  # pixels of an image that a detector's noise may measure in it


class HlocError(ValueError):
    """A file, or a group of one, that is not as hloc writes it; the message names what was found and expected."""


@dataclass(frozen=True)
class HlocFiles:
    """HDF5 files that are read as one; cheap to construct and to send to workers, who must find them at the same paths.

    key: the setting that names them.
    """

    key: str
    paths: tuple[str, ...]

    @classmethod
    def find(cls, setting: str, pattern: str) -> "HlocFiles":
        """The file at a path, or those that a glob pattern matches, by name.

        Raises `FileNotFoundError` where there is none, `HlocError` for a bucket and for what is not HDF5.
        """
        if not files.is_local(pattern):
            raise HlocError(
                f"{setting}={pattern} lies in a bucket, but HDF5 reads here and there in a file: copy it to a disk "
                "that every node mounts"
            )
        path = files.resolve(pattern)[1]
        paths = [path] if files.exists(path) else sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        if not paths:
            raise FileNotFoundError(f"no file at {setting}={pattern}")
        found = cls(setting, tuple(paths))
        with found.opened():
            return found

    @property
    def identity(self) -> dict:
        """What the files are, for the manifest of what is made of them."""
        return {"method": "imported", "from": "hloc", "files_sha256": [files.sha256(path) for path in self.paths]}

    @contextmanager
    def opened(self) -> Iterator[list[h5py.File]]:
        """The files, open for reading. Raises `HlocError` where one is not HDF5."""
        with ExitStack() as stack:
            found = []
            for path in self.paths:
                try:
                    found.append(stack.enter_context(h5py.File(path, "r")))
                except OSError as error:
                    raise HlocError(
                        f"{self.key}: cannot open {path} as HDF5: {error}. Is it whole, and closed by its writer?"
                    ) from error
            yield found

    def images(self, dataset: str) -> list[str]:
        """Names of the images that have this dataset, sorted.

        Raises `vop.names.UnsafeNameError` for a name that leads out of the folder of the images.
        """
        names: set[str] = set()

        def visit(path: str) -> None:
            parent, _, leaf = path.rpartition("/")
            if leaf == dataset:
                names.add(parent)

        with self.opened() as opened:
            for h5 in opened:
                h5.visit(visit)  # names only: opening every object of a large file takes minutes
                checked(names, h5.filename)
        return sorted(names)


def _numbers(group: h5py.Group, name: str, shape: tuple[int | None, ...], required: bool = True) -> np.ndarray | None:
    """A dataset of finite numbers of this shape (None: any length). Raises `HlocError`, without the group's name."""
    dataset = member(group, name)
    if dataset is None and not required:
        return None
    if not isinstance(dataset, h5py.Dataset):
        raise HlocError(f"it lacks {name}; it holds {', '.join(sorted(group)) or 'nothing'}")
    fits = len(dataset.shape) == len(shape) and all(
        want in (None, size) for want, size in zip(shape, dataset.shape, strict=True)
    )
    if not fits or dataset.dtype.kind not in "fiu":
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise HlocError(f"{name} is {dataset.dtype} of shape {dataset.shape}; expected numbers of shape ({wanted})")
    values = dataset[()]
    if not np.isfinite(values).all():
        raise HlocError(f"{name} has {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    return values


def group_of(opened: Sequence[h5py.File], name: str) -> h5py.Group:
    """The group of an image in the first file that has it. Raises `HlocError`."""
    for h5 in opened:
        found = member(h5, name)
        if isinstance(found, h5py.Group):
            return found
    raise HlocError(f"no group {name!r} in {', '.join(h5.filename for h5 in opened)}")


def descriptor_width(opened: Sequence[h5py.File], names: Sequence[str]) -> int:
    """D of the first image whose descriptors can be read; 0 where no image has any."""
    for name in names:
        dataset = member(group_of(opened, name), "descriptors")
        if isinstance(dataset, h5py.Dataset) and len(dataset.shape) == 2:
            return dataset.shape[0]
    return 0


def local_features(group: h5py.Group, header: Header, width: int) -> LocalFeatures:
    """The features of an image, its keypoints in the order of the file, since matches are numbers of them.

    `header` is that of the photograph, `width` is D. Raises `HlocError` where they do not fit each other.
    """
    keypoints = _numbers(group, KEYPOINTS, (None, 2)).astype(np.float32)
    count = len(keypoints)
    scores = _numbers(group, "scores", (count,), required=False)
    descriptors = _numbers(group, "descriptors", (width, count), required=width > 0)
    upright = group.file.attrs.get(ORIENTATION) == UPRIGHT
    size = header.upright if upright else header.stored
    told = _numbers(group, "image_size", (2,), required=False)
    if told is not None and tuple(told.tolist()) != size:
        raise HlocError(
            f"image_size is {told.tolist()}, but the image is {size[0]}x{size[1]} pixels: keypoints of another version "
            "of the photograph"
        )
    keypoints = keypoints + np.float32(0.5)
    if not upright:
        keypoints = upright_points(keypoints, header)
    noise = np.asarray(member(group, KEYPOINTS).attrs.get("uncertainty", 1.0))
    if noise.shape or noise.dtype.kind not in "fiu" or not FINEST <= noise <= COARSEST:
        raise HlocError(f"uncertainty of the keypoints is {noise}; expected pixels, {FINEST:g} to {COARSEST:g}")
    with np.errstate(over="ignore"):
        narrow = np.zeros((count, 0), np.float16) if descriptors is None else descriptors.T.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise HlocError(f"descriptors reach {np.abs(descriptors).max():.4g}, too large for float16")
    return LocalFeatures(
        keypoints=keypoints,
        scores=np.ones(count, np.float32) if scores is None else scores.astype(np.float32),
        descriptors=narrow,
        size=header.upright,
        scaled=tuple(max(1, round(side / float(noise))) for side in header.upright),
    )


class PairNames:
    """Tells which pair of images a group of a file of matches is, and finds the group of a pair."""

    def __init__(self, names: Sequence[str]):
        self.left_out: Counter[str] = Counter()  # groups that are no pair of these images, by reason
        counts = Counter(map(key, names))
        self._alike = {written for written, number in counts.items() if number > 1}
        self._names = {key(name): name for name in names}

    def listed(self, files: HlocFiles) -> list[tuple[str, str]]:
        """The pairs of these images that the files hold, each once under its sorted names, sorted."""
        pairs = set()
        with files.opened() as opened:
            for h5 in opened:
                for name in h5:
                    found = member(h5, name)
                    if isinstance(found, h5py.Group):
                        readings = [self._flat(name)] if MATCHES0 in found else [[(name, other)] for other in found]
                        pairs.update(pair for reading in readings if (pair := self._pair(reading)))
        return sorted(pairs)

    def _flat(self, written: str) -> list[tuple[str, str]]:
        """All ways to read the name of an older group as two names of images."""
        cuts = [i for i, letter in enumerate(written) if letter == "_"]
        both = [(written[:i], written[i + 1 :]) for i in cuts]
        return [pair for pair in both if all(name in self._names for name in pair)]

    def _pair(self, readings: list[tuple[str, str]]) -> tuple[str, str] | None:
        known = [pair for pair in readings if all(name in self._names for name in pair)]
        if len(known) > 1 or any(name in self._alike for pair in known for name in pair):
            self.left_out["names that may be read in several ways"] += 1
            return None
        if not known:
            self.left_out["of images that have no features here"] += 1
            return None
        return tuple(sorted(self._names[name] for name in known[0]))


def pair_group(opened: Sequence[h5py.File], image0: str, image1: str) -> tuple[h5py.Group, bool]:
    """The group of a pair, and whether image 1 stands first in it, looked for as hloc does. Raises `HlocError`."""
    for h5 in opened:
        for separator in "/_":
            for flipped, pair in ((False, (image0, image1)), (True, (image1, image0))):
                found = member(h5, separator.join(map(key, pair)))
                if isinstance(found, h5py.Group) and MATCHES0 in found:
                    return found, flipped
    raise HlocError(f"no matches of {image0!r} with {image1!r}")


def pair_matches(group: h5py.Group, flipped: bool, counts: tuple[int, int]) -> Matches:
    """The matches of a pair whose images have so many keypoints; raises `HlocError` where they do not fit these."""
    first, second = counts[::-1] if flipped else counts
    matches0 = _numbers(group, MATCHES0, (None,))
    scores = _numbers(group, SCORES0, (len(matches0),), required=False)
    if matches0.dtype.kind not in "iu":
        raise HlocError(f"{MATCHES0} is {matches0.dtype}; expected integers")
    if len(matches0) != first or (len(matches0) and not -1 <= int(matches0.min()) <= int(matches0.max()) < second):
        reach = f" up to {int(matches0.max())}" if len(matches0) else ""
        raise HlocError(
            f"{MATCHES0} has {len(matches0)} numbers{reach}, but the images have {first} and {second} keypoints: "
            "matches of other features"
        )
    kept = np.flatnonzero(matches0 > -1)
    indices = np.stack([kept, matches0[kept].astype(np.int64)], axis=1).astype(np.int32)
    found = np.ones(len(kept), np.float32) if scores is None else scores[kept].astype(np.float32)
    if flipped:
        order = np.argsort(indices[:, 1], kind="stable")
        indices, found = indices[order, ::-1], found[order]
    return Matches(indices, found)


@dataclass(frozen=True)
class GlobalDescriptors:
    """Global descriptors of images, read by their names.

    identity: what the files are; width: G.
    """

    files: HlocFiles
    identity: dict
    width: int

    @classmethod
    def open(cls, setting: str, pattern: str, names: Sequence[str]) -> "GlobalDescriptors":
        """The descriptors of these images. Raises `HlocError` if some have none, and as `HlocFiles.find` does."""
        found = HlocFiles.find(setting, pattern)
        there = {*found.images(GLOBAL)}
        absent = [name for name in names if name not in there]
        if absent:
            known = f"it holds {len(there)}, such as {min(there)!r}" if there else f"it holds no {GLOBAL}"
            raise HlocError(
                f"{setting}={pattern} has no {GLOBAL} of {len(absent)} of {len(names)} images, such as "
                f"{absent[0]!r}; {known}. Names count from the root of the images (root=...)"
            )
        with found.opened() as opened:
            dataset = member(group_of(opened, names[0]), GLOBAL)
            width = int(np.prod(dataset.shape))
        return cls(found, found.identity, width)

    def read(self, names: Sequence[str]) -> np.ndarray:
        """The descriptors of these images, (n, G) float32. Raises `HlocError` naming the image that has none of G."""
        values = np.empty((len(names), self.width), np.float32)
        with self.files.opened() as opened:
            for i, name in enumerate(names):
                try:
                    values[i] = _numbers(group_of(opened, name), GLOBAL, (self.width,))
                except HlocError as error:
                    raise HlocError(f"group {name!r} of {self.files.key}: {error}") from error
        return values
