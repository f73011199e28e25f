"""The catalog of a store: which image lies in which shard and row, and what became of it. Pure functions on tables.

An image is planned once, into a new shard; a changed file is planned again and its old row becomes `replaced`; a file
that vanished stays until it is pruned. Nothing here computes or reads a descriptor.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PLANNED, OK, QUARANTINED, REPLACED, REMOVED = "planned", "ok", "quarantined", "replaced", "removed"

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("name", pa.string()),
        ("scene", pa.string()),
        ("size", pa.int64()),  # bytes of the file
        ("modified_ns", pa.int64()),  # its modification time: a hint to look at the content again
        ("content", pa.string()),  # hash of its bytes
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("scaled_width", pa.int64()),
        ("scaled_height", pa.int64()),
        ("shard", pa.int64()),
        ("row", pa.int64()),  # row inside the shard's Parquet; null unless ok
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
LISTED = ("name", "scene", "size", "modified_ns")


@dataclass(frozen=True)
class Plan:
    """The catalog after planning, and what the listing changed."""

    images: pa.Table
    added: int
    changed: int
    vanished: list[str]


def plan(
    images: pa.Table, listed: pa.Table, shard_size: int, prune: bool, content: Callable[[str], str | None]
) -> Plan:
    """Compare the catalog with a listing and plan what is not in the store into new shards.

    `listed` has the columns `LISTED`, names unique. `content(name)` hashes a file, None if it cannot be read: it is
    asked only where the modification time alone differs, and for files that could not be read before. Shards are
    numbered after the existing ones and hold at most `shard_size` images, sorted by name. Call `finish` first: an
    image still planned counts as not embedded, and takes the size and time it is listed with now.
    """
    current = images.filter(pc.is_in(images["status"], pa.array([PLANNED, OK, QUARANTINED])))
    known = {row["name"]: row for row in current.select([*LISTED, "image_id", "content", "status"]).to_pylist()}
    status, size, modified = (images[name].to_pylist() for name in ("status", "size", "modified_ns"))
    position = {image_id: i for i, image_id in enumerate(images["image_id"].to_pylist())}
    new, changed = [], 0
    for row in sorted(listed.select(list(LISTED)).to_pylist(), key=lambda r: r["name"]):
        old = known.pop(row["name"], None)
        if old is None:
            new.append(row)
            continue
        at = position[old["image_id"]]
        if old["status"] == PLANNED:
            size[at], modified[at] = row["size"], row["modified_ns"]
            continue
        never_read = old["status"] == QUARANTINED and old["content"] is None
        same = (old["size"], old["modified_ns"]) == (row["size"], row["modified_ns"])
        if same and not never_read:
            continue
        may_be_equal = never_read or old["size"] == row["size"]
        if may_be_equal and content(row["name"]) == old["content"]:  # touched only, or still unreadable
            modified[at] = row["modified_ns"]
            continue
        status[at] = REPLACED
        new.append(row)
        changed += 1
    vanished = sorted(known)
    if prune:
        for name in vanished:
            status[position[known[name]["image_id"]]] = REMOVED
    columns = {"status": status, "size": size, "modified_ns": modified}
    kept = pa.table({name: columns.get(name, images[name]) for name in SCHEMA.names}, schema=SCHEMA)
    first_id = (pc.max(images["image_id"]).as_py() or 0) + 1 if images.num_rows else 0
    first_shard = pc.max(images["shard"]).as_py() + 1 if images.num_rows else 0
    lines = [
        {**row, "image_id": first_id + i, "shard": first_shard + i // shard_size, "status": PLANNED}
        for i, row in enumerate(new)
    ]
    images = pa.concat_tables([kept, pa.Table.from_pylist(lines, schema=SCHEMA)])
    return Plan(images.combine_chunks(), len(new) - changed, changed, [] if prune else vanished)


def reopened(images: pa.Table, receipts: Mapping[int, dict] | set[int]) -> pa.Table:
    """Plan the live images of a shard again whose receipt is gone: someone deleted it, because the shard is damaged."""
    live = pc.is_in(images["status"], pa.array([OK, QUARANTINED]))
    lost = pc.and_(live, pc.invert(pc.is_in(images["shard"], pa.array([*receipts], pa.int64()))))
    if not pc.any(lost).as_py():
        return images
    cleared = {"status": PLANNED} | dict.fromkeys(("row", "error"))
    for name, value in cleared.items():
        kind = SCHEMA.field(name).type
        column = pc.if_else(lost, pa.scalar(value, kind), images[name])
        images = images.set_column(images.schema.get_field_index(name), name, column)
    return images


def pending(images: pa.Table, receipts: Mapping[int, dict] | set[int]) -> dict[int, pa.Table]:
    """Planned images by shard, for the shards without a receipt."""
    planned = images.filter(pc.equal(images["status"], PLANNED))
    shards = planned["shard"].to_numpy()
    order = np.argsort(shards, kind="stable")
    numbers, starts = np.unique(shards[order], return_index=True)
    rows = zip(numbers.tolist(), np.split(order, starts[1:]), strict=True) if len(order) else ()
    return {number: planned.take(pa.array(where)) for number, where in rows if number not in receipts}


def finish(images: pa.Table, receipts: Mapping[int, dict], embedded: Callable[[int], pa.Table]) -> pa.Table:
    """Fill in what became of the planned images whose shard has a receipt.

    `embedded(shard)` gives image_id, content, width, height, scaled_width, scaled_height of the shard's rows.
    """
    lines = images.to_pylist()
    index = {line["image_id"]: line for line in lines if line["status"] == PLANNED}
    for number in sorted({line["shard"] for line in index.values()} & set(receipts)):
        for row, values in enumerate(embedded(number).to_pylist()):
            if line := index.get(values.pop("image_id")):
                line.update(values, row=row, status=OK)
        for bad in receipts[number]["quarantined"]:
            if line := index.get(bad["image_id"]):
                line.update(status=QUARANTINED, error=bad["reason"], content=bad["content"])
    return pa.Table.from_pylist(lines, schema=SCHEMA)


def evenly_spread(total: int, count: int) -> np.ndarray:
    """Up to `count` of the positions 0 .. total - 1, from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))


