"""The votes and the shortlist of `vop.retrieval.cuda`. Imports neither Ray, FAISS nor Numba.

Every test of the searches runs for the torch kernel on the CPU, and marked `gpu` for both kernels on a card. The Triton
kernel also runs in Triton's interpreter, in a process of its own: Triton reads that choice when it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vop.retrieval.cuda import CudaShard, check_memory, memory_bytes, tolerance

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_A_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
BACKENDS = [
    pytest.param(("cpu", "torch"), id="torch-cpu"),
    pytest.param(("cuda", "torch"), id="torch-cuda", marks=ON_A_CARD),
    pytest.param(("cuda", "triton"), id="triton-cuda", marks=ON_A_CARD),
]
if INTERPRETED:
    BACKENDS = [pytest.param(("cpu", "triton"), id="triton-interpreter")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    device, kernel = request.param
    if kernel == "triton":
        pytest.importorskip("triton")
    return {"device": device, "kernel": kernel}


def collection(seed, images, P, E, dtype, words=12, spread=0.5):
    """Unit patches (images, P, E) around centres that all seeds share, so that some of them hit each other."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(E).standard_normal((words, E))
    patches = centres[rng.integers(words, size=(images, P))] + spread * rng.standard_normal((images, P, E))
    return (patches / np.linalg.norm(patches, axis=-1, keepdims=True)).astype(dtype)


def shard_of(patches, backend, rows=None, **options):
    rows = np.arange(len(patches)) if rows is None else rows
    globals_ = np.ones((len(patches), 4), np.float32)
    return CudaShard(patches, globals_, rows, **options, **backend)


def bounds(x, y, radius, shift=0.0):
    """Least and largest sums and counts that votes of x (P, E) for y (S, E) may have, from float64 similarities."""
    threshold, slack = float(np.float32(1 - radius)), tolerance(x.shape[1]) + shift
    similarity = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
    certain, possible = similarity > threshold + slack, similarity > threshold - slack
    counts = certain.sum(1), possible.sum(1)
    core = np.where(certain, similarity, 0).sum(1)
    open_ = np.where(possible & ~certain, similarity, 0)
    margin = counts[1] * (slack + counts[1] * 2.0**-23)
    return core + np.minimum(open_, 0).sum(1) - margin, core + np.maximum(open_, 0).sum(1) + margin, *counts


def check(sums, counts, x, y, radius, shift=0.0):
    """The votes of one pair: those of the float64 method, and nothing behind the patches that take part."""
    least, largest, fewest, most = bounds(x, y, radius, shift)
    assert np.all((fewest <= counts[: len(x)]) & (counts[: len(x)] <= most))
    assert np.all((least <= sums[: len(x)]) & (sums[: len(x)] <= largest))
    assert not sums[len(x) :].any()
    assert not counts[len(x) :].any()


def check_pairs(found, queries, database, radius, query_masks=None, masks=None):
    """All pairs of `found`; rows are positions in `database`."""
    for i, (q, row) in enumerate(zip(found.pair_query, found.pair_row, strict=True)):
        x = queries[q] if query_masks is None else queries[q][query_masks[q]]
        y = database[row] if masks is None else database[row][masks[row]]
        assert (len(x), len(y)) == (found.patches[q], found.row_patches[i])
        check(found.sums[i], found.counts[i], x, y, radius)
        if found.reverse_sums is not None:
            check(found.reverse_sums[i], found.reverse_counts[i], y, x, radius)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("P", "S", "E"), [(256, 256, 256), (1, 1, 1), (5, 40, 7), (70, 130, 48), (33, 17, 300)])
def test_votes_agree_with_the_method_in_float64(backend, dtype, P, S, E):
    images = 3 if P == 256 else 6
    queries, database = collection(P, 2, P, E, dtype), collection(S, images, S, E, dtype)
    found = shard_of(database, backend).votes(queries, None, [np.arange(images)] * 2, 0.4, both=True)
    assert found.pair_query.tolist() == np.repeat([0, 1], images).tolist()
    assert found.pair_row.tolist() == [*range(images)] * 2
    assert found.sums.dtype == found.reverse_sums.dtype == np.float32
    assert found.counts.dtype == found.reverse_counts.dtype == np.int32
    check_pairs(found, queries, database, 0.4)
    if P > 1:
        assert 0 < found.counts.sum() < P * S * images


