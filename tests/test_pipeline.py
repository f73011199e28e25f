"""The commands end to end with the embedded backbone, against brute force over the descriptors they stored."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_images import write_zoo

import vop
from vop import config, pairs, pipeline, schema
from vop.catalog import TooManyBadImagesError
from vop.config import ConfigError
from vop.datasets.posed import OverlapTruth, PosedFolder, read_overlap, write_overlap
from vop.datasets.positions import PositionsError
from vop.evaluation import ranked_names
from vop.image import ImageError, patch_mask
from vop.quantised import widen
from vop.store import EmbeddingStore, StoreError

EMBEDDING = {"shard_size": 8, "encoders": 1}
WITHOUT_REPORT = {"queries": 0}
K = 5

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def photos(rendered_collection, tmp_path_factory):
    """The rendered photographs as two scenes, `one/` and `two/`, and the overlaps under the new names."""
    root = tmp_path_factory.mktemp("photos")
    truth = read_overlap(rendered_collection / "overlap.parquet")
    renamed = [f"{'one' if i < 13 else 'two'}/{name}" for i, name in enumerate(truth.names)]
    for old, new in zip(truth.names, renamed, strict=True):
        (root / new).parent.mkdir(exist_ok=True)
        shutil.copy2(rendered_collection / old, root / new)
    write_overlap(root / "overlap.parquet", OverlapTruth(tuple(renamed), truth.matrix))
    return root


@pytest.fixture(scope="module")
def registered(photos, tmp_path_factory):
    """(config, run) of a collection registered with the defaults."""
    output = tmp_path_factory.mktemp("registered") / "run"
    values = {"images": str(photos), "truth": str(photos), "embedding": EMBEDDING, "report": {"queries": 3}}
    job = vop.register(output=str(output), **values)
    return config.load(output=str(output), **values), job


@pytest.fixture(scope="module")
def brute(registered):
    return BruteForce(EmbeddingStore.open(registered[0].store_path))


class BruteForce:
    """The method as float64 matrices over all stored patches; no index, no shard, no batch."""

    def __init__(self, store):
        chosen = store.select()
        globals_, patches = chosen.read()
        self.names = chosen.names
        self.masks = [patch_mask(int(w), int(h)) for w, h in chosen.scaled_sizes]
        self.globals = globals_.astype(np.float64)
        self.patches = [x[mask].astype(np.float64) for x, mask in zip(patches, self.masks, strict=True)]
        self.starts = np.cumsum([0, *(len(x) for x in self.patches)])
        self.similarity = np.concatenate(self.patches) @ np.concatenate(self.patches).T
        self.radius = self._clear_radius(schema.RetrievalConfig().radius)

    def _clear_radius(self, near):
        """A radius about `near` with no similarity so close to 1 - radius that rounding could decide a hit."""
        values = np.unique(self.similarity[np.abs(self.similarity - (1 - near)) < 0.01])
        gap = np.argmax(np.diff(values))
        assert values[gap + 1] - values[gap] > 2e-6, "no clear gap: the test's data are too dense"
        return float(1 - (values[gap] + values[gap + 1]) / 2)

    def scores(self, query, candidates, weights):
        """{row: score} of one image against others."""
        own = slice(self.starts[query], self.starts[query + 1])
        columns = [slice(self.starts[row], self.starts[row + 1]) for row in candidates]
        blocks = [self.similarity[own, column] for column in columns]
        hits = [block > 1 - self.radius for block in blocks]
        sums = np.stack([(block * hit).sum(axis=1) for block, hit in zip(blocks, hits, strict=True)])
        counts = np.stack([hit.sum(axis=1) for hit in hits])
        images = (counts > 0).sum(axis=0)
        if weights == "none":
            weight = np.ones(sums.shape[1])
        elif weights == "idf":
            weight = np.log((len(candidates) + 1) / np.maximum(images, 1))
        else:
            idf = np.log(len(candidates) / (images + 1e-5))
            weight = np.maximum(0, counts.sum(axis=0) / sums.shape[1] * idf)
        return dict(zip(candidates, sums @ weight, strict=True))

    def pairs(self, queries, database, k, shortlist, weights="idf", within_scene=False):
        """Rows of pairs.parquet: (query, database, rank, score, weighted, shortlist rank)."""
        place = {name: row for row, name in enumerate(self.names)}
        found = []
        for name in sorted(queries):
            q = place[name]
            rows = [place[other] for other in sorted(database) if other != name]
            if within_scene:
                rows = [row for row in rows if self.names[row].split("/")[0] == name.split("/")[0]]
            listed = rows
            if shortlist is not None:
                listed = oracle.shortlist(self.globals[q], {row: self.globals[row] for row in rows}, shortlist)
            plain, weighted = (self.scores(q, sorted(listed), w) for w in ("none", weights))
            for rank, row in enumerate(oracle.ranking(weighted, k)):
                position = None if shortlist is None else listed.index(row)
                found.append((name, self.names[row], rank, plain[row], weighted[row], position))
        return found


def run_again(registered, output, command=pipeline.register, **retrieval):
    """Pairs of the stored collection under other settings; nothing is embedded."""
    asked, _ = registered
    embedding = {"shard_size": 8, "encoders": 1}
    job = command(
        config.load(
            images=asked.images, store=asked.store_path, output=str(output),
            embedding=embedding, report=WITHOUT_REPORT, retrieval=retrieval,
        )
    )  # fmt: skip
    assert job.counts["embedded_now"] == 0
    return pq.read_table(Path(output) / "pairs.parquet")


def assert_pairs(table, expected):
    found = table.to_pylist()
    keys = ("query", "database", "rank", "shortlist_rank")
    assert [tuple(row[key] for key in keys) for row in found] == [(q, d, r, s) for q, d, r, _, _, s in expected]
    np.testing.assert_allclose([row["score"] for row in found], [e[3] for e in expected], rtol=1e-5)
    np.testing.assert_allclose([row["weighted"] for row in found], [e[4] for e in expected], rtol=1e-5, atol=1e-7)


def hloc_pairs(text):
    """Query -> database names, as hloc reads a pair list: one `line.split()` per line."""
    found = {}
    for line in text.rstrip("\n").split("\n"):
        if not line:
            continue
        query, reference = line.split()
        found.setdefault(query, []).append(reference)
    return found


def fingerprints(folder):
    """What would show that a file was written again: node, time and content, by name."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).iterdir()
    }


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_brute_force_is_the_oracle(brute):
    """The matrices against the oracle's plain loops, on few patches."""
    small = BruteForce.__new__(BruteForce)
    small.patches = [x[::6] for x in brute.patches[:4]]
    small.starts = np.cumsum([0, *(len(x) for x in small.patches)])
    small.similarity = np.concatenate(small.patches) @ np.concatenate(small.patches).T
    small.radius = 0.7
    for weights in ("none", "idf", "tfidf"):
        slow = oracle.scores(small.patches[0], dict(enumerate(small.patches[1:], 1)), 0.7, weights)
        fast = small.scores(0, [1, 2, 3], weights)
        assert min(slow.values()) > 0
        assert fast == pytest.approx(slow, rel=1e-9)


