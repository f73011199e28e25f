"""DINOv2 as a backbone, computed by `transformers`, with weights in Hugging Face's or the original's naming.

DINOv2: Learning Robust Visual Features without Supervision, Oquab et al., TMLR 2024.
Registers: Vision Transformers Need Registers, Darcet et al., ICLR 2024.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.utils import logging as transformers_logging

from vop.models import weights as weight_files
from vop.models.backbone import Backbone
from vop.models.weights import WeightsError

# name: width, depth, heads, name on the hub
ARCHITECTURES = {
    "vits14": (384, 12, 6, "small"),
    "vitb14": (768, 12, 12, "base"),
    "vitl14": (1024, 24, 16, "large"),
    "vitg14": (1536, 40, 24, "giant"),
}
NAMES = ["dinov2", *(f"dinov2_{size}{suffix}" for size in ARCHITECTURES for suffix in ("", "_reg"))]
MODELS = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
CONFIGS = {"dinov2": Dinov2Config, "dinov2_with_registers": Dinov2WithRegistersConfig}
CHECKPOINT_PREFIX = "extractor.descriptor.net."  # where a training checkpoint of the original keeps its backbone

# the original's names as patterns, and the names on the hub; q, k and v are split apart in `to_hub_names`
RENAMES = [
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
]


class Dinov2(Backbone):
    """A DINOv2 vision transformer: layer-normed patch tokens and CLS token of its last or a chosen block."""

    global_kind = "cls"

    def __init__(
        self,
        name: str,
        path: str,
        block: int | None = None,
        heads: int | None = None,
        image_size: int = 224,
        device: str = "cpu",
        precision: str = "float32",
    ):
        super().__init__(name, weight_files.content_hash(path), image_size, device, precision)
        self.model = load_model(name, path, heads)
        depth = self.model.config.num_hidden_layers
        self.block = depth - 1 if block is None else block
        if not 0 <= self.block < depth:
            raise ValueError(f"block is {block}, but {name} has blocks 0 to {depth - 1}")
        # blocks after the chosen one are dropped, so that the final layer norm applies to its output: both the patch
        # tokens and CLS are those of get_intermediate_layers(norm=True) in the original
        self.model.encoder.layer = self.model.encoder.layer[: self.block + 1]
        self.registers = getattr(self.model.config, "num_register_tokens", 0)
        embeddings = self.model.embeddings
        embeddings.position_embeddings = nn.Parameter(
            interpolate_positions(
                embeddings.position_embeddings.detach(), image_size // self.patch_size, antialias=self.registers > 0
            )
        )
        self.width = self.global_width = self.model.config.hidden_size
        self.model.eval().requires_grad_(False).to(self.device)

    def features(self, images: torch.Tensor, scaled_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens (B, P, D) and the CLS token (B, D), not normalised to unit length."""
        tokens = self.model(pixel_values=images).last_hidden_state
        return tokens[:, 1 + self.registers :], tokens[:, 0]

    def describe(self) -> dict:
        """As in `Backbone`, with the index of the block and the number of attention heads."""
        return super().describe() | {"block": self.block, "heads": self.model.config.num_attention_heads}


def published_weights(name: str) -> str:
    """The Hugging Face id of the published weights of a backbone."""
    _check_name(name)
    if name == "dinov2":
        raise WeightsError("the backbone 'dinov2' takes its shape from its weights: set `weights`, or name one of: "
                           + ", ".join(NAMES[1:]))  # fmt: skip
    size, _, suffix = name.removeprefix("dinov2_").partition("_")
    return f"facebook/dinov2-{'with-registers-' if suffix else ''}{ARCHITECTURES[size][3]}"


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backbone is {name!r}, but must be one of: xfeat, {', '.join(NAMES)}")


def interpolate_positions(positions: torch.Tensor, side: int, antialias: bool) -> torch.Tensor:
    """Resample a position embedding, (1, 1 + n*n, D), to a grid of side x side patches, as the original does.

    Bicubic. Models without registers scale by (side + 0.1) / n, those with registers to the size itself with
    antialiasing: the two settings under which the original published its models. The result differs from that of
    `transformers` by up to a few percent of a token, and trained encoders saw the original's.
    """
    own_side = math.isqrt(positions.shape[1] - 1)
    if own_side == side:
        return positions
    grid = positions[:, 1:].reshape(1, own_side, own_side, -1).permute(0, 3, 1, 2)
    if antialias:
        grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    else:
        scale = (side + 0.1) / own_side
        grid = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_model(name: str, path: str, heads: int | None = None) -> nn.Module:
    """Build the transformer `name` with the weights at a local path, every one of which must fit.

    Raises `WeightsError` with the names of missing, unexpected and mis-shaped weights and the likely cause.
    """
    _check_name(name)
    tensors = to_hub_names(weight_files.read_tensors(path))
    found = config_of(tensors, heads, path)
    if name != "dinov2":
        config = named_config(name, found)
    elif (Path(path) / "config.json").is_file():
        config = folder_config(path)
    else:
        config = found
    with _quiet():
        model, report = MODELS[config.model_type].from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # reported below together with the rest
            output_loading_info=True,
        )
    _require_all(report, name, path, config, found)
    return model