def test_bfloat16_patches(backend):
    if INTERPRETED:
        pytest.skip("NumPy, on which Triton's interpreter computes, has no bfloat16")
    queries, database = (torch.from_numpy(collection(s, 3, 40, 64, "float32")).bfloat16() for s in (0, 1))
    found = shard_of(database, backend).votes(queries, None, [np.arange(3)] * 3, 0.4)
    assert found.counts.any()
    check_pairs(found, queries.float().numpy(), database.float().numpy(), 0.4)


@pytest.mark.parametrize("radius", [0.05, 0.5, 1.0, 1.3, 2.0])
def test_padding_takes_no_part(backend, radius):
    """Also where a zero similarity is a hit, from radius 1 on; one image is all padding."""
    rng = np.random.default_rng(0)
    queries, database = collection(0, 3, 48, 32, "float16"), collection(1, 5, 40, 32, "float16")
    query_masks, masks = rng.random((3, 48)) < 0.6, rng.random((5, 40)) < 0.7
    query_masks[1], masks[2] = True, False
    shard = shard_of(database, backend, masks=masks)
    found = shard.votes(queries, query_masks, [np.arange(5)] * 3, radius, both=True)
    assert len(found.pair_row) == 15
    check_pairs(found, queries, database, radius, query_masks, masks)
    alone = shard_of(database[:, :20], backend).votes(queries[:, :20], None, [np.arange(5)] * 3, radius)
    check_pairs(alone, queries[:, :20], database[:, :20], radius)


