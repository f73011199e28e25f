import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vop import catalog, config, files
from vop.geometry import Camera
from vop.hdf5 import FeatureFile, H5Error, export
from vop.quantised import float_type, stored, widen
from vop.store import EmbeddingStore, StoreError, tensor_column, tensor_values

NAMES = ("mapa/Łódź 1.jpg", "mapa/deep/er/b c.jpg", "query/猫.png", "query/á 2.jpg", "top level.jpg")
SIDE, P, D, G = 56, 16, 8, 6  # 4x4 patches


def unit(values):
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def computed_store(path, names=NAMES, dtype="float16", seed=0, shard_size=2, tokens=False):
    """A store as `embed` writes it, of random unit descriptors with a zero patch."""
    rng = np.random.default_rng(seed)
    features = {"backbone": {"name": "random"}, "encoder": None, "preprocessing": {"image_size": SIDE},
                "whiten": None, "normalize_global": False, "dtype": dtype, "tokens": tokens}  # fmt: skip
    shapes = {"patches": P, "width": D, "global_width": G, "token_width": D, "dtype": dtype}
    store = EmbeddingStore.create(str(path), features, shapes, {})
    listed = pa.table({"name": list(names), "scene": [name.split("/")[0] for name in names],
                       "size": [1] * len(names), "modified_ns": [0] * len(names)})  # fmt: skip
    images = catalog.plan(store.images(), listed, shard_size, False, lambda name: None).images
    for number, shard in catalog.pending(images, {}).items():
        n = shard.num_rows
        patches = unit(rng.standard_normal((n, P, D)))
        patches[:, 3] = 0
        table = shard.select(["image_id", "name"])
        for key, high in (("width", 4000), ("height", 3000), ("scaled_width", SIDE), ("scaled_height", SIDE)):
            table = table.append_column(key, pa.array(rng.integers(1, high + 1, n)))
        table = table.append_column("content", pa.array(["hash"] * n))
        table = table.append_column("global", tensor_column(rng.standard_normal((n, G)).astype(float_type(dtype)) * 30))
        table = table.append_column("patches", tensor_column(stored(patches, dtype)))
        if tokens:
            values = rng.standard_normal((n, P, D)).astype(float_type(dtype)) * 5
            table = table.append_column("tokens", tensor_column(values))
        store.write_shard(number, table, [])
    store.write_images(catalog.finish(images, store.receipts(), store.shard_facts))
    return store


def exported(store, path, indices=None, cameras=None):
    assert sum(export(store.select(), str(path), indices or {}, cameras or {})) == len(store.select())
    return str(path)


def imported(h5, path, dtype="float16", shard_size=2, max_bad=0.0):
    source = FeatureFile.open(str(h5), dtype)
    store = source.store(str(path))
    source.write(store, shard_size, max_bad)
    return store


def write_original(path, names, seed=0, **datasets):
    """The layout as the original's scripts write it, with h5py alone: raw float32 tokens, row-major centres."""
    rng = np.random.default_rng(seed)
    centers = np.array([(14 * col + 7.5, 14 * row + 7.5) for row in range(4) for col in range(4)], np.float32)
    tokens = {}
    with h5py.File(path, "w") as h5:
        h5.create_group("indices").create_dataset("query", data=list(names[:1]), dtype=h5py.string_dtype("utf-8"))
        h5["indices"].create_dataset("db", data=list(names[1:]), dtype=h5py.string_dtype("utf-8"))
        for name in names:
            group = h5.create_group(name)
            tokens[name] = (rng.standard_normal((P, D)) * 7).astype(np.float32)
            values = {"keypoints": centers, "descriptors": tokens[name], "image_size": [SIDE, 40],
                      "global_descriptor": (rng.standard_normal(G) * 9).astype(np.float32)} | datasets  # fmt: skip
            for key, value in values.items():
                group.create_dataset(key, data=value)
    return tokens


