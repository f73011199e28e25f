"""Training the encoder: tokens of every view, labels of every pair, then epochs over both."""

import dataclasses
import shlex

import numpy as np
import scipy.sparse as sparse
from safetensors.numpy import save
from safetensors.torch import load

from vop import catalog, files
from vop.config import Config, ConfigError
from vop.datasets.benchmark import Benchmark
from vop.datasets.image_sets import ImageSets
from vop.datasets.posed import OverlapTruth
from vop.models.encoder import save_encoder
from vop.pairs import read_parquet
from vop.run import Run
from vop.stages.train import fit
from vop.steps.embeddings import embedded
from vop.steps.labels import labelled
from vop.store import EmbeddingStore
from vop.training import checkpoint, plan
from vop.training.card import model_card
from vop.training.events import tensorboard
from vop.training.loop import HISTORY, SCORES
from vop.training.place import START, Place, new_encoder
from vop.training.plan import Split
from vop.training.start import MatchedWhitening
from vop.training.views import view_names, view_pixels

IDENTITY = "training.json"
FITTED = 64  # pairs read at a time
ANY_TIME = (  # what may change between two runs of one training
    *("epochs", "checkpoint_steps", "workers", "gpus_per_worker", "max_failures", "cache", "accumulate"),
    *("max_bad_fraction", "data_licence"),
)


def check(config: Config) -> None:
    """Raise `ConfigError` for what training cannot be told."""
    if config.encoder is not None:
        raise ConfigError("train makes an encoder from a backbone's tokens: give no encoder")


def _identity(config: Config) -> dict:
    """The settings that decide what encoder comes out."""
    train = {f"train.{key}": value for key, value in dataclasses.asdict(config.train).items() if key not in ANY_TIME}
    inputs = {key: getattr(config, key) for key in ("images", "cameras", "truth", "backbone", "weights", "block")}
    dataset = {f"dataset.{key}": value for key, value in dataclasses.asdict(config.dataset).items()}
    return train | inputs | dataset | {"embedding.image_size": config.embedding.image_size}


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
    there = EmbeddingStore.exists(config.tokens_path) and EmbeddingStore.open(config.tokens_path)
    patches = bool(there) and there.manifest["width"] > 0  # where `vop embed` left both, it may go on with both
    settings = dataclasses.replace(config.embedding, tokens=True, patches=patches, whiten=None)
    of_tokens = dataclasses.replace(config, store=config.tokens_path, embedding=settings)
    store = embedded(of_tokens, job, ImageSets(sets.root, tuple(views), names, names, sets.skipped), view_pixels)
    live = set(store.live()["name"].to_pylist())
    whole = {name for name in wanted if name in live}
    return store, chosen.only(whole)


def placed(
    config: Config, job: Run, benchmark: Benchmark, store: EmbeddingStore, chosen: Split,
    truth: OverlapTruth | None, places: dict[str, str],
) -> Place:  # fmt: skip
    """The labels of every pair: all that training reads is then in place.

    Raises `ConfigError` if too few pairs have labels, or what `train.best` asks for cannot be measured.
    """
    train = config.train
    parts, pairs = labelled(config, job, benchmark, store, chosen, truth, places)
    search = _search(chosen, truth, train.validation_images)
    if train.best.startswith("recall") and chosen.validation and not search:
        raise ConfigError(f"train.best={train.best} needs images whose overlaps are known: use precision or loss")
    files.write_json(job.path(IDENTITY), _identity(config))  # not before: what was refused so far leaves nothing behind
    return Place(
        config,
        store,
        parts,
        plan.parts_per_epoch(chosen, train),
        pairs=tuple(pairs[1:]),
        validation_pairs=pairs[0],
        chosen=chosen,
        search=search,
        paths={} if train.cached else {image.name: image.path for image in benchmark.sets.images},
    )


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


def trained(config: Config, job: Run, place: Place) -> str:
    """The trained encoder, in a folder: the weights of the best validation, or of the last step without one."""
    steps = [place.steps(1, epoch) for epoch in range(config.train.epochs)]
    found = checkpoint.latest(files.join(config.output, "checkpoints"))
    done = found[0].step if found else 0
    if found is None or found[0].epoch < config.train.epochs:
        with (
            job.progress("train", max(sum(steps), done), done, "steps") as bar,
            tensorboard(job.path("tensorboard"), done) as events,
        ):

            def told(row: dict) -> None:
                bar.update(row["step"] - bar.done)
                bar.note(f"epoch {row['epoch'] + 1}, loss {row['loss']:.4f}" if row.get("loss") else "")
                if events:
                    events(row)

            job.counts["tensorboard"] = events is not None
            fit(place, told)
    progressed, _ = checkpoint.latest(files.join(config.output, "checkpoints"))
    encoder = new_encoder(config, place.store)
    encoder.load_state_dict(load(files.read_bytes(files.join(config.output, "best.safetensors"))))
    history = read_parquet(job.path(HISTORY)).to_pylist()
    validated = [row for row in history if row["step"] == progressed.best_step and row["precision"] is not None]
    best = validated[-1] if validated else {}
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
