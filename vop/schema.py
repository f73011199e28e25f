"""The schema of what a job is told, the same for every command: frozen, each field with its meaning.

`None` means off or "choose for me", as each field says. `vop.config` fills it from files and `key=value` overrides.
"""

from dataclasses import dataclass, field

from vop import files

ILLUSTRATED = 48  # queries of which a search keeps what a report needs


class ConfigError(ValueError):
    """A key or value that no job can run with; the message says what to write instead."""


def _require(name: str, value: object, holds: bool, bound: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {bound}")


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(f"{section}.{name}", value, value is None or value > 0, "greater than 0")


@dataclass(frozen=True)
class EmbeddingConfig:
    """How images become descriptors. What changes the bytes of a store is written into its manifest."""

    image_size: int = 224
    """Side of the letterboxed square, pixels; a multiple of 14."""
    imagenet_normalization: bool = False
    """Subtract the ImageNet mean and divide by its deviation. The published encoder was trained without."""
    normalize_global: bool = False
    """L2-normalise the global descriptor (DINOv2's CLS is used as it is in the paper)."""
    whiten: int | None = 128
    """Width of a PCA whitening of the backbone's own tokens, fitted on a sample; null: none. With an encoder: none."""
    dtype: str = "float16"
    """Type of stored patch descriptors: float16, float32 or int8 (half of float16; global ones are then float16)."""
    tokens: bool = False
    """Also store the backbone's own tokens (for training the encoder)."""
    sample: int = 256
    """Images sampled to estimate the centre of the tokens and the whitening."""
    shard_size: int = 128
    """Images per shard: the unit of work, and of what a kill can cost."""
    batch_size: int = 16
    """Images per forward pass."""
    precision: str | None = None
    """float32, bfloat16 or float16; null: bfloat16 on a GPU, float32 on a CPU."""
    encoders: int | None = None
    """Model replicas; null: one per GPU, without GPUs one per CPU core."""
    gpus_per_encoder: float | None = None
    """GPU share of a replica; null: 1 where the cluster has GPUs, 0 where it has none."""
    max_pixels: int = 200_000_000
    """Largest image decoded, pixels; larger ones are quarantined."""
    max_bad_fraction: float = 0.1
    """Share of unreadable images above which the job fails instead of quarantining them."""
    prune: bool = False
    """Mark images that are gone from the collection as removed."""

    def __post_init__(self):
        _require("embedding.image_size", self.image_size, self.image_size > 0 and self.image_size % 14 == 0,
                 "a positive multiple of 14, the patch size")  # fmt: skip
        _require("embedding.dtype", self.dtype, self.dtype in ("float16", "float32", "int8"),
                 "float16, float32 or int8")  # fmt: skip
        _require("embedding.precision", self.precision, self.precision in (None, "float32", "bfloat16", "float16"),
                 "float32, bfloat16, float16 or null")  # fmt: skip
        _require("embedding.max_bad_fraction", self.max_bad_fraction, 0 <= self.max_bad_fraction <= 1, "from 0 to 1")
        _require("embedding.gpus_per_encoder", self.gpus_per_encoder,
                 self.gpus_per_encoder is None or self.gpus_per_encoder >= 0, "0, positive or null")  # fmt: skip
        _positive("embedding", self, "whiten", "sample", "shard_size", "batch_size", "encoders", "max_pixels")


@dataclass(frozen=True)
class RetrievalConfig:
    """How the overlap of two images is predicted and the pairs are chosen."""

    k: int = 20
    """Database images kept per query."""
    shortlist: int | None = 50
    """Database images per query that are voted on, the nearest by global descriptor; null: all of them."""
    radius: float | None = 0.65
    """Cosine distance within which two patches vote for each other (0.2 with an encoder unless set); null: the median
    similarity inside an image."""
    weights: str = "idf"
    """How patches count: idf (less where they match many images), tfidf (the paper's formula) or none (all alike)."""
    mask_padding: bool = True
    """Leave out patches that lie in the letterbox padding (they vote in the original)."""
    within_scene: bool = False
    """Pair images only with images of the same scene (first folder of the name)."""
    index: str = "Flat"
    """FAISS index_factory string of the shortlist; Flat is exact. Others depend on `shards`, which they need."""
    patch_index: str | None = None
    """FAISS index_factory string of an index over all patches, for a search without shortlist; null: all are compared,
    which is exact. Flat is exact too; others depend on `shards`, which they need."""
    patch_probe: str | None = None
    """How far to search such an index, in FAISS's words, such as nprobe=16 or efSearch=64; null: FAISS's choice."""
    patch_margin: float = 0.0
    """How far below the threshold to look for patches that the codes of such an index underrate, in similarity."""
    device: str = "cpu"
    """Where patches vote: cpu, or cuda, with one shard per graphics card."""
    shards: int | None = None
    """Search actors the database is split over; null: one per CPU core or graphics card, fewer for a small database."""
    query_batch: int = 64
    """Queries sent to the actors at a time, and written to disk at a time."""
    timeout_s: float = 600.0
    """Longest wait for the answer of a search actor, seconds."""
    cache: str | None = None
    """Local directory for memory-mapped copies of the descriptors, on every node: the database need not fit in memory,
    and a restarted actor is back at once. The copies stay. null: descriptors lie in memory."""
    keep_votes: bool = True
    """Keep the votes of all candidates in the run directory (about 0.3 KB a pair), so that images added later, another
    `k` or other `weights` cost only what is new."""
    reuse_gb: float = 1.0
    """Memory for votes that serve both images of a pair, GB; beyond it pairs are scored from both sides. 0: off."""

    def __post_init__(self):
        _positive("retrieval", self, "k", "shortlist", "shards", "query_batch", "timeout_s")
        for name in ("index", "patch_index"):
            factory = getattr(self, name)
            _require("retrieval.shards", self.shards, self.shards is not None or factory in (None, "Flat"),
                     f"a number with retrieval.{name}={factory}: what shards are trained on decides")  # fmt: skip
        _require("retrieval.patch_index", self.patch_index, self.patch_index is None or self.shortlist is None,
                 "null unless retrieval.shortlist=null: only that search looks at all patches")  # fmt: skip
        _require("retrieval.patch_probe", self.patch_probe, self.patch_probe is None or self.patch_index is not None,
                 "null without a retrieval.patch_index")  # fmt: skip
        _require("retrieval.patch_margin", self.patch_margin, self.patch_margin >= 0, "0 or positive")
        _require("retrieval.device", self.device, self.device in ("cpu", "cuda"), "cpu or cuda")
        _require("retrieval.device", self.device, self.device == "cpu" or self.patch_index is None,
                 "cpu with a retrieval.patch_index")  # fmt: skip
        _require("retrieval.reuse_gb", self.reuse_gb, self.reuse_gb >= 0, "0 or positive")
        _require("retrieval.weights", self.weights, self.weights in ("none", "idf", "tfidf"), "none, idf or tfidf")
        _require("retrieval.radius", self.radius, self.radius is None or 0 < self.radius < 2,
                 "a cosine distance between 0 and 2 (useful: 0.1 to 0.5), or null")  # fmt: skip


@dataclass(frozen=True)
class PairsConfig:
    """Which pairs `register` lists in pairs.txt: unless something is set here, the ranking as it is."""

    budget: int | None = None
    """Most pairs listed, each counted once whichever image ranks the other; null: no limit."""
    connect: bool = True
    """Spend the budget first on what connects the images (the maximum spanning forest), not just on the best pairs."""
    mutual: bool = False
    """List ranked pairs only if each image has the other among its `retrieval.k` best."""
    sequence: int | None = None
    """List each image also with so many images that follow it in its folder, by name; null: none."""
    neighbours: int | None = None
    """List each image also with so many taken nearest to it (see `positions`); null: none."""
    neighbour_distance_m: float | None = None
    """Largest distance of such neighbours, metres; null: any."""

    def __post_init__(self):
        _positive("pairs", self, "budget", "sequence", "neighbours", "neighbour_distance_m")
        _require("pairs.neighbour_distance_m", self.neighbour_distance_m,
                 self.neighbour_distance_m is None or self.neighbours is not None,
                 "null unless pairs.neighbours says how many")  # fmt: skip

    @property
    def chosen(self) -> bool:
        """Whether a list is chosen that is not the ranking."""
        return self.mutual or any(value is not None for value in (self.budget, self.sequence, self.neighbours))


@dataclass(frozen=True)
class DatasetConfig:
    """A benchmark in the layout it is published in: one YAML for each in configs/dataset/."""

    format: str | None = None
    """Layout on disk: colmap, megadepth, phototourism, inloc, aachen, pitts30k or the dotted name of a module of one's
    own (docs/datasets.md); null: `images`, `queries` and `database` say where the images are."""
    root: str | None = None
    """Folder that the benchmark was unpacked into."""
    scenes: list[str] | None = None
    """Scenes taken; null: every one that is found."""
    images: str | None = None
    """Where the images of a scene lie below the root; {scene} stands for its name. null: the layout's own place."""
    model: str | None = None
    """Where the cameras of a scene lie below the root, likewise."""


@dataclass(frozen=True)
class MatchingConfig:
    """How local features are found and matched. What changes them is written into the manifests of their stores."""

    method: str = "xfeat+lighterglue"
    """xfeat+lighterglue, aliked+lightglue, disk+lightglue, superpoint+lightglue (weights for non-commercial use only),
    sift+nn, or hloc:FEATURES+MATCHER, by the names of hloc's configurations."""
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
        _require("matching.precision", self.precision, self.precision in (None, "float32", "bfloat16", "float16"),
                 "float32, bfloat16, float16 or null")  # fmt: skip
        _require("matching.gpus_per_worker", self.gpus_per_worker,
                 self.gpus_per_worker is None or self.gpus_per_worker >= 0, "0, positive or null")  # fmt: skip
        _require("matching.cache_gb", self.cache_gb, self.cache_gb >= 0, "0 or positive")
        _positive("matching", self, "max_keypoints", "resize", "batch_pairs", "shard_size", "pair_shard_size",
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
        _require("pose.estimators", self.estimators, bool(self.estimators), "a list of at least one")
        _require("pose.confidence", self.confidence, 0 < self.confidence < 1, "between 0 and 1")
        _require("pose.thresholds", self.thresholds, all(value > 0 for value in self.thresholds), "greater than 0")
        _require("pose.ks", self.ks, all(value > 0 for value in self.ks), "greater than 0")
        _positive("pose", self, "threshold", "iterations")


@dataclass(frozen=True)
class ExportConfig:
    """What `vop export-matches` writes of the run at `output` for other programs."""

    hloc: str | None = None
    """Folder for hloc's features.h5, matches.h5 and pairs.txt; null: none."""
    colmap: str | None = None
    """File for a COLMAP database with cameras (those of the run, or of `cameras`; guessed as COLMAP does where none are
    known), keypoints, matches and verified two-view geometries; null: none."""


@dataclass(frozen=True)
class TrainConfig:
    """How the encoder is trained. The defaults are the published recipe."""

    supervision: str = "depth"
    """How patches are known to match: depth (depth maps and cameras), points (points that images of a COLMAP model
    share), labels (prepared, in the original's HDF5) or homography (no truth: images and warped copies of them)."""
    labels: str | None = None
    """HDF5 file of prepared labels, for supervision=labels."""
    scenes: str | None = None
    """Text file of the scenes, folders or images to train on, one per line; null: all that `validation` leaves."""
    validation: str | None = None
    """Text file of the scenes, folders or images to validate on, likewise; null: no validation, the last step is
    kept."""
    epochs: int = 30
    """Epochs; a finished run goes on when more are asked for."""
    batch_size: int = 32
    """Pairs per step, of all workers together; a multiple of `workers`."""
    accumulate: int = 1
    """Parts that a worker computes its share of a batch in, one after the other, to save memory."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW."""
    decay_from: int = 10
    """First epoch, from 0, with a smaller learning rate."""
    decay: float = 10**-0.1
    """Factor of the learning rate in each epoch from then on."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    descriptor_dim: int = 256
    """E, numbers of a descriptor."""
    dropout: float = 0.5
    """Probability, in what the encoder adds for the place of a patch."""
    start: str = "random"
    """What the projection starts from: random, or matches (fitted in closed form to the matches of the first epoch)."""
    positives_per_scene: int = 200
    """Pairs with overlap taken of each scene for an epoch, drawn evenly from the bins of overlap."""
    negatives_per_scene: int = 200
    """Pairs without overlap, likewise; of other scenes where a scene has none."""
    min_overlap: float = 0.1
    """Smallest overlap of a pair."""
    max_overlap: float = 0.7
    """Largest overlap of a pair."""
    overlap_bins: int = 3
    """Bins of equal width that pairs with overlap are drawn from."""
    validation_pairs: int = 200
    """Pairs with overlap of each scene that the validation looks at, as many without."""
    validation_images: int = 64
    """Images of each scene, at most, among which the validation searches, evenly spread."""
    flip: bool = True
    """Mirror half of the pairs."""
    warps: int = 4
    """Warped copies of each image, for supervision=homography."""
    occlusion: float | None = 0.1
    """Largest relative difference between a pixel's depth and the depth found where it lands; null: no test, as in the
    original."""
    min_pixels: int = 2
    """Pixels that two patches must share to match."""
    negatives: str = "clear"
    """Which patches must not match: clear (those that share no pixel) or visible (as in the original: all that are not
    each other's best match, among those that any pixel of the other image falls into)."""
    cached: bool = True
    """Compute the tokens of every image once; false: the backbone runs in every step, on images of changed light."""
    best: str = "precision"
    """Score of the validation that decides which step is kept: precision, recall@1, recall@5 or loss."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; each epoch ends with one too."""
    workers: int | None = None
    """Training processes; null: one per GPU, without GPUs one."""
    gpus_per_worker: float | None = None
    """GPU share of a worker; null: 1 where the cluster has GPUs, 0 where it has none."""
    precision: str | None = None
    """float32 or bfloat16; null: bfloat16 on a GPU, float32 on a CPU."""
    max_failures: int = 3
    """Lost workers after which a run gives up; each time it goes on from its last checkpoint."""
    max_bad_fraction: float = 0.1
    """Share of pairs whose labels cannot be made above which the job fails instead of leaving them out."""
    data_licence: str | None = None
    """Licence of the images, for the model card; null: not stated."""
    seed: int = 0
    """Seed of the first weights, the pairs, their order, flips and dropout."""
    cache: str | None = None
    """Local folder for a memory-mapped copy of the tokens, on every node; null: the system's folder for temporary
    files."""

    def __post_init__(self):
        for name, choices in (("supervision", ("depth", "points", "labels", "homography")),
                              ("start", ("random", "matches")), ("negatives", ("clear", "visible")),
                              ("best", ("precision", "recall@1", "recall@5", "loss")),
                              ("precision", (None, "float32", "bfloat16"))):  # fmt: skip
            value = getattr(self, name)
            shown = ", ".join("null" if choice is None else choice for choice in choices)
            _require(f"train.{name}", value, value in choices, f"one of {shown}")
        _require("train.labels", self.labels, (self.labels is not None) == (self.supervision == "labels"),
                 "a file with train.supervision=labels, and null without")  # fmt: skip
        _require("train.batch_size", self.batch_size, self.workers is None or self.batch_size % self.workers == 0,
                 f"a multiple of train.workers={self.workers}")  # fmt: skip
        _require("train.dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")
        _require("train.min_overlap", self.min_overlap, 0 < self.min_overlap < self.max_overlap <= 1,
                 f"above 0 and below train.max_overlap={self.max_overlap:g}, which is at most 1")  # fmt: skip
        _require("train.decay", self.decay, 0 < self.decay <= 1, "above 0 and at most 1")
        _require("train.max_bad_fraction", self.max_bad_fraction, 0 <= self.max_bad_fraction <= 1, "from 0 to 1")
        _require("train.occlusion", self.occlusion, self.occlusion is None or self.occlusion > 0, "positive or null")
        _require("train.gpus_per_worker", self.gpus_per_worker,
                 self.gpus_per_worker is None or self.gpus_per_worker >= 0, "0, positive or null")  # fmt: skip
        for name in ("weight_decay", "negatives_per_scene", "decay_from", "max_failures"):
            _require(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or positive")
        _positive("train", self, "epochs", "batch_size", "accumulate", "learning_rate", "descriptor_dim",
                  "positives_per_scene", "overlap_bins", "validation_pairs", "validation_images", "warps", "min_pixels",
                  "checkpoint_steps", "workers")  # fmt: skip


@dataclass(frozen=True)
class ReportConfig:
    """What report.html shows."""

    queries: int = 12
    """Queries shown with their matches, at most 48; 0: no report."""
    matches: int = 6
    """Matches shown per query."""

    def __post_init__(self):
        _require("report.queries", self.queries, 0 <= self.queries <= ILLUSTRATED, f"from 0 (off) to {ILLUSTRATED}")
        _positive("report", self, "matches")


@dataclass(frozen=True)
class DemoConfig:
    """The rendered rooms of `vop demo`."""

    images: int = 60
    """Pictures rendered."""
    seed: int = 0
    """Seed of the rooms, the camera's walk and the light."""

    def __post_init__(self):
        _positive("demo", self, "images")


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
        _positive("cluster", self, "cpus", "object_store_gb", "no_progress_timeout_s")


@dataclass(frozen=True)
class Config:
    """Everything a command can be told."""

    images: str | None = None
    """Collection to embed or register: a folder, a glob pattern or a list file (one path per line)."""
    queries: str | None = None
    """Query images of `retrieve`: a folder, a glob pattern or a list file."""
    database: str | None = None
    """Database images of `retrieve`: a folder, a glob pattern or a list file."""
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
    export: ExportConfig = field(default_factory=ExportConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)

    def __post_init__(self):
        _require("min_overlap", self.min_overlap, 0 < self.min_overlap <= 1, "above 0 and at most 1")
        _require("embedding.whiten", self.embedding.whiten, not (self.encoder and self.embedding.whiten),
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
    def matches_path(self) -> str:
        """Where the matches lie."""
        return self.matches or files.join(self.output, "matches")