def to_hub_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights from the original's names to those on the hub; weights already named so pass unchanged.

    A training checkpoint of the original keeps only its backbone.
    """
    if any(name.startswith(CHECKPOINT_PREFIX) for name in tensors):
        inside = (name for name in tensors if name.startswith(CHECKPOINT_PREFIX))
        tensors = {name.removeprefix(CHECKPOINT_PREFIX): tensors[name] for name in inside}
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            renamed[name] = tensor
    return renamed


def config_of(tensors: dict[str, torch.Tensor], heads: int | None = None, source: str = "the file"):
    """The architecture that weights in the hub's naming belong to: width, depth, registers, kind of MLP, grid.

    The number of heads leaves no trace in the weights: 64 numbers per head, as in every published model, unless given.
    """
    try:
        width = tensors["embeddings.cls_token"].shape[-1]
        positions = tensors["embeddings.position_embeddings"].shape[1] - 1
    except KeyError as error:
        raise WeightsError(
            f"{source} does not hold a DINOv2: {error} is not among its {len(tensors)} weights, such as "
            f"{', '.join(list(tensors)[:3])}"
        ) from None
    if math.isqrt(positions) ** 2 != positions:
        raise WeightsError(f"{source}: {positions} position embeddings do not form a square grid")
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))]
    settings = {
        "hidden_size": width,
        "num_hidden_layers": max(blocks, default=-1) + 1,
        "num_attention_heads": heads or max(1, width // 64),
        "image_size": math.isqrt(positions) * Backbone.patch_size,
        "patch_size": Backbone.patch_size,
        "use_swiglu_ffn": any(".mlp.weights_in." in name or ".mlp.gate_proj." in name for name in tensors),
    }
    registers = tensors.get("embeddings.register_tokens")
    if registers is None:
        return Dinov2Config(**settings)
    return Dinov2WithRegistersConfig(**settings, num_register_tokens=registers.shape[1])


def named_config(name: str, found):
    """The architecture of a published model, with the position grid of the weights at hand."""
    size, _, suffix = name.removeprefix("dinov2_").partition("_")
    width, depth, heads, _ = ARCHITECTURES[size]
    settings = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": found.image_size,
        "patch_size": Backbone.patch_size,
        "use_swiglu_ffn": size == "vitg14",
    }
    return Dinov2WithRegistersConfig(**settings, num_register_tokens=4) if suffix else Dinov2Config(**settings)


def folder_config(path: str):
    """The architecture that the config.json of a folder in Hugging Face layout describes."""
    model_type = json.loads((Path(path) / "config.json").read_text()).get("model_type")
    if model_type not in CONFIGS:
        raise WeightsError(f"{path}: config.json is of a {model_type!r} model, but must be of one of {list(CONFIGS)}")
    config = CONFIGS[model_type].from_pretrained(path)
    if config.patch_size != Backbone.patch_size:
        raise WeightsError(f"{path}: config.json has patch_size {config.patch_size}, but patches are of 14 pixels here")
    return config


def _require_all(report: dict, name: str, path: str, config, found) -> None:
    lists = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "mis-shaped": [f"{key} {tuple(has)} instead of {tuple(needs)}" for key, has, needs in
                       sorted(report["mismatched_keys"], key=lambda entry: entry[0])],
    }  # fmt: skip
    problems = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})"
                for kind, keys in lists.items() if keys]  # fmt: skip
    if problems:
        cause = "the file is damaged, or of a changed architecture"
        if _shape(config) != _shape(found):
            cause = f"the weights are of a {_shape(found)}, {name} is a {_shape(config)}; name the backbone accordingly"
        raise WeightsError(f"{path} does not fit {name}: {'; '.join(problems)}. Likely cause: {cause}")


def _shape(config) -> str:
    registers = getattr(config, "num_register_tokens", 0)
    mlp = "SwiGLU" if config.use_swiglu_ffn else "MLP"
    return f"ViT of width {config.hidden_size}, {config.num_hidden_layers} blocks, {registers} registers, {mlp}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no load report of `transformers`: every worker loads, and misfits are raised here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
