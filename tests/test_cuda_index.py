"""The shard for a graphics card, run on the CPU by its torch kernel, answers like the CPU's own."""

import numpy as np
import pytest

from vop.retrieval.cuda_index import CudaIndex
from vop.retrieval.index import ShardIndex, Wanted
from vop.retrieval.pair_votes import merge

N, Q, P, E, G = 15, 5, 20, 16, 8


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((6, E))[rng.integers(6, size=(N + Q, P))] + 0.3 * rng.standard_normal((N + Q, P, E))
    patches /= np.linalg.norm(patches, axis=-1, keepdims=True)
    masks = np.arange(P) < rng.integers(8, P + 1, (N + Q, 1))
    return patches.astype(np.float16), rng.standard_normal((N + Q, G)).astype(np.float16), masks


def both(images, rows):
    patches, globals_, masks = images
    arguments = patches[rows], globals_[rows], rows, masks[rows]
    return CudaIndex(*arguments, device="cpu"), ShardIndex(*arguments)


def sorted_votes(votes):
    return merge([votes])


def test_votes_are_those_of_the_cpu(images):
    rng, rows = np.random.default_rng(1), np.array([9, 2, 7, 3, 14, 0])
    pairs = rng.permutation(Q * N)[:50]
    wanted = Wanted(pairs // N, pairs % N, rng.random(50) < 0.5)
    patches, _, masks = images
    answers = [map(sorted_votes, index.votes(patches[N:], masks[N:], wanted, 0.35)) for index in both(images, rows)]
    for ours, expected in zip(*answers, strict=True):
        assert len(expected) > 5
        for name in ("queries", "rows", "starts", "patches", "counts"):
            assert getattr(ours, name).tolist() == getattr(expected, name).tolist()
        np.testing.assert_allclose(ours.sums, expected.sums, rtol=1e-5)


@pytest.mark.parametrize("mutual", [False, True])
def test_a_shard_that_holds_nothing_wanted_answers_with_nothing(images, mutual):
    patches, _, masks = images
    wanted = Wanted(np.array([0, 3]), np.array([5, 6]), np.full(2, mutual))
    for index in both(images, np.arange(4)):
        assert [len(votes) for votes in index.votes(patches[N:], masks[N:], wanted, 0.35)] == [0, 0]


def test_shortlists_are_those_of_the_cpu(images):
    _, globals_, _ = images
    ours, expected = (index.shortlist(globals_[N:], 4) for index in both(images, np.arange(N)))
    assert ours.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(ours.scores, expected.scores, rtol=1e-6)


def test_settled_queries_see_only_fresh_rows(images):
    patches, globals_, masks = images
    fresh, settled = np.arange(N) % 3 == 0, np.arange(Q) % 2 == 0
    arguments = patches[:N], globals_[:N], np.arange(N), masks[:N]
    answers = [
        index.shortlist(globals_[N:], 4, settled=settled)
        for index in (CudaIndex(*arguments, fresh=fresh, device="cpu"), ShardIndex(*arguments, fresh=fresh))
    ]
    assert answers[0].rows.tolist() == answers[1].rows.tolist()
    assert fresh[answers[0][0]].all() and not fresh[answers[0][1]].all()