def test_a_hit_must_exceed_the_threshold(backend):
    """Similarities that are exact in any order: 0.5 is no hit at radius 0.5, the next float16 is one."""
    x, y = np.zeros((1, 1, 16), np.float16), np.zeros((1, 3, 16), np.float16)
    x[0, 0, 0], y[0, :, 0] = 1, (0.5, np.nextafter(np.float16(0.5), np.float16(1)), 1)
    found = shard_of(y, backend).votes(x, None, [np.array([0])], 0.5, both=True)
    assert found.counts[0].tolist() == [2]
    assert found.sums[0, 0] == np.float32(y[0, 1, 0]) + 1
    assert found.reverse_counts[0].tolist() == [0, 1, 1]
    assert found.reverse_sums[0].tolist() == [0, float(y[0, 1, 0]), 1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_votes_agree_with_the_cpu_path(backend, dtype):
    """Counts are equal and sums within the tolerance, but for patches with a similarity that near the threshold."""
    pytest.importorskip("numba")
    from vop.retrieval import voting

    queries, database, rows = collection(0, 4, 60, 64, dtype), collection(1, 12, 60, 64, dtype), np.arange(12)
    found = shard_of(database, backend).votes(queries, None, [rows] * 4, 0.4)
    for q in range(4):
        cpu, mine = voting.votes(queries[q], list(database), 0.4), found.pair_query == q
        for sums, counts, cpu_sums, cpu_counts, y in zip(
            found.sums[mine], found.counts[mine], cpu.sums, cpu.counts, database, strict=True
        ):
            _, _, fewest, most = bounds(queries[q], y, 0.4)
            clear = fewest == most
            assert clear.mean() > 0.9
            assert np.array_equal(counts[clear], cpu_counts[clear])
            assert np.all(np.abs(sums - cpu_sums)[clear] <= most[clear] * (tolerance(64) + most[clear] * 2.0**-23))


def test_only_candidates_of_the_shard_are_scored(backend):
    """Other shards' rows are left out, and the query's own, and other scenes'; pairs come by query, then by row."""
    database = collection(0, 6, 20, 16, "float16")
    rows, scenes = np.array([70, 10, 30, 50, 20, 60]), np.array([0, 0, 1, 0, 1, 0])
    shard = shard_of(database, backend, rows=rows, scenes=scenes)
    candidates = [np.array([50, 10, 999, 30, 70]), np.array([], np.int64), np.array([20, 10, 40])]
    found = shard.votes(database[:3], None, candidates, 0.4, exclude=np.array([70, 10, -1]))
    assert list(zip(found.pair_query, found.pair_row, strict=True)) == [(0, 10), (0, 30), (0, 50), (2, 10), (2, 20)]
    assert found.candidates.tolist() == [3, 0, 2]
    place = {row: i for i, row in enumerate(rows)}
    for q, row, sums, counts in zip(found.pair_query, found.pair_row, found.sums, found.counts, strict=True):
        check(sums, counts, database[q], database[place[row]], 0.4)
    within = shard.votes(database[:3], None, candidates, 0.4, np.array([70, 10, -1]), np.array([0, 0, 1]))
    assert list(zip(within.pair_query, within.pair_row, strict=True)) == [(0, 10), (0, 50), (2, 20)]
    with pytest.raises(ValueError, match=r"query 1 .* twice"):
        shard.votes(database[:2], None, [np.array([10]), np.array([50, 10, 50])], 0.4)


def test_a_full_search_returns_the_rows_with_a_hit(backend):
    """And the same in small parts as in one."""
    database = collection(0, 9, 20, 64, "float16", words=300, spread=0.2)
    masks = np.ones((9, 20), bool)
    masks[4, 7:] = False
    queries, query_masks, own = database[:4], masks[:4], np.arange(4)
    whole = shard_of(database, backend, masks=masks).votes(queries, query_masks, None, 0.2, own, both=True)
    listed = [np.delete(np.arange(9), q) for q in range(4)]
    every = shard_of(database, backend, masks=masks).votes(queries, query_masks, listed, 0.2, both=True)
    hit = every.counts.any(1)
    assert 0 < hit.sum() < len(hit)
    assert whole.candidates.tolist() == [8] * 4
    assert np.array_equal(whole.pair_row, every.pair_row[hit])
    check_pairs(whole, queries, database, 0.2, query_masks, masks)
    parts = shard_of(database, backend, masks=masks, workspace=20_000).votes(queries, query_masks, None, 0.2, own)
    assert np.array_equal(parts.pair_row, whole.pair_row)
    assert np.array_equal(parts.counts, whole.counts)


def test_bits_of_the_triton_kernel_do_not_depend_on_the_batch(backend):
    if backend["kernel"] != "triton":
        pytest.skip("the torch kernel promises a tolerance only")
    database, rng = collection(0, 12, 70, 40, "float16"), np.random.default_rng(0)
    masks = rng.random((12, 70)) < 0.8
    whole = shard_of(database, backend, masks=masks).votes(database[:3], masks[:3], [np.arange(12)] * 3, 0.4, both=True)
    assert whole.counts.any()
    for rows in (np.array([3]), np.array([5, 2, 11, 7]), np.arange(12)[::-1]):
        part = shard_of(database[rows], backend, rows, masks=masks[rows], workspace=60_000)
        found = part.votes(database[1:3], masks[1:3], [rows] * 2, 0.4, both=True)
        for i, (q, row) in enumerate(zip(found.pair_query, found.pair_row, strict=True)):
            same = np.flatnonzero((whole.pair_query == q + 1) & (whole.pair_row == row))[0]
            for name in ("sums", "counts", "reverse_sums", "reverse_counts"):
                assert getattr(found, name)[i].tobytes() == getattr(whole, name)[same].tobytes()


def test_a_query_may_be_on_the_device_already(backend):
    database = collection(0, 4, 20, 16, "float16")
    shard, candidates = shard_of(database, backend), [np.arange(4)] * 2
    expected = shard.votes(database[:2], None, candidates, 0.4)
    resident = torch.from_numpy(database).to(backend["device"])
    assert np.array_equal(shard.votes(resident[:2], None, candidates, 0.4).counts, expected.counts)


def test_no_queries(backend):
    database = collection(0, 4, 20, 16, "float16")
    shard = shard_of(database, backend)
    for candidates in ([], None):
        found = shard.votes(database[:0], None, candidates, 0.4, both=True)
        assert found.sums.shape == (0, 20)
        assert found.patches.shape == found.candidates.shape == found.pair_row.shape == (0,)
    offsets, rows, scores = shard.shortlist(np.empty((0, 4)), 3)
    assert (offsets.tolist(), rows.tolist(), scores.tolist()) == ([0], [], [])


def nearest(query, globals_, rows, k):
    """Rows of the k largest inner products, equal ones by row; exact for small integers."""
    values = globals_.astype(np.float64) @ query.astype(np.float64)
    order = np.lexsort((rows, -values.astype(np.float32)))[:k]
    return rows[order].tolist(), values[order].astype(np.float32).tolist()


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("distinct", [2, 40])
def test_shortlist_is_exact_and_breaks_ties_by_row(backend, k, distinct):
    """Small integers: every sum is exact. Few distinct vectors: ties reach far beyond the margin."""
    rng = np.random.default_rng(k)
    globals_ = rng.integers(-3, 4, (distinct, 6)).astype(np.float32)[rng.integers(distinct, size=120)]
    rows, queries = rng.permutation(1000)[:120], rng.integers(-3, 4, (7, 6)).astype(np.float32)
    scenes, query_scenes = rng.integers(0, 3, 120), rng.integers(0, 3, 7)
    patches, own = np.ones((120, 1, 1), np.float16), rows[:7]
    shard = CudaShard(patches, globals_, rows, scenes=scenes, workspace=50_000, **backend)
    offsets, found, scores = shard.shortlist(queries, k, own)
    within_offsets, within, _ = shard.shortlist(queries, k, own, query_scenes)
    assert (found.dtype, scores.dtype, offsets.dtype) == (np.int64, np.float32, np.int64)
    for q in range(7):
        mine = slice(offsets[q], offsets[q + 1])
        seen = rows != own[q]
        assert (found[mine].tolist(), scores[mine].tolist()) == nearest(queries[q], globals_[seen], rows[seen], k)
        seen &= scenes == query_scenes[q]
        mine = slice(within_offsets[q], within_offsets[q + 1])
        assert within[mine].tolist() == nearest(queries[q], globals_[seen], rows[seen], k)[0]


def test_shortlist_agrees_with_the_cpu_path(backend):
    """The same rows in the same order; a score may be the next float32."""
    pytest.importorskip("faiss")
    pytest.importorskip("numba")
    from vop.retrieval.shortlist import GlobalIndex

    rng = np.random.default_rng(0)
    globals_ = rng.standard_normal((300, 50)).astype(np.float16)
    globals_[100:200] = globals_[:100]
    queries, rows = rng.standard_normal((9, 50)).astype(np.float32), rng.permutation(300)
    expected = GlobalIndex(globals_, rows).search(queries, 12, np.arange(9))
    offsets, found, scores = CudaShard(np.ones((300, 1, 1), np.float16), globals_, rows, **backend).shortlist(
        queries, 12, np.arange(9)
    )
    assert np.array_equal(offsets, expected.offsets)
    assert np.array_equal(found, expected.rows)
    np.testing.assert_array_almost_equal_nulp(scores, expected.scores, 1)


def test_shortlist_scores_do_not_depend_on_the_batch(backend):
    rng = np.random.default_rng(0)
    globals_, queries = rng.standard_normal((500, 37)), rng.standard_normal((6, 37)).astype(np.float32)
    shard = CudaShard(np.ones((500, 1, 1), np.float16), globals_.astype(np.float32), np.arange(500), **backend)
    _, rows, scores = shard.shortlist(queries, 4)
    for q in range(6):
        _, own_rows, own_scores = shard.shortlist(queries[q : q + 1], 9)
        assert own_rows[:4].tolist() == rows[4 * q : 4 * q + 4].tolist()
        assert own_scores[:4].tobytes() == scores[4 * q : 4 * q + 4].tobytes()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": np.array([1, 1, 2])}, "same number"),
        ({"rows": np.arange(4)}, "3 patches for 4 rows"),
        ({"masks": np.ones((2, 5), bool)}, "2 masks for 3 rows"),
        ({"patches": np.ones((3, 5, 8))}, "float64"),
        ({"kernel": "numba"}, "triton"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change, complaint):
    arrays = {"patches": np.ones((3, 5, 8), np.float16), "globals": np.ones((3, 2)), "rows": np.arange(3)}
    with pytest.raises(ValueError, match=complaint):
        CudaShard(**{**arrays, "device": "cpu", **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"radius": 0.0}, "radius 0.0"),
        ({"radius": 2.5}, "radius 2.5"),
        ({"query_patches": np.ones((2, 5, 9), np.float16)}, "width 9"),
        ({"query_patches": np.ones((2, 5, 8), np.float32)}, "float32"),
        ({"candidates": [np.arange(2)]}, "1 candidates for 2 queries"),
        ({"exclude": np.arange(3)}, "3 exclude for 2 queries"),
        ({"scenes": np.zeros(2)}, "scene codes"),
    ],
)
def test_queries_that_do_not_fit_the_shard_are_refused(change, complaint):
    shard = shard_of(np.ones((3, 5, 8), np.float16), {"device": "cpu"})
    asked = {"query_patches": np.ones((2, 5, 8), np.float16), "query_masks": None, "candidates": None, "radius": 0.3}
    with pytest.raises(ValueError, match=complaint):
        shard.votes(**{**asked, **change})


