"""Speed and peak memory of `vop embed`, against the plain loop that a careful person would write instead.

    python benchmarks/embed.py [--images 1000] [--vits WEIGHTS] [--vits-images 160] [--rounds 3] [--images-dir DIR]

The pipeline is all of `vop embed`: listing, plan, decoding tasks, model replicas, Parquet and receipts, catalog. The
loop has one thread that decodes batches ahead, the model on all cores, and one thread that writes Parquet; no
receipts, no resume, no quarantine. Both read the same rendered JPEG files (320x240, named DIR/*.jpg) and the same
calibrated store, use the same functions to decode and to describe, and write the same columns: the first round
compares them.

Start-up is excluded from the rate, by the same rule for both: a measurement is a process of its own, which embeds one
image per core (cold: that time, from the start of the process, is the start-up reported), one image per core again,
all images, and one image per core once more. What all images take longer than the mean of the two warm small runs is
their time. Every such run loads its models anew, so that loading is in none of the rates.

ViT-S is too slow on CPUs to embed 1,000 images often: it takes `--vits-images`, cut into as many shards as 1,000 images
are by default. Rates and ratios are medians of rounds in which the two take turns. Peak memory is the largest sum of
the proportional set sizes (shared memory counted once) over all processes, sampled in the first, untimed round (Linux).
The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
VITS = Path(__file__).resolve().parents[2] / "shared" / "weights" / "dinov2_vits14_finetuned.safetensors"
AHEAD = 8  # batches the loop decodes ahead
SAMPLING_S = 0.2


def configuration(folder: Path, backbone: str, weights: str | None, names: list[str], output: str, shard_size: int):
    """The config that embeds these files into `output`, whose store has the calibration of all files."""
    from vop import config

    listed = folder / f"{output}.txt"
    listed.write_text("".join(f"{name}\n" for name in names))
    embedding = {"shard_size": shard_size}
    out = folder / output
    return config.load(images=str(listed), output=str(out), backbone=backbone, weights=weights, embedding=embedding)


def empty_store(calibrated: Path, config):
    """A new store with the models and the calibration of another."""
    from vop.store import EmbeddingStore

    made = EmbeddingStore.open(str(calibrated))
    shutil.rmtree(config.output, ignore_errors=True)
    return EmbeddingStore.create(
        config.store_path,
        made.manifest["features"],
        {key: made.manifest[key] for key in ("patches", "width", "global_width", "token_width", "dtype", "precision")},
        made.calibration(),
    )


def calibrated_store(config) -> None:
    """Estimate on a sample of the files what the models need; once, for both ways."""
    from vop import catalog
    from vop.datasets.image_sets import open_image_sets
    from vop.models.embedder import calibrate
    from vop.store import EmbeddingStore

    made = calibrate(config, catalog.sample(open_image_sets(config).listing(), config.embedding.sample))
    EmbeddingStore.create(config.store_path, made.features, made.shapes, made.arrays)


def run_pipeline(config, calibrated: Path) -> None:
    """`vop embed`."""
    from vop import pipeline

    empty_store(calibrated, config)
    pipeline.embed(config)


def run_loop(config, calibrated: Path) -> None:
    """The plain loop."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from vop.embedding import decode_shard
    from vop.models.embedder import build_describer
    from vop.store import shard_name, tensor_column, tensor_values

    store = empty_store(calibrated, config)
    torch.set_num_threads(CORES)
    describer = build_describer(config, store.calibration())
    embedding, size = config.embedding, config.embedding.batch_size
    paths = Path(config.images).read_text().split("\n")[:-1]
    files = pa.table({"image_id": range(len(paths)), "name": [Path(path).name for path in paths], "path": paths})
    shards = [files.slice(at, embedding.shard_size) for at in range(0, len(paths), embedding.shard_size)]
    batches = (shard.slice(at, size) for shard in shards for at in range(0, len(shard), size))

    def write(number: int, described: list[pa.Table]) -> None:
        path = Path(store.path) / f"{shard_name(number)}.parquet"
        table = pa.concat_tables(described)
        pq.write_table(table, path, use_dictionary=False, write_statistics=False, compression="none")

    with ThreadPoolExecutor(1) as decoder, ThreadPoolExecutor(1) as writer:
        ahead, writes = deque(), deque()

        def read_ahead() -> None:
            for batch in batches:
                ahead.append(decoder.submit(decode_shard, batch, embedding.image_size, embedding.max_pixels))
                if len(ahead) >= AHEAD:
                    return

        for number, shard in enumerate(shards):
            described = []
            for _ in range(0, len(shard), size):
                read_ahead()
                decoded = ahead.popleft().result()
                scaled = np.stack([decoded["scaled_width"].to_numpy(), decoded["scaled_height"].to_numpy()], axis=1)
                patches, globals_ = describer(tensor_values(decoded["pixels"]), scaled)
                decoded = decoded.drop_columns(["pixels", "path", "error"])
                for name, values in (("global", globals_), ("patches", patches)):
                    decoded = decoded.append_column(name, tensor_column(values.astype(embedding.dtype)))
                described.append(decoded)
            writes.append(writer.submit(write, number, described))
            if len(writes) > 1:
                writes.popleft().result()  # a slow disk must not fill the memory
        for write_ in writes:
            write_.result()


