"""The store as others see it: plain pyarrow and duckdb read what `vop` wrote, and damage is noticed."""

import hashlib
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vop import catalog, files
from vop.quantised import float_type, stored
from vop.store import GROUP_ROWS, EmbeddingStore, StoreError, tensor_column

P, E, G, D = 4, 3, 5, 6
FEATURES = {"backbone": {"name": "xfeat", "sha": "abc"}, "encoder": None, "preprocessing": {"image_size": 224}}
SHAPES = {"patches": P, "width": E, "global_width": G, "token_width": D, "dtype": "float16"}
CALIBRATION = {"center": np.arange(D, dtype=np.float32), "whitening_scale": np.ones(2, np.float32)}
# Names in the order of the catalog, not of the alphabet: shards 0 and 1 came from two runs.
LINES = [("m.jpg", 0, 0), ("z/q.jpg", 0, 1), ("bad.jpg", 0, None), ("a.jpg", 1, 0), ("o o.jpg", 1, 1), ("b.jpg", 1, 2)]


def values(image_id):
    """Descriptors of an image that tell it from every other."""
    rng = np.random.default_rng(image_id)
    return rng.standard_normal(G).astype(np.float16), rng.standard_normal((P, E)).astype(np.float16)


def shard(number):
    lines = [(i, name) for i, (name, where, row) in enumerate(LINES) if where == number and row is not None]
    ids = [i for i, _ in lines]
    sizes = {"width": 640, "height": 480, "scaled_width": 224, "scaled_height": 168}
    return pa.table(
        {"image_id": pa.array(ids, pa.int64()), "name": [name for _, name in lines]}
        | {key: pa.array([value] * len(ids), pa.int64()) for key, value in sizes.items()}
        | {"content": [f"{i:032x}" for i in ids]}
        | {"global": tensor_column(np.stack([values(i)[0] for i in ids]))}
        | {"patches": tensor_column(np.stack([values(i)[1] for i in ids]))}
    )


@pytest.fixture
def store(tmp_path):
    made = EmbeddingStore.create(str(tmp_path / "store"), FEATURES, SHAPES, CALIBRATION)
    listed = [
        {"name": name, "scene": name.split("/")[0] if "/" in name else "", "size": 1, "modified_ns": 1, "image_id": i,
         "shard": number, "status": catalog.PLANNED}
        for i, (name, number, _) in enumerate(LINES)
    ]  # fmt: skip
    planned = pa.Table.from_pylist(listed, schema=catalog.SCHEMA)
    made.write_shard(0, shard(0), [{"image_id": 2, "name": "bad.jpg", "reason": "empty file", "content": None}])
    made.write_shard(1, shard(1), [])
    made.write_images(catalog.finish(planned, made.receipts(), made.shard_facts))
    return EmbeddingStore.open(made.path)


def test_plain_pyarrow_reads_a_shard(store, tmp_path):
    table = pq.read_table(tmp_path / "store" / "shard-00001.parquet")
    assert table["name"].to_pylist() == ["a.jpg", "o o.jpg", "b.jpg"]
    for row, image_id in enumerate([3, 4, 5]):
        np.testing.assert_array_equal(table["global"].combine_chunks().to_numpy_ndarray()[row], values(image_id)[0])
        np.testing.assert_array_equal(table["patches"].combine_chunks().to_numpy_ndarray()[row], values(image_id)[1])
    assert table.schema.field("patches").type == pa.fixed_shape_tensor(pa.float16(), (P, E))


def test_duckdb_joins_catalog_and_shards(store, tmp_path):
    found = duckdb.sql(f"""
        select i.name, i.shard, i.row, s.patches, s."global", i.scaled_width
        from '{tmp_path}/store/images.parquet' i join '{tmp_path}/store/shard-*.parquet' s using (image_id)
        where i.status = 'ok' order by i.image_id
    """).fetchall()
    assert [row[0] for row in found] == [name for name, _, row in LINES if row is not None]
    for (name, number, row, patches, global_, width), image_id in zip(found, [0, 1, 3, 4, 5], strict=True):
        assert (name, number, row) == LINES[image_id]
        assert width == 224
        np.testing.assert_array_equal(np.array(patches, np.float16).reshape(P, E), values(image_id)[1])
        np.testing.assert_array_equal(np.array(global_, np.float16), values(image_id)[0])


