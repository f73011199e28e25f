"""Local features and matchers behind one type: `check`, `identity`, `open_extractor`, `open_matcher`."""

from vop.matching.interface import Extractor, Matcher
from vop.matching.methods import METHODS, check, identity, open_extractor, open_matcher

__all__ = ["METHODS", "Extractor", "Matcher", "check", "identity", "open_extractor", "open_matcher"]