def measure(way: str, small, full, calibrated: Path, answer) -> None:
    """One measurement, in its own process; sends (seconds of the cold run, [seconds of the three warm runs])."""
    began = time.monotonic()
    if way == "pipeline":
        from vop.stages import cluster

        run, ray = run_pipeline, cluster.connect(small.cluster)
    else:
        import contextlib

        run, ray = run_loop, contextlib.nullcontext()
    with ray:
        run(small, calibrated)
        cold, warm = time.monotonic() - began, []
        for config in (small, full, small):
            start = time.monotonic()
            run(config, calibrated)
            warm.append(time.monotonic() - start)
    answer.send((cold, warm))


def process_tree(root: int) -> list[int]:
    """Ids of a process and of all its descendants."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def memory_mb(process: int) -> float:
    """Proportional set size, MB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().split("\n")
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


class PeakMemory(threading.Thread):
    """Watches a process and its descendants; `peak` is in MB."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self.process, self.peak, self.done = process, 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(SAMPLING_S):
            self.peak = max(self.peak, sum(map(memory_mb, process_tree(self.process))))


def in_process(function, *arguments, memory: bool = False):
    """What `function` sends to its last argument, run in a process of its own; with its peak memory in MB or None."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*arguments, send))
    process.start()
    send.close()
    watch = PeakMemory(process.pid)
    if memory:
        watch.start()
    try:
        answer = receive.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments[:1]} failed; the reason stands above") from None
    finally:
        watch.done.set()
        process.join()
    return answer, watch.peak


def rendered_images(folder: Path, count: int) -> list[str]:
    """Paths of rendered images; those that are missing are rendered."""
    from vop import files
    from vop.datasets import rendered
    from vop.image import to_jpeg

    scene, paths = rendered.scene_for(count), []
    for index in range(count):
        path = folder / f"{index:04d}.jpg"
        if not path.exists():
            files.write_bytes(path, to_jpeg(rendered.render_frame(scene, index).image, rendered.QUALITY))
        paths.append(str(path))
    return paths


def calibrate_once(config, answer) -> None:
    start = time.monotonic()
    calibrated_store(config)
    answer.send(time.monotonic() - start)


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that the machine's other processes keep busy, while this one sleeps."""

    def busy() -> int:
        ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4]

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / seconds


