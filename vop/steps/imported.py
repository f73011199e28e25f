"""Features and matches of hloc's files become stores; and such stores in the place of matching."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import catalog, features, files
from vop.config import Config, ConfigError
from vop.datasets.image_sets import ImageSets
from vop.features import FeatureStore, LocalFeatures
from vop.foreign_hdf5 import ForeignLinkError
from vop.foreign_hloc import (
    KEYPOINTS,
    HlocError,
    HlocFiles,
    PairNames,
    descriptor_width,
    group_of,
    local_features,
    pair_group,
    pair_matches,
)
from vop.image import ImageError, read_header
from vop.matches import NO_MATCHES, MatchStore, fine, located
from vop.pose_estimation import QUARANTINED
from vop.run import Run
from vop.shards import StoreError

NO_FEATURES, NO_PAIR = "image not in the imported features", "pair not in the imported matches"
REFUSED = (HlocError, ForeignLinkError, ImageError, OSError)  # what one image or pair of a file can have


def check(config: Config) -> None:
    """Raise `ConfigError` unless it is told what to import."""
    if config.hloc.features is None or config.hloc.matches is None:
        raise ConfigError("import-hloc needs hloc.features=FILE and hloc.matches=FILE, hloc's files in HDF5")


def import_features(config: Config, job: Run, sets: ImageSets, source: HlocFiles) -> FeatureStore:
    """The store with the features of those images of the collection that the files have, or why one has none."""
    there = source.images(KEYPOINTS)
    listing = sets.listing()
    listing = listing.filter(pc.is_in(listing["name"], pa.array(there, pa.string())))
    if not listing.num_rows:
        known = f", such as {there[0]!r}" if there else ""
        raise HlocError(
            f"{source.key} has features of {len(there)} images{known}, but of none of the {len(sets.names)} here, such "
            f"as {sets.names[0]!r}: names count from the root of the images, {sets.root} (root=... gives another)"
        )
    with job.step("hash files"):
        identity = source.identity
    if FeatureStore.exists(config.features_path):
        store = FeatureStore.open(config.features_path)
        store.check_features(identity)
    else:
        with source.opened() as opened:
            width = descriptor_width(opened, listing["name"].to_pylist())
        store = FeatureStore.create(config.features_path, identity, width)
    size = fine(listing.num_rows, config.matching.shard_size, least=4)
    planned, pending = store.plan(listing, size, False, lambda name: None)
    guard = catalog.BadImages(planned.images, store.receipts(), config.embedding.max_bad_fraction)
    paths = dict(zip(listing["name"].to_pylist(), listing["path"].to_pylist(), strict=True))
    total, waiting = listing.num_rows, sum(shard.num_rows for shard in pending.values())
    with job.progress("features", max(total, waiting), max(0, total - waiting), "images") as bar, source.opened() as h5:
        guard.add(0)
        for number, shard in pending.items():
            located_there = catalog.located(shard, paths, sets.root)
            receipt = store.write_shard(number, *_shard(h5, located_there, store.manifest["width"]))
            bar.update(receipt["rows"], bad=len(receipt["quarantined"]))
            guard.add(len(receipt["quarantined"]))
    job.quarantined = [*catalog.quarantined(store.finish())]
    counts = {"features": store.path, "images_with_features": total, "imported_now": waiting}
    counts |= {"images_not_in_files": len(sets.names) - total, "not_in_collection": len(there) - total}
    job.counts |= counts | {"root": sets.root}
    return store


def _shard(opened: list, planned: pa.Table, width: int) -> tuple[pa.Table, list[dict]]:
    """A planned shard (image_id, name, path) as `FeatureStore.write_shard` takes it."""
    whole, found, bad = [], [], []
    for line in planned.select(["image_id", "name", "path"]).to_pylist():
        try:
            with files.opened(line["path"], whole=True) as photograph:  # of a local file only the head is read
                header = read_header(photograph)
            found.append(local_features(group_of(opened, line["name"]), header, width))
        except REFUSED as error:
            bad.append({key: line[key] for key in ("image_id", "name")} | {"reason": str(error), "content": None})
        else:
            whole.append(line)
    return pa.table(_facts(whole, found) | features.columns(found)), bad


def _facts(lines: list[dict], found: list[LocalFeatures]) -> dict[str, pa.Array]:
    sizes = np.array([(*each.size, *each.scaled) for each in found], np.int64).reshape(-1, 4)
    columns = {"image_id": pa.array([line["image_id"] for line in lines], pa.int64())}
    columns |= {"name": pa.array([line["name"] for line in lines], pa.string())}
    for i, name in enumerate(("width", "height", "scaled_width", "scaled_height")):
        columns[name] = pa.array(sizes[:, i])
    return columns | {"content": pa.nulls(len(lines), pa.string())}


def import_matches(config: Config, job: Run, store: FeatureStore, source: HlocFiles) -> MatchStore:
    """The store with the matches of all pairs of the files between images that have features."""
    live = store.live()
    names = PairNames(live["name"].to_pylist())
    with job.step("list pairs"):
        pairs = names.listed(source)
    if not pairs:
        reasons = ", ".join(f"{number} {reason}" for reason, number in names.left_out.items()) or "no pairs at all"
        raise HlocError(f"{source.key} has no matches of the images with features here; it has {reasons}")
    identity = {"features": store.manifest["features"], "matches": source.identity}
    identity["first_shard_of_features"] = store.receipts()[0]["sha256"]
    if MatchStore.exists(config.matches_path):
        matches = MatchStore.open(config.matches_path)
        matches.check_features(identity)
    else:
        matches = MatchStore.create(config.matches_path, identity)
    wanted = located(live, *(pa.array(side, pa.string()) for side in zip(*pairs, strict=True)))
    pending = matches.plan(wanted, config.matching.pair_shard_size)
    waiting, failed = sum(matches.planned(number).num_rows for number in pending), 0
    counts = _keypoints(store, live)
    total = max(wanted.num_rows, waiting)
    with job.progress("matches", total, total - waiting, "pairs") as bar, source.opened() as opened:
        for number in pending:
            planned = matches.planned(number)
            receipt = matches.write_shard(number, planned, *_matches(opened, planned, counts))
            bar.update(receipt["rows"], bad=len(receipt["quarantined"]))
            failed += len(receipt["quarantined"])
    job.counts |= {"matches": matches.path, "pairs_imported": wanted.num_rows, "pairs_imported_now": waiting}
    job.counts |= {"pairs_failed": failed, "pairs_not_imported": dict(sorted(names.left_out.items()))}
    return matches


def _keypoints(store: FeatureStore, live: pa.Table) -> dict[str, int]:
    """How many keypoints each image has."""
    shards, rows, found = live["shard"].to_numpy(), live["row"].to_numpy(), np.zeros(live.num_rows, np.int64)
    for number in np.unique(shards):
        found[shards == number] = store.counts(int(number), rows[shards == number])
    return dict(zip(live["name"].to_pylist(), found.tolist(), strict=True))


def _matches(opened: list, planned: pa.Table, counts: dict[str, int]) -> tuple[list, list[str | None]]:
    """Matches and errors of a planned shard, as `MatchStore.write_shard` takes them."""
    found, errors = [], []
    for image0, image1 in zip(*(planned[side].to_pylist() for side in ("image0", "image1")), strict=True):
        try:
            found.append(pair_matches(*pair_group(opened, image0, image1), (counts[image0], counts[image1])))
            errors.append(None)
        except (HlocError, ForeignLinkError, OSError) as error:
            found.append(NO_MATCHES)
            errors.append(str(error))
    return found, errors


@dataclass(frozen=True)
class Imported:
    """Stores that were imported, and what a pair list finds there: `pairs` (`vop.matches.CATALOG`); of the others
    image0, image1 and the reason.
    """

    features: FeatureStore
    matches: MatchStore
    pairs: pa.Table
    unmatched: pa.Table


def check_computed(config: Config, store: FeatureStore | MatchStore) -> None:
    """Raise `StoreError` for a store that was imported, where features or matches are to be computed."""
    if store.is_imported:
        raise StoreError(
            f"the store at {store.path} was imported (vop import-hloc), but matching.method is "
            f"{config.matching.method}: give matching.method=imported to use it as it is, or another {store.KEY}=..."
        )


def opened(config: Config, job: Run, usable: pa.Table) -> Imported:
    """The pairs (image0, image1, reason) of a list, taken from imported stores, which stay as they are.

    Raises `StoreError` where a store is not imported, or the matches are of other features; `ConfigError` if none of
    the pairs is there.
    """
    store, matches = FeatureStore.open(config.features_path), MatchStore.open(config.matches_path)
    for each in (store, matches):
        if not each.is_imported:
            raise StoreError(
                f"the store at {each.path} was computed, not imported, but matching.method is imported: give the "
                f"{each.KEY}=... that `vop import-hloc` wrote, or the method that made this one"
            )
    matches.check_made_of(store)
    live, images = store.live(), store.images()
    bad = images.filter(pc.equal(images["status"], catalog.QUARANTINED))["name"].combine_chunks()
    reasons = pa.scalar(None, pa.string())
    for name in ("image0", "image1"):
        reason = pc.if_else(pc.is_in(usable[name], bad), QUARANTINED, NO_FEATURES)
        reasons = pc.if_else(pc.is_in(usable[name], live["name"].combine_chunks()), reasons, reason)
    whole = usable.filter(pc.is_null(reasons))
    wanted = located(live, whole["image0"].combine_chunks(), whole["image1"].combine_chunks())
    there = pa.array(matches.holds(wanted))
    absent = whole.filter(pc.invert(there)).drop_columns(["reason"])
    lacking = usable.set_column(2, "reason", reasons).filter(pc.is_valid(reasons))
    unmatched = pa.concat_tables(
        [lacking, absent.append_column("reason", pa.array([NO_PAIR] * absent.num_rows, pa.string()))]
    )
    wanted = wanted.filter(there)
    if not wanted.num_rows:
        first = unmatched.slice(0, 1).to_pylist()[0]
        raise ConfigError(
            f"none of {usable.num_rows} pairs is in the imported stores, the first {first['image0']!r} with "
            f"{first['image1']!r}: {first['reason']}. Give pair_list=FILE with the pairs that hloc matched, or import "
            "the matches of these pairs"
        )
    job.quarantined += [each for each in catalog.quarantined(images) if each not in job.quarantined]
    job.counts |= {"features": store.path, "images_with_features": live.num_rows, "extracted_now": 0}
    job.counts |= {"matches": matches.path, "pairs_matched": wanted.num_rows, "matched_now": 0}
    shards, rows = matches.locate(wanted)
    failed = {(number, line["row"]) for number, each in matches.receipts().items() for line in each["quarantined"]}
    job.counts["pairs_failed"] = len(failed & set(zip(shards.tolist(), rows.tolist(), strict=True)))
    return Imported(store, matches, wanted, unmatched)