def contents(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1,
                           max_size=6), min_size=1, max_size=5, unique=True),
    dtype=st.sampled_from(["float16", "float32", "int8"]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_store_survives_the_round_trip(tmp_path_factory, names, dtype, seed):
    folder = tmp_path_factory.mktemp("trip")
    names = [f"scene {i % 2}/ü/{name}" if i else f"{name}.jpg" for i, name in enumerate(names)]
    before = computed_store(folder / "a", names, dtype, seed).select()
    after = imported(exported(before.store, folder / "f.h5"), folder / "b", dtype, shard_size=3).select()
    assert after.names == before.names == sorted(names)
    np.testing.assert_array_equal(after.scaled_sizes, before.scaled_sizes)
    for mine, theirs, kind in zip(after.read(), before.read(), (float_type(dtype), dtype), strict=True):
        assert mine.dtype == theirs.dtype == np.dtype(kind)
        np.testing.assert_array_equal(mine, theirs)
    sizes = ["name", "width", "height"]
    assert after.store.images().select(sizes).sort_by("name") == before.store.images().select(sizes).sort_by("name")


def test_the_exported_file_has_the_layout_that_the_original_reads(tmp_path):
    store = computed_store(tmp_path / "store")
    camera = Camera.from_rt(np.array([[800.0, 0, 500], [0, 810, 400], [0, 0, 1]]), np.eye(3), [1, 2, 3], 1000, 800)
    indices = {"query": ["query/猫.png", "query/á 2.jpg"], "db": [NAMES[0]]}
    path = exported(store, tmp_path / "f.h5", indices, {NAMES[1]: camera})
    live = store.select()
    globals_, patches = live.read()
    with h5py.File(path) as h5:
        assert [name.decode() for name in h5["indices"]["query"].__array__()] == indices["query"]
        assert [name.decode() for name in h5["indices"]["db"].__array__()] == indices["db"]
        assert h5.attrs["descriptors"] == "patches"
        for i, name in enumerate(live.names):
            group = h5[name]
            assert {"keypoints", "descriptors", "global_descriptor", "image_size"} <= set(group)
            assert group["keypoints"].dtype == np.float32
            np.testing.assert_array_equal(group["keypoints"][5], [14 + 7.5, 14 + 7.5])
            np.testing.assert_array_equal(group["keypoints"][1], [14 + 7.5, 7.5])
            np.testing.assert_array_equal(group["descriptors"], patches[i])
            np.testing.assert_array_equal(group["global_descriptor"], globals_[i])
            np.testing.assert_array_equal(group["image_size"], live.scaled_sizes[i])
            assert ("T_w2cam" in group) == ("K" in group) == ("original_K" in group) == (name == NAMES[1])
        known, (width, height) = h5[NAMES[1]], live.scaled_sizes[live.names.index(NAMES[1])]
        np.testing.assert_allclose(known["K"][0], [800 * width / 1000, 0, 500 * width / 1000])
        np.testing.assert_allclose(known["K"][1], [0, 810 * height / 800, 400 * height / 800])
        np.testing.assert_array_equal(known["original_K"], camera.K)
        np.testing.assert_array_equal(known["T_w2cam"][:, 3], [1, 2, 3, 1])


def test_a_store_with_tokens_exports_them_because_the_original_encodes_what_it_reads(tmp_path):
    store = computed_store(tmp_path / "store", tokens=True)
    path = exported(store, tmp_path / "f.h5")
    table = store.read_shard(0)
    with h5py.File(path) as h5:
        assert h5.attrs["descriptors"] == "tokens"
        stored = h5[table["name"][1].as_py()]["descriptors"][()]
    np.testing.assert_array_equal(stored, tensor_values(table["tokens"])[1])


def test_int8_patches_are_exported_as_the_unit_vectors_they_stand_for(tmp_path):
    store = computed_store(tmp_path / "store", dtype="int8")
    live = store.select()
    globals_, patches = live.read()
    with h5py.File(exported(store, tmp_path / "f.h5")) as h5:
        for name, global_, image in zip(live.names, globals_, patches, strict=True):
            written = h5[name]["descriptors"][()]
            assert written.dtype == np.float32
            np.testing.assert_array_equal(written, widen(image))
            np.testing.assert_array_equal(h5[name]["global_descriptor"][()], global_)
    with h5py.File(exported(computed_store(tmp_path / "t", dtype="int8", tokens=True), tmp_path / "g.h5")) as h5:
        assert h5[NAMES[0]]["descriptors"].dtype == np.float16  # tokens are not quantised


def test_a_part_of_a_store_is_exported_and_a_failed_export_leaves_the_old_file(tmp_path):
    store, path = computed_store(tmp_path / "store"), tmp_path / "f.h5"
    assert list(export(store.select([NAMES[0], NAMES[4]]), str(path), {}, {})) == [1, 1]
    before = path.read_bytes()
    with h5py.File(path) as h5:
        assert set(h5) == {"mapa", "top level.jpg"}
    steps = export(store.select(), str(path), {}, {})
    next(steps)
    steps.close()
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"store", "f.h5"}