def test_plain_readers_get_int8_patches_which_take_a_byte_a_number_on_disk(tmp_path):
    rng, (n, P, E) = np.random.default_rng(0), (3, 64, 128)
    made = EmbeddingStore.create(str(tmp_path), FEATURES, SHAPES | {"patches": P, "width": E, "dtype": "int8"}, {})
    patches = stored(rng.standard_normal((n, P, E)), "int8")
    columns = [name for name in shard(1).column_names if name != "patches"]
    made.write_shard(1, shard(1).select(columns).append_column("patches", tensor_column(patches)), [])
    path = tmp_path / "shard-00001.parquet"
    assert patches.size < path.stat().st_size < 1.1 * patches.size + 5000
    table = pq.read_table(path)
    assert table.schema.field("patches").type == pa.fixed_shape_tensor(pa.int8(), (P, E))
    assert table.schema.field("global").type == pa.fixed_shape_tensor(pa.float16(), (G,))
    np.testing.assert_array_equal(table["patches"].combine_chunks().to_numpy_ndarray(), patches)
    found = duckdb.sql(f"select patches from '{path}' order by image_id").fetchall()
    np.testing.assert_array_equal(np.array(found).reshape(n, P, E), patches)

    listed = [
        {"name": name, "scene": "", "size": 1, "modified_ns": 1, "image_id": i, "shard": number,
         "status": catalog.PLANNED}
        for i, (name, number, _) in enumerate(LINES) if number == 1
    ]  # fmt: skip
    planned = pa.Table.from_pylist(listed, schema=catalog.SCHEMA)
    made.write_images(catalog.finish(planned, made.receipts(), made.shard_facts))
    globals_, read = made.select().read()
    assert (globals_.dtype, read.dtype) == (np.float16, np.int8)
    np.testing.assert_array_equal(read, patches[[0, 2, 1]])  # by name


def test_int8_descriptors_are_not_mixed_with_others(tmp_path):
    made = EmbeddingStore.create(str(tmp_path), FEATURES | {"dtype": "int8"}, SHAPES | {"dtype": "int8"}, {})
    made.check_features(FEATURES | {"dtype": "int8"})
    with pytest.raises(StoreError, match="dtype: the store has 'int8', this run 'float16'"):
        made.check_features(FEATURES | {"dtype": "float16"})


def test_manifest_and_receipts_are_plain_json(store, tmp_path):
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest.items() >= ({"format": "vop-store-1", "features": FEATURES} | SHAPES).items()
    assert manifest["rows"] == {"ok": 5, "quarantined": 1}
    receipt = json.loads((tmp_path / "store" / "shard-00000.json").read_text())
    digest = hashlib.sha256((tmp_path / "store" / "shard-00000.parquet").read_bytes()).hexdigest()
    bad = {"image_id": 2, "name": "bad.jpg", "reason": "empty file", "content": None}
    assert receipt == {"shard": 0, "rows": 3, "ok": 2, "quarantined": [bad], "sha256": digest}


def test_the_catalog_says_where_every_image_is(store):
    lines = store.images().to_pylist()
    assert [(line["name"], line["shard"], line["row"]) for line in lines] == LINES
    assert lines[2]["status"] == "quarantined"
    assert lines[2]["error"] == "empty file"
    assert lines[5]["content"] == f"{5:032x}"
    assert (lines[5]["width"], lines[5]["scaled_height"]) == (640, 168)


