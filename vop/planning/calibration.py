"""Rates of this machine, measured with the real functions on a few images: decoder, models, writer, votes, catalog.

What runs on all cores of a machine at once (decoding, models) is timed so: cores that share memory and clock are slower
together than one alone.
"""

import os
import time

import numpy as np
import pyarrow as pa
import torch

from vop import files
from vop.config import Config
from vop.embedding import ShardWriter, decode_shard
from vop.models.embedder import THREADS, Embedder, calibrate
from vop.models.whitening import fit_whitening
from vop.planning import catalog_rates, search_rates
from vop.planning.memory import peak_bytes
from vop.planning.rates import SECONDS, Rates, device, settings
from vop.planning.timing import in_turns, line, on_cores
from vop.store import EmbeddingStore, Selection, shard_name

SAMPLE = 48  # images
FEWEST = 8
STRETCH = 8  # images of the sample that follow each other: they see the same, as the candidates of a search do
AT_ONCE = 4  # cores that are measured together, at most: more threads would wait for each other in Python
LONGEST_S = 2.0  # of one round of the models: slow ones are measured on fewer images


def stretches(total: int, count: int = SAMPLE) -> np.ndarray:
    """Positions of up to `count` of `total` images, ascending: stretches of neighbours, evenly spread."""
    if total <= count:
        return np.arange(total)
    starts = np.linspace(0, total - STRETCH, count // STRETCH).round().astype(int)
    return np.unique(starts[:, None] + np.arange(STRETCH))


def measured(config: Config, listing: pa.Table, folder: str) -> Rates:
    """The rates of this machine, all but those that need Ray: `message_s` is 0 and so are the fixed seconds.

    Args:
        config: the settings of the job.
        listing: name, path, scene, size, modified_ns of the sample, sorted by name; at least `FEWEST`.
        folder: an empty local folder.

    Raises `ValueError` if fewer images than that can be read.
    """
    torch.set_num_threads(THREADS)
    count = listing.num_rows
    sample = listing.append_column("shard", pa.array(np.zeros(count, np.int64)))
    made = calibrate(config, sample.slice(0, min(count, 2 * STRETCH)))
    store = EmbeddingStore.create(files.join(folder, "store"), made.features, made.shapes, made.arrays)
    described, embedding = _describing(config, store, sample)
    selection = _stored(store, listing, described)
    if len(selection) < FEWEST:
        raise ValueError(
            f"{len(selection)} of the {count} images of the sample can be read, but rates are measured on {FEWEST} at "
            "least: `vop embed` names what is wrong with each"
        )
    process_bytes = peak_bytes()
    width = made.features["encoder"]["width"] if made.features["encoder"] else made.shapes["token_width"]
    return Rates(
        made_with=settings(config),
        device=device(),
        cores=os.cpu_count(),
        measured_images=count,
        patches=made.shapes["patches"],
        token_width=made.shapes["token_width"],
        width=width,
        global_width=made.shapes["global_width"],
        image_bytes=float(np.mean(listing["size"].to_numpy())),
        **embedding,
        sampled_s=embedding["decode_s"] + embedding["forward_s"] + _whitening(config, made.shapes),
        **_storing(store, described, selection),
        **catalog_rates.measured(config, store, folder),
        **search_rates.shortlist_rates(made.shapes["global_width"], config),
        **search_rates.measured(config, selection, folder),
        message_s=0.0,
        process_bytes=process_bytes,
        fixed_s=dict.fromkeys(SECONDS, 0.0),
    )


def _describing(config: Config, store: EmbeddingStore, sample: pa.Table) -> tuple[pa.Table, dict[str, float]]:
    """The sample described, and what decoding and the models take for an image."""
    embedding, at_once = config.embedding, min(os.cpu_count(), AT_ONCE)
    decode = {"image_size": embedding.image_size, "max_pixels": embedding.max_pixels}
    decoded, embedder = decode_shard(sample, **decode), Embedder(config, store)
    embedder(decoded.slice(0, 1))
    start = time.perf_counter()
    embedder(decoded.slice(0, STRETCH))
    each = (time.perf_counter() - start) / STRETCH
    few = int(np.clip(LONGEST_S / each, 1, min(embedding.batch_size, len(sample))))
    batch = decoded.slice(0, few)
    ways = {"decode_s": on_cores(lambda: decode_shard(sample, **decode), at_once)}
    if device() == "cuda":
        card = in_turns({"forward_s": lambda: embedder(batch)}, clock=time.perf_counter)
        took = in_turns(ways) | {"forward_s": card["forward_s"] * at_once}
    else:
        took = in_turns(ways | {"forward_s": on_cores(lambda: embedder(batch), at_once)})
    return embedder(decoded), {
        "decode_s": took["decode_s"] / (at_once * len(sample)),
        "forward_s": took["forward_s"] / (at_once * few),
    }


def _whitening(config: Config, shapes: dict) -> float:
    """Seconds that the fit of the whitening takes for an image of its sample."""
    if not config.embedding.whiten:
        return 0.0
    few, many = STRETCH // 2, 2 * STRETCH
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((many, shapes["patches"], shapes["token_width"]), dtype=np.float32)
    ways = {n: lambda n=n: fit_whitening(np.concatenate(tokens[:n]), config.embedding.whiten) for n in (few, many)}
    took = in_turns(ways, of_rounds=min)  # BLAS threads wait for each other at work, which counts as work
    return line((few, took[few]), (many, took[many]))[1]


def _stored(store: EmbeddingStore, listing: pa.Table, described: pa.Table) -> Selection:
    """The sample in the store, as a selection. Raises `StoreError` if no image of it can be read."""
    planned, _ = store.plan(listing, listing.num_rows, False, lambda name: None)
    ids = planned.images.select(["image_id", "name"])
    for name, values in (("image_id", ids["image_id"]), ("shard_rows", pa.array([len(ids)] * len(ids)))):
        described = described.append_column(name, values)
    ShardWriter(store)(described.drop_columns(["scene", "size", "modified_ns"]))
    store.finish()
    return store.select()


def _storing(store: EmbeddingStore, described: pa.Table, selection: Selection) -> dict[str, float]:
    """Seconds for a megabyte written and read, and until a disk has a file."""
    good = described.filter(described["error"].is_null())
    good = good.drop_columns(["path", "shard", "error", "scene", "size", "modified_ns"])
    good = good.append_column("image_id", pa.array(np.arange(len(good))))
    took = in_turns({"write": lambda: store.write_shard(1, good, []), "read": selection.read})
    waits = []
    for number in range(8):
        start = time.perf_counter() - time.process_time()
        files.write_bytes(files.join(store.path, f"waiting-{number}"), b"-")
        waits.append(time.perf_counter() - time.process_time() - start)
    megabytes = files.listing(store.path)[f"{shard_name(1)}.parquet"] / 1e6
    rates = {f"{name}_s": seconds / megabytes for name, seconds in took.items()}
    return rates | {"file_s": max(0.0, min(waits))}  # the least: the others waited for what else runs
