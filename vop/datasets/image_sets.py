"""What a job works on: all its images under one root, and which of them are queries and which the database."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from vop import files
from vop.config import Config, ConfigError
from vop.datasets.folder import Collection, ImageFile, below, common_folder, list_images


@dataclass(frozen=True)
class ImageSets:
    """Images by name, sorted; `queries` and `database` are names. `skipped` counts files left out, by reason."""

    root: str
    images: tuple[ImageFile, ...]
    queries: tuple[str, ...]
    database: tuple[str, ...]
    skipped: dict[str, int]

    @cached_property
    def names(self) -> list[str]:
        """Names of all images."""
        return [image.name for image in self.images]

    def listing(self) -> pa.Table:
        """name, path, scene, size, modified_ns of every image."""
        columns = ("name", "path", "scene", "size", "modified_ns")
        return pa.table({column: [getattr(image, column) for image in self.images] for column in columns})


def open_image_sets(config: Config) -> ImageSets:
    """List the images that `images`, `queries` and `database` of a config name.

    Without queries or database, that set is every image. Names are relative to `root`; without it to the root of
    `images`, and without these to the deepest folder that holds both sets, as hloc has it. Raises `ConfigError` if too
    little is named, and what `list_images` raises.
    """
    if config.images is None and (config.queries is None or config.database is None):
        raise ConfigError("no images: give images=FOLDER, or queries=FOLDER and database=FOLDER")
    everything = None if config.images is None else list_images(config.images, config.root)
    root = everything.root if everything else config.root
    queries, database = (
        everything if source is None else list_images(source, root) for source in (config.queries, config.database)
    )
    return _merged(root or common_folder([queries.root, database.root]), everything, queries, database)


def _merged(root: str, everything: Collection | None, queries: Collection, database: Collection) -> ImageSets:
    queries, database = below(queries, root), below(database, root)
    parts = [part for part in (everything, queries, database) if part is not None]
    images = {image.name: image for part in parts for image in part.images}
    skipped: Counter[str] = Counter()
    for part in parts if everything is None else [everything]:
        skipped.update(part.skipped)
    names = (tuple(image.name for image in part.images) for part in (queries, database))
    return ImageSets(root, tuple(images[name] for name in sorted(images)), *names, dict(skipped))


def read_names(path: str) -> list[str]:
    """The names in a list file, one per line, as a store knows them; no file of that name is looked for."""
    lines = files.read_bytes(path).decode().splitlines()
    return [line.strip() for line in lines if line.strip()]
