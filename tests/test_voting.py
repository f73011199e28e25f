import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.errors import TypingError

from vop.quantised import stored
from vop.retrieval import kernel, tiles, voting
from vop.retrieval.pair_votes import NO_VOTES, PairVotes, Votes, merge, threshold

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "golden_voting.npz"
needs_screens = pytest.mark.skipif(not tiles.SCREENS, reason="the integer pass needs AVX2")


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


@pytest.mark.parametrize(
    ("P", "Q", "E"), [(1, 1, 1), (1, 40, 16), (23, 5, 7), (24, 1, 8), (25, 9, 33), (48, 31, 64), (270, 3, 16)]
)
def test_pair_agrees_with_the_oracle(P, Q, E):
    x, y = clustered(P, 1, P, E)[0], clustered(P, 2, Q, E)[1]
    radius = oracle.clear_radius(x, y, 0.4) if E > 1 else 0.4
    sums, counts = voting.pair_votes(x, y, radius)
    expected_sums, expected_counts = oracle.pair(x, y, radius)
    assert sums.dtype == np.float32
    assert counts.tolist() == expected_counts
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)


@pytest.mark.parametrize("radius", [1, 1.25, 2])
def test_thresholds_of_zero_and_less_agree_with_the_oracle(radius):
    """Small whole numbers are multiplied exactly, so that the oracle decides ties at the threshold too."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-2, 3, (n, 9)).astype(np.float32) / 4 for n in (20, 35))
    x[::5], y[::7] = 0, 0
    sums, counts = voting.pair_votes(x, y, radius)
    expected_sums, expected_counts = oracle.pair(x, y, radius)
    assert counts.tolist() == expected_counts
    assert sums.tolist() == expected_sums


@pytest.mark.parametrize("weights", ["none", "idf", "tfidf"])
def test_scores_agree_with_the_oracle(weights):
    images = clustered(3, 9, 14, 16)
    radius = oracle.clear_radius(images[0], images[1:], 0.35)
    votes = voting.votes(images[0], images[1:], radius, np.arange(1, 9))
    expected = oracle.scores(images[0], dict(enumerate(images[1:], 1)), radius, weights)
    values = voting.scores(votes, weights)
    np.testing.assert_allclose(values, list(expected.values()), rtol=1e-6)
    assert votes.rows[voting.best(values, votes.rows, 5)].tolist() == oracle.ranking(expected, 5)


# --- the two passes ---------------------------------------------------------------------------------------------------


def constant(rng, P, E):
    """Patches of one value each, some equal, some opposite, some zero."""
    return unit(np.ones((P, E)) * rng.choice([-1, 0, 1, 1], (P, 1)))


def spiky(rng, P, E):
    """One entry takes the whole range of the integers, and the others, which decide, round badly."""
    x = rng.choice([-0.4, 0.4, 0.49, 1.5], (P, E)) / 45
    x[:, 0] = 1
    return unit(x)


def aligned(rng, P, E):
    """Every other patch is what the integers of the one before leave out, so that the error is as large as proven."""
    x = unit(rng.standard_normal((P, E)))
    for p in range(0, P - 1, 2):
        scale = np.abs(x[p]).max() / 45
        x[p + 1] = unit(x[p] - scale * np.rint(x[p] / scale))
    return x


def uneven(rng, P, E):
    """Lengths from 2**-20 to 2**20: nothing may rely on unit length."""
    return unit(rng.standard_normal((P, E))) * np.float32(2) ** rng.integers(-20, 21, (P, 1)).astype(np.float32)


def subnormal(rng, P, E):
    """The smallest numbers of float16 beside ordinary ones."""
    small = rng.integers(-3, 4, (P, E)) * 2.0**-24
    return np.where(rng.random((P, 1)) < 0.5, small, unit(rng.standard_normal((P, E)))).astype(np.float32)


KINDS = {
    "random": lambda rng, P, E: unit(rng.standard_normal((P, E))),
    "clustered": lambda rng, P, E: unit(np.eye(3, E)[rng.integers(3, size=P)] + 0.1 * rng.standard_normal((P, E))),
    "constant": constant,
    "spiky": spiky,
    "aligned": aligned,
    "uneven": uneven,
    "subnormal": subnormal,
    "zero": lambda rng, P, E: np.zeros((P, E), np.float32),
}


def image(rng, kinds, P, E):
    """Patches (P, E) float32 of the given kinds, shuffled."""
    every = np.concatenate([KINDS[kind](rng, P, E) for kind in kinds]).astype(np.float32)
    return every[rng.permutation(len(every))[:P]]


def count_hits(x, y, bound, screens, mutual=True):
    """What the kernel finds for one pair of images, in both directions."""
    packed = kernel.stack(x[None], np.ones((1, len(x)), bool))
    first, both = np.zeros(1, np.int64), np.full(1, mutual)
    mask = np.ones((1, len(y)), bool)
    return kernel.count_hits(packed, kernel.as_bits(y)[None], mask, first, first, both, np.float32(bound), screens)


def hits(*arguments):
    """The same as bytes."""
    return [[array.tobytes() for array in side] for side in count_hits(*arguments)]


def marked(x, y, bound):
    """The pairs (p, s) that the integer pass leaves over."""
    wide, *packed, _ = kernel.stack(x[None], np.ones((1, len(x)), bool))
    m, E = len(y), wide.shape[2]
    rows = -(-m // tiles.ROWS) * tiles.ROWS
    padded, levels = np.zeros((m, E), np.float32), np.zeros((rows, E), np.uint8)
    padded[:, : y.shape[1]] = y
    steps, norms, rests = (np.empty(m, np.float32) for _ in range(3))
    for s in range(m):
        steps[s], norms[s], rests[s] = kernel._quantise(padded[s], levels[s])
    slope, limit = np.empty((2, rows), np.float32)
    marks = np.empty((packed[1].shape[1] // tiles.LANES, rows), np.uint8)
    p, s = np.empty((2, len(x) * m + 4), np.uint32)
    scratch = slope, limit, marks, p, s
    query = tuple(array[0] for array in packed)
    found = kernel._screen(query, len(x), m, levels, steps, norms, rests, np.float32(bound), *scratch)
    return {(int(a), int(b)) for a, b in zip(p[:found], s[:found], strict=True)}


def similarity_table(x, y):
    """The kernel's own similarity of every pair, (len(x), len(y)) float32."""
    columns = [count_hits(x, y[s : s + 1], -np.inf, False)[0][3] for s in range(len(y))]
    return np.stack(columns, axis=1)


