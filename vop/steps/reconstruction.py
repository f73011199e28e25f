"""From matched pairs to models: database.db, the folders of `models`, and how good they are."""

import itertools
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files, view_graph
from vop.cameras import load_pycolmap
from vop.config import Config, ConfigError
from vop.datasets.layout import Benchmark
from vop.pair_verification import FEW, NONE, UNREADABLE, WATERMARK, PairVerification
from vop.pair_verification import SCHEMA as GEOMETRIES
from vop.parts import Parts, fingerprint
from vop.pose.alignment import Judgement, judge
from vop.pose_estimation import QUARANTINED
from vop.reconstruction import (
    DATABASE,
    MODELS,
    PART,
    VERIFIED,
    DatabaseWriter,
    Mapper,
    made_by,
    models_of,
    place,
    write_table,
)  # fmt: skip
from vop.retrieval.graph import components
from vop.run import Run
from vop.stages import reconstruct
from vop.steps.matches import Matched, places

CAMERAS, IMAGES, REGISTERED = "cameras.parquet", "images.parquet", "registered.parquet"
SUMMARY, UNREGISTERED = "models.parquet", "unregistered.parquet"
IMAGES_AT_ONCE = 64  # whose cameras are looked up by one task
NO_PAIRS, UNVERIFIED, DISTRUSTED = "no pairs", "none of its pairs was verified", "its pairs are not trusted"
ALONE, LEFT_OUT = "too few images hang together with it", "the mapper found no place for it"
LEFT = pa.schema([("image", pa.string()), ("reason", pa.string())])
JUDGED = {  # what known cameras add to a model's row; null: there are none
    "world": pa.string(),  # of most of its images
    "images_of_world": pa.int32(),
    "foreign": pa.int32(),  # images of other worlds
    "largest_error": pa.float64(),  # of the aligned camera centres, share of the extent of that world
    "median_error": pa.float64(),
}
PER_MODEL = (
    *("images", "points", "reprojection_error", "track_length", "world", "foreign", "largest_error", "median_error"),
)


def check() -> None:
    """Raise `ConfigError` without the COLMAP that all of this needs: at the start, not after the matching."""
    try:
        load_pycolmap()
    except ImportError as error:
        raise ConfigError(f"reconstruct: {error}") from error


def check_cameras(benchmark: Benchmark) -> None:
    """Raise `CamerasError` for a known camera that is malformed: it would be believed."""
    if benchmark.cameras is not None:
        benchmark.cameras.check()


def reconstructed(config: Config, job: Run, benchmark: Benchmark, matched: Matched) -> pa.Table:
    """The models of the matched images, in folders of `models`; returns registered.parquet.

    What is finished of the same inputs is not computed again: pairs that are verified, groups of images that are
    mapped.
    """
    _cameras(config, job, benchmark, matched)
    geometries, count = _verified(config, job, matched)
    version = load_pycolmap().__version__
    inputs = fingerprint(geometries.path.rsplit("-")[-1], asdict(config.reconstruct), PART.names, version,
                         view_graph.VERSION)  # fmt: skip
    if made_by(job.path(VERIFIED)) != inputs or not files.exists(job.path(DATABASE)):
        with job.step("choose pairs"):
            writer = DatabaseWriter(
                config.reconstruct, matched.features, job.path(IMAGES), geometries, count, config.output
            )
            reconstruct.on_a_worker(writer, inputs)
    pairs = _read(job.path(VERIFIED))
    if made_by(job.path(REGISTERED)) != inputs:
        _mapped(config, job, inputs, pairs)
    registered = _read(job.path(REGISTERED))
    reasons = {}
    for each in pc.value_counts(pairs["reason"].drop_null()).to_pylist():
        reasons[each["values"]] = each["counts"]
    job.counts |= {"pairs_used": pairs["reason"].null_count, "pairs_left_aside": dict(sorted(reasons.items()))}
    return registered


def _cameras(config: Config, job: Run, benchmark: Benchmark, matched: Matched) -> None:
    """images.parquet: the images of the pairs, their cameras (`colmap.IMAGES`), and where their features lie."""
    with job.step("cameras"):
        known = None
        if benchmark.cameras is not None:
            known = job.path(CAMERAS)
            benchmark.cameras.write(known)
        names = pa.concat_arrays([matched.pairs[side].combine_chunks() for side in ("image0", "image1")]).unique()
        live = matched.features.live()
        images = live.filter(pc.is_in(live["name"], names)).sort_by("name")
        paths = {image.name: image.path for image in benchmark.sets.images}
        images = images.append_column("path", pa.array([paths[name] for name in images["name"].to_pylist()]))
        asked = images.select(["name", "path", "width", "height"])
        parts = (asked.slice(start, IMAGES_AT_ONCE) for start in range(0, asked.num_rows, IMAGES_AT_ONCE))
        found = reconstruct.cameras(config, parts, known)
        for column in ("path", "shard", "row"):
            found = found.append_column(column, images[column])
        with files.atomic(job.path(IMAGES)) as (filesystem, inner):
            pq.write_table(found, inner, filesystem=filesystem, compression="zstd")
    sources = pc.value_counts(found["source"]).to_pylist()
    job.counts["cameras"] = {each["values"]: each["counts"] for each in sources}


