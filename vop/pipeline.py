"""The flow, on one page: every function names the artefacts and calls the steps."""

import dataclasses

from vop import catalog, files, hdf5, matching, run
from vop import config as configuration
from vop.config import Config, ConfigError
from vop.datasets import rendered
from vop.datasets.benchmark import open_benchmark
from vop.datasets.image_sets import open_image_sets, read_names
from vop.datasets.posed import CAMERAS, PosedFolder, overlap_truth
from vop.foreign_hloc import HlocFiles
from vop.names import inside
from vop.pose import relative
from vop.progress import progress
from vop.run import Run
from vop.stages import cluster
from vop.steps import (
    embeddings,
    exports,
    imported,
    labels,
    localization,
    maps,
    matches,
    planning,
    poses,
    reconstruction,
    training,
)
from vop.steps import pairs as ranking
from vop.steps.report import found_again, known_overlaps, reported, reported_training
from vop.steps.status import Status
from vop.store import EmbeddingStore
from vop.training.plan import split
from vop.viz.page import write_page
from vop.viz.trained import write_training_page


def embed(config: Config) -> Run:
    """Bring the store up to date with the collection: new and changed images are embedded, nothing twice."""
    with run.start(config, "embed") as job, cluster.connect(config.cluster, job):
        embeddings.embedded(config, job, open_benchmark(config).sets)
    return job


def register(config: Config) -> Run:
    """Pair every image of a collection, or of a store that has no images at hand, with those that see the same."""
    ranking.check(config)
    stored = config.images is None and config.dataset.format is None
    if stored and not EmbeddingStore.exists(config.store_path):
        raise ConfigError("register needs images=FOLDER (or a glob pattern, or a list file), or the store=DIR of a run")
    with run.start(config, "register") as job, cluster.connect(config.cluster, job):
        if stored:
            everything = embeddings.as_stored(config, job).select()
            truth = None if config.truth is None else overlap_truth(config.truth)
        else:
            benchmark = open_benchmark(config)
            everything = embeddings.embedded(config, job, benchmark.sets).select(benchmark.sets.names)
            truth = benchmark.truth
        ranking.paired(config, job, everything, everything)
        ranking.evaluated(config, job, everything, everything, truth)
        reported(config, job, truth)
    return job


def retrieve(config: Config) -> Run:
    """Rank the database images of every query by predicted overlap."""
    ranking.check(config)
    separate = config.queries is not None and (config.database is not None or config.images is not None)
    if not separate and config.dataset.format is None:
        raise ConfigError("retrieve needs queries=FOLDER and database=FOLDER (folders, glob patterns or list files)")
    if config.pairs.chosen:
        raise ConfigError("pairs.* chooses among the pairs of one collection: use it with register, here retrieval.k")
    with run.start(config, "retrieve") as job, cluster.connect(config.cluster, job):
        if config.images is None and EmbeddingStore.is_imported(config.store_path):
            store, names = embeddings.as_stored(config, job), map(read_names, (config.queries, config.database))
            truth = None if config.truth is None else overlap_truth(config.truth)
        else:
            benchmark = open_benchmark(config)
            store, names = (
                embeddings.embedded(config, job, benchmark.sets),
                (benchmark.sets.queries, benchmark.sets.database),
            )
            truth = benchmark.truth
        queries, database = map(store.select, names)
        ranking.paired(config, job, queries, database)
        ranking.evaluated(config, job, queries, database, truth)
        reported(config, job, truth)
    return job


def match(config: Config) -> Run:
    """Match the local features of listed pairs, for reconstruction to follow; without a list, of registered ones."""
    matching.check(config.matching)
    with run.start(config, "match") as job, cluster.connect(config.cluster, job):
        benchmark = open_benchmark(config)
        matches.matched(config, job, benchmark.sets, ranking.listed(config, job, benchmark))
    return job


def relative_pose(config: Config) -> Run:
    """Judge pairs by the relative poses that their matches give: those listed, or those that registering ranks."""
    matching.check(config.matching)
    relative.check(config.pose.estimators)
    with run.start(config, "relative-pose") as job, cluster.connect(config.cluster, job):
        benchmark = open_benchmark(config)
        poses.check_cameras(benchmark)
        listed = ranking.listed(config, job, benchmark)
        matched = matches.matched(config, job, benchmark.sets, listed)
        estimated = poses.posed(config, job, matched, benchmark.cameras)
        evaluation = poses.judged(config, job, benchmark, listed, estimated)
        reported(config, job, benchmark.truth, evaluation)
    return job


def localize(config: Config) -> Run:
    """Estimate the poses of queries by their matches with a database whose geometry is known."""
    localization.check(config)
    with run.start(config, "localize") as job, cluster.connect(config.cluster, job):
        benchmark = localization.opened(config, job)
        listed = ranking.listed(config, job, benchmark)
        lift = maps.mapped(config, job, benchmark) if benchmark.lift is None else benchmark.lift
        matched = matches.matched(config, job, benchmark.sets, listed)
        table = localization.localized(config, job, benchmark, listed, matched, lift)
        reported(config, job, benchmark.truth, localized=table)
    return job


def reconstruct(config: Config) -> Run:
    """Make models of a collection: of the pairs listed, or of those that registering ranks."""
    reconstruction.check()
    matching.check(config.matching)
    with run.start(config, "reconstruct") as job, cluster.connect(config.cluster, job):
        benchmark = open_benchmark(config)
        reconstruction.check_cameras(benchmark)
        listed = ranking.listed(config, job, benchmark)
        matched = matches.matched(config, job, benchmark.sets, listed)
        registered = reconstruction.reconstructed(config, job, benchmark, matched)
        reconstruction.judged(config, job, benchmark, registered)
        reported(config, job, benchmark.truth, models=True)
    return job


