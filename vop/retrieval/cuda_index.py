"""A search shard on a graphics card, with the questions and answers of `vop.retrieval.index.ShardIndex`."""

import numpy as np

from vop.retrieval import cuda
from vop.retrieval.index import Wanted
from vop.retrieval.shortlist import Shortlist
from vop.retrieval.voting import PairVotes, merge


class CudaIndex:
    """The rows of one shard on a device; arguments as of `cuda.CudaShard`, which says how near the CPU its votes are."""

    def __init__(self, patches, globals, rows, masks=None, scenes=None, device="cuda"):
        self._shard = cuda.CudaShard(patches, globals, rows, masks, scenes, device)

    def __len__(self) -> int:
        return len(self._shard)

    def shortlist(self, query_globals, k: int, exclude=None, scenes=None, settled=None) -> Shortlist:
        """As `ShardIndex.shortlist`. ValueError for settled queries: votes of a card are not taken up again."""
        if settled is not None:
            raise ValueError("a shard on a graphics card searches all its rows: it takes no settled queries")
        return Shortlist(*self._shard.shortlist(query_globals, k, exclude, scenes))

    def votes(
        self, patches: np.ndarray, masks: np.ndarray | None, wanted: Wanted, radius: float
    ) -> tuple[PairVotes, PairVotes]:
        """As `ShardIndex.votes`."""
        order = np.argsort(wanted.queries, kind="stable")
        listed = np.split(wanted.rows[order], np.searchsorted(wanted.queries[order], np.arange(1, len(patches))))
        found = self._shard.votes(patches, masks, listed, radius, both=bool(wanted.mutual.any()))
        pairs = found.pair_query, found.pair_row
        back = []
        if found.reverse_sums is not None:
            asked = np.lexsort((wanted.rows, wanted.queries))
            width = max(int(wanted.rows.max()), int(found.pair_row.max(initial=0))) + 1
            keys = wanted.queries[asked] * width + wanted.rows[asked]
            mutual = wanted.mutual[asked][np.searchsorted(keys, found.pair_query * width + found.pair_row)]
            votes = found.reverse_sums[mutual], found.reverse_counts[mutual]
            back.append(_sparse(found.pair_row[mutual], found.pair_query[mutual], *votes))
        return merge([_sparse(*pairs, found.sums, found.counts)]), merge(back or [_sparse(*_NO_PAIRS)])


_NO_PAIRS = np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 1), np.float32), np.empty((0, 1), np.int32)


def _sparse(queries, rows, sums, counts) -> PairVotes:
    """Dense votes (n, P) of pairs, without the pairs that have none."""
    hit = counts > 0
    some = np.flatnonzero(hit.any(axis=1))
    starts = np.concatenate([[0], np.cumsum(hit[some].sum(axis=1))]).astype(np.int64)
    pair, patch = np.nonzero(hit)
    entries = patch.astype(np.uint16), counts[pair, patch].astype(np.uint16), sums[pair, patch]
    return PairVotes(queries[some], rows[some], starts, *entries)
