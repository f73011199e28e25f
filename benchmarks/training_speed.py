"""What keeping the tokens saves in training, and how quickly labels are made from depth, on one machine.

    python benchmarks/training_speed.py --data DIR --work DIR [--backbones xfeat vits14] [--weights FILE] [--rounds 3]

DIR of the data holds images, `cameras.json` and depth (`vop.datasets.posed`). Two parts:

*labels*: pairs/s of one core at 224 pixels, forth and back, with the test of occlusion: of `DepthSupervision` on pairs
as an epoch draws them, once with every depth map read and letterboxed anew (`read`), once with those of the pairs in
memory (`kept`; a worker keeps 256 and takes pairs in the order of their names).

*epoch*: the same steps of the same pairs in turn, on all cores, without Ray: over cached tokens (`TokenReader`: a
memory map), and with the backbone in the loop (`PixelReader`: decode, relight; then the backbone). Both end in the same
`Learner.step`. An epoch is a whole number of such steps, so that the ratio of the medians is that of the epochs; the
share that is the bare forward of the backbone, nothing else, is printed beside it.

Tokens and labels are made by `vop train`; they stay in `--work`. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from vop import config as configuration
from vop.config import Config
from vop.datasets.posed import depth_name
from vop.models.embedder import load_models
from vop.models.encoder import Encoder
from vop.parts import Parts
from vop.store import EmbeddingStore
from vop.training.batches import batch_of
from vop.training.learner import Learner, token_maker
from vop.training.reading import PixelReader, TokenReader
from vop.training.supervision import DepthSupervision
from vop.training.views import image_of

BACKBONES = {"xfeat": "backbone=xfeat", "vits14": "backbone=dinov2_vits14"}
IMAGE = ("width", "height", "scaled_width", "scaled_height")
PAIRS, CACHED = 32, 8  # pairs of a step, as in the recipe; cached steps for one with the backbone
LABELLED = 256  # pairs whose labels are timed


def seconds(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def prepared(data: Path, work: Path, name: str, weights: str | None) -> Config:
    """A training of one epoch, for its tokens and labels."""
    told = [f"images={data}", f"cameras={data}", BACKBONES[name], f"output={work / name}", "train.epochs=1"]
    told += [f"weights={weights}"] if weights and name != "xfeat" else []
    subprocess.run([sys.executable, "-m", "vop.cli", "train", *told], check=True, stdout=subprocess.DEVNULL)
    return configuration.load(overrides=told)


def labels_per_s(config: Config, labels: pa.Table, rounds: int) -> dict[str, float]:
    """Pairs/s of one core."""
    images = {row["name"]: row for row in EmbeddingStore.open(config.tokens_path).live().to_pylist()}
    pairs = []
    for row in labels.slice(0, LABELLED).select(["view0", "view1"]).to_pylist():
        for side in (0, 1):
            name = image_of(row[f"view{side}"])
            row |= {f"{key}{side}": images[name][key] for key in IMAGE}
            row[f"depth{side}"] = str(Path(config.images, depth_name(name)))
        pairs.append(row)
    pairs.sort(key=lambda row: (row["view0"], row["view1"]))
    cameras, train = str(Path(config.output, "cameras.parquet")), config.train
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    times: dict[str, list[float]] = {"read": [], "kept": []}
    kept = pairs[: len(pairs) // 4]  # of so few pairs all maps are still there
    for _ in range(rounds):
        source = DepthSupervision(cameras, config.embedding.image_size, train.occlusion, train.min_pixels)
        times["read"].append(seconds(partial(source.labels, pairs)) / len(pairs))
        source.labels(kept)
        times["kept"].append(seconds(partial(source.labels, kept)) / len(kept))
    torch.set_num_threads(threads)
    return {way: 1 / statistics.median(taken) for way, taken in times.items()}


def steps(config: Config, labels: pa.Table, rounds: int) -> dict[str, float]:
    """Seconds of a step, median, over cached tokens and with the backbone, and of the backbone alone."""
    train = config.train
    width = EmbeddingStore.open(config.tokens_path).manifest["token_width"]
    model, _ = load_models(config)
    rows = labels.slice(0, PAIRS).append_column("epoch", pa.array([0] * PAIRS))
    names = {image_of(name) for side in ("view0", "view1") for name in rows[side].to_pylist()}
    pixels = PixelReader({name: str(Path(config.images, name)) for name in names}, config.embedding.image_size,
                         config.embedding.max_pixels, train.seed)  # fmt: skip
    tokens = TokenReader(config.tokens_path, str(Path(config.output, "cache")))
    cached = Learner(Encoder(width, train.descriptor_dim, train.dropout), train)
    looped = Learner(Encoder(width, train.descriptor_dim, train.dropout), train, backbone=token_maker(model))

    def step(learner: Learner, reader: Callable) -> dict[str, float]:
        return learner.step(batch_of(reader(rows), config.embedding.image_size, train.negatives), 0)

    batch = batch_of(pixels(rows), config.embedding.image_size, train.negatives)
    seen = torch.cat([batch.inputs0, batch.inputs1]), torch.cat([batch.sizes0, batch.sizes1])
    ways = {
        "cached": (CACHED, lambda: step(cached, tokens)),
        "looped": (1, lambda: step(looped, pixels)),
        "forward": (1, lambda: looped.backbone(*seen)),
    }
    for _, work in ways.values():
        work()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (repeats, work) in ways.items():
            times[way] += [seconds(work) for _ in range(repeats)]
    return {way: statistics.median(taken) for way, taken in times.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of a set with depth")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and labels; kept")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["xfeat"])
    parser.add_argument("--weights", help="file of the ViT-S weights")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    record: dict = {"threads": torch.get_num_threads(), "rounds": options.rounds, "pairs_of_a_step": PAIRS}
    for name in options.backbones:
        config = prepared(options.data.resolve(), options.work.resolve(), name, options.weights)
        (parts,) = Parts.all_of(config.output, "labels")
        labels = parts.read_one(1).replace_schema_metadata(None)
        if "labels" not in record:
            record["labels"] = labels_per_s(config, labels, options.rounds)
            print("labels: {read:.0f} pairs/s of a core, {kept:.0f} without reading depth".format(**record["labels"]))
        found = steps(config, labels, options.rounds)
        ratio = found["looped"] / found["cached"]
        record[name] = found | {"ratio": ratio}
        print(
            f"{name}: a step of {PAIRS} pairs takes {1000 * found['cached']:.0f} ms over cached tokens, "
            f"{1000 * found['looped']:.0f} ms with the backbone (its bare forward {1000 * found['forward']:.0f} ms): "
            f"{ratio:.1f} times as long"
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