def train(config: Config) -> Run:
    """Train the encoder on a collection whose overlaps are known, or on views of its images."""
    training.check(config)
    training.check_same(config)  # before the record of the run that is there would be replaced
    with run.start(config, "train") as job, cluster.connect(config.cluster, job):
        benchmark = open_benchmark(config)
        chosen = split(benchmark.sets, config.train)
        truth, places, chosen = labels.supervised(config, job, benchmark, chosen)
        store, chosen = training.tokenised(config, job, benchmark.sets, chosen)
        place = training.placed(config, job, benchmark, store, chosen, truth, places)
        training.started(config, job, place)
        training.trained(config, job, place)
        reported_training(config, job)
    return job


def export_matches(config: Config) -> Run:
    """Write the features and matches of a finished run for hloc, or as a COLMAP database; run.json stays as it is."""
    exports.check(config)
    job, run = Run(config.output, "export-matches"), exports.MatchedRun.open(config)
    with job.step("total"):
        if config.export.hloc is not None:
            exports.to_hloc(config, job, run)
        if config.export.colmap is not None:
            exports.to_colmap(config, job, run)
    job.counts["pairs_left_out"] = run.left_out
    return job


def import_hloc(config: Config) -> Run:
    """Make stores of the features and matches that hloc wrote of a collection; matching.method=imported uses them."""
    imported.check(config)
    sources = HlocFiles.find("hloc.features", config.hloc.features), HlocFiles.find("hloc.matches", config.hloc.matches)
    with run.start(config, "import-hloc") as job:
        sets = open_benchmark(config).sets
        with job.writing(config.features_path):
            store = imported.import_features(config, job, sets, sources[0])
        with job.writing(config.matches_path):
            imported.import_matches(config, job, store, sources[1])
    return job


def plan(config: Config) -> planning.Planned:
    """Say what a collection would take on a cluster, before it is started there; nothing is kept of what is measured.

    Raises `ConfigError` with the plan for one that does not fit.
    """
    return planning.planned(config, register)


def demo(config: Config) -> Run:
    """Render rooms whose overlaps are known, register them and judge the result."""
    images = files.join(config.output, "images")
    rendered.write(images, config.demo.images, config.demo.seed)
    return register(dataclasses.replace(config, images=images, truth=images))


def status(config: Config) -> Status:
    """How far the latest run in the output is, from its receipts: while it runs, and after it died."""
    return Status.read(config.output)


def report(config: Config) -> Run:
    """Write the report of a finished run again, from what lies in its directory."""
    recorded = configuration.load([files.join(config.output, "config.yaml")])
    recorded = dataclasses.replace(recorded, output=config.output, report=config.report)
    job = Run.read(config.output)
    if job.command == "train":
        job.report = write_training_page(recorded, job)
        return job
    found = found_again(recorded, job)
    if "pairs" not in job.counts and not found:
        raise ConfigError(f"the last run in {config.output} was `{job.command}`, which found no pairs: register first")
    job.report = write_page(recorded, job, known_overlaps(recorded, job), **found)
    return job


def export_h5(config: Config) -> Run:
    """Write a store, or the images named of it, as the original's overlap_feats.h5; run.json stays as it is."""
    if config.h5 is None:
        raise ConfigError("export-h5 needs h5=FILE, the file to write")
    job, store = Run(config.output, "export-h5"), EmbeddingStore.open(config.store_path)
    named = any(source is not None for source in (config.images, config.queries, config.database))
    sets = open_image_sets(config) if named else None
    chosen = (sets.names, sets.queries, sets.database) if sets else (None, None, None)
    everything, queries, database = (store.select(names) for names in chosen)
    cameras, places = {}, (sets.root, sets.root.removesuffix("/images")) if sets else ()
    if folder := next((place for place in places if files.exists(files.join(place, CAMERAS))), None):
        posed = PosedFolder.open(folder)
        below = posed.root[len(sets.root) + 1 :]  # names of the store count from the root of the images
        names = (files.join(below, name) if below else name for name in posed.names)
        cameras = dict(zip(names, posed.cameras, strict=True))
    with job.step("total"), job.step("export"), progress("export", len(everything), 0, "images") as bar:
        for written in hdf5.export(everything, config.h5, {"query": queries.names, "db": database.names}, cameras):
            bar.update(written)
    job.counts |= {"h5": config.h5, "exported": len(everything), "cameras": len(cameras.keys() & {*everything.names})}
    return job


def import_h5(config: Config) -> Run:
    """Make a store of a file in that layout; its lists of names go to the run directory, as lists/NAME.txt."""
    if config.h5 is None or config.encoder is not None:
        raise ConfigError("import-h5 needs h5=FILE and takes its descriptors as they are: give no encoder")
    with run.start(config, "import-h5") as job, job.writing(config.store_path), job.step("import"):
        source = hdf5.FeatureFile.open(config.h5, config.embedding.dtype)
        store = source.store(config.store_path)
        done, imported = source.write(store, config.embedding.shard_size, config.embedding.max_bad_fraction)
        for key, names in source.indices.items():
            path = inside(job.path("lists"), f"{key}.txt", config.h5)
            files.write_bytes(path, "".join(f"{name}\n" for name in names).encode())
        job.counts |= catalog.summary(done.images, done) | {"embedded_now": imported, "store": store.path}
        job.quarantined = list(catalog.quarantined(done.images))
    return job
