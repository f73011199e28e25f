"""From image files to rows of descriptors: the plain callables that the embedding stage distributes.

A shard travels as one Arrow table: planned rows, then decoded rows, then described rows. An image that cannot be read
keeps its row, with the reason in `error`, until the shard is written.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from vop import files
from vop.config import Config
from vop.image import ImageError, decode, letterbox
from vop.models.backbone import Backbone, load_backbone
from vop.models.descriptor import Describer, patch_masks, unit
from vop.models.encoder import Encoder, load_encoder
from vop.models.whitening import Whitening, fit_whitening
from vop.store import EmbeddingStore, tensor_column, tensor_values


def content_hash(data: bytes) -> str:
    """Hash of a file's bytes, 32 hexadecimal digits: tells a changed file from a touched one."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_file(path: str) -> str | None:
    """`content_hash` of a file, None if it cannot be read."""
    try:
        return content_hash(files.read_bytes(path))
    except OSError:
        return None


def decode_shard(planned: pa.Table, image_size: int, max_pixels: int) -> pa.Table:
    """Read, decode and letterbox the images of a shard.

    `planned` has image_id, name, path, shard; added are width, height, scaled_width, scaled_height (pixels, of the
    upright image), content, error (null if the image is fine) and pixels (n, S, S, 3) uint8.
    """
    count = planned.num_rows
    pixels = np.zeros((count, image_size, image_size, 3), np.uint8)
    sizes = np.zeros((count, 4), np.int64)
    contents, errors = [None] * count, [None] * count
    for i, path in enumerate(planned["path"].to_pylist()):
        try:
            data = files.read_bytes(path)
            contents[i] = content_hash(data)
            rgb = decode(data, max_pixels)
            pixels[i], scaled = letterbox(rgb, image_size)
            sizes[i] = rgb.shape[1], rgb.shape[0], *scaled
        except ImageError as error:
            errors[i] = str(error)
        except OSError as error:
            errors[i] = f"cannot read the file: {error.strerror or error}"
    decoded = {name: sizes[:, i] for i, name in enumerate(["width", "height", "scaled_width", "scaled_height"])}
    decoded |= {"content": pa.array(contents, pa.string()), "error": pa.array(errors, pa.string())}
    decoded["pixels"] = tensor_column(pixels)
    for name, values in decoded.items():
        planned = planned.append_column(name, pa.array(values) if isinstance(values, np.ndarray) else values)
    return planned


@dataclass(frozen=True)
class Calibration:
    """What a run's models are, and what was estimated with them on a sample.

    features: what makes the descriptors; two stores with equal features may be searched together. shapes: P, E, G, D
    and the type stored. arrays: the centre of the tokens and the whitening, where the config has them.
    """

    features: dict
    shapes: dict
    arrays: dict[str, np.ndarray]


def load_models(config: Config) -> tuple[Backbone, Encoder | None]:
    """The backbone and the encoder (or None) that a config names; on a GPU where this process sees one."""
    embedding = config.embedding
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(
        config.backbone, config.weights, config.block, embedding.image_size, device, embedding.precision
    )
    return backbone, load_encoder(config.encoder) if config.encoder else None


def build_describer(config: Config, arrays: dict[str, np.ndarray]) -> Describer:
    """The models of a config with the calibration of a store."""
    whitening = {name[10:]: values for name, values in arrays.items() if name.startswith("whitening_")}
    return Describer(
        *load_models(config),
        Whitening(**whitening) if whitening else None,
        arrays.get("center"),
        config.embedding.normalize_global,
        config.embedding.imagenet_normalization,
    )


