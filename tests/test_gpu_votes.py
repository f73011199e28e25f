"""The votes and the shortlist of `vop.retrieval.cuda`. Imports neither Ray, FAISS nor Numba.

Every test of the searches runs for the torch kernel on the CPU, and marked `gpu` for both kernels on a card. The Triton
kernel also runs in Triton's interpreter, in a process of its own: Triton reads that choice when it is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def wanted(queries, rows, mutual=True):
    """An `index.Wanted`, which needs FAISS and Numba."""
    queries, rows = np.asarray(queries, np.int64), np.asarray(rows, np.int64)
    return SimpleNamespace(queries=queries, rows=rows, mutual=np.broadcast_to(mutual, queries.shape))


def every(queries, rows):
    """Every query with every row, both ways."""
    rows = np.arange(rows) if isinstance(rows, int) else rows
    return wanted(np.repeat(np.arange(queries), len(rows)), np.tile(rows, queries))


def dense(found, P):
    """{(query, row): (sums (P,), counts (P,))} of the pairs found, none of which comes twice or is empty."""
    assert [getattr(found, name).dtype for name in ("queries", "rows", "starts")] == [np.int64] * 3
    assert (found.patches.dtype, found.counts.dtype, found.sums.dtype) == (np.uint16, np.uint16, np.float32)
    assert np.all(np.diff(found.starts) > 0)
    assert found.starts[-1] == len(found.patches) == len(found.counts) == len(found.sums)
    pairs = {}
    for i, (query, row) in enumerate(zip(found.queries.tolist(), found.rows.tolist(), strict=True)):
        at = slice(found.starts[i], found.starts[i + 1])
        assert np.all(np.diff(found.patches[at].astype(int)) > 0)
        sums, counts = np.zeros(P, np.float32), np.zeros(P, np.int64)
        sums[found.patches[at]], counts[found.patches[at]] = found.sums[at], found.counts[at]
        assert pairs.setdefault((query, row), (sums, counts))[1] is counts
    return pairs


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


def check_pairs(votes, pairs, queries, database, radius, query_masks=None, masks=None):
    """The votes of the pairs (query, row), from both sides; rows are positions in `database`. How many had a hit."""
    P, S = queries.shape[1], database.shape[1]
    found, back = dense(votes[0], P), dense(votes[1], S)
    assert found.keys() <= set(pairs)
    assert {(q, row) for row, q in back} <= set(pairs)
    nothing = np.zeros(max(P, S), np.float32), np.zeros(max(P, S), np.int64)
    for q, row in pairs:
        x = queries[q] if query_masks is None else queries[q][query_masks[q]]
        y = database[row] if masks is None else database[row][masks[row]]
        check(*found.get((q, row), nothing), x, y, radius)
        check(*back.get((row, q), nothing), y, x, radius)
    return len(found)


def product(queries, rows):
    return [(q, row) for q in range(queries) for row in range(rows)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("P", "S", "E"), [(256, 256, 256), (1, 1, 1), (5, 40, 7), (70, 130, 48), (33, 17, 300)])
def test_votes_agree_with_the_method_in_float64(backend, dtype, P, S, E):
    images = 3 if P == 256 else 6
    queries, database = collection(P, 2, P, E, dtype), collection(S, images, S, E, dtype)
    votes = shard_of(database, backend).votes(queries, None, every(2, images), 0.4)
    hit = check_pairs(votes, product(2, images), queries, database, 0.4)
    assert hit == 2 * images or P == 1


def test_bfloat16_patches(backend):
    if INTERPRETED:
        pytest.skip("NumPy, on which Triton's interpreter computes, has no bfloat16")
    queries, database = (torch.from_numpy(collection(s, 3, 40, 64, "float32")).bfloat16() for s in (0, 1))
    votes = shard_of(database, backend).votes(queries, None, every(3, 3), 0.4)
    assert check_pairs(votes, product(3, 3), queries.float().numpy(), database.float().numpy(), 0.4) == 9


@pytest.mark.parametrize("radius", [0.05, 0.5, 1.0, 1.3, 2.0])
def test_padding_takes_no_part(backend, radius):
    """Also where a zero similarity is a hit, from radius 1 on; one image is all padding."""
    rng = np.random.default_rng(0)
    queries, database = collection(0, 3, 48, 32, "float16"), collection(1, 5, 40, 32, "float16")
    query_masks, masks = rng.random((3, 48)) < 0.6, rng.random((5, 40)) < 0.7
    query_masks[1], masks[2] = True, False
    votes = shard_of(database, backend, masks=masks).votes(queries, query_masks, every(3, 5), radius)
    hit = check_pairs(votes, product(3, 5), queries, database, radius, query_masks, masks)
    assert hit == (0 if radius < 0.1 else 12)


def test_a_hit_must_exceed_the_threshold(backend):
    """Similarities that are exact in any order: 0.5 is no hit at radius 0.5, the next float16 is one."""
    x, y = np.zeros((1, 1, 16), np.float16), np.zeros((1, 3, 16), np.float16)
    x[0, 0, 0], y[0, :, 0] = 1, (0.5, np.nextafter(np.float16(0.5), np.float16(1)), 1)
    found, back = shard_of(y, backend, rows=np.array([7])).votes(x, None, wanted([0], [7]), 0.5)
    assert (found.queries.tolist(), found.rows.tolist(), found.counts.tolist()) == ([0], [7], [2])
    assert found.sums[0] == np.float32(y[0, 1, 0]) + 1
    assert (back.queries.tolist(), back.rows.tolist(), back.starts.tolist()) == ([7], [0], [0, 2])
    assert (back.patches.tolist(), back.counts.tolist()) == ([1, 2], [1, 1])
    assert back.sums.tolist() == [float(y[0, 1, 0]), 1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_votes_agree_with_the_cpu_path(backend, dtype):
    """Counts are equal and sums within the tolerance, but for patches with a similarity that near the threshold."""
    pytest.importorskip("numba")
    from vop.retrieval import pair_votes, voting

    queries, database = collection(0, 4, 60, 64, dtype), collection(1, 12, 60, 64, dtype)
    found, _ = shard_of(database, backend).votes(queries, None, every(4, 12), 0.4)
    merged = pair_votes.merge([found])
    for q in range(4):
        mine, cpu = merged.of(q, 60, 12), voting.votes(queries[q], list(database), 0.4)
        assert mine.rows.tolist() == cpu.rows.tolist()
        for j, y in enumerate(database):
            _, _, fewest, most = bounds(queries[q], y, 0.4)
            clear = fewest == most
            assert clear.mean() > 0.9
            assert np.array_equal(mine.counts[j][clear], cpu.counts[j][clear])
            error = np.abs(mine.sums[j] - cpu.sums[j])[clear]
            assert np.all(error <= most[clear] * (tolerance(64) + most[clear] * 2.0**-23))


def test_only_wanted_rows_of_the_shard_are_scored(backend):
    """In one direction or both, as asked; other shards' rows are left out."""
    database = collection(0, 6, 30, 16, "float16")
    rows = np.array([70, 10, 30, 50, 20, 60])
    queries, asked = [0, 2, 0, 0, 2, 0], [50, 20, 10, 999, 40, 70]
    mutual = np.array([True, False, False, True, True, True])
    found, back = shard_of(database, backend, rows=rows).votes(database[:3], None, wanted(queries, asked, mutual), 0.4)
    found, back = dense(found, 30), dense(back, 30)
    assert found.keys() == {(0, 50), (2, 20), (0, 10), (0, 70)}
    assert back.keys() == {(50, 0), (70, 0)}
    place = {row: i for i, row in enumerate(rows.tolist())}
    for (q, row), votes in found.items():
        check(*votes, database[q], database[place[row]], 0.4)
    for (row, q), votes in back.items():
        check(*votes, database[place[row]], database[q], 0.4)