def test_a_run_directory_holds_what_was_promised(registered, photos):
    asked, job = registered
    output = Path(asked.output)
    assert {path.name.partition("-")[0] for path in output.iterdir()} == {
        *("config.yaml", "run.json", "metrics.json", "pairs.parquet", "pairs.txt", "patch_weights.parquet"),
        *("scenes.parquet", "report.html", "store", "votes", "logs", ".lock"),
    }
    assert config.load([str(output / "config.yaml")]) == asked
    record = json.loads((output / "run.json").read_text())
    assert record["outcome"] == "finished"
    assert record["counts"] == job.counts
    assert record["counts"].items() >= {
        "images": 24, "quarantined": 0, "added": 24, "changed": 0, "vanished": 0, "embedded_now": 24,
        "queries": 24, "database": 24, "radius": asked.retrieval.radius, "root": str(photos), "store": asked.store_path,
        "skipped": {"not an image (.parquet)": 1},
    }.items()  # fmt: skip
    assert record["versions"]["ray"].startswith("2.")
    assert set(record["timings_s"]) >= {"embed", "search", "total"}
    table = pq.read_table(output / "pairs.parquet")
    assert table.schema.equals(pairs.SCHEMA)
    assert record["counts"]["pairs"] == table.num_rows
    report = (output / "report.html").read_text()
    assert report.lstrip().lower().startswith("<!doctype html")
    for part in (str(output), str(job.counts["pairs"]), "embedded by this run"):
        assert part in job.summary()


