"""Models on a CUDA device against the CPU. Imports neither Ray nor FAISS."""

import numpy as np
import pytest
import torch
from skimage import data

from vop.image import letterbox
from vop.models.backbone import load_backbone
from vop.models.descriptor import Describer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(scope="module")
def batch():
    images, sizes = zip(
        *(letterbox(picture) for picture in (data.astronaut(), data.coffee(), data.chelsea())), strict=True
    )
    return np.stack(images), np.array(sizes)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.9999), ("bfloat16", 0.99), ("float16", 0.999)])
def test_descriptors_of_a_gpu_are_those_of_the_cpu(batch, precision, bound):
    patches, global_descriptor = Describer(load_backbone("xfeat"))(*batch)
    on_gpu = Describer(load_backbone("xfeat", device="cuda", precision=precision))(*batch)
    assert (patches * on_gpu[0]).sum(-1).min() > bound
    assert (global_descriptor * on_gpu[1]).sum(-1).min() > bound
