"""Votes that are not counted again leave no trace: the answers are those of a search that counts everything.

The shards run in this process, answered in the order and with the look-ahead of `vop.stages.search`.
"""

import dataclasses
from collections import deque

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop import files
from vop.parts import Parts
from vop.retrieval import pair_votes, shortlist, voting
from vop.retrieval.reuse import KEPT_IN, RECORD
from vop.retrieval.search import Search
from vop.schema import RetrievalConfig
from vop.store import EmbeddingStore, tensor_column

N, P, E, G = 30, 12, 16, 8
NAMES = [f"{'ab'[i % 2]}/{i:03d}.jpg" for i in range(N)]


def descriptors(images, seed=0):
    """Unit patches (n, P, E) and globals (n, G), float16, of images along a walk: neighbours share patches."""
    landmarks = np.random.default_rng(seed).standard_normal((N + 8, 4, E))
    patches, globals_ = [], []
    for i in images:
        noise = np.random.default_rng((seed, i)).standard_normal((P, E))
        seen = landmarks[i : i + 3].reshape(-1, E) + 0.3 * noise
        patches.append(seen / np.linalg.norm(seen, axis=1, keepdims=True))
        globals_.append(seen.mean(axis=0)[:G])
    return np.array(patches, np.float16), np.array(globals_, np.float16)


def add_images(store, images, shard, lacking=()):
    """Write images into a store as one more shard; those in `lacking` leave the catalog instead."""
    patches, globals_ = descriptors(images)
    count, names = len(images), [NAMES[i] for i in images]
    sizes = {name: np.full(count, 224) for name in ("width", "height", "scaled_width")}
    sizes["scaled_height"] = np.array([224 if i % 3 else 168 for i in images])
    columns = {"image_id": np.array(images), "name": names, **sizes, "content": names}
    columns |= {"global": tensor_column(globals_), "patches": tensor_column(patches)}
    store.write_shard(shard, pa.table(columns), [])
    known = store.images()
    lines = [
        {**{key: int(values[row]) for key, values in sizes.items()}, "image_id": i, "name": names[row], "shard": shard,
         "scene": names[row][0], "row": row, "status": "ok"}
        for row, i in enumerate(images)
    ]  # fmt: skip
    known = [line for line in known.to_pylist() if line["image_id"] not in lacking]
    store.write_images(pa.Table.from_pylist(known + lines, schema=store.images().schema))


