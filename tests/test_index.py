from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop.retrieval import shortlist, voting
from vop.retrieval.index import ShardIndex, memory_bytes

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "golden_voting.npz"
N, Q, P, E, G, K = 17, 6, 25, 16, 12, 5


def unit(x):
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


class Collection:
    """Clustered images with what is awkward: duplicates, zero patches, an image without neighbours, tied globals."""

    def __init__(self, seed, masked=False, dtype=np.float32):
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((8, E))
        patches = unit(centres[rng.integers(8, size=(N + Q, P))] + 0.5 * rng.standard_normal((N + Q, P, E)))
        patches[:, ::9] = 0
        patches[3] = patches[11]
        patches[N] = patches[3]
        patches[N + 1] = np.eye(E, dtype=np.float32)[:1]
        globals_ = rng.integers(-3, 4, (N + Q, G)).astype(np.float32)
        globals_[3] = globals_[11] = globals_[N]
        self.patches, self.globals = patches.astype(dtype), globals_.astype(dtype)
        sizes = rng.integers(1, 6, (N + Q, 2))
        grid = np.arange(P)
        self.masks = (
            np.stack([(grid // 5 < rows) & (grid % 5 < columns) for rows, columns in sizes]) if masked else None
        )
        self.scenes = rng.integers(0, 3, N + Q)

    def mask(self, image):
        return slice(None) if self.masks is None else self.masks[image]

    def shard(self, rows, scenes=False, factory=None):
        return ShardIndex(
            self.patches[rows],
            self.globals[rows],
            rows,
            None if self.masks is None else self.masks[rows],
            self.scenes[rows] if scenes else None,
            factory,
        )


def search(collection, parts, queries, k=K, scenes=False, full=False, exclude=True, radius=0.4, weights="tfidf"):
    """Shortlist and scores of `queries` from the shards `parts`: {query: (shortlist, rows, score bytes, ranking)}."""
    shards = [collection.shard(part, scenes) for part in parts]
    codes = collection.scenes[queries] if scenes else None
    own = queries if exclude else None
    found = shortlist.merge([shard.shortlist(collection.globals[queries], k, own, codes) for shard in shards], k)
    masks = None if collection.masks is None else collection.masks[queries]
    arguments = collection.patches[queries], masks, None if full else found, radius, own, codes
    batches = [shard.votes(*arguments) for shard in shards]
    result = {}
    for q, query in enumerate(queries):
        votes = voting.merge([batch[q] for batch in batches])
        values = voting.scores(votes, weights)
        order = voting.best(values, votes.rows, k)
        result[int(query)] = (found[q].tolist(), votes.rows.tolist(), values.tobytes(), votes.rows[order].tolist())
    return result


@given(
    cuts=st.sets(st.integers(1, N - 1)),
    seed=st.integers(0, 3),
    masked=st.booleans(),
    half=st.booleans(),
    scenes=st.booleans(),
    full=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_shards_batches_and_orders_leave_no_trace_in_the_bits(cuts, seed, masked, half, scenes, full, data):
    collection = Collection(seed, masked, np.float16 if half else np.float32)
    queries = np.array([3, 11, *range(N, N + Q)])
    options = {"scenes": scenes, "full": full}
    expected = search(collection, [np.arange(N)], queries, **options)
    rows = np.array(data.draw(st.permutations(range(N))))
    parts = np.split(rows, sorted(cuts))
    shuffled = np.array(data.draw(st.permutations(queries.tolist())))
    batches = np.split(shuffled, sorted(data.draw(st.sets(st.integers(1, len(queries) - 1)))))
    found = {}
    for batch in batches:
        found |= search(collection, parts, batch, **options)
    assert found == expected


@pytest.mark.parametrize("shards", [1, 2, 5, N])
def test_every_shard_count_gives_the_same_bits(shards):
    collection, queries = Collection(9, masked=True), np.arange(N + Q)
    expected = search(collection, [np.arange(N)], queries)
    assert search(collection, np.array_split(np.arange(N), shards), queries) == expected


@pytest.mark.parametrize("weights", ["none", "idf", "tfidf"])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_oracle(masked, weights):
    collection = Collection(1, masked)
    patches = [collection.patches[i][collection.mask(i)] for i in range(N + Q)]
    radius = oracle.clear_radius(np.concatenate(patches[N:]), np.concatenate(patches[:N]), 0.4)
    queries = np.arange(N, N + 3)
    found = search(collection, [np.arange(0, 9), np.arange(9, N)], queries, radius=radius, weights=weights)
    for query in queries:
        near = oracle.shortlist(collection.globals[query], dict(enumerate(collection.globals[:N])), K)
        values = oracle.scores(patches[query], {row: patches[row] for row in near}, radius, weights)
        rows = sorted(near)
        assert found[query][0] == near
        assert found[query][1] == rows
        np.testing.assert_allclose(np.frombuffer(found[query][2]), [values[row] for row in rows], rtol=2e-6)
        assert [values[row] for row in found[query][3]] == pytest.approx(
            [values[row] for row in oracle.ranking(values, K)], rel=2e-6
        )


def test_golden_through_shards():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is absent")
    golden = np.load(GOLDEN)
    queries, database = unit(golden["query_desc"]), unit(golden["db_desc"])
    shards = [ShardIndex(database[part], database[part, 0], part) for part in np.array_split(np.arange(40), 3)]
    for candidates, suffix in ((golden["shortlist"], ""), (None, "_full_db")):
        batches = [shard.votes(queries, None, candidates, float(golden["radius"])) for shard in shards]
        for weights, name in (("none", "unweighted"), ("tfidf", "weighted")):
            table = np.zeros((12, 40))
            for q in range(12):
                votes = voting.merge([batch[q] for batch in batches])
                table[q, votes.rows] = voting.scores(votes, weights)
            np.testing.assert_allclose(table, golden[name + suffix], rtol=1e-6)


def test_the_full_search_is_a_shortlist_of_everything():
    collection = Collection(2, masked=True)
    queries = np.arange(N + Q)
    shard = collection.shard(np.arange(N))
    arguments = collection.patches[queries], collection.masks[queries]
    full = shard.votes(*arguments, None, 0.4, queries)
    listed = shard.votes(*arguments, [np.arange(N)] * len(queries), 0.4, queries)
    assert full.candidates.tolist() == listed.candidates.tolist() == [N - 1] * N + [N] * Q
    for q in range(len(queries)):
        hit = listed[q].counts.any(axis=1)
        assert full[q].rows.tolist() == listed[q].rows[hit].tolist()
        assert full[q].sums.tobytes() == listed[q].sums[hit].tobytes()
    assert not all(len(full[q].rows) == full[q].candidates for q in range(len(queries)))


def test_masked_patches_do_not_exist():
    """The result is that of images which never had the patches, and P counts what is left."""
    collection = Collection(5, masked=True)
    votes = collection.shard(np.arange(N)).votes(collection.patches[N:], collection.masks[N:], None, 0.4)
    for q in range(Q):
        cut = [collection.patches[i][collection.masks[i]] for i in range(N)]
        alone = voting.votes(collection.patches[N + q][collection.masks[N + q]], cut, 0.4)
        assert votes.patches[q] == collection.masks[N + q].sum()
        assert votes[q].sums.tobytes() == alone.sums[votes[q].rows].tobytes()
        assert voting.scores(votes[q], "tfidf").tobytes() == voting.scores(alone, "tfidf")[votes[q].rows].tobytes()


def test_an_image_never_votes_for_itself_but_for_its_duplicate():
    collection = Collection(0)
    found = search(collection, [np.arange(8), np.arange(8, N)], np.array([3, 11]), full=True, weights="none")
    assert 3 not in found[3][1] and 11 not in found[11][1]
    assert found[3][3][0] == 11
    assert found[11][3][0] == 3
    short = search(collection, [np.arange(N)], np.array([3]), k=N)
    assert sorted(short[3][0]) == sorted(set(range(N)) - {3})


def test_self_among_given_candidates_is_left_out():
    collection = Collection(0)
    votes = collection.shard(np.arange(N)).votes(collection.patches[[4]], None, [[4, 2]], 0.4, np.array([4]))
    assert votes[0].rows.tolist() == [2]
    assert votes.candidates.tolist() == [1]


def test_exact_duplicates_tie_by_database_row():
    collection = Collection(0)
    found = search(collection, [np.arange(N)], np.array([N]), full=True, weights="none")
    assert found[N][3][:2] == [3, 11]
    assert found[N][0][:2] == [3, 11]


def test_a_query_stays_in_its_scene():
    collection, queries = Collection(6), np.arange(N + Q)
    for full in (False, True):
        found = search(collection, [np.arange(6), np.arange(6, N)], queries, k=N, scenes=True, full=full)
        for query in queries:
            same = set(np.flatnonzero(collection.scenes[:N] == collection.scenes[query])) - {query}
            assert set(found[query][0]) == same
            assert set(found[query][1]) <= same
    with pytest.raises(ValueError, match="scene codes"):
        collection.shard(np.arange(N)).shortlist(collection.globals[N:], K, scenes=collection.scenes[N:])
    with pytest.raises(ValueError, match="scene codes"):
        collection.shard(np.arange(N)).votes(collection.patches[N:], None, None, 0.4, scenes=collection.scenes[N:])


def test_a_scene_that_the_shard_lacks_gives_nothing():
    collection = Collection(6)
    shard = collection.shard(np.arange(N), scenes=True)
    assert len(shard.shortlist(collection.globals[N:], K, scenes=np.full(Q, 99)).rows) == 0
    votes = shard.votes(collection.patches[N:], None, None, 0.4, scenes=np.full(Q, 99))
    assert len(votes.rows) == 0
    assert voting.scores(votes[0], "tfidf").size == 0


def test_candidates_of_other_shards_are_ignored():
    collection = Collection(7)
    votes = collection.shard(np.arange(4, 9)).votes(collection.patches[N:], None, [[16, 8, 0, 4]] * Q, 0.4)
    assert [votes[q].rows.tolist() for q in range(Q)] == [[4, 8]] * Q
    assert votes.candidates.tolist() == [2] * Q


def test_shortlist_with_many_equal_scores_is_decided_by_row():
    """More ties than any margin: FAISS returns any of them, the answer must be the first rows."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(G).astype(np.float32)
    globals_ = np.concatenate([np.tile(base, (300, 1)), rng.standard_normal((100, G)).astype(np.float32) * 0.1])
    rows = rng.permutation(400)
    query = base[None]
    for parts in ([np.arange(400)], np.array_split(np.arange(400), 7)):
        found = []
        for part in parts:
            index = shortlist.GlobalIndex(globals_[rows[part]], rows[part])
            found.append(index.search(query, 10))
        merged = shortlist.merge(found, 10)
        assert merged[0].tolist() == list(range(10))
        assert len(set(merged.scores_of(0))) == 1


@pytest.mark.parametrize("count", [1, 3, 40])
def test_shortlist_does_not_depend_on_the_batch(count):
    rng = np.random.default_rng(1)
    database, queries = (rng.standard_normal((n, 64)).astype(np.float32) * 40 for n in (500, 40))
    index = shortlist.GlobalIndex(database, np.arange(500))
    expected = [oracle.shortlist(query, dict(enumerate(database)), 7) for query in queries[:5]]
    whole = index.search(queries, 7)
    parts = [index.search(queries[i : i + count], 7) for i in range(0, 40, count)]
    assert [whole[q].tolist() for q in range(5)] == expected
    assert np.concatenate([part.scores for part in parts]).tobytes() == whole.scores.tobytes()
    assert np.concatenate([part.rows for part in parts]).tobytes() == whole.rows.tobytes()


def test_shortlist_is_shorter_where_fewer_exist():
    collection = Collection(3)
    found = collection.shard(np.arange(4)).shortlist(collection.globals[[0, N]], 10, np.array([0, N]))
    assert len(found) == 2
    assert len(found[0]) == 3 and len(found[1]) == 4
    with pytest.raises(IndexError):
        found[2]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "PCA8,Flat", "SQ8"])
def test_factories_search_with_and_without_scenes(factory):
    rng = np.random.default_rng(2)
    globals_, scenes = rng.standard_normal((400, 16)).astype(np.float32), np.arange(400) % 2
    index = shortlist.GlobalIndex(globals_, np.arange(400), scenes, factory)
    queries = np.arange(20)
    plain = index.search(globals_[queries], 5, queries)
    inside = index.search(globals_[queries], 5, queries, scenes[queries])
    for q in queries:
        assert len(plain[q]) == len(inside[q]) == 5
        assert q not in plain[q]
        assert (scenes[inside[q]] == scenes[q]).all()
        exact = globals_[plain[q]].astype(np.float64) @ globals_[q]
        np.testing.assert_allclose(plain.scores_of(q), exact, rtol=1e-6)


def test_read_only_and_mapped_patches_will_do(tmp_path):
    collection = Collection(8, masked=True)
    np.save(tmp_path / "patches.npy", collection.patches[:N])
    mapped = np.load(tmp_path / "patches.npy", mmap_mode="r")
    shard = ShardIndex(mapped, collection.globals[:N], np.arange(N), collection.masks[:N])
    arguments = collection.patches[N:], collection.masks[N:], None, 0.4
    assert shard.votes(*arguments).sums.tobytes() == collection.shard(np.arange(N)).votes(*arguments).sums.tobytes()


def test_wrong_arguments_are_refused():
    collection = Collection(0)
    patches, globals_, rows = collection.patches[:3], collection.globals[:3], np.arange(3)
    with pytest.raises(ValueError, match="2 globals for 3 rows"):
        ShardIndex(patches, globals_[:2], rows)
    with pytest.raises(ValueError, match="appear once"):
        ShardIndex(patches, globals_, [0, 1, 1])
    with pytest.raises(ValueError, match="fewer shards"):
        ShardIndex(patches[:0], globals_[:0], rows[:0])
    shard = ShardIndex(patches, globals_, rows)
    with pytest.raises(ValueError, match="expected"):
        shard.shortlist(globals_[:, :-1], 1)
    with pytest.raises(ValueError, match="same encoder"):
        shard.votes(patches[:, :, :-1], None, None, 0.3)
    with pytest.raises(ValueError, match="twice"):
        shard.votes(patches[:1], None, [[1, 2, 1]], 0.3)
    with pytest.raises(ValueError, match="2 candidates for 1 queries"):
        shard.votes(patches[:1], None, [[1], [2]], 0.3)


def test_memory_is_about_what_the_arrays_take():
    collection = Collection(0, dtype=np.float16)
    arrays = collection.patches.nbytes + collection.globals.nbytes
    assert arrays < memory_bytes(N + Q, P, E, "float16", G) < 1.5 * arrays