def test_a_file_of_the_original_is_imported_and_normalised_once(tmp_path):
    tokens = write_original(tmp_path / "f.h5", NAMES, depth=np.zeros((1, SIDE, SIDE), np.float32), scales=[0.1, 0.1],
                            original_image_size=[1600, 1143])  # fmt: skip
    live = imported(tmp_path / "f.h5", tmp_path / "store", "float32").select()
    assert live.names == sorted(NAMES)
    assert live.scenes == ["mapa", "mapa", "query", "query", ""]
    np.testing.assert_array_equal(live.scaled_sizes, [[SIDE, 40]] * 5)
    np.testing.assert_allclose(live.read()[1], unit(np.stack([tokens[name] for name in live.names])), atol=1e-7)
    with h5py.File(tmp_path / "f.h5") as h5:
        np.testing.assert_array_equal(live.read()[0], [h5[name]["global_descriptor"][()] for name in live.names])
    assert live.store.images()["width"].to_pylist() == [1600] * 5
    indices = FeatureFile.open(str(tmp_path / "f.h5"), "float16").indices
    assert indices == {"query": [NAMES[0]], "db": list(NAMES[1:])}
    globals_, patches = imported(tmp_path / "f.h5", tmp_path / "small", "int8").select().read()
    np.testing.assert_array_equal(globals_, live.read()[0].astype(np.float16))
    assert patches.dtype == np.int8
    assert np.abs(widen(patches) - live.read()[1]).max() < 1 / 200


def test_an_imported_store_is_not_mixed_with_anything_else(tmp_path):
    write_original(tmp_path / "f.h5", NAMES)
    write_original(tmp_path / "g.h5", NAMES, seed=1)
    store = imported(tmp_path / "f.h5", tmp_path / "store")
    both = [FeatureFile.open(str(tmp_path / name), "float16").sha256 for name in ("f.h5", "g.h5")]
    with pytest.raises(StoreError) as refused:
        imported(tmp_path / "g.h5", tmp_path / "store")
    assert all(sha in str(refused.value) for sha in both)
    computed = computed_store(tmp_path / "computed")
    with pytest.raises(StoreError, match=r"'random'.*'imported'"):
        imported(tmp_path / "f.h5", tmp_path / "computed")
    with pytest.raises(StoreError, match=r"'imported'.*'random'"):
        store.check_features(computed.manifest["features"])
    again = imported(exported(computed, tmp_path / "h.h5"), tmp_path / "again")
    assert again.manifest["made_by"] == computed.manifest["features"]
    assert store.manifest["made_by"] is None