def test_a_selection_is_sorted_by_name_and_reads_its_own_descriptors(store):
    ids = {name: i for i, (name, _, _) in enumerate(LINES)}
    everything = store.select()
    assert everything.names == ["a.jpg", "b.jpg", "m.jpg", "o o.jpg", "z/q.jpg"]
    assert everything.scenes == ["", "", "", "", "z"]
    some = store.select(["z/q.jpg", "bad.jpg", "b.jpg", "a.jpg"])  # in any order; the quarantined one is left out
    assert some.names == ["a.jpg", "b.jpg", "z/q.jpg"]
    for selection in (everything, some, everything.take([4, 0, 4, 2])):
        globals_, patches = selection.read()
        assert globals_.dtype == patches.dtype == np.float16
        assert selection.image_ids == [ids[name] for name in selection.names]
        for row, name in enumerate(selection.names):
            np.testing.assert_array_equal(globals_[row], values(ids[name])[0])
            np.testing.assert_array_equal(patches[row], values(ids[name])[1])
    assert everything.take([4, 0, 4, 2]).names == ["z/q.jpg", "a.jpg", "z/q.jpg", "m.jpg"]
    assert len(everything.take([])) == 0
    assert everything.take([]).read()[1].shape == (0, P, E)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_only_the_row_groups_of_the_images_asked_for_are_read(tmp_path, monkeypatch, dtype):
    n, rng = 2 * GROUP_ROWS + 5, np.random.default_rng(0)
    made = EmbeddingStore.create(str(tmp_path), FEATURES, SHAPES | {"dtype": dtype}, {})
    globals_ = rng.standard_normal((n, G)).astype(float_type(dtype))
    patches = stored(rng.standard_normal((n, P, E)), dtype)
    lines = {"image_id": range(n), "name": [f"{i:03d}.jpg" for i in range(n)], "scene": [""] * n, "shard": [0] * n}
    sizes = {key: [224] * n for key in ("width", "height", "scaled_width", "scaled_height")} | {"row": range(n)}
    columns = {"image_id": range(n), "global": tensor_column(globals_), "patches": tensor_column(patches)}
    made.write_shard(0, pa.table(columns), [])
    images = [dict(zip(lines | sizes, line, strict=True)) for line in zip(*(lines | sizes).values(), strict=True)]
    made.write_images(pa.Table.from_pylist([line | {"status": catalog.OK} for line in images], schema=catalog.SCHEMA))

    asked, read = [], pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda *given: asked.append(given[1]) or read(*given))
    last = n - 1
    for rows, groups in [([last], [2]), ([last, 0], [0, 2]), ([GROUP_ROWS, GROUP_ROWS - 1, 3, 3], [0, 1]),
                         (rng.permutation(n).tolist(), [0, 1, 2])]:  # fmt: skip
        found = made.select().take(rows).read()
        assert asked.pop() == groups
        for array, expected in zip(found, (globals_, patches), strict=True):
            np.testing.assert_array_equal(array, expected[rows])
    assert not asked


def test_a_name_that_is_not_in_the_store_is_named(store):
    with pytest.raises(StoreError, match=r"1 images are not in the store at .*'who\.jpg'"):
        store.select(["a.jpg", "who.jpg"])


def test_an_image_that_was_removed_is_not_in_the_store(store):
    images = store.images().to_pylist()
    images[0]["status"] = catalog.REMOVED
    store.write_images(pa.Table.from_pylist(images, schema=catalog.SCHEMA))
    assert "m.jpg" not in store.select().names
    with pytest.raises(StoreError, match=r"'m\.jpg'"):
        store.select(["a.jpg", "m.jpg"])


def test_a_store_of_bad_images_alone_is_refused(store):
    with pytest.raises(StoreError, match="none of 1 images can be used: all are in quarantine"):
        store.select(["bad.jpg"])


def test_an_unfinished_store_is_refused(store, tmp_path):
    images = store.images().to_pylist()
    images[1]["status"] = catalog.PLANNED
    store.write_images(pa.Table.from_pylist(images, schema=catalog.SCHEMA))
    with pytest.raises(StoreError, match="lacks 1 images: run `vop embed` again"):
        store.select()
    empty = EmbeddingStore.create(str(tmp_path / "empty"), FEATURES, SHAPES, {})
    with pytest.raises(StoreError, match="lacks all images"):
        empty.select()


def test_other_features_are_refused_and_both_are_named(store):
    store.check_features(json.loads(json.dumps(FEATURES)))
    other = FEATURES | {"backbone": {"name": "dinov2", "sha": "abc"}, "tokens": True}
    with pytest.raises(StoreError) as caught:
        store.check_features(other)
    message = str(caught.value)
    assert "backbone.name: the store has 'xfeat', this run 'dinov2'" in message
    assert "tokens: the store has None, this run True" in message
    assert "backbone.sha" not in message


