"""How images are listed and described."""

from dataclasses import dataclass

from vop.schema.bounds import positive, require


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
    patches: bool = True
    """Store the patch descriptors; false: a store of tokens alone, half the size, which nothing can be searched in."""
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
        require("embedding.image_size", self.image_size, self.image_size > 0 and self.image_size % 14 == 0,
                 "a positive multiple of 14, the patch size")  # fmt: skip
        require("embedding.dtype", self.dtype, self.dtype in ("float16", "float32", "int8"),
                 "float16, float32 or int8")  # fmt: skip
        require("embedding.patches", self.patches, self.patches or self.tokens,
                 "true unless embedding.tokens=true: a store holds one of them at least")  # fmt: skip
        require("embedding.precision", self.precision, self.precision in (None, "float32", "bfloat16", "float16"),
                 "float32, bfloat16, float16 or null")  # fmt: skip
        require("embedding.max_bad_fraction", self.max_bad_fraction, 0 <= self.max_bad_fraction <= 1, "from 0 to 1")
        require("embedding.gpus_per_encoder", self.gpus_per_encoder,
                 self.gpus_per_encoder is None or self.gpus_per_encoder >= 0, "0, positive or null")  # fmt: skip
        positive("embedding", self, "whiten", "sample", "shard_size", "batch_size", "encoders", "max_pixels")