def test_a_killed_import_continues_and_leaves_the_same_bytes(tmp_path, monkeypatch):
    write_original(tmp_path / "f.h5", NAMES)
    imported(tmp_path / "f.h5", tmp_path / "whole")
    source = FeatureFile.open(str(tmp_path / "f.h5"), "float16")
    store, written = source.store(str(tmp_path / "killed")), []

    with monkeypatch.context() as patch:
        original = EmbeddingStore.write_shard

        def dying(self, number, table, quarantined):
            if written:
                raise KeyboardInterrupt
            written.append(number)
            return original(self, number, table, quarantined)

        patch.setattr(EmbeddingStore, "write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            source.write(store, 2, 0.0)
    assert set(store.receipts()) == {0}
    _, left = FeatureFile.open(str(tmp_path / "f.h5"), "float16").write(EmbeddingStore.open(store.path), 2, 0.0)
    assert left == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert source.write(store, 2, 0.0)[1] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("descriptors", None, "lacks descriptors; it holds global_descriptor, image_size, keypoints"),
        ("image_size", None, "lacks image_size"),
        ("descriptors", np.ones((9, D), np.float32), r"descriptors \(9, 8\).*expected keypoints \(P, 2\)"),
        ("descriptors", np.ones((P, D + 1), np.float32), r"has P 16, D 9, G 6; the first .* has P 16, D 8, G 6"),
        ("descriptors", np.ones((D, P), np.float32), r"descriptors \(8, 16\)"),
        ("descriptors", np.full((P, D), np.nan, np.float32), "descriptors has 128 values that are not finite"),
        ("descriptors", np.full((P, D), b"x"), "descriptors has type .S1; expected numbers"),
        ("global_descriptor", np.full(G, 1e6, np.float32), "reaches 1e.06, too large for float16.*dtype=float32"),
        ("global_descriptor", np.full(G, np.inf, np.float32), "global_descriptor has 6 values"),
        ("image_size", [SIDE + 1, 30], r"image_size is \[57.*1 to 56"),
        ("image_size", [0, 30], "image_size is"),
        ("keypoints", np.indices((4, 4)).reshape(2, P).T * 14 + 7.5, "up to 42 pixels"),  # column by column
    ],
)
def test_a_bad_group_is_quarantined_with_its_name_and_reason(tmp_path, key, value, reason):
    write_original(tmp_path / "f.h5", NAMES)
    with h5py.File(tmp_path / "f.h5", "a") as h5:
        del h5[NAMES[2]][key]
        if value is not None:
            h5[NAMES[2]][key] = value
    with pytest.raises(catalog.TooManyBadImagesError, match="1 of 5 images"):
        imported(tmp_path / "f.h5", tmp_path / "strict")
    store = imported(tmp_path / "f.h5", tmp_path / "store", max_bad=0.2)
    assert store.select().names == sorted(set(NAMES) - {NAMES[2]})
    ((name, why),) = catalog.quarantined(store.images())
    assert name == NAMES[2]
    with pytest.raises(H5Error, match=reason):
        raise H5Error(why)
    assert repr(NAMES[2]) in why
    assert store.manifest["rows"] == {"ok": 4, "quarantined": 1}
    before = contents(tmp_path / "store")
    imported(tmp_path / "f.h5", tmp_path / "store", max_bad=0.2)
    assert contents(tmp_path / "store") == before


def test_an_empty_group_and_a_whole_shard_of_bad_groups_are_quarantined(tmp_path):
    write_original(tmp_path / "f.h5", NAMES)
    with h5py.File(tmp_path / "f.h5", "a") as h5:
        h5.create_group("z/empty.jpg")
        h5["z/other.jpg/K"] = np.eye(3)
    store = imported(tmp_path / "f.h5", tmp_path / "store", shard_size=1, max_bad=0.5)
    reasons = dict(catalog.quarantined(store.images()))
    assert set(reasons) == {"z/empty.jpg", "z/other.jpg"}
    assert "holds nothing" in reasons["z/empty.jpg"]
    assert "it holds K" in reasons["z/other.jpg"]
    assert len(store.select().read()[1]) == 5


