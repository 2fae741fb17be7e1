"""Create any ViT or Swin of timm by its name, with given weights or without.

Public: ConvStem, SMALL, create.
"""

import inspect
import json
import re
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import timm
from timm.layers import to_2tuple
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitlab import names
from vitlab.models import _attention, _packed, anatomy


class ConvStem(nn.Module):
    """Turn patch_size x patch_size pixels into one token by three 3x3 convolutions.

    For timm's `embed_layer`.

    img_size: side in pixels, a multiple of patch_size
    patch_size: a multiple of 4
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
        size, patch = self.img_size[0], self.patch_size[0]
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
        x = self.steps(x).permute(0, 2, 3, 1)  # [B, H / patch, W / patch, embed_dim]
        return x if self.channels_last else x.flatten(1, 2)

    def dynamic_feat_size(self, img_size):
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


def create(name, *, num_classes, image_size=None, pretrained=False, weights=None, **options):
    """Create a ViT or Swin by name: any of timm's, or `conv_vit` and `conv_swin` of the studies.

    num_classes: size of the new head
    image_size: side in pixels; None: timm's own for the name. A Swin keeps its windows at another
        size and pads its grids to them. Give window_size=8, say, for 256 px where 7 is for 224; or
        call timm's model.set_input_size((256, 256)) afterwards, which scales windows with the grid.
    pretrained: take timm's weights, downloaded by timm
    weights: a local file (.safetensors, or .pth opened with weights_only) or a checkpoint folder
    options: timm's own arguments of the class (embed_dim, depth, patch_size, window_size,
        drop_path_rate, ...)
    Returns the model in train mode, with `model.recipe` holding what is needed to build it again.
    Raises ValueError for an unknown name, with the nearest known one, and for weights of another
    architecture. So it does for options that the model cannot be built with.
    Raises FileNotFoundError for missing weights.
    """
    if pretrained and (weights or name in SMALL):
        raise ValueError(
            "give either pretrained=True (timm's weights) or weights=... (a local file), not both; "
            f"{' and '.join(SMALL)} have no weights to download"
        )
    if not timm.is_model(name):
        names.check("model", name, [*SMALL, *timm.list_models()])
    sized = {} if image_size is None else {"img_size": image_size}
    try:
        model = _build(name, pretrained, num_classes, options | sized)
    except (TypeError, AssertionError) as error:
        _check_option(str(error))
        # timm's own words do not say which model or value they are about.
        raise ValueError(f"{name} cannot be built with {options}: {error}") from error
    if isinstance(model, SwinTransformerV2):  # timm's reads the weight of qkv past its module
        for module in model.modules():
            _attention.allow_cuts(module)
    model.recipe = {
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "options": options,
    }
    if weights:
        _load_weights(model, Path(weights))
    return model


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
            names.check("option", match[2], [*parameters, "pretrained", "weights", "stem_widths"])


def _load_weights(model, path):
    """Fill model from a local weights file or checkpoint folder, as `create` says."""
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; give a .safetensors or .pth file or a checkpoint folder"
        )
    state = _adapted(model, _stored_weights(path))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitting = {name: t for name, t in state.items() if t.shape == expected.get(name)}
    # Of a model without classes: the names that timm's files give to a head.
    layers = anatomy.classifier_names(model) or ["head", "head.fc", "head_dist"]
    heads = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    missing = sorted(expected.keys() - state.keys() - heads)
    wrong = sorted(state.keys() - fitting.keys() - heads)
    if missing or wrong:
        raise ValueError(
            f"{path} holds another architecture than {type(model).__name__} {model.recipe}: "
            f"{len(missing)} tensors are missing (first {missing[:1]}), "
            f"{len(wrong)} do not fit (first {wrong[:1]})"
        )
    # A head of another size is left out; position tables were resampled by timm.
    if heads - fitting.keys():
        warnings.warn(
            f"{path.name}: the head is left out and starts new with {model.num_classes} classes",
            stacklevel=3,
        )
    model.load_state_dict(fitting, strict=False)


def _stored_weights(path):
    """Return {name: tensor} of a file of weights, with the zeros of packed ones."""
    state = timm.models.load_state_dict(str(path), weights_only=True)
    if not any(name.endswith(_packed.BITS) for name in state):
        return state
    record = path.with_name("model.json")
    if not record.is_file():
        raise FileNotFoundError(
            f"{path} is stored without its zeros and can be read only beside its {record.name}"
        )
    return _packed.unpack(state, json.loads(record.read_text())["packed"])


def _adapted(model, state):
    """Return state, {name: tensor}, with the names and sizes that timm's class of model has."""
    family = anatomy.family_of(model) or VisionTransformer
    options = {}
    if family is VisionTransformer:  # DeiT-III has its own names for its layer scale
        options["adapt_layer_scale"] = True
    return inspect.getmodule(family).checkpoint_filter_fn(state, model, **options)
