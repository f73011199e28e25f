import dataclasses
import re
import typing
from operator import attrgetter
from pathlib import Path

import pytest

from vop.config import KEYS, PATHS, Config, ConfigError, documented, load, to_yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def leaves(schema: type, prefix: str = ""):
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[item.name]):
            yield from leaves(types[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def test_defaults_files_keywords_and_overrides_win_in_this_order(tmp_path):
    first = write(tmp_path / "a.yaml", "retrieval: {k: 1, shortlist: 11}\nembedding: {batch_size: 21, shard_size: 31}")
    second = write(tmp_path / "b.yaml", "retrieval:\n  k: 2\n  shortlist: 12\nembedding:\n  batch_size: 22\n")
    config = load([first, second], ["retrieval.k=4"], retrieval={"k": 3, "shortlist": 13})
    assert (config.retrieval.k, config.retrieval.shortlist) == (4, 13)
    assert (config.embedding.batch_size, config.embedding.shard_size) == (22, 31)
    assert config.embedding.sample == Config().embedding.sample
    assert load([second, first]).retrieval.k == 1


def test_values_may_be_switched_off():
    config = load([], ["retrieval.shortlist=null", "retrieval.radius=null"], truth=None)
    assert (config.retrieval.shortlist, config.retrieval.radius, config.truth) == (None, None, None)


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("imges=x", "did you mean 'images'"),
        ("retrieval.shortlst=5", "did you mean 'retrieval.shortlist'"),
        ("k=5", "did you mean 'retrieval.k'"),  # a leaf without its section
        ("embedding.radius=0.1", "did you mean 'retrieval.radius'"),  # in the wrong section
        ("embedding.zzz=1", "known keys here: image_size"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(override, suggestion):
    with pytest.raises(ConfigError) as caught:
        load([], [override])
    assert repr(override.split("=")[0]) in str(caught.value)
    assert suggestion in str(caught.value)


def test_unknown_keys_are_refused_from_every_source(tmp_path):
    name = write(tmp_path / "a.yaml", "retrieval:\n  raduis: 0.1\n")
    with pytest.raises(
        ConfigError, match=r"a\.yaml: unknown key 'retrieval\.raduis'; did you mean 'retrieval\.radius'"
    ):
        load([name])
    with pytest.raises(ConfigError, match=r"unknown key 'outptu'; did you mean 'output'"):
        load(outptu="run")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("retrieval.k=many", "retrieval.k"),
        ("retrieval.k=1.5", "retrieval.k"),
        ("retrieval.weights=perhaps", "retrieval.weights"),
        ("retrieval.radius=wide", "retrieval.radius"),
        ("retrieval.k=null", "retrieval.k"),
        ("retrieval=5", "retrieval"),
        ("embedding.dtype=[1]", "embedding.dtype"),
    ],
)
def test_a_wrong_type_is_refused_by_key(override, key):
    with pytest.raises(ConfigError) as caught:
        load([], [override])
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("embedding.image_size", (0, -14, 225), (14, 448)),
        ("embedding.dtype", ("int4",), ("float16", "float32", "int8")),
        ("embedding.precision", ("fp16",), ("bfloat16", "float16", "float32", "null")),
        ("embedding.max_bad_fraction", (-0.1, 1.1), (0, 1)),
        ("embedding.shard_size", (0, -1), (1,)),
        ("embedding.batch_size", (0,), (1,)),
        ("embedding.whiten", (0,), (1, "null")),
        ("embedding.gpus_per_encoder", (-1,), (0, 0.5, "null")),
        ("retrieval.k", (0, -1), (1,)),
        ("retrieval.shortlist", (0,), (1, "null")),
        ("retrieval.radius", (0, -0.1, 2), (0.001, 1.9, "null")),
        ("retrieval.query_batch", (0,), (1,)),
        ("retrieval.timeout_s", (0,), (0.5,)),
        ("pairs.budget", (0, -1), (1, "null")),
        ("pairs.sequence", (0,), (1, "null")),
        ("pairs.neighbours", (0,), (1, "null")),
        ("pairs.neighbour_distance_m", (-1, 30), ("null",)),  # 30: of how many?
        ("report.queries", (-1,), (0,)),
        ("report.matches", (0,), (1,)),
        ("demo.images", (0,), (1,)),
        ("cluster.cpus", (0,), (1, "null")),
        ("min_overlap", (0, 1.5), (0.01, 1)),
    ],
)
def test_bounds(key, bad, good):
    for value in good:
        load([], [f"{key}={value}"])
    for value in bad:
        with pytest.raises(ConfigError, match=f"{key} is .*must be"):
            load([], [f"{key}={value}"])


def test_a_pair_list_is_chosen_where_something_is_set():
    assert not load().pairs.chosen
    for override in ("pairs.budget=5", "pairs.mutual=true", "pairs.sequence=1", "pairs.neighbours=2"):
        assert load([], [override]).pairs.chosen
    assert load([], ["pairs.neighbours=2", "pairs.neighbour_distance_m=0.5"]).pairs.neighbour_distance_m == 0.5


def test_an_encoder_brings_its_own_defaults(tmp_path):
    plain, trained = load(), load(encoder="e")
    assert plain.embedding.whiten is not None
    assert (trained.embedding.whiten, trained.retrieval.radius) == (None, 0.2)
    assert load([write(tmp_path / "a.yaml", "retrieval: {radius: 0.4}")], encoder="e").retrieval.radius == 0.4
    assert load([write(tmp_path / "b.yaml", "encoder: e")]).retrieval.radius == 0.2
    assert load([], ["encoder=null"], encoder="e") == plain
    assert load([write(tmp_path / "c.yaml", to_yaml(trained))]) == trained


