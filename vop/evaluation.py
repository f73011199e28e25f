"""Judging ranked pairs by known overlaps."""

from collections import defaultdict

from vop import metrics, pairs
from vop.datasets.posed import OverlapTruth


def ranked_names(pairs_path: str) -> dict[str, list[str]]:
    """Database names per query, best first."""
    ranked: dict[str, list[str]] = defaultdict(list)
    for part in pairs.iterate(pairs_path):
        for query, database in zip(part["query"].to_pylist(), part["database"].to_pylist(), strict=True):
            ranked[query].append(database)
    return ranked


def evaluate(
    pairs_path: str, truth: OverlapTruth, min_overlap: float, queries: list[str], database: list[str]
) -> dict[str, float]:
    """`metrics.retrieval` of a pair list; a query without pairs counts as having found nothing."""
    ranked = ranked_names(pairs_path)
    scores = metrics.retrieval(
        {query: ranked.get(query, []) for query in queries}, truth.names, truth.matrix, min_overlap, database
    )
    return scores | {"min_overlap": min_overlap}