def test_a_shard_that_does_not_fit_is_refused_with_the_numbers():
    needed = memory_bytes(100_000, 256, 256, "float16", 384)
    assert needed == 100_000 * (256 * 256 * 2 + 4 * 384 + 20) + 2**30
    assert memory_bytes(10, 256, 256, "float32", 384, 0) == 10 * (256 * 256 * 4 + 4 * 384 + 20)
    check_memory(needed, needed)
    with pytest.raises(MemoryError, match=r"14\.34 GB of device memory, but 8\.00 GB are free: use more shards"):
        check_memory(needed, 8_000_000_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_card_refuses_what_it_cannot_hold():
    with pytest.raises(MemoryError, match="device memory"):
        shard_of(np.ones((2, 4, 8), np.float16), {"device": "cuda", "kernel": "torch"}, workspace=2**45)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_float32_products_are_no_tf32_whatever_the_program_chose():
    """TF32 keeps 10 bits: it would miss by 1e-4 where float32 misses by 1e-7."""
    queries, database = collection(0, 2, 64, 256, "float32"), collection(1, 4, 64, 256, "float32")
    chosen = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = shard_of(database, {"device": "cuda", "kernel": "torch"}).votes(queries, None, [np.arange(4)] * 2, 0.4)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen
    check_pairs(found, queries, database, 0.4)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_ray_faiss_numba_and_triton_are_not_needed():
    """As on a bare machine with a card; and a kernel that cannot run is refused, not replaced."""
    code = """
import sys
for name in ("ray", "faiss", "numba", "triton"):
    sys.modules[name] = None
import numpy as np
from vop.retrieval.cuda import CudaShard
ones = np.ones((2, 3, 4), np.float16) / 2
shard = CudaShard(ones, ones[:, 0], np.arange(2), device="cpu")
assert shard.kernel == "torch"
assert shard.votes(ones, None, None, 0.1, np.arange(2)).counts.tolist() == [[3] * 3] * 2
try:
    CudaShard(ones, ones[:, 0], np.arange(2), device="cpu", kernel="triton")
except ValueError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "install it" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested on this machine's card")
def test_the_triton_kernel_in_its_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton-interpreter"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
