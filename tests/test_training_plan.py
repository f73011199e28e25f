"""What a training works on: the lists that divide a collection, overlaps from depth, and the parts of its labels."""

import json

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sparse
import torch

from vop import config as configuration
from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.datasets.benchmark import open_benchmark
from vop.datasets.folder import ImageFile
from vop.datasets.image_sets import ImageSets
from vop.datasets.posed import OverlapTruth, encode_depth, read_overlap, write_overlap
from vop.geometry import Camera, symmetric_overlap
from vop.run import Run
from vop.schema import ConfigError, TrainConfig
from vop.steps import labels as steps
from vop.steps.poses import check_cameras
from vop.training import plan
from vop.training.plan import PART, Split, cut, depth_overlaps, pairs_of, parts_of, parts_per_epoch, split
from vop.training.sampling import VALIDATION, epoch_pairs, view_pairs
from vop.training.supervision import DepthSupervision, read_depth
from vop.training.views import image_of

NAMES = ("a/1.jpg", "a/2.jpg", "a/night/1.jpg", "a/night/2.jpg", "b/1.jpg", "b/2.jpg", "nightly.jpg")


def collection(names=NAMES) -> ImageSets:
    images = [ImageFile(name, f"/{name}", 1, 1, name.split("/")[0] if "/" in name else "") for name in sorted(names)]
    return ImageSets("/", tuple(images), tuple(names), tuple(names), {})


@pytest.fixture
def divide(tmp_path):
    """The split by the lines of the lists; None: no such list."""

    def divided(validation=None, scenes=None) -> Split:
        paths = {}
        for key, lines in (("validation", validation), ("scenes", scenes)):
            if lines is not None:
                (tmp_path / f"{key}.txt").write_text("\n".join(lines) + "\n")
                paths[key] = str(tmp_path / f"{key}.txt")
        return split(collection(), TrainConfig(**paths))

    return divided


def test_without_lists_everything_trains(divide):
    chosen = divide()
    assert chosen.training == {"a": [*NAMES[:4]], "b": [*NAMES[4:6]], "": [NAMES[6]]} and chosen.validation == {}
    assert chosen.names == sorted(NAMES)


@pytest.mark.parametrize(("lines", "validation"), [
    (["b"], {"b": ["b/1.jpg", "b/2.jpg"]}),
    (["b/"], {"b": ["b/1.jpg", "b/2.jpg"]}),
    (["a/night"], {"a": ["a/night/1.jpg", "a/night/2.jpg"]}),
    (["a/night/1.jpg", "", "  nightly.jpg  "], {"a": ["a/night/1.jpg"], "": ["nightly.jpg"]}),
    (["b/2.jpg", "b", "a/1.jpg"], {"a": ["a/1.jpg"], "b": ["b/1.jpg", "b/2.jpg"]}),
])  # fmt: skip
def test_a_list_names_scenes_folders_or_images_and_the_others_train(divide, lines, validation):
    chosen = divide(lines)
    assert chosen.validation == validation
    left = sorted({*NAMES} - {name for names in validation.values() for name in names})
    assert sorted(name for names in chosen.training.values() for name in names) == left
    assert all(names == sorted(names) and names for names in chosen.training.values())
    assert chosen.names == sorted(NAMES)


def test_two_lists_may_leave_some_out(divide):
    chosen = divide(["a/night"], ["b", "a/1.jpg"])
    assert chosen.training == {"a": ["a/1.jpg"], "b": ["b/1.jpg", "b/2.jpg"]}
    assert chosen.names == ["a/1.jpg", "a/night/1.jpg", "a/night/2.jpg", "b/1.jpg", "b/2.jpg"]


