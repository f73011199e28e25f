"""COLMAP models, text or binary, and benchmarks that come as one model per scene, such as ETH3D.

    ROOT/courtyard/images/dslr_images_undistorted/DSC_0286.JPG      dataset.images = {scene}/images
    ROOT/courtyard/dslr_calibration_undistorted/cameras.txt         dataset.model = {scene}/dslr_calibration_undistorted
                                                images.txt          or the same three as .bin
                                                points3D.txt

`dataset.images` is the folder that the names in the model count from. The model is the list of images: others on disk
have no pose. The format: https://colmap.github.io/format.html; ETH3D: https://www.eth3d.net/datasets (high-res
multi-view, training, *_dslr_undistorted.7z). Poses are world to camera, and pixel centres lie at +0.5, as
here; the size of an image is that before EXIF rotation, so images that carry an orientation tag do not fit (COLMAP's
own undistorter writes none). A camera with distortion keeps its model and parameters, and K is its pinhole part.

True overlap: the triangulated points two images share, as a share of those each sees; the smaller of the two shares.
It follows what SIFT could match, hence misses overlap across strong changes of view.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sparse

from vop import files
from vop.cameras import Cameras, CamerasError, KnownCamera, load_pycolmap
from vop.datasets import layout
from vop.datasets.layout import Benchmark
from vop.datasets.posed import OverlapTruth
from vop.geometry import pose_from_rt
from vop.schema import DatasetConfig

IMAGES, MODEL = "{scene}/images", "{scene}/sparse"
PARTS = ("cameras", "images", "points3D")
POINTS = pa.schema(  # name of an image; of each point it sees the id, and where, pixels
    [("name", pa.string()), ("id", pa.list_(pa.uint64())), ("x", pa.list_(pa.float64())), ("y", pa.list_(pa.float64()))]
)
PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE")


def missing(dataset: DatasetConfig) -> list[str]:
    """What the layout lacks."""
    images, model = dataset.images or IMAGES, dataset.model or MODEL
    problems = []
    for scene in layout.scenes(dataset, model, problems):
        folder, place = layout.place(dataset, model, scene), layout.place(dataset, images, scene)
        if not is_model(folder):
            problems.append(f"no COLMAP model in {folder}: expected {', '.join(PARTS)} as .txt or .bin")
        if not files.exists(place):
            problems.append(f"no folder {place}: the names in the model of {scene} count from there")
    return problems


def read(dataset: DatasetConfig) -> Benchmark:
    """The images of the models, with cameras and shared points."""
    found, cameras = [], []
    scenes = layout.scenes(dataset, dataset.model or MODEL)
    for scene in scenes:
        prefix = layout.below_root(dataset, dataset.images or IMAGES, scene)
        known = list(read_cameras(layout.place(dataset, dataset.model or MODEL, scene), scene, prefix))
        cameras.extend(known)
        found.extend(layout.image_files(dataset, [camera.name for camera in known], scene))
    return Benchmark(
        layout.one_set(dataset, found),
        Cameras.of(cameras),
        lambda: _shared(dataset, scenes),
        points=lambda: _points(dataset, scenes),
    )


def is_model(folder: str) -> bool:
    """Whether a folder holds a COLMAP model."""
    present = files.listing(folder)
    return any(all(f"{part}{kind}" in present for part in PARTS) for kind in (".bin", ".txt"))


def read_cameras(folder: str, world: str, prefix: str = "") -> Iterator[KnownCamera]:
    """The cameras of a model; `prefix` is what its names lack, such as `courtyard/images/`.

    Raises `CamerasError` for a model that cannot be read, ImportError without pycolmap.
    """
    model = _open(folder)
    for image in model.images.values():
        camera, pose = model.cameras[image.camera_id], None
        if image.has_pose:
            pose = pose_from_rt(*np.split(image.cam_from_world().matrix(), [3], axis=1))
        yield known_camera(prefix + image.name, camera, pose, world)


def known_camera(name: str, camera, pose: np.ndarray | None, world: str) -> KnownCamera:
    """A pycolmap camera and a (4, 4) pose as a row of the table of cameras."""
    plain = camera.model_name in PINHOLES
    return KnownCamera(
        name,
        camera.calibration_matrix(),
        pose,
        world,
        camera.width,
        camera.height,
        model=None if plain else camera.model_name,
        params=None if plain else tuple(camera.params),
    )


def _open(folder: str):
    try:
        with files.at_hand(folder) as local:
            return load_pycolmap().Reconstruction(local)
    except ValueError as error:
        raise CamerasError(f"{folder} cannot be read as a COLMAP model: {error}") from error


def _shared(dataset: DatasetConfig, scenes: Sequence[str]) -> OverlapTruth:
    names, blocks = [], []
    for scene in scenes:
        prefix = layout.below_root(dataset, dataset.images or IMAGES, scene)
        found, block = shared_points(layout.place(dataset, dataset.model or MODEL, scene))
        names.extend(prefix + name for name in found)
        blocks.append(block)
    return OverlapTruth(tuple(names), sparse.block_diag(blocks, format="csr", dtype=np.float32))


def _points(dataset: DatasetConfig, scenes: Sequence[str]) -> pa.Table:
    tables = []
    for number, scene in enumerate(scenes):
        prefix = layout.below_root(dataset, dataset.images or IMAGES, scene)
        tables.append(seen_points(layout.place(dataset, dataset.model or MODEL, scene), prefix, number << 48))
    return pa.concat_tables(tables)


def seen_points(folder: str, prefix: str = "", offset: int = 0) -> pa.Table:
    """`POINTS` of a model. `offset` is added to its ids, to tell those of several models apart."""
    rows = []
    for image in _open(folder).images.values():
        points = image.get_observation_points2D()
        x, y = np.array([point.xy for point in points], np.float64).reshape(-1, 2).T
        ids = np.array([point.point3D_id for point in points], np.uint64) + np.uint64(offset)
        rows.append({"name": prefix + image.name, "id": ids, "x": x, "y": y})
    return pa.Table.from_pylist(rows, schema=POINTS)


def covisible(points: pa.Table, names: Sequence[str], count: int) -> pa.Table:
    """Pairs (query, database, rank from 0) of each named image with those `count` that share most points with it.

    points: `POINTS`. Of images that share as many, those come first that do by name.
    """
    points = points.filter(pc.is_in(points["name"], pa.array(names, pa.string()))).sort_by("name")
    ids, images = points["id"].combine_chunks(), points["name"].to_pylist()
    rows = np.repeat(np.arange(len(images)), pc.list_value_length(ids).to_numpy(zero_copy_only=False))
    columns = np.unique(ids.flatten().to_numpy(), return_inverse=True)[1]
    shape = (len(images), columns.max(initial=-1) + 1)
    sees = sparse.csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=shape)
    sees.data[:] = 1  # a point may be seen twice
    shared = (sees @ sees.T).tocsr()
    pairs = []
    for row, name in enumerate(images):
        start, stop = shared.indptr[row : row + 2]
        others, numbers = shared.indices[start:stop], shared.data[start:stop]
        best = np.lexsort([others, -numbers])
        best = best[(others[best] != row) & (numbers[best] > 0)][:count]
        pairs += [(name, images[other], rank) for rank, other in enumerate(others[best].tolist())]
    query, database, rank = zip(*pairs, strict=True) if pairs else ((), (), ())
    columns = {"query": pa.array(query, pa.string()), "database": pa.array(database, pa.string())}
    return pa.table(columns | {"rank": pa.array(rank, pa.int32())})


def shared_points(folder: str) -> tuple[list[str], sparse.csr_array]:
    """Names and overlaps (N, N) float32 of the images of a model: points shared / the larger count of points seen."""
    model = _open(folder)
    images = list(model.images.values())
    seen = [sorted({point.point3D_id for point in image.get_observation_points2D()}) for image in images]
    counts = np.array([len(points) for points in seen])
    ids, columns = np.unique(np.concatenate([np.array(points, np.uint64) for points in seen]), return_inverse=True)
    rows = np.repeat(np.arange(len(images)), counts)
    sees = sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(images), len(ids)))
    shared = (sees @ sees.T).tocoo()
    share = shared.data / np.maximum(counts[shared.row], counts[shared.col])
    overlap = sparse.csr_array((share.astype(np.float32), (shared.row, shared.col)), shape=shared.shape).tolil()
    overlap.setdiag(1)
    return [image.name for image in images], overlap.tocsr()
