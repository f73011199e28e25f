"""The full search by FAISS against the exact kernel, whose bits "Flat" must give, and against the float64 oracle."""

from types import SimpleNamespace

import faiss
import numpy as np
import oracle
import pytest

from vop.quantised import stored, widen
from vop.retrieval import pair_votes
from vop.retrieval import patches as module
from vop.retrieval.index import ShardIndex, Wanted
from vop.retrieval.patches import PatchIndex, memory_bytes

N, Q, P, E, RADIUS = 60, 5, 25, 16, 0.4


@pytest.fixture(autouse=True)
def one_thread():
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def unit(x):
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def collection(dtype="float32", masked=True, seed=0, images=N, patches=P):
    """N clustered database images, then Q queries; among them zero patches, a duplicate and an all-padding image."""
    rng = np.random.default_rng(seed)
    centres, shape = rng.standard_normal((8, E)), (images + Q, patches)
    x = unit(centres[rng.integers(8, size=shape)] + 0.5 * rng.standard_normal((*shape, E)))
    x[:, 3::9] = 0
    x[images] = x[7]
    masks = rng.random(shape) < 0.7 if masked else np.ones(shape, bool)
    masks[4] = not masked
    return SimpleNamespace(patches=stored(x, dtype), masks=masks)


def exact(c, rows):
    return ShardIndex(c.patches[rows], np.ones((len(rows), 2), np.float32), rows, c.masks[rows])


def indexed(c, rows, *arguments):
    return PatchIndex(c.patches[rows], rows, c.masks[rows], *arguments)


def pairs(queries, images=N, share=1.0, mutual=True):
    """Pairs of queries (numbers of images) with database images, never an image with itself; all, or some."""
    rng = np.random.default_rng(1)
    query, row = np.divmod(np.arange(len(queries) * images), images)
    kept = (queries[query] != row) & (rng.random(len(query)) < share)
    order = rng.permutation(np.flatnonzero(kept))
    return Wanted(query[order], row[order], (rng.random(len(order)) < 0.5) & mutual)


def ask(index, c, queries, wanted, radius=RADIUS):
    return index.votes(c.patches[queries], c.masks[queries], wanted, radius)


def in_bytes(votes):
    return [{name: (array.dtype, array.tobytes()) for name, array in vars(side).items()} for side in votes]


def table(votes, queries, images=N, patches=P):
    """Sums and counts of all pairs, (queries, images, P) each."""
    sums, counts = np.zeros((queries, images, patches), np.float32), np.zeros((queries, images, patches), np.int64)
    at = np.repeat(votes.queries, np.diff(votes.starts)), np.repeat(votes.rows, np.diff(votes.starts)), votes.patches
    sums[at], counts[at] = votes.sums, votes.counts
    return sums, counts


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_flat_gives_the_bits_of_the_exact_kernel(dtype, masked, share):
    c, rows, queries = collection(dtype, masked), np.arange(N), np.array([3, 7, *range(N, N + Q)])
    wanted = pairs(queries, share=share)
    for radius in (0.02, RADIUS, 1.0, 1.5):
        found = ask(indexed(c, rows), c, queries, wanted, radius)
        assert in_bytes(found) == in_bytes(ask(exact(c, rows), c, queries, wanted, radius))
        assert len(found[0])
    assert 0 < len(found[1]) < len(found[0])


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_blocks_leave_no_trace(factory, monkeypatch):
    c, rows, queries = collection(), np.arange(N), np.arange(N, N + Q)
    wanted = pairs(queries)
    expected = in_bytes(ask(indexed(c, rows, factory), c, queries, wanted))
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 7)
    monkeypatch.setattr(module, "HITS_AT_ONCE", 100)
    assert in_bytes(ask(indexed(c, rows, factory), c, queries, wanted)) == expected
    monkeypatch.setattr(module, "PATCHES_AT_ONCE", 2)
    if factory == "Flat":
        assert in_bytes(ask(indexed(c, rows), c, queries, wanted)) == expected


@pytest.mark.parametrize("shards", [2, 5, N])
def test_shards_of_a_flat_index_merge_to_the_same_bits(shards):
    c, queries = collection("float16"), np.array([3, *range(N, N + Q)])
    wanted = pairs(queries)
    parts = np.array_split(np.random.default_rng(2).permutation(N), shards)
    answers = zip(*(ask(indexed(c, part), c, queries, wanted) for part in parts), strict=True)
    assert in_bytes(map(pair_votes.merge, answers)) == in_bytes(ask(exact(c, np.arange(N)), c, queries, wanted))


