"""`MatchStore`: matches of local features per pair of images, in shards (`vop.shards`).

Beside the files of every store it has `pairs.parquet`, the catalog: a row per pair, a row group per shard. A pair is
unordered and stands under its sorted names, image 0 the first. A shard repeats the rows of its row group: image0,
image1, matches (list of two rows of keypoints, of image 0 and of image 1), scores, error (null, or why there are none).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files
from vop.features import FeatureStore
from vop.schema.poses import IMPORTED
from vop.shards import ShardStore, StoreError, shard_name

CATALOG = pa.schema(
    [
        ("image0", pa.string()),
        ("image1", pa.string()),
        ("image_id0", pa.int64()),  # in the store of features: a changed image has a new id, so its pairs are new
        ("image_id1", pa.int64()),
        ("shard0", pa.int32()),  # where the features of image 0 lie
        ("row0", pa.int32()),
        ("shard1", pa.int32()),
        ("row1", pa.int32()),
    ]
)
SHARDS_AT_LEAST = 64


@dataclass(frozen=True, eq=False)
class Matches:
    """What was found between two images.

    indices: (m, 2) int32, rows of the keypoints of image 0 and of image 1, sorted by the first. scores: (m,) float32.
    """

    indices: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


NO_MATCHES = Matches(np.empty((0, 2), np.int32), np.empty(0, np.float32))


def fine(rows: int, shard_size: int, least: int) -> int:
    """The size of shards for so many rows: as asked, but a small job is cut finer, so that its workers end together.

    It follows from the work alone, not from the machine, and so do the shards.
    """
    return min(shard_size, max(least, -(-rows // SHARDS_AT_LEAST)))


def matches_of(table: pa.Table) -> list[np.ndarray]:
    """The indices (m, 2) int32 of every row of a table with the column matches."""
    column = table["matches"].combine_chunks()
    values = column.values.values.to_numpy().reshape(-1, 2)
    ends = column.offsets.to_numpy()
    return [values[start:stop] for start, stop in itertools.pairwise(ends)]


def _keys(pairs: pa.Table) -> np.ndarray:
    """One number for each pair of image ids, (n,) int64."""
    return (pairs["image_id0"].to_numpy() << 32) | pairs["image_id1"].to_numpy()


def _positions(table: pa.Table, wanted: pa.Table) -> np.ndarray:
    """Where pairs last stand in a catalog with features where they lie now, (n,) int64; -1: nowhere."""
    keys, asked = _keys(table), _keys(wanted)
    if not len(keys):
        return np.full(len(asked), -1)
    order = np.argsort(keys, kind="stable")
    at = order[np.maximum(np.searchsorted(keys[order], asked, side="right") - 1, 0)]
    same = [table[name].to_numpy()[at] == wanted[name].to_numpy() for name in CATALOG.names if name[:5] != "image"]
    return np.where((keys[at] == asked) & np.all(same, axis=0), at, -1)


def located(images: pa.Table, image0: pa.Array, image1: pa.Array) -> pa.Table:
    """The pairs as rows of a catalog. `images`: live rows of the store of features, which hold all names (n,)."""
    sides = [images.take(pc.index_in(names, images["name"].combine_chunks())) for names in (image0, image1)]
    values = {f"image{side}": table["name"] for side, table in enumerate(sides)}
    for name in ("image_id", "shard", "row"):
        values |= {f"{name}{side}": table[name] for side, table in enumerate(sides)}
    return pa.table({name: values[name] for name in CATALOG.names}).cast(CATALOG)


@dataclass(frozen=True)
class MatchStore(ShardStore):
    """A store of matches."""

    FORMAT = "vop-matches-1"
    MADE_BY = "`vop match`"
    KEY = "matches"

    @classmethod
    def create(cls, path: str, features: dict) -> "MatchStore":
        """Start an empty store. `features` says what makes the features and the matches."""
        manifest = {"format": cls.FORMAT, "features": features}
        files.write_json(files.join(path, "manifest.json"), manifest)
        return cls(path, manifest)

    @property
    def is_imported(self) -> bool:
        """Whether the matches came from a file (`vop import-hloc`)."""
        return self.manifest["features"].get("matches", {}).get("method") == IMPORTED

    def catalog(self) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        """All planned pairs (`CATALOG`), their shards (n,) and their rows inside the shard (n,)."""
        try:
            with files.opened(files.join(self.path, "pairs.parquet")) as source, pq.ParquetFile(source) as file:
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
                table = file.read()
        except FileNotFoundError:
            sizes, table = [], CATALOG.empty_table()
        shards = np.repeat(np.arange(len(sizes)), sizes)
        return table, shards, np.arange(len(table)) - np.repeat(np.cumsum([0, *sizes])[:-1], sizes)

    def planned(self, number: int) -> pa.Table:
        """The pairs of one shard, as they were planned."""
        with files.opened(files.join(self.path, "pairs.parquet")) as source, pq.ParquetFile(source) as file:
            return file.read_row_group(number)

    def plan(self, wanted: pa.Table, shard_size: int) -> list[int]:
        """Plan pairs (`CATALOG`, each once) into new shards where they are not in the store, and write the catalog.

        A pair that failed is planned again. New shards hold at most `shard_size` pairs, by where their features lie.
        Returns the numbers of the shards that hold a wanted pair and have no receipt.
        """
        receipts = self.receipts()
        table, shards, rows = self.catalog()
        at = _positions(table, wanted)
        failed = np.isin(_places(shards, rows), _failed(receipts))
        new = wanted.filter(pa.array((at < 0) | (failed[at] if len(failed) else False)))
        if new.num_rows:
            new = new.sort_by([(name, "ascending") for name in ("shard0", "row0", "shard1", "row1")])
            self._write_catalog(table, shards, new, fine(new.num_rows, shard_size, least=8))
            table, shards, rows = self.catalog()
        for name in files.listing(self.path):
            if name.startswith(".") and name.endswith(".tmp"):
                files.remove(files.join(self.path, name))
        return [int(number) for number in np.unique(shards[_positions(table, wanted)]) if number not in receipts]

    def _write_catalog(self, known: pa.Table, shards: np.ndarray, new: pa.Table, size: int) -> None:
        path = files.join(self.path, "pairs.parquet")
        with files.atomic(path) as (filesystem, inner), pq.ParquetWriter(inner, CATALOG, filesystem=filesystem) as out:
            for start, stop in zip(*_bounds(shards), strict=True):
                out.write_table(known.slice(start, stop - start), row_group_size=stop - start)
            for start in range(0, new.num_rows, size):
                out.write_table(new.slice(start, size), row_group_size=size)

    def locate(self, wanted: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of pairs (`CATALOG`), (n,) each: where a pair was planned twice, the later one.

        Raises `StoreError` if one was never planned.
        """
        table, shards, rows = self.catalog()
        at = _positions(table, wanted)
        if (at < 0).any():
            first = wanted.slice(int(np.argmax(at < 0)), 1).to_pylist()[0]
            raise StoreError(
                f"{np.count_nonzero(at < 0)} pairs are not in the store at {self.path}, the first {first['image0']!r} "
                f"with {first['image1']!r}: run {self.MADE_BY} again"
            )
        return shards[at], rows[at]

    def holds(self, wanted: pa.Table) -> np.ndarray:
        """Which pairs (`CATALOG`) were planned, (n,) bool."""
        return _positions(self.catalog()[0], wanted) >= 0

    def check_made_of(self, features: FeatureStore) -> None:
        """Raise `StoreError` if the matches are not of these features."""
        receipt = features.receipts().get(0, {})
        if self.manifest["features"].get("first_shard_of_features") != receipt.get("sha256"):
            raise StoreError(
                f"the matches at {self.path} are not of the features at {features.path}, which were computed anew or "
                f"are another run's: run {self.MADE_BY} again with a new matches=..."
            )

    def write_shard(
        self, number: int, pairs: pa.Table, matches: Sequence[Matches], errors: Sequence[str | None]
    ) -> dict:
        """Write the matches (n,) of a planned shard, then its receipt, which is returned. errors: why a pair failed."""
        ends = np.cumsum([0, *map(len, matches)]).astype(np.int32)
        indices = np.concatenate([NO_MATCHES.indices, *(each.indices for each in matches)]).astype(np.int32)
        scores = np.concatenate([NO_MATCHES.scores, *(each.scores for each in matches)]).astype(np.float32)
        couples = pa.FixedSizeListArray.from_arrays(pa.array(indices.ravel()), 2)
        table = pairs.select(["image0", "image1"])
        table = table.append_column("matches", pa.ListArray.from_arrays(pa.array(ends), couples))
        table = table.append_column("scores", pa.ListArray.from_arrays(pa.array(ends), pa.array(scores)))
        table = table.append_column("error", pa.array(errors, pa.string()))
        with files.atomic(files.join(self.path, f"{shard_name(number)}.parquet")) as (filesystem, inner):
            # A row group for each pair, since those of a query, which are read together, lie in many shards.
            pq.write_table(table, inner, filesystem=filesystem, row_group_size=1, compression="zstd",
                           use_dictionary=False, write_statistics=False, write_page_checksum=True)  # fmt: skip
            digest = files.sha256(inner)
        names = zip(*(table[name].to_pylist() for name in ("image0", "image1")), strict=True)
        failed = [
            {"row": row, "name": f"{image0} {image1}", "reason": error}
            for row, ((image0, image1), error) in enumerate(zip(names, errors, strict=True))
            if error is not None
        ]
        return self.write_receipt(number, table.num_rows - len(failed), failed, digest)


def _bounds(shards: np.ndarray) -> tuple[list[int], list[int]]:
    """Where each shard begins and ends in the catalog."""
    edges = np.flatnonzero(np.diff(shards, prepend=-1, append=-1)).tolist() if len(shards) else [0]
    return edges[:-1], edges[1:]


def _places(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return (shards.astype(np.int64) << 32) | rows


def _failed(receipts: dict[int, dict]) -> np.ndarray:
    """Places of the pairs that failed."""
    found = [(number << 32) | bad["row"] for number, receipt in receipts.items() for bad in receipt["quarantined"]]
    return np.array(found, np.int64)
