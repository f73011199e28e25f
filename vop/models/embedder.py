"""The models of a run over decoded shards: what they are, what they estimate on a sample, and what they describe."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from vop.config import Config
from vop.embedding import decode_shard
from vop.image import ImageError
from vop.models.backbone import Backbone, load_backbone
from vop.models.descriptor import Describer, patch_masks, unit
from vop.models.encoder import Encoder, load_encoder
from vop.models.whitening import Whitening, fit_whitening
from vop.quantised import float_type, stored
from vop.store import EmbeddingStore, tensor_column, tensor_values

# Replicas fill the cores of a machine, not threads: that is faster, and the last bits of the descriptors then depend on
# neither the number of replicas nor that of cores.
THREADS = 1


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
    torch.set_num_threads(THREADS)
    embedding = config.embedding
    plain = build_describer(config, {})
    backbone, encoder = plain.backbone, plain.encoder
    blank = np.zeros((1, embedding.image_size, embedding.image_size, 3), np.uint8)
    tokens, global_descriptor = plain.tokens(blank, np.full((1, 2), embedding.image_size))
    shapes = {
        "patches": tokens.shape[1],
        "width": (embedding.whiten or plain.width) if embedding.patches else 0,
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
    } | ({} if embedding.patches else {"patches": False})
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
        torch.set_num_threads(THREADS)
        self.config, manifest = config.embedding, store.manifest
        self.describer = build_describer(config, store.calibration())
        P, E, G = manifest["patches"], manifest["width"], manifest["global_width"]
        self.shapes = {"global": (G,)} | ({"patches": (P, E)} if self.config.patches else {})
        if self.config.tokens:
            self.shapes["tokens"] = P, manifest["token_width"]

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Replace `pixels` by global (n, G), patches (n, P, E) and tokens (n, P, D), as asked; bad rows hold zeros."""
        pixels, scaled, fine = _decoded_images(decoded)
        types = {name: float_type(self.config.dtype) for name in self.shapes} | {"patches": self.config.dtype}
        out = {name: np.zeros((len(pixels), *shape), types[name]) for name, shape in self.shapes.items()}
        for start in range(0, len(fine), self.config.batch_size):
            batch = fine[start : start + self.config.batch_size]
            tokens, global_descriptor = self.describer.tokens(pixels[batch], scaled[batch])
            out["global"][batch] = global_descriptor.cpu().numpy()
            if self.config.patches:
                patches = unit(self.describer.embed(tokens, scaled[batch])).cpu().numpy()
                out["patches"][batch] = stored(patches, self.config.dtype)
            if self.config.tokens:
                out["tokens"][batch] = tokens.cpu().numpy()
        described = decoded.drop_columns(["pixels"])
        for name, values in out.items():
            described = described.append_column(name, tensor_column(values))
        return described
