"""What a monitoring system sees of a run: metrics that every node of a cluster exports for Prometheus.

cluster/grafana/vop.json shows them, with the prefix `ray_` that Ray gives them. Ray Data adds its own, `ray_data_*`.
"""

from collections.abc import Sequence

import numpy as np
from ray.util.metrics import Counter, Gauge

from vop.progress import Beat

COUNTED = {  # what the steps count as their units; other units are told by the time left alone
    "images": Counter("vop_images", "Images that a step has done", ("step", "run")),
    "queries": Counter("vop_queries", "Queries that the search has answered", ("step", "run")),
    "pairs": Counter("vop_pairs", "Pairs of images that a step has done", ("step", "run")),
}
QUARANTINED = Counter("vop_quarantined", "Images and pairs that could not be used", ("step", "run"))
LEFT = Gauge("vop_left_seconds", "Time that a step has left at its present rate", ("step", "run"))
QUEUE = Gauge(
    "vop_queue_depth", "Batches of queries that the search shards were asked and that are not merged", ("run",)
)
LAG = Gauge("vop_shard_lag_seconds", "Seconds a search shard has worked more than the median one", ("shard", "run"))


class Watch:
    """Tells the metrics how far the steps of a run are."""

    def __init__(self, run: str):
        self.run = run
        self._bad: dict[str, int] = {}

    def observe(self, beat: Beat) -> None:
        """Count what came since the last beat."""
        tags = {"step": beat.step, "run": self.run}
        bad = beat.bad - self._bad.get(beat.step, 0)
        self._bad[beat.step] = beat.bad
        if beat.unit in COUNTED and beat.added > 0:
            COUNTED[beat.unit].inc(beat.added, tags)
        if bad > 0:
            QUARANTINED.inc(bad, tags)
        if beat.left_s is not None:
            LEFT.set(beat.left_s, tags)


def search(run: str, waiting: int, busy: Sequence[float]) -> None:
    """Tell how many batches wait, and how much longer than the median each shard has worked so far (busy: seconds)."""
    QUEUE.set(waiting, {"run": run})
    for shard, lag in enumerate(np.maximum(0, np.asarray(busy) - np.median(busy)).tolist()):
        LAG.set(lag, {"shard": str(shard), "run": run})