@pytest.mark.parametrize(("validation", "scenes", "complaint"), [
    (["c"], None, r"train\.validation=.*'c', which is neither an image, a scene nor a folder .* such as 'a/1.jpg' and"),
    (["b"], ["a", "a/3.jpg"], r"train\.scenes=.*'a/3\.jpg'"),
    (["nigh"], None, "'nigh'"),  # part of a name is no folder
    (["a", "b/1.jpg"], ["b"], r"1 images are to train and to validate, such as 'b/1\.jpg'"),
    (["a", "b", "nightly.jpg"], None, "no image to train on: 7 in all, 7 of them validate"),
    ([], None, "no image to validate on"),
    (["a"], [], "no image to train on"),
])  # fmt: skip
def test_lists_that_cannot_be_meant_are_refused(divide, validation, scenes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        divide(validation, scenes)


def test_an_empty_collection_is_refused():
    with pytest.raises(ConfigError, match="no image to train on: 0 in all"):
        split(collection(()), TrainConfig())


def test_a_split_without_some_images(divide):
    chosen = divide(["b", "nightly.jpg"]).only({"a/2.jpg", "a/night/1.jpg", "b/1.jpg", "other.jpg"})
    assert chosen.training == {"a": ["a/2.jpg", "a/night/1.jpg"]}
    assert chosen.validation == {"b": ["b/1.jpg"]}


# Overlaps from depth

SIZE = (40, 30)
K = np.array([[40.0, 0, 20], [0, 40, 15], [0, 0, 1]])


class Walls:
    """Images of a wall 2 m away, each from a step of `step` metres further right; written as they are added."""

    def __init__(self, folder):
        self.folder, self.known, self.depths = folder, [], {}

    def add(self, name: str, step: float, world: str = "w", depth: np.ndarray | None = None, **camera) -> Camera:
        pose = np.eye(4)
        pose[0, 3] = -step
        fields = {"K": K, "cam_from_world": pose, "world": world, "width": SIZE[0], "height": SIZE[1]}
        self.known.append(KnownCamera(name, **fields | camera))
        path = self.folder / f"{len(self.known)}.depth.png"
        path.write_bytes(encode_depth(np.full(SIZE[::-1], 2.0) if depth is None else depth))
        self.depths[name] = str(path)
        return Camera(K, pose, *SIZE)

    def overlaps(self, more=()) -> tuple[OverlapTruth, dict]:
        return depth_overlaps([*self.depths, *more], Cameras.of(self.known), self.depths)


def test_overlaps_are_those_of_the_cameras_and_end_with_the_world(tmp_path):
    walls, steps = Walls(tmp_path), {"v/3.jpg": 0.1, "w/1.jpg": 0.0, "w/2.jpg": 0.5, "v/4.jpg": 0.0, "w/5.jpg": 5.0}
    cameras = {name: walls.add(name, step, name[0]) for name, step in steps.items()}
    truth, reasons = walls.overlaps()
    assert reasons == {} and sorted(truth.names) == sorted(steps)
    assert sparse.issparse(truth.matrix) and truth.matrix.dtype == np.float32
    matrix = truth.matrix.toarray()
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 1)
    wall = np.full(SIZE[::-1], 2.0)
    for i, first in enumerate(truth.names):
        for j, second in enumerate(truth.names):
            expected = 0.0
            if first[0] == second[0]:
                expected = symmetric_overlap(wall, cameras[first], wall, cameras[second])
            assert matrix[i, j] == pytest.approx(expected, abs=0.03)
    near = truth.matrix[truth.names.index("w/1.jpg"), truth.names.index("w/2.jpg")]
    assert near == pytest.approx(0.75, abs=0.03)  # 0.5 m of the 2 m that an image shows


def test_images_without_depth_or_camera_are_counted_and_left_out(tmp_path):
    walls = Walls(tmp_path)
    for name in ("1", "2"):
        walls.add(name, 0.1 * int(name))
    walls.add("no K", 0, K=None)
    walls.add("no pose", 0, cam_from_world=None)
    walls.add("no depth", 0)
    (tmp_path / "5.depth.png").unlink()
    walls.add("garbage", 0)
    (tmp_path / "6.depth.png").write_bytes(b"no depth")
    walls.add("singular K", 0, K=np.diag([40.0, 0, 1]))
    walls.add("half", 0, depth=np.full((15, 20), 2.0))
    walls.add("turned", 0, depth=np.full(SIZE, 2.0))
    walls.known.append(KnownCamera("no path", K, np.eye(4), "w", *SIZE))
    walls.add("unknown", 0)
    walls.known.pop()
    truth, reasons = walls.overlaps(["no path"])
    assert truth.names == ("1", "2") and truth.matrix.shape == (2, 2) and truth.matrix[0, 1] > 0.9
    assert reasons == {
        "camera missing": 3,
        "pose is not a rotation or K not a calibration": 1,
        "depth map missing": 2,
        "depth map cannot be read": 1,
        "depth map of another size than its image": 2,
    }


