"""How far a run is, read from what lies on disk: while it runs, and after it died."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

import pyarrow.compute as pc
from tqdm import tqdm

from vop import catalog, config, files, journal, lock
from vop import run as running
from vop.config import Config, ConfigError
from vop.features import FeatureStore
from vop.matches import MatchStore
from vop.shards import ImageStore
from vop.store import EmbeddingStore

REASONS = 3  # shown of a stage
RECENT = 50  # receipts that the present rate is taken from
TOLD = ("map triangulate", "poses", "verify", "map", "labels", "train")  # by the run itself, every half minute
DIED = "died"  # what run.json cannot say of itself


@dataclass(frozen=True)
class Stage:
    """A stage of a run: so many of its images, pairs, queries or steps are done, `bad` of them without a result.

    total and left_s (seconds at the rate of its latest receipts) are None where they cannot be known. reasons: how many
    are bad for which reason.
    """

    name: str
    unit: str
    done: int
    total: int | None
    bad: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    left_s: float | None = None

    def lines(self) -> Iterator[str]:
        """The stage for a person."""
        whole = f" of {self.total} {self.unit} ({self.done / self.total:.0%})" if self.total else f" {self.unit}"
        bad = f", {self.bad} without a result" if self.bad else ""
        left = f", {tqdm.format_interval(self.left_s)} left at the present rate" if self.left_s else ""
        yield f"  {self.name:<12} {self.done}{whole}{bad}{left}"
        for reason, number in Counter(self.reasons).most_common(REASONS):
            yield f"                 {number}: {reason}"


@dataclass(frozen=True)
class Status:
    """What is known of the latest run in a directory.

    outcome: running, died, finished, failed or interrupted. record: its run.json. holder: who writes there now. last:
    the last lines of its journal, by their event. stages: those that left something on disk.
    """

    output: str
    outcome: str
    record: dict
    holder: dict | None
    last: Mapping[str, dict]
    stages: list[Stage]

    @classmethod
    def read(cls, output: str) -> "Status":
        """The status of the latest run in a directory. Raises `ConfigError` if no run ever wrote there."""
        try:
            record = files.read_json(files.join(output, "run.json"))
            told = config.load([files.join(output, "config.yaml")])
        except FileNotFoundError as error:
            raise ConfigError(f"no run has written in {output}: it has no run.json") from error
        holder = lock.holder(output)
        outcome = record["outcome"]
        if outcome == running.RUNNING and (holder is None or holder["run"] != record["run"]):
            outcome = DIED
        lines = journal.read(output, record["run"])
        steps = {line["step"]: line for line in lines if line["event"] == "progress"}
        since = datetime.fromisoformat(record["started"].replace("Z", "+00:00"))
        stages = [*_stages(told, steps, since if outcome == running.RUNNING else None)]
        return cls(output, outcome, record, holder, {line["event"]: line for line in lines}, stages)

    def summary(self) -> str:
        """The status for a person."""
        record = self.record
        lines = [f"vop {record['command']}: {self.outcome}", f"  run          {record['run']}"]
        lines.append(f"  started      {record['started']}, process {record['process']} on {record['host']}")
        if self.outcome == running.RUNNING and "step" in self.last:
            lines.append(f"  now          {self.last['step']['step']}, since {self.last['step']['time']}")
        if self.outcome == DIED:
            seen = max((line["time"] for line in self.last.values()), default=record["started"])
            lines.append(f"  last seen    {seen}; it left without a word: the same command continues where it stopped")
        if record.get("reason"):
            lines.append(f"  reason       {record['reason']}")
        for stage in self.stages:
            lines += stage.lines()
        lines.append(f"  output       {self.output}")
        return "\n".join(lines)


def _stages(told: Config, steps: Mapping[str, dict], since: datetime | None) -> Iterator[Stage]:
    """The stages that left something on disk; since: when the run started that goes on now, None: none does."""
    for name, kind, path in (
        ("embed", EmbeddingStore, told.store_path),
        ("tokens", EmbeddingStore, told.tokens_path),
        ("features", FeatureStore, told.features_path),
    ):
        if kind.exists(path):
            yield _of_images(name, kind.open(path), since)
    for name, folder, kind, size in (
        ("search", told.output, "parts", told.retrieval.query_batch),
        ("map search", told.map_path, "parts", told.retrieval.query_batch),
        ("localize", told.output, "localized", told.localize.batch),
    ):
        if name in steps:
            yield _of_parts(steps[name], folder, kind, size, since)
    if MatchStore.exists(told.matches_path):
        yield _of_pairs(MatchStore.open(told.matches_path), since)
    for name in TOLD:
        if name in steps:
            left = steps[name]["left_s"] if since else None
            yield Stage(name, steps[name]["unit"], steps[name]["done"], steps[name]["total"], left_s=left)


def _of_images(name: str, store: ImageStore, since: datetime | None) -> Stage:
    images, receipts = store.images(), store.receipts()
    planned = images.filter(pc.equal(images["status"], catalog.PLANNED))
    fresh = {number: receipts[number] for number in {*planned["shard"].to_pylist()} & receipts.keys()}
    counts = Counter(images["status"].to_pylist())
    reasons = Counter(error for _, error in catalog.quarantined(images))
    reasons.update(bad["reason"] for receipt in fresh.values() for bad in receipt["quarantined"])
    total = counts[catalog.OK] + counts[catalog.QUARANTINED] + counts[catalog.PLANNED]
    done = total - counts[catalog.PLANNED] + sum(receipt["rows"] for receipt in fresh.values())
    rows = {f"shard-{number:05d}.json": receipt["rows"] for number, receipt in receipts.items()}
    left = _left(store.path, rows, total - done, since)
    return Stage(name, "images", done, total, reasons.total(), _grouped(reasons), left)


def _of_pairs(store: MatchStore, since: datetime | None) -> Stage:
    receipts, total = store.receipts(), store.catalog()[0].num_rows
    reasons = Counter(bad["reason"] for receipt in receipts.values() for bad in receipt["quarantined"])
    rows = {f"shard-{number:05d}.json": receipt["rows"] for number, receipt in receipts.items()}
    left = _left(store.path, rows, total - sum(rows.values()), since)
    return Stage("matching", "pairs", sum(rows.values()), total, reasons.total(), _grouped(reasons), left)


def _of_parts(step: dict, output: str, kind: str, size: int, since: datetime | None) -> Stage:
    """Queries done, in parts of this size: by the parts as long as they lie there, afterwards what the run said."""
    folders = [info for info in files.entries(output) if info.base_name.startswith(f"{kind}-")]
    if not folders:
        return Stage(step["step"], step["unit"], step["done"], step["total"])
    path = files.join(output, max(folders, key=lambda info: info.mtime_ns or 0).base_name)
    rows = {name: size for name in files.listing(path) if not name.startswith(".")}
    done = min(step["total"], size * len(rows))
    return Stage(step["step"], step["unit"], done, step["total"], left_s=_left(path, rows, step["total"] - done, since))


def _left(path: str, rows: Mapping[str, int], remaining: int, since: datetime | None) -> float | None:
    """Seconds that the rest will take at the rate at which the latest files of this run came; rows: of each file."""
    if since is None or not remaining:
        return None
    found = [info for info in files.entries(path) if info.base_name in rows]
    latest = sorted((info.mtime, rows[info.base_name]) for info in found if info.mtime >= since)[-RECENT:]
    if len(latest) < 2 or latest[0][0] == latest[-1][0]:
        return None
    idle = max(0.0, (datetime.now(timezone.utc) - latest[-1][0]).total_seconds())
    took = (latest[-1][0] - latest[0][0]).total_seconds()
    took = max(took, idle)  # a run that has stopped writing slows down here too
    return remaining * took / sum(count for _, count in latest[1:])


def _grouped(reasons: Counter) -> Counter:
    """Reasons without what is special to an image: quoted names, numbers."""
    grouped: Counter = Counter()
    for reason, number in reasons.items():
        grouped[re.sub(r"'[^']*'|\b\d[\d.,]*\b", "...", reason)] += number
    return grouped