def test_pairs_txt_is_read_by_hloc(registered):
    output = Path(registered[0].output)
    read = hloc_pairs((output / "pairs.txt").read_text())
    expected = {}
    for row in pq.read_table(output / "pairs.parquet").to_pylist():
        expected.setdefault(row["query"], []).append(row["database"])
    assert read == expected
    assert all(query not in found and len(set(found)) == len(found) <= 20 for query, found in read.items())


def test_metrics_are_those_of_the_pairs(registered, photos):
    output = Path(registered[0].output)
    scores = json.loads((output / "metrics.json").read_text())
    truth = read_overlap(photos / "overlap.parquet")
    names, overlap = truth.names, truth.matrix.toarray()
    read = hloc_pairs((output / "pairs.txt").read_text())
    place = {name: row for row, name in enumerate(names)}
    judged = [n for n in names if sum(overlap[place[n]] >= 0.3) > 1]  # each image overlaps itself
    right = [sum(overlap[place[n], place[d]] >= 0.3 for d in read.get(n, [])[:5]) / 5 for n in judged]
    assert scores["precision@5"] == pytest.approx(np.mean(right), abs=1e-6)
    assert scores["queries"] == len(judged)
    assert scores["precision@1"] > 2 * scores["chance"]
    assert registered[1].metrics == scores


def test_the_report_can_be_written_again(registered, tmp_path):
    asked, _ = registered
    copy = tmp_path / "run"
    shutil.copytree(asked.output, copy, ignore=shutil.ignore_patterns("store", "report.html"))
    job = pipeline.report(config.load(output=str(copy), report={"queries": 2, "matches": 1}))
    assert Path(job.report) == copy / "report.html"
    assert len((copy / "report.html").read_text()) < len((Path(asked.output) / "report.html").read_text())
    assert (copy / "run.json").read_bytes() == (Path(asked.output) / "run.json").read_bytes()


def test_pairs_are_those_of_brute_force_however_database_and_queries_are_split(registered, brute, tmp_path):
    tables, written = {}, {}
    for shards, batch in ((1, 7), (5, 7), (2, 64)):
        settings = {"radius": brute.radius, "k": K, "shortlist": 8, "shards": shards, "query_batch": batch}
        tables[shards] = run_again(registered, tmp_path / str(shards), **settings)
        written[shards] = bytes_of(tmp_path / str(shards))
    assert_pairs(tables[5], brute.pairs(brute.names, brute.names, K, 8))
    assert hloc_pairs(written[5]["pairs.txt"].decode()).keys() == {*tables[5]["query"].to_pylist()}
    for name in ("pairs.parquet", "pairs.txt", "patch_weights.parquet"):
        assert written[1][name] == written[5][name], name
    assert tables[2].equals(tables[5])
    assert written[2]["pairs.txt"] == written[5]["pairs.txt"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"k": 30, "shortlist": None, "weights": "tfidf"}, {"k": 30, "shortlist": None, "weights": "tfidf"}),
        (
            {"k": K, "shortlist": 6, "within_scene": True, "weights": "none"},
            {"k": K, "shortlist": 6, "within_scene": True, "weights": "none"},
        ),
    ],
    ids=["no shortlist, tfidf", "within the scene, unweighted"],
)
def test_pairs_are_those_of_brute_force(registered, brute, tmp_path, settings, expected):
    table = run_again(registered, tmp_path / "run", radius=brute.radius, **settings)
    assert_pairs(table, brute.pairs(brute.names, brute.names, **expected))
    assert hloc_pairs((tmp_path / "run" / "pairs.txt").read_text()).keys() == {*table["query"].to_pylist()}


def test_padding_votes_if_asked(registered, tmp_path):
    masked = pq.read_table(Path(registered[0].output) / "pairs.parquet", filters=[("rank", "<", K)])
    unmasked = run_again(registered, tmp_path / "run", k=K, query_batch=24, mask_padding=False)
    best = dict(zip(masked["query"].to_pylist(), masked["score"].to_pylist(), strict=True))
    all_best = dict(zip(unmasked["query"].to_pylist(), unmasked["score"].to_pylist(), strict=True))
    assert all(all_best[name] > best[name] for name in best)  # black patches find black patches


