"""Create any ViT or Swin of timm by its name; `models.create` adds the weights of local files.

Public: ConvStem, SMALL, create, moments.
"""

import inspect
import re
from functools import partial
from itertools import pairwise

import timm
from timm.layers import to_2tuple
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitlab import names
from vitlab.models import _attention, anatomy


class ConvStem(nn.Module):
    """Turn patch_size x patch_size pixels into one token by three 3x3 convolutions.

    For timm's `embed_layer`.

    img_size: side in pixels, a multiple of patch_size
    patch_size: a multiple of 4
    in_chans: channels of an image
    embed_dim: channels of a token
    widths: channels after the first and the second convolution
    output_fmt: "NHWC" (Swin) for tokens as a grid
    x: [B, in_chans, H, W] with H and W multiples of patch_size. Returns [B, H*W / patch_size**2,
    embed_dim], or [B, H / patch_size, W / patch_size, embed_dim] with output_fmt "NHWC".
    Raises ValueError for sizes that do not divide so.
    """

    def __init__(
        self,
        img_size,
        patch_size,
        in_chans,
        embed_dim,
        *,
        widths=(32, 64),
        output_fmt=None,
        device=None,
        dtype=None,
        **timm_options,  # bias, norm_layer, strict_img_size, dynamic_img_pad: no use for them here
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = to_2tuple(patch_size)
        size = self.img_size[0]
        patch = self.patch_size[0]
        if patch % 4 or size % patch:
            raise ValueError(
                f"patch_size must be a multiple of 4 that divides img_size; got {patch} and {size}"
            )
        self.grid_size = to_2tuple(size // patch)
        self.num_patches = self.grid_size[0] ** 2
        self.channels_last = output_fmt == "NHWC"
        like = {"device": device, "dtype": dtype}
        # Early convolutions make small ViTs train in few epochs (Xiao et al. 2021, Hassani et al.
        # 2021). Strides are patch_size / 4 by the first convolution and 2 x 2 by max pooling. So
        # the parameters do not depend on patch_size: weights move from 32 px with patch 4 to 64 px
        # with patch 8.
        steps = []
        for number, (ins, outs) in enumerate(pairwise((in_chans, *widths, embed_dim))):
            stride = patch // 4 if number == 0 else 1
            steps.append(nn.Conv2d(ins, outs, 3, stride, 1, bias=False, **like))
            if number < 2:
                steps.append(nn.MaxPool2d(2))
            steps += [nn.BatchNorm2d(outs, **like), nn.ReLU()]
        self.steps = nn.Sequential(*steps)

    def forward(self, x):
        """Return the tokens of images x, as the class says."""
        x = self.steps(x).permute(0, 2, 3, 1)  # [B, H / patch, W / patch, embed_dim]
        return x if self.channels_last else x.flatten(1, 2)

    def dynamic_feat_size(self, img_size):
        """Return the rows and columns of tokens of an image; timm calls it.

        img_size: (height, width) in pixels
        """
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]


# Small models for 32 to 96 px, built from timm's own classes; any default can be overridden.
SMALL = {
    "conv_vit": (
        VisionTransformer,
        {
            "embed_dim": 128,
            "depth": 6,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "class_token": False,
            "global_pool": "avg",
        },
    ),
    "conv_swin": (
        SwinTransformer,
        {
            "embed_dim": 96,
            "depths": (2, 4),
            "num_heads": (3, 6),
            "window_size": 4,
            "mlp_ratio": 2.0,
            "drop_path_rate": 0.0,
        },
    ),
}


# {torchvision's name: timm's name of a model that takes its weights}
_OF_TORCHVISION = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}

# What timm and torch raise for options that no model has.
_NOT_BUILT = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError)


def create(name, *, num_classes, image_size=None, pretrained=False, **options):
    """Create a model as `models.create` does without a local file of weights.

    Arguments, result and errors are those of `models.create`.
    """
    if pretrained and name in SMALL:
        raise ValueError(f"pretrained=True: {' and '.join(SMALL)} have no weights to download")
    if not timm.is_model(name):
        if near := _OF_TORCHVISION.get(name):
            raise ValueError(
                f"unknown model {name!r}, did you mean {near!r}? It takes its weights."
            )
        names.check("model", name, [*SMALL, *timm.list_models()])
    sized = {} if image_size is None else {"img_size": image_size}
    built_with = options | sized
    eps = built_with.pop("norm_eps", None)  # no option of timm's
    try:
        model = _build(name, pretrained, num_classes, built_with)
    except _NOT_BUILT as error:
        _check_option(str(error))
        # timm's own words do not say which model or value they are about.
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be built with {options}: {reason}") from error
    except OSError as error:  # whatever a download raises, at the end of a long way
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"timm's weights of {name} are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {reason}); try again with a network, or give weights= the "
            "path of a file that holds them, instead of pretrained=True"
        ) from None
    if not anatomy.family_of(model):
        known = ", ".join(family.__name__ for family in anatomy.FAMILIES)
        raise ValueError(
            f"{name} is no ViT or Swin: it is timm's {type(model).__name__}, and known are {known}"
        )
    if isinstance(model, SwinTransformerV2):  # timm's reads the weight of qkv past its module
        for module in model.modules():
            _attention.allow_cuts(module)
    for module in model.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps
    model.recipe = {
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "options": options,
    }
    return model


def moments(name):
    """Return the (mean, std) of the images that timm's weights expect, three numbers each.

    name: str, of a model
    Returns None for a model that timm does not know, as the small ones.
    Source: timm's pretrained_cfg.
    """
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return config and (tuple(config.mean), tuple(config.std))


def _build(name, pretrained, num_classes, options):
    if name not in SMALL:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    model_class, defaults = SMALL[name]
    options = {"patch_size": 4, "img_size": 32, **defaults, **options}
    widths = options.pop("stem_widths", (32, 64))
    stem = partial(ConvStem, widths=tuple(widths))
    return model_class(num_classes=num_classes, embed_layer=stem, **options)


def _check_option(reason):
    """Raise ValueError for an option that timm's class does not know, by the words of Python."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", reason)
    for family in anatomy.FAMILIES:
        if match and match[1] == family.__name__:
            parameters = inspect.signature(family).parameters
            known = [*parameters, "pretrained", "weights", "normalise", "new_head"]
            known += ["stem_widths", "norm_eps"]
            names.check("option", match[2], known)
