"""Toy models and data that every test file shares."""

import gc
import os
import sys

import pytest
import torch
from invented import COMMITTED, FIGURES, invent
from timm.layers import set_fused_attn

from vitlab import files, models

for folder in (
    "notebooks",
    "slides",
):  # where a notebook's kernel and `python slides` find their modules
    sys.path.insert(0, str(files.repository() / folder))
os.environ["VITLAB_HEADLESS"] = "1"
torch.set_num_threads(1)
set_fused_attn(False)  # as `train.fit` computes on CPUs


def pytest_collection_finish():
    gc.freeze()  # each collection would look through all that was imported, for a second


def pytest_unconfigure():
    gc.unfreeze()


def toy(name, **options):
    """A float32 toy in eval mode whose weights are large enough for every unit to matter. 3 classes, 16 px."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=3, image_size=16, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def vit():
    return toy("conv_vit", embed_dim=32, depth=2, num_heads=4)


@pytest.fixture
def swin():  # a grid of 4 x 4 in windows of 2 (shifted in every second block), then 2 x 2
    return toy("conv_swin", embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=2)


OTHERS = {  # toys of 16 px, unless said otherwise; 3 classes
    "distilled": dict(
        name="deit_tiny_distilled_patch16_224", embed_dim=24, depth=2, num_heads=3, patch_size=4
    ),
    "deit3": dict(name="deit3_small_patch16_224", embed_dim=24, depth=2, num_heads=3, patch_size=4),
    "registers": dict(
        name="vit_small_patch14_reg4_dinov2", embed_dim=24, depth=2, num_heads=3, patch_size=4
    ),
    "qk norm": dict(
        name="conv_vit", embed_dim=24, depth=2, num_heads=3, qk_norm=True, init_values=0.5
    ),
    "norms last": dict(
        name="vit_base_patch16_rpn_224", embed_dim=24, depth=2, num_heads=3, patch_size=4
    ),
    "no biases": dict(
        name="conv_vit", embed_dim=24, depth=2, num_heads=3, qkv_bias=False, proj_bias=False
    ),
    "swinv2": dict(
        name="swinv2_tiny_window8_256",
        embed_dim=24,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=2,
        patch_size=4,
    ),
}


@pytest.fixture(params=["vit", "swin", *OTHERS])
def any_model(request):
    return (
        toy(**OTHERS[request.param])
        if request.param in OTHERS
        else request.getfixturevalue(request.param)
    )


@pytest.fixture(params=["vit", "swin"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture(scope="module", params=[*COMMITTED, 0, 1, 2])
def folder(request, tmp_path_factory):
    """Tables of a study: committed ones as they are, and invented ones, whose pictures are small."""
    if isinstance(request.param, str):
        return FIGURES / request.param
    return invent(tmp_path_factory.mktemp("folder"), request.param)


@pytest.fixture(scope="module")
def slides(folder):
    import findings

    return findings.slides(folder)
