"""The schema of what a job is told, the same for every command: frozen, each field with its meaning.

`None` means off or "choose for me", as each field says. `vop.config` fills it from files and `key=value` overrides.
"""

from dataclasses import dataclass, field

from vop import files
from vop.schema.bounds import ConfigError, positive, require
from vop.schema.images import DatasetConfig, EmbeddingConfig
from vop.schema.localization import LocalizeConfig, ReconstructConfig
from vop.schema.planning import PlanConfig
from vop.schema.poses import ExportConfig, HlocConfig, MatchingConfig, PoseConfig
from vop.schema.search import ILLUSTRATED, PairsConfig, ReportConfig, RetrievalConfig
from vop.schema.training import TrainConfig

__all__ = [
    "ILLUSTRATED",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DatasetConfig",
    "DemoConfig",
    "EmbeddingConfig",
    "ExportConfig",
    "HlocConfig",
    "LocalizeConfig",
    "MatchingConfig",
    "PairsConfig",
    "PlanConfig",
    "PoseConfig",
    "ReconstructConfig",
    "ReportConfig",
    "RetrievalConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class DemoConfig:
    """The rendered rooms of `vop demo`."""

    images: int = 60
    """Pictures rendered."""
    seed: int = 0
    """Seed of the rooms, the camera's walk and the light."""

    def __post_init__(self):
        positive("demo", self, "images")


@dataclass(frozen=True)
class ClusterConfig:
    """Where Ray runs."""

    address: str | None = None
    """null: this machine, for the length of the job; auto: the cluster this process is on; or ray://host:port."""
    cpus: int | None = None
    """Logical CPUs offered to Ray on this machine; null: all."""
    object_store_gb: float | None = None
    """Shared memory for Ray's objects on this machine, GB; null: Ray's own choice."""
    no_progress_timeout_s: int = 1800
    """A job in which nothing moves for so long fails with an error instead of waiting for ever, seconds."""

    def __post_init__(self):
        positive("cluster", self, "cpus", "object_store_gb", "no_progress_timeout_s")


@dataclass(frozen=True)
class Config:
    """Everything a command can be told."""

    images: str | None = None
    """Collection to embed or register: a folder, a glob pattern or a list file (one path per line)."""
    queries: str | None = None
    """Query images of `retrieve`: a folder, a glob pattern or a list file."""
    database: str | None = None
    """Database images of `retrieve`: a folder, a glob pattern or a list file."""
    root: str | None = None
    """Folder that the names of images count from; null: that of `images`, else the deepest that holds queries and
    database. Where it is given, a store of the database serves queries from any folder below it."""
    output: str = "run"
    """Run directory: pairs, report, resolved config."""
    store: str | None = None
    """Store of embeddings; null: `store` inside the output."""
    truth: str | None = None
    """Known overlaps to evaluate against: an overlap.parquet, or a folder with cameras.json and depth; null: none."""
    positions: str | None = None
    """Where images were taken, for `pairs.neighbours`: a folder with cameras.json, or a CSV or Parquet file (name and
    x, y, z in metres, or lat, lon in degrees); null: cameras.json beside the images, else their GPS tags."""
    min_overlap: float = 0.3
    """Smallest true overlap that counts as seeing the same thing."""
    cameras: str | None = None
    """Known cameras: a cameras.json, a folder with one, a COLMAP model, or a folder whose sub-folders hold such, each a
    world of its own; null: those of the dataset."""
    pair_list: str | None = None
    """Pairs to match: a text file of names, two on a line, or Parquet with query and database; null: register first."""
    features: str | None = None
    """Store of local features; null: `features` inside the output."""
    matches: str | None = None
    """Store of matches; null: `matches` inside the output."""
    map: str | None = None
    """Folder of the triangulated map that `localize` makes of its database; null: `map` inside the output. Runs may
    share it together with `store`, `features` and `matches`: it speaks of the keypoints in these."""
    tokens: str | None = None
    """Store of the backbone's tokens that training reads; null: `tokens` inside the output."""
    pair_labels: str | None = None
    """Folder of the labels that training makes of its pairs, for several trainings to share; null: the output."""
    h5: str | None = None
    """File that export-h5 writes and import-h5 reads, in the layout of the original's overlap_feats.h5."""
    backbone: str = "xfeat"
    """xfeat, dinov2_vits14, dinov2_vitb14, dinov2_vitl14, dinov2_vitg14, or one of the last four with `_reg`."""
    weights: str | None = None
    """Backbone weights: a Hugging Face id, a local directory or a file; null: the published ones."""
    block: int | None = None
    """Transformer block whose tokens are taken, from 0; null: the last."""
    encoder: str | None = None
    """Trained encoder: a directory of ours or the original's checkpoint; null: the backbone's own tokens."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    localize: LocalizeConfig = field(default_factory=LocalizeConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    hloc: HlocConfig = field(default_factory=HlocConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self):
        require("min_overlap", self.min_overlap, 0 < self.min_overlap <= 1, "above 0 and at most 1")
        require("embedding.whiten", self.embedding.whiten, not (self.encoder and self.embedding.whiten),
                 "null where an encoder is given: the encoder replaces the whitening")  # fmt: skip

    @property
    def store_path(self) -> str:
        """Where the store lies."""
        return self.store or files.join(self.output, "store")

    @property
    def features_path(self) -> str:
        """Where the local features lie."""
        return self.features or files.join(self.output, "features")

    @property
    def tokens_path(self) -> str:
        """Where the tokens for training lie."""
        return self.tokens or files.join(self.output, "tokens")

    @property
    def map_path(self) -> str:
        """Where the map lies."""
        return self.map or files.join(self.output, "map")

    @property
    def matches_path(self) -> str:
        """Where the matches lie."""
        return self.matches or files.join(self.output, "matches")
