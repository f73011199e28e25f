"""Local features of the images of a pair list, and the matches of its pairs."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import catalog, matching, pairs
from vop.config import Config, ConfigError
from vop.datasets.image_sets import ImageSets
from vop.embedding import hash_file
from vop.features import FeatureStore
from vop.matches import MatchStore, fine, located
from vop.pose_estimation import ITSELF, QUARANTINED, UNKNOWN
from vop.run import Run
from vop.schema.poses import IMPORTED
from vop.stages.match import extract_shards, match_shards, width
from vop.steps import imported


@dataclass(frozen=True)
class Matched:
    """The pairs of a list: `pairs` are in the store of matches (rows of its catalog), `unmatched` are not.

    unmatched: image0, image1, reason.
    """

    features: FeatureStore
    matches: MatchStore
    pairs: pa.Table
    unmatched: pa.Table


def matched(config: Config, job: Run, sets: ImageSets, listed: pa.Table) -> Matched:
    """Match the pairs of a list (query, database), each once whichever image asks for the other.

    A pair that cannot be matched is counted by its reason; raises `ConfigError` if that leaves none.
    """
    asked = pairs.unordered(listed)
    asked = asked.append_column("reason", _reasons(asked, sets.names))
    usable = asked.filter(asked["reason"].is_null())
    if not usable.num_rows:
        example = asked.slice(0, 1).to_pylist()[0]
        raise ConfigError(
            f"none of {asked.num_rows} pairs can be matched, the first {example['image0']!r} with "
            f"{example['image1']!r}: {example['reason']}. Names count from the root of the images, {sets.root}, which "
            f"holds for instance {sets.names[0]!r}"
        )
    if config.matching.method == IMPORTED:
        found = imported.opened(config, job, usable)
        unmatched = pa.concat_tables([asked.filter(asked["reason"].is_valid()), found.unmatched])
        job.counts |= {"root": sets.root, "pairs_unmatched": dict(sorted(_counted(unmatched["reason"]).items()))}
        return Matched(found.features, found.matches, found.pairs, unmatched)
    with job.writing(config.features_path):
        features = _extracted(config, job, sets, {*usable["image0"].to_pylist(), *usable["image1"].to_pylist()})
    images = features.live()
    known = images["name"].combine_chunks()
    whole = pc.and_(*(pc.is_in(usable[side], known) for side in ("image0", "image1")))
    bad = usable.filter(pc.invert(whole))
    bad = bad.set_column(2, "reason", pa.array([QUARANTINED] * bad.num_rows, pa.string()))
    unmatched = pa.concat_tables([asked.filter(asked["reason"].is_valid()), bad])
    usable = usable.filter(whole)
    wanted = located(images, usable["image0"].combine_chunks(), usable["image1"].combine_chunks())
    with job.writing(config.matches_path):
        store = _matches(config, job, features, wanted)
    job.counts["pairs_unmatched"] = dict(sorted(_counted(unmatched["reason"]).items()))
    return Matched(features, store, wanted, unmatched)


def _reasons(asked: pa.Table, names: Collection[str]) -> pa.Array:
    """Why pairs cannot be matched, before any image is read; null: they can."""
    known = pa.array(names, pa.string())
    unknown = pc.invert(pc.and_(*(pc.is_in(asked[side], known) for side in ("image0", "image1"))))
    same = pc.equal(asked["image0"], asked["image1"])
    return pc.if_else(unknown, UNKNOWN, pc.if_else(same, ITSELF, pa.scalar(None, pa.string()))).combine_chunks()


def _counted(reasons: pa.ChunkedArray) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in pc.value_counts(reasons).to_pylist()}


def _extracted(config: Config, job: Run, sets: ImageSets, names: Collection[str]) -> FeatureStore:
    """The store with the local features of the named images, or the reason why an image has none."""
    listing = sets.listing()
    listing = listing.filter(pc.is_in(listing["name"], pa.array([*names], pa.string())))
    identity = matching.identity(config.matching)["features"]
    with job.step("load matcher"):
        if FeatureStore.exists(config.features_path):
            store = FeatureStore.open(config.features_path)
            imported.check_computed(config, store)
            store.check_features(identity)
        else:
            store = FeatureStore.create(config.features_path, identity, width(config))
    with job.step("plan"):
        paths = dict(zip(listing["name"].to_pylist(), listing["path"].to_pylist(), strict=True))
        size = fine(listing.num_rows, config.matching.shard_size, least=4)
        planned, pending = store.plan(listing, size, False, lambda name: hash_file(paths[name]))
        guard = catalog.BadImages(planned.images, store.receipts(), config.embedding.max_bad_fraction)
    total, waiting = listing.num_rows, sum(shard.num_rows for shard in pending.values())
    with job.progress("features", max(total, waiting), max(0, total - waiting), "images") as bar:
        guard.add(0)
        shards = {number: catalog.located(shard, paths, sets.root) for number, shard in pending.items()}
        for written in extract_shards(config, store, shards):
            bar.update(written["ok"] + written["quarantined"], bad=written["quarantined"])
            guard.add(written["quarantined"])
    images = store.finish()
    job.counts |= {"root": sets.root, "features": store.path, "images_with_features": total, "extracted_now": waiting}
    job.quarantined += [each for each in catalog.quarantined(images) if each not in job.quarantined]
    return store


def _matches(config: Config, job: Run, features: FeatureStore, wanted: pa.Table) -> MatchStore:
    """The store with the matches of these pairs (`vop.matches.CATALOG`)."""
    identity = matching.identity(config.matching)
    # Matches are rows of keypoints: they mean nothing once the features are computed anew, in another order.
    identity["first_shard_of_features"] = features.receipts()[0]["sha256"]
    if MatchStore.exists(config.matches_path):
        store = MatchStore.open(config.matches_path)
        imported.check_computed(config, store)
        store.check_features(identity)
    else:
        store = MatchStore.create(config.matches_path, identity)
    with job.step("plan"):
        pending = store.plan(wanted, config.matching.pair_shard_size)
        waiting = sum(store.planned(number).num_rows for number in pending)
    total, failed = max(wanted.num_rows, waiting), 0
    with job.progress("matching", total, total - waiting, "pairs") as bar:
        for written in match_shards(config, features, store, pending):
            bar.update(written["rows"], bad=written["failed"])
            failed += written["failed"]
    job.counts |= {"matches": store.path, "pairs_matched": wanted.num_rows, "matched_now": waiting}
    job.counts["pairs_failed"] = failed
    return store


def places(matched: Matched) -> list[tuple[int, np.ndarray]]:
    """Where the matches of the pairs lie: shards, ascending, each with its rows, ascending."""
    shards, rows = matched.matches.locate(matched.pairs)
    return [(int(number), np.sort(rows[shards == number])) for number in np.unique(shards)]
