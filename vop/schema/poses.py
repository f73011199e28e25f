"""How pairs are matched, posed and exported."""

from dataclasses import dataclass, field

from vop.schema.bounds import positive, require

IMPORTED = "imported"  # a method that computes nothing: stores hold what was imported


@dataclass(frozen=True)
class MatchingConfig:
    """How local features are found and matched. What changes them is written into the manifests of their stores."""

    method: str = "xfeat+lighterglue"
    """xfeat+lighterglue, aliked+lightglue, disk+lightglue, superpoint+lightglue (weights for non-commercial use only),
    sift+nn, hloc:FEATURES+MATCHER, by the names of hloc's configurations, or imported: what import-hloc put into the
    stores `features` and `matches`."""
    max_keypoints: int = 2048
    """Keypoints kept per image, the best by score."""
    resize: int | None = 1024
    """Long side to which larger images are reduced before features are found, pixels; null: as they are."""
    precision: str | None = None
    """float32, bfloat16 or float16; null: float16 on a GPU, float32 on a CPU."""
    batch_pairs: int = 8
    """Pairs matched in one forward pass."""
    shard_size: int = 32
    """Images per shard of features, at most: the unit of work, and of what a kill can cost."""
    pair_shard_size: int = 128
    """Pairs per shard of matches, at most, likewise."""
    extractors: int | None = None
    """Feature networks at work; null: one per GPU, without GPUs one per CPU core."""
    matchers: int | None = None
    """Matchers at work; null: one per GPU, without GPUs one per CPU core."""
    gpus_per_worker: float | None = None
    """GPU share of an extractor and of a matcher; null: 1 where the cluster has GPUs, 0 where it has none."""
    cache_gb: float = 0.5
    """Features that a matcher keeps in memory for pairs to come, GB."""

    def __post_init__(self):
        require("matching.precision", self.precision, self.precision in (None, "float32", "bfloat16", "float16"),
                 "float32, bfloat16, float16 or null")  # fmt: skip
        require("matching.gpus_per_worker", self.gpus_per_worker,
                 self.gpus_per_worker is None or self.gpus_per_worker >= 0, "0, positive or null")  # fmt: skip
        require("matching.cache_gb", self.cache_gb, self.cache_gb >= 0, "0 or positive")
        positive("matching", self, "max_keypoints", "resize", "batch_pairs", "shard_size", "pair_shard_size",
                  "extractors", "matchers")  # fmt: skip


@dataclass(frozen=True)
class PoseConfig:
    """How relative poses are estimated from matches, and by which protocol they are judged."""

    estimators: list[str] = field(default_factory=lambda: ["opencv"])
    """opencv (USAC_MAGSAC), opencv_ransac, poselib, pycolmap; the first is the one of the headline."""
    threshold: float = 1.5
    """Largest distance of an inlier to its epipolar line under the protocol `fixed`, pixels of the original image."""
    thresholds: list[float] = field(default_factory=lambda: [0.5, 1.5, 2.0, 3.0])
    """Thresholds among which the protocol `paper` chooses the best on the test set; empty: without it."""
    ks: list[int] = field(default_factory=lambda: [1, 5])
    """A query is judged by the pair with most inliers among so many of its first; all listed ones are judged too."""
    iterations: int = 10000
    """Most hypotheses tried per pair."""
    confidence: float = 0.99999
    """Probability of having tried one without outliers at which an estimator may stop."""
    seed: int = 0
    """Seed of the hypotheses: the same pair gives the same pose wherever it is estimated."""

    def __post_init__(self):
        require("pose.estimators", self.estimators, bool(self.estimators), "a list of at least one")
        require("pose.confidence", self.confidence, 0 < self.confidence < 1, "between 0 and 1")
        require("pose.thresholds", self.thresholds, all(value > 0 for value in self.thresholds), "greater than 0")
        require("pose.ks", self.ks, all(value > 0 for value in self.ks), "greater than 0")
        positive("pose", self, "threshold", "iterations")


@dataclass(frozen=True)
class ExportConfig:
    """What `vop export-matches` writes of the run at `output` for other programs."""

    hloc: str | None = None
    """Folder for hloc's features.h5, matches.h5 and pairs.txt; null: none."""
    colmap: str | None = None
    """File for a COLMAP database with cameras (those of the run, or of `cameras`; guessed as COLMAP does where none are
    known), keypoints, matches and verified two-view geometries; null: none."""


@dataclass(frozen=True)
class HlocConfig:
    """What `vop import-hloc` reads, for the images of a collection."""

    features: str | None = None
    """HDF5 file with hloc's local features, or a glob pattern of several; the first one that has an image counts."""
    matches: str | None = None
    """HDF5 file with hloc's matches of them, or a glob pattern of several; the first one that has a pair counts."""
