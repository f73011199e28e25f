"""Backbones: weights from every source, agreement with the originals, and the descriptors made of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skimage import data as pictures
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vop.image import decode, letterbox, patch_mask
from vop.models import dinov2, weights, xfeat
from vop.models.backbone import fetch_weights, load_backbone
from vop.models.descriptor import Describer, patch_masks, pooled
from vop.models.encoder import Encoder, load_encoder
from vop.models.weights import WeightsError
from vop.models.whitening import fit_whitening

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden files (../shared/golden) are not here")
WHOLE = torch.tensor([[224, 224]])


# --- DINOv2 against the original


@golden
@pytest.mark.parametrize("kind", ["plain", "reg4"])
def test_dinov2_matches_the_original(kind):
    backbone = load_backbone("dinov2", str(GOLDEN / f"golden_dinov2_tiny_{kind}.pth"), heads=4)
    with np.load(GOLDEN / f"golden_dinov2_tiny_{kind}.npz") as expected:
        tokens, own = backbone(torch.from_numpy(expected["image"]), WHOLE.expand(2, 2))
        np.testing.assert_allclose(tokens.numpy(), expected["patch_tokens"], atol=1e-4)
        np.testing.assert_allclose(own.numpy(), expected["cls"], atol=1e-4)


@golden
@pytest.mark.parametrize("picture", ["landscape", "portrait", "square", "small", "odd"])
def test_whole_path_matches_the_original(picture):
    checkpoint = str(GOLDEN / "golden_checkpoint_e2e.tar")
    describer = Describer(load_backbone("dinov2", checkpoint, heads=4), load_encoder(checkpoint))
    image, size = letterbox(decode((GOLDEN / "images" / f"{picture}.png").read_bytes()))
    with np.load(GOLDEN / "golden_e2e.npz") as expected:
        tokens, own = describer.tokens(image[None], np.array([size]))
        descriptors = describer.embed(tokens, np.array([size]))[0].numpy()
        np.testing.assert_allclose(tokens[0].numpy(), expected[f"{picture}_descriptors"], atol=1e-4)
        np.testing.assert_allclose(own[0].numpy(), expected[f"{picture}_global"], atol=1e-4)
        np.testing.assert_allclose(descriptors, expected[f"{picture}_desc"], atol=1e-4)
        letterboxed = torch.from_numpy(expected[f"{picture}_image"])[None]
    # the float tensor of the original and our bytes are the same input, to the bit
    for from_bytes, from_floats in zip(
        describer(image[None], np.array([size])), describer(letterboxed, np.array([size])), strict=True
    ):
        assert np.array_equal(from_bytes, from_floats)


@golden
def test_every_name_of_vit_large_is_converted():
    lines = [line.split(" ", 1) for line in (GOLDEN / "vitl14_keys.txt").read_text().splitlines()]
    original = {
        name.removeprefix(dinov2.CHECKPOINT_PREFIX): torch.empty(json.loads(f"[{shape.strip('(),')}]"), device="meta")
        for name, shape in lines
    }
    assert len(original) == 343
    hub = dinov2.to_hub_names(original)
    config = dinov2.named_config("dinov2_vitl14", dinov2.config_of(hub))
    assert config.num_attention_heads == 16
    with torch.device("meta"):
        model = Dinov2Model(config)
    # the library's modules shorten the hub's names of the attention projections
    shortened = {
        name.replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj"): tuple(tensor.shape)
        for name, tensor in hub.items()
    }
    assert shortened == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- DINOv2 from every kind of weights, with a tiny random model as the oracle


def tiny(registers: int = 0, swiglu: bool = False, image_size: int = 56):
    torch.manual_seed(1)
    settings = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": 14,
        "use_swiglu_ffn": swiglu,
    }
    model = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**settings))
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def original_names(model) -> dict[str, torch.Tensor]:
    """The model's weights as DINOv2's own repository names them, written down independently of the loader."""
    new = model.state_dict()
    state = {
        "cls_token": new["embeddings.cls_token"],
        "pos_embed": new["embeddings.position_embeddings"],
        "mask_token": new["embeddings.mask_token"],
        "patch_embed.proj.weight": new["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": new["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": new["layernorm.weight"],
        "norm.bias": new["layernorm.bias"],
    }
    if "embeddings.register_tokens" in new:
        state["register_tokens"] = new["embeddings.register_tokens"]
    for block in range(model.config.num_hidden_layers):
        here, there = f"encoder.layer.{block}.", f"blocks.{block}."
        for number in "12":
            state[f"{there}ls{number}.gamma"] = new[f"{here}layer_scale{number}.lambda1"]
        for kind in ("weight", "bias"):
            for number in "12":
                state[f"{there}norm{number}.{kind}"] = new[f"{here}norm{number}.{kind}"]
            qkv = [new[f"{here}attention.{letter}_proj.{kind}"] for letter in "qkv"]
            state[f"{there}attn.qkv.{kind}"] = torch.cat(qkv)
            state[f"{there}attn.proj.{kind}"] = new[f"{here}attention.o_proj.{kind}"]
            if model.config.use_swiglu_ffn:
                gate, up = (new[f"{here}mlp.{part}_proj.{kind}"] for part in ("gate", "up"))
                state[f"{there}mlp.w12.{kind}"] = torch.cat([gate, up])
                state[f"{there}mlp.w3.{kind}"] = new[f"{here}mlp.down_proj.{kind}"]
            else:
                for number in "12":
                    state[f"{there}mlp.fc{number}.{kind}"] = new[f"{here}mlp.fc{number}.{kind}"]
    return state


@pytest.mark.parametrize("source", ["pth", "safetensors", "hub file", "folder"])
@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (4, False), (0, True), (4, True)])
def test_weights_from_every_source_compute_what_the_library_computes(tmp_path, source, registers, swiglu):
    model, path, heads = tiny(registers, swiglu), tmp_path / "weights.safetensors", 4
    if source == "pth":
        path = tmp_path / "weights.pth"
        torch.save(original_names(model), path)
    elif source == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in original_names(model).items()}, path)
    else:
        model.save_pretrained(tmp_path)
        path, heads = (tmp_path, None) if source == "folder" else (tmp_path / "model.safetensors", 4)
    backbone = load_backbone("dinov2", str(path), image_size=56, heads=heads)
    images = torch.rand(2, 3, 56, 56)
    tokens, own = backbone(images, torch.full((2, 2), 56))
    with torch.inference_mode():
        expected = model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(own, expected[:, 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(tokens, expected[:, 1 + registers :], atol=2e-5, rtol=1e-4)
    assert backbone.width == backbone.global_width == 64


def test_tokens_of_an_earlier_block_are_layer_normed(tmp_path):
    model = tiny()
    torch.save(original_names(model), tmp_path / "w.pth")
    images = torch.rand(1, 3, 56, 56)
    backbone = load_backbone("dinov2", str(tmp_path / "w.pth"), block=1, image_size=56, heads=4)
    tokens, own = backbone(images, torch.tensor([[56, 56]]))
    with torch.inference_mode():
        states = model(pixel_values=images, output_hidden_states=True).hidden_states
        expected = model.layernorm(states[2])  # states[0] is the embedding, states[2] what block 1 returns
    torch.testing.assert_close(tokens, expected[:, 1:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(own, expected[:, 0], atol=2e-5, rtol=1e-4)
    assert backbone.describe()["block"] == 1
    assert load_backbone("dinov2", str(tmp_path / "w.pth"), image_size=56, heads=4).describe()["block"] == 2
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        load_backbone("dinov2", str(tmp_path / "w.pth"), block=3, image_size=56, heads=4)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("norm.weight"), r"1 missing \(layernorm\.weight\)"),
        (lambda state: state.update(head=torch.zeros(2)), r"1 unexpected \(head\)"),
        (
            lambda state: state.update({"blocks.0.ls1.gamma": torch.zeros(3)}),
            r"1 mis-shaped .*\(3,\) instead of \(64,\)",
        ),
        (lambda state: state.pop("blocks.1.attn.qkv.bias"), r"3 missing .*encoder\.layer\.1\.attention"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, complaint):
    state = original_names(tiny())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=complaint):
        load_backbone("dinov2", str(tmp_path / "w.pth"), image_size=56, heads=4)


def test_weights_of_another_architecture_are_recognised(tmp_path):
    torch.save(original_names(tiny()), tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"weights are of a ViT of width 64, 3 blocks.*dinov2_vits14 is a ViT of width 384"
    ):
        load_backbone("dinov2_vits14", str(tmp_path / "w.pth"))
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not hold a DINOv2"):
        load_backbone("dinov2_vits14", str(tmp_path / "w.pth"))


def test_names_settings_and_sources_that_do_not_exist(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(WeightsError, match=r"facebook/dinov2-with-registers-large.*local folder.*single file"):
        fetch_weights("dinov2_vitl14_reg")
    with pytest.raises(WeightsError, match="no weights at"):
        fetch_weights("dinov2_vits14", str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match="takes its shape from its weights"):
        fetch_weights("dinov2")
    with pytest.raises(ValueError, match="must be one of: xfeat, dinov2, dinov2_vits14"):
        load_backbone("resnet50")
    with pytest.raises(ValueError, match="multiple of the patch size"):
        load_backbone("xfeat", image_size=225)
    with pytest.raises(ValueError, match="precision is bfloat16"):
        load_backbone("xfeat", precision="bfloat16")
    with pytest.raises(ValueError, match="no transformer blocks"):
        load_backbone("xfeat", block=3)


def test_a_hub_snapshot_is_a_folder(tmp_path, monkeypatch):
    import huggingface_hub

    tiny().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **_: asked.append(hub_id) or str(tmp_path))
    assert load_backbone("dinov2", "someone/dinov2-tiny", image_size=56).describe()["heads"] == 4
    assert asked == ["someone/dinov2-tiny"]


def test_weights_at_a_uri_are_copied_once_and_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    source = tmp_path / "w.pth"
    source.write_bytes(b"one")
    first = fetch_weights("dinov2", f"file://{source}")
    assert Path(first).read_bytes() == b"one"
    assert fetch_weights("dinov2", f"file://{source}") == first
    source.write_bytes(b"longer")
    assert Path(fetch_weights("dinov2", f"file://{source}")).read_bytes() == b"longer"


# --- XFeat


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("xfeat")


def crops(offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Two letterboxed crops of photographs, the second shifted by `offset` pixels to the right and down."""
    sources = [pictures.astronaut(), pictures.coffee()[:, :512], pictures.chelsea()]
    cut = [[source[o : o + 224, o : o + 224] for source in sources] for o in (40, 40 + offset)]
    return np.array(cut[0]), np.array(cut[1])


