"""From letterboxed images to what a store keeps: unit patch descriptors and a global descriptor."""

import numpy as np
import torch
from torch import nn

from vop.image import patch_mask
from vop.models.backbone import Backbone
from vop.models.encoder import Encoder
from vop.models.whitening import Whitening

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-12  # shorter vectors are divided by this instead of by their length


class Describer:
    """All models of a run as one plain callable, built once by each worker.

    Args:
        backbone: computes tokens (B, P, D).
        encoder: trained head, D to E. At most one of `encoder` and `whitening`; without both E = D.
        whitening: PCA whitening, D to E.
        center: (D,) float32, mean token of the collection, subtracted from the pooled tokens of a backbone without a
            global descriptor of its own; None: nothing is subtracted.
        normalize_global: L2-normalise the CLS token (pooled tokens always are).
        imagenet_normalization: subtract the ImageNet mean and divide by its deviation first, padding included.

    Images of a batch do not influence each other. On a CPU the same batch gives the same bytes for a fixed number of
    threads; another batch size or number of threads moved XFeat by up to 3e-7 and DINOv2 not at all.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder | None = None,
        whitening: Whitening | None = None,
        center: np.ndarray | None = None,
        normalize_global: bool = False,
        imagenet_normalization: bool = False,
    ):
        if encoder is not None and whitening is not None:
            raise ValueError("an encoder and a whitening were given: use one of them")
        expects = {"encoder": encoder and encoder.input_dim, "whitening": whitening and len(whitening.mean),
                   "center": None if center is None else len(center)}  # fmt: skip
        for part, width in expects.items():
            if width not in (None, backbone.width):
                raise ValueError(f"the {part} is for tokens of width {width}, but those of {backbone.name} have "
                                 f"{backbone.width}: use the backbone that the {part} was made with")  # fmt: skip
        self.backbone, self.whitening = backbone, whitening
        self.encoder = None if encoder is None else encoder.to(backbone.device).eval()
        self.center = None if center is None else torch.tensor(np.asarray(center, np.float32)).to(backbone.device)
        self.normalize_global, self.imagenet_normalization = normalize_global, imagenet_normalization

    @property
    def width(self) -> int:
        """E, numbers per patch descriptor."""
        if self.encoder is not None:
            return self.encoder.descriptor_dim
        return self.backbone.width if self.whitening is None else self.whitening.projection.shape[1]

    @torch.inference_mode()
    def tokens(self, images: np.ndarray | torch.Tensor, scaled_sizes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The backbone's tokens (B, P, D) and its global descriptor (B, G), both float32 on its device.

        Arguments as in `__call__`. The global descriptor of a pooling backbone is made here, too.
        """
        sizes = torch.from_numpy(np.array(scaled_sizes))
        tokens, own = self.backbone(self._prepare(images), sizes)
        if own is None:
            return tokens, pooled(tokens, patch_masks(sizes, self.backbone.image_size).to(tokens.device), self.center)
        return tokens, unit(own) if self.normalize_global else own

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | torch.Tensor, scaled_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Describe a batch.

        Args:
            images: (B, S, S, 3) uint8 array, or (B, 3, S, S) float32 tensor in [0, 1]; letterboxed RGB.
            scaled_sizes: (B, 2) integers, width and height in pixels of the image inside the letterbox.

        Returns:
            Patch descriptors (B, P, E), each of unit length (an all-zero one stays zero), and global descriptors
            (B, G); float32 arrays.
        """
        tokens, global_descriptor = self.tokens(images, scaled_sizes)
        return unit(self.embed(tokens, scaled_sizes)).cpu().numpy(), global_descriptor.cpu().numpy()

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor, scaled_sizes: np.ndarray) -> torch.Tensor:
        """Tokens (B, P, D) to descriptors (B, P, E) by the encoder or the whitening, not yet of unit length."""
        if self.encoder is not None:
            return self.encoder(tokens, torch.from_numpy(np.array(scaled_sizes)).to(tokens.device))
        return tokens if self.whitening is None else self.whitening.apply(tokens)

    def _prepare(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.array(images))  # a copy: arrays from Arrow are read-only, torch has no such
        if images.dtype == torch.uint8:
            # a float32 division, bit for bit the preprocessing that published encoders were trained with
            images = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        if self.imagenet_normalization:
            mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            images = (images - mean) / std
        return images.contiguous()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., E) divided by their length, or by 1e-12 if that is greater."""
    return nn.functional.normalize(vectors, dim=-1, eps=EPSILON)


def patch_masks(scaled_sizes: torch.Tensor, image_size: int) -> torch.Tensor:
    """`vop.image.patch_mask` of a batch: (B, P) bool from (B, 2) widths and heights."""
    return torch.from_numpy(
        np.stack([patch_mask(width, height, image_size) for width, height in scaled_sizes.tolist()])
    )


def pooled(tokens: torch.Tensor, mask: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
    """Global descriptors (B, D) from patch tokens: their mean over the image, less the centre, at unit length.

    Args:
        tokens: (B, P, D) float32.
        mask: (B, P) bool, True where a patch is image.
        center: (D,) mean token of the collection. What all images share says nothing about any of them.

    The length of a mean tells how uniform an image is, and by plain inner products the varied ones would lose to the
    uniform ones: normalised, the nearest image overlapped for 96% of queries instead of 85% (93 frames of an office).
    """
    weights = mask.to(tokens.dtype)
    mean = torch.einsum("bp,bpd->bd", weights, tokens) / weights.sum(1, keepdim=True)
    return unit(mean if center is None else mean - center)
