"""Pittsburgh 30k and other place recognition sets in its two layouts: positions in file names, or lists in npy files.

    ROOT/images/test/queries/@0583960.00@4477016.66@17@T@40.4@-80.0@...@.jpg      dataset.images = images/{scene}
    ROOT/images/test/database/@0583961.12@4477020.04@...@.jpg                     scenes: the splits, such as [test]

Names begin `@UTM east@UTM north@`, metres; a database image within 25 m of a query is a match for it. From
https://github.com/gmberton/VPR-datasets-downloader, which lays out a dozen other sets alike.

    ROOT/pitts30k_test_qImages.npy, pitts30k_test_dbImages.npy      dataset.model = pitts30k_{scene}
    ROOT/pitts30k_test_gt.npy                                       or ..._gt_25m.npy; optional
    ROOT/queries_real/..., ROOT/000/...                             dataset.images = . (where the lists count from)

With `dataset.model`, the lists of image names, and per query the positions in the database list that match it. Images:
https://www.di.ens.fr/willow/research/netvlad; lists: https://github.com/serizba/salad (datasets/Pittsburgh).

The truth is of place, not of overlap: 1 for a match, 0 otherwise, between queries and database only; an image within
25 m may look the other way. No camera is known, so relative poses cannot be judged.
"""

import posixpath
import re

import numpy as np
from scipy.spatial import cKDTree

from vop import files
from vop.cameras import CamerasError
from vop.datasets import layout
from vop.datasets.folder import ImageFile, list_images
from vop.datasets.layout import Benchmark
from vop.datasets.posed import OverlapTruth
from vop.pickled import read_npy
from vop.schema import DatasetConfig

IMAGES = "images/{scene}"
POSITIVE = 25.0  # metres: the rule of the published recalls
UTM = re.compile(r"@(?P<east>[\d.]+)@(?P<north>[\d.]+)@")
SIDES = {"queries": "qImages", "database": "dbImages"}
WITHHELD = "cameras are not part of this benchmark: retrieval can be judged, by distance, but relative poses cannot"


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks."""
    problems = []
    for scene in _splits(dataset, problems):
        for side, list_name in SIDES.items():
            if dataset.model is None:
                path, holds = f"{dataset.images or IMAGES}/{side}", f"the {side}, named @UTM east@UTM north@...jpg"
            else:
                path, holds = f"{dataset.model}_{list_name}.npy", f"the names of the {side}"
            problems += layout.lacking(layout.place(dataset, path, scene), holds)
    return problems


def read(dataset: DatasetConfig) -> Benchmark:
    """Queries and database of the splits, and which of them lie near each other."""
    queries, database, matches = [], [], []
    for split in _splits(dataset):
        sides = [_images(dataset, split, side) for side in SIDES]
        queries += sides[0]
        database += sides[1]
        found = _listed_matches(dataset, split, *sides) if dataset.model else _near(*sides)
        matches.append(found)
    sets = layout.two_sets(dataset, queries, database)
    known = all(found is not None for found in matches)
    return Benchmark(sets, overlaps=(lambda: _truth(sets.names, matches)) if known else None, withheld=WITHHELD)


def _splits(dataset: DatasetConfig, problems: list[str] | None = None) -> list[str]:
    template = dataset.images or IMAGES if dataset.model is None else f"{dataset.model}_{SIDES['database']}.npy"
    return layout.scenes(dataset, template, problems)


def _images(dataset: DatasetConfig, split: str, side: str) -> list[ImageFile]:
    if dataset.model is None:
        return list(
            list_images(layout.place(dataset, f"{dataset.images or IMAGES}/{side}", split), dataset.root).images
        )
    prefix = layout.below_root(dataset, dataset.images or "", split)
    names = _array(layout.place(dataset, f"{dataset.model}_{SIDES[side]}.npy", split))
    return layout.image_files(dataset, [prefix + str(name) for name in names], split)


def _near(queries: list[ImageFile], database: list[ImageFile]) -> list[tuple[str, str]]:
    """Pairs (query, database image) at most 25 m apart."""
    places = cKDTree(np.array([_position(image.name) for image in database]))
    near = places.query_ball_point(np.array([_position(image.name) for image in queries]), POSITIVE)
    return [(query.name, database[row].name) for query, rows in zip(queries, near, strict=True) for row in rows]


def _position(name: str) -> tuple[float, float]:
    found = UTM.match(posixpath.basename(name))
    if found is None:
        raise CamerasError(
            f"the name of {name!r} does not begin with @UTM east@UTM north@, metres: no position is known"
        )
    return float(found["east"]), float(found["north"])


def _listed_matches(
    dataset: DatasetConfig, split: str, queries: list[ImageFile], database: list[ImageFile]
) -> list[tuple[str, str]] | None:
    """Pairs (query, database image) of the list of matches; None without such a list."""
    path = next((path for path in _matches_paths(dataset, split) if files.exists(path)), None)
    if path is None:
        return None
    rows = _array(path)
    if len(rows) != len(queries):
        raise CamerasError(f"{path} has {len(rows)} rows for {len(queries)} queries: is it of another split?")
    return [(query.name, database[int(row)].name) for query, near in zip(queries, rows, strict=True) for row in near]


def _matches_paths(dataset: DatasetConfig, split: str) -> list[str]:
    return [layout.place(dataset, f"{dataset.model}_gt{suffix}.npy", split) for suffix in ("", "_25m")]


def _array(path: str) -> np.ndarray:
    return read_npy(files.read_bytes(path), path)  # rows of unequal length are pickled


def _truth(names: list[str], matches: list[list[tuple[str, str]]]) -> OverlapTruth:
    index = {name: row for row, name in enumerate(names)}
    ends = np.array([(index[query], index[image]) for found in matches for query, image in found], np.int64)
    ends = ends.reshape(-1, 2)
    return OverlapTruth(tuple(names), layout.symmetric(len(names), *ends.T, np.ones(len(ends), np.float32)))
