"""The shortlist by global descriptors of a file, as hloc writes them, against the same in plain NumPy."""

import itertools

import h5py
import numpy as np
import pytest
from test_reuse import NAMES, N, add_images, new_store, run
from test_reuse import small_images as small_images  # a fixture

from vop.config import ConfigError, load
from vop.foreign_hloc import GlobalDescriptors, HlocError, HlocFiles
from vop.retrieval import shortlist
from vop.retrieval.search import Search
from vop.schema import RetrievalConfig
from vop.steps import pairs

G, K = 33, 5  # other than the store's


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = new_store(tmp_path_factory.mktemp("store"))
    add_images(store, list(range(N)), 0)
    return store


def write(path, names=tuple(NAMES), seed=0, kind=np.float16, width=G):
    values = np.random.default_rng(seed).standard_normal((len(names), width)).astype(kind)
    with h5py.File(path, "w") as h5:
        for name, value in zip(names, values, strict=True):
            h5.create_dataset(f"{name}/global_descriptor", data=value)
    return values


def search(store, path, queries=None, **changed):
    retrieval = RetrievalConfig(**{"k": K, "shortlist": K, "radius": 0.4, "query_batch": 4} | changed)
    database = store.select()
    asked = database if queries is None else store.select(queries)
    given = None if path is None else GlobalDescriptors.open("retrieval.global_descriptors", str(path), database.names)
    return Search(asked, database, retrieval, retrieval.radius, given)


@pytest.mark.parametrize(("shards", "kind"), [(1, np.float16), (3, np.float32)])
def test_the_shortlist_is_that_of_the_file_whatever_the_shards(store, tmp_path, shards, kind):
    values = dict(zip(NAMES, write(tmp_path / "global.h5", kind=kind).astype(np.float64), strict=True))
    names = sorted(NAMES)
    values = np.stack([values[name] for name in names])
    scores = values @ values.T
    np.fill_diagonal(scores, -np.inf)
    asked = search(store, tmp_path / "global.h5")
    indexes = [asked.index(rows, None) for rows in np.array_split(np.arange(N), shards)]
    seen = 0
    for batch in asked.batches(range(asked.n_batches), asked.reuse(str(tmp_path / "out"), range(asked.n_batches))):
        found = shortlist.merge([index.shortlist(batch.globals, K, batch.exclude) for index in indexes], K)
        for q in range(len(found)):
            best = np.argsort(-scores[seen])[:K]
            assert found[q].tolist() == best.tolist()
            assert found.scores_of(q) == pytest.approx(scores[seen, best], rel=1e-5)
            seen += 1
    assert seen == N


def test_votes_are_those_of_the_same_pairs_without_the_file(store, tmp_path):
    write(tmp_path / "global.h5")
    found, _ = run(search(store, tmp_path / "global.h5"), str(tmp_path / "given"), shards=2)
    everything, _ = run(search(store, None, shortlist=N, k=N), str(tmp_path / "all"))
    scores = {(row["query"], row["database"]): row["score"] for row in everything.to_pylist()}
    assert found.num_rows
    assert all(scores[row["query"], row["database"]] == row["score"] for row in found.to_pylist())


def test_the_file_is_part_of_what_a_search_is_known_by(store, tmp_path):
    write(tmp_path / "global.h5")
    before = search(store, tmp_path / "global.h5")
    (tmp_path / "global.h5").rename(tmp_path / "moved.h5")
    moved = search(store, tmp_path / "moved.h5")
    assert (before.fingerprint(), before.settings()) == (moved.fingerprint(), moved.settings())
    write(tmp_path / "moved.h5", seed=1)
    others = [search(store, tmp_path / "moved.h5"), search(store, None)]
    for one, other in itertools.combinations([before, *others], 2):
        assert one.fingerprint() != other.fingerprint()
        assert one.settings() != other.settings()
    # what an earlier search kept is taken up by one with the same file, by no other
    write(tmp_path / "global.h5")
    run(search(store, tmp_path / "global.h5", k=2), str(tmp_path / "out"))
    assert run(search(store, tmp_path / "global.h5"), str(tmp_path / "out"))[1].counted == 0
    assert run(search(store, tmp_path / "moved.h5"), str(tmp_path / "out"))[1].counted > 0


def test_queries_and_database_may_have_files_of_their_own(store, tmp_path):
    names = sorted(NAMES)
    whole = write(tmp_path / "whole.h5", names)
    for path, part in (("part-q.h5", slice(0, 9)), ("part-r.h5", slice(9, None))):
        with h5py.File(tmp_path / path, "w") as h5:
            for name, value in zip(names[part], whole[part], strict=True):
                h5.create_dataset(f"{name}/global_descriptor", data=value)
    one, two = (search(store, tmp_path / name, names[:9]) for name in ("whole.h5", "part-*.h5"))
    np.testing.assert_array_equal(one.globals.read(names), two.globals.read(names))
    assert run(one, str(tmp_path / "one"))[0] == run(two, str(tmp_path / "two"))[0]


def test_the_memory_of_a_shard_counts_the_descriptors_of_the_file(store, tmp_path):
    write(tmp_path / "global.h5", width=4096)
    wide, own = search(store, tmp_path / "global.h5"), search(store, None)
    assert wide.memory_bytes(1000) - own.memory_bytes(1000) > 1000 * 4096 * 8


def test_descriptors_that_lack_or_do_not_fit_are_named(store, tmp_path):
    path = tmp_path / "global.h5"
    write(path, sorted(NAMES)[2:])
    with pytest.raises(HlocError, match=rf"no global_descriptor of 2 of {N} images, such as '{min(NAMES)}'; it holds"):
        search(store, path)
    write(path)
    with h5py.File(path, "a") as h5:
        del h5[NAMES[3]]
        h5[f"{NAMES[3]}/global_descriptor"] = np.zeros(G + 1)
    found = search(store, path).globals
    with pytest.raises(HlocError, match=rf"group '{NAMES[3]}' .*of shape \(34,\); expected numbers of shape \(33\)"):
        found.read([NAMES[3]])
    with pytest.raises(ConfigError, match=r"null with retrieval\.shortlist=null"):
        load(retrieval={"global_descriptors": "g.h5", "shortlist": None})
    with pytest.raises(FileNotFoundError, match=r"no file at retrieval\.global_descriptors="):
        pairs.check(load(retrieval={"global_descriptors": str(tmp_path / "none.h5")}))
    assert HlocFiles.find("key", str(path)).paths == (str(path),)
