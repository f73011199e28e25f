"""The synthetic world: what follows from a number alone, how dense true and chance matches are, and its stores."""

from pathlib import Path

import numpy as np
import pytest

from vop.datasets.synthetic import World, write_store
from vop.store import EmbeddingStore, StoreError

SMALL = World(60, patches=16, width=8, global_width=12, walk=20)


def density(world, a, others, radius=0.3):
    """Share of the patch pairs of image `a` and each of `others` that lie within the radius."""
    x, y = world.descriptors([a])[1][0], world.descriptors(others)[1]
    return (np.einsum("pe,nse->nps", x, y) > 1 - radius).mean(axis=(1, 2))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_an_image_follows_from_its_number_alone():
    numbers = [7, 0, 59, 7]
    together = SMALL.descriptors(numbers)
    for i, number in enumerate(numbers):
        for part, whole in zip(SMALL.descriptors([number]), together, strict=True):
            np.testing.assert_array_equal(part[0], whole[i])
    for grown, whole in zip(World(1000, 16, 8, 12, walk=20).descriptors(numbers), together, strict=True):
        np.testing.assert_array_equal(grown, whole)
    for half, whole in zip(SMALL.descriptors(numbers, "float16"), together, strict=True):
        np.testing.assert_array_equal(half, whole.astype(np.float16))
    for other in (World(60, 16, 8, 12, walk=20, seed=1), World(60, 16, 8, 12, walk=20, seed=256)):
        assert (np.abs(other.descriptors(numbers)[1] - together[1]) > 0.01).mean() > 0.9


def test_descriptors_are_unit_vectors_of_the_asked_shape():
    globals_, patches = SMALL.descriptors(range(60))
    assert globals_.shape == (60, 12) and patches.shape == (60, 16, 8)
    assert globals_.dtype == patches.dtype == np.float32
    for vectors in (globals_, patches):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)
    assert len(np.unique(patches.reshape(-1, 8), axis=0)) == 60 * 16  # nothing is shown twice in the same way


def test_overlap_falls_with_the_distance_on_a_street_and_is_zero_between_streets():
    world = World(4000)
    ahead = world.overlap(100, 100 + np.arange(20))
    assert ahead[0] == 1 and (np.diff(ahead) <= 0).all() and (np.diff(ahead[:12]) < 0).all()
    assert (ahead[:12] > 0).all() and (ahead[12:] == 0).all()
    np.testing.assert_allclose(ahead[:12], 1 - np.arange(12) / 12, atol=1 / 128)
    assert world.overlap(100, 600) > 0.9  # the second walk along the same street
    assert not world.overlap(100, np.arange(1000, 4000)).any()  # other streets
    everyone = np.arange(0, 1000, 7)
    np.testing.assert_array_equal(
        world.overlap(everyone[:, None], everyone), world.overlap(everyone[:, None], everyone).T
    )


def test_matches_are_as_dense_as_the_overlap_says():
    world = World(4000)
    overlap = world.overlap(1200, np.arange(4000))
    overlap[1200] = 0
    near, some = np.flatnonzero(overlap > 0.5), np.flatnonzero((overlap > 0) & (overlap <= 0.5))
    far = np.flatnonzero(overlap == 0)[::20]
    near_density, some_density, far_density = (density(world, 1200, numbers) for numbers in (near, some, far))
    assert near_density.min() > 0.005 and near_density.max() < 0.02
    assert 0.001 < some_density.mean() < near_density.mean()
    assert 0.0002 < far_density.mean() < 0.0015 and far_density.max() < near_density.min()
    seen = np.concatenate([near, some])
    assert np.corrcoef(overlap[seen], np.concatenate([near_density, some_density]))[0, 1] > 0.95
    # Similarities spread around the radius: a smaller one keeps part of the matches, and a wider one adds some.
    narrow, wide = (density(world, 1200, near, radius).mean() for radius in (0.2, 0.4))
    assert 0.1 < narrow / near_density.mean() < 0.6 and wide / near_density.mean() > 1.1


