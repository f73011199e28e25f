"""Patches in one byte a number: what is stored, what it stands for, and that the votes see exactly that.

Whole runs with such patches: tests/test_pipeline.py.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vop.datasets.synthetic import World, write_store
from vop.quantised import LEVEL, float_type, quantise, stored, widen
from vop.retrieval import kernel, voting
from vop.retrieval.index import ShardIndex, Wanted, memory_bytes
from vop.retrieval.search import choose_radius
from vop.schema import RetrievalConfig

ANY_INT8 = arrays.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 40)))
VECTORS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-12),
)


def clustered(seed, images, P, E):
    """Unit patches (images, P, E) float32 that share a few centres, so that some but not all are similar."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, E))
    vectors = centres[rng.integers(12, size=(images, P))] + 0.6 * rng.standard_normal((images, P, E))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@given(VECTORS)
def test_each_number_is_rounded_by_at_most_half_a_step(x):
    q, largest = quantise(x), np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)
    assert q.dtype == np.int8 and q.shape == x.shape
    assert (np.abs(q * largest / LEVEL - x) <= largest / 254 * (1 + 1e-12)).all()
    np.testing.assert_array_equal(np.abs(q.astype(int)).max(axis=1), np.where(largest[:, 0] > 0, LEVEL, 0))
    np.testing.assert_array_equal(quantise(-x), -q)


@given(VECTORS, st.integers(-40, 40), st.floats(0.01, 100))
def test_the_length_of_a_vector_does_not_matter(x, power, factor):
    q = quantise(x)
    np.testing.assert_array_equal(quantise(x * np.float32(2.0**power)), q)
    scaled = quantise(x.astype(np.float64) * factor)  # whose own rounding may turn a tie
    assert np.abs(scaled.astype(int) - q).max() <= 1


@given(ANY_INT8)
def test_widened_vectors_are_unit_or_zero_and_parallel_to_the_stored_ones(q):
    x, exact = widen(q).astype(np.float64), q.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(x * lengths, exact, rtol=2.0**-23)
    assert widen(q).dtype == np.float32
    assert not widen(np.zeros_like(q)).any()


@given(VECTORS)
def test_quantising_again_changes_nothing(x):
    q = quantise(x)
    np.testing.assert_array_equal(quantise(widen(q)), q)


@given(arrays.arrays(np.float16, (2, 7), elements=st.floats(-1, 1, width=16)))
def test_other_types_are_stored_and_widened_as_before(x):
    for dtype in (np.float16, np.float32):
        kept = stored(x.astype(np.float32), np.dtype(dtype).name)
        assert kept.dtype == dtype
        np.testing.assert_array_equal(widen(kept), x.astype(np.float32))
    np.testing.assert_array_equal(stored(x, "int8"), quantise(x))


def test_realistic_patches_keep_their_direction():
    for E in (16, 128, 256, 384):
        x = clustered(E, 4, 64, E)
        assert (np.einsum("npe,npe->np", widen(quantise(x)), x) > 0.9999).all()


def test_a_number_that_is_not_finite_is_refused():
    x = np.eye(3, dtype=np.float32)
    x[1, 2], x[2, 2] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 9 numbers of the patches are not finite"):
        quantise(x)


@settings(max_examples=50)  # the first one compiles
@given(ANY_INT8, st.integers(0, 2**32 - 1))
def test_the_kernel_widens_as_numpy_does(q, seed):
    mask = np.random.default_rng(seed).random(len(q)) < 0.7
    packed = kernel.stack(q[None], mask[None])
    x, size = packed[0][0], packed[-1][0]
    assert size == mask.sum()
    np.testing.assert_array_equal(x[:size, : q.shape[1]].view(np.uint32), widen(q[mask]).view(np.uint32))
    assert not x[:size, q.shape[1] :].any()


def test_the_kernel_widens_every_length_that_numpy_does():
    """2,000 rows of every magnitude from one small number to all numbers at their largest."""
    rng = np.random.default_rng(0)
    q = (rng.integers(-127, 128, (2000, 256)) * rng.random((2000, 1)) ** 4).astype(np.int8)
    q[0], q[1], q[2] = 0, 127, -127
    x = kernel.stack(q[None], np.ones((1, len(q)), bool))[0][0]
    np.testing.assert_array_equal(x.view(np.uint32), widen(q).view(np.uint32))


def assert_same(one, other):
    for name, array in vars(one).items():
        np.testing.assert_array_equal(array, getattr(other, name), err_msg=name)
        assert array.dtype == getattr(other, name).dtype


