"""Aachen Day-Night v1.1: a COLMAP model of database photographs, and queries with intrinsics by day and by night.

    ROOT/images_upright/db/1.jpg, sequences/...                   dataset.images = images_upright
    ROOT/images_upright/query/{day,night}/...
    ROOT/queries/day_time_queries_with_intrinsics.txt             and night_time: every list of such a name is read
    ROOT/3D-models/aachen_v_1_1/{cameras,images,points3D}.bin     dataset.model = 3D-models/aachen_v_1_1

From https://www.visuallocalization.net/datasets (Aachen Day-Night, and its extension v1.1 unpacked over it).

The database is what the model names; its poses are COLMAP's, world to camera, pixel centres at +0.5. Queries have K
(line: name, COLMAP camera model, width, height, parameters) and no pose: theirs are not published, so only pairs of
database images have a true relative pose. All is one world. Cameras with distortion keep their model and parameters.
"""

from vop import files
from vop.cameras import Cameras
from vop.datasets import colmap, layout
from vop.datasets.layout import Benchmark
from vop.query_cameras import read_list
from vop.schema import DatasetConfig

IMAGES, MODEL, QUERIES = "images_upright", "3D-models/aachen_v_1_1", "queries"
LISTS = "_queries_with_intrinsics.txt"
WITHHELD = (
    "the poses of Aachen's queries are not published: localize them and submit the poses to visuallocalization.net; "
    "relative poses are judged between database images only"
)


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks."""
    model = layout.place(dataset, dataset.model or MODEL)
    problems = layout.lacking(layout.place(dataset, dataset.images or IMAGES), "the images (db/ and query/)")
    if not colmap.is_model(model):
        problems.append(f"no COLMAP model in {model}: {', '.join(colmap.PARTS)} as .bin or .txt, with the poses")
    if not _lists(dataset):
        problems.append(f"no list in {layout.place(dataset, QUERIES)}: day_time{LISTS} and night_time{LISTS}")
    return problems


def read(dataset: DatasetConfig) -> Benchmark:
    """Queries with intrinsics, database images with intrinsics and poses."""
    prefix = layout.below_root(dataset, dataset.images or IMAGES)
    database = list(colmap.read_cameras(layout.place(dataset, dataset.model or MODEL), "aachen", prefix))
    queries = [camera for path in _lists(dataset) for camera in read_list(path, prefix, "aachen")]
    sides = (layout.image_files(dataset, [camera.name for camera in side]) for side in (queries, database))
    return Benchmark(
        layout.two_sets(dataset, *sides), Cameras.of([*database, *queries]), withheld=WITHHELD, written="basename"
    )


def _lists(dataset: DatasetConfig) -> list[str]:
    folder = layout.place(dataset, QUERIES)
    return [files.join(folder, name) for name in files.listing(folder) if name.endswith(LISTS)]