def draw_bound(data, similarities):
    """A threshold anywhere, or at a similarity that occurs, or one float beside it."""
    if data.draw(st.booleans()):
        return np.float32(data.draw(st.sampled_from([-0.9, -1e-6, 0, 1e-6, 0.1, 0.5, 0.7, 0.99])))
    value = similarities.flat[data.draw(st.integers(0, similarities.size - 1))]
    return np.nextafter(value, np.float32(data.draw(st.sampled_from([-np.inf, np.inf, value]))))


@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    P=st.integers(1, 40),
    Q=st.integers(1, 40),
    E=st.sampled_from([1, 5, 16, 33, 64]),
    dtype=st.sampled_from(["float32", "float16", "int8"]),
    data=st.data(),
)
@settings(max_examples=150)
def test_the_integer_pass_leaves_no_trace_in_the_bits(kinds, seed, P, Q, E, dtype, data):
    """Neither does which image comes first: the votes back are those of the swapped pair."""
    rng = np.random.default_rng(seed)
    x, y = image(rng, kinds, P, E), image(rng, kinds, Q, E)
    x, y = (stored(np.clip(side, -6e4, 6e4), dtype) for side in (x, y))
    bound = draw_bound(data, similarity_table(x, y))
    there, back = hits(x, y, bound, False)
    assert hits(x, y, bound, True) == [there, back]
    for screens in (True, False):
        assert hits(y, x, bound, screens) == [back, there]
        assert hits(x, y, bound, screens, False)[0] == there


@needs_screens
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    E=st.sampled_from([1, 16, 40, 256]),
    data=st.data(),
)
@settings(max_examples=150)
def test_every_hit_is_marked(kinds, seed, E, data):
    """With no second chance: here the dense path does not step in where many pairs are marked."""
    rng = np.random.default_rng(seed)
    both = image(rng, kinds, 34, E)  # not cut between the images, so that neighbours meet
    x, y = both, both[::-1].copy()
    similarities = similarity_table(x, y)
    bound = draw_bound(data, similarities)
    assert {(int(p), int(s)) for p, s in np.argwhere(similarities > bound)} <= marked(x, y, bound)