def test_an_image_whose_size_is_not_recorded_has_that_of_its_depth(tmp_path):
    walls = Walls(tmp_path)
    walls.add("1", 0, width=None, height=None)
    walls.add("2", 0.5)
    truth, reasons = walls.overlaps()
    assert reasons == {} and truth.matrix[0, 1] == pytest.approx(0.75, abs=0.03)


def test_unknown_depth_overlaps_with_nothing(tmp_path):
    walls = Walls(tmp_path)
    walls.add("1", 0)
    walls.add("2", 0, depth=np.zeros(SIZE[::-1]))
    truth, reasons = walls.overlaps()
    assert reasons == {} and truth.matrix.toarray().tolist() == [[1, 0], [0, 1]]


def test_no_image_at_all():
    truth, reasons = depth_overlaps(["a.jpg"], Cameras.of([]), {})
    assert truth.names == () and truth.matrix.shape == (0, 0) and reasons == {"camera missing": 1}


@pytest.fixture
def supervised(rendered_collection, tmp_path):
    """What the rendered rooms give to learn from, if their cameras are changed."""

    def of(change):
        entries = json.loads((rendered_collection / "cameras.json").read_text())
        change(entries)
        (tmp_path / "cameras.json").write_text(json.dumps(entries))
        told = configuration.load(images=str(rendered_collection), cameras=str(tmp_path), output=str(tmp_path / "run"))
        job, benchmark = Run(told.output, "train"), open_benchmark(told)
        truth, places, chosen = steps.supervised(told, job, benchmark, split(benchmark.sets, told.train))
        pairs = pairs_of(0, chosen, truth, told.train, benchmark.cameras.worlds)
        return job.counts["images_without_overlap"], truth, pairs, benchmark, places["cameras"]

    return of


def labels_of(pairs: pa.Table, benchmark, cameras: str) -> list:
    """Labels of the first pairs, of images 160 pixels wide at most."""
    rows = []
    for pair in pairs.slice(0, 6).to_pylist():
        for side in (0, 1):
            path = benchmark.depths(image_of(pair[f"view{side}"]))
            size = dict(zip(("height", "width"), read_depth(path).shape, strict=True))
            pair |= {f"depth{side}": path} | {f"{stem}{of}{side}": size[of] for stem in ("", "scaled_") for of in size}
        rows.append(pair)
    return DepthSupervision(cameras, 168, 0.1, 2).labels(rows)


SINGULAR = "pose is not a rotation or K not a calibration"


def test_an_image_with_a_singular_pose_teaches_nothing_and_the_others_what_they_would(supervised):
    def damaged(entries):
        entries["0005.jpg"]["R"] = np.zeros((3, 3)).tolist()
        entries["0012.jpg"]["t"] = [float("nan"), 0, 0]

    reasons, truth, pairs, benchmark, cameras = supervised(damaged)
    assert reasons == {SINGULAR: 2} and len(truth.names) == 22 and not {"0005.jpg", "0012.jpg"} & {*truth.names}
    with pytest.raises(CamerasError, match=r"camera of '0005\.jpg': cam_from_world holds no rotation"):
        check_cameras(benchmark)  # what judges poses does not begin
    without = supervised(lambda entries: [entries.pop(name) for name in ("0005.jpg", "0012.jpg")])
    assert without[0] == {"camera missing": 2} and truth.names == without[1].names
    np.testing.assert_array_equal(truth.matrix.toarray(), without[1].matrix.toarray())
    assert pairs.equals(without[2]) and pairs.num_rows > 100
    found, expected = labels_of(pairs, benchmark, cameras), labels_of(*without[2:])
    assert sum(int(labels.positive.sum()) for labels in found) > 20
    for labels, same in zip(found, expected, strict=True):
        assert torch.equal(labels.positive, same.positive) and torch.equal(labels.counts, same.counts)


def test_too_many_images_without_overlaps_fail(supervised):
    def damaged(entries):
        for name in sorted(entries)[:3]:
            entries[name]["R"] = np.zeros((3, 3)).tolist()
        entries.pop("0023.jpg")

    complaint = rf"4 of 24 images have no overlaps, more than train\.max_bad_fraction=0\.1: 3 {SINGULAR}, 1 camera miss"
    for _ in range(2):  # the second time the overlaps are there
        with pytest.raises(ConfigError, match=complaint):
            supervised(damaged)


# Parts


def scenes(count: int, images: int = 9) -> dict[str, list[str]]:
    return {f"{scene:03d}": [f"{scene:03d}/{image}.jpg" for image in range(images)] for scene in range(count)}


