"""The ranked pairs of a run, the pair list chosen from them, and how right they are."""

import numpy as np
import pyarrow as pa

from vop import files, pairs
from vop.config import Config, ConfigError
from vop.datasets.layout import Benchmark
from vop.datasets.posed import OverlapTruth
from vop.datasets.positions import read_positions
from vop.evaluation import evaluate
from vop.foreign_hloc import GlobalDescriptors, HlocFiles
from vop.parts import Parts
from vop.retrieval import graph
from vop.retrieval.reuse import KEPT_IN, RECORD
from vop.retrieval.search import Search, choose_radius, shared_scenes
from vop.run import Run
from vop.stages.search import search_shards
from vop.steps import embeddings
from vop.store import Selection

GLOBALS = "retrieval.global_descriptors"


def check(config: Config) -> None:
    """Raise `ConfigError` for settings that no search can be made with."""
    if not config.embedding.patches:
        raise ConfigError("images are searched by their patches, which embedding.patches=false leaves out")
    if config.retrieval.global_descriptors is not None:
        HlocFiles.find(GLOBALS, config.retrieval.global_descriptors)  # before images are embedded


def paired(config: Config, job: Run, queries: Selection, database: Selection) -> None:
    """pairs.parquet and pairs.txt: per query the best database images; finished parts are not searched again."""
    database.store.with_patches()
    near = _near(config, job, database)  # before the search, so that positions that are missing are missed in time
    with job.step("radius"):
        radius = choose_radius(database, config.retrieval)
    search = Search(queries, database, config.retrieval, radius, _globals(config, job, queries, database))
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


def _globals(config: Config, job: Run, queries: Selection, database: Selection) -> GlobalDescriptors | None:
    """The descriptors that make the shortlist, if others than those of the backbone are asked for."""
    if config.retrieval.global_descriptors is None:
        return None
    with job.step("global descriptors"):
        names = sorted({*queries.names, *database.names})
        return GlobalDescriptors.open(GLOBALS, config.retrieval.global_descriptors, names)


def _searched(config: Config, job: Run, search: Search, parts: Parts, kept: Parts) -> None:
    """The missing parts of a search: ranked pairs, and the votes behind them for a later search to take up."""
    missing = parts.missing(search.n_batches)
    reuse = search.reuse(config.output, missing)
    if config.retrieval.keep_votes:
        files.write_json(files.join(kept.path, RECORD), search.record())
    line = job.progress("search", len(search.queries), search.queries_without(missing), "queries")
    with line as bar, search_shards(search, reuse, job.id) as shards:
        for answer in shards.rank(missing):
            if config.retrieval.keep_votes:
                kept.write(answer.number, answer.kept)
            parts.write(answer.number, answer.ranked)
            bar.note(shards.lag)
            bar.update(search.queries_in(answer.number))
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


def evaluated(config: Config, job: Run, queries: Selection, database: Selection, truth: OverlapTruth | None) -> None:
    """Precision and recall of the ranking into the run's metrics, where the overlaps are known."""
    if truth is not None:
        with job.step("evaluate"):
            path = job.path("pairs.parquet")
            job.metrics |= evaluate(path, truth, config.min_overlap, queries.names, database.names)


def listed(config: Config, job: Run, benchmark: Benchmark) -> pa.Table:
    """The pairs to match (query, database, rank): those given, else the benchmark's own, else ranked here and now."""
    if config.pair_list is not None:
        return pairs.read_given(config.pair_list)
    if benchmark.pairs is not None:
        query, database = zip(*benchmark.pairs, strict=True)
        return pairs.ranked(pa.table({"query": query, "database": database}))
    check(config)
    sets = benchmark.sets
    store = embeddings.embedded(config, job, sets)
    queries = database = store.select(sets.queries)
    if sets.database != sets.queries:
        database = store.select(sets.database)
    paired(config, job, queries, database)
    evaluated(config, job, queries, database, benchmark.truth)
    chosen = job.path("pair_list.parquet")
    return pairs.read_given(chosen if files.exists(chosen) else job.path("pairs.parquet"))
