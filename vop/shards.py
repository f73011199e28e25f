"""Stores in shards, whatever they hold: Parquet files with receipts.

    manifest.json           what made the content
    images.parquet          where the rows are images: every image, its shard and row, its status (see `vop.catalog`)
    shard-00007.parquet     the content of one shard; plain Arrow types, readable without `vop`
    shard-00007.json        the receipt, written after the shard: a shard with a receipt is never computed again

Every file is written under a temporary name and renamed, and every name and content follows from the inputs and the
order of runs, so that a killed and repeated run leaves the same bytes as an undisturbed one.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import catalog, files
from vop.names import SUSPECT, checked

RECEIPT = re.compile(r"shard-\d+\.json")
Result = TypeVar("Result")


class StoreError(ValueError):
    """A store that cannot be used as asked; the message names what was found, what was expected and the remedy."""


def shard_name(number: int) -> str:
    """File name of a shard without its suffix."""
    return f"shard-{number:05d}"


@dataclass(frozen=True)
class ShardStore:
    """A store on disk or in a bucket; cheap to construct and to send to workers."""

    path: str
    manifest: dict

    FORMAT: ClassVar[str]  # in the manifest: what the shards hold
    MADE_BY: ClassVar[str]  # the command that errors advise to run
    KEY: ClassVar[str]  # the setting that names its place

    @classmethod
    def open(cls, path: str) -> "ShardStore":
        """Open a store. Raises `StoreError` if there is none or it is of another kind or format."""
        try:
            manifest = files.read_json(files.join(path, "manifest.json"))
        except FileNotFoundError as error:
            raise StoreError(f"no store at {path} (it has no manifest.json): run {cls.MADE_BY} first") from error
        except json.JSONDecodeError as error:
            raise StoreError(f"{path}/manifest.json is not JSON ({error}): restore it, or make a new store") from error
        if manifest.get("format") != cls.FORMAT:
            found = manifest.get("format")
            raise StoreError(f"{path} has store format {found!r}; expected {cls.FORMAT}, which {cls.MADE_BY} writes")
        return cls(path, manifest)

    @staticmethod
    def exists(path: str) -> bool:
        """Whether a store was started at this path."""
        return files.exists(files.join(path, "manifest.json"))

    def check_features(self, features: dict) -> None:
        """Refuse to mix what was made in different ways: raise `StoreError` naming both sides of every difference."""
        found, asked = _flat(self.manifest["features"]), _flat(features)
        differing = [key for key in sorted(found | asked) if found.get(key) != asked.get(key)]
        if differing:
            lines = [f"  {key}: the store has {found.get(key)!r}, this run {asked.get(key)!r}" for key in differing]
            raise StoreError(
                f"the store at {self.path} was made with other features:\n" + "\n".join(lines) + "\n"
                f"Give another {self.KEY}=..., or the settings that made this one"
            )

    def receipts(self) -> dict[int, dict]:
        """Receipts by shard number. A receipt that is not whole JSON counts as missing."""
        names = [name for name in files.listing(self.path) if RECEIPT.fullmatch(name)]
        found = files.concurrently(_receipt, [files.join(self.path, name) for name in names])
        return {int(name[6:-5]): receipt for name, receipt in zip(names, found, strict=True) if receipt is not None}

    def write_receipt(self, number: int, ok: int, quarantined: list[dict], sha256: str) -> dict:
        """Vouch for a shard whose Parquet, with this hash, is written; returns the receipt.

        `quarantined`: image_id, name, reason.
        """
        receipt = {
            "shard": number,
            "rows": ok + len(quarantined),
            "ok": ok,
            "quarantined": quarantined,
            "sha256": sha256,
        }
        files.write_json(files.join(self.path, f"{shard_name(number)}.json"), receipt)
        return receipt

    def read_shard(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Columns of a shard. Raises `StoreError` if the file is missing or is not whole Parquet."""
        return self._read(number, lambda file: file.read(columns))

    def read_around(self, number: int, rows: np.ndarray, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
        """Columns of those row groups of a shard that hold these rows (n,), and where in them the rows are, (n,).

        Raises `StoreError` as `read_shard` does.
        """

        def read(file: pq.ParquetFile) -> tuple[pa.Table, np.ndarray]:
            sizes = np.array([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            ends = np.cumsum(sizes)
            groups, group = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
            skipped = (ends - sizes)[groups] - (np.cumsum(sizes[groups]) - sizes[groups])
            return file.read_row_groups(groups.tolist(), columns), rows - skipped[group]

        return self._read(number, read)

    def _read(self, number: int, read: Callable[[pq.ParquetFile], Result]) -> Result:
        """What `read` takes from a shard."""
        path = files.join(self.path, f"{shard_name(number)}.parquet")
        try:
            with files.opened(path) as source:
                return files.again(
                    lambda: read(pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True))
                )
        except PermissionError:
            raise
        except (OSError, pa.ArrowInvalid) as error:  # a missing file, a cut one, a page of another checksum
            receipt = f"{shard_name(number)}.json"
            reason = str(error).strip()
            raise StoreError(f"cannot read {path}: {reason}. Delete {receipt} and run {self.MADE_BY} again") from error

    def verify(self) -> Iterator[str]:
        """Yield what is wrong with the files: shards whose content is not what their receipt says."""
        for number, receipt in sorted(self.receipts().items()):
            path = files.join(self.path, f"{shard_name(number)}.parquet")
            if not files.exists(path):
                yield f"{path} is missing"
            elif files.sha256(path) != receipt["sha256"]:
                yield f"{path} is not the file that its receipt names"


@dataclass(frozen=True)
class ImageStore(ShardStore):
    """A store whose rows are images: a catalog says where each lies (`vop.catalog`)."""

    def images(self) -> pa.Table:
        """The catalog (`vop.catalog.SCHEMA`); empty before the first plan.

        Raises `vop.names.UnsafeNameError` for a name that leads out of the folder of the images.
        """
        try:
            with files.opened(files.join(self.path, "images.parquet")) as file:
                images = pq.read_table(file)
        except FileNotFoundError:
            return catalog.SCHEMA.empty_table()
        suspect = images["name"].filter(pc.match_substring_regex(images["name"], SUSPECT))
        checked(suspect.to_pylist(), f"{self.path}/images.parquet")  # a store may come from anywhere
        return images

    def write_images(self, images: pa.Table) -> None:
        """Replace the catalog and the row counts of the manifest."""
        with files.atomic(files.join(self.path, "images.parquet")) as (filesystem, inner):
            pq.write_table(images, inner, filesystem=filesystem, compression="zstd")
        self.manifest["rows"] = dict(sorted(Counter(images["status"].to_pylist()).items()))
        files.write_json(files.join(self.path, "manifest.json"), self.manifest)

    def plan(
        self, listed: pa.Table, shard_size: int, prune: bool, content: Callable[[str], str | None]
    ) -> tuple[catalog.Plan, dict[int, pa.Table]]:
        """Plan a listing into the catalog and write it; returns the plan and the images of every shard to be written.

        Arguments as of `catalog.plan`. What a killed run left is taken up first: finished shards are noted, their
        images compared with the listing, half-written files deleted, and shards without their receipt planned again.
        """
        receipts = self.receipts()
        known = catalog.finish(catalog.reopened(self.images(), receipts), receipts, self.shard_facts)
        planned = catalog.plan(known, listed, shard_size, prune, content)
        self.write_images(planned.images)
        pending = catalog.pending(planned.images, receipts)
        if pending:
            for name in files.listing(self.path):
                if name.startswith(".") and name.endswith(".tmp"):
                    files.remove(files.join(self.path, name))
        return planned, pending

    def finish(self) -> pa.Table:
        """Note in the catalog what became of the planned images; returns it."""
        images = catalog.finish(self.images(), self.receipts(), self.shard_facts)
        self.write_images(images)
        return images

    def shard_facts(self, number: int) -> pa.Table:
        """What the catalog takes from a shard: image_id, content and sizes of its rows."""
        return self.read_shard(number, ["image_id", "content", "width", "height", "scaled_width", "scaled_height"])

    def live(self, names: Sequence[str] | None = None) -> pa.Table:
        """Catalog rows of the usable images, all or those named, sorted by name.

        Raises `StoreError` if the store is unfinished or lacks a named image that is not quarantined.
        """
        images = self.images()
        unfinished = pc.sum(pc.equal(images["status"], catalog.PLANNED)).as_py() or 0
        if unfinished or not images.num_rows:
            lacking = unfinished or "all"
            raise StoreError(f"the store at {self.path} lacks {lacking} images: run {self.MADE_BY} again")
        live = images.filter(pc.equal(images["status"], catalog.OK)).sort_by("name")
        if names is None:
            return live
        current = images.filter(pc.is_in(images["status"], pa.array([catalog.OK, catalog.QUARANTINED])))
        wanted = pa.array(names, pa.string())
        absent = pc.filter(wanted, pc.invert(pc.is_in(wanted, current["name"].combine_chunks())))
        if len(absent):
            raise StoreError(
                f"{len(absent)} images are not in the store at {self.path}, the first {absent[0].as_py()!r}: "
                f"run {self.MADE_BY} on the collection that holds them"
            )
        return live.filter(pc.is_in(live["name"], wanted))


def _receipt(path: str) -> dict | None:
    try:
        return files.read_json(path)
    except ValueError:
        return None


def _flat(value: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