def test_xfeat_without_its_heads_equals_the_full_model(backbone):
    images = torch.from_numpy(crops(0)[0]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = backbone.net(images)[0]
        ours = backbone.feature_map(xfeat.normalized_grey(images, WHOLE.expand(3, 2)))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_xfeat_token_is_the_stack_of_its_cells(backbone):
    images = torch.rand(1, 3, 224, 224)
    tokens = backbone(images, WHOLE)[0]
    with torch.inference_mode():
        cells = torch.nn.functional.interpolate(backbone.net(images)[0], (32, 32), mode="bilinear")
        cells = torch.nn.functional.normalize(cells, dim=1)
    for row, col in ((0, 0), (3, 7), (15, 15)):
        corner = cells[0, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        expected = torch.cat([corner[:, 0, 0], corner[:, 0, 1], corner[:, 1, 0], corner[:, 1, 1]])
        torch.testing.assert_close(tokens[0, 16 * row + col], expected, atol=1e-5, rtol=1e-4)


def test_xfeat_finds_the_shifted_patch(backbone):
    describer = Describer(backbone)
    sizes = np.full((3, 2), 224)
    first, second = (describer(images, sizes)[0].reshape(3, 16, 16, 256) for images in crops(28))
    # a shift by 28 pixels moves every patch by two rows and two columns; the border is left out
    wanted = second[:, 1:13, 1:13].reshape(3, 144, 256)
    found = np.einsum("bpd,bsd->bps", wanted, first.reshape(3, 256, 256)).argmax(-1)
    row, col = np.mgrid[3:15, 3:15].reshape(2, -1)
    assert (found == 16 * row + col).mean() > 0.9  # chance: 1 in 256


def test_xfeat_normalisation_ignores_the_padding(backbone):
    picture = crops(0)[0][:1, :, :112].copy()
    canvas = np.zeros((1, 224, 224, 3), np.uint8)
    canvas[:, :, :112] = picture
    images = torch.from_numpy(canvas).permute(0, 3, 1, 2) / 255
    grey = xfeat.normalized_grey(images, torch.tensor([[112, 224]]))
    expected = torch.nn.InstanceNorm2d(1)(images[..., :112].mean(1, keepdim=True))
    torch.testing.assert_close(grey[..., :112], expected, atol=1e-4, rtol=1e-4)
    assert (grey[..., 112:] == 0).all()


def test_weights_of_something_else_are_refused_by_xfeat(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="XFeat"):
        load_backbone("xfeat", str(tmp_path / "w.pt"))


# --- descriptors


def test_descriptors_do_not_depend_on_the_batch(backbone):
    images, sizes = np.concatenate(crops(30)), np.array([[224, 224]] * 5 + [[224, 100]])
    images[5, 100:] = 0
    describer = Describer(backbone)
    together = describer(images, sizes)
    for first, second in zip(together, describer(images, sizes), strict=True):
        assert np.array_equal(first, second)
    for index in (0, 5):
        alone = describer(images[index : index + 1], sizes[index : index + 1])
        for whole, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(single[0], whole[index], atol=1e-5)


def test_patches_are_unit_length_and_the_global_descriptor_is_the_mean_of_image_patches(backbone):
    images, sizes = crops(0)[0], np.array([[224, 100], [224, 224], [60, 224]])
    center = np.linspace(-0.1, 0.1, 256, dtype=np.float32)
    describer = Describer(backbone, center=center)
    patches, own = describer(images, sizes)
    assert patches.shape == (3, 256, 256) and patches.dtype == own.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(patches, axis=-1), 1, atol=1e-5)
    tokens = describer.tokens(images, sizes)[0].numpy()
    for token, (width, height), ours in zip(tokens, sizes, own, strict=True):
        mean = token[patch_mask(int(width), int(height))].mean(0) - center
        np.testing.assert_allclose(ours, mean / np.linalg.norm(mean), atol=1e-5)


def test_pooling_leaves_the_padding_out():
    tokens = torch.randn(1, 256, 8)
    mask = patch_masks(torch.tensor([[224, 112]]), 224)
    assert mask.sum() == 8 * 16
    changed = tokens.clone()
    changed[0, 128:] = 100
    assert torch.equal(pooled(tokens, mask), pooled(changed, mask))


def test_a_whitening_or_encoder_changes_the_width(backbone):
    images, sizes = crops(0)[0], np.full((3, 2), 224)
    tokens = backbone(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(sizes))[0]
    whitening = fit_whitening(tokens.flatten(0, 1).numpy(), 32)
    for describer in (Describer(backbone, whitening=whitening), Describer(backbone, Encoder(256, 32))):
        patches = describer(images, sizes)[0]
        assert patches.shape == (3, 256, 32) and describer.width == 32
        np.testing.assert_allclose(np.linalg.norm(patches, axis=-1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="encoder is for tokens of width 1024"):
        Describer(backbone, Encoder(1024, 256))
    with pytest.raises(ValueError, match="one of them"):
        Describer(backbone, Encoder(256, 32), whitening)


def test_switches_of_normalisation(tmp_path):
    torch.save(original_names(tiny()), tmp_path / "w.pth")
    vit = load_backbone("dinov2", str(tmp_path / "w.pth"), image_size=56, heads=4)
    images, sizes = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8), np.full((2, 2), 56)
    plain, normalised = Describer(vit)(images, sizes)[1], Describer(vit, normalize_global=True)(images, sizes)[1]
    np.testing.assert_allclose(normalised, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    scaled = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = vit(torch.from_numpy(scaled).permute(0, 3, 1, 2).float(), torch.from_numpy(sizes))[1].numpy()
    switched = Describer(vit, imagenet_normalization=True)(images, sizes)[1]
    np.testing.assert_allclose(switched, expected, atol=1e-4)
    assert np.abs(switched - plain).max() > 1e-2


def test_images_of_another_size_are_an_error(backbone):
    with pytest.raises(ValueError, match="letterbox to 224 px"):
        backbone(torch.zeros(1, 3, 210, 210), torch.tensor([[210, 210]]))
