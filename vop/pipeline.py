"""The flow, on one page: every function names the artefacts and calls the steps."""

import dataclasses

import numpy as np
import pyarrow as pa

from vop import catalog, files, hdf5, pairs, run
from vop import config as configuration
from vop.config import Config, ConfigError
from vop.datasets import rendered
from vop.datasets.image_sets import ImageSets, open_image_sets, read_names
from vop.datasets.posed import CAMERAS, PosedFolder, overlap_truth
from vop.datasets.positions import read_positions
from vop.embedding import hash_file
from vop.evaluation import evaluate
from vop.parts import Parts
from vop.progress import progress
from vop.retrieval import graph
from vop.retrieval.reuse import KEPT_IN, RECORD
from vop.retrieval.search import Search, choose_radius, shared_scenes
from vop.run import Run
from vop.stages import cluster
from vop.stages.embed import calibration, embed_shards
from vop.stages.search import search_shards
from vop.store import EmbeddingStore, Selection
from vop.viz.page import write_page


def embed(config: Config) -> Run:
    """Bring the store up to date with the collection: new and changed images are embedded, nothing twice."""
    with run.start(config, "embed") as job, cluster.connect(config.cluster):
        _embedded(config, job, open_image_sets(config))
    return job


def register(config: Config) -> Run:
    """Pair every image of a collection, or of a store that has no images at hand, with those that see the same."""
    if config.images is None and not EmbeddingStore.exists(config.store_path):
        raise ConfigError("register needs images=FOLDER (or a glob pattern, or a list file), or the store=DIR of a run")
    with run.start(config, "register") as job, cluster.connect(config.cluster):
        if config.images is None:
            everything = _as_stored(config, job).select()
        else:
            sets = open_image_sets(config)
            everything = _embedded(config, job, sets).select(sets.names)
        _paired(config, job, everything, everything)
        _judged(config, job, everything, everything)
    return job


def retrieve(config: Config) -> Run:
    """Rank the database images of every query by predicted overlap."""
    if config.queries is None or (config.database is None and config.images is None):
        raise ConfigError("retrieve needs queries=FOLDER and database=FOLDER (folders, glob patterns or list files)")
    if config.pairs.chosen:
        raise ConfigError("pairs.* chooses among the pairs of one collection: use it with register, here retrieval.k")
    with run.start(config, "retrieve") as job, cluster.connect(config.cluster):
        if config.images is None and EmbeddingStore.is_imported(config.store_path):
            store, names = _as_stored(config, job), map(read_names, (config.queries, config.database))
        else:
            sets = open_image_sets(config)
            store, names = _embedded(config, job, sets), (sets.queries, sets.database)
        queries, database = map(store.select, names)
        _paired(config, job, queries, database)
        _judged(config, job, queries, database)
    return job


def demo(config: Config) -> Run:
    """Render rooms whose overlaps are known, register them and judge the result."""
    images = files.join(config.output, "images")
    rendered.write(images, config.demo.images, config.demo.seed)
    return register(dataclasses.replace(config, images=images, truth=images))


def report(config: Config) -> Run:
    """Write the report of a finished run again, from what lies in its directory."""
    recorded = configuration.load([files.join(config.output, "config.yaml")])
    recorded = dataclasses.replace(recorded, output=config.output, report=config.report)
    job = Run.read(config.output)
    if "pairs" not in job.counts:
        raise ConfigError(f"the last run in {config.output} was `{job.command}`, which found no pairs: register first")
    job.report = write_page(recorded, job, None if recorded.truth is None else overlap_truth(recorded.truth))
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
    with run.start(config, "import-h5") as job, job.step("import"):
        source = hdf5.FeatureFile.open(config.h5, config.embedding.dtype)
        store = source.store(config.store_path)
        done, imported = source.write(store, config.embedding.shard_size, config.embedding.max_bad_fraction)
        for key, names in source.indices.items():
            files.write_bytes(job.path(f"lists/{key}.txt"), "".join(f"{name}\n" for name in names).encode())
        job.counts |= catalog.summary(done.images, done) | {"embedded_now": imported, "store": store.path}
        job.quarantined = list(catalog.quarantined(done.images))
    return job


def _embedded(config: Config, job: Run, sets: ImageSets) -> EmbeddingStore:
    """The store with every image of the collection embedded or quarantined."""
    listing = sets.listing()
    with job.step("load models"):
        store = _opened(config, listing)
    with job.step("plan"):
        paths = dict(zip(sets.names, listing["path"].to_pylist(), strict=True))
        planned, pending = store.plan(
            listing, config.embedding.shard_size, config.embedding.prune, lambda name: hash_file(paths[name])
        )
        guard = catalog.BadImages(planned.images, store.receipts(), config.embedding.max_bad_fraction)
    total = planned.images.num_rows
    waiting = sum(shard.num_rows for shard in pending.values())
    with job.step("embed"), progress("embed", total, total - waiting, "images") as bar:
        guard.add(0)
        located = {number: catalog.located(shard, paths, sets.root) for number, shard in pending.items()}
        for written in embed_shards(config, store, located):
            bar.update(written["ok"] + written["quarantined"])
            guard.add(written["quarantined"])
    with job.step("finish store"):
        images = store.finish()
    job.counts |= catalog.summary(images, planned) | {"embedded_now": waiting, "skipped": sets.skipped}
    job.counts |= {"root": sets.root, "store": store.path}
    job.quarantined = list(catalog.quarantined(images))
    return store