def test_most_true_neighbours_are_near_by_global_descriptor():
    world = World(2500, patches=64, width=4)
    globals_ = world.descriptors(range(2500))[0]
    found = []
    for query in range(50, 2500, 250):
        overlap, similarity = world.overlap(query, np.arange(2500)), globals_ @ globals_[query]
        overlap[query], similarity[query] = 0, -1
        listed = np.argsort(-similarity)[:20]
        found.append((overlap[listed] > 0).mean())
    assert np.mean(found) > 0.85


@pytest.mark.parametrize(
    "arguments", [{"images": 0}, {"images": 5, "patches": 32}, {"images": 5, "patches": 9}, {"images": 5, "seed": -1}]
)
def test_a_world_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        World(**arguments)


def test_an_image_outside_the_world_is_refused(tmp_path):
    with pytest.raises(IndexError, match="image 60 of a world of 60"):
        SMALL.descriptors([3, 60])
    with pytest.raises(IndexError, match="image 61"):
        write_store(str(tmp_path / "store"), SMALL, numbers=[61])


def test_a_store_holds_the_world_by_name_whatever_the_shards(tmp_path):
    for shard_size in (7, 60):
        path = str(tmp_path / str(shard_size))
        write_store(path, SMALL, shard_size)
        store = EmbeddingStore.open(path)
        everything = store.select()
        assert everything.names == [SMALL.name(number) for number in range(60)]
        assert everything.names[33] == "walk-0001/0000033.jpg" and everything.scenes[33] == "walk-0001"
        assert [SMALL.number(name) for name in everything.names] == [*range(60)]
        for stored, made in zip(everything.read(), SMALL.descriptors(range(60), "float16"), strict=True):
            np.testing.assert_array_equal(stored, made)
        assert (everything.scaled_sizes == 56).all()
        assert len(store.receipts()) == -(-60 // shard_size) and not [*store.verify()]


def test_a_killed_write_goes_on_and_leaves_the_same_bytes(tmp_path, monkeypatch):
    write_store(str(tmp_path / "whole"), SMALL, 7)
    path, write, written = str(tmp_path / "killed"), EmbeddingStore.write_shard, []

    def write_two(self, number, table, quarantined):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, table, quarantined)

    monkeypatch.setattr(EmbeddingStore, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, SMALL, 7)
    monkeypatch.setattr(
        EmbeddingStore, "write_shard", lambda self, *shard: written.append(shard[0]) or write(self, *shard)
    )
    write_store(path, SMALL, 7)
    write_store(path, SMALL, 7)
    assert written == [*range(9)]
    assert contents(path) == contents(tmp_path / "whole")


def test_images_are_added_between_those_of_a_store(tmp_path):
    path = str(tmp_path / "store")
    write_store(path, SMALL, 7, numbers=range(0, 60, 2))
    before = contents(path)
    assert EmbeddingStore.open(path).select().names == [SMALL.name(number) for number in range(0, 60, 2)]
    write_store(path, World(64, 16, 8, 12, walk=20), 7)
    everything = EmbeddingStore.open(path).select()
    assert everything.names == [SMALL.name(number) for number in range(64)]
    for stored, made in zip(everything.read(), World(64, 16, 8, 12, walk=20).descriptors(range(64)), strict=True):
        np.testing.assert_array_equal(stored, made.astype(np.float16))
    after = contents(path)
    assert {name: after[name] for name in before if name.startswith("shard")} == {
        name: content for name, content in before.items() if name.startswith("shard")
    }


def test_a_store_of_another_world_is_refused(tmp_path):
    write_store(str(tmp_path / "store"), SMALL)
    with pytest.raises(StoreError, match="seed"):
        write_store(str(tmp_path / "store"), World(60, 16, 8, 12, walk=20, seed=1))
    with pytest.raises(StoreError, match="width"):
        write_store(str(tmp_path / "store"), World(60, 16, 9, 12, walk=20))
    with pytest.raises(StoreError, match="dtype"):
        write_store(str(tmp_path / "store"), SMALL, dtype="float32")