def test_agrees_with_the_oracle():
    c, queries = collection("float16"), np.arange(N, N + 2)
    x = [widen(c.patches[i][c.masks[i]]) for i in range(N + Q)]
    radius = oracle.clear_radius(np.concatenate([x[q] for q in queries]), np.concatenate(x[:20]), RADIUS)
    wanted = pairs(queries, images=20)
    rows = np.arange(20)
    forward, back = ask(indexed(c, rows), c, queries, wanted, radius)
    sums, counts = table(forward, len(queries), 20)
    for q, row in zip(wanted.queries, wanted.rows, strict=True):
        size = c.masks[queries[q]].sum()
        expected = oracle.pair(x[queries[q]], x[row], radius)
        assert counts[q, row, :size].tolist() == expected[1]
        np.testing.assert_allclose(sums[q, row, :size], expected[0], rtol=2e-6, atol=2e-6)
    assert set(zip(back.rows, back.queries, strict=True)) <= set(
        zip(wanted.queries[wanted.mutual], wanted.rows[wanted.mutual], strict=True)
    )
    one = 0
    q, row = int(back.rows[one]), int(back.queries[one])
    expected = np.array(oracle.pair(x[row], x[queries[q]], radius)[1])
    assert back.counts[: back.starts[1]].tolist() == expected[expected > 0].tolist()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ4x4", "HNSW4", "SQ4", "PQ4x4", "RR16,PQ4x4"])
def test_what_another_index_finds_is_among_the_hits_with_the_right_similarity(factory):
    """One patch an image: each pair has one similarity, and it is there or not."""
    images = 1500
    c, queries = collection(masked=False, images=images, patches=1), np.arange(images, images + Q)
    wanted = pairs(queries, images)
    every, _ = table(ask(exact(c, np.arange(images)), c, queries, wanted)[0], Q, images, 1)
    found, _ = table(ask(indexed(c, np.arange(images), factory), c, queries, wanted)[0], Q, images, 1)
    there = found != 0
    assert found[there].tobytes() == every[there].tobytes()
    assert 0 < there.sum() < (every != 0).sum()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16_HNSW8,Flat", "RR16,IVF16,Flat"])
def test_all_lists_are_the_flat_index(factory):
    c, rows, queries = collection("float16"), np.arange(N), np.arange(N, N + Q)
    wanted = pairs(queries)
    probe = "nprobe=16,quantizer_efSearch=64" if "HNSW" in factory else "nprobe=16"
    found = ask(indexed(c, rows, factory, probe), c, queries, wanted)
    expected = in_bytes(ask(exact(c, rows), c, queries, wanted))
    assert in_bytes(found) == expected
    assert in_bytes(ask(indexed(c, rows, factory), c, queries, wanted)) != expected


@pytest.mark.parametrize("factory", ["SQ4", "PQ4x4"])
def test_a_margin_makes_up_for_codes_that_lose_bits(factory):
    c, rows, queries = collection(), np.arange(N), np.arange(N, N + Q)
    wanted = pairs(queries)
    expected = ask(exact(c, rows), c, queries, wanted)
    found = [ask(indexed(c, rows, factory, None, margin), c, queries, wanted) for margin in (0.0, 0.1, 1.0)]
    hits = [answer[0].counts.sum() for answer in found]
    assert hits[0] < hits[1] <= hits[2] == expected[0].counts.sum()
    assert in_bytes(found[2]) == in_bytes(expected)


def test_a_trained_index_is_the_same_every_time_and_for_every_batch():
    c, rows, queries = collection(), np.arange(N), np.arange(N, N + Q)
    wanted = pairs(queries)
    expected = ask(indexed(c, rows, "IVF16,SQ8"), c, queries, wanted)
    again = indexed(c, rows, "IVF16,SQ8")
    assert in_bytes(ask(again, c, queries, wanted)) == in_bytes(expected)
    answers = []
    for q in range(Q):
        here = wanted.queries == q
        alone = Wanted(wanted.queries[here] * 0, wanted.rows[here], wanted.mutual[here])
        forward, back = ask(again, c, queries[[q]], alone)
        answers.append((forward, back))
    for side in (0, 1):
        hits = [answer[side].sums for answer in answers]
        order = np.argsort(np.repeat(expected[side].rows, np.diff(expected[side].starts)), kind="stable")
        together = expected[0].sums if side == 0 else expected[1].sums[order]
        assert np.concatenate(hits).tobytes() == together.tobytes()


