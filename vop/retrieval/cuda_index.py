"""A search shard on a graphics card, with the questions and answers of `vop.retrieval.index.ShardIndex`."""

import numpy as np

from vop.retrieval.cuda import CudaShard
from vop.retrieval.index import Wanted
from vop.retrieval.pair_votes import PairVotes
from vop.retrieval.shortlist import Shortlist


class CudaIndex:
    """The rows of one shard on a device; arguments as of `CudaShard`, which says how near the CPU its votes are."""

    def __init__(self, *arguments, **options):
        self._shard = CudaShard(*arguments, **options)

    def __len__(self) -> int:
        return len(self._shard)

    def shortlist(self, query_globals, k: int, exclude=None, scenes=None, settled=None) -> Shortlist:
        """As `ShardIndex.shortlist`."""
        return Shortlist(*self._shard.shortlist(query_globals, k, exclude, scenes, settled))

    def votes(
        self, patches: np.ndarray, masks: np.ndarray | None, wanted: Wanted, radius: float
    ) -> tuple[PairVotes, PairVotes]:
        """As `ShardIndex.votes`."""
        return self._shard.votes(patches, masks, wanted, radius)