@pytest.mark.parametrize("E", [128, 21])
@pytest.mark.parametrize("radius", [0.3, 1.2], ids=["few hits", "nearly all are hits"])
@pytest.mark.parametrize("screens", [True, False])
def test_votes_of_an_int8_shard_are_those_of_its_widened_patches(E, radius, screens):
    q, rng = quantise(clustered(1, 9, 30, E)), np.random.default_rng(2)
    masks, globals_ = rng.random((9, 30)) < 0.8, rng.standard_normal((9, 8)).astype(np.float16)
    queries, rows = (array.ravel() for array in np.meshgrid(np.arange(3), np.arange(3, 9)))
    wanted = Wanted(queries.astype(np.int64), rows.astype(np.int64), np.ones(len(rows), bool))
    found = []
    for patches in (q, widen(q)):
        index = ShardIndex(patches, globals_, np.arange(9), masks)
        found.append(index.votes(patches[:3], masks[:3], wanted, radius, screens))
    assert len(found[0][0])
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_int8_patches_vote_with_float_ones():
    """A query that is not quantised may be searched in quantised images: each side is widened by its own type."""
    x, y = clustered(3, 2, 40, 32)
    for q, wide in ((quantise(x), quantise(y)), (x, quantise(y)), (x.astype(np.float16), quantise(y))):
        for one, other in zip(
            voting.pair_votes(q, wide, 0.4), voting.pair_votes(widen(q), widen(wide), 0.4), strict=True
        ):
            np.testing.assert_array_equal(one, other)
            assert one.any()


def test_similarities_move_by_little():
    """By less than 0.01 on patches of 128 numbers; so the same votes where no similarity is nearer to the radius."""
    x, y = clustered(5, 2, 60, 128)
    similarity = x.astype(np.float64) @ y.T.astype(np.float64)
    moved = np.abs(widen(quantise(x)).astype(np.float64) @ widen(quantise(y)).T.astype(np.float64) - similarity)
    assert 0 < moved.max() < 0.01
    edge = 0.5  # between the clusters' own similarities and those across them
    assert np.abs(similarity - edge).min() > moved.max()
    whole, rounded = voting.pair_votes(x, y, 1 - edge), voting.pair_votes(quantise(x), quantise(y), 1 - edge)
    np.testing.assert_array_equal(whole[1], rounded[1])
    np.testing.assert_allclose(rounded[0], whole[0], rtol=5e-3)


def test_a_shard_needs_half_the_memory():
    assert float_type("int8") == "float16" and float_type("float32") == "float32"
    rows, P, E, G = 1000, 256, 128, 256
    fixed = rows * (P + 16 + 4 * G) + memory_bytes(0, 0, P, E, "int8", G, 0)
    int8, half, single = (
        memory_bytes(rows, rows, P, E, dtype, G, 0) - fixed for dtype in ("int8", "float16", "float32")
    )
    assert (int8, half, single) == (rows * (P * E + 2 * G), rows * 2 * (P * E + G), rows * 4 * (P * E + G))
    index = ShardIndex(np.zeros((3, 4, 16), np.int8), np.zeros((3, 5), np.float16), np.arange(3))
    assert index._patches.dtype == np.int8  # no wide copy


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_patches_of_another_type_are_refused(dtype):
    with pytest.raises(ValueError, match=f"patches are {np.dtype(dtype)}, expected float16, float32 or int8"):
        kernel.as_bits(np.zeros((1, 2, 3), dtype))


class Narrow(World):
    """A world whose patches have about 0.5 in common, so that there is a median similarity to find."""

    def _describe(self, number):
        globals_, patches = super()._describe(number)
        patches = patches + 1 / np.sqrt(self.width)
        return globals_, patches / np.linalg.norm(patches, axis=-1, keepdims=True)


def test_the_automatic_radius_is_that_of_the_vectors_that_int8_stands_for(tmp_path):
    world = Narrow(30, 64, 32, 12, walk=15)
    radii, reads = [], []
    for dtype in ("float16", "int8"):
        selection = write_store(str(tmp_path / dtype), world, dtype=dtype).select()
        radii.append(choose_radius(selection, RetrievalConfig(radius=None, mask_padding=False)))
        reads.append(selection.read())
    assert radii == [0.5, 0.5]
    np.testing.assert_array_equal(reads[0][0], reads[1][0])
    assert np.einsum("npe,npe->np", widen(reads[0][1]), widen(reads[1][1])).min() > 0.999