def compare_outputs(one: Path, other: Path) -> float:
    """Largest difference of a descriptor between two stores, which must otherwise hold the same rows."""
    import numpy as np
    import pyarrow.parquet as pq

    from vop.store import tensor_values

    largest, names = 0.0, sorted(path.name for path in one.glob("shard-*.parquet"))
    assert names and names == sorted(path.name for path in other.glob("shard-*.parquet"))
    for name in names:
        a, b = pq.read_table(one / name), pq.read_table(other / name)
        rest = ["name", "content", "width", "height", "scaled_width", "scaled_height"]
        assert a.select(rest).equals(b.select(rest)), name
        for column in ("global", "patches"):
            x, y = tensor_values(a[column]).astype(np.float32), tensor_values(b[column]).astype(np.float32)
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-3, err_msg=f"{name}: {column}")  # float16 rounding
            largest = max(largest, float(np.abs(x - y).max()))
    return largest


def benchmark(folder: Path, backbone: str, weights: str | None, files: list[str], rounds: int) -> dict:
    """All rounds of one backbone."""
    shard_size = min(128, max(16, -(-len(files) // 8)))
    calibrated = folder / f"{backbone}-calibrated"
    everything = configuration(folder, backbone, weights, files, calibrated.name, shard_size)
    calibration_s, _ = in_process(calibrate_once, everything)
    configs = {
        way: (configuration(folder, backbone, weights, files[:CORES], f"{backbone}-{way}-small", 1),
              configuration(folder, backbone, weights, files, f"{backbone}-{way}", shard_size))
        for way in ("pipeline", "loop")
    }  # fmt: skip
    rates, startups, peaks, others = ({way: [] for way in configs} for _ in range(4))
    for turn in range(rounds + 1):
        for way, (small, full) in configs.items():
            if turn:
                others[way].append(busy_cores())
            (cold, (first, seconds, last)), peak = in_process(
                measure, way, small, full, calibrated / "store", memory=not turn
            )
            if turn:
                rates[way].append((len(files) - CORES) / (seconds - (first + last) / 2))
                startups[way].append(cold)
            else:
                peaks[way] = peak
        if not turn:
            stores = (Path(full.store_path) for _, full in configs.values())
            difference = compare_outputs(*stores)
    result = {
        "images": len(files),
        "shard_size": shard_size,
        "ratio": round(statistics.median(a / b for a, b in zip(*rates.values(), strict=True)), 3),
        "largest_difference": difference,
        "calibration_s": round(calibration_s, 1),
    }
    for way in configs:
        result[way] = {
            "images_per_s": round(statistics.median(rates[way]), 2),
            "rounds": [round(rate, 2) for rate in rates[way]],
            "start_up_s": round(statistics.median(startups[way]), 1),
            "peak_mb": round(peaks[way]),
            "others_busy_cores": round(statistics.median(others[way]), 2),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="images for xfeat; 0: leave it out")
    parser.add_argument("--vits", type=Path, default=VITS, help="weights of dinov2_vits14")
    parser.add_argument("--vits-images", type=int, default=160, help="images for ViT-S; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images-dir", type=Path, help="where rendered images lie or are put; default: temporary")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = (options.images_dir or folder / "images").absolute()
        files = rendered_images(images, max(options.images, options.vits_images))
        chosen = [("xfeat", None, options.images)]
        if options.vits.exists():
            chosen.append(("dinov2_vits14", str(options.vits), options.vits_images))
        else:
            print(f"dinov2_vits14 is left out: there is no file {options.vits} (give --vits)")
        print(f"{CORES} cores; medians of {options.rounds} rounds in turn")
        print(f"{'backbone':<14} {'images':>6} {'':<9} {'images/s':>9} {'start-up s':>11} {'peak MB':>8} {'others':>7}")
        result = {"cores": CORES, "rounds": options.rounds}
        for backbone, weights, number in chosen:
            if number:
                result[backbone] = line = benchmark(folder, backbone, weights, files[:number], options.rounds)
                for way in ("pipeline", "loop"):
                    row = line[way]
                    print(
                        f"{backbone:<14} {number:>6} {way:<9} {row['images_per_s']:>9.2f} {row['start_up_s']:>11.1f} "
                        f"{row['peak_mb']:>8} {row['others_busy_cores']:>7.2f}"
                    )
                print(f"{'':<14} {'':>6} pipeline / loop = {line['ratio']:.3f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