@given(
    kinds=st.tuples(*[st.sampled_from(sorted(KINDS))] * 2),
    seed=st.integers(0, 1000),
    E=st.sampled_from([16, 48, 256, 1024]),
)
@settings(max_examples=100)
def test_the_bound_on_the_rounding_holds(kinds, seed, E):
    """|<x, y> - scale scale' <q, q'>| <= |scale q| |rest'| + |rest| |y|, in float64 with what `_quantise` returns."""
    rng = np.random.default_rng(seed)
    x = image(rng, kinds, 20, E)
    levels = np.empty((20, E), np.uint8)
    scale, norm, rest = np.array([kernel._quantise(*pair) for pair in zip(x, levels, strict=True)], np.float64).T
    q = levels.astype(np.float64) - tiles.LEVEL
    x = x.astype(np.float64)
    assert np.abs(q).max() <= tiles.LEVEL
    assert (np.linalg.norm(x, axis=1) <= norm).all()
    assert (np.linalg.norm(x - scale[:, None] * q, axis=1) <= rest).all()
    assert (rest <= np.sqrt(E) * scale / 2 * (1 + 1e-3) + 1e-6 * norm).all(), "the bound holds but is slack"
    error = np.abs(x @ x.T - np.outer(scale, scale) * (q @ q.T))
    bound = np.outer(norm + rest, rest) + np.outer(rest, norm)
    assert (error <= bound * (1 + 1e-12)).all()
    if set(kinds) == {"aligned"} and E >= 256:
        assert (error > 0.3 * bound).any(), "the data no longer try the bound"


@needs_screens
def test_the_rounding_of_a_similarity_itself_is_allowed_for():
    """Of equal numbers the integers leave nothing out, and what decides is that a long sum is rounded up."""
    values = np.random.default_rng(3).uniform(0.01, 1, 40).astype(np.float32)
    for x in np.repeat(values, 4096).reshape(40, 1, 4096):
        similarity = similarity_table(x, x)[0, 0]
        assert marked(x, x, np.nextafter(similarity, np.float32(0))) == {(0, 0)}


@needs_screens
def test_both_paths_run_in_these_tests():
    """Sparse data are settled pair by pair; where a third of the pairs may be hits, all are computed."""
    rng = np.random.default_rng(0)
    sparse, dense = (image(rng, [kind], 256, 64) for kind in ("random", "clustered"))
    few = marked(sparse, sparse[::-1].copy(), 0.3)
    assert 0 < len(few) < kernel.DENSE * 256**2 / 2
    assert len(marked(dense, dense, 0.5)) > kernel.DENSE * 256**2
    for x, bound in ((sparse, 0.3), (dense, 0.5)):
        assert hits(x, x[::-1].copy(), bound, True) == hits(x, x[::-1].copy(), bound, False)


@needs_screens
def test_the_integer_pass_leaves_little_over():
    """Of random unit patches it marks no more than those within 0.05 of the threshold: it must be worth its time."""
    x, y = unit(np.random.default_rng(1).standard_normal((2, 200, 256)))
    assert len(marked(x, y, 0.15)) <= (x @ y.T > 0.10).sum()
    assert marked(x, y, 0.5) == set()


def test_a_similarity_is_eight_chains_joined_by_one_tree():
    """The order that the module states, in float64: a fused multiply-add of float32 is rounded once."""
    x, y = unit(np.random.default_rng(2).standard_normal((2, 30, 48)))
    chains = np.zeros((30, 8), np.float32)
    for e in range(0, 48, 8):
        now = slice(e, e + 8)
        chains = (x[:, now].astype(np.float64) * y[:, now] + chains).astype(np.float32)
    for half in (4, 2, 1):
        chains = chains[:, :half] + chains[:, half:]
    found = [voting.pair_votes(x[i : i + 1], y[i : i + 1], 2)[0][0] for i in range(30)]
    assert np.array(found).tobytes() == chains[:, 0].tobytes()


OTHER_PROCESSOR = """
import sys
import numpy as np
from vop.retrieval import tiles
from vop.retrieval.index import ShardIndex, Wanted
images = np.load(sys.argv[1])
shard = ShardIndex(images[2:], images[2:, 0], np.arange(4))
wanted = Wanted(np.repeat([0, 1], 4), np.tile(np.arange(4), 2), np.ones(8, bool))
found = shard.votes(images[:2], None, wanted, 0.4)
arrays = {f"{side}{name}": array for side, votes in enumerate(found) for name, array in vars(votes).items()}
np.savez(sys.argv[2], screens=tiles.SCREENS, **arrays)
"""


def test_a_processor_without_avx2_gives_the_same_bits(tmp_path):
    np.save(tmp_path / "images.npy", clustered(6, 6, 21, 24).astype(np.float16))
    none = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    results = []
    for name, environment in (("here", {}), ("there", none)):
        command = [sys.executable, "-c", OTHER_PROCESSOR, tmp_path / "images.npy", tmp_path / f"{name}.npz"]
        subprocess.run(command, env=os.environ | environment, check=True, timeout=300)
        results.append(dict(np.load(tmp_path / f"{name}.npz")))
    here, there = results
    assert bool(here.pop("screens")) == tiles.SCREENS
    assert not there.pop("screens")
    assert here["0counts"].sum() > 0
    assert {name: array.tobytes() for name, array in here.items()} == {
        name: array.tobytes() for name, array in there.items()
    }


