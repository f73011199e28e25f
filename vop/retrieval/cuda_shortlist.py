"""The shortlist of `vop.retrieval.shortlist` on a graphics card, in plain torch.

A float32 product finds the images; their scores are then computed again in float64 and rounded to float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import pad

MARGIN = 8  # rows sought beyond K, so that rounding at the boundary seldom needs a second search


class GlobalSearch:
    """Exact top-K search over the global descriptors of one shard, on the device of its tensors.

    globals    (n, G) float32
    rows       (n,) int64 database rows, ascending
    scenes     (n,) int64 codes, or None
    workspace  bytes that a search may use besides; more queries are cut up
    """

    def __init__(self, globals: torch.Tensor, rows: torch.Tensor, scenes: torch.Tensor | None, workspace: int):
        self._globals, self._rows, self._scenes, self._workspace = globals, rows, scenes, workspace
        self._largest = float(torch.linalg.vector_norm(globals, dim=1).max())

    def search(self, queries, k: int, exclude, scenes=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best rows for each of queries (Q, G), never its own row exclude (Q,), best first, equal scores by row.

        Returns offsets (Q + 1,) int64, rows int64 and scores float32. A score is a float64 sum in an order that only G
        fixes, rounded to float32; the CPU's order is another, so its score may, rarely, be the next float32.
        """
        n, G = self._globals.shape
        if queries.ndim != 2 or queries.shape[1] != G:
            raise ValueError(f"query globals have shape {tuple(queries.shape)}, expected (Q, {G})")
        found = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        pending, width = torch.arange(len(queries), device=queries.device), k + MARGIN
        while len(pending):
            width = min(width, n)
            undecided = []
            for part in pending.split(max(1, self._workspace // (16 * n + 48 * width * G))):
                codes = None if scenes is None else scenes[part]
                rows, scores, certain = self._nearest(queries[part], k, width, exclude[part], codes)
                undecided.append(part[~certain])
                for q, own_rows, own_scores in zip(part.tolist(), rows, scores, strict=True):
                    listed = own_scores > -np.inf
                    found[q] = own_rows[listed], own_scores[listed]
            pending, width = torch.cat(undecided), width * 4
        offsets = np.cumsum([0, *(len(rows) for rows, _ in found)], dtype=np.int64)
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])
        return offsets, rows, np.concatenate([np.empty(0, np.float32), *(scores for _, scores in found)])

    def _nearest(self, queries, k: int, width: int, exclude, scenes):
        """Rows and scores (q, k) on the host, -inf where there is no row, and whether nothing better was left out.

        That is so where the last similarity found, raised by what rounding can do, is less than the k-th score; the
        bound on a float32 product is that of `shortlist.GlobalIndex`.
        """
        with ieee_products():
            similarity = queries @ self._globals.T
        similarity.masked_fill_(exclude[:, None] == self._rows, -torch.inf)
        if scenes is not None:
            similarity.masked_fill_(scenes[:, None] != self._scenes, -torch.inf)
        similarity, places = similarity.topk(width, dim=1)
        scores = _products(queries, self._globals[places]).masked_fill_(similarity == -torch.inf, -torch.inf)
        places, order = places.sort(dim=1)  # by row, which the stable sort keeps among equal scores
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        rows, scores = self._rows[places.gather(1, order)][:, :k], scores[:, :k]
        slack = 2 * queries.shape[1] * 2.0**-24 * torch.linalg.vector_norm(queries, dim=1) * self._largest
        last = similarity[:, -1]
        certain = (last + slack < scores[:, -1]) | (last == -torch.inf) | (width == len(self._rows))
        return rows.cpu().numpy(), scores.cpu().numpy(), certain


def _products(queries: torch.Tensor, globals: torch.Tensor) -> torch.Tensor:
    """Inner products (q, w) float32 of queries (q, G) with globals (q, w, G), summed in float64 by halving.

    The tree of additions depends on G alone; a library's own sum depends on the shape of the batch too.
    """
    terms = globals.double() * queries.double()[:, None]
    while terms.shape[-1] > 1:
        terms = pad(terms, (0, terms.shape[-1] % 2))
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0].float()


@contextmanager
def ieee_products() -> Iterator[None]:
    """Float32 matrix products in float32, not TF32, whatever the program chose elsewhere."""
    settings = torch.backends.cuda.matmul
    chosen, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = chosen
