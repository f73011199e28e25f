"""What docs/security.md promises of files, names and configs from elsewhere. Pickles: tests/test_pickled.py."""

import ast
import io
import json
import os
import re
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import trees
from bad_images import png_header
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vop import catalog, config, files, image, names, pairs, pipeline
from vop.config import ConfigError
from vop.datasets.benchmark import open_benchmark
from vop.datasets.posed import decode_depth, read_cameras
from vop.exit_codes import IMPOSSIBLE
from vop.foreign_hdf5 import ForeignLinkError, member
from vop.hdf5 import FeatureFile, H5Error, export
from vop.image import ImageError, decode
from vop.models.weights import WeightsError, read_tensors
from vop.names import UnsafeNameError, checked, inside, problem
from vop.pickled import PickledError
from vop.pose.results import COUNTS, RESULTS, markdown
from vop.store import EmbeddingStore
from vop.training.supervision import LabelError, PreparedSupervision, read_depth

ROOT = Path(__file__).resolve().parents[1]
ESCAPES = ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "..", "a/..", "a\0b.jpg", "", "/", ".", "a/b/../c.jpg"]
HARMLESS = ["x.jpg", "a/b c/ü.jpg", "..a/b..jpg", "a...b/x.jpg", "~/x", "$HOME/x", "a\\..\\b.jpg", "-rf", ".hidden/x"]


# Names


@given(st.text(st.sampled_from("a./\0\\~ü ") | st.characters(exclude_categories=["Cs"]), max_size=12))
def test_a_name_is_refused_or_stays_in_its_folder(name):
    try:
        path = inside("/folder/of/images", name, "a list")
    except UnsafeNameError as refused:
        assert repr(name) in str(refused)
        assert re.search(names.SUSPECT, name)  # what a store looks for first
        return
    assert os.path.normpath(path).startswith("/folder/of/images/")
    assert os.path.normpath(path) != "/folder/of/images"


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_lead_out_are_refused(name):
    with pytest.raises(UnsafeNameError, match=r"pairs of x names .*: names must be relative paths"):
        checked(["fine.jpg", name], "pairs of x")


def test_other_names_are_none_of_its_business():
    assert checked(HARMLESS, "x") == HARMLESS
    assert inside("s3://bucket/a/", "b/c.jpg", "x") == "s3://bucket/a/b/c.jpg"


def store_with(path, name) -> EmbeddingStore:
    """A store from elsewhere, whose catalog names an image."""
    shapes = {"patches": 4, "width": 2, "global_width": 2, "token_width": 2, "dtype": "float16"}
    store = EmbeddingStore.create(str(path), {"backbone": {"name": "x"}, "tokens": False}, shapes, {})
    row = dict.fromkeys(catalog.SCHEMA.names) | {"image_id": 0, "name": name, "scene": "", "size": 1, "modified_ns": 1,
                                                 "shard": 0, "row": 0, "status": catalog.OK}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], schema=catalog.SCHEMA), path / "images.parquet")
    return store


@pytest.mark.parametrize("name", ESCAPES)
def test_a_store_with_such_names_cannot_be_used(name, tmp_path):
    store = store_with(tmp_path, name)
    for use in (store.images, store.live, store.select):
        with pytest.raises(UnsafeNameError, match=r"images\.parquet names"):
            use()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_store_with_other_names_can(name, tmp_path):
    assert store_with(tmp_path, name).select().names == [name]


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd"])
def test_datasets_with_such_names_are_refused(name, tmp_path):
    (tmp_path / "cameras.json").write_text(json.dumps({name: {"K": np.eye(3).tolist()}}))
    with pytest.raises(UnsafeNameError, match=r"cameras\.json names"):
        read_cameras(str(tmp_path / "cameras.json"))
    trees.pitts30k_lists(tmp_path)
    np.save(tmp_path / "pitts30k_test_dbImages.npy", np.array(["000/a.jpg", name]))
    with pytest.raises(UnsafeNameError, match="the dataset at"):
        open_benchmark(config.load(dataset={"format": "pitts30k", "root": str(tmp_path), "images": ".",
                                            "model": "pitts30k_{scene}"}))  # fmt: skip


