"""From scored pairs to a pair list, against plain Python over sets and lists."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import minimum_spanning_tree

from vop.pairs import SOURCES
from vop.retrieval import graph


def merged(rows):
    """{(low, high): (larger score, mutual)} of ranked (query, database, score)."""
    found = {}
    for query, database, score in rows:
        found.setdefault((min(query, database), max(query, database)), {})[query < database] = score
    return {pair: (max(scores.values()), len(scores) == 2) for pair, scores in found.items()}


def grouped(edges, images):
    """Sets of rows that the edges connect, by decreasing size, then first row; no union-find: sets are merged."""
    groups = [{row} for row in range(images)]
    for low, high in edges:
        touched = [group for group in groups if low in group or high in group]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    return sorted(groups, key=lambda group: (-len(group), min(group)))


def kruskal(pairs, images):
    """The forest of pairs given best first: those that joined two groups."""
    group, taken = list(range(images)), []
    for low, high in pairs:
        if group[low] != group[high]:
            taken.append((low, high))
            group = [group[low] if g == group[high] else g for g in group]
    return taken


def chosen_plainly(rows, images, budget, mutual, connect, sequence, neighbours):
    """{(low, high): (score, source)} by the stated rules."""
    scored = {pair: score for pair, (score, both) in merged(rows).items() if both or not mutual}
    everything = scored | {pair: None for pair in [*sequence, *neighbours] if pair not in scored}
    by_score = sorted(everything, key=lambda p: (everything[p] is None, -(everything[p] or 0), p))
    forest = set(kruskal(by_score, images)) if connect else set()

    def source(pair):
        if pair in forest:
            return "forest"
        return "sequence" if pair in sequence else "neighbours" if pair in neighbours else "best"

    spent = sorted(by_score, key=lambda pair: SOURCES.index(source(pair)))[:budget]
    return {pair: (everything[pair], source(pair)) for pair in spent}


def arrays(rows):
    query, database, score = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(query, np.int32), np.array(database, np.int32), np.array(score, np.float32)


def as_dict(listed):
    """{(low, high): (score or None, source)} of a pair list, checking that it is sorted and without repetition."""
    pairs = list(zip(listed.pairs.low.tolist(), listed.pairs.high.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert all(low < high for low, high in pairs)
    scores = [None if np.isnan(score) else score for score in listed.pairs.score.tolist()]
    return {p: (s, SOURCES[c]) for p, s, c in zip(pairs, scores, listed.source.tolist(), strict=True)}


def rows_of(pairs):
    return np.array(sorted(pairs), np.int32).reshape(-1, 2)


IMAGES = 9
POSSIBLE = list(itertools.permutations(range(IMAGES), 2))
UNORDERED = list(itertools.combinations(range(IMAGES), 2))
# Few distinct scores, 0 among them: ties are the rule.
RANKED = st.dictionaries(st.sampled_from(POSSIBLE), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]), max_size=30).map(
    lambda found: [(*pair, score) for pair, score in found.items()]
)
SOME_PAIRS = st.sets(st.sampled_from(UNORDERED), max_size=8)


@settings(max_examples=200)
@given(
    rows=RANKED,
    budget=st.none() | st.integers(1, 30),
    mutual=st.booleans(),
    connect=st.booleans(),
    sequence=SOME_PAIRS,
    neighbours=SOME_PAIRS,
    shuffle=st.randoms(use_true_random=False),
)
def test_the_pair_list_is_the_stated_one_in_any_order(rows, budget, mutual, connect, sequence, neighbours, shuffle):
    expected = chosen_plainly(rows, IMAGES, budget, mutual, connect, sequence, neighbours)
    shuffle.shuffle(rows)
    listed = graph.choose(
        graph.undirected(*arrays(rows)), IMAGES, budget, mutual, connect, rows_of(sequence), rows_of(neighbours)
    )
    assert as_dict(listed) == expected
    everything = {*sequence, *neighbours} | {pair for pair, (_, both) in merged(rows).items() if both or not mutual}
    whole = grouped(everything, IMAGES)
    assert listed.forest == (IMAGES - len(whole) if connect else 0)
    if budget is not None:
        assert len(listed.pairs) == min(budget, len(everything))
    if budget is None or (connect and budget >= listed.forest):
        assert grouped(expected, IMAGES) == whole
    number, sizes = graph.components([(listed.pairs.low, listed.pairs.high)], IMAGES)
    groups = grouped(expected, IMAGES)
    assert sizes.tolist() == [len(group) for group in groups]
    assert [set(np.flatnonzero(number == i).tolist()) for i in range(len(groups))] == groups


def test_an_unordered_pair_has_the_larger_score_and_is_mutual_if_both_list_it():
    rows = [(2, 1, 1.0), (0, 1, 3.0), (1, 0, 2.0), (1, 2, 4.0), (3, 0, 0.5)]
    pairs = graph.undirected(*arrays(rows))
    assert (pairs.low.tolist(), pairs.high.tolist()) == ([0, 0, 1], [1, 3, 2])
    assert (pairs.score.tolist(), pairs.mutual.tolist()) == ([3.0, 0.5, 4.0], [True, False, True])
    assert [a.dtype for a in (pairs.low, pairs.high, pairs.score)] == [np.int32, np.int32, np.float32]


def random_rows(seed, images, count):
    rng = np.random.default_rng(seed)
    keys = rng.choice(images * images, count, replace=False)
    query, database = (part.astype(np.int32) for part in divmod(keys, images))
    apart = query != database
    return query[apart], database[apart], rng.permutation(count).astype(np.float32)[apart] + 1


@pytest.mark.parametrize(("images", "count"), [(300, 500), (300, 20_000)], ids=["apart", "dense"])
def test_the_forest_is_maximal_and_connects_what_can_be_connected(images, count):
    pairs = graph.undirected(*random_rows(3, images, count))
    order = np.argsort(-pairs.score, kind="stable")
    forest = pairs.take(graph.spanning_forest(pairs, order, images))
    costs = csr_array((2.0 * count - pairs.score, (pairs.low, pairs.high)), shape=(images, images))
    assert forest.score.sum(dtype=np.float64) == (2.0 * count - minimum_spanning_tree(costs).data).sum()
    everything = graph.components([(pairs.low, pairs.high)], images)
    for ours, whole in zip(graph.components([(forest.low, forest.high)], images), everything, strict=True):
        np.testing.assert_array_equal(ours, whole)
    assert len(forest) == images - len(everything[1])


def test_the_forest_is_that_of_networkx():
    networkx = pytest.importorskip("networkx")
    pairs = graph.undirected(*random_rows(4, 200, 3000))
    known = networkx.Graph()
    known.add_weighted_edges_from(zip(pairs.low.tolist(), pairs.high.tolist(), pairs.score.tolist(), strict=True))
    expected = {(min(edge), max(edge)) for edge in networkx.maximum_spanning_edges(known, data=False)}
    forest = pairs.take(graph.spanning_forest(pairs, np.argsort(-pairs.score, kind="stable"), 200))
    assert set(zip(forest.low.tolist(), forest.high.tolist(), strict=True)) == expected


def test_a_budget_smaller_than_the_forest_takes_the_best_of_it():
    rows = [(0, 1, 5.0), (1, 2, 4.0), (0, 2, 4.5), (3, 4, 1.0), (2, 3, 2.0)]
    scored = graph.undirected(*arrays(rows))
    for budget, expected in ((1, {(0, 1)}), (3, {(0, 1), (0, 2), (2, 3)}), (4, {(0, 1), (0, 2), (2, 3), (3, 4)})):
        listed = graph.choose(scored, 6, budget)
        assert set(as_dict(listed)) == expected
        assert listed.forest == 4
    assert set(as_dict(graph.choose(scored, 6, 3, connect=False))) == {(0, 1), (0, 2), (1, 2)}


def test_a_smaller_budget_gives_a_part_of_a_larger_ones_list():
    scored = graph.undirected(*random_rows(5, 60, 1500))
    lists = [set(as_dict(graph.choose(scored, 60, budget))) for budget in range(1, 200, 7)]
    assert all(small < large for small, large in itertools.pairwise(lists))


def test_nothing_gives_nothing():
    nothing = graph.undirected(*arrays([]))
    listed = graph.choose(nothing, 3, 10, mutual=True, sequence=rows_of([]), neighbours=rows_of([]))
    assert (len(listed.pairs), len(listed.source), listed.forest) == (0, 0, 0)
    number, sizes = graph.components([(listed.pairs.low, listed.pairs.high)], 3)
    assert (number.tolist(), sizes.tolist()) == ([0, 1, 2], [1, 1, 1])
    assert as_dict(graph.choose(nothing, 3, sequence=rows_of([(1, 2)]))) == {(1, 2): (None, "forest")}


def test_sequence_goes_by_folder_and_by_number():
    names = ["a/f1.jpg", "a/f10.jpg", "a/f2.jpg", "a/x/f3.jpg", "b/f3.jpg", "b/f4.jpg", "f5.jpg"]
    assert sorted(graph.sequence(names, 1).tolist()) == [[0, 2], [1, 2], [4, 5]]
    assert {tuple(pair) for pair in graph.sequence(names, 2).tolist()} == {(0, 1), (0, 2), (1, 2), (4, 5)}
    assert graph.sequence([], 3).shape == graph.sequence(["a"], 3).shape == (0, 2)


NAMES = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "a/", "b/", "a/b/"]),
    st.sampled_from(["", "f", "g"]),
    st.sampled_from(["1", "2", "10", "02", "100"]),
    st.sampled_from(["", "f", "g2"]),
)


@given(names=st.sets(NAMES, max_size=12), window=st.integers(1, 4))
def test_sequence_pairs_are_those_of_padded_names(names, window):
    names = sorted(names)
    padded = sorted(names, key=lambda n: (n.rpartition("/")[0], re.sub(r"\d+", lambda d: d[0].zfill(3), n), n))
    expected = set()
    for one, other in itertools.combinations(padded, 2):
        between = padded.index(other) - padded.index(one)
        if between <= window and one.rpartition("/")[0] == other.rpartition("/")[0]:
            expected.add(tuple(sorted((names.index(one), names.index(other)))))
    found = [tuple(pair) for pair in graph.sequence(names, window).tolist()]
    assert len(found) == len(expected)
    assert set(found) == expected


def nearest_plainly(positions, count, limit, groups):
    found = set()
    for i, here in enumerate(positions):
        others = [
            (math.dist(here, there), j)
            for j, there in enumerate(positions)
            if j != i and groups[i] == groups[j] and not np.isnan([here, there]).any()
        ]
        found |= {(min(i, j), max(i, j)) for distance, j in sorted(others)[:count] if distance <= limit}
    return sorted(found)


@pytest.mark.parametrize(("count", "limit"), [(1, None), (4, None), (4, 0.2), (100, None), (100, 0.3)])
def test_neighbours_are_the_nearest_of_their_group(count, limit):
    rng = np.random.default_rng(6)
    positions, groups = rng.random((60, 3)), rng.integers(0, 3, 60)
    positions[rng.random(60) < 0.15, 2] = np.nan
    for inside, codes in ((None, np.zeros(60)), (groups, groups)):
        found = graph.neighbours(positions, count, limit, inside)
        assert found.tolist() == [list(p) for p in nearest_plainly(positions, count, limit or math.inf, codes)]


def test_neighbours_at_the_limit_and_at_one_place():
    line = np.array([[0, 0, 0], [1, 0, 0], [2.5, 0, 0]], float)
    assert graph.neighbours(line, 2, 1.0).tolist() == [[0, 1]]
    assert graph.neighbours(line, 2, 1.5).tolist() == [[0, 1], [1, 2]]
    crowd = graph.neighbours(np.ones((50, 3)), 3)
    assert np.bincount(crowd.ravel(), minlength=50).min() >= 3  # each has its three, whoever they are
    assert len(crowd) <= 50 * 3
    assert graph.neighbours(np.full((4, 3), np.nan), 3).shape == (0, 2)
    assert graph.neighbours(np.zeros((0, 3)), 3).shape == (0, 2)


@given(seed=st.integers(0, 99), parts=st.integers(1, 7))
def test_components_come_out_alike_from_any_parts(seed, parts):
    rng = np.random.default_rng(seed)
    low, high = rng.integers(0, 40, (2, rng.integers(1, 60)))
    whole = graph.components([(low, high)], 40)
    split = zip(np.array_split(low, parts), np.array_split(high, parts), strict=True)
    for ours, expected in zip(graph.components(split, 40), whole, strict=True):
        assert ours.tolist() == expected.tolist()
