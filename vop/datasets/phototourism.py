"""PhotoTourism of the Image Matching Challenge and of the RANSAC tutorial: per scene images, K, R and T in HDF5.

    ROOT/sacre_coeur/images/02928139_3448003521.jpg      dataset.images = {scene}/images
    ROOT/sacre_coeur/K1_K2.h5                            dataset.model = {scene}
                    /R.h5, /T.h5
                    /new-vis-pairs/keys-th-0.1.npy, ...  optional: pairs by co-visibility

    K1_K2.h5    `image0-image1` -> (1, 2, 3, 3): K of both images; R.h5: image -> (3, 3); T.h5: image -> (3, 1)

or, as the challenge of 2020 and 2021 has it, below ROOT/sacre_coeur/set_100 (dataset.images = {scene}/set_100/images,
dataset.model = {scene}/set_100), with one file per image in place of the three:

    calibration/calibration_02928139_3448003521.h5       K (3, 3), R (3, 3), T (3)

From https://www.cs.ubc.ca/research/image-matching-challenge/current/data/ (the validation scenes) and
https://github.com/ducha-aiki/ransac-tutorial-2020-data. Names in these files have no extension; the image of that name
is looked for in the folder of images.

Poses are world to camera. K is COLMAP's, for the stored image, pixel centres at +0.5: both as here. keys-th-X.npy lists
the pairs whose co-visibility is at least X: the true overlap of a pair is the largest such X, in steps of 0.1, and 0
where no list has it. Without the lists the overlap is unknown. A scene is a world of its own. Of K1_K2.h5 only images
in its pairs have a K.
"""

import io
import posixpath
from collections.abc import Iterator

import h5py
import numpy as np

from vop import files
from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.datasets import layout
from vop.datasets.folder import EXTENSIONS
from vop.datasets.layout import Benchmark
from vop.datasets.posed import OverlapTruth
from vop.foreign_hdf5 import member
from vop.geometry import pose_from_rt
from vop.pickled import read_npy
from vop.schema import DatasetConfig

IMAGES, MODEL = "{scene}/images", "{scene}"
TABLES = {"K1_K2.h5": "K of both images of each pair", "R.h5": "rotations", "T.h5": "translations"}
CALIBRATION, PREFIX = "calibration", "calibration_"
STEPS = tuple(f"{step / 10:.1f}" for step in range(10))


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks."""
    problems, scenes = [], _scenes(dataset)
    if not scenes:
        problems.append(f"no scene in {dataset.root}: expected {layout.place(dataset, MODEL, layout.SCENE)}/R.h5")
    for scene in scenes:
        model = layout.place(dataset, dataset.model or MODEL, scene)
        if not files.exists(files.join(model, CALIBRATION)):
            for name, holds in TABLES.items():
                problems += layout.lacking(files.join(model, name), f"{holds} of {scene}")
        problems += layout.lacking(layout.place(dataset, dataset.images or IMAGES, scene), f"the images of {scene}")
    return problems


def read(dataset: DatasetConfig) -> Benchmark:
    """Images and cameras of the scenes, and overlaps where there are lists of co-visible pairs."""
    images, cameras, names, lists = [], [], {}, []
    for scene in _scenes(dataset):
        model = layout.place(dataset, dataset.model or MODEL, scene)
        named = _files(dataset, scene)
        prefix = layout.below_root(dataset, dataset.images or IMAGES, scene)
        for key, K, R, T in _calibrations(model):
            name = names[scene, key] = prefix + named.get(key, f"{key}.jpg")
            cameras.append(KnownCamera(name, K, pose_from_rt(R, T), scene))
        images += layout.image_files(dataset, [name for (of, _), name in names.items() if of == scene], scene)
        lists.append((scene, files.join(model, "new-vis-pairs")))
    lists = [(scene, folder) for scene, folder in lists if files.exists(folder)]
    return Benchmark(
        layout.one_set(dataset, images), Cameras.of(cameras), (lambda: _overlaps(names, lists)) if lists else None
    )


def _scenes(dataset: DatasetConfig) -> list[str]:
    """The scenes asked for, or the folders that hold rotations: others lie there too."""
    template = dataset.model or MODEL
    return [
        scene
        for scene in layout.scenes(dataset, template)
        if dataset.scenes is not None
        or any(files.exists(files.join(layout.place(dataset, template, scene), n)) for n in ("R.h5", CALIBRATION))
    ]


def _files(dataset: DatasetConfig, scene: str) -> dict[str, str]:
    """File names of the images of a scene by their name without extension."""
    found = files.listing(layout.place(dataset, dataset.images or IMAGES, scene))
    return {stem: stem + end for stem, end in map(posixpath.splitext, found) if end.lower() in EXTENSIONS}


def _calibrations(model: str) -> Iterator[tuple[str, np.ndarray | None, np.ndarray, np.ndarray]]:
    """Image, K (3, 3) or None, R (3, 3), T (3,) of a scene."""
    if not files.exists(files.join(model, "R.h5")):
        for name in files.listing(files.join(model, CALIBRATION)):
            key, end = posixpath.splitext(name)
            if end == ".h5" and key.startswith(PREFIX):
                table = _tables(files.join(model, CALIBRATION, name))
                yield key.removeprefix(PREFIX), *(np.asarray(table[part], np.float64) for part in "KRT")
        return
    both, rotations, translations = (_tables(files.join(model, name)) for name in TABLES)
    K = {}
    for pair, matrices in both.items():
        for key, matrix in zip(_ends(pair, rotations), matrices.reshape(2, 3, 3), strict=True):
            K[key] = matrix
    for key, rotation in rotations.items():
        yield key, K.get(key), rotation, translations[key]


def _tables(path: str) -> dict[str, np.ndarray]:
    with h5py.File(io.BytesIO(files.read_bytes(path)), "r") as file:
        return {key: member(file, key)[()] for key in file}


def _ends(pair: str, known: dict[str, object]) -> tuple[str, str]:
    """The two images of `image0-image1`, whose names may hold hyphens themselves."""
    parts = pair.split("-")
    for cut in range(1, len(parts)):
        ends = "-".join(parts[:cut]), "-".join(parts[cut:])
        if ends[0] in known and ends[1] in known:
            return ends
    raise CamerasError(f"the pair {pair!r} is not of two images that have a pose, such as {next(iter(known), None)!r}")


def _overlaps(names: dict[tuple[str, str], str], lists: list[tuple[str, str]]) -> OverlapTruth:
    """The largest threshold whose list holds a pair, of all pairs of a scene that are in a list."""
    ordered = tuple(sorted(names.values()))
    index, found = {name: row for row, name in enumerate(ordered)}, {}
    for scene, folder in lists:
        keys = {key: index[name] for (of, key), name in names.items() if of == scene}
        present = files.listing(folder)
        for step in STEPS:  # later, larger ones replace the earlier
            if f"keys-th-{step}.npy" in present:
                path = files.join(folder, f"keys-th-{step}.npy")
                for pair in read_npy(files.read_bytes(path), path):
                    found[tuple(sorted(keys[key] for key in _ends(str(pair), keys)))] = float(step)
    ends = np.array(list(found), np.int64).reshape(-1, 2)
    overlap = np.fromiter(found.values(), np.float32, len(found))
    return OverlapTruth(ordered, layout.symmetric(len(ordered), *ends.T, overlap))