def test_pairs_without_a_hit_are_left_out_and_parts_join(backend):
    """The same in parts of a few pairs as in one."""
    database = collection(0, 9, 20, 64, "float16", words=300, spread=0.2)
    masks = np.ones((9, 20), bool)
    masks[4, 7:] = False
    shards = (shard_of(database, backend, masks=masks, workspace=size) for size in (2**30, 30_000))
    whole, parts = (shard.votes(database[:4], masks[:4], every(4, 9), 0.2) for shard in shards)
    hit = check_pairs(whole, product(4, 9), database[:4], database, 0.2, masks[:4], masks)
    assert 0 < hit < 36
    assert check_pairs(parts, product(4, 9), database[:4], database, 0.2, masks[:4], masks) == hit
    assert np.array_equal(parts[0].counts, whole[0].counts)


def test_bits_of_the_triton_kernel_do_not_depend_on_the_batch(backend):
    if backend["kernel"] != "triton":
        pytest.skip("the torch kernel promises a tolerance only")
    database, rng = collection(0, 12, 70, 40, "float16"), np.random.default_rng(0)
    masks = rng.random((12, 70)) < 0.8
    votes = shard_of(database, backend, masks=masks).votes(database[:3], masks[:3], every(3, 12), 0.4)
    found, back = (dense(side, 70) for side in votes)
    for rows in (np.array([3]), np.array([5, 2, 11, 7]), np.arange(12)[::-1]):
        part = shard_of(database[rows], backend, rows, masks=masks[rows], workspace=60_000)
        votes = part.votes(database[1:3], masks[1:3], every(2, rows), 0.4)
        for (q, row), (sums, _) in dense(votes[0], 70).items():
            assert sums.tobytes() == found[q + 1, row][0].tobytes()
        for (row, q), (sums, _) in dense(votes[1], 70).items():
            assert sums.tobytes() == back[row, q + 1][0].tobytes()


