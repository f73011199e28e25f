"""What supervises the training: the overlaps that pairs are drawn by, and the labels of every pair."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from vop import files
from vop.config import Config, ConfigError
from vop.datasets.benchmark import Benchmark
from vop.datasets.posed import OverlapTruth, read_overlap, write_overlap
from vop.parts import Parts, fingerprint
from vop.run import Run
from vop.stages.train import label_parts
from vop.store import EmbeddingStore
from vop.training import plan
from vop.training.labelling import reasons_of
from vop.training.plan import Split
from vop.training.sampling import VALIDATION
from vop.training.views import image_of

CAMERAS, POINTS = "cameras.parquet", "points.parquet"
IMAGE = ("name", "width", "height", "scaled_width", "scaled_height")
OF_LABELS = (  # what of `train` decides the pairs and their labels
    *("supervision", "labels", "positives_per_scene", "negatives_per_scene", "min_overlap", "max_overlap"),
    *("overlap_bins", "validation_pairs", "flip", "warps", "occlusion", "min_pixels", "negatives", "seed"),
)


def supervised(
    config: Config, job: Run, benchmark: Benchmark, chosen: Split
) -> tuple[OverlapTruth | None, dict, Split]:
    """The overlaps that pairs are drawn by (None: none needed), the files that labels are made from, the usable split.

    Raises `ConfigError` where the supervision asked for cannot be had.
    """
    kind, places = config.train.supervision, {}
    if kind == "homography":
        return None, places, chosen
    if kind == "depth":
        if benchmark.cameras is None or benchmark.depths is None:
            raise ConfigError("train.supervision=depth needs cameras=... and a depth map beside every image "
                              "(name.depth.png, 16-bit millimetres), or a dataset that has both; "
                              "without any truth there is train.supervision=homography")  # fmt: skip
        benchmark.cameras.write(job.path(CAMERAS))
        places["cameras"] = job.path(CAMERAS)
    if kind == "points":
        if benchmark.points is None:
            raise ConfigError("train.supervision=points needs the points of a COLMAP model: dataset.format=colmap")
        with files.atomic(job.path(POINTS)) as (filesystem, inner):
            pq.write_table(benchmark.points(), inner, filesystem=filesystem, compression="zstd")
        places["points"] = job.path(POINTS)
    with job.step("overlaps"):
        truth = _overlaps(config, job, benchmark, chosen)
    return truth, places, chosen.only(set(truth.names))


def _overlaps(config: Config, job: Run, benchmark: Benchmark, chosen: Split) -> OverlapTruth:
    total, what = len(chosen.names), "images have no overlaps"
    given = benchmark.truth
    if given is not None:
        lacking = len(set(chosen.names).difference(given.names))
        reasons = job.counts["images_without_overlap"] = {"not among the true overlaps": lacking} if lacking else {}
        _check_left_out(config, Counter(reasons), total, what)
        return given
    if config.train.supervision != "depth":
        raise ConfigError("the overlaps of the images are not known: give truth=..., an overlap.parquet")
    name = f"overlap-{fingerprint(chosen.names, files.sha256(job.path(CAMERAS)))}"
    path, told = (job.path(f"{name}.{suffix}") for suffix in ("parquet", "json"))
    if not files.exists(told):
        depths = {name: benchmark.depths(name) for name in chosen.names}
        truth, reasons = plan.depth_overlaps(chosen.names, benchmark.cameras, depths)
        write_overlap(path, truth)
        files.write_json(told, reasons)
    reasons = job.counts["images_without_overlap"] = files.read_json(told)
    _check_left_out(config, Counter(reasons), total, what)
    return read_overlap(path)


def labelled(
    config: Config, job: Run, benchmark: Benchmark, store: EmbeddingStore, chosen: Split,
    truth: OverlapTruth | None, places: dict[str, str],
) -> tuple[Parts, list[int]]:  # fmt: skip
    """The labels of every epoch's pairs and, before them, of the validation's, made once; and the rows of each.

    Raises `ConfigError` if too many pairs have none, or an epoch has no pairs.
    """
    train, per_epoch = config.train, plan.parts_per_epoch(chosen, config.train)
    worlds = None if benchmark.cameras is None else benchmark.cameras.worlds
    epochs = range(VALIDATION, train.epochs)
    parts = _label_parts(config, places, chosen)
    with job.step("plan"):
        last = plan.parts_of(epochs[-1], per_epoch).stop
        missing = set(parts.missing(last))
        wanted = [epoch for epoch in epochs if missing & set(plan.parts_of(epoch, per_epoch))]
        images = {row["name"]: row for row in store.live().select([*IMAGE]).to_pylist()}
    with job.progress("labels", last, last - len(missing), "parts") as bar:
        tables = (
            _planned(number, pairs, images, benchmark, config)
            for epoch in wanted
            for number, pairs in zip(
                plan.parts_of(epoch, per_epoch),
                plan.cut(plan.pairs_of(epoch, chosen, truth, train, worlds), per_epoch),
                strict=True,
            )
            if number in missing
        )
        for _ in label_parts(config, places, parts, tables):
            bar.update(1)
    counts, reasons = [], Counter()
    for epoch in epochs:
        schemas = [parts.described(number) for number in plan.parts_of(epoch, per_epoch)]
        counts.append(sum(rows for rows, _ in schemas))
        for _, schema in schemas:
            reasons.update(reasons_of(schema))
    if config.pair_labels is None:
        parts.remove(but_these=True)
    _check_labels(config, counts, reasons)
    job.counts |= {"pairs_labelled": sum(counts), "pairs_without_labels": dict(reasons.most_common()),
                   "pairs_of_an_epoch": counts[1], "validation_pairs": counts[0]}  # fmt: skip
    return parts, counts


def _label_parts(config: Config, places: dict[str, str], chosen: Split) -> Parts:
    """Where the labels lie: under a name made of all that decides them, so that trainings may share a folder."""
    settings = {key: getattr(config.train, key) for key in OF_LABELS}
    sources = {key: getattr(config, key) for key in ("images", "cameras", "truth", "dataset")}
    given = {"truth": config.truth, "labels": config.train.labels}
    inputs = {name: files.sha256(path) for name, path in (places | given).items() if path is not None}
    size = config.embedding.image_size
    return Parts(
        config.pair_labels or config.output,
        fingerprint(settings, sources, inputs, size, chosen.training, chosen.validation, plan.PART),
        "labels",
    )


def _planned(number: int, pairs: pa.Table, images: dict[str, dict], benchmark: Benchmark, config: Config) -> pa.Table:
    """A part for `vop.training.labelling.Labelling`: what is known of both images of every pair."""
    rows = []
    for pair in pairs.to_pylist():
        for side in (0, 1):
            view = pair[f"view{side}"]
            image = images.get(view) or images[image_of(view)]  # a view that is not cached has the sizes of its image
            pair |= {f"{key}{side}": image[key] for key in IMAGE[1:]}
            pair[f"depth{side}"] = None if benchmark.depths is None else benchmark.depths(image_of(view))
        narrow = any(pair[f"scaled_width{side}"] < config.embedding.image_size for side in (0, 1))
        if config.train.supervision == "labels" and narrow:  # prepared labels of a portrait cannot be mirrored
            pair |= {view: image_of(pair[view]) for view in ("view0", "view1")}
        rows.append(pair)
    sides = [(f"{key}{side}", pa.int64()) for side in (0, 1) for key in IMAGE[1:]]
    schema = pa.schema([("view0", pa.string()), ("view1", pa.string()), ("overlap", pa.float32()), *sides,
                        *((f"depth{side}", pa.string()) for side in (0, 1))])  # fmt: skip
    table = pa.Table.from_pylist(rows or [{}], schema=schema)  # a part of no pairs is one empty row: blocks need rows
    return table.append_column("part", pa.array([number] * table.num_rows))


def _check_left_out(config: Config, reasons: Counter, total: int, what: str) -> str:
    """Raise `ConfigError` if too many of `total` are left out; returns the reasons, for people."""
    shown = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    if reasons.total() > config.train.max_bad_fraction * total:
        raise ConfigError(f"{reasons.total()} of {total} {what}, more than train.max_bad_fraction="
                          f"{config.train.max_bad_fraction:g}: {shown}")  # fmt: skip
    return shown


def _check_labels(config: Config, counts: list[int], reasons: Counter) -> None:
    shown = _check_left_out(config, reasons, sum(counts) + reasons.total(), "pairs have no labels")
    if config.train.validation and not counts[0]:
        raise ConfigError(f"train.validation={config.train.validation} leaves no pairs to validate on: "
                          "its images do not overlap")  # fmt: skip
    if not min(counts[1:]):
        raise ConfigError(
            f"there are no pairs to train on{': ' + shown if shown else ''}: no two images overlap by "
            f"{config.train.min_overlap:g} to {config.train.max_overlap:g} (train.min_overlap, train.max_overlap)"
        )
