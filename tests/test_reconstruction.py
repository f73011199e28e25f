"""Reconstruction: pairs that contradict others, models of a scene that is known, and how they are judged."""

import dataclasses

import matched_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matched_runs import NAMES, SIZE
from scipy.spatial.transform import Rotation

from vop import colmap, view_graph
from vop.cameras import Cameras, KnownCamera
from vop.features import FeatureStore
from vop.geometry import Camera, invert
from vop.matches import MatchStore
from vop.pair_verification import PairVerification, image_cameras
from vop.parts import Parts
from vop.pose.alignment import judge, similarity
from vop.reconstruction import DATABASE, VERIFIED, DatabaseWriter, Mapper, place
from vop.schema import ReconstructConfig

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap, of the extra `localize`, is not installed")
CONFIG = ReconstructConfig()


@dataclasses.dataclass
class Scene:
    """A matched run whose scene is known, its pairs verified and its database written; images in `folder`."""

    folder: object
    output: str
    features: FeatureStore
    geometries: Parts
    count: int

    @property
    def images(self) -> str:
        return f"{self.output}/images.parquet"

    def write_database(self, config=CONFIG) -> pa.Table:
        DatabaseWriter(config, self.features, self.images, self.geometries, self.count, self.output)("inputs")
        return pq.read_table(f"{self.output}/{VERIFIED}")

    def models(self, folder, config=CONFIG) -> tuple[pa.Table, Parts]:
        parts = Parts(str(folder), "test", "mapping")
        Mapper(config, self.images, self.output, parts)(0, pq.read_table(self.images)["name"].to_pylist())
        return parts.read_one(0), parts


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction")
    output = matched_runs.write(folder)
    features, matches = FeatureStore.open(f"{output}/features"), MatchStore.open(f"{output}/matches")
    Cameras.of(
        KnownCamera(name, matched_runs.K, matched_runs.camera(i).cam_from_world, "w", *SIZE)
        for i, name in enumerate(NAMES)
    ).write(f"{output}/cameras.parquet")
    live = features.live().sort_by("name")
    paths = [f"{folder}/images/{name}" for name in live["name"].to_pylist()]
    asked = live.select(["name", "width", "height"]).append_column("path", pa.array(paths))
    images = image_cameras(asked, f"{output}/cameras.parquet")
    for column in ("shard", "row"):
        images = images.append_column(column, live[column])
    pq.write_table(images, f"{output}/images.parquet")
    parts, receipts = Parts(output, "test", "geometries"), matches.receipts()
    verification = PairVerification(CONFIG, features, matches, f"{output}/images.parquet", parts)
    for number in receipts:
        rows = np.arange(matches.planned(number).num_rows)
        verification(pa.table({"part": [number] * len(rows), "shard": [number] * len(rows), "row": rows}))
    return Scene(folder, output, features, parts, len(receipts))


def test_every_pair_is_told_of(scene):
    pairs = scene.write_database()
    print(pairs.to_pandas().to_string())
    registered, parts = scene.models(scene.folder / "m")
    print(registered.drop(["cam_from_world"]).to_pandas().to_string())
