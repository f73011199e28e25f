"""Scores on a table that can be checked with a pencil, and against definitions written out for one query at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop.metrics import retrieval

NAMES = ["a", "b", "c", "d"]
OVERLAP = np.array([[1, 0.9, 0.5, 0.0], [0.9, 1, 0.0, 0.3], [0.5, 0.0, 1, 0.2], [0.0, 0.3, 0.2, 1]])


def test_by_hand():
    """Relevant at 0.3: a-b, a-c, b-d. c has one relevant image (a), d has one (b)."""
    ranked = {"a": ["b", "d", "c"], "b": ["c", "a"], "c": ["d", "b"], "d": []}
    assert retrieval(ranked, NAMES, OVERLAP, 0.3, ks=(1, 2)) == {
        "precision@1": 0.25,  # only a's first is right
        "ceiling@1": 1.0,
        "recall@1": 0.25,
        "pair_recall@1": round(1 / 6, 6),  # of a:{b,c} b:{a,d} c:{a} d:{b}
        "precision@2": round((0.5 + 0.5) / 4, 6),
        "ceiling@2": round((1 + 1 + 0.5 + 0.5) / 4, 6),
        "recall@2": 0.5,
        "pair_recall@2": round(2 / 6, 6),
        "chance": round((2 / 3 + 2 / 3 + 1 / 3 + 1 / 3) / 4, 6),
        "queries": 4.0,
        "queries_without_truth": 0.0,
    }


def test_the_bound_counts_as_overlap():
    assert retrieval({"b": ["d"]}, NAMES, OVERLAP, 0.3)["precision@1"] == 1
    assert retrieval({"b": ["d"]}, NAMES, OVERLAP, 0.31)["precision@1"] == 0


def test_a_database_of_its_own_limits_what_is_relevant():
    scores = retrieval({"a": ["c"], "d": ["c"]}, NAMES, OVERLAP, 0.3, database=["b", "c", "nobody knows"], ks=(1,))
    assert scores["pair_recall@1"] == round(1 / 3, 6)  # a:{b,c} d:{b}
    assert scores["chance"] == round((2 / 2 + 1 / 2) / 2, 6)
    scores = retrieval({"a": ["c"], "d": ["c"]}, NAMES, OVERLAP, 0.3, database=["c"], ks=(1,))
    assert (scores["queries"], scores["queries_without_truth"]) == (1, 1)
    assert scores["precision@1"] == 1


def test_images_without_truth_are_left_out():
    """Neither a query nor a retrieved image of which nothing is known may count, for or against."""
    known = retrieval({"a": ["d", "b"]}, NAMES, OVERLAP, 0.3)
    assert retrieval({"a": ["x", "d", "y", "b"], "z": ["a"]}, NAMES, OVERLAP, 0.3) == known


def test_no_truth_at_all_is_an_error():
    with pytest.raises(
        ValueError, match=r"none of 1 queries has a database image with a true overlap of at least 0\.3"
    ):
        retrieval({"z": ["a"]}, NAMES, OVERLAP, 0.3)
    with pytest.raises(ValueError, match="none of 2"):
        retrieval({"a": ["b"], "b": ["a"]}, NAMES, OVERLAP, 0.95)


@settings(max_examples=100)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
def test_against_the_definitions(count, seed, bound):
    rng = np.random.default_rng(seed)
    names = [f"n{i}" for i in range(count)]
    overlap = rng.random((count, count))
    overlap = np.maximum(overlap, overlap.T)
    np.fill_diagonal(overlap, 1)
    others = {name: [other for other in names if other != name] for name in names}
    ranked = {name: list(rng.permutation(others[name]))[: rng.integers(0, count)] for name in names}
    relevant = {q: {d for d in others[q] if overlap[names.index(q), names.index(d)] >= bound} for q in names}
    judged = [name for name in names if relevant[name]]
    if not judged:
        with pytest.raises(ValueError, match="none of"):
            retrieval(ranked, names, overlap, bound)
        return
    scores = retrieval(ranked, names, overlap, bound)
    assert scores["queries"] == len(judged)
    assert scores["queries_without_truth"] == count - len(judged)
    for k in (1, 5, 10):
        right = {q: relevant[q] & set(ranked[q][:k]) for q in judged}
        assert scores[f"precision@{k}"] == pytest.approx(np.mean([len(right[q]) / k for q in judged]), abs=1e-6)
        assert scores[f"recall@{k}"] == pytest.approx(np.mean([bool(right[q]) for q in judged]), abs=1e-6)
        best = [min(len(relevant[q]), k) / k for q in judged]
        assert scores[f"ceiling@{k}"] == pytest.approx(np.mean(best), abs=1e-6)
        pairs = sum(map(len, relevant.values()))
        assert scores[f"pair_recall@{k}"] == pytest.approx(sum(map(len, right.values())) / pairs, abs=1e-6)
        assert scores[f"precision@{k}"] <= scores[f"ceiling@{k}"]
    chance = np.mean([len(relevant[q]) / (count - 1) for q in judged])
    assert scores["chance"] == pytest.approx(chance, abs=1e-6)


def test_a_perfect_ranking_reaches_the_ceiling():
    ranked = {
        name: [NAMES[j] for j in np.argsort(-row, kind="stable") if j != i]
        for i, (name, row) in enumerate(zip(NAMES, OVERLAP, strict=True))
    }
    scores = retrieval(ranked, NAMES, OVERLAP, 0.3)
    for k in (1, 5, 10):
        assert scores[f"precision@{k}"] == scores[f"ceiling@{k}"]
    assert scores["recall@1"] == scores["pair_recall@10"] == 1
