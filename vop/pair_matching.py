"""From planned pairs to matches: what the matching stage does, as a plain callable.

A worker reads the features of its pairs itself, each image once while its memory of them lasts: neither features nor
matches pass through the driver.
"""

from collections import OrderedDict

import numpy as np
import pyarrow as pa

from vop import matching
from vop.features import FeatureStore, LocalFeatures
from vop.matches import NO_MATCHES, MatchStore
from vop.schema import MatchingConfig
from vop.shards import StoreError

Place = tuple[int, int]  # shard and row in the store of features


class FeatureReader:
    """Features of images, the latest used of them kept in memory up to a number of bytes."""

    def __init__(self, store: FeatureStore, memory: float):
        self.store, self.memory = store, memory
        self.kept: OrderedDict[Place, LocalFeatures] = OrderedDict()
        self.bytes = 0

    def read(self, places: set[Place]) -> tuple[dict[Place, LocalFeatures], dict[Place, str]]:
        """The features at these places, and the reasons why some cannot be read."""
        found = {place: self.kept[place] for place in places & self.kept.keys()}
        failed = {}
        for number in sorted({shard for shard, _ in places - found.keys()}):
            missing = sorted(place for place in places - found.keys() if place[0] == number)
            try:
                read = self.store.read(number, np.array([row for _, row in missing]))
            except StoreError as error:
                failed |= dict.fromkeys(missing, f"features unreadable: {error}")
                continue
            found |= dict(zip(missing, read, strict=True))
        self._keep(found)
        return found, failed

    def _keep(self, found: dict[Place, LocalFeatures]) -> None:
        for place, features in found.items():
            if place not in self.kept:
                self.kept[place] = features
                self.bytes += features.nbytes
            self.kept.move_to_end(place)
        while self.bytes > self.memory:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes


class ShardMatcher:
    """Matches planned shards of pairs and writes them; the matcher is built once, where this lives."""

    def __init__(self, config: MatchingConfig, features: FeatureStore, matches: MatchStore):
        self.match = matching.open_matcher(config)
        self.matches, self.reader = matches, FeatureReader(features, config.cache_gb * 1e9)

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """Match the one shard that the column `shard` names; returns shard, rows and failed of its receipt."""
        number = numbers["shard"][0].as_py()
        pairs = self.matches.planned(number)
        places = [
            list(zip(*(pairs[f"{name}{side}"].to_pylist() for name in ("shard", "row")), strict=True))
            for side in (0, 1)
        ]
        features, failed = self.reader.read({*places[0], *places[1]})
        errors = [failed.get(place0) or failed.get(place1) for place0, place1 in zip(*places, strict=True)]
        whole = [i for i, error in enumerate(errors) if error is None]
        found = self.match([(features[places[0][i]], features[places[1][i]]) for i in whole])
        matches = [NO_MATCHES] * pairs.num_rows
        for i, each in zip(whole, found, strict=True):
            matches[i] = each
        receipt = self.matches.write_shard(number, pairs, matches, errors)
        return pa.table({"shard": [number], "rows": [receipt["rows"]], "failed": [len(receipt["quarantined"])]})
