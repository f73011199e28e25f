from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop.quantised import stored
from vop.retrieval import index, pair_votes, shortlist, voting
from vop.retrieval.index import ShardIndex, Wanted, memory_bytes

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


def all_pairs(collection, queries, rows=N, scenes=False, mutual=False):
    """Every query with every row but itself, inside its scene if asked."""
    query, row = np.divmod(np.arange(len(queries) * rows), rows)
    kept = queries[query] != row
    if scenes:
        kept &= collection.scenes[queries[query]] == collection.scenes[row]
    return Wanted(query[kept], row[kept], np.full(kept.sum(), mutual))


def listed_pairs(found):
    """The pairs of a merged shortlist."""
    rows = [found[q] for q in range(len(found))]
    query = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    return Wanted(query, np.concatenate(rows), np.zeros(len(query), bool))


def search(collection, parts, queries, k=K, scenes=False, full=False, exclude=True, radius=0.4, weights="tfidf"):
    """Shortlist and scores of `queries` from the shards `parts`: {query: (shortlist, rows, score bytes, ranking)}."""
    shards = [collection.shard(part, scenes) for part in parts]
    codes = collection.scenes[queries] if scenes else None
    own = queries if exclude else None
    found = shortlist.merge([shard.shortlist(collection.globals[queries], k, own, codes) for shard in shards], k)
    masks = None if collection.masks is None else collection.masks[queries]
    wanted = all_pairs(collection, queries, scenes=scenes) if full else listed_pairs(found)
    merged = pair_votes.merge([shard.votes(collection.patches[queries], masks, wanted, radius)[0] for shard in shards])
    result = {}
    for q, query in enumerate(queries):
        size = P if masks is None else masks[q].sum()
        votes = merged.of(q, size, np.count_nonzero(wanted.queries == q))
        values = voting.scores(votes, weights)
        order = voting.best(values, votes.rows, k)
        result[int(query)] = (found[q].tolist(), votes.rows.tolist(), values.tobytes(), votes.rows[order].tolist())
    return result


def in_bytes(votes):
    return {name: (array.dtype, array.tobytes()) for name, array in vars(votes).items()}


@given(
    cuts=st.sets(st.integers(1, N - 1)),
    seed=st.integers(0, 3),
    masked=st.booleans(),
    half=st.booleans(),
    scenes=st.booleans(),
    full=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40)
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
        rows = [row for row in sorted(near) if any(oracle.pair(patches[query], patches[row], radius)[1])]
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
    for rows, suffix in ((golden["shortlist"], ""), (np.tile(np.arange(40), (12, 1)), "_full_db")):
        wanted = Wanted(np.repeat(np.arange(12), rows.shape[1]), rows.ravel(), np.zeros(rows.size, bool))
        merged = pair_votes.merge([shard.votes(queries, None, wanted, float(golden["radius"]))[0] for shard in shards])
        for weights, name in (("none", "unweighted"), ("tfidf", "weighted")):
            table = np.zeros((12, 40))
            for q in range(12):
                votes = merged.of(q, queries.shape[1], rows.shape[1])
                table[q, votes.rows] = voting.scores(votes, weights)
            np.testing.assert_allclose(table, golden[name + suffix], rtol=1e-6)


def awkward(seed, images, width=48):
    """Images (images, 40, width) that try the integer pass, each in its own way; see `tests/test_voting.py`."""
    rng = np.random.default_rng(seed)
    random = unit(rng.standard_normal((images, 40, width)))
    spiky = rng.choice([-0.4, 0.4, 0.49, 1.5], random.shape) / 45
    spiky[..., 0] = 1
    things = unit(rng.standard_normal((5, width)))
    dense = unit(things[rng.integers(5, size=(images, 40))] + 0.05 * rng.standard_normal(random.shape))
    constant = np.ones(random.shape) * rng.choice([-1, 0, 1], (images, 40, 1))
    kinds = np.stack([random, unit(spiky), dense, unit(constant)])
    mixed = np.where(rng.random((images, 40, 1)) < 0.5, dense, random)
    chosen = kinds[np.arange(images) % 4, np.arange(images)]
    chosen[4::5] = mixed[4::5]
    return chosen.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("radius", [0.2, 0.4, 0.75, 1.0, 1.3])