def test_retrieve_takes_folders_patterns_and_lists(registered, brute, photos, tmp_path):
    asked, _ = registered
    one, two = ([name for name in brute.names if name.startswith(scene)] for scene in ("one/", "two/"))
    (tmp_path / "two.txt").write_text("".join(f"{photos}/{name}\n" for name in two))
    (tmp_path / "one.txt").write_text("# relative to nothing\n" + "".join(f"{photos}/{name}\n" for name in one))
    written = []
    for queries, database in (
        (photos / "two", photos / "one"),
        (photos / "two" / "*.jpg", tmp_path / "one.txt"),
        (tmp_path / "two.txt", f"{photos}/**/one/*"),
    ):
        output = tmp_path / f"run{len(written)}"
        job = pipeline.retrieve(
            config.load(
                queries=str(queries), database=str(database), output=str(output), store=asked.store_path,
                embedding=EMBEDDING, report=WITHOUT_REPORT,
                images=str(photos) if "**" in str(database) else None,
                retrieval={"radius": brute.radius, "k": K, "shortlist": 9, "shards": 1},
            )
        )  # fmt: skip
        assert (job.counts["queries"], job.counts["database"], job.counts["embedded_now"]) == (len(two), len(one), 0)
        written.append((output / "pairs.parquet").read_bytes())
    assert written[0] == written[1] == written[2]
    assert_pairs(pq.read_table(output / "pairs.parquet"), brute.pairs(two, one, K, 9))


def listed_pairs(text):
    """Unordered pairs of a pairs.txt that lists each once."""
    lines = [tuple(line.split()) for line in text.splitlines()]
    found = {tuple(sorted(pair)) for pair in lines}
    assert len(found) == len(lines)
    assert all(first < second for first, second in lines)
    return found


def connected(names, edges):
    """Groups of names that the edges connect, the largest first, then by first name."""
    groups = [{name} for name in names]
    for edge in edges:
        touched = [group for group in groups if group & set(edge)]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    return sorted(groups, key=lambda group: (-len(group), min(group)))


def assert_scenes(path, names, edges):
    expected = [
        {"name": name, "component": number, "size": len(group)}
        for number, group in enumerate(connected(names, edges))
        for name in sorted(group)
    ]
    assert pq.read_table(path).to_pylist() == expected
    return max(row["component"] for row in expected) + 1


def register_listed(registered, output, **values):
    asked, _ = registered
    fixed = {"images": asked.images, "store": asked.store_path, "output": str(output), "report": WITHOUT_REPORT}
    return pipeline.register(config.load(embedding=EMBEDDING, **fixed, **values))


def test_scenes_are_the_connected_components_of_the_pairs(registered, brute):
    output = Path(registered[0].output)
    rows = pq.read_table(output / "pairs.parquet").to_pylist()
    number = assert_scenes(output / "scenes.parquet", brute.names, [(row["query"], row["database"]) for row in rows])
    assert registered[1].counts["components"] == number


def test_a_pair_list_is_chosen_from_the_ranking(registered, brute, tmp_path):
    folder, retrieval = tmp_path / "run", {"radius": brute.radius, "k": 4, "shortlist": 8}
    register_listed(registered, folder, retrieval=retrieval)
    before = bytes_of(folder)
    assert "pair_list.parquet" not in before
    ranked = {
        (row["query"], row["database"]): row["weighted"] for row in pq.read_table(folder / "pairs.parquet").to_pylist()
    }
    score = {}
    for (query, database), weighted in ranked.items():
        pair = tuple(sorted((query, database)))
        score[pair] = max(weighted, score.get(pair, 0))
    whole = connected(brute.names, score)

    budget = len(brute.names) + 3
    job = register_listed(registered, folder, retrieval=retrieval, pairs={"budget": budget})
    assert job.counts["searched_now"] == 0
    found = listed_pairs((folder / "pairs.txt").read_text())
    assert len(found) == budget
    assert found <= set(score)
    assert connected(brute.names, found) == whole  # though the best of the ranking alone may leave some apart
    assert_scenes(folder / "scenes.parquet", brute.names, found)
    rows = pq.read_table(folder / "pair_list.parquet").to_pylist()
    assert [(row["query"], row["database"]) for row in rows] == sorted(found)
    assert all(row["weighted"] == score[row["query"], row["database"]] for row in rows)
    sources = [row["source"] for row in rows]
    assert sources.count("forest") == len(brute.names) - len(whole) == job.counts["pair_list"]["to_connect"]
    assert job.counts["pair_list"].items() >= {"pairs": budget, "best": sources.count("best"), "sequence": 0}.items()
    assert f"{budget} pairs chosen: {sources.count('forest')} forest" in job.summary()
    assert (folder / "pairs.parquet").read_bytes() == before["pairs.parquet"]

    register_listed(registered, folder, retrieval=retrieval, pairs={"mutual": True})
    mutual = {pair for pair in score if pair in ranked and pair[::-1] in ranked}
    assert listed_pairs((folder / "pairs.txt").read_text()) == mutual
    assert_scenes(folder / "scenes.parquet", brute.names, mutual)

    job = register_listed(registered, folder, retrieval=retrieval, pairs={"budget": 3})
    assert f"{len(brute.names) - len(whole) - 3} more would connect" in job.summary()

    register_listed(registered, folder, retrieval=retrieval)
    after = bytes_of(folder)
    assert {name: after[name] for name in before if name.endswith((".parquet", ".txt"))} == {
        name: content for name, content in before.items() if name.endswith((".parquet", ".txt"))
    }
    assert after.keys() == before.keys()