def _verified(config: Config, job: Run, matched: Matched) -> tuple[Parts, int]:
    """The parts with the two-view geometries of all pairs, and their number."""
    wanted, receipts = places(matched), matched.matches.receipts()
    parts = Parts(
        config.output,
        fingerprint(
            [config.reconstruct.min_inliers, config.reconstruct.seed, GEOMETRIES.names, load_pycolmap().__version__],
            [(number, receipts[number]["sha256"], rows.tolist()) for number, rows in wanted],
            [matched.features.manifest["features"], files.sha256(job.path(IMAGES))],
        ),
        "geometries",
    )
    missing = parts.missing(len(wanted))
    total, now = matched.pairs.num_rows, sum(len(wanted[i][1]) for i in missing)
    verification = PairVerification(config.reconstruct, matched.features, matched.matches, job.path(IMAGES), parts)
    with job.progress("verify", total, total - now, "pairs") as bar:
        for written in reconstruct.verify_pairs(config, verification, (_part(i, *wanted[i]) for i in missing)):
            bar.update(written["pairs"])
    parts.remove(but_these=True)
    job.counts["verified_now"] = now
    return parts, len(wanted)


def _part(number: int, shard: int, rows: np.ndarray) -> pa.Table:
    return pa.table({"part": [number] * len(rows), "shard": [shard] * len(rows), "row": rows})


def _mapped(config: Config, job: Run, inputs: str, pairs: pa.Table) -> None:
    """The folders of `models`, then registered.parquet (`PART`), whose metadata says that they are whole."""
    groups = _groups(_read(job.path(IMAGES))["name"].to_pylist(), pairs, config.reconstruct.min_model_size)
    parts = Parts(config.output, inputs, "mapping")
    missing = parts.missing(len(groups))
    total, now = sum(map(len, groups)), sum(len(groups[part]) for part in missing)
    mapper = Mapper(config.reconstruct, job.path(IMAGES), config.output, parts, config.embedding.max_pixels)
    with job.progress("map", total, total - now, "images") as bar:
        for written in reconstruct.map_groups(config, mapper, {part: groups[part] for part in missing}):
            bar.update(written["images"], bad=written["images"] - written["registered"])
    with job.step("write models"):
        for stale in (REGISTERED, MODELS):
            files.remove(job.path(stale))
        found = _numbered([*parts.read(len(groups))])
        for number, (part, model, _) in enumerate(found):
            folder = place(parts, part, model)
            for name in files.listing(folder):
                _copy(files.join(folder, name), files.join(job.path(MODELS), str(number), name))
        tables = [_renumbered(rows, number) for number, (_, _, rows) in enumerate(found)]
        write_table(job.path(REGISTERED), pa.concat_tables([PART.empty_table(), *tables]), inputs)
        parts.remove()


def _groups(names: list[str], pairs: pa.Table, least: int) -> list[list[str]]:
    """Images that hang together by the pairs that are used: groups of at least so many, the largest first."""
    used, known = pairs.filter(pairs["reason"].is_null()), pa.array(names, pa.string())
    edges = [tuple(pc.index_in(used[side], known).to_numpy() for side in ("image0", "image1"))]
    component, sizes = components(edges, len(names))
    groups = [[] for _ in range(int(np.count_nonzero(sizes >= least)))]  # the largest component is number 0
    for name, number in zip(names, component.tolist(), strict=True):
        if number < len(groups):
            groups[number].append(name)
    return groups


def _numbered(tables: list[pa.Table]) -> list[tuple[int, int, pa.Table]]:
    """Part, number in the part, and rows of every model, the one with most images first."""
    found = [
        (part, model, table.filter(pc.equal(table["model"], model)))
        for part, table in enumerate(tables)
        for model in sorted(set(table["model"].to_pylist()))
    ]
    return sorted(found, key=lambda each: (-each[2].num_rows, each[2]["image"][0].as_py()))