def test_the_integer_pass_leaves_no_trace_in_the_bits(radius, dtype):
    images = stored(awkward(0, 14), dtype)
    masks = np.random.default_rng(1).random((14, 40)) < 0.8
    masks[6] = False
    shard = ShardIndex(images[:9], images[:9, 0], np.arange(9), masks[:9])
    query, row = np.divmod(np.arange(5 * 9), 9)
    wanted = Wanted(query, row, row % 2 == 0)
    with_integers, without = (shard.votes(images[9:], masks[9:], wanted, radius, screens) for screens in (True, False))
    for one, other in zip(with_integers, without, strict=True):
        assert in_bytes(one) == in_bytes(other)
        assert one.counts.sum() > 0
        assert 6 not in one.rows and (one is not with_integers[1] or 6 not in one.queries)


def test_a_threshold_among_the_similarities_leaves_no_trace_either():
    """Thresholds at similarities that occur: where the integers cannot tell, and a strict comparison decides."""
    images = awkward(2, 4)
    shard = ShardIndex(images[:1], images[:1, 0], [0])
    wanted = Wanted(np.arange(3), np.zeros(3, np.int64), np.ones(3, bool))
    similarities = np.sort((images[1:] @ images[0].T).ravel())
    for value in similarities[:: len(similarities) // 200]:
        results = [shard.votes(images[1:], None, wanted, 1 - float(value), screens) for screens in (True, False)]
        assert [in_bytes(votes) for votes in results[0]] == [in_bytes(votes) for votes in results[1]]


@pytest.mark.parametrize("screens", [True, False])
@pytest.mark.parametrize(("masked", "dtype"), [(False, np.float32), (True, np.float16)])
def test_mutual_votes_are_those_of_the_swapped_pair(masked, dtype, screens):
    collection, queries = Collection(4, masked, dtype), np.arange(N, N + Q)
    masks = None if collection.masks is None else collection.masks[queries]
    wanted = all_pairs(collection, queries, mutual=True)
    there, back = collection.shard(np.arange(N)).votes(collection.patches[queries], masks, wanted, 0.4, screens)
    swapped = ShardIndex(
        collection.patches[queries], collection.globals[queries], np.arange(Q), None if masks is None else masks
    )
    others = Wanted(wanted.rows, wanted.queries, wanted.mutual)
    rows_masks = None if collection.masks is None else collection.masks[:N]
    expected_back, expected_there = swapped.votes(collection.patches[:N], rows_masks, others, 0.4, screens)
    assert in_bytes(there) == in_bytes(expected_there)
    assert in_bytes(back) == in_bytes(expected_back)
    assert len(there) == len(back) > 10
    assert in_bytes(there) != in_bytes(back)


def test_votes_back_are_given_where_they_are_wanted():
    collection, queries = Collection(4), np.arange(N, N + Q)
    shard, arguments = collection.shard(np.arange(N)), (collection.patches[queries], None)
    every = all_pairs(collection, queries, mutual=True)
    some = Wanted(every.queries, every.rows, every.rows % 3 == 0)
    there, back = shard.votes(*arguments, every, 0.4)
    there_again, some_back = shard.votes(*arguments, some, 0.4)
    assert in_bytes(there_again) == in_bytes(there)
    assert 0 < len(some_back) < len(back)
    assert in_bytes(some_back) == in_bytes(back.take(np.flatnonzero(back.queries % 3 == 0)))
    none = Wanted(every.queries, every.rows, np.zeros(len(every), bool))
    assert len(shard.votes(*arguments, none, 0.4)[1]) == 0


def test_a_register_scores_a_pair_once():
    """Half of the pairs with their votes back are all the votes: what an unordered pair saves."""
    collection, images = Collection(7, masked=True), np.arange(N)
    shard, arguments = collection.shard(images), (collection.patches[:N], collection.masks[:N])
    every = all_pairs(collection, images)
    upper = every.queries < every.rows
    half = Wanted(every.queries[upper], every.rows[upper], np.ones(upper.sum(), bool))
    assert in_bytes(pair_votes.merge(shard.votes(*arguments, half, 0.4))) == in_bytes(
        shard.votes(*arguments, every, 0.4)[0]
    )


@pytest.mark.parametrize("at_once", [1, 7])
def test_the_number_of_pairs_at_once_leaves_no_trace(monkeypatch, at_once):
    collection, queries = Collection(2, masked=True), np.arange(N + Q)
    shard, wanted = collection.shard(np.arange(N)), all_pairs(collection, queries, mutual=True)
    arguments = collection.patches, collection.masks, wanted, 0.4
    expected = shard.votes(*arguments)
    monkeypatch.setattr(index, "PAIRS_AT_ONCE", at_once)
    assert [in_bytes(votes) for votes in shard.votes(*arguments)] == [in_bytes(votes) for votes in expected]


@given(data=st.data(), seed=st.integers(0, 3))
@settings(max_examples=20)
def test_the_order_of_the_wanted_pairs_leaves_no_trace(data, seed):
    collection, queries = Collection(seed), np.arange(N, N + Q)
    every = all_pairs(collection, queries, mutual=True)
    order = np.array(data.draw(st.permutations(range(len(every)))))
    some = order[: data.draw(st.integers(0, len(order)))]
    shuffled = Wanted(every.queries[some], every.rows[some], every.mutual[some])
    shard = collection.shard(np.arange(N))
    there, back = shard.votes(collection.patches[queries], None, every, 0.4)
    found, found_back = shard.votes(collection.patches[queries], None, shuffled, 0.4)
    kept = set(zip(shuffled.queries.tolist(), shuffled.rows.tolist(), strict=True))
    listed = [pair in kept for pair in zip(there.queries.tolist(), there.rows.tolist(), strict=True)]
    listed_back = [pair in kept for pair in zip(back.rows.tolist(), back.queries.tolist(), strict=True)]
    assert in_bytes(found) == in_bytes(there.take(np.flatnonzero(listed)))
    assert in_bytes(found_back) == in_bytes(back.take(np.flatnonzero(listed_back)))


def test_only_pairs_with_a_hit_are_returned():
    collection, queries = Collection(2, masked=True), np.arange(N + Q)
    wanted = all_pairs(collection, queries)
    votes, _ = collection.shard(np.arange(N)).votes(collection.patches, collection.masks, wanted, 0.4)
    expected = []
    for query, row in zip(wanted.queries, wanted.rows, strict=True):
        x, y = (collection.patches[i][collection.masks[i]] for i in (query, row))
        if voting.pair_votes(x, y, 0.4)[1].any():
            expected.append((query, row))
    assert list(zip(votes.queries, votes.rows, strict=True)) == expected
    assert 0 < len(expected) < len(wanted)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_masked_patches_do_not_exist(dtype):
    """The result is that of images which never had the patches, and P counts what is left."""
    collection = Collection(5, masked=True, dtype=dtype)
    collection.masks[[2, N + 1]] = False
    shard, queries = collection.shard(np.arange(N)), np.arange(N, N + Q)
    wanted = all_pairs(collection, queries, mutual=True)
    merged, back = shard.votes(collection.patches[N:], collection.masks[N:], wanted, 0.4)
    cut = [collection.patches[i][collection.masks[i]] for i in range(N + Q)]
    for q in range(Q):
        alone = voting.votes(cut[N + q], cut[:N], 0.4)
        votes = merged.of(q, len(cut[N + q]), N)
        assert votes.rows.tolist() == np.flatnonzero(alone.counts.any(axis=1)).tolist()
        assert votes.sums.tobytes() == alone.sums[votes.rows].tobytes()
        assert voting.scores(votes, "tfidf").tobytes() == voting.scores(alone, "tfidf")[votes.rows].tobytes()
    for row in range(N):
        alone = voting.votes(cut[row], cut[N:], 0.4)
        votes = back.of(row, len(cut[row]), Q)
        assert votes.sums.tobytes() == alone.sums[votes.rows].tobytes()
        assert votes.rows.tolist() == np.flatnonzero(alone.counts.any(axis=1)).tolist()
    assert 2 not in merged.rows and 1 not in merged.queries


def test_an_image_never_votes_for_itself_but_for_its_duplicate():
    collection = Collection(0)
    found = search(collection, [np.arange(8), np.arange(8, N)], np.array([3, 11]), full=True, weights="none")
    assert 3 not in found[3][1] and 11 not in found[11][1]
    assert found[3][3][0] == 11
    assert found[11][3][0] == 3
    short = search(collection, [np.arange(N)], np.array([3]), k=N)
    assert sorted(short[3][0]) == sorted(set(range(N)) - {3})


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


def test_a_scene_that_the_shard_lacks_gives_nothing():
    collection = Collection(6)
    shard = collection.shard(np.arange(N), scenes=True)
    assert len(shard.shortlist(collection.globals[N:], K, scenes=np.full(Q, 99)).rows) == 0


def test_rows_of_other_shards_are_ignored():
    collection = Collection(7)
    query, row = np.divmod(np.arange(4 * Q), 4)
    wanted = Wanted(query, np.array([16, 8, 0, 4])[row], np.ones(4 * Q, bool))
    there, back = collection.shard(np.arange(4, 9)).votes(collection.patches[N:], None, wanted, 1.5)
    assert there.rows.tolist() == [4, 8] * Q
    assert there.queries.tolist() == np.repeat(np.arange(Q), 2).tolist()
    assert back.queries.tolist() == [4] * Q + [8] * Q
    for rows in ([0, 16, 17], []):
        nothing = Wanted(np.zeros(len(rows), np.int64), np.array(rows, np.int64), np.ones(len(rows), bool))
        for votes in collection.shard(np.arange(4, 9)).votes(collection.patches[N:], None, nothing, 1.5):
            assert in_bytes(votes) == in_bytes(pair_votes.NO_VOTES)


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
    frozen = collection.patches[:N].copy()
    frozen.flags.writeable = False
    queries = collection.patches[N:].copy()
    queries.flags.writeable = False
    wanted = all_pairs(collection, np.arange(N, N + Q), mutual=True)
    expected = collection.shard(np.arange(N)).votes(collection.patches[N:], collection.masks[N:], wanted, 0.4)
    for patches in (mapped, frozen, frozen.repeat(2, axis=0)[::2]):
        shard = ShardIndex(patches, collection.globals[:N], np.arange(N), collection.masks[:N])
        found = shard.votes(queries, collection.masks[N:], wanted, 0.4)
        assert [in_bytes(votes) for votes in found] == [in_bytes(votes) for votes in expected]


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
    one = Wanted(np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros(1, bool))
    for width in (E - 1, E + 1):  # both are padded to the same width, or not
        with pytest.raises(ValueError, match="same encoder"):
            shard.votes(np.ones((1, P, width), np.float32), None, one, 0.3)
    with pytest.raises(ValueError, match="cosine distance"):
        shard.votes(patches, None, one, 2.1)
    with pytest.raises(ValueError, match="float64"):
        shard.votes(patches.astype(np.float64), None, one, 0.3)
    with pytest.raises(ValueError, match="float64"):
        ShardIndex(patches.astype(np.float64), globals_, rows).votes(patches, None, one, 0.3)
    twice = Wanted(np.zeros(2, np.int64), np.ones(2, np.int64), np.zeros(2, bool))
    with pytest.raises(ValueError, match="query 0 for row 1 came twice"):
        shard.votes(patches, None, twice, 1.5)


def test_memory_is_about_what_the_arrays_take():
    collection = Collection(0, dtype=np.float16)
    arrays = collection.patches.nbytes + collection.globals.nbytes
    fixed = memory_bytes(0, 0, P, E, "float16", G, 0)
    assert arrays < memory_bytes(N + Q, N + Q, P, E, "float16", G, 0) - fixed < 1.5 * arrays
    assert memory_bytes(N + Q, 0, P, E, "float16", G, 0) - fixed < arrays / 2
    assert memory_bytes(0, 0, P, E, "float16", G, 64) - fixed == 64 * P * E * 7
