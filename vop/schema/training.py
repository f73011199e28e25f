"""How the encoder is trained."""

from dataclasses import dataclass

from vop.schema.bounds import local_folder, positive, require


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
    """Share of images whose overlaps, or of pairs whose labels cannot be made above which the job fails instead of
    leaving them out."""
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
            require(f"train.{name}", value, value in choices, f"one of {shown}")
        require("train.labels", self.labels, (self.labels is not None) == (self.supervision == "labels"),
                 "a file with train.supervision=labels, and null without")  # fmt: skip
        require("train.batch_size", self.batch_size, self.workers is None or self.batch_size % self.workers == 0,
                 f"a multiple of train.workers={self.workers}")  # fmt: skip
        require("train.dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")
        require("train.min_overlap", self.min_overlap, 0 < self.min_overlap < self.max_overlap <= 1,
                 f"above 0 and below train.max_overlap={self.max_overlap:g}, which is at most 1")  # fmt: skip
        require("train.decay", self.decay, 0 < self.decay <= 1, "above 0 and at most 1")
        require("train.max_bad_fraction", self.max_bad_fraction, 0 <= self.max_bad_fraction <= 1, "from 0 to 1")
        require("train.occlusion", self.occlusion, self.occlusion is None or self.occlusion > 0, "positive or null")
        require("train.gpus_per_worker", self.gpus_per_worker,
                 self.gpus_per_worker is None or self.gpus_per_worker >= 0, "0, positive or null")  # fmt: skip
        for name in ("weight_decay", "negatives_per_scene", "decay_from", "max_failures"):
            require(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or positive")
        local_folder("train.cache", self.cache)
        positive("train", self, "epochs", "batch_size", "accumulate", "learning_rate", "descriptor_dim",
                  "positives_per_scene", "overlap_bins", "validation_pairs", "validation_images", "warps", "min_pixels",
                  "checkpoint_steps", "workers")  # fmt: skip
