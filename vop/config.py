"""What a job is told: one frozen schema for every command, loaded from YAML files and `key=value` overrides.

OmegaConf checks types and merges; it never leaves this file. `None` means off or "choose for me", as each field says.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

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


# A trained encoder's descriptors are spread otherwise than whitened tokens: its defaults, the paper's for MegaDepth.
ENCODER_DEFAULTS = {"embedding": {"whiten": None}, "retrieval": {"radius": 0.2}}
PATHS = ("images", "queries", "database", "output", "store", "truth", "positions", "h5")


def load(config_files: Iterable[str] = (), overrides: Iterable[str] = (), **values: object) -> Config:
    """Merge defaults, YAML files, keyword values and `key=value` overrides, later ones winning.

    Local paths become absolute, so that workers with another working directory find them; with a cluster address
    they must be absolute already. Raises `ConfigError` for an unknown key (with a suggestion), a value of the wrong
    type or out of bounds, a file that is missing or is not YAML.
    """
    told = OmegaConf.create()
    sources = [*(_from_file(name) for name in config_files), ("the arguments", dict(values)), _from_dotlist(overrides)]
    for origin, source in sources:
        try:
            content = OmegaConf.create(source)
            _check_keys(OmegaConf.to_container(content, resolve=False), Config, "", origin)
            told = OmegaConf.merge(told, content)
            OmegaConf.merge(OmegaConf.structured(Config), content)  # types are checked here, to name the origin
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {str(error).splitlines()[0]}{_at(error)}") from error
    defaults = [OmegaConf.structured(Config)] + ([ENCODER_DEFAULTS] if told.get("encoder") else [])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(*defaults, told))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{str(error).splitlines()[0]}{_at(error)}") from error
    return _with_absolute_paths(config)


def _at(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key})" if key else ""


def _from_file(name: str) -> tuple[str, object]:
    try:
        return name, OmegaConf.create(files.read_bytes(name).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"config file {name!r} does not exist") from error
    except Exception as error:
        raise ConfigError(f"config file {name!r} is not YAML: {error}") from error


def _from_dotlist(overrides: Iterable[str]) -> tuple[str, object]:
    overrides = list(overrides)
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} is not an override: write key=value, such as output=run")
    return "the command line", OmegaConf.from_dotlist(overrides)


def _check_keys(content: object, schema: type, prefix: str, origin: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{origin}: {prefix.rstrip('.') or 'the file'} must hold keys, but is {content!r}")
    types = typing.get_type_hints(schema)
    for key, value in content.items():
        if key not in types:
            guess = _similar(str(key), types, prefix)
            hint = f"did you mean {guess!r}?" if guess else f"known keys here: {', '.join(types)}"
            raise ConfigError(f"{origin}: unknown key {prefix + str(key)!r}; {hint}")
        if dataclasses.is_dataclass(types[key]):
            _check_keys(value, types[key], f"{prefix}{key}.", origin)


def _similar(key: str, siblings: Iterable[str], prefix: str) -> str | None:
    """The known key whose last part is most like `key`: of this section, or else of any."""
    leaves = {known.rpartition(".")[2]: known for known in reversed(KEYS)}
    leaves |= {name: f"{prefix}{name}" for name in siblings}
    close = difflib.get_close_matches(key, leaves, n=1)
    return leaves[close[0]] if close else None


def _with_absolute_paths(config: Config) -> Config:
    changes = {}
    for name in PATHS:
        path = getattr(config, name)
        if path is None:
            continue
        if config.cluster.address and not files.is_uri(path) and not Path(path).is_absolute():
            raise ConfigError(
                f"{name} is the relative path {path!r}, but the job runs on a cluster, whose processes have other "
                "working directories: give an absolute path on a file system that every node mounts, or a URI"
            )
        changes[name] = files.absolute(path)
    for name in ("weights", "encoder"):  # a weights name may also be a hub id, which is no path
        path = getattr(config, name)
        if path and Path(path).expanduser().exists():
            changes[name] = files.absolute(path)
    return dataclasses.replace(config, **changes)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def documented(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, str, object]]:
    """(key, what it means, default) of every field, nested ones as `section.key`."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(schema))).body[0].body
    docs = {
        node.target.id: " ".join(ast.literal_eval(following.value).split())
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr)
    }
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[item.name]):
            yield from documented(types[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", docs[item.name], item.default


KEYS = tuple(key for key, _, _ in documented())
