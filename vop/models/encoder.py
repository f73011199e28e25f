"""The encoder: the trained head that turns backbone tokens into patch descriptors whose similarity predicts overlap.

Breaking the Frame: Visual Place Recognition by Overlap Prediction, Wei et al., WACV 2025.
"""

import math

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as to_safetensors
from torch import nn

from vop import files
from vop.image import patch_centers
from vop.models.weights import WeightsError, read_checkpoint

FORMAT_VERSION = 1
MATCHER_PREFIX = "matcher."  # where a training checkpoint of the original keeps the encoder


class Encoder(nn.Module):
    """`Linear(tokens) + MLP(where the patch lies)`.

    Args:
        input_dim: D, width of the backbone's tokens.
        descriptor_dim: E, width of the descriptors.
        dropout: probability; at 0 there is no Dropout module, which shifts the index of the last Linear, as in the
            original's checkpoints.

    `weights_sha256` is the hash of the file it was loaded from, None for a new one; `trained_with` is what the training
    run noted beside it.
    """

    def __init__(self, input_dim: int = 1024, descriptor_dim: int = 256, dropout: float = 0.5):
        super().__init__()
        self.input_dim, self.descriptor_dim, self.dropout = input_dim, descriptor_dim, dropout
        self.weights_sha256: str | None = None
        self.trained_with: dict = {}
        hidden = 2 * descriptor_dim
        self.input_proj = nn.Linear(input_dim, descriptor_dim)
        self.keypoint_encoder = nn.Sequential(
            nn.Linear(2, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            *([nn.Dropout(dropout)] if dropout > 0 else []),
            nn.Linear(hidden, descriptor_dim),
        )

    def forward(self, tokens: torch.Tensor, scaled_sizes: torch.Tensor) -> torch.Tensor:
        """Descriptors (B, P, E), not normalised, from tokens (B, P, D) and (B, 2) widths and heights in pixels.

        Patches are those of a square letterbox, row by row; sizes are of the image inside it. In training, images of
        one size share what is dropped out: drawn for each, as in the original, it takes 4 times as long on a CPU.
        """
        if self.training:  # images of one size have the same places, and what is dropped of them is drawn once
            distinct, of_image = torch.unique(scaled_sizes, dim=0, return_inverse=True)
            places = self.keypoint_encoder(normalized_centers(tokens.shape[1], distinct))
            places = places.index_select(0, of_image)  # indexing by [] sums its gradients in any order
        else:
            places = self.keypoint_encoder(normalized_centers(tokens.shape[1], scaled_sizes))
        return self.input_proj(tokens) + places


def normalized_centers(patches: int, scaled_sizes: torch.Tensor) -> torch.Tensor:
    """Patch centres relative to the image: (B, P, 2) x and y, 0 in its middle, 1 at the end of its longer side.

    Args:
        patches: P, a square number: the patches of a letterboxed image, row by row.
        scaled_sizes: (B, 2) width and height in pixels of the image inside the letterbox, padding not counted.
    """
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"{patches} patches do not form a square grid; pass all patches of the letterboxed image")
    centers = torch.from_numpy(patch_centers(14 * math.isqrt(patches))).to(scaled_sizes.device)
    sizes = scaled_sizes.to(torch.float32)[:, None]
    return (centers - sizes / 2) / (sizes.amax(-1, keepdim=True) / 2)


def load_encoder(path: str) -> Encoder:
    """Load an encoder for inference (`eval`, on the CPU).

    Args:
        path: a folder or URI written by `save_encoder`, or a `checkpoint_best.tar` of the original's training.

    Raises `WeightsError` if the weights do not fit what the file says of itself, or the file would run code.
    """
    folder = files.exists(files.join(path, "config.json"))
    settings, weights, trained_with = _read_folder(path) if folder else _read_original(path)
    encoder = Encoder(**settings)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(f"{path}: the encoder's weights do not fit its settings {settings}: {error}") from error
    encoder.weights_sha256 = files.sha256(files.join(path, "model.safetensors") if folder else path)
    encoder.trained_with = trained_with
    return encoder.eval().requires_grad_(False)


def save_encoder(encoder: Encoder, path: str, config: dict) -> None:
    """Write an encoder to a folder or URI: `model.safetensors` and `config.json`.

    `config` (plain values) is kept as `trained_with`: the backbone's description, the training run's settings.
    """
    settings = {name: getattr(encoder, name) for name in ("input_dim", "descriptor_dim", "dropout")}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    files.write_bytes(files.join(path, "model.safetensors"), to_safetensors(weights))
    # the settings come last: a folder with a config.json is a whole encoder
    files.write_json(files.join(path, "config.json"), {"format_version": FORMAT_VERSION, **settings,
                                                       "trained_with": config})  # fmt: skip


def _read_folder(path: str) -> tuple[dict, dict[str, torch.Tensor], dict]:
    config = files.read_json(files.join(path, "config.json"))
    if config.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{path}: config.json has format_version {config.get('format_version')!r}, this version of vop reads "
            f"{FORMAT_VERSION}: is it the folder of an encoder, and written by this or an older version?"
        )
    settings = {name: config[name] for name in ("input_dim", "descriptor_dim", "dropout")}
    weights = load_safetensors(files.read_bytes(files.join(path, "model.safetensors")))
    return settings, weights, config["trained_with"]


def _read_original(path: str) -> tuple[dict, dict[str, torch.Tensor], dict]:
    if not files.exists(path):
        raise WeightsError(f"no encoder at {files.absolute(path)}: give a folder with config.json and "
                           "model.safetensors, or a checkpoint_best.tar")  # fmt: skip
    checkpoint = read_checkpoint(path)
    try:
        conf = checkpoint["conf"]["model"]["matcher"]
        model = checkpoint["model"]
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not a training checkpoint of the original: it has no {error} entry") from error
    if conf.get("add_cls_tokens"):
        raise WeightsError(f"{path} was trained with add_cls_tokens, which changes its inputs and is not supported")
    settings = {
        "input_dim": conf.get("input_dim", 1024),
        "descriptor_dim": conf.get("descriptor_dim", 256),
        "dropout": conf.get("dropout_prob", 0.5),
    }
    weights = {
        key.removeprefix(MATCHER_PREFIX): value for key, value in model.items() if key.startswith(MATCHER_PREFIX)
    }
    return settings, weights, {}
