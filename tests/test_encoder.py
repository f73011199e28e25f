"""The encoder, its checkpoints, safe reading of pickles, and whitening."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vop.models.encoder import Encoder, load_encoder, normalized_centers, save_encoder
from vop.models.weights import WeightsError, read_checkpoint
from vop.models.whitening import Whitening, fit_whitening

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden files (../shared/golden) are not here")


def random_encoder(dropout: float = 0.5) -> Encoder:
    torch.manual_seed(0)
    return Encoder(input_dim=24, descriptor_dim=8, dropout=dropout).eval()


def original_checkpoint(encoder: Encoder, **extra) -> dict:
    matcher = {"input_dim": encoder.input_dim, "descriptor_dim": encoder.descriptor_dim,
               "dropout_prob": encoder.dropout, "add_cls_tokens": False}  # fmt: skip
    model = {f"matcher.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return {"model": model, "conf": {"model": {"matcher": matcher}}, "epoch": 1, **extra}


@golden
def test_encoder_matches_the_original():
    with np.load(GOLDEN / "golden_encoder.npz") as expected:
        encoder = load_encoder(str(GOLDEN / "golden_checkpoint_best.tar"))
        sizes = torch.from_numpy(expected["image_size"])
        centers = normalized_centers(256, sizes)
        np.testing.assert_allclose(centers.numpy(), expected["normalized_keypoints"], atol=2e-5)
        np.testing.assert_allclose(encoder.keypoint_encoder(centers).numpy(), expected["keypoint_encoding"], atol=2e-5)
        tokens = torch.from_numpy(expected["descriptors_f16"]).float()
        np.testing.assert_allclose(encoder(tokens, sizes).numpy(), expected["desc"], atol=2e-5)


def test_centers_of_a_portrait_image():
    centers = normalized_centers(256, torch.tensor([[112, 224]]))
    assert centers.shape == (1, 256, 2)
    # patch 17 is row 1, column 1, with its centre at pixel (21.5, 21.5); the image's centre is (56, 112)
    np.testing.assert_allclose(centers[0, 17], [(21.5 - 56) / 112, (21.5 - 112) / 112], rtol=1e-6)


@pytest.mark.parametrize(("dropout", "last"), [(0.0, 3), (0.5, 4)])
def test_index_of_the_last_linear_follows_dropout(dropout, last, tmp_path):
    encoder = random_encoder(dropout)
    assert encoder.keypoint_encoder.state_dict().keys() == {
        f"{index}.{name}" for index in (0, 1, last) for name in ("weight", "bias")
    }
    torch.save(original_checkpoint(encoder), tmp_path / "checkpoint_best.tar")
    loaded = load_encoder(str(tmp_path / "checkpoint_best.tar"))
    tokens, sizes = torch.randn(2, 256, 24), torch.tensor([[224, 149], [100, 224]])
    assert torch.equal(loaded(tokens, sizes), encoder(tokens, sizes))
    assert loaded(tokens, sizes).shape == (2, 256, 8)


def test_what_is_dropped_out_averages_to_nothing_and_is_the_same_for_images_of_one_size():
    encoder = random_encoder(0.5)
    tokens, sizes = torch.zeros(3, 256, 24), torch.tensor([[224, 149], [100, 224], [224, 149]])
    expected, total = encoder(tokens, sizes), torch.zeros(3, 256, 8)
    encoder.train()
    with torch.no_grad():
        for _ in range(200):
            found = encoder(tokens, sizes)
            assert torch.equal(found[0], found[2])
            total += found
    once = (found - expected).abs().mean()
    assert once > 0.05  # something was dropped
    assert (total / 200 - expected).abs().mean() < 0.2 * once  # the mean of 200 is 14 times smaller


def test_own_format_round_trip(tmp_path):
    encoder = random_encoder()
    save_encoder(encoder, str(tmp_path / "one"), {"backbone": {"name": "toy"}})
    save_encoder(encoder, str(tmp_path / "two"), {"backbone": {"name": "toy"}})
    loaded = load_encoder(str(tmp_path / "one"))
    tokens, sizes = torch.randn(1, 256, 24), torch.tensor([[224, 149]])
    assert torch.equal(loaded(tokens, sizes), encoder(tokens, sizes))
    assert loaded.trained_with == {"backbone": {"name": "toy"}}
    assert len(loaded.weights_sha256) == 64
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_misfit_is_an_error(tmp_path):
    path = tmp_path / "checkpoint_best.tar"
    checkpoint = original_checkpoint(random_encoder())
    checkpoint["conf"]["model"]["matcher"]["dropout_prob"] = 0.0
    torch.save(checkpoint, path)
    with pytest.raises(WeightsError, match=r"keypoint_encoder\.3"):
        load_encoder(str(path))
    torch.save({"state": 1}, path)
    with pytest.raises(WeightsError, match="conf"):
        load_encoder(str(path))
    with pytest.raises(WeightsError, match="no encoder at"):
        load_encoder(str(tmp_path / "absent"))


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(2), np.int64(3), np.bool_(True)])
def test_numpy_scalars_in_a_checkpoint_are_read(tmp_path, number):
    torch.save(original_checkpoint(random_encoder(), eval={"loss/total": number}), tmp_path / "c.tar")
    assert read_checkpoint(str(tmp_path / "c.tar"))["eval"]["loss/total"] == number
    assert load_encoder(str(tmp_path / "c.tar")).descriptor_dim == 8


class Trap:
    """Unpickled by the unsafe loader, it would create a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_an_unsafe_pickle_is_refused(tmp_path):
    torch.save(original_checkpoint(random_encoder(), losses=Trap(tmp_path / "sprung")), tmp_path / "c.tar")
    with pytest.raises(WeightsError, match="refused"):
        load_encoder(str(tmp_path / "c.tar"))
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "c.tar"
    torch.save(original_checkpoint(random_encoder()), path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(WeightsError, match="damaged"):
        load_encoder(str(path))


def correlated_tokens() -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.normal(size=(20_000, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12) * 5).astype(np.float32)


def test_whitened_sample_has_mean_zero_and_identity_covariance():
    tokens = correlated_tokens()
    whitened = fit_whitening(tokens, 5).apply(torch.from_numpy(tokens)).numpy()
    assert whitened.shape == (20_000, 5)
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(whitened, rowvar=False), np.eye(5), atol=1e-3)


def test_whitening_keeps_the_directions_of_greatest_variance():
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(5000, 4)) * [0.1, 3, 0.2, 2]).astype(np.float32)
    projection = fit_whitening(tokens, 2).projection
    assert np.abs(projection).argmax(0).tolist() == [1, 3]
    assert (projection[[1, 3], [0, 1]] > 0).all()


def test_whitening_is_rebuilt_from_its_arrays():
    tokens = correlated_tokens()
    whitening = fit_whitening(tokens, 5)
    again = Whitening(**fit_whitening(tokens.copy(), 5).arrays())
    assert all(np.array_equal(whitening.arrays()[name], again.arrays()[name]) for name in ("mean", "projection"))


@pytest.mark.parametrize("tokens", [np.ones((100, 12)), correlated_tokens()[:4]])
def test_whitening_of_too_little_variation_is_an_error(tokens):
    with pytest.raises(ValueError, match="sample more images"):
        fit_whitening(tokens.astype(np.float32), 5)
