"""`hloc:FEATURES+MATCHER`, on a stand-in with hloc's layout, and on hloc itself where it is installed."""

import json
import sys
import textwrap

import cv2
import numpy as np
import pytest
import skimage.data

from vop import matching
from vop.features import LocalFeatures
from vop.matching.packages import is_installed
from vop.schema import ConfigError, MatchingConfig

# Written after hloc's documented interfaces: dictionaries of configurations, a model class per module, dynamic_load.
STAND_IN = {
    "__init__.py": "",
    "extract_features.py": """
        import cv2
        confs = {
            "peaks": {"output": "feats-peaks", "model": {"name": "peaks", "most": 50},
                      "preprocessing": {"grayscale": True, "resize_max": 100, "resize_force": True}},
            "dog": {"output": "feats-dog", "model": {"name": "dog"}, "preprocessing": {"grayscale": True}},
            "superpoint_max": {"output": "feats-superpoint", "model": {"name": "superpoint"}, "preprocessing": {}},
            "netvlad": {"output": "global-feats-netvlad", "model": {"name": "netvlad"}, "preprocessing": {}},
        }
        class ImageDataset:
            default_conf = {"grayscale": False, "resize_max": None, "resize_force": False, "interpolation": "cv2_area"}
        def resize_image(image, size, interp):
            return cv2.resize(image, size, interpolation=getattr(cv2, "INTER_" + interp[4:].upper()))
        """,
    "match_features.py": """
        confs = {"NN-mutual": {"output": "m", "model": {"name": "nearest", "do_mutual_check": True}},
                 "adalam": {"output": "a", "model": {"name": "adalam"}}}
        """,
    "utils/__init__.py": "",
    "utils/base_model.py": """
        import importlib
        from torch import nn
        class BaseModel(nn.Module):
            required_inputs = []
            def __init__(self, conf):
                super().__init__()
                self.conf = conf
            def forward(self, data):
                assert set(self.required_inputs) <= set(data)
                return self._forward(data)
        def dynamic_load(root, model):
            module = importlib.import_module(f"{root.__name__}.{model}")
            return next(value for value in vars(module).values() if isinstance(value, type)
                        and issubclass(value, BaseModel) and value is not BaseModel)
        """,
    "extractors/__init__.py": "",
    "extractors/peaks.py": """
        import torch
        from ..utils.base_model import BaseModel
        class Peaks(BaseModel):
            required_inputs = ["image"]
            def _forward(self, data):
                image = data["image"]
                assert image.shape[1] == 1 and max(image.shape[2:]) == 100 and 0 <= image.min() <= image.max() <= 1
                scores, at = image[0, 0].flatten().topk(self.conf["most"])
                keypoints = torch.stack((at % image.shape[3], at // image.shape[3]), 1).float()
                angle = keypoints[:, 0] * 0.01 + keypoints[:, 1]
                return {"keypoints": [keypoints], "keypoint_scores": [scores],
                        "descriptors": [torch.stack((angle.cos(), angle.sin(), angle * 0))]}
        """,
    "extractors/dog.py": """
        import torch
        from ..utils.base_model import BaseModel
        class Dog(BaseModel):
            def _forward(self, data):
                return {"keypoints": torch.tensor([[[7.5, 3.5]]]), "scores": torch.zeros(1, 1),
                        "descriptors": torch.ones(1, 2, 1)}
        """,
    "extractors/superpoint.py": "from ThirdParty import superpoint",
    "matchers/__init__.py": "",
    "matchers/nearest.py": """
        import torch
        from ..utils.base_model import BaseModel
        class Nearest(BaseModel):
            required_inputs = ["image0", "keypoints0", "scores0", "descriptors0", "descriptors1"]
            def _forward(self, data):
                assert data["image0"].shape == (1, 1, 120, 200) and data["keypoints0"].shape[2] == 2
                similarity = data["descriptors0"][0].T @ data["descriptors1"][0]
                best, at = similarity.max(1)
                mutual = similarity.argmax(0)[at] == torch.arange(len(at))
                return {"matches0": torch.where(mutual, at, -1)[None], "matching_scores0": best[None]}
        """,
    "matchers/adalam.py": """
        from ..utils.base_model import BaseModel
        class AdaLAM(BaseModel):
            required_inputs = ["keypoints0", "scales0", "oris1"]
        """,
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `hloc` of a few lines, installed as far as pip can tell."""
    for name, source in STAND_IN.items():
        path = tmp_path / "hloc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    (tmp_path / "hloc-1.5.dist-info").mkdir()
    (tmp_path / "hloc-1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hloc\nVersion: 1.5\n")
    origin = {"url": "https://example.org/hloc", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    (tmp_path / "hloc-1.5.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "hloc"}
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "hloc"]:
        del sys.modules[name]
    sys.modules.update(real)


def config(method: str, **settings) -> MatchingConfig:
    return MatchingConfig(method=method, **{"resize": None, **settings})


def test_features_and_matches_of_the_stand_in(stand_in):
    cfg = config("hloc:peaks+NN-mutual", max_keypoints=20)
    matching.check(cfg)
    extract = matching.open_extractor(cfg)
    rgb = np.zeros((120, 200, 3), np.uint8)
    rgb[30:32, 160:162] = 255  # one pixel of the image halved by hloc's preprocessing
    features = extract(rgb, (400, 240))
    assert extract.width == 3 and features.descriptors.shape == (20, 3)
    assert features.size == (400, 240) and features.scaled == (100, 60)
    np.testing.assert_allclose(features.keypoints[0], [80.5 * 4, 15.5 * 4])
    assert features.scores[0] == 1

    seen = LocalFeatures(features.keypoints / 2, features.scores, features.descriptors, (200, 120), (100, 60))
    empty = LocalFeatures(*(each[:0] for each in (seen.keypoints, seen.scores, seen.descriptors)), (9, 9), (9, 9))
    same, none = matching.open_matcher(cfg)([(seen, seen), (seen, empty)])
    assert len(none) == 0 and len(same) > 5
    np.testing.assert_array_equal(same.indices[:, 0], same.indices[:, 1])


def test_the_keypoints_of_its_dog_are_not_moved_twice(stand_in):
    features = matching.open_extractor(config("hloc:dog+NN-mutual"))(np.zeros((50, 50, 3), np.uint8), (50, 50))
    np.testing.assert_array_equal(features.keypoints, [[7.5, 3.5]])


def test_identity_holds_the_commit_and_the_configurations(stand_in):
    found = matching.identity(config("hloc:peaks+NN-mutual"))
    assert found["features"]["package"] == "hloc 1.5 at c0ffee"
    assert found["features"]["model"] == {"name": "peaks", "most": 50}
    assert found["features"]["preprocessing"]["resize_max"] == 100
    assert found["matches"]["model"]["do_mutual_check"] is True
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("hloc:peeks+NN-mutual", ConfigError, "no features 'peeks'.*did you mean 'peaks'"),
        ("hloc:peaks+NN-mutal", ConfigError, "no matcher 'NN-mutal'.*did you mean 'NN-mutual'"),
        ("hloc:peaks", ConfigError, "no matcher ''"),
        ("hloc:netvlad+NN-mutual", ConfigError, "no features 'netvlad'"),
        ("hloc:peaks+adalam", ConfigError, "adalam asks for oris and scales"),
        ("hloc:superpoint_max+NN-mutual", ImportError, "superpoint or nearest.*ThirdParty.*--recursive"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(stand_in, method, error, message):
    with pytest.raises(error, match=message):
        matching.check(config(method))


@pytest.mark.skipif(not is_installed("hloc"), reason="hloc is not installed (extra hloc, in its own environment)")
def test_hlocs_own_sift_and_nearest_neighbours():
    cfg = config("hloc:sift+NN-ratio", max_keypoints=2000)
    matching.check(cfg)
    extract = matching.open_extractor(cfg)
    x, y = np.meshgrid(np.arange(300) + 0.5, np.arange(200) + 0.5)
    blob = 30 + 200 * np.exp(-((x - 150.2) ** 2 + (y - 90.7) ** 2) / (2 * 6.0**2))
    found = extract(np.repeat(blob.round().astype(np.uint8)[..., None], 3, axis=2), (300, 200))
    assert np.linalg.norm(found.keypoints - (150.2, 90.7), axis=1).min() < 0.1

    rgb = np.ascontiguousarray(skimage.data.astronaut()[:300, :400])
    shifted = cv2.warpAffine(rgb, np.float64([[1, 0, 12], [0, 1, -7]]), (400, 300))
    features = [extract(image, (400, 300)) for image in (rgb, shifted)]
    matches = matching.open_matcher(cfg)([tuple(features)])[0]
    moved = features[1].keypoints[matches.indices[:, 1]] - features[0].keypoints[matches.indices[:, 0]]
    assert len(matches) > 100
    np.testing.assert_allclose(np.median(moved, axis=0), [12, -7], atol=0.05)
