"""The embedding stage's callables, run without Ray: what they write with and without tokens and patches."""

import numpy as np
import pyarrow as pa
import pytest

from vop import config, pipeline
from vop.config import ConfigError
from vop.embedding import ShardWriter, decode_shard
from vop.models.embedder import Embedder, calibrate
from vop.store import EmbeddingStore, StoreError, tensor_values

NAMES = ("0000.jpg", "0001.jpg", "0002.jpg")


def stored(images, path, **embedding) -> EmbeddingStore:
    """A store of three images in one shard, as the stage writes it."""
    told = config.load(images=str(images), output=str(path), embedding=embedding | {"image_size": 112})
    planned = pa.table({"image_id": range(3), "name": NAMES, "path": [str(images / name) for name in NAMES],
                        "shard": [0] * 3, "shard_rows": [3] * 3})  # fmt: skip
    made = calibrate(told, planned)
    store = EmbeddingStore.create(str(path), made.features, made.shapes, made.arrays)
    ShardWriter(store)(Embedder(told, store)(decode_shard(planned, 112, told.embedding.max_pixels)))
    return store


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_of_tokens_alone_holds_the_tokens_of_one_with_both(rendered_collection, tmp_path, dtype):
    both = stored(rendered_collection, tmp_path / "both", tokens=True, whiten=32, dtype=dtype)
    alone = stored(rendered_collection, tmp_path / "alone", tokens=True, patches=False, whiten=None, dtype=dtype)
    assert alone.read_shard(0).column_names == [name for name in both.read_shard(0).column_names if name != "patches"]
    for name in ("tokens", "global"):
        one, other = (tensor_values(store.read_shard(0)[name]) for store in (both, alone))
        assert one.dtype == np.float16 and np.abs(one).max() > 0
        np.testing.assert_array_equal(one, other)
    with pytest.raises(StoreError, match=r"no patches: it was made with embedding\.patches=false"):
        alone.with_patches()
    with pytest.raises(StoreError, match=r"patches: the store has False, this run None"):
        alone.check_features(both.manifest["features"])


def test_what_cannot_be_searched_is_refused_before_anything_is_embedded(rendered_collection, tmp_path):
    with pytest.raises(ConfigError, match=r"embedding\.patches is False, but must be true unless"):
        config.load(embedding={"patches": False})
    without = {"patches": False, "tokens": True}
    told = config.load(images=str(rendered_collection), output=str(tmp_path / "run"), embedding=without)
    with pytest.raises(ConfigError, match=r"searched by their patches"):
        pipeline.register(told)
    with pytest.raises(ConfigError, match=r"searched by their patches"):
        pipeline.retrieve(told)
    assert not (tmp_path / "run").exists()
