"""`hloc:FEATURES+MATCHER`: any of hloc's local features with any of its sparse matchers, where hloc is installed.

FEATURES is a key of `hloc.extract_features.confs`, MATCHER one of `hloc.match_features.confs`, for example
`hloc:superpoint_max+superglue`. hloc's own model classes run with its own settings and preprocessing: grey image and
`resize_max` (`matching.resize: null` leaves the resizing to it), keypoints moved to the original image as it does,
pixel centres at 0. Three things differ from its command line: keypoints stay float32 (its files round them to float16);
only `matching.max_keypoints` of them are kept, the best by score, or the first, since its DoG gives no scores; and the
keypoints of its DoG, which pycolmap counts from centres at +0.5, are not moved by another half pixel.

hloc: Sarlin et al., CVPR 2019; https://github.com/cvg/Hierarchical-Localization.
"""

import copy
import difflib
import warnings
from collections.abc import Sequence

import cv2
import numpy as np

from vop.features import LocalFeatures
from vop.matches import NO_MATCHES, Matches
from vop.matching.interface import Extractor, Matcher, strongest, torch_device
from vop.matching.packages import is_installed, version
from vop.schema import ConfigError, MatchingConfig

NON_COMMERCIAL = {"superpoint", "superglue", "r2d2"}  # model names of hloc whose weights are so licensed
CENTRES_AT_HALF = {"dog"}  # its keypoints, measured with pycolmap 4.2
GIVEN = {"image", "image_size", "keypoints", "scores", "keypoint_scores", "descriptors"}  # what a matcher may ask for


def _configurations(config: MatchingConfig) -> tuple[dict, dict]:
    """hloc's configurations of the features and of the matcher; raises `ImportError` or `ConfigError`."""
    if not is_installed("hloc"):
        raise ImportError(
            f"{config.method} needs hloc, which is on no package index: pip install 'vop[hloc]', in an environment of "
            "its own, because it brings torchvision and with it another build of torch"
        )
    from hloc import extract_features, match_features

    features, _, matcher = config.method.removeprefix("hloc:").partition("+")
    local = {name: conf for name, conf in extract_features.confs.items() if not conf["output"].startswith("global-")}
    chosen = []
    for part, name, known in (("features", features, local), ("matcher", matcher, match_features.confs)):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"matching.method is {config.method!r}, but hloc has no {part} {name!r}: it has "
                f"{', '.join(known)}{hint}"
            )
        chosen.append(copy.deepcopy(known[name]))
    return chosen[0], chosen[1]


def _models(config: MatchingConfig) -> tuple[type, type]:
    """hloc's classes of the extractor and of the matcher; raises `ImportError` or `ConfigError`."""
    from hloc import extractors, matchers
    from hloc.utils.base_model import dynamic_load

    names = [conf["model"]["name"] for conf in _configurations(config)]
    try:
        extractor, matcher = (dynamic_load(*pair) for pair in zip((extractors, matchers), names, strict=True))
    except ImportError as error:
        raise ImportError(
            f"{config.method}: hloc cannot import its {' or '.join(names)} ({error}); some of its models need a "
            "package of their own, others the submodules of its repository (git clone --recursive)"
        ) from error
    missing = {name[:-1] for name in matcher.required_inputs} - GIVEN
    if missing:
        raise ConfigError(
            f"hloc's matcher {names[1]} asks for {' and '.join(sorted(missing))} of the keypoints, which are not kept: "
            "choose another matcher"
        )
    return extractor, matcher


def check(config: MatchingConfig) -> None:
    """Raises `ImportError` without hloc or what a model of it needs, `ConfigError` for names it does not have.

    Warns of weights that are not free for commercial use.
    """
    restricted = NON_COMMERCIAL & {conf["model"]["name"] for conf in _configurations(config)}
    _models(config)
    if restricted:
        names = " and ".join(sorted(restricted))
        warnings.warn(f"the weights of {names} are licensed for non-commercial use only", stacklevel=3)


def identity(config: MatchingConfig) -> dict:
    """What makes these features and matches: hloc's version and its configurations."""
    features, matcher = _configurations(config)
    package = version("hloc")
    return {
        "features": {
            "method": "hloc",
            "package": package,
            "model": features["model"],
            "preprocessing": features["preprocessing"],
        },
        "matches": {"method": "hloc", "package": package, "model": matcher["model"]},
    }