def test_sequence_and_neighbours_are_listed_too(registered, brute, rendered_collection, tmp_path):
    posed = PosedFolder.open(rendered_collection)
    places = {name.rpartition("/")[2]: camera.center for name, camera in zip(posed.names, posed.cameras, strict=True)}
    centers = [places[name.rpartition("/")[2]] for name in brute.names]
    columns = {"name": brute.names, **dict(zip("xyz", np.transpose(centers), strict=True))}
    pq.write_table(pa.table(columns), tmp_path / "positions.parquet")
    job = register_listed(
        registered, tmp_path / "run",
        retrieval={"radius": brute.radius, "k": 1, "within_scene": True}, positions=str(tmp_path / "positions.parquet"),
        pairs={"sequence": 2, "neighbours": 1},
    )  # fmt: skip
    rows = pq.read_table(tmp_path / "run" / "pairs.parquet").to_pylist()
    expected = {tuple(sorted((row["query"], row["database"]))) for row in rows}
    for scene in ("one/", "two/"):
        inside = [row for row, name in enumerate(brute.names) if name.startswith(scene)]
        for i, row in enumerate(inside):
            expected |= {(brute.names[row], brute.names[other]) for other in inside[i + 1 : i + 3]}
            nearest = min(set(inside) - {row}, key=lambda other: np.linalg.norm(centers[row] - centers[other]))
            expected.add(tuple(sorted((brute.names[row], brute.names[nearest]))))
    assert listed_pairs((tmp_path / "run" / "pairs.txt").read_text()) == expected
    assert job.counts["positions"] == len(brute.names)
    assert assert_scenes(tmp_path / "run" / "scenes.parquet", brute.names, expected) == job.counts["components"] == 2
    scored = {row["weighted"] is None for row in pq.read_table(tmp_path / "run" / "pair_list.parquet").to_pylist()}
    assert scored == {True, False}


def test_missing_positions_are_missed_before_the_search(registered, tmp_path):
    with pytest.raises(PositionsError, match="GPS tags of the images"):
        register_listed(registered, tmp_path / "run", pairs={"neighbours": 3})
    assert not (tmp_path / "run" / "pairs.parquet").exists()


def test_retrieve_chooses_no_pair_list(photos, tmp_path):
    asked = config.load([], ["pairs.budget=5"], images=str(photos), queries=str(photos), output=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"pairs\.\* .*register"):
        pipeline.retrieve(asked)


def test_a_second_run_computes_nothing(registered, tmp_path):
    asked, _ = registered
    store, shards = Path(asked.store_path), Path(asked.store_path).glob("shard-*")
    before, written = bytes_of(store), {path: path.stat().st_mtime_ns for path in shards}
    first = (Path(asked.output) / "pairs.parquet").read_bytes()
    job = pipeline.register(asked)
    assert job.counts["embedded_now"] == job.counts["added"] == job.counts["changed"] == 0
    assert job.counts["searched_now"] == 0
    shown = dataclasses.replace(asked, report=schema.ReportConfig(queries=1))
    assert pipeline.register(shown).counts["searched_now"] == 0  # what the report shows is no matter of the search
    assert bytes_of(store) == before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (Path(asked.output) / "pairs.parquet").read_bytes() == first
    assert not list(Path(asked.output).glob("parts-*"))