def test_a_query_may_be_on_the_device_already(backend):
    database = collection(0, 4, 20, 16, "float16")
    shard = shard_of(database, backend)
    expected, _ = shard.votes(database[:2], None, every(2, 4), 0.4)
    resident = torch.from_numpy(database).to(backend["device"])
    assert np.array_equal(shard.votes(resident[:2], None, every(2, 4), 0.4)[0].counts, expected.counts)


def test_nothing_wanted_and_no_queries(backend):
    database = collection(0, 4, 20, 16, "float16")
    shard = shard_of(database, backend)
    for asked in (wanted([], []), wanted([0], [99])):
        for side in shard.votes(database[:1], None, asked, 0.4):
            assert dense(side, 20) == {}
            assert side.starts.tolist() == [0]
    assert len(shard.votes(database[:0], None, wanted([], []), 0.4)[0].rows) == 0
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
    patches, own, fresh = np.ones((120, 1, 1), np.float16), rows[:7], rng.random(120) < 0.3
    settled = np.array([True, False] * 4)[:7]
    shard = CudaShard(patches, globals_, rows, None, scenes, fresh, workspace=50_000, **backend)
    offsets, found, scores = shard.shortlist(queries, k, own)
    within_offsets, within, _ = shard.shortlist(queries, k, own, query_scenes, settled)
    assert (found.dtype, scores.dtype, offsets.dtype) == (np.int64, np.float32, np.int64)
    for q in range(7):
        mine = slice(offsets[q], offsets[q + 1])
        seen = rows != own[q]
        assert (found[mine].tolist(), scores[mine].tolist()) == nearest(queries[q], globals_[seen], rows[seen], k)
        seen &= (scenes == query_scenes[q]) & (fresh | ~settled[q])
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


@pytest.fixture(params=[backend for backend in BACKENDS if backend.values[0][1] == "triton"])
def kernel_device(request):
    """A device of the Triton kernel, for tests of the kernel itself."""
    pytest.importorskip("triton")
    return torch.device(request.param[0])


@pytest.mark.parametrize(
    "shape", [(128, 128, 256), (128, 64, 64), (64, 64, 32), (16, 32, 16)], ids=lambda shape: "x".join(map(str, shape))
)
def test_any_tile_gives_the_votes(kernel_device, shape):
    """Images that end inside tiles, runs of pairs of every length, an image without patches; E in one step or more."""
    from vop.retrieval import cuda_kernel

    queries, database = collection(0, 3, 150, 40, "float16"), collection(1, 7, 140, 40, "float16")
    x_sizes, y_sizes = np.array([150, 33, 128], np.int32), np.array([140, 1, 0, 64, 129, 128, 16], np.int32)
    query, place = np.repeat([0, 1, 2], [5, 1, 7]), np.array([0, 1, 2, 3, 4, 6, 0, 1, 2, 3, 4, 5, 6])
    arrays = queries, x_sizes, database, y_sizes, query, place
    tensors = [torch.from_numpy(array).to(kernel_device) for array in arrays]
    tile = cuda_kernel.Tile(*shape, pairs=3)
    votes = cuda_kernel.pair_votes(*tensors, float(np.float32(0.6)), True, tile)
    sums, counts, reverse_sums, reverse_counts = (part.cpu().numpy() for part in votes)
    assert counts.any()
    for i, (q, j) in enumerate(zip(query, place, strict=True)):
        x, y = queries[q, : x_sizes[q]], database[j, : y_sizes[j]]
        check(sums[i], counts[i], x, y, 0.4)
        check(reverse_sums[i], reverse_counts[i], y, x, 0.4)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter does not compile")
