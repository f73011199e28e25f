"""Opening what a job judges itself on: a benchmark in its published layout, or a plain folder with known cameras.

`check` says everything that is missing before any work is done; `open_benchmark` raises it as one error.
"""

import dataclasses
import importlib
from types import ModuleType

from vop import files
from vop.config import Config, ConfigError
from vop.datasets.camera_sources import open_cameras as open_cameras
from vop.datasets.image_sets import open_image_sets
from vop.datasets.layout import Benchmark as Benchmark
from vop.datasets.posed import depth_name, overlap_truth
from vop.schema import DatasetConfig

FORMATS = ("aachen", "colmap", "inloc", "megadepth", "phototourism", "pitts30k")  # modules of vop.datasets


def open_benchmark(config: Config) -> Benchmark:
    """Images, cameras and true overlaps of a job.

    With `dataset.format`, from the benchmark's own layout; otherwise the collection that `images`, `queries` and
    `database` name, with the cameras at `cameras`. `cameras` and `truth`, where given, replace the benchmark's own.
    Raises `ConfigError` listing all that is missing, and what the readers raise.
    """
    plain = config.dataset.format is None
    benchmark = _plain(config) if plain else _read(config.dataset)
    if config.cameras is not None:
        cameras = open_cameras(config.cameras, benchmark.sets.root, benchmark.sets.names)
        benchmark = dataclasses.replace(benchmark, cameras=cameras)
    if config.truth is not None:
        benchmark = dataclasses.replace(benchmark, overlaps=lambda: overlap_truth(config.truth))
    return benchmark


def _plain(config: Config) -> Benchmark:
    """Images that the config names; a depth map lies beside each, if there are any."""
    sets = open_image_sets(config)
    return Benchmark(sets, depths=lambda name: files.join(sets.root, depth_name(name)))


def check(dataset: DatasetConfig) -> list[str]:
    """What is missing on the disk for a benchmark to be read, one sentence each; nothing where all is there."""
    adapter = _adapter(dataset.format)
    if dataset.root is None:
        return [f"dataset.root is not given: the folder that {dataset.format} was unpacked into"]
    if not files.exists(dataset.root):
        return [f"nothing at dataset.root={dataset.root}"]
    return adapter.missing(dataset)


def _read(dataset: DatasetConfig) -> Benchmark:
    problems = check(dataset)
    if problems:
        adapter = _adapter(dataset.format)
        raise ConfigError(
            f"{dataset.format} cannot be read:\n"
            + "".join(f"  - {problem}\n" for problem in problems)
            + f"The layout that is expected, and where to get it:\n\n{adapter.__doc__}"
        )
    return _adapter(dataset.format).read(dataset)


def _adapter(name: str) -> ModuleType:
    """The module of a layout: one of `FORMATS`, or one of the user's own by its dotted name."""
    if name in FORMATS:
        return importlib.import_module(f"vop.datasets.{name}")
    if "." not in name:
        raise ConfigError(
            f"dataset.format is {name!r}, but must be one of {', '.join(FORMATS)}, or the dotted name of a module "
            "with functions missing(dataset) and read(dataset), such as my_package.my_layout"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"dataset.format={name} cannot be imported ({error}): is it on PYTHONPATH?") from error
    lacking = [function for function in ("missing", "read") if not callable(getattr(module, function, None))]
    if lacking:
        raise ConfigError(f"dataset.format={name} lacks the functions {', '.join(lacking)}: see docs/datasets.md")
    return module
