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
    fresh      (n,) int64, not 0 for the rows among which settled queries are searched; or None
    workspace  bytes that a search may use besides; more queries are cut up
    """

    def __init__(self, globals, rows, scenes, fresh, workspace: int):
        self._globals, self._rows, self._workspace = globals, rows, workspace
        self._scenes, self._fresh = scenes, fresh
        self._largest = float(torch.linalg.vector_norm(globals, dim=1).max())

    def search(self, queries, k: int, exclude, scenes=None, settled=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best rows for each of queries (Q, G), never its own row exclude (Q,), best first, equal scores by row.

        A query sees only the rows with its code in scenes (Q,), if given, and only fresh ones where settled (Q,) is not
        0. ValueError if the shard was built without the one or the other.

        Returns offsets (Q + 1,) int64, rows int64 and scores float32. A score is a float64 sum in an order that only G
        fixes, rounded to float32; the CPU's order is another, so its score may, rarely, be the next float32.
        """
        n, G = self._globals.shape
        if queries.ndim != 2 or queries.shape[1] != G:
            raise ValueError(f"query globals have shape {tuple(queries.shape)}, expected (Q, {G})")
        for name, asked, known in (("scenes", scenes, self._scenes), ("settled", settled, self._fresh)):
            if asked is not None and known is None:
                needed = {"scenes": "scene codes", "settled": "fresh rows"}[name]
                raise ValueError(f"a search with {name} needs the {needed} of the shard: give them to CudaShard")
        found = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        pending, width = torch.arange(len(queries), device=queries.device), k + MARGIN
        while len(pending):
            width = min(width, n)
            undecided = []
            for part in pending.split(max(1, self._workspace // (16 * n + 48 * width * G))):
                hidden = self._hidden(part, exclude, scenes, settled)
                rows, scores, certain = self._nearest(queries[part], k, width, hidden)
                undecided.append(part[~certain])
                for q, own_rows, own_scores in zip(part.tolist(), rows, scores, strict=True):
                    listed = own_scores > -np.inf
                    found[q] = own_rows[listed], own_scores[listed]
            pending, width = torch.cat(undecided), width * 4
        offsets = np.cumsum([0, *(len(rows) for rows, _ in found)], dtype=np.int64)
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])
        return offsets, rows, np.concatenate([np.empty(0, np.float32), *(scores for _, scores in found)])

    def _hidden(self, part, exclude, scenes, settled) -> torch.Tensor:
        """Which rows the queries of `part` must not see, (q, n) bool."""
        hidden = exclude[part, None] == self._rows
        if scenes is not None:
            hidden |= scenes[part, None] != self._scenes
        if settled is not None:
            hidden |= (settled[part, None] != 0) & (self._fresh == 0)
        return hidden

    def _nearest(self, queries, k: int, width: int, hidden):
        """Rows and scores (q, k) on the host, -inf where there is no row, and whether nothing better was left out.

        That is so where the last similarity found, raised by what rounding can do, is less than the k-th score; the
        bound on a float32 product is that of `shortlist.GlobalIndex`.
        """
        with ieee_products():
            similarity = queries @ self._globals.T
        similarity, places = similarity.masked_fill_(hidden, -torch.inf).topk(width, dim=1)
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
