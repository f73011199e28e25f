"""Which methods of local features there are, and how each is opened.

| method | features | matcher | needs |
| --- | --- | --- | --- |
| `xfeat+lighterglue` | XFeat, D = 64 | LightGlue of 6 small layers | nothing more |
| `sift+nn` | RootSIFT, D = 128 | mutual nearest neighbours, ratio test | nothing more |
| `aliked+lightglue` | ALIKED, D = 128 | LightGlue | extra `lightglue` |
| `disk+lightglue` | DISK, D = 128 | LightGlue | extra `lightglue` |
| `superpoint+lightglue` | SuperPoint, D = 256, non-commercial | LightGlue | the package `lightglue` |
| `hloc:FEATURES+MATCHER` | any of hloc's `extract_features` | any of its `match_features` | hloc |
| `imported` | of a file | of a file | `vop import-hloc`; computes nothing |

A method is one module with four functions: `check`, `identity`, `open_extractor` and `open_matcher`.
"""

import difflib
import importlib
from types import ModuleType

from vop.matching.interface import Extractor, Matcher
from vop.schema import ConfigError, MatchingConfig
from vop.schema.poses import IMPORTED

MODULES = {
    "xfeat+lighterglue": "xfeat",
    "sift+nn": "sift",
    "aliked+lightglue": "pretrained",
    "disk+lightglue": "pretrained",
    "superpoint+lightglue": "pretrained",
    IMPORTED: "imported",
}
METHODS = tuple(MODULES)
"""Names for `matching.method`; besides these, `hloc:FEATURES+MATCHER`."""


def _module(method: str) -> ModuleType:
    name = "hloc" if method.startswith("hloc:") else MODULES.get(method)
    if name is None:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"matching.method is {method!r}, but must be one of {', '.join(METHODS)}, or hloc:FEATURES+MATCHER{hint}"
        )
    return importlib.import_module(f"vop.matching.{name}")


def check(config: MatchingConfig) -> None:
    """Find out before any work whether the method can run here; loads no weights.

    Raises `ConfigError` for a method or a combination that does not exist, `ImportError` naming what to install, and
    warns (`UserWarning`) where a method's weights may not be used commercially.
    """
    _module(config.method).check(config)


def identity(config: MatchingConfig) -> dict:
    """What the features and the matches of this configuration are made of: {"features": {...}, "matches": {...}}.

    Two stores hold the same kind of thing if and only if these are equal; plain values that go into JSON. Settings of
    the matcher alone leave the part of the features as it is. Precision is not part of it: rounding does not make
    another kind.
    """
    made = _module(config.method).identity(config)
    common = {"max_keypoints": config.max_keypoints, "resize": config.resize}
    return {"features": made["features"] | common, "matches": made["matches"]}


def open_extractor(config: MatchingConfig, device: str | None = None) -> Extractor:
    """Build the extractor with its weights; `device` as torch names it, None: a GPU if there is one."""
    return _module(config.method).open_extractor(config, device)


def open_matcher(config: MatchingConfig, device: str | None = None) -> Matcher:
    """Build the matcher with its weights; `device` as torch names it, None: a GPU if there is one."""
    return _module(config.method).open_matcher(config, device)