def _renumbered(rows: pa.Table, number: int) -> pa.Table:
    numbers = pa.array([number] * rows.num_rows, pa.int32())
    return rows.set_column(rows.column_names.index("model"), "model", numbers)


def _copy(source: str, target: str) -> None:
    (filesystem, inner), (_, other) = files.resolve(source), files.resolve(target)
    filesystem.create_dir(other.rsplit("/", 1)[0], recursive=True)
    filesystem.copy_file(inner, other)


def _read(path: str) -> pa.Table:
    with files.opened(path) as file:
        return pq.read_table(file)


def judged(config: Config, job: Run, benchmark: Benchmark, registered: pa.Table) -> None:
    """models.parquet and unregistered.parquet: how good models are, and why images are in none; the headline into
    counts and metrics.
    """
    with job.step("evaluate"):
        models = models_of(registered)
        known = {} if benchmark.cameras is None else {camera.name: camera for camera in benchmark.cameras}
        rows = []
        for number in models["model"].to_pylist():
            mine = registered.filter(pc.equal(registered["model"], number))
            poses = np.array(mine["cam_from_world"].to_pylist()).reshape(-1, 3, 4)
            centers = -np.einsum("nji,nj->ni", poses[:, :, :3], poses[:, :, 3])
            rows.append(_judged(judge(dict(zip(mine["image"].to_pylist(), centers, strict=True)), known)))
        for name, type_ in JUDGED.items():
            models = models.append_column(name, pa.array([row[name] for row in rows], type_))
        left = _unregistered(config, job, benchmark, registered)
        for name, table in ((SUMMARY, models), (UNREGISTERED, left)):
            with files.atomic(job.path(name)) as (filesystem, inner):
                pq.write_table(table, inner, filesystem=filesystem, compression="zstd")
        reasons = pc.value_counts(left["reason"]).to_pylist()
        job.counts |= {
            "models": models.to_pylist(),
            "images_registered": len(set(registered["image"].to_pylist())),
            "images_of_collection": len(benchmark.sets.names),
            "images_not_registered": {each["values"]: each["counts"] for each in reasons},
        }
        job.metrics |= _metrics(models)


def _judged(found: Judgement) -> dict:
    errors = [] if found.errors is None else list(found.errors.values())
    return {
        "world": found.world,
        "images_of_world": found.images,
        "foreign": found.foreign,
        "largest_error": max(errors) if errors else None,
        "median_error": float(np.median(errors)) if errors else None,
    }


def _metrics(models: pa.Table) -> dict[str, object]:
    """Means over the models, weighed by observations, and the worst camera; a few numbers of every model."""
    rows = models.to_pylist()
    seen, points = (sum(row[name] for row in rows) for name in ("observations", "points"))
    off = sum(row["reprojection_error"] * row["observations"] for row in rows)
    errors = [row["largest_error"] for row in rows if row["largest_error"] is not None]
    found: dict[str, object] = {
        "models": len(rows),
        "reprojection_error": off / seen if seen else None,
        "track_length": seen / points if points else None,
        "largest_center_error": max(errors, default=None),
        "mixed_models": sum(row["foreign"] > 0 for row in rows),
    }
    for row in rows:
        found |= {f"model{row['model']}/{name}": row[name] for name in PER_MODEL}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}


def _unregistered(config: Config, job: Run, benchmark: Benchmark, registered: pa.Table) -> pa.Table:
    """The images of the collection that are in no model, and why: image, reason."""
    pairs, featured = _read(job.path(VERIFIED)), {*_read(job.path(IMAGES))["name"].to_pylist()}
    reached = {*registered["image"].to_pylist()}
    bad, rows = dict(job.quarantined), []
    verified = _ends(
        pairs.filter(pc.is_null(pc.index_in(pairs["reason"], pa.array([UNREADABLE, FEW, NONE, WATERMARK]))))
    )
    used = _ends(pairs.filter(pairs["reason"].is_null()))
    grouped = set(itertools.chain.from_iterable(_groups(sorted(featured), pairs, config.reconstruct.min_model_size)))
    for name in benchmark.sets.names:
        if name in reached:
            continue
        cases = ((name in bad, QUARANTINED), (name not in featured, NO_PAIRS), (name not in verified, UNVERIFIED),
                 (name not in used, DISTRUSTED), (name not in grouped, ALONE))  # fmt: skip
        rows.append({"image": name, "reason": next((why for holds, why in cases if holds), LEFT_OUT)})
    return pa.Table.from_pylist(rows, schema=LEFT)


def _ends(pairs: pa.Table) -> set[str]:
    return {*pairs["image0"].to_pylist(), *pairs["image1"].to_pylist()}
