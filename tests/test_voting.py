from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.errors import TypingError

from vop.retrieval import kernel, voting

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "golden_voting.npz"


def unit(x):
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def clustered(seed, images, P, E, spread=0.5):
    """Unit patches (images, P, E) around shared centres, so that some of them hit each other."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, E))
    return unit(centres[rng.integers(12, size=(images, P))] + spread * rng.standard_normal((images, P, E)))


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is absent")
    data = dict(np.load(GOLDEN))
    return {
        key: unit(value) if key.endswith("_desc") or key in ("tie_query", "tie_db") else value
        for key, value in data.items()
    }


def table(queries, database, shortlists, radius, weights):
    out = np.zeros((len(queries), len(database)))
    for q, rows in enumerate(shortlists):
        votes = voting.votes(queries[q], [database[j] for j in rows], radius, rows)
        out[q, votes.rows] = voting.scores(votes, weights)
    return out


@pytest.mark.parametrize("weights", ["none", "tfidf"])
def test_golden_retrieval(golden, weights):
    name, radius = "weighted" if weights == "tfidf" else "unweighted", float(golden["radius"])
    arguments = golden["query_desc"], golden["db_desc"]
    np.testing.assert_allclose(table(*arguments, golden["shortlist"], radius, weights), golden[name], rtol=1e-6)
    every = [np.arange(40)] * 12
    np.testing.assert_allclose(table(*arguments, every, radius, weights), golden[f"{name}_full_db"], rtol=1e-6)


@pytest.mark.parametrize("weights", ["none", "tfidf"])
def test_golden_register(golden, weights):
    name, radius, images = (
        "weighted" if weights == "tfidf" else "unweighted",
        float(golden["radius"]),
        golden["reg_desc"],
    )
    others = [np.delete(np.arange(15), q) for q in range(15)]
    np.testing.assert_allclose(table(images, images, others, radius, weights), golden[f"reg_{name}"], rtol=1e-6)
    short = table(images, images, golden["reg_shortlist"], radius, weights)
    np.testing.assert_allclose(short, golden[f"reg_{name}_shortlist"], rtol=1e-6)


def test_golden_ties(golden):
    for weights, name in (("none", "tie_unweighted"), ("tfidf", "tie_weighted")):
        votes = voting.votes(golden["tie_query"][0], golden["tie_db"], float(golden["tie_radius"]), np.array([9, 4]))
        values = voting.scores(votes, weights)
        np.testing.assert_allclose(values, golden[name][0], rtol=1e-6)
        assert votes.rows[voting.best(values, votes.rows, 2)].tolist() == [4, 9]


def test_golden_automatic_radius(golden):
    for images, name in (
        (golden["reg_desc"], "auto_reg_intended"),
        (np.concatenate([golden["query_desc"], golden["db_desc"]]), "auto_ret_intended"),
    ):
        assert voting.automatic_radius(images) == golden[name][0]
        assert voting.median_similarity(images) == pytest.approx(golden[name][1], rel=1e-6)


@pytest.mark.parametrize(("P", "Q", "E"), [(1, 1, 1), (23, 5, 7), (24, 4, 8), (25, 9, 33), (48, 31, 64)])
def test_pair_agrees_with_the_oracle(P, Q, E):
    x, y = clustered(P, 1, P, E)[0], clustered(P, 2, Q, E)[1]
    radius = oracle.clear_radius(x, y, 0.4) if E > 1 else 0.4
    sums, counts = voting.pair_votes(x, y, radius)
    expected_sums, expected_counts = oracle.pair(x, y, radius)
    assert sums.dtype == np.float32
    assert counts.tolist() == expected_counts
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)


@pytest.mark.parametrize("weights", ["none", "idf", "tfidf"])
def test_scores_agree_with_the_oracle(weights):
    images = clustered(3, 9, 14, 16)
    radius = oracle.clear_radius(images[0], images[1:], 0.35)
    votes = voting.votes(images[0], images[1:], radius, np.arange(1, 9))
    expected = oracle.scores(images[0], dict(enumerate(images[1:], 1)), radius, weights)
    values = voting.scores(votes, weights)
    np.testing.assert_allclose(values, list(expected.values()), rtol=1e-6)
    assert votes.rows[voting.best(values, votes.rows, 5)].tolist() == oracle.ranking(expected, 5)


@given(cuts=st.sets(st.integers(1, 11)), seed=st.integers(0, 5), P=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_merged_parts_have_the_bits_of_the_whole(cuts, seed, P):
    images = clustered(seed, 13, 20, 16)
    query, rows = images[12][:P], np.random.default_rng(seed).permutation(12)
    whole = voting.votes(query, images[rows], 0.4, rows)
    parts = [voting.votes(query, images[part], 0.4, part) for part in np.split(rows, sorted(cuts))]
    merged = voting.merge(parts[::-1])
    assert merged.rows.tolist() == whole.rows.tolist() == list(range(12))
    assert merged.candidates == whole.candidates == 12
    for weights in ("none", "idf", "tfidf"):
        assert voting.scores(merged, weights).tobytes() == voting.scores(whole, weights).tobytes()


def test_the_tiling_leaves_no_trace_in_the_bits():
    """Each patch's votes are those it gets alone against the candidate, and the sums run in the candidate's order."""
    x, y = clustered(1, 2, 50, 30)
    sums, counts = voting.pair_votes(x, y, 0.5)
    for p in range(50):
        one_sum, one_count = voting.pair_votes(x[p : p + 1], y, 0.5)
        total = np.float32(0)
        for s in range(50):
            total += voting.pair_votes(x[p : p + 1], y[s : s + 1], 0.5)[0][0]
        assert sums[p] == one_sum[0] == total
        assert counts[p] == one_count[0]


def test_threads_share_nothing():
    x, *others = clustered(2, 9, 40, 32)
    expected = [voting.pair_votes(x, y, 0.4)[0].tobytes() for y in others]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [a.tobytes() for a, _ in pool.map(lambda y: voting.pair_votes(x, y, 0.4), others)] == expected


def test_a_hit_is_strictly_above_the_threshold():
    x = np.array([[1.0, 0.0]], np.float32)
    y = np.array([[0.5, 0.0], [np.nextafter(np.float32(0.5), np.float32(1)), 0.0]], np.float32)
    assert voting.pair_votes(x, y, 0.5)[1].tolist() == [1]


def test_zero_patches_never_vote():
    x = np.zeros((3, 8), np.float32)
    x[1, 0] = 1
    sums, counts = voting.pair_votes(x, x, 0.9)
    assert sums.tolist() == [0, 1, 0]
    assert counts.tolist() == [0, 1, 0]


def test_a_query_without_hits_has_no_result():
    x, y = np.eye(4, dtype=np.float32)[:2], np.eye(4, dtype=np.float32)[2:]
    votes = voting.votes(x, [y, y], 0.3)
    for weights in ("none", "idf", "tfidf"):
        values = voting.scores(votes, weights)
        assert values.tolist() == [0, 0]
        assert voting.best(values, votes.rows, 2).size == 0


def test_a_patch_that_every_candidate_has_weighs_nothing():
    """The point of the weights: ln(n / n) = 0 for what is everywhere, more for what is rare."""
    common, rare = np.eye(2, dtype=np.float32)
    votes = voting.votes(np.stack([common, rare]), [np.stack([common, rare]), common[None], common[None]], 0.5)
    assert voting.patch_weights(votes, "tfidf")[0] == 0
    assert voting.patch_weights(votes, "tfidf")[1] == pytest.approx(1 / 2 * np.log(3 / (1 + 1e-5)))
    assert voting.scores(votes, "tfidf")[1:].tolist() == [0, 0]
    assert voting.scores(votes, "none").tolist() == [2, 1, 1]


def test_candidates_without_hits_count_even_when_left_out():
    images = clustered(4, 5, 12, 16)
    full = voting.votes(images[0], [*images[1:], np.zeros((2, 16), np.float32)], 0.4)
    short = voting.Votes(full.rows[:4], full.sums[:4], full.counts[:4], full.candidates)
    assert voting.scores(short, "tfidf").tolist() == voting.scores(full, "tfidf")[:4].tolist()


def test_best_is_descending_with_ties_by_row():
    scores, rows = np.array([1.0, 3, 0, 3, 2]), np.array([8, 7, 1, 5, 6])
    assert rows[voting.best(scores, rows, 10)].tolist() == [5, 7, 6, 8]
    assert rows[voting.best(scores, rows, 1)].tolist() == [5]


def test_every_float16_number_widens_exactly():
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    halves = bits.view(np.float16)
    out = np.empty(bits.shape, np.float32)
    assert kernel.widen(bits, np.ones(256, bool), out) == 256
    finite = np.isfinite(halves)
    assert finite.sum() == 2**16 - 2**11
    assert np.array_equal(out[finite].view(np.uint32), halves[finite].astype(np.float32).view(np.uint32))


def test_the_kernel_refuses_arrays_it_would_misread():
    x = np.ones((5, 8), np.float32)
    packed, sums, counts = kernel.panels(x), np.empty(kernel.WIDTH, np.float32), np.empty(kernel.WIDTH, np.int32)
    bound = np.float32(0.5)
    with pytest.raises(ValueError, match="differ in width"):
        kernel.count_hits(packed, np.ones((5, 6), np.float32), bound, sums, counts)
    with pytest.raises(ValueError, match="one number for each"):
        kernel.count_hits(packed, x, bound, sums[:5], counts[:5])
    with pytest.raises(TypingError, match="C-contiguous"):
        kernel.count_hits(packed, np.ones((5, 16), np.float32)[:, ::2], bound, sums, counts)


def test_only_image_patches_are_widened():
    halves = np.arange(24, dtype=np.float16).reshape(6, 4)
    mask = np.array([0, 1, 1, 0, 0, 1], bool)
    out = np.full((6, 6), -1, np.float32)
    assert kernel.widen(halves.view(np.uint16), mask, out) == 3
    assert np.array_equal(out[:3, :4], halves[mask])
    assert (out[3:] == -1).all() and (out[:, 4:] == -1).all()


def test_half_and_single_precision_of_the_same_numbers_give_the_same_bits():
    x, y = clustered(5, 2, 30, 21).astype(np.float16)
    a, b = voting.pair_votes(x, y, 0.4), voting.pair_votes(x.astype(np.float32), y.astype(np.float32), 0.4)
    assert a[0].tobytes() == b[0].tobytes()
    assert b[1].sum() > 0


@pytest.mark.parametrize("radius", [0, -0.1, 2.5, float("nan")])
def test_a_radius_out_of_range_is_refused(radius):
    with pytest.raises(ValueError, match="cosine distance"):
        voting.threshold(radius)


def test_descriptors_of_other_widths_or_types_are_refused():
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="same encoder"):
        voting.pair_votes(x, np.zeros((2, 6), np.float32), 0.3)
    with pytest.raises(ValueError, match="float64"):
        voting.pair_votes(x, np.zeros((2, 8)), 0.3)


@pytest.mark.parametrize(
    "patches", [np.tile(np.eye(8, dtype=np.float32)[0], (3, 4, 1)), np.eye(8, dtype=np.float32)[None]]
)
def test_an_automatic_radius_out_of_range_names_the_remedy(patches):
    with pytest.raises(ValueError, match="give a radius"):
        voting.automatic_radius(patches)


def test_radius_sample_is_fixed_and_bounded():
    assert voting.radius_sample(7).tolist() == list(range(7))
    sample = voting.radius_sample(5000)
    assert len(np.unique(sample)) == 100
    assert sample.tolist() == voting.radius_sample(5000).tolist()
    assert sample.tolist() != voting.radius_sample(5000, seed=1).tolist()