def test_new_and_changed_images_compute_only_themselves(registered, photos, tmp_path):
    asked, _ = registered
    copy, store = tmp_path / "photos", tmp_path / "store"
    shutil.copytree(photos, copy)
    shutil.copytree(asked.store_path, store)
    before = {name: file for name, file in fingerprints(store).items() if name.startswith("shard-")}
    shutil.copy(copy / "one/0003.jpg", copy / "one/new.jpg")
    shutil.copy(copy / "two/0020.jpg", copy / "a new one.jpg")
    shutil.copy(copy / "one/0007.jpg", copy / "one/0005.jpg")  # another size
    data = bytearray((copy / "two/0015.jpg").read_bytes())
    data[-40] ^= 1  # the same size
    (copy / "two/0015.jpg").write_bytes(data)
    os.utime(copy / "two/0016.jpg")  # touched only
    (copy / "two/0017.jpg").unlink()
    settings = config.load(images=str(copy), store=str(store), output=str(tmp_path / "run"), embedding=EMBEDDING)
    job = pipeline.embed(settings)
    assert job.counts.items() >= {"images": 26, "embedded_now": 4, "added": 2, "changed": 2, "vanished": 1}.items()
    assert "no longer in the collection" in job.summary()
    after = fingerprints(store)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name.startswith("shard-")} - set(before) == {
        "shard-00003.json", "shard-00003.parquet",
    }  # fmt: skip
    new = ["a new one.jpg", "one/0005.jpg", "one/new.jpg", "two/0015.jpg"]
    assert pq.read_table(store / "shard-00003.parquet")["name"].to_pylist() == new
    opened = EmbeddingStore.open(str(store))
    for copied, original in (("one/new.jpg", "one/0003.jpg"), ("one/0005.jpg", "one/0007.jpg")):
        for ours, theirs in zip(opened.select([copied]).read(), opened.select([original]).read(), strict=True):
            np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=2e-3)
    pruned = pipeline.embed(config.load([tmp_path / "run" / "config.yaml"], ["embedding.prune=true"]))
    assert (pruned.counts["images"], pruned.counts["vanished"], pruned.counts["embedded_now"]) == (25, 0, 0)
    assert "two/0017.jpg" not in EmbeddingStore.open(str(store)).select().names


def test_other_settings_are_refused_and_the_store_stays(registered, tmp_path):
    asked, _ = registered
    before = fingerprints(asked.store_path)
    changed = config.load(
        images=asked.images, store=asked.store_path, output=str(tmp_path / "run"),
        embedding=EMBEDDING | {"dtype": "float32", "normalize_global": True},
    )  # fmt: skip
    with pytest.raises(StoreError) as caught:
        pipeline.register(changed)
    assert "dtype: the store has 'float16', this run 'float32'" in str(caught.value)
    assert "normalize_global: the store has False, this run True" in str(caught.value)
    assert fingerprints(asked.store_path) == before
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "failed"


@pytest.fixture(scope="module")
def runs(registered, tmp_path_factory):
    """The collection registered alike with patches stored as float16 and as int8."""
    asked, _ = registered
    embedding = dataclasses.replace(asked.embedding, dtype="int8")
    output = str(tmp_path_factory.mktemp("int8") / "run")
    int8 = pipeline.register(dataclasses.replace(asked, output=output, embedding=embedding))
    return {"float16": pipeline.report(asked), "int8": int8}  # (another test writes a page of fewer queries)


def test_an_int8_store_holds_the_same_patches_and_the_same_globals(runs):
    half, int8 = (EmbeddingStore.open(runs[dtype].counts["store"]).select() for dtype in ("float16", "int8"))
    assert half.names == int8.names
    (globals_, patches), (same, quantised) = half.read(), int8.read()
    np.testing.assert_array_equal(same, globals_)
    assert (same.dtype, quantised.dtype) == (np.float16, np.int8)
    image = np.stack([patch_mask(int(w), int(h)) for w, h in half.scaled_sizes])
    assert np.einsum("ne,ne->n", widen(quantised[image]), widen(patches[image])).min() >= 0.999
    shards = (Path(selection.store.path).glob("shard-*.parquet") for selection in (half, int8))
    sizes = [sum(path.stat().st_size for path in paths) for paths in shards]
    assert sizes[1] < 0.55 * sizes[0]