def test_nothing_wanted_or_nothing_there_gives_nothing():
    c, queries = collection(), np.arange(N, N + Q)
    nobody = np.empty(0, np.int64)
    for rows, wanted in (
        (np.arange(10), Wanted(nobody, nobody, nobody.astype(bool))),
        (np.arange(10), Wanted(np.arange(2), np.array([30, 50]), np.ones(2, bool))),  # rows of other shards
        (np.array([4]), pairs(queries)),  # an image that is all padding
    ):
        for factory in ("Flat", "HNSW4"):
            assert [len(side) for side in ask(indexed(c, rows, factory), c, queries, wanted)] == [0, 0]
    c.masks[N] = False
    forward, _ = ask(indexed(c, np.arange(10)), c, queries, pairs(queries))
    assert set(forward.queries) == set(range(1, Q))


def test_a_graph_can_be_searched_far():
    """So far that FAISS would look for interrupts between two patches of one call, which ends the process."""
    c, rows, queries = collection(), np.arange(N), np.arange(N, N + 1)
    near, far = (ask(indexed(c, rows, "HNSW4", f"efSearch={ef}"), c, queries, pairs(queries)) for ef in (2, 10**7))
    assert 0 < near[0].counts.sum() < far[0].counts.sum()


def test_the_whole_image_takes_part_without_masks():
    c, rows, queries = collection(masked=False), np.arange(N), np.arange(N, N + Q)
    found = PatchIndex(c.patches[rows], rows).votes(c.patches[queries], None, pairs(queries), RADIUS)
    assert in_bytes(found) == in_bytes(ask(exact(c, rows), c, queries, pairs(queries)))


def test_wrong_arguments_are_refused():
    c, rows, queries = collection(masked=False), np.arange(10), np.arange(N, N + Q)
    with pytest.raises(ValueError, match=r"16 centroids .* 624 patches .* 10 images has 250: use up to 6 lists"):
        indexed(c, rows, "IVF16,Flat")
    with pytest.raises(ValueError, match="16 centroids"):
        indexed(c, rows, "IVF4,PQ4x4")
    with pytest.raises(ValueError, match="no index 'Flatt'"):
        indexed(c, rows, "Flatt")
    with pytest.raises(ValueError, match="no range"):
        indexed(c, np.arange(N), "PQ4x4fs")
    with pytest.raises(ValueError, match="no parameters 'nprobe=2'"):
        indexed(c, rows, "HNSW4", "nprobe=2")
    with pytest.raises(ValueError, match="margin is"):
        indexed(c, rows, "Flat", None, -0.1)
    with pytest.raises(ValueError, match="10 patches for 9 rows"):
        PatchIndex(c.patches[:10], np.arange(9))
    with pytest.raises(ValueError, match="each image appears once"):
        PatchIndex(c.patches[:2], [1, 1])
    index = indexed(c, rows)
    with pytest.raises(ValueError, match="same encoder"):
        index.votes(c.patches[queries, :, 1:], None, pairs(queries), RADIUS)
    with pytest.raises(ValueError, match="radius"):
        ask(index, c, queries, pairs(queries), 0.0)


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "PQ4x4", "IVF4,Flat", "IVF4,SQ8", "HNSW8", "HNSW8_SQ8", "RR16,PQ4x4"]
)
def test_memory_is_what_an_index_holds_and_room_to_grow(factory):
    c = collection(masked=False)
    small, large = (indexed(c, np.arange(n), factory) for n in (N // 2, N))
    held = len(faiss.serialize_index(large._index)) - len(faiss.serialize_index(small._index))
    million = 1_000_000  # images: enough that codes outweigh the sample
    declared = (memory_bytes(2 * million, P, E, factory) - memory_bytes(million, P, E, factory)) / million * N / 2
    assert held <= declared <= 2.3 * held + 4 * P * N
    with pytest.raises(ValueError, match="no index"):
        memory_bytes(10, P, E, "IVF")
