"""From matched pairs to models: database.db, the folders of `models`, and how good they are."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import colmap, files, view_graph
from vop.cameras import load_pycolmap
from vop.config import Config, ConfigError
from vop.datasets.layout import Benchmark
from vop.pair_verification import SCHEMA as GEOMETRIES
from vop.pair_verification import PairVerification
from vop.parts import Parts, fingerprint
from vop.pose.alignment import judge
from vop.reconstruction import (
    MADE_BY, MODELS, PART, VERIFIED, DatabaseWriter, Mapper, made_by, models_of, place, write_table,
)  # fmt: skip
from vop.retrieval.graph import components
from vop.run import Run
from vop.stages import reconstruct
from vop.steps.matches import Matched, places

CAMERAS, IMAGES, REGISTERED, SUMMARY = "cameras.parquet", "images.parquet", "registered.parquet", "models.parquet"
IMAGES_AT_ONCE = 64  # whose cameras are looked up by one task
UNKNOWN, NO_PAIRS = "image in quarantine", "no pairs"
UNVERIFIED, DISTRUSTED = "none of its pairs was verified", "its pairs contradict those of others"
ALONE, UNREGISTERED = "too few images hang together with it", "the mapper did not register it"


def check() -> None:
    """Raise `ConfigError` without the COLMAP that all of this needs: at the start, not after the matching."""
    try:
        load_pycolmap()
    except ImportError as error:
        raise ConfigError(f"reconstruct: {error}") from error


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
    if made_by(job.path(VERIFIED)) != inputs:
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