def test_files_that_cannot_be_imported_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no HDF5 file at .*none\.h5"):
        FeatureFile.open(str(tmp_path / "none.h5"), "float16")
    with pytest.raises(H5Error, match="lies in a bucket"):
        FeatureFile.open("s3://bucket/f.h5", "float16")
    write_original(tmp_path / "f.h5", NAMES)
    (tmp_path / "short.h5").write_bytes((tmp_path / "f.h5").read_bytes()[:5000])
    (tmp_path / "text.h5").write_text("not HDF5")
    for name in ("short.h5", "text.h5"):
        with pytest.raises(H5Error, match=f"cannot open .*{name} as HDF5.*Is it whole"):
            FeatureFile.open(str(tmp_path / name), "float16")
    for name, edit, reason in [
        ("empty", lambda h5: None, "holds no images"),
        ("lists", lambda h5: h5.create_dataset("indices/query", data=["a"]), "holds no images"),
        ("root", lambda h5: h5.create_dataset("descriptors", data=np.zeros((P, D))), "datasets outside of groups"),
        (
            "hloc",
            lambda h5: h5.create_dataset("a/b.jpg/global_descriptor", data=np.zeros(9)),
            "'a/b.jpg': it lacks key",
        ),
    ]:
        with h5py.File(tmp_path / f"{name}.h5", "w") as h5:
            edit(h5)
        with pytest.raises(H5Error, match=reason):
            FeatureFile.open(str(tmp_path / f"{name}.h5"), "float16")
    with h5py.File(tmp_path / "f.h5", "a") as h5:
        h5["indices/numbers"] = np.arange(3)
    with pytest.raises(H5Error, match="something else than lists of names"):
        FeatureFile.open(str(tmp_path / "f.h5"), "float16")


def test_what_the_layout_has_no_place_for_is_not_exported(tmp_path):
    store = computed_store(tmp_path / "store", ["a.jpg", "indices/b.jpg"])
    with pytest.raises(H5Error, match=r"'indices/b\.jpg' cannot be exported"):
        list(export(store.select(), str(tmp_path / "f.h5"), {}, {}))
    assert not (tmp_path / "f.h5").exists()


@pytest.mark.parametrize(("images", "prefix"), [("photos", "images/"), ("photos/images", "")])
def test_the_commands_export_with_cameras_and_import_again(tmp_path, images, prefix):
    from vop import pipeline

    names = [f"{prefix}{name}" for name in ("a/0.jpg", "a/1.jpg", "b/2.jpg")]
    store = computed_store(tmp_path / "store", names)
    for name in names:
        files.write_bytes(tmp_path / images / name, b"\xff\xd8\xff")
    pose = {"K": np.eye(3).tolist(), "R": np.eye(3).tolist(), "t": [0, 0, 1], "width": 40, "height": 30}
    (tmp_path / "photos" / "cameras.json").write_text(json.dumps({"b/2.jpg": pose, "gone.jpg": pose}))
    told = {"store": store.path, "h5": str(tmp_path / "f.h5"), "images": str(tmp_path / images),
            "queries": str(tmp_path / "photos/images/b"), "output": str(tmp_path / "run")}  # fmt: skip
    summary = pipeline.export_h5(config.load(**told)).summary()
    assert "3 images, 1 with cameras" in summary
    assert not (tmp_path / "run").exists()  # a run's record is not overwritten
    with h5py.File(tmp_path / "f.h5") as h5:
        assert [name for name in names if "T_w2cam" in h5[name]] == names[2:]
    told = {"store": str(tmp_path / "again"), "h5": str(tmp_path / "f.h5"), "output": str(tmp_path / "run")}
    summary = pipeline.import_h5(config.load(**told)).summary()
    assert "3 in the store" in summary
    assert (tmp_path / "run/lists/query.txt").read_text().splitlines() == names[2:]
    assert (tmp_path / "run/lists/db.txt").read_text().splitlines() == names
    assert EmbeddingStore.open(told["store"]).select().names == names


def test_the_commands_need_no_images_but_a_file(tmp_path):
    from vop import pipeline

    store = computed_store(tmp_path / "store")
    pipeline.export_h5(config.load(store=store.path, h5=str(tmp_path / "f.h5")))
    with h5py.File(tmp_path / "f.h5") as h5:
        assert h5["indices/query"].asstr()[()].tolist() == h5["indices/db"].asstr()[()].tolist() == sorted(NAMES)
    with pytest.raises(config.ConfigError, match="export-h5 needs h5=FILE"):
        pipeline.export_h5(config.load(store=store.path))
    for wrong in ({}, {"h5": "f.h5", "encoder": "enc"}):
        with pytest.raises(config.ConfigError, match="import-h5 needs h5=FILE"):
            pipeline.import_h5(config.load(**wrong))