@pytest.mark.parametrize(
    ("dtype", "E", "both"), [("fp16", 256, False), ("bf16", 256, True), ("fp16", 384, True), ("fp32", 256, False)]
)
def test_the_triton_kernel_compiles_for_a_hopper_card(monkeypatch, dtype, E, both):
    """Without a card: it fits the 227 KB on the chip, and 16-bit patches are multiplied by tensor cores."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vop.retrieval import cuda_kernel

    class Patches:
        is_cuda, device, shape = True, "cuda", (1, 256, E)

    Patches.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tile = cuda_kernel.default_tile(Patches, both)
    constants = {"E": E, "BOTH": both, "ZERO_HITS": False, "TILE_P": tile.p, "TILE_S": tile.s, "TILE_E": tile.e}
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "sums": "*fp32", "back_sums": "*fp32", "bound": "fp32"}
    types |= dict.fromkeys(("x_sizes", "programs", "tiles", "counts", "back_counts"), "*i32")
    types |= dict.fromkeys(("P", "S", "blocks"), "i32") | dict.fromkeys(constants, "constexpr")
    names = cuda_kernel._votes.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(cuda_kernel._votes, {name: types[name] for name in names}, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 227 * 1024
    assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (dtype != "fp32")


def test_the_benchmark_runs_through_on_a_cpu(monkeypatch, capsys):
    """Its last line is one JSON object; where it is asked for a card that is not there, it ends with code 2."""
    spec = importlib.util.spec_from_file_location("votes_gpu", ROOT / "benchmarks" / "votes_gpu.py")
    votes_gpu = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "votes_gpu", votes_gpu)
    spec.loader.exec_module(votes_gpu)
    small = "--device cpu --patches 32 --embedding 16 --queries 2 --database 12 --candidates 4 --rounds 1 --gemm 32"
    monkeypatch.setattr(sys, "argv", ["votes_gpu.py", *small.split()])
    votes_gpu.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["k4"]["torch_kernel"]["queries_per_s"] > 0
    assert {"tflops", "share_of_peak"} <= result["k4_masked"]["torch_end_to_end"].keys()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["votes_gpu.py"])
    with pytest.raises(SystemExit) as end:
        votes_gpu.main()
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": np.array([1, 1, 2])}, "same number"),
        ({"rows": np.arange(4)}, "3 patches for 4 rows"),
        ({"masks": np.ones((2, 5), bool)}, "2 masks for 3 rows"),
        ({"masks": np.ones((3, 4), bool)}, "one bool a patch"),
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
        ({"patches": np.ones((2, 5, 9), np.float16)}, "width 9"),
        ({"patches": np.ones((2, 5, 8), np.float32)}, "float32"),
        ({"masks": np.ones((2, 1), bool)}, "one bool a patch"),
        ({"wanted": wanted([0, 2], [1, 1])}, "outside the batch of 2"),
        ({"wanted": wanted([-1], [1])}, "outside the batch of 2"),
    ],
)
def test_queries_that_do_not_fit_the_shard_are_refused(change, complaint):
    shard = shard_of(np.ones((3, 5, 8), np.float16), {"device": "cpu"})
    asked = {"patches": np.ones((2, 5, 8), np.float16), "masks": None, "wanted": every(2, 3), "radius": 0.3}
    with pytest.raises(ValueError, match=complaint):
        shard.votes(**{**asked, **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"query_globals": np.ones((2, 5))}, r"expected \(Q, 4\)"),
        ({"exclude": np.arange(3)}, "3 exclude for 2 queries"),
        ({"scenes": np.zeros(2)}, "scene codes"),
        ({"settled": np.ones(2, bool)}, "fresh rows"),
    ],
)
def test_shortlist_queries_that_do_not_fit_the_shard_are_refused(change, complaint):
    shard = shard_of(np.ones((3, 5, 8), np.float16), {"device": "cpu"})
    with pytest.raises(ValueError, match=complaint):
        shard.shortlist(**{"query_globals": np.ones((2, 4)), "k": 1, **change})


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
        votes = shard_of(database, {"device": "cuda", "kernel": "torch"}).votes(queries, None, every(2, 4), 0.4)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen
    assert check_pairs(votes, product(2, 4), queries, database, 0.4) == 8


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
from types import SimpleNamespace
import numpy as np
from vop.retrieval.cuda import CudaShard
ones = np.ones((2, 3, 4), np.float16) / 2
shard = CudaShard(ones, ones[:, 0], np.arange(2), device="cpu")
assert shard.kernel == "torch"
wanted = SimpleNamespace(queries=np.arange(2), rows=np.arange(2), mutual=np.zeros(2, bool))
assert shard.votes(ones, None, wanted, 0.1)[0].counts.tolist() == [3] * 6
try:
    CudaShard(ones, ones[:, 0], np.arange(2), device="cpu", kernel="triton")
except ValueError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "install it" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested on this machine's card")
def test_the_triton_kernel_in_its_interpreter():
    pytest.importorskip("triton", minversion="3.9", reason="needs triton 3.9: earlier interpreters fail with NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton-interpreter"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