@pytest.mark.parametrize(("training", "validation", "config", "parts"), [
    (1, 0, {}, 1),
    (2, 1, {}, 1),
    (3, 0, {}, 2),  # 1200 pairs
    (368, 5, {}, 144),  # MegaDepth: 147200 pairs
    (1, 3, {}, 2),
    (1, 6, {"validation_pairs": 512}, 6),
    (4, 0, {"positives_per_scene": 128, "negatives_per_scene": 128}, 1),
    (4, 0, {"positives_per_scene": 128, "negatives_per_scene": 129}, 2),
])  # fmt: skip
def test_parts_that_the_pairs_of_an_epoch_fit_into(training, validation, config, parts):
    assert parts_per_epoch(Split(scenes(training, 1), scenes(validation, 1)), TrainConfig(**config)) == parts


@pytest.mark.parametrize("per_epoch", [1, 3])
def test_every_epoch_has_parts_of_its_own(per_epoch):
    numbers = [number for epoch in range(VALIDATION, 5) for number in parts_of(epoch, per_epoch)]
    assert numbers == list(range(6 * per_epoch))
    assert parts_of(VALIDATION, per_epoch) == range(per_epoch)


@pytest.mark.parametrize("pairs", [0, 1, PART - 1, PART, PART + 1, 3 * PART])
def test_an_epoch_is_cut_into_its_parts_in_order(pairs):
    table = pa.table({"view0": [str(number) for number in range(pairs)]})
    tables = list(cut(table, 3))
    assert [part.num_rows for part in tables] == [min(PART, max(0, pairs - PART * part)) for part in range(3)]
    assert pa.concat_tables(tables).equals(table)


def test_no_pair_of_an_epoch_is_lost_on_the_way_to_its_parts(monkeypatch):
    monkeypatch.setattr(plan, "PART", 7)
    chosen = Split(scenes(4), {f"x{name}": names for name, names in scenes(3).items()})
    rng = np.random.default_rng(0)
    matrix = np.maximum(0, rng.uniform(-0.5, 0.7, (36, 36)).astype(np.float32))
    truth = OverlapTruth(tuple(chosen.names), np.maximum(matrix, matrix.T))
    config = TrainConfig(positives_per_scene=11, negatives_per_scene=8, validation_pairs=13)
    per_epoch = parts_per_epoch(chosen, config)
    for known in (truth, None):
        for epoch in (VALIDATION, 0, 1):
            pairs = pairs_of(epoch, chosen, known, config, None)
            assert pa.concat_tables(cut(pairs, per_epoch)).equals(pairs) and pairs.num_rows > 20


def test_the_validation_is_drawn_from_its_own_scenes():
    chosen = Split({"a": ["a/1.jpg", "a/2.jpg"]}, {"b": ["b/1.jpg", "b/2.jpg"]})
    truth = OverlapTruth(("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"), np.full((4, 4), 0.5, np.float32))
    config = TrainConfig(positives_per_scene=5)
    assert pairs_of(VALIDATION, chosen, truth, config, None).to_pylist() == [
        {"view0": "b/1.jpg", "view1": "b/2.jpg", "overlap": 0.5}
    ]
    assert pairs_of(3, chosen, truth, config, None).equals(epoch_pairs(truth, chosen.training, config, 3))
    assert pairs_of(3, chosen, None, config, None).equals(view_pairs(chosen.training, config, 3))


def test_images_that_the_given_overlaps_lack_are_counted(rendered_collection, tmp_path):
    whole = read_overlap(rendered_collection / "overlap.parquet")
    names = whole.names

    def of(number):
        kept = OverlapTruth(names[:number], whole.matrix[:number, :number])
        write_overlap(tmp_path / "overlap.parquet", kept)
        told = configuration.load(
            images=str(rendered_collection), cameras=str(rendered_collection), output=str(tmp_path / "run"),
            truth=str(tmp_path / "overlap.parquet"),
        )  # fmt: skip
        job, benchmark = Run(told.output, "train"), open_benchmark(told)
        return job, steps.supervised(told, job, benchmark, split(benchmark.sets, told.train))[2]

    job, chosen = of(22)
    assert job.counts["images_without_overlap"] == {"not among the true overlaps": 2}
    assert sorted(chosen.names) == sorted(names[:22])
    with pytest.raises(ConfigError, match=r"3 of 24 images have no overlaps, .*: 3 not among the true overlaps"):
        of(21)
