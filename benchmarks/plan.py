"""How right `vop plan` is: predicted against measured seconds of `vop embed` and `vop register`, rendered images.

    python benchmarks/plan.py [--images 150 400 1000] [--rounds 3] [--images-dir DIR] [--out FILE] [key=value ...]

Every round measures this machine's rates with `vop plan` on a sample of the images, plans every size with them, and
then runs `vop embed` and `vop register` of every size, each as a user would: the command in a process of its own with
an empty output folder, timed from its start to its end. Nothing of what is timed goes into the rates: those come from
48 images and a job of 16. Printed are medians over the rounds of both, their ratio, and the cores that other work kept
busy: what runs beside makes a job longer, but not the seconds of a core that most rates are, and so the ratio smaller.
Settings (`backbone=...`) hold for all. The last line is one JSON object; --out keeps what each round found as it comes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from embed import CORES, busy_cores, rendered_images

COMMANDS = ("embed", "register")
BOUND = 0.3  # of the measured seconds


def vop(*arguments: str) -> float:
    """Seconds of a command, from the start of its process to its end."""
    command = [sys.executable, "-m", "vop.cli", *arguments]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return seconds


def predicted(folder: Path, sizes: list[int], told: list[str]) -> dict[tuple[str, int], float]:
    """Seconds of both commands at every size, from rates that are measured once."""
    rates, found = folder / "rates.json", {}
    vop("plan", f"images={folder / 'all.txt'}", f"plan.file={rates}", *told)
    for count in sizes:
        out = folder / f"plan-{count}.json"
        vop("plan", f"plan.images={count}", f"plan.rates={rates}", f"plan.file={out}", *told)
        stages = json.loads(out.read_text())["stages"]
        found["embed", count] = stages["start"]["seconds"] + stages["embed"]["seconds"]
        found["register", count] = sum(stage["seconds"] for stage in stages.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="*", help="settings of every command")
    parser.add_argument("--images", type=int, nargs="+", default=[150, 400, 1000], help="sizes of the collection")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images-dir", type=Path, help="where rendered images lie or are put; default: temporary")
    parser.add_argument("--out", type=Path, help="file that every round is appended to")
    options = parser.parse_args()

    planned, took, others = {}, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = rendered_images((options.images_dir or folder / "images").absolute(), max(options.images))
        lists = {count: paths[:count] for count in options.images} | {"all": paths}
        for name, listed in lists.items():
            (folder / f"{name}.txt").write_text("".join(f"{path}\n" for path in listed))
        for turn in range(options.rounds):
            others.append(busy_cores())
            told = predicted(folder, options.images, options.settings)
            for key, seconds in told.items():
                planned.setdefault(key, []).append(seconds)
            for count in options.images:
                for command in COMMANDS:
                    output = folder / f"{command}-{count}-{turn}"
                    asked = f"images={folder / f'{count}.txt'}", f"output={output}", *options.settings
                    took.setdefault((command, count), []).append(vop(command, *asked))
                    line = {"round": turn, "command": command, "images": count, "predicted_s": told[command, count],
                            "measured_s": took[command, count][-1]}  # fmt: skip
                    if options.out:
                        with options.out.open("a") as stream:
                            stream.write(json.dumps(line) + "\n")

    print(f"{CORES} cores, {statistics.median(others):.2f} of them busy with other work; medians of {options.rounds} "
          "rounds, seconds")  # fmt: skip
    print(f"{'command':<10} {'images':>6} {'predicted':>10} {'measured':>9} {'ratio':>6}")
    result = {"cores": CORES, "rounds": options.rounds, "others_busy_cores": round(statistics.median(others), 2)}
    ratios = []
    for command, count in took:
        told, seconds = (statistics.median(of[command, count]) for of in (planned, took))
        ratios.append(told / seconds)
        print(f"{command:<10} {count:>6} {told:>10.1f} {seconds:>9.1f} {ratios[-1]:>6.2f}")
        result[f"{command}{count}"] = {
            "predicted_s": round(told, 1),
            "measured_s": round(seconds, 1),
            "ratio": round(ratios[-1], 3),
        }
    worst = max(abs(ratio - 1) for ratio in ratios)
    result |= {"worst_error": round(worst, 3), "within_30_percent": worst <= BOUND}
    print(f"largest error {worst:.0%}: {'within' if worst <= BOUND else 'NOT within'} {BOUND:.0%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
