"""`imported`: features and matches that another program computed, read into stores by `vop import-hloc`."""

from vop.matching.interface import Extractor, Matcher
from vop.schema import ConfigError, MatchingConfig
from vop.schema.poses import IMPORTED


def check(config: MatchingConfig) -> None:
    """Nothing is needed: whether the stores are there is seen when they are opened."""


def identity(config: MatchingConfig) -> dict:
    """What is known without the stores, whose manifests name the files."""
    return {"features": {"method": IMPORTED}, "matches": {"method": IMPORTED}}


def open_extractor(config: MatchingConfig, device: str | None = None) -> Extractor:
    """Raises `ConfigError`: there is none."""
    raise ConfigError("matching.method=imported finds no features in images: run `vop import-hloc` first")


def open_matcher(config: MatchingConfig, device: str | None = None) -> Matcher:
    """Raises `ConfigError`: there is none."""
    raise ConfigError("matching.method=imported matches no pairs: run `vop import-hloc` first")