def test_int8_ranks_nearly_as_float16_does(runs):
    half, int8 = (ranked_names(runs[dtype].path("pairs.parquet")) for dtype in ("float16", "int8"))
    assert half.keys() == int8.keys()
    assert np.mean([half[query][0] == int8[query][0] for query in half]) >= 0.9
    assert np.mean([len({*half[query][:5]} & {*int8[query][:5]}) / 5 for query in half]) >= 0.9
    tables = (pq.read_table(runs[dtype].path("pairs.parquet")).to_pylist() for dtype in ("float16", "int8"))
    scores = [{(row["query"], row["database"]): row["score"] for row in table} for table in tables]
    both = scores[0].keys() & scores[1].keys()
    assert len(both) >= 0.9 * len(scores[0])
    ratio = np.array([scores[1][pair] / scores[0][pair] for pair in both])
    assert np.abs(np.median(ratio) - 1) < 0.02


def test_the_report_of_an_int8_run_draws_the_same_support(runs):
    """Drawn from the store's patches: taken as numbers of up to 127, every patch would find support."""
    found = []
    for dtype in ("float16", "int8"):
        page = Path(runs[dtype].path("report.html")).read_text(encoding="utf-8")
        found.append([tuple(map(int, one)) for one in re.findall(r": (\d+) of (\d+) patches found support", page)])
    assert len(found[0]) == 3
    for (half, of), (int8, patches) in zip(*found, strict=True):
        assert of == patches and abs(half - int8) <= 0.1 * of


def test_an_int8_store_takes_in_no_float16(runs, photos, tmp_path):
    with pytest.raises(StoreError, match="dtype: the store has 'int8', this run 'float16'"):
        vop.embed(images=str(photos), store=runs["int8"].counts["store"], output=str(tmp_path))


def test_bad_images_end_the_job_or_go_to_quarantine(tmp_path):
    expected = write_zoo(tmp_path / "zoo")
    bad = {name: reason for name, reason in expected.items() if reason != "ok"}
    asked = {
        "images": str(tmp_path / "zoo"), "output": str(tmp_path / "run"), "report": WITHOUT_REPORT,
    }  # fmt: skip
    with pytest.raises(TooManyBadImagesError, match=rf"of {len(expected)} images .*max_bad_fraction=0\.1"):
        vop.embed(**asked, embedding=EMBEDDING | {"shard_size": 20})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "failed"

    asked["embedding"] = EMBEDDING | {"max_bad_fraction": 1.0}
    job = vop.register(**asked)
    assert job.counts["images"] == len(expected) - len(bad)
    assert job.counts["quarantined"] == len(bad)
    assert job.counts["embedded_now"] < len(expected)  # what was done before the failure is kept
    rows = {row["name"]: row for row in pq.read_table(tmp_path / "run" / "store" / "images.parquet").to_pylist()}
    assert set(rows) == set(expected)
    for name, reason in expected.items():
        assert rows[name]["status"] == ("ok" if reason == "ok" else "quarantined"), (name, rows[name]["error"])
        if reason != "ok":
            assert reason in rows[name]["error"], name
            assert f"{name}: {rows[name]['error']}" in job.summary()
    assert dict(job.quarantined) == {name: rows[name]["error"] for name in bad}

    assert not (tmp_path / "run" / "pairs.txt").exists()
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["counts"]
    assert "'names/with space.jpg'" in recorded["pairs_txt"]
    assert recorded["pairs_txt"] in job.summary()
    paired = pq.read_table(tmp_path / "run" / "pairs.parquet")
    assert {*paired["query"].to_pylist(), *paired["database"].to_pylist()} <= set(expected) - set(bad)

    (tmp_path / "bad.txt").write_text("".join(f"{tmp_path}/zoo/{name}\n" for name in bad))
    with pytest.raises(StoreError, match=f"none of {len(bad)} images can be used"):
        vop.retrieve(**asked, queries=str(tmp_path / "bad.txt"))


def test_a_collection_without_any_good_image_says_why(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(b"")
    asked = config.load(images=str(tmp_path / "photos"), output=str(tmp_path / "run"), embedding=EMBEDDING)
    with pytest.raises(ImageError, match=r"none of 3 sampled images can be read.*empty file"):
        pipeline.embed(asked)


def test_the_demo_renders_registers_and_judges(tmp_path):
    job = pipeline.demo(
        config.load(
            output=str(tmp_path / "demo"), demo={"images": 6, "seed": 1}, report={"queries": 2}, embedding=EMBEDDING
        )
    )
    assert len(list((tmp_path / "demo" / "images").glob("*.jpg"))) == 6
    assert job.counts["images"] == job.metrics["queries"] + job.metrics["queries_without_truth"] == 6
    assert "against the known overlaps" in job.summary()
    assert (tmp_path / "demo" / "report.html").exists()
