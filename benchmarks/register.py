"""Time and peak memory of `vop register` as the collection grows: rendered images, defaults of every setting.

    python benchmarks/register.py [--images 100 200 400] [--rounds 3]

Every run is the command itself, in a process of its own with an empty output folder: it starts Ray, calibrates, embeds,
searches, writes the pairs and the report. The sizes take turns. Seconds are medians, in total (from the start of the
process to its end) and of the steps that run.json records. Peak memory is that of all processes of the command (see
`embed.py`), in the first round, which is not timed (Linux). The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from embed import CORES, PeakMemory, busy_cores, rendered_images

STEPS = {"load models": "calibrate", "embed": "embed", "search": "search", "report": "report"}


def register(images: list[str], output: Path, memory: bool) -> dict[str, float]:
    """Run the command once; returns its seconds by step, `total` among them, or its peak memory as `peak_mb`."""
    output.mkdir(parents=True)
    listed = output / "images.txt"
    listed.write_text("".join(f"{image}\n" for image in images))
    command = [sys.executable, "-m", "vop.cli", "register", f"images={listed}", f"output={output}"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watch = PeakMemory(process.pid)
    if memory:
        watch.start()
    _, complaint = process.communicate()
    seconds = time.monotonic() - start
    watch.done.set()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{complaint}")
    if memory:
        return {"peak_mb": watch.peak}
    timings = json.loads((output / "run.json").read_text())["timings_s"]
    return {"total": seconds} | {name: timings[step] for step, name in STEPS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100, 200, 400], help="sizes of the collection")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    runs, others = {count: [] for count in options.images}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = {count: rendered_images(folder / f"images-{count}", count) for count in options.images}
        for turn in range(options.rounds + 1):
            others.append(busy_cores())
            for count in options.images:
                runs[count].append(register(images[count], folder / f"run-{turn}-{count}", memory=not turn))

    names = ["total", *STEPS.values()]
    print(f"{CORES} cores, {statistics.median(others):.2f} of them busy with other work; median of {options.rounds} "
          "rounds, seconds")  # fmt: skip
    print(f"{'images':>6} " + " ".join(f"{name:>9}" for name in names) + f" {'peak MB':>8}")
    result = {"cores": CORES, "rounds": options.rounds, "others_busy_cores": round(statistics.median(others), 2)}
    for count, (first, *timed) in runs.items():
        seconds = {name: round(statistics.median(run[name] for run in timed), 1) for name in names}
        line = " ".join(f"{seconds[name]:>9.1f}" for name in names)
        print(f"{count:>6} {line} {first['peak_mb']:>8.0f}")
        result[f"n{count}"] = {f"{name}_s": value for name, value in seconds.items()} | {
            "peak_mb": round(first["peak_mb"])
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