def _as_stored(config: Config, job: Run) -> EmbeddingStore:
    """A store as it is, without a look at images: imported, or of photographs that lie elsewhere."""
    store = EmbeddingStore.open(config.store_path)
    images = store.images()
    job.counts |= catalog.summary(images, catalog.Plan(images, 0, 0, [])) | {"embedded_now": 0, "skipped": {}}
    job.counts |= {"root": "", "store": store.path}
    job.quarantined = list(catalog.quarantined(images))
    return store


def _opened(config: Config, listing: pa.Table) -> EmbeddingStore:
    """The store of a config: the one at its path if it was made with the same features, else a new one."""
    if EmbeddingStore.exists(config.store_path):
        store = EmbeddingStore.open(config.store_path)
        store.check_features(calibration(config, None).features)
        return store
    made = calibration(config, catalog.sample(listing, config.embedding.sample))
    return EmbeddingStore.create(config.store_path, made.features, made.shapes, made.arrays)


def _paired(config: Config, job: Run, queries: Selection, database: Selection) -> None:
    """pairs.parquet and pairs.txt: per query the best database images; finished parts are not searched again."""
    near = _near(config, job, database)  # before the search, so that positions that are missing are missed in time
    with job.step("radius"):
        radius = choose_radius(database, config.retrieval)
    search = Search(queries, database, config.retrieval, radius)
    fingerprint = search.fingerprint()
    parts, kept = Parts(config.output, fingerprint), Parts(config.output, fingerprint, KEPT_IN)
    missing = [] if pairs.written(config.output) == fingerprint else parts.missing(search.n_batches)
    if missing:
        _searched(config, job, search, parts, kept)
    with job.step("write pairs"):
        if pairs.written(config.output) != fingerprint:
            pairs.write(config.output, fingerprint, lambda: parts.read(search.n_batches))
        parts.remove()
        kept.remove(but_these=config.retrieval.keep_votes)
        for stale in ("pair_list.parquet", "scenes.parquet"):  # of another run in the same directory
            files.remove(job.path(stale))
        listed = _listed(config, job, database, near) if queries is database else "pairs.parquet"
        job.counts |= pairs.finish(config.output, {*queries.names, *database.names}, listed)
    job.counts |= {"queries": len(queries), "database": len(database), "radius": radius}
    job.counts["searched_now"] = len(queries) - search.queries_without(missing)


def _searched(config: Config, job: Run, search: Search, parts: Parts, kept: Parts) -> None:
    """The missing parts of a search: ranked pairs, and the votes behind them for a later search to take up."""
    missing = parts.missing(search.n_batches)
    reuse = search.reuse(config.output, missing)
    if config.retrieval.keep_votes:
        files.write_json(files.join(kept.path, RECORD), search.record())
    bar = progress("search", len(search.queries), search.queries_without(missing), "queries")
    with job.step("search"), search_shards(search, reuse) as shards, bar as line:
        for answer in shards.rank(missing):
            if config.retrieval.keep_votes:
                kept.write(answer.number, answer.kept)
            parts.write(answer.number, answer.ranked)
            line.set_postfix_str(shards.lag, refresh=False)
            line.update(search.queries_in(answer.number))
    job.counts |= shards.summary()


def _near(config: Config, job: Run, images: Selection) -> dict[str, np.ndarray]:
    """Pairs that are listed whatever their score, by `graph.choose`'s names: in sequence and near by position."""
    near, asked = {}, config.pairs
    if asked.sequence is not None:
        near["sequence"] = graph.sequence(images.names, asked.sequence)
    if asked.neighbours is not None:
        with job.step("positions"):
            positions = read_positions(config.positions, job.counts["root"], images.names)
        job.counts["positions"] = int(np.isfinite(positions).all(axis=1).sum())
        scenes = shared_scenes(images, images)[0] if config.retrieval.within_scene else None
        near["neighbours"] = graph.neighbours(positions, asked.neighbours, asked.neighbour_distance_m, scenes)
    return near


def _listed(config: Config, job: Run, images: Selection, near: dict[str, np.ndarray]) -> str:
    """scenes.parquet and, if pairs are to be chosen, pair_list.parquet; returns which file holds the pair list."""
    asked, names, listed = config.pairs, images.names, "pairs.parquet"
    if asked.chosen:
        found = graph.undirected(*pairs.read_rows(job.path(listed), names))
        chosen = graph.choose(found, len(images), asked.budget, asked.mutual, asked.connect, **near)
        listed, edges = "pair_list.parquet", [(chosen.pairs.low, chosen.pairs.high)]
        pairs.write_list(job.path(listed), names, *edges[0], chosen.pairs.score, chosen.source)
        job.counts["pair_list"] = {"pairs": len(chosen.pairs), "to_connect": chosen.forest} | chosen.counts()
    else:
        edges = ((query, database) for query, database, _ in pairs.iterate_rows(job.path(listed), names))
    component, sizes = graph.components(edges, len(images))
    pairs.write_scenes(job.path("scenes.parquet"), names, component, sizes)
    sizes = sizes.tolist()
    job.counts |= {"components": len(sizes), "largest_component": sizes[0], "singletons": sizes.count(1)}
    return listed


def _judged(config: Config, job: Run, queries: Selection, database: Selection) -> None:
    """metrics.json where the truth is known, and report.html."""
    with job.step("evaluate and report"):
        for stale in ("metrics.json", "report.html"):  # of another run in the same directory
            files.remove(job.path(stale))
        truth = None if config.truth is None else overlap_truth(config.truth)
        if truth is not None:
            job.metrics = evaluate(job.path("pairs.parquet"), truth, config.min_overlap, queries.names, database.names)
        if config.report.queries:
            job.report = write_page(config, job, truth)