class HlocExtractor(Extractor):
    """One of `hloc.extractors`. `width` is found on a small picture, because hloc's configurations do not tell it."""

    def __init__(self, config: MatchingConfig, device: str):
        import torch
        from hloc import extract_features

        conf = _configurations(config)[0]
        self.max_keypoints, self.device = config.max_keypoints, torch.device(device)
        self.resize_image = extract_features.resize_image
        self.preprocessing = {**extract_features.ImageDataset.default_conf, **conf["preprocessing"]}
        self.centre = 0.5 if conf["model"]["name"] in CENTRES_AT_HALF else 0.0
        self.net = _models(config)[0](conf["model"]).eval().to(self.device)
        checkers = np.kron(np.indices((8, 8)).sum(0) % 2, np.full((16, 16), 255, np.uint8))
        self.width = self._find(np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8))[0]["descriptors"].shape[0]

    def __call__(self, rgb: np.ndarray, size: tuple[int, int]) -> LocalFeatures:
        """Local features of an image; see `Extractor`."""
        found, scaled = self._find(rgb)
        scores = found["scores"] if "scores" in found else found["keypoint_scores"]
        keypoints = found["keypoints"] - self.centre
        return strongest(keypoints, scores, found["descriptors"].T, size, scaled, self.max_keypoints)

    def _find(self, rgb: np.ndarray) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """What the model says of an image, and the size at which it saw it; as `hloc.extract_features` does."""
        import torch

        conf = self.preprocessing
        image = (cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY) if conf["grayscale"] else rgb).astype(np.float32)
        longest = max(image.shape[:2])
        if conf["resize_max"] and (conf["resize_force"] or longest > conf["resize_max"]):
            scale = conf["resize_max"] / longest
            width, height = (round(side * scale) for side in image.shape[1::-1])
            image = self.resize_image(image, (width, height), conf["interpolation"])
        scaled = image.shape[1], image.shape[0]
        image = image[None] if conf["grayscale"] else image.transpose(2, 0, 1)
        with torch.inference_mode():
            found = self.net({"image": torch.from_numpy(image[None] / 255).to(self.device)})
        return {name: values[0].cpu().numpy() for name, values in found.items()}, scaled


class HlocMatcher(Matcher):
    """One of `hloc.matchers`, pair by pair, on keypoints in pixels of the original images as hloc's files hold them."""

    def __init__(self, config: MatchingConfig, device: str):
        import torch

        self.device = torch.device(device)
        self.net = _models(config)[1](_configurations(config)[1]["model"]).eval().to(self.device)

    def __call__(self, pairs: Sequence[tuple[LocalFeatures, LocalFeatures]]) -> list[Matches]:
        """Matches of each pair; see `Matcher`. A pair with an image without keypoints has none."""
        return [self._match(*pair) if min(map(len, pair)) else NO_MATCHES for pair in pairs]

    def _match(self, features0: LocalFeatures, features1: LocalFeatures) -> Matches:
        import torch

        with torch.inference_mode():
            found = self.net(self._inputs(features0, "0") | self._inputs(features1, "1"))
        nearest, scores = (found[name][0].cpu().numpy() for name in ("matches0", "matching_scores0"))
        rows = np.flatnonzero(nearest >= 0)
        return Matches(np.stack([rows, nearest[rows]], axis=1).astype(np.int32), scores[rows].astype(np.float32))

    def _inputs(self, features: LocalFeatures, side: str) -> dict:
        import torch

        arrays = {
            "keypoints": features.keypoints - np.float32(0.5),
            "scores": features.scores,
            "keypoint_scores": features.scores,
            "descriptors": features.descriptors.astype(np.float32).T,
            "image_size": np.array(features.size, np.float32),
        }
        inputs = {name + side: torch.tensor(values, device=self.device)[None] for name, values in arrays.items()}
        width, height = features.size
        inputs["image" + side] = torch.empty(1).expand(1, 1, height, width)  # asked only for its size
        return inputs


def open_extractor(config: MatchingConfig, device: str | None) -> HlocExtractor:
    """hloc's extractor with its weights, which hloc may download."""
    return HlocExtractor(config, torch_device(device))


def open_matcher(config: MatchingConfig, device: str | None) -> HlocMatcher:
    """hloc's matcher with its weights, which hloc may download."""
    return HlocMatcher(config, torch_device(device))
