"""How query images are localized, and how images become a model."""

from dataclasses import dataclass

from vop.schema.bounds import positive, require

WRITTEN = ("name", "basename", "folder")


@dataclass(frozen=True)
class LocalizeConfig:
    """How the pose of a query follows from its matches with images of known pose."""

    intrinsics: str | None = None
    """Cameras of the queries in hloc's lists (`name MODEL WIDTH HEIGHT PARAMETERS...`): a file, a folder of .txt files
    or a glob pattern; null: those of `cameras` or of the benchmark, else EXIF, else `localize.focal`."""
    exif: bool = True
    """Take the focal length from EXIF where no camera of the query is known; false: `localize.focal` instead."""
    focal: float | None = 1.2
    """Focal length of a query of which nothing is known, in long sides of the image; null: it is not localized."""
    refine_focal: bool = False
    """Refine the focal length of queries together with the pose; of use where it was guessed."""
    map_neighbours: int = 20
    """Database images that each is matched with to triangulate the map: by shared points of the COLMAP model where it
    has any, else by predicted overlap."""
    min_angle: float = 1.5
    """Smallest angle between two rays that a point of the map is triangulated from, degrees."""
    threshold: float = 12.0
    """Largest reprojection error of an inlier, pixels of the query."""
    min_matches: int = 20
    """Pairs of a query with fewer matches take no part."""
    min_inliers: int = 12
    """Poses that fewer correspondences agree with count as failed."""
    covisibility: bool = False
    """Localize against each group of images that share points, and keep the pose with most inliers."""
    iterations: int = 10000
    """Most hypotheses tried per query."""
    confidence: float = 0.99999
    """Probability of having tried one without outliers at which the search for a pose may stop."""
    seed: int = 0
    """Seed of the hypotheses: the same query gives the same pose wherever it is localized."""
    batch: int = 16
    """Queries per part: the unit of work, and of what a kill can cost."""
    written: str | None = None
    """Names in poses.txt: name (from the root of the images), basename, or folder (the last folder and the basename);
    null: as the benchmark's server wants them, elsewhere name."""

    def __post_init__(self):
        require("localize.written", self.written, self.written is None or self.written in WRITTEN,
                "name, basename, folder or null")  # fmt: skip
        require("localize.confidence", self.confidence, 0 < self.confidence < 1, "between 0 and 1")
        require("localize.min_inliers", self.min_inliers, self.min_inliers >= 4, "at least 4")
        require("localize.min_angle", self.min_angle, 0 <= self.min_angle < 90, "from 0 to below 90")
        positive("localize", self, "focal", "map_neighbours", "threshold", "min_matches", "iterations", "batch")


@dataclass(frozen=True)
class ReconstructConfig:
    """How matched pairs become a model."""

    mapper: str = "incremental"
    """incremental or global, the mappers of COLMAP."""
    min_inliers: int = 15
    """Pairs that fewer matches agree with, under one two-view geometry, take no part."""
    consistent: bool = True
    """Leave pairs aside that contradict the others, as look-alikes do."""
    strength: float = 0.25
    """Inliers that a pair must have which no loop of other pairs confirms: this share of those that the less well
    connected of its two images has with its best partner."""
    min_model_size: int = 3
    """Models of fewer images are not kept."""
    threads: int = 1
    """Threads of one mapper; with more than one the last digits of large models differ from run to run."""
    seed: int = 0
    """Seed of the hypotheses of two-view geometries and of the mapper."""

    def __post_init__(self):
        require("reconstruct.mapper", self.mapper, self.mapper in ("incremental", "global"), "incremental or global")
        require("reconstruct.strength", self.strength, 0 <= self.strength <= 1, "from 0 to 1")
        positive("reconstruct", self, "min_inliers", "min_model_size", "threads")