def test_depth_maps_outside_of_the_dataset_are_refused(tmp_path):
    trees.megadepth(tmp_path)
    path = tmp_path / "scene_info" / "0015.npz"
    content = dict(np.load(path, allow_pickle=True))
    content["depth_paths"][0] = "../../depth.h5"
    np.savez(path, **content)
    with pytest.raises(UnsafeNameError, match=r"0015\.npz names '\.\./\.\./depth\.h5'"):
        open_benchmark(config.load(dataset={"format": "megadepth", "root": str(tmp_path)}))


def test_names_in_pair_lists_are_looked_up_and_never_opened(tmp_path):
    (tmp_path / "pairs.txt").write_text("../../etc/passwd a.jpg\n")
    listed = pairs.read_given(str(tmp_path / "pairs.txt"))
    assert listed["query"].to_pylist() == ["../../etc/passwd"]  # reported as unknown: tests/test_matching.py


# NumPy files of datasets


class Touch:
    """A pickle that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_dataset_runs_a_pickle(tmp_path):
    mark = tmp_path / "run"
    evil = np.array([Touch(mark), None], object)
    trees.megadepth(tmp_path / "m")
    np.savez(tmp_path / "m" / "scene_info" / "0015.npz", image_paths=evil, depth_paths=evil, intrinsics=evil,
             poses=evil, overlap_matrix=np.eye(2))  # fmt: skip
    trees.pitts30k_lists(tmp_path / "p")
    np.save(tmp_path / "p" / "pitts30k_test_gt.npy", evil, allow_pickle=True)
    trees.phototourism(tmp_path / "t", "church", ["a", "b"], [(0, 1)])
    trees.covisible(tmp_path / "t" / "church", {"0.1": ["a-b"]})
    np.save(tmp_path / "t" / "church" / "new-vis-pairs" / "keys-th-0.1.npy", evil, allow_pickle=True)
    lists = {"images": ".", "model": "pitts30k_{scene}"}
    for name, root, where in (("megadepth", "m", {}), ("pitts30k", "p", lists), ("phototourism", "t", {})):
        with pytest.raises(PickledError, match=r"asks for (posix|nt)\.system"):
            _ = open_benchmark(config.load(dataset={"format": name, "root": str(tmp_path / root), **where})).truth
    assert not mark.exists()


# HDF5


@pytest.fixture
def linked(tmp_path):
    """A file whose members lie elsewhere, in one of the ways that HDF5 has."""
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["values"] = np.eye(3)
    (tmp_path / "secret.bin").write_bytes(b"x" * 72)
    path = tmp_path / "foreign.h5"
    with h5py.File(path, "w") as file:
        file["own/values"] = np.eye(3)
        file["external"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/values")
        file["root"] = h5py.ExternalLink("secret.h5", "/")
        file["soft"] = h5py.SoftLink("/root/values")
        file.create_dataset("raw", (3, 3), "f8", external=[(str(tmp_path / "secret.bin"), 0, 72)])
        layout = h5py.VirtualLayout((3, 3), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "values", (3, 3))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("bomb", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip")
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("external", r"is a link to .*secret\.h5:/values"), ("root/values", r"is a link to secret\.h5:/"),
        ("soft", "is a link to /root/values"), ("raw", "from other files"), ("virtual", "from other files"),
        ("bomb", "claims 4,398,046,511,104 bytes"),
    ],
)  # fmt: skip
def test_members_that_lie_elsewhere_are_refused(linked, name, said):
    with h5py.File(linked) as file, pytest.raises(ForeignLinkError, match=said) as refused:
        member(file, name)
    assert f"foreign.h5: {name!r}" in str(refused.value)


def test_members_of_the_file_itself_are_given(linked):
    with h5py.File(linked) as file:
        np.testing.assert_array_equal(member(file, "own/values"), np.eye(3))
        assert member(member(file, "own"), "values") == file["own/values"]
        for absent in ("none", "own/none", "own/values/none"):
            assert member(file, absent) is None


def test_every_reader_of_foreign_hdf5_refuses_them(tmp_path, linked):
    with h5py.File(tmp_path / "images.h5", "w") as file:
        for key in ("keypoints", "descriptors", "global_descriptor"):
            file[f"image.jpg/{key}"] = h5py.ExternalLink("secret.h5", "/values")
        file["image.jpg/image_size"] = [28, 28]
    with pytest.raises(H5Error, match=r"'\w+' is a link to secret\.h5:/values"):
        FeatureFile.open(str(tmp_path / "images.h5"), "float16")
    with h5py.File(linked, "r+") as file:
        file["depth"] = h5py.ExternalLink("secret.h5", "/values")
        file["a.jpg/b.jpg/gt_labels"] = h5py.ExternalLink("secret.h5", "/values")
    with pytest.raises(LabelError, match="depth map cannot be read"):
        read_depth(str(linked))
    found = PreparedSupervision(str(linked), 56).labels([{"view0": "a.jpg", "view1": "b.jpg", "overlap": 1.0}])
    assert [str(each) for each in found] == ["labels cannot be read"]
    trees.phototourism(tmp_path, "church", ["a", "b"], [(0, 1)])
    with h5py.File(tmp_path / "church" / "T.h5", "r+") as file:
        del file["a"]
        file["a"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/values")
    with pytest.raises(ForeignLinkError, match="is a link to"):
        open_benchmark(config.load(dataset={"format": "phototourism", "root": str(tmp_path)}))


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg"])
def test_images_and_lists_of_an_h5_file_keep_to_the_output(name, tmp_path):
    path = tmp_path / "in.h5"
    with h5py.File(path, "w") as file:
        for key, shape in (("keypoints", (4, 2)), ("descriptors", (4, 2)), ("global_descriptor", (3,))):
            file[f"{name}/{key}"] = np.zeros(shape)
        file[f"{name}/image_size"] = [28, 28]
    with pytest.raises(UnsafeNameError, match=r"in\.h5 names"):
        pipeline.import_h5(config.load(h5=str(path), output=str(tmp_path / "run")))
    with h5py.File(path, "r+") as file:
        file.move(name, "fine.jpg")
        file[f"indices/{name.split('/')[0]}/.."] = np.array(["fine.jpg"], h5py.string_dtype())
    with pytest.raises((UnsafeNameError, H5Error)):
        pipeline.import_h5(config.load(h5=str(path), output=str(tmp_path / "run")))
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.h5", "run"}
    with pytest.raises(UnsafeNameError):
        list(export(store_with(tmp_path, name).select(), str(tmp_path / "out.h5"), {}, {}))


# Images


FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_size_of_an_image_is_known_before_it_is_decoded(kind, monkeypatch):
    assert image._FORMATS == FORMATS
    stream = io.BytesIO()
    Image.init()
    Image.new("RGB", (64, 48)).save(stream, kind)
    monkeypatch.setattr(image.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="64x48 is 3,072 pixels, the limit is 3,071"):
        decode(stream.getvalue(), max_pixels=64 * 48 - 1)


def test_depth_maps_are_bounded_too(monkeypatch):
    stream = io.BytesIO()
    Image.new("I;16", (64, 48)).save(stream, "PNG")
    assert decode_depth(stream.getvalue()).shape == (48, 64)
    monkeypatch.setattr(image.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="60000x60000"):
        decode_depth(png_header(60_000, 60_000))


# Results


def test_names_of_scenes_are_text_in_markdown():
    row = dict.fromkeys(RESULTS.names) | {"unit": "query", "k": 1, "protocol": "fixed", "estimator": "opencv"}
    row |= {"threshold_px": 1.0, "auc@5": 0.5} | dict.fromkeys(COUNTS, 1)
    rows = [row | {"scene": "a|b\n<script>alert(1)</script>"}, row | {"scene": "other"}]
    text = markdown(pa.Table.from_pylist(rows, schema=RESULTS))
    assert "| a\\|b &lt;script&gt;alert(1)&lt;/script&gt; |" in text
    assert "<script" not in text


# Weights


def test_weights_run_no_code_and_stay_in_their_folder(tmp_path):
    mark = tmp_path / "run"
    torch.save({"weights": Touch(mark)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"asks for (posix|nt)\.system"):
        read_tensors(str(tmp_path / "evil.pth"))
    assert not mark.exists()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../evil.safetensors"}}))
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file"):  # an index names nothing that is looked for
        read_tensors(str(folder))


# Configs


@pytest.mark.parametrize(
    "value",
    [
        "s3://AKIA0:hidden@bucket/run", "s3://AKIA0:hid/den@bucket/run", "https://host/x?X-Amz-Signature=hidden",
        "s3://bucket/run?access_key=hidden", "gs://bucket/run?a=1&secret_key=hidden", "abfs://c@a.net/x?sig=hidden",
        "s3://bucket/run?session_token=hidden", "hdfs://me:hidden@host:8020/x",
    ],
)  # fmt: skip
def test_credentials_in_a_uri_are_refused_and_not_repeated(value, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"store: {value}\n")
    for told in (
        {"overrides": [f"output={value}"]}, {"output": value}, {"dataset": {"scenes": [value]}}, {"overrides": [value]},
        {"overrides": [f"retrieval.k={value}"]}, {"overrides": [f"outptu={value}"]}, {"config_files": [value]},
        {"overrides": [f"images=[{value}"]}, {"config_files": [str(tmp_path / "a.yaml")]},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="credentials") as refused:
            config.load(**told)
        assert "hidden" not in str(refused.value)
        assert "den@" not in str(refused.value)
    from vop import cli

    assert cli.main(["register", f"output={value}"]) == IMPOSSIBLE
    shown = capsys.readouterr()
    assert "hidden" not in shown.out + shown.err


@pytest.mark.parametrize(
    "value",
    ["s3://bucket/run", "abfs://container@account.dfs.core.windows.net/x", "s3://b/a:b@c",
     "hdfs://host:8020/user@home/x", "/a:b@c/d"],
)  # fmt: skip
def test_uris_without_credentials_are_taken(value):
    assert config.load(output=value).output == value


def test_configs_run_no_code_and_do_not_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"images: !!python/object/apply:os.system ['touch {tmp_path}/run']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        config.load([str(recipe)])
    assert not (tmp_path / "run").exists()
    for value in ("${oc.env:AWS_SECRET_ACCESS_KEY}", "a/${output}", "${oc.decode:${oc.env:X}}"):
        recipe.write_text(f"images: {value}\n")
        for told in ({"config_files": [str(recipe)]}, {"overrides": [f"images={value}"]}, {"images": value}):
            with pytest.raises(ConfigError, match="interpolation") as refused:
                config.load(**told)
            assert "hidden" not in str(refused.value)


# The source itself


def calls(tree: ast.AST):
    """(dotted name, keywords) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_in_the_package_unpickles_unpacks_or_runs_a_shell():
    sources = {path: ast.parse(path.read_text()) for path in (ROOT / "vop").rglob("*.py")}
    for path, tree in sources.items():
        for name, keywords in calls(tree):
            where = f"{path}: {name}"
            assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "yaml.load"), where
            assert not name.endswith((".extractall", "unpack_archive", "os.system", "popen")), where
            assert "allow_pickle" not in keywords, where
            assert "trust_remote_code" not in keywords, where
            assert keywords.get("shell") != "True", where
            assert name != "torch.load" or keywords["weights_only"] == "True", where
    assert any(name == "torch.load" for tree in sources.values() for name, _ in calls(tree))


def test_problem_says_why():
    assert problem("a/b.jpg") is None
    assert problem("../a") == "leads to a folder above (`..`)"
    assert files.join("a", "b") == "a/b"