def test_a_receipt_that_is_cut_short_counts_as_missing(store, tmp_path):
    path = tmp_path / "store" / "shard-00001.json"
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2):
        path.write_bytes(whole[:cut])
        assert list(store.receipts()) == [0]
    path.write_bytes(b"\xff\xfe" + whole)
    assert list(store.receipts()) == [0]
    path.write_bytes(whole)
    (tmp_path / "store" / "shard-copy.json").write_bytes(whole)
    (tmp_path / "store" / ".shard-00007.json.1234.tmp").write_bytes(whole)
    assert list(store.receipts()) == [0, 1]


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_shard_that_is_cut_short_says_what_to_do(store, tmp_path, keep):
    path = tmp_path / "store" / "shard-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(StoreError, match=r"shard-00001\.parquet.*Delete shard-00001\.json and run `vop embed` again"):
        store.select().read()
    assert list(store.verify()) == [f"{path} is not the file that its receipt names"]


def test_verify_finds_changed_and_missing_shards(store, tmp_path):
    assert list(store.verify()) == []
    path = tmp_path / "store" / "shard-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    (tmp_path / "store" / "shard-00001.parquet").unlink()
    assert [line.split("/")[-1] for line in store.verify()] == [
        "shard-00000.parquet is not the file that its receipt names",
        "shard-00001.parquet is missing",
    ]
    with pytest.raises(StoreError, match="cannot read"):
        store.read_shard(1)


def test_a_calibration_comes_back_and_a_changed_one_is_refused(store, tmp_path):
    arrays = store.calibration()
    assert sorted(arrays) == sorted(CALIBRATION)
    for name, array in CALIBRATION.items():
        np.testing.assert_array_equal(arrays[name], array)
    path = tmp_path / "store" / "calibration.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a bit of a value: the file stays well-formed
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"calibration\.safetensors"):
        store.calibration()
    for broken in (path.read_bytes()[:-2], b"", None):
        path.unlink() if broken is None else path.write_bytes(broken)
        with pytest.raises(StoreError, match=r"calibration\.safetensors"):
            store.calibration()


def test_a_store_without_calibration_has_none(tmp_path):
    made = EmbeddingStore.create(str(tmp_path / "plain"), FEATURES, SHAPES, {})
    assert made.calibration() == {}
    assert EmbeddingStore.open(made.path).images().equals(catalog.SCHEMA.empty_table())


def test_no_store_a_broken_one_and_one_of_another_format(tmp_path):
    assert not EmbeddingStore.exists(str(tmp_path))
    with pytest.raises(StoreError, match=r"no store at .*run `vop embed` first"):
        EmbeddingStore.open(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "vop-sto')
    assert EmbeddingStore.exists(str(tmp_path))
    with pytest.raises(StoreError, match="is not JSON"):
        EmbeddingStore.open(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "vop-store-9"}')
    with pytest.raises(StoreError, match="'vop-store-9'; expected vop-store-1"):
        EmbeddingStore.open(str(tmp_path))


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(store, tmp_path):
    folder = tmp_path / "store"
    (folder / "notes.tmp").touch()
    before = sorted(path.name for path in folder.iterdir())
    with files.atomic(folder / "shard-00002.parquet") as (_, inner):
        temporary = Path(inner)
        temporary.touch()
    temporary.touch()  # as if the process had ended before the rename
    (folder / "shard-00002.parquet").unlink()
    listed = pa.table({"name": ["new.jpg"], "scene": [""], "size": [1], "modified_ns": [1]})
    store.plan(listed, 8, False, lambda name: None)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_same_content_gives_the_same_bytes(store, tmp_path):
    first = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    store.write_shard(0, shard(0), [{"image_id": 2, "name": "bad.jpg", "reason": "empty file", "content": None}])
    store.write_images(store.images())
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == first
    assert set(first) == {
        *("manifest.json", "images.parquet", "calibration.safetensors"),
        *(f"shard-0000{n}.{kind}" for n in (0, 1) for kind in ("parquet", "json")),
    }
