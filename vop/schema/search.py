"""How images are searched, which pairs are listed, and what a report shows of them."""

from dataclasses import dataclass

from vop.schema.bounds import local_folder, positive, require

ILLUSTRATED = 48  # queries of which a search keeps what a report needs


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
    global_descriptors: str | None = None
    """HDF5 file of hloc with the global descriptors that make the shortlist, such as NetVLAD's, or a glob pattern of
    several; every shard reads its own images there. null: those of the backbone."""
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
        positive("retrieval", self, "k", "shortlist", "shards", "query_batch", "timeout_s")
        for name in ("index", "patch_index"):
            factory = getattr(self, name)
            require("retrieval.shards", self.shards, self.shards is not None or factory in (None, "Flat"),
                     f"a number with retrieval.{name}={factory}: what shards are trained on decides")  # fmt: skip
        require("retrieval.patch_index", self.patch_index, self.patch_index is None or self.shortlist is None,
                 "null unless retrieval.shortlist=null: only that search looks at all patches")  # fmt: skip
        require("retrieval.global_descriptors", self.global_descriptors,
                 self.global_descriptors is None or self.shortlist is not None,
                 "null with retrieval.shortlist=null: they make nothing but the shortlist")  # fmt: skip
        require("retrieval.patch_probe", self.patch_probe, self.patch_probe is None or self.patch_index is not None,
                 "null without a retrieval.patch_index")  # fmt: skip
        require("retrieval.patch_margin", self.patch_margin, self.patch_margin >= 0, "0 or positive")
        local_folder("retrieval.cache", self.cache)
        require("retrieval.device", self.device, self.device in ("cpu", "cuda"), "cpu or cuda")
        require("retrieval.device", self.device, self.device == "cpu" or self.patch_index is None,
                 "cpu with a retrieval.patch_index")  # fmt: skip
        require("retrieval.reuse_gb", self.reuse_gb, self.reuse_gb >= 0, "0 or positive")
        require("retrieval.weights", self.weights, self.weights in ("none", "idf", "tfidf"), "none, idf or tfidf")
        require("retrieval.radius", self.radius, self.radius is None or 0 < self.radius < 2,
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
        positive("pairs", self, "budget", "sequence", "neighbours", "neighbour_distance_m")
        require("pairs.neighbour_distance_m", self.neighbour_distance_m,
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
        require("report.queries", self.queries, 0 <= self.queries <= ILLUSTRATED, f"from 0 (off) to {ILLUSTRATED}")
        positive("report", self, "matches")
