"""Training the encoder: tokens of every view, labels of every pair, then epochs over both."""

import dataclasses
import shlex
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sparse
from safetensors.numpy import save
from safetensors.torch import load

from vop import catalog, files
from vop.config import Config, ConfigError
from vop.datasets.benchmark import Benchmark
from vop.datasets.image_sets import ImageSets
from vop.datasets.posed import OverlapTruth, read_overlap, write_overlap
from vop.models.encoder import save_encoder
from vop.pairs import read_parquet
from vop.parts import Parts, fingerprint
from vop.progress import progress
from vop.run import Run
from vop.stages.train import fit, label_parts
from vop.steps.embeddings import embedded
from vop.store import EmbeddingStore
from vop.training import checkpoint, plan
from vop.training.card import model_card
from vop.training.events import tensorboard
from vop.training.labelling import reasons_of
from vop.training.loop import HISTORY, SCORES
from vop.training.place import START, Place, new_encoder
from vop.training.plan import Split
from vop.training.sampling import VALIDATION
from vop.training.start import MatchedWhitening
from vop.training.views import image_of, view_names, view_pixels

CAMERAS, POINTS, IDENTITY = "cameras.parquet", "points.parquet", "training.json"
IMAGE = ("name", "width", "height", "scaled_width", "scaled_height")
FITTED = 64  # pairs read at a time
ANY_TIME = (  # what may change between two runs of one training
    *("epochs", "checkpoint_steps", "workers", "gpus_per_worker", "max_failures", "cache", "accumulate"),
    *("max_bad_fraction", "data_licence"),
)
OF_LABELS = (  # what of `train` decides the pairs and their labels
    *("supervision", "labels", "positives_per_scene", "negatives_per_scene", "min_overlap", "max_overlap"),
    *("overlap_bins", "validation_pairs", "flip", "warps", "occlusion", "min_pixels", "negatives", "seed"),
)


def check(config: Config) -> None:
    """Raise `ConfigError` for what training cannot be told."""
    if config.encoder is not None:
        raise ConfigError("train makes an encoder from a backbone's tokens: give no encoder")


def _identity(config: Config) -> dict:
    """The settings that decide what encoder comes out."""
    identity = {key: value for key, value in dataclasses.asdict(config.train).items() if key not in ANY_TIME}
    identity |= {key: getattr(config, key) for key in ("images", "cameras", "truth", "backbone", "weights", "block")}
    return identity | {"dataset": dataclasses.asdict(config.dataset), "image_size": config.embedding.image_size}


def check_same(config: Config) -> None:
    """Refuse to go on in a run directory where a training with settings that give another encoder was begun."""
    path, identity = files.join(config.output, IDENTITY), _identity(config)
    known = files.read_json(path) if files.exists(path) else identity
    other = [key for key in identity if known.get(key) != identity[key]]
    if other:
        lines = "".join(f"  {key}: the run has {known.get(key)!r}, now {identity[key]!r}\n" for key in sorted(other))
        raise ConfigError(f"{config.output} holds a training with other settings:\n{lines}Give another output=..., or "
                          f"the settings that it was started with")  # fmt: skip


def tokenised(config: Config, job: Run, sets: ImageSets, chosen: Split) -> tuple[EmbeddingStore, Split]:
    """The store with the tokens of every view that training needs, and the split without images in quarantine."""
    train, training = config.train, {name for names in chosen.training.values() for name in names}
    warps = train.warps if train.supervision == "homography" else 0
    flip = train.flip and train.cached and not warps
    wanted, views = set(chosen.names), []
    for image in sets.images:
        if image.name in wanted:
            names = view_names(image.name, flip and image.name in training, warps)
            views += [dataclasses.replace(image, name=name) for name in names]
    views.sort(key=lambda view: view.name)
    names = tuple(view.name for view in views)
    settings = dataclasses.replace(config.embedding, tokens=True, whiten=None)
    of_tokens = dataclasses.replace(config, store=config.tokens_path, embedding=settings)
    store = embedded(of_tokens, job, ImageSets(sets.root, tuple(views), names, names, sets.skipped), view_pixels)
    live = set(store.live()["name"].to_pylist())
    whole = {name for name in wanted if name in live}
    return store, chosen.only(whole)


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
    if benchmark.truth is not None:
        return benchmark.truth
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
    _check_left_out(config, Counter(reasons), len(chosen.names), "images have no overlaps")
    return OverlapTruth(*read_overlap(path))