def test_an_encoder_excludes_a_whitening():
    with pytest.raises(ConfigError, match="whiten"):
        load([], ["encoder=e", "embedding.whiten=64"])


@pytest.mark.parametrize("text", ["retrieval: {k: 1", "\tk: 1", "- a\n- b", "just words", "images: [\n"])
def test_a_file_that_is_not_a_yaml_mapping_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load([write(tmp_path / "bad.yaml", text)])


def test_an_empty_file_changes_nothing(tmp_path):
    assert load([write(tmp_path / "empty.yaml", "# nothing yet\n")]) == load()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' does not exist"):
        load([str(tmp_path / "nowhere.yaml")])


def test_an_override_without_a_value_is_explained():
    with pytest.raises(ConfigError, match=r"'photos' is not an override: write key=value"):
        load([], ["photos"])


def test_local_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(images="photos", output="./run/../run", store="s3://bucket/store", truth="~/truth", h5="a b.h5")
    here = str(tmp_path)
    assert (config.images, config.output, config.h5) == (f"{here}/photos", f"{here}/run", f"{here}/a b.h5")
    assert (config.store, config.truth) == ("s3://bucket/store", "/home/somebody/truth")
    assert load(output="run").store_path == f"{here}/run/store"
    assert config.store_path == "s3://bucket/store"


def test_every_setting_that_names_a_file_or_folder_becomes_absolute():
    """Workers have other working directories."""
    place = re.compile(r"(Local |Text |HDF5 )?(file|folder|directory|store) ", re.IGNORECASE)
    named = {key for key, meaning, default in documented() if default is None and place.match(meaning)}
    assert {"store", "pair_labels", "retrieval.cache", "train.scenes", "dataset.root"} < named <= set(PATHS)


def test_weights_become_absolute_only_if_they_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    assert load(weights="weights.pth").weights == str(tmp_path / "weights.pth")
    assert load(weights="facebook/dinov2-large").weights == "facebook/dinov2-large"


@pytest.mark.parametrize("key", PATHS)
def test_a_relative_path_is_refused_with_a_cluster(key):
    told = ["output=/shared/run", "cluster.address=auto"]
    told += ["train.supervision=labels"] * (key == "train.labels")
    with pytest.raises(ConfigError, match=f"{key} is the relative path 'relative/place'.*absolute path"):
        load([], [*told, f"{key}=relative/place"])
    place = "/shared/place" if key.endswith(".cache") else "gs://bucket/place"
    assert attrgetter(key)(load([], [*told, f"{key}={place}"])) == place


@pytest.mark.parametrize("key", ["retrieval.cache", "train.cache"])
def test_what_is_mapped_into_memory_cannot_lie_in_a_bucket(key):
    with pytest.raises(ConfigError, match=f"{key} is 's3://bucket/place', but must be a folder on a local disk"):
        load([], [f"{key}=s3://bucket/place"])


def test_a_value_that_is_no_yaml_is_refused_with_the_way_to_write_it():
    with pytest.raises(ConfigError, match=r"""quote it twice: 'dataset\.model="\{scene\}/sparse"'"""):
        load([], ["dataset.model={scene}/sparse"])
    assert load([], ['dataset.model="{scene}/sparse"']).dataset.model == "{scene}/sparse"


def test_yaml_round_trip_gives_an_equal_config(tmp_path):
    config = load(
        images="/data/photos: a #1",
        weights="org/model",
        embedding={"dtype": "float32", "max_bad_fraction": 0.25, "whiten": 64},
        retrieval={"shortlist": None, "radius": 0.123456789, "k": 7},
        cluster={"object_store_gb": 0.5},
        truth="/über/東京 x",
    )
    text = to_yaml(config)
    assert load([write(tmp_path / "config.yaml", text)]) == config
    assert to_yaml(load([str(tmp_path / "config.yaml")])) == text
    assert load([write(tmp_path / "config.yaml", to_yaml(load()))]) == load()


def test_every_key_has_a_meaning_and_its_default():
    known = {key: (meaning, default) for key, meaning, default in documented()}
    assert list(known) == list(leaves(Config)) == list(KEYS)
    assert [key for key, (meaning, _) in known.items() if len(meaning) < 15 or not meaning.endswith(".")] == []
    assert [key for key, (meaning, _) in known.items() if "\n" in meaning or "  " in meaning] == []
    for key, (_, default) in known.items():
        value = Config()
        for part in key.split("."):
            value = getattr(value, part)
        assert value == default, key


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().retrieval.k = 5


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_file_loads(path):
    assert load([str(path)]) != Config()


def test_recipes_of_training_differ_in_where_matches_come_from():
    recipes = {path.stem: load([str(path)]) for path in (CONFIGS / "train").iterdir()}
    assert {name: (recipe.dataset.format, recipe.train.supervision) for name, recipe in recipes.items()} == {
        "overlap": (None, "depth"),
        "homography": (None, "homography"),
        "colmap": ("colmap", "points"),
        "megadepth": ("megadepth", "depth"),
    }
    usual = Config().train
    assert {dataclasses.replace(recipe.train, supervision="depth") for recipe in recipes.values()} == {usual}
    text = (CONFIGS.parent / "docs" / "training.md").read_text()
    assert all(f"configs/train/{name}.yaml" in text for name in recipes)