def new_store(path):
    features = {"backbone": {"name": "synthetic"}, "preprocessing": {"image_size": 56}}
    shapes = {"patches": P, "width": E, "global_width": G, "token_width": E, "dtype": "float16"}
    return EmbeddingStore.create(str(path), features, shapes, {})


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """Masks for P patches: the last quarter of every third image is padding."""
    monkeypatch.setattr(
        "vop.retrieval.search.patch_mask", lambda w, h, size: np.arange(P) < (P if h == 224 else 3 * P // 4)
    )


def run(search, output, shards=1, ahead=2, stop_after=None):
    """What `vop.stages.search` and `vop.pipeline` do, without actors: {batch: ranked pairs}, and the `Reuse`."""
    parts, kept = (Parts(output, search.fingerprint(), kind) for kind in ("parts", KEPT_IN))
    missing = parts.missing(search.n_batches)
    reuse = search.reuse(output, missing)
    files.write_json(files.join(kept.path, RECORD), search.record())
    rows = np.array_split(np.arange(len(search.database)), shards)
    indexes = [search.index(part, None if reuse.fresh is None else reuse.fresh[part]) for part in rows]
    K, radius = search.retrieval.shortlist, search.radius

    def asked():
        for batch in search.batches(missing, reuse):
            listed = None
            if K is not None:
                own = batch.exclude, batch.scenes, batch.settled
                found = [index.shortlist(batch.globals, K, *own) for index in indexes]
                listed = shortlist.merge([*found, *reuse.shortlist(batch.number)], K)
            pairs = search.candidates(batch, listed)
            yield batch, listed, pairs, reuse.want(batch.number, *pairs)

    waiting, questions, done = deque(), asked(), 0
    while True:
        while len(waiting) <= ahead and (question := next(questions, None)) is not None:
            waiting.append(question)
        if not waiting or done == stop_after:
            break
        batch, listed, pairs, wanted = waiting.popleft()
        answers = [index.votes(batch.patches, batch.masks, wanted, radius) for index in indexes]
        reuse.add(batch.number, [back for _, back in answers])
        known = reuse.complete(batch.number, *pairs)
        votes = pair_votes.merge([*(found for found, _ in answers), *known])
        kept.write(batch.number, search.kept(batch, listed, votes))
        parts.write(batch.number, search.rank(batch, listed, pairs[0], votes))
        done += 1
    whole = not parts.missing(search.n_batches)
    return pa.concat_tables(parts.read(search.n_batches)) if whole else None, reuse


def asked_for(store, names=None, queries=None, **changes):
    retrieval = RetrievalConfig(**{"k": 4, "shortlist": 6, "radius": 0.4, "query_batch": 4, "reuse_gb": 0.0} | changes)
    database = store.select(names)
    return Search(database if queries is None else store.select(queries), database, retrieval, retrieval.radius)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = new_store(tmp_path_factory.mktemp("store"))
    add_images(store, list(range(N)), 0)
    return store


@pytest.mark.parametrize("shortlisted", [6, None])
@given(data=st.data())
@settings(max_examples=6)
def test_a_pair_scored_from_one_side_serves_both(shortlisted, store, tmp_path_factory, data):
    changes = {"shortlist": shortlisted, "within_scene": data.draw(st.booleans())}
    expected, plain = run(asked_for(store, **changes), str(tmp_path_factory.mktemp("plain")))
    again = changes | {
        "reuse_gb": data.draw(st.sampled_from([1.0, 2e-6, 2e-5])),  # the small ones hold few votes, or none for long
        "query_batch": 4,
    }
    shards, ahead = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    found, reuse = run(asked_for(store, **again), str(tmp_path_factory.mktemp("reuse")), shards, ahead)
    assert found.equals(expected)
    assert reuse.counted + reuse.reused == plain.counted + plain.reused
    assert reuse.counted < plain.counted


def test_an_unordered_pair_is_scored_once(store, tmp_path):
    _, reuse = run(asked_for(store, shortlist=None, reuse_gb=1.0), str(tmp_path), shards=3)
    assert (reuse.counted, reuse.reused) == (N * (N - 1) // 2, N * (N - 1) // 2)
    assert reuse.held == 0


@pytest.mark.parametrize("shortlisted", [6, None])
def test_a_search_that_stopped_goes_on_with_the_same_answer(store, tmp_path, shortlisted):
    changes = {"shortlist": shortlisted, "reuse_gb": 1.0}
    expected, _ = run(asked_for(store, **changes), str(tmp_path / "whole"))
    for stop_after in (1, 5):
        output = str(tmp_path / f"stopped-{stop_after}")
        assert run(asked_for(store, **changes), output, stop_after=stop_after)[0] is None
        found, reuse = run(asked_for(store, **changes), output, shards=2)
        assert found.equals(expected)
        assert reuse.counted + reuse.reused < len(store.select()) * 29


def counted(expected_output, output, store, first, changes, **second):
    """Search `first` of the images, then all: the pairs, and how many were scored in either way."""
    run(asked_for(store, first, **changes), output, shards=2)
    found, reuse = run(asked_for(store, **changes | second), output, shards=3)
    expected, whole = run(asked_for(store, **changes | second), expected_output)
    assert found.equals(expected)
    return reuse.counted, whole.counted


@given(
    chosen=st.sets(st.integers(0, N - 1), min_size=8, max_size=N - 1),
    shortlisted=st.sampled_from([6, None]),
    scenes=st.booleans(),
    reuse_gb=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=10)
def test_images_added_later_give_the_pairs_of_a_full_run(
    store, tmp_path_factory, chosen, shortlisted, scenes, reuse_gb
):
    folder = tmp_path_factory.mktemp("added")
    changes = {"shortlist": shortlisted, "within_scene": scenes, "reuse_gb": reuse_gb}
    first = [NAMES[i] for i in sorted(chosen)]
    scored, whole = counted(str(folder / "whole"), str(folder / "run"), store, first, changes)
    assert scored < whole


def test_only_pairs_with_an_added_image_are_scored(store, tmp_path):
    first = [name for i, name in enumerate(NAMES) if i not in (7, 20)]
    changes = {"shortlist": None, "reuse_gb": 1.0}
    scored, _ = counted(str(tmp_path / "whole"), str(tmp_path / "run"), store, first, changes)
    assert scored == 2 * 28 + 1
    scored, whole = counted(str(tmp_path / "whole6"), str(tmp_path / "run6"), store, first, {"reuse_gb": 1.0})
    assert scored <= 2 * 29 < whole


@pytest.mark.parametrize("change", [{"k": 2}, {"weights": "none"}, {"weights": "tfidf"}, {"query_batch": 7}])
def test_another_ranking_scores_nothing_anew(store, tmp_path, change):
    scored, whole = counted(str(tmp_path / "whole"), str(tmp_path / "run"), store, None, {}, **change)
    assert scored == 0 < whole


@pytest.mark.parametrize("change", [{"radius": 0.5}, {"shortlist": 7}, {"mask_padding": False}])
def test_votes_of_other_settings_are_not_taken_up(store, tmp_path, change):
    scored, whole = counted(str(tmp_path / "whole"), str(tmp_path / "run"), store, None, {}, **change)
    assert scored == whole


def test_votes_by_a_trained_index_are_not_taken_up(store, tmp_path):
    trained = {"index": "IVF2,Flat", "shards": 2}
    for changes in ({}, trained, trained | {"k": 2}):
        _, reuse = run(asked_for(store, **changes), str(tmp_path), shards=2)
        assert reuse.earlier is None


def test_a_search_that_differs_by_side_scores_every_side(store, tmp_path):
    changes = {"shortlist": None, "patch_index": "IVF4,Flat", "shards": 1, "reuse_gb": 1.0}
    search = asked_for(store, **changes)
    assert not search.symmetric and not search.exact
    _, reuse = run(search, str(tmp_path))
    assert (reuse.counted, reuse.reused) == (N * (N - 1), 0)


@pytest.mark.parametrize("side", [1.0, 0.0])
def test_a_flat_patch_index_gives_the_pairs_of_the_exact_search(store, tmp_path, side):
    changes = {"shortlist": None, "reuse_gb": side}
    found, _ = run(asked_for(store, patch_index="Flat", **changes), str(tmp_path / "flat"), shards=2)
    expected, _ = run(asked_for(store, **changes), str(tmp_path / "exact"))
    assert found.equals(expected)


def test_images_that_left_make_room_in_the_lists(store, tmp_path):
    run(asked_for(store), str(tmp_path / "run"))
    left = [name for i, name in enumerate(NAMES) if i not in (3, 4, 15)]
    found, reuse = run(asked_for(store, left), str(tmp_path / "run"), shards=2)
    expected, whole = run(asked_for(store, left), str(tmp_path / "whole"))
    assert found.equals(expected)
    assert 0 < reuse.counted < whole.counted / 2


def test_queries_of_another_set_than_the_database(store, tmp_path):
    queries, first = NAMES[:10], NAMES[5:18]
    changes = {"queries": queries}
    expected, whole = run(asked_for(store, NAMES[5:], **changes), str(tmp_path / "whole"))
    run(asked_for(store, first, **changes), str(tmp_path / "run"))
    found, reuse = run(asked_for(store, NAMES[5:], **changes | {"reuse_gb": 1.0}), str(tmp_path / "run"), shards=2)
    assert found.equals(expected)
    assert reuse.counted < whole.counted


def test_a_changed_shard_is_searched_anew(tmp_path):
    store = new_store(tmp_path / "store")
    add_images(store, list(range(10)), 0)
    run(asked_for(store), str(tmp_path / "run"))
    add_images(store, list(range(10, 14)), 1)
    assert run(asked_for(store), str(tmp_path / "run"))[1].earlier is not None
    receipt = files.read_json(store.path + "/shard-00000.json")
    files.write_json(store.path + "/shard-00000.json", receipt | {"sha256": "0" * 64})
    assert run(asked_for(store), str(tmp_path / "run"))[1].earlier is None


def test_unfinished_votes_are_not_taken_up(store, tmp_path):
    run(asked_for(store, NAMES[:20]), str(tmp_path), stop_after=3)
    _, reuse = run(asked_for(store), str(tmp_path))
    assert reuse.earlier is None


def test_the_kept_votes_are_those_of_every_candidate(store, tmp_path):
    search = asked_for(store)
    run(search, str(tmp_path))
    kept = pa.concat_tables(Parts(str(tmp_path), search.fingerprint(), KEPT_IN).read(search.n_batches))
    assert kept.num_rows == N * 6
    _, patches = search.database.read()
    ids = {image_id: row for row, image_id in enumerate(search.database.image_ids)}
    for line in kept.slice(40, 12).to_pylist():
        x, y = (patches[ids[line[side]]] for side in ("query", "database"))
        sizes = search.database.scaled_sizes[[ids[line["query"]], ids[line["database"]]], 1]
        x, y = (image[: P if height == 224 else 3 * P // 4] for image, height in zip((x, y), sizes, strict=True))
        sums, counts = voting.pair_votes(x, y, 0.4)
        assert line["patches"] == np.flatnonzero(counts).tolist()
        assert line["counts"] == counts[counts > 0].tolist()
        assert line["sums"] == sums[counts > 0].tolist()


def test_memory_mapped_descriptors_give_the_same_bits(store, tmp_path):
    expected, _ = run(asked_for(store), str(tmp_path / "a"))
    search = asked_for(store, cache=str(tmp_path / "cache"))
    assert search.fingerprint() == asked_for(store).fingerprint()
    for _ in range(2):
        found, _ = run(search, str(tmp_path / "b"), shards=3)
        assert found.equals(expected)
        files.remove(str(tmp_path / "b"))
        copies = sorted(path.name for path in (tmp_path / "cache").glob("*.npy"))
        assert len(copies) == 3
    assert isinstance(search.index(np.arange(4), None)._patches, np.memmap)
    assert dataclasses.replace(search, radius=0.5).fingerprint() != search.fingerprint()
