"""Backbones: letterboxed images to patch tokens and a global descriptor, behind one interface.

| name | width D | global descriptor | weights |
| --- | --- | --- | --- |
| `xfeat` | 256 | none of its own: pooled patches | inside a package, 6 MB |
| `dinov2_vits14`, `_vitb14`, `_vitl14`, `_vitg14` | 384, 768, 1024, 1536 | CLS token | hub, folder or file |
| the same with `_reg` after it: registers | the same | CLS token | hub, folder or file |
| `dinov2` | that of the weights | CLS token | hub, folder or file, to be given |
"""

import torch

from vop.models import weights as weight_files


class Backbone:
    """A frozen image model. Subclasses define `features`; `load_backbone` builds them.

    Attributes:
        name: as given to `load_backbone`.
        patch_size: side of a patch in pixels, 14.
        width: D, numbers per patch token.
        global_width: G, numbers of the global descriptor.
        global_kind: "cls" if the model has a global descriptor of its own, "pooled" if it is made of the patch tokens
            (`vop.models.descriptor.pooled`).
        weights_sha256: hash of the weights' content.
    """

    patch_size = 14
    width: int
    global_width: int
    global_kind: str

    def __init__(self, name: str, weights_sha256: str, image_size: int, device: str, precision: str):
        self.name, self.weights_sha256, self.image_size = name, weights_sha256, image_size
        self.device, self.precision = torch.device(device), precision

    def features(self, images: torch.Tensor, scaled_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and global descriptor as in `__call__`, for inputs already checked and on the right device."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, scaled_sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute patch tokens and global descriptors.

        Args:
            images: (B, 3, S, S) float32 in [0, 1], letterboxed, S the `image_size` of the backbone.
            scaled_sizes: (B, 2) width and height in pixels of the image inside the letterbox.

        Returns:
            Tokens (B, P, D) float32, patches row by row, and the global descriptor (B, G) float32, or None where
            `global_kind` is "pooled".
        """
        expected = (len(images), 3, self.image_size, self.image_size)
        if tuple(images.shape) != expected or tuple(scaled_sizes.shape) != (len(images), 2):
            raise ValueError(
                f"images {tuple(images.shape)} and sizes {tuple(scaled_sizes.shape)}, but {self.name} was loaded for "
                f"{expected} and {(len(images), 2)}: letterbox to {self.image_size} px, or load it for another size"
            )
        half = self.precision != "float32"
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision), enabled=half):
            tokens, own = self.features(images.to(self.device), scaled_sizes.to(self.device))
        return tokens.float(), None if own is None else own.float()

    def describe(self) -> dict:
        """What decides the numbers this backbone computes; equal dictionaries mean interchangeable descriptors."""
        names = "name weights_sha256 image_size patch_size width global_width global_kind precision"
        return {name: getattr(self, name) for name in names.split()}


def load_backbone(
    name: str,
    weights: str | None = None,
    block: int | None = None,
    image_size: int = 224,
    device: str = "cpu",
    precision: str | None = None,
    heads: int | None = None,
) -> Backbone:
    """Build a backbone with its weights.

    Args:
        name: see the table of this module.
        weights: a local file or folder, a URI of a file, or a Hugging Face id; None: the published weights of `name`.
        block: for DINOv2, the transformer block (from 0) whose layer-normed tokens are taken; None: the last one.
        image_size: side of the letterboxed images, pixels; a multiple of 14.
        device: as torch names it.
        precision: "float32", "bfloat16" or "float16"; None: bfloat16 on a GPU, float32 on a CPU.
        heads: attention heads of weights for which neither `name` nor a config.json tells; None: one per 64 numbers.

    Raises `ValueError` for settings that do not fit each other, `WeightsError` for weights that do not fit `name`.
    """
    if image_size <= 0 or image_size % Backbone.patch_size:
        raise ValueError(f"image_size is {image_size}, but must be a positive multiple of the patch size, 14")
    precision = precision or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    if torch.device(device).type == "cpu" and precision != "float32":
        raise ValueError(f"precision is {precision}, but a CPU computes in float32 here: set precision to null")
    path = fetch_weights(name, weights)
    # imported here because transformers takes seconds to import, which the default backbone does not need
    if name == "xfeat":
        from vop.models.xfeat import XFeat

        if block is not None:
            raise ValueError(f"block is {block}, but xfeat has no transformer blocks: set block to null")
        return XFeat(path, image_size=image_size, device=device, precision=precision)
    from vop.models.dinov2 import Dinov2

    return Dinov2(name, path, block=block, heads=heads, image_size=image_size, device=device, precision=precision)


def fetch_weights(name: str, weights: str | None = None) -> str:
    """Bring the weights of a backbone onto this machine and return their path; once per node, before its workers.

    Arguments and errors as in `load_backbone`.
    """
    if name == "xfeat":
        from vop.models.xfeat import published_weights
    else:
        from vop.models.dinov2 import published_weights
    return weight_files.fetch(published_weights(name) if weights is None else weights)