def sample(listed: pa.Table, count: int) -> pa.Table:
    """Up to `count` lines of a listing, evenly spread over its names, as a shard of no number."""
    return listed.sort_by("name").take(pa.array(evenly_spread(listed.num_rows, count)))


def located(shard: pa.Table, paths: Mapping[str, str], root: str) -> pa.Table:
    """image_id, name, path, shard, shard_rows of a planned shard, as workers need it.

    An image that is gone keeps the path where it was looked for. `shard_rows` lets the writer see that it has them all.
    """
    where = pa.array([paths.get(name, f"{root}/{name}") for name in shard["name"].to_pylist()], pa.string())
    located = shard.select(["image_id", "name", "shard"]).append_column("path", where)
    return located.append_column("shard_rows", pa.array(np.full(shard.num_rows, shard.num_rows)))


class TooManyBadImagesError(RuntimeError):
    """More images are in quarantine than a job tolerates."""


class BadImages:
    """Counts the images in quarantine as shards finish, against the share that is tolerated."""

    def __init__(self, images: pa.Table, receipts: Mapping[int, dict], max_fraction: float):
        current = images.filter(pc.is_in(images["status"], pa.array([PLANNED, OK, QUARANTINED])))
        planned = set(current.filter(pc.equal(current["status"], PLANNED))["shard"].to_pylist())
        self.total, self.max_fraction = current.num_rows, max_fraction
        self.count = pc.sum(pc.equal(current["status"], QUARANTINED)).as_py() or 0
        self.count += sum(len(receipts[number]["quarantined"]) for number in planned & set(receipts))

    def add(self, count: int) -> None:
        """Count more bad images. Raises `TooManyBadImagesError` as soon as they are too many."""
        self.count += count
        if self.count > self.max_fraction * self.total:
            raise TooManyBadImagesError(
                f"{self.count} of {self.total} images cannot be used, more than embedding.max_bad_fraction="
                f"{self.max_fraction:g}. The receipts (shard-*.json) of the store name each with its reason. Mend or "
                "remove the files and run again (changed files are embedded anew), or allow a larger fraction"
            )


def summary(images: pa.Table, planned: Plan) -> dict[str, object]:
    """Counts for people: images usable and in quarantine, and what the listing changed."""
    status = images["status"].to_pylist()
    return {
        "images": status.count(OK),
        "quarantined": status.count(QUARANTINED),
        "added": planned.added,
        "changed": planned.changed,
        "vanished": len(planned.vanished),
    }


def quarantined(images: pa.Table) -> Iterable[tuple[str, str]]:
    """(name, reason) of every image in quarantine, in catalog order."""
    bad = images.filter(pc.equal(images["status"], QUARANTINED))
    return zip(bad["name"].to_pylist(), bad["error"].to_pylist(), strict=True)