def calibrate(config: Config, sample: pa.Table | None) -> Calibration:
    """Load the models, say what they are, and estimate on `sample` (name, path, shard ...) what they need of it.

    Without a sample nothing is estimated: enough to compare the config with an existing store.
    """
    embedding = config.embedding
    plain = build_describer(config, {})
    backbone, encoder = plain.backbone, plain.encoder
    blank = np.zeros((1, embedding.image_size, embedding.image_size, 3), np.uint8)
    tokens, global_descriptor = plain.tokens(blank, np.full((1, 2), embedding.image_size))
    shapes = {
        "patches": tokens.shape[1],
        "width": embedding.whiten or plain.width,
        "global_width": global_descriptor.shape[1],
        "token_width": tokens.shape[2],
        "dtype": embedding.dtype,
    }
    arrays = {}
    centred = backbone.global_kind == "pooled"
    if sample is not None and (centred or embedding.whiten):
        tokens = _sampled_tokens(config, plain, sample)
        if centred:
            arrays["center"] = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
        if embedding.whiten:
            whitening = fit_whitening(tokens, embedding.whiten).arrays()
            arrays |= {f"whitening_{name}": values for name, values in whitening.items()}
    described = backbone.describe()
    shapes["precision"] = described.pop("precision")  # noted, but rounding does not make descriptors another kind
    features = {
        "backbone": described,
        "encoder": {"weights_sha256": encoder.weights_sha256, "width": encoder.descriptor_dim} if encoder else None,
        "preprocessing": {
            "image_size": embedding.image_size,
            "imagenet_normalization": embedding.imagenet_normalization,
        },
        "whiten": embedding.whiten,
        "normalize_global": embedding.normalize_global,
        "dtype": embedding.dtype,
        "tokens": embedding.tokens,
    }
    return Calibration(features, shapes, arrays)


def _sampled_tokens(config: Config, describer: Describer, sample: pa.Table) -> np.ndarray:
    """Tokens (n, D) of the image patches of the readable images of a sample."""
    size, kept = config.embedding.image_size, []
    for start in range(0, sample.num_rows, config.embedding.batch_size):
        decoded = decode_shard(sample.slice(start, config.embedding.batch_size), size, config.embedding.max_pixels)
        pixels, scaled, fine = _decoded_images(decoded)
        if len(fine):
            tokens, _ = describer.tokens(pixels[fine], scaled[fine])
            kept.append(tokens[patch_masks(torch.as_tensor(scaled[fine]), size)].cpu().numpy())
    if not kept:
        reasons = "; ".join(sorted(set(decoded["error"].to_pylist())))
        raise ImageError(f"none of {sample.num_rows} sampled images can be read, the last ones because: {reasons}")
    return np.concatenate(kept)


def _decoded_images(decoded: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, scaled sizes (n, 2), and the rows without an error."""
    scaled = np.stack([decoded["scaled_width"].to_numpy(), decoded["scaled_height"].to_numpy()], axis=1)
    return tensor_values(decoded["pixels"]), scaled, np.flatnonzero(decoded["error"].is_null().to_numpy())


class Embedder:
    """Turns decoded shards into described ones; built once in every worker."""

    def __init__(self, config: Config, store: EmbeddingStore):
        self.config, manifest = config.embedding, store.manifest
        self.describer = build_describer(config, store.calibration())
        P, E, G = manifest["patches"], manifest["width"], manifest["global_width"]
        self.shapes = {"global": (G,), "patches": (P, E)}
        if self.config.tokens:
            self.shapes["tokens"] = P, manifest["token_width"]

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Replace `pixels` by global (n, G), patches (n, P, E) and perhaps tokens (n, P, D); bad rows hold zeros."""
        pixels, scaled, fine = _decoded_images(decoded)
        out = {name: np.zeros((len(pixels), *shape), self.config.dtype) for name, shape in self.shapes.items()}
        for start in range(0, len(fine), self.config.batch_size):
            batch = fine[start : start + self.config.batch_size]
            tokens, global_descriptor = self.describer.tokens(pixels[batch], scaled[batch])
            out["global"][batch] = global_descriptor.cpu().numpy()
            out["patches"][batch] = unit(self.describer.embed(tokens, scaled[batch])).cpu().numpy()
            if self.config.tokens:
                out["tokens"][batch] = tokens.cpu().numpy()
        described = decoded.drop_columns(["pixels"])
        for name, values in out.items():
            described = described.append_column(name, tensor_column(values))
        return described


class ShardWriter:
    """Writes described shards and their receipts into a store."""

    def __init__(self, store: EmbeddingStore):
        self.store = store

    def __call__(self, described: pa.Table) -> pa.Table:
        """Write one shard; returns its receipt's counts as a one-row table."""
        number = described["shard"][0].as_py()
        bad = described.filter(described["error"].is_valid())
        quarantined = [
            {"image_id": line["image_id"], "name": line["name"], "reason": line["error"], "content": line["content"]}
            for line in bad.select(["image_id", "name", "error", "content"]).to_pylist()
        ]
        good = described.filter(described["error"].is_null()).drop_columns(["path", "shard", "error"])
        receipt = self.store.write_shard(number, good, quarantined)
        return pa.table({"shard": [number], "ok": [receipt["ok"]], "quarantined": [len(quarantined)]})