@pytest.mark.parametrize("features", [None, "", "+sse2"])
def test_what_numba_makes_code_for_decides_about_the_integer_pass(features):
    """Not what the processor at hand could do: the compiler would end the process at such an instruction."""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CPU_FEATURES"}
    environment |= {"NUMBA_CPU_NAME": "generic"} | ({} if features is None else {"NUMBA_CPU_FEATURES": features})
    command = [sys.executable, "-c", "from vop.retrieval import tiles; print(tiles.SCREENS)"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == "False\n"


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


@pytest.mark.parametrize(("P", "Q"), [(0, 3), (3, 0), (0, 0)])
def test_images_without_patches_have_no_votes(P, Q):
    sums, counts = voting.pair_votes(np.ones((P, 8), np.float32), np.ones((Q, 8), np.float32), 1.5)
    assert sums.tolist() == counts.tolist() == [0] * P


# --- votes that travel and merge --------------------------------------------------------------------------------------


def sparse(query, votes):
    """The pairs of `votes` that have a hit."""
    hit = votes.counts.any(axis=1)
    pair, patch = np.nonzero(votes.counts[hit])
    starts = np.searchsorted(pair, np.arange(hit.sum() + 1))
    entries = votes.counts[hit][pair, patch].astype(np.uint16), votes.sums[hit][pair, patch]
    return PairVotes(np.full(hit.sum(), query), votes.rows[hit], starts, patch.astype(np.uint16), *entries)


@given(cuts=st.sets(st.integers(1, 11)), seed=st.integers(0, 5), P=st.integers(1, 30))
@settings(max_examples=25)
def test_merged_parts_have_the_bits_of_the_whole(cuts, seed, P):
    images = clustered(seed, 13, 20, 16)
    query, rows = images[12][:P], np.random.default_rng(seed).permutation(12)
    whole = voting.votes(query, images[rows], 0.4, rows)
    assert whole.rows.tolist() == list(range(12))
    assert whole.candidates == 12
    parts = [sparse(7, voting.votes(query, images[part], 0.4, part)) for part in np.split(rows, sorted(cuts))]
    merged = merge(parts[::-1]).of(7, len(query), 12)
    hit = np.isin(whole.rows, merged.rows)
    assert not whole.counts[~hit].any()
    for weights in ("none", "idf", "tfidf"):
        assert voting.patch_weights(merged, weights).tobytes() == voting.patch_weights(whole, weights).tobytes()
        assert voting.scores(merged, weights).tobytes() == voting.scores(whole, weights)[hit].tobytes()


def as_dict(votes):
    """{(query, row): [(patch, count, sum), ...]} in the order of the pairs."""
    entries = list(zip(votes.patches.tolist(), votes.counts.tolist(), votes.sums.tolist(), strict=True))
    pairs = zip(votes.queries.tolist(), votes.rows.tolist(), strict=True)
    return {pair: entries[votes.starts[i] : votes.starts[i + 1]] for i, pair in enumerate(pairs)}


@st.composite
def pair_votes(draw):
    """Votes of up to 12 different pairs in any order, some of them without an entry."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), unique=True, max_size=12))
    patches = [sorted(draw(st.sets(st.integers(0, 6)))) for _ in pairs]
    starts = np.cumsum([0, *map(len, patches)])
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    queries, rows = np.array(pairs, np.int64).reshape(-1, 2).T
    counts = rng.integers(1, 2**16, starts[-1]).astype(np.uint16)
    return PairVotes(
        queries,
        rows,
        starts,
        np.array([p for some in patches for p in some], np.uint16),
        counts,
        rng.random(starts[-1], "f4"),
    )


@given(votes=pair_votes(), data=st.data())
@settings(max_examples=100)
def test_votes_are_taken_split_merged_and_read_by_pair(votes, data):
    expected = as_dict(votes)
    order = np.array(data.draw(st.permutations(range(len(votes)))), np.int64)
    part = order[: data.draw(st.integers(0, len(votes)))]
    taken = votes.take(part)
    assert len(taken) == len(part)
    assert list(as_dict(taken).items()) == [list(expected.items())[i] for i in part]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(votes)), max_size=3)))
    merged = merge([NO_VOTES, *(votes.take(some) for some in np.split(order, cuts))])
    assert list(as_dict(merged).items()) == sorted(expected.items())
    whole = merge([votes])
    for name, array in vars(merged).items():
        assert array.dtype == getattr(NO_VOTES, name).dtype
        assert array.tobytes() == getattr(whole, name).tobytes()
    assert merged.nbytes == sum(array.nbytes for array in vars(merged).values())
    for query in range(5):
        dense = merged.of(query, 7, 9)
        assert dense.candidates == 9
        assert dense.rows.tolist() == sorted(row for q, row in expected if q == query)
        for row, sums, counts in zip(dense.rows.tolist(), dense.sums, dense.counts, strict=True):
            found = [(int(p), int(counts[p]), float(sums[p])) for p in np.flatnonzero(counts)]
            assert found == expected[query, row]


def test_a_pair_that_comes_twice_is_refused():
    images = clustered(0, 3, 10, 8)
    votes = sparse(4, voting.votes(images[0], images[1:], 0.6, np.array([5, 8])))
    assert len(votes) == 2
    with pytest.raises(ValueError, match="query 4 for row 8 came twice"):
        merge([votes, votes.take(np.array([1]))])
    other = PairVotes(votes.queries + 1, *list(vars(votes).values())[1:])
    assert len(merge([votes, other])) == 4


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
    short = Votes(full.rows[:4], full.sums[:4], full.counts[:4], full.candidates)
    assert voting.scores(short, "tfidf").tolist() == voting.scores(full, "tfidf")[:4].tolist()


def test_best_is_descending_with_ties_by_row():
    scores, rows = np.array([1.0, 3, 0, 3, 2]), np.array([8, 7, 1, 5, 6])
    assert rows[voting.best(scores, rows, 10)].tolist() == [5, 7, 6, 8]
    assert rows[voting.best(scores, rows, 1)].tolist() == [5]


# --- numbers in and arguments refused ---------------------------------------------------------------------------------


def test_every_float16_number_widens_exactly():
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    halves = bits.view(np.float16)
    out = np.empty(bits.shape, np.float32)
    assert kernel.gather(bits, np.ones(256, bool), out) == 256
    finite = np.isfinite(halves)
    assert finite.sum() == 2**16 - 2**11
    assert np.array_equal(out[finite].view(np.uint32), halves[finite].astype(np.float32).view(np.uint32))


def test_only_image_patches_are_widened():
    halves = np.arange(24, dtype=np.float16).reshape(6, 4)
    mask = np.array([0, 1, 1, 0, 0, 1], bool)
    out = np.full((6, 6), -1, np.float32)
    assert kernel.gather(halves.view(np.uint16), mask, out) == 3
    assert np.array_equal(out[:3, :4], halves[mask])
    assert (out[3:] == -1).all() and (out[:, 4:] == -1).all()


def test_half_and_single_precision_of_the_same_numbers_give_the_same_bits():
    x, y = clustered(5, 2, 30, 21).astype(np.float16)
    a, b = voting.pair_votes(x, y, 0.4), voting.pair_votes(x.astype(np.float32), y.astype(np.float32), 0.4)
    assert a[0].tobytes() == b[0].tobytes()
    assert b[1].sum() > 0


def test_the_kernel_refuses_arrays_it_would_misread():
    packed = kernel.stack(np.ones((1, 5, 32), np.float32), np.ones((1, 5), bool))
    once, no = np.zeros(1, np.int64), np.zeros(1, bool)
    arguments = np.ones((1, 5), bool), once, once, no, np.float32(0.5), True
    with pytest.raises(ValueError, match="differ in width"):
        kernel.count_hits(packed, np.ones((1, 5, 16), np.float32), *arguments)
    with pytest.raises(TypingError, match="C-contiguous"):
        kernel._quantise(np.ones(32, np.float32)[::2], np.empty(16, np.uint8))


@pytest.mark.parametrize("radius", [0, -0.1, 2.5, float("nan")])
def test_a_radius_out_of_range_is_refused(radius):
    with pytest.raises(ValueError, match="cosine distance"):
        threshold(radius)


@pytest.mark.parametrize(("E", "other"), [(8, 6), (8, 24)])
def test_descriptors_of_other_widths_are_refused(E, other):
    with pytest.raises(ValueError, match="width"):
        voting.pair_votes(np.zeros((2, E), np.float32), np.zeros((2, other), np.float32), 0.3)


def test_descriptors_of_other_types_are_refused():
    x = np.zeros((2, 8), np.float32)
    for arguments in ((x, x.astype(np.float64)), (x.astype(np.float64), x)):
        with pytest.raises(ValueError, match="float64"):
            voting.pair_votes(*arguments, 0.3)


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