def labelled(
    config: Config, job: Run, benchmark: Benchmark, store: EmbeddingStore, chosen: Split,
    truth: OverlapTruth | None, places: dict[str, str],
) -> Place:  # fmt: skip
    """The labels of every epoch's pairs, and of the validation's, made once: all that training reads is then in place.

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
    with job.step("labels"), progress("labels", last, last - len(missing), "parts") as bar:
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
    search = _search(chosen, truth, train.validation_images)
    if train.best.startswith("recall") and chosen.validation and not search:
        raise ConfigError(f"train.best={train.best} needs images whose overlaps are known: use precision or loss")
    files.write_json(job.path(IDENTITY), _identity(config))  # not before: what was refused so far leaves nothing behind
    job.counts |= {"pairs_labelled": sum(counts), "pairs_without_labels": dict(reasons.most_common()),
                   "pairs_of_an_epoch": counts[1], "validation_pairs": counts[0]}  # fmt: skip
    paths = {} if train.cached else {image.name: image.path for image in benchmark.sets.images}
    return Place(
        config,
        store,
        parts,
        per_epoch,
        tuple(counts[1:]),
        counts[0],
        chosen,
        search,
        paths,
    )


def _label_parts(config: Config, places: dict[str, str], chosen: Split) -> Parts:
    """Where the labels lie: under a name made of all that decides them, so that trainings may share a folder."""
    settings = {key: getattr(config.train, key) for key in OF_LABELS}
    sources = {key: getattr(config, key) for key in ("images", "cameras", "truth", "dataset")}
    inputs = {name: files.sha256(path) for name, path in places.items()}
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


def started(config: Config, job: Run, place: Place) -> None:
    """Fit what training starts from to the matches of the first epoch."""
    path = job.path(START)
    if config.train.start != "matches" or files.exists(path):
        return
    with job.step("start"):
        fitting, reader, labels = MatchedWhitening(place.store.manifest["token_width"]), place.tokens(), place.labels(0)
        for at in range(0, labels.num_rows, FITTED):
            fitting.add([place.batch(reader(labels.slice(at, FITTED)))])
        files.write_bytes(path, save(fitting.fit(config.train.descriptor_dim).arrays()))


def _search(chosen: Split, truth: OverlapTruth | None, most: int) -> tuple[tuple[tuple[str, ...], np.ndarray], ...]:
    """Names and overlaps of the images of each scene that the validation searches."""
    if truth is None:
        return ()
    index, found = {name: row for row, name in enumerate(truth.names)}, []
    for _, names in sorted(chosen.validation.items()):
        names = tuple(names[at] for at in catalog.evenly_spread(len(names), most))
        rows = [index[name] for name in names]
        overlap = truth.matrix[np.ix_(rows, rows)]
        found.append((names, np.asarray(overlap.todense() if sparse.issparse(overlap) else overlap, np.float32)))
    return tuple(found)


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


def trained(config: Config, job: Run, place: Place) -> str:
    """The trained encoder, in a folder: the weights of the best validation, or of the last step without one."""
    steps = [place.steps(1, epoch) for epoch in range(config.train.epochs)]
    found = checkpoint.latest(files.join(config.output, "checkpoints"))
    done = found[0].step if found else 0
    if found is None or found[0].epoch < config.train.epochs:
        with (
            job.step("train"),
            progress("train", max(sum(steps), done), done, "steps") as bar,
            tensorboard(job.path("tensorboard"), done) as events,
        ):

            def told(row: dict) -> None:
                bar.update(row["step"] - bar.n)
                bar.set_postfix_str(f"epoch {row['epoch'] + 1}, loss {row['loss']:.4f}" if row.get("loss") else "")
                if events:
                    events(row)

            job.counts["tensorboard"] = events is not None
            fit(place, told)
    progressed, _ = checkpoint.latest(files.join(config.output, "checkpoints"))
    encoder = new_encoder(config, place.store)
    encoder.load_state_dict(load(files.read_bytes(files.join(config.output, "best.safetensors"))))
    history = read_parquet(job.path(HISTORY)).to_pylist()
    best = next((row for row in reversed(history) if row["step"] == progressed.best_step and row["precision"]), {})
    scores = {name: best[name] for name in SCORES if best.get(name) is not None}
    folder = job.path("encoder")
    with job.step("radius"):
        radius = place.radius(encoder)
    noted = _noted(config, place, scores) | {
        "steps": progressed.step, "best_step": progressed.best_step, "radius": radius
    }  # fmt: skip
    files.write_bytes(files.join(folder, "README.md"), model_card(noted).encode())
    save_encoder(encoder, folder, noted)
    job.metrics |= scores | {"best_step": progressed.best_step} | ({} if radius is None else {"radius": radius})
    job.counts |= {"steps": progressed.step, "steps_now": progressed.step - done, "encoder": folder}
    job.counts["use"] = _use(config, folder, radius)
    return folder


def _use(config: Config, folder: str, radius: float | None) -> str:
    """The settings by which other commands describe images with a trained encoder."""
    embedding, usual = config.embedding, Config()
    told = {key: getattr(config, key) for key in ("weights", "block") if getattr(config, key) is not None}
    for key in ("image_size", "imagenet_normalization"):
        if getattr(embedding, key) != getattr(usual.embedding, key):
            told[f"embedding.{key}"] = str(getattr(embedding, key)).lower()
    told = {"backbone": config.backbone, **told, "encoder": folder}
    told |= {} if radius is None else {"retrieval.radius": f"{radius:g}"}
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in told.items())


def _noted(config: Config, place: Place, scores: dict[str, float]) -> dict:
    """What `config.json` and the model card say of a training."""
    data = {"source": config.dataset.root or config.images, "licence": config.train.data_licence}
    for part in ("training", "validation"):
        scenes = getattr(place.chosen, part)
        data |= {f"{part}_scenes": len(scenes), f"{part}_images": sum(map(len, scenes.values()))}
    return {"backbone": place.store.manifest["features"]["backbone"], "train": dataclasses.asdict(config.train),
            "data": data, "metrics": scores}  # fmt: skip
