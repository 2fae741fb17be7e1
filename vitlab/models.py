"""Create any ViT or Swin of timm, and see it as blocks, heads, neurons and linear layers by role.

Of this package only this module and `attention` know timm's classes.

Public: create, view, View, Block, UNITS, ROLES, FAMILIES, SMALL, ConvStem, nearest, load_weights,
classifier_names, attention_weights, attention_maps, norm_after, is_factor.
"""

import copy
import difflib
import inspect
import json
import re
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

try:
    import timm
except RuntimeError as error:
    # torchvision built against another torch: "operator torchvision::nms does not exist"
    raise ImportError(
        f"torchvision does not fit this torch {torch.__version__} ({error}). Install both from the "
        "same place, with the pair of versions that constraints.txt names."
    ) from error

from timm.layers import Attention, Mlp, to_2tuple
from timm.models import swin_transformer, swin_transformer_v2, vision_transformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer

from vitlab import attention, layers, packed

UNITS = ("heads", "neurons", "qk", "v", "width", "filters", "block")
ROLES = {
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "downsample.reduction": "merge",
}
# {timm's class: (kind of model, pattern of the names of its blocks with their stage as a group)}
FAMILIES = {
    SwinTransformer: ("swin", r"layers\.(\d+)\.blocks\.\d+"),
    SwinTransformerV2: ("swin", r"layers\.(\d+)\.blocks\.\d+"),
    VisionTransformer: ("vit", r"()blocks\.\d+"),
}


class ConvStem(nn.Module):
    """Turn patch_size x patch_size pixels into one token by three 3x3 convolutions.

    For timm's `embed_layer`. Early convolutions make small ViTs train in few epochs (Xiao et al.
    2021, Hassani et al. 2021). Strides are patch_size / 4 by the first convolution and 2 x 2 by max
    pooling. So the parameters do not depend on patch_size: weights move from 32 px with patch 4 to
    64 px with patch 8.

    img_size: side in pixels, a multiple of patch_size
    patch_size: a multiple of 4
    widths: channels after the first and the second convolution
    output_fmt: "NHWC" (Swin) for tokens as a grid
    timm_options: other options that timm gives (bias, norm_layer, strict_img_size,
        dynamic_img_pad); this stem has no use for them
    x: [B, in_chans, H, W] with H and W multiples of patch_size. Returns [B, H*W / patch_size**2,
    embed_dim], or [B, H / patch_size, W / patch_size, embed_dim] with output_fmt "NHWC".
    Raises ValueError for sizes that do not divide so.
    """

    def __init__(
        self,
        img_size=32,
        patch_size=4,
        in_chans=3,
        embed_dim=128,
        *,
        widths=(32, 64),
        output_fmt=None,
        device=None,
        dtype=None,
        **timm_options,
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

    def feat_ratio(self, as_scalar=True):
        return self.patch_size[0] if as_scalar else self.patch_size

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


def nearest(name, allowed):
    """Return ', did you mean X?' for an error, X the nearest of allowed names, or '.' for none."""
    close = difflib.get_close_matches(str(name), map(str, allowed), n=1)
    return f", did you mean {close[0]!r}?" if close else "."


def _check_known(names, allowed, noun):
    """Raise ValueError, with the nearest known name, for the first of names that is not known."""
    for name in names:
        if name not in allowed:
            hint = nearest(name, allowed)
            raise ValueError(f"unknown {noun} {name!r}{hint} Known are {', '.join(allowed)}.")


def _look_up(things, name, noun):
    """Return things[name]. Raises ValueError with the nearest name if there is none."""
    if name not in things:
        raise ValueError(f"no {noun} {name!r} in this model{nearest(name, things)}")
    return things[name]


def create(name, *, num_classes, image_size=None, pretrained=False, weights=None, **options):
    """Create a ViT or Swin by name: any of timm's, or `conv_vit` and `conv_swin` of the studies.

    num_classes: size of the new head
    image_size: side in pixels; None: timm's own for the name
    pretrained: take timm's weights, downloaded by timm
    weights: a local file (.safetensors, or .pth opened with weights_only) or a checkpoint folder. A
        head of another size is left out with a warning, position tables are resampled by timm.
    options: timm's own arguments of the class (embed_dim, depth, patch_size, window_size,
        drop_path_rate, ...)
    Returns the model in train mode, with `model.recipe` holding what is needed to build it again.
    Raises ValueError for an unknown name, for options that the model cannot be built with (unknown
    ones with the nearest known), and for weights of another architecture. Raises FileNotFoundError
    for missing weights.
    """
    if pretrained and weights:
        raise ValueError(
            "give either pretrained=True (timm's weights) or weights=... (a local file), not both"
        )
    if name in SMALL and pretrained:
        raise ValueError(f"{name} has no weights to download; give weights=... or pretrained=False")
    if name not in SMALL and not timm.is_model(name):
        hint = nearest(name, [*SMALL, *timm.list_models()])
        raise ValueError(
            f"unknown model {name!r}{hint} Known are {', '.join(SMALL)} and timm.list_models()."
        )
    sized = {} if image_size is None else {"img_size": image_size}
    try:
        model = _build(name, pretrained, num_classes, options | sized)
    except (TypeError, AssertionError) as error:
        # timm's own words do not say which model or value they are about
        raise ValueError(_what_is_wrong(name, options, str(error))) from error
    if isinstance(model, SwinTransformerV2):  # timm's reads the weight of qkv past its module
        for module in model.modules():
            attention.open_up(module)
    model.recipe = {
        "name": name,
        "num_classes": num_classes,
        "image_size": image_size,
        "options": options,
    }
    if weights:
        load_weights(model, weights)
    return model


def _build(name, pretrained, num_classes, options):
    if name not in SMALL:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    model_class, defaults = SMALL[name]
    options = {"patch_size": 4, "img_size": 32, **defaults, **options}
    widths = options.pop("stem_widths", (32, 64))
    stem = partial(ConvStem, widths=tuple(widths))
    return model_class(num_classes=num_classes, embed_layer=stem, **options)


def _what_is_wrong(name, options, reason):
    """Return words for options that a model cannot be built with, from Python's or timm's words."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", reason)
    classes = {family.__name__: family for family in FAMILIES}
    if not match or match[1] not in classes:
        return f"{name} cannot be built with {options}: {reason}"
    allowed = [*inspect.signature(classes[match[1]]).parameters, "pretrained", "weights"]
    if name in SMALL:
        allowed.append("stem_widths")
    hint = nearest(match[2], allowed)
    return f"unknown option {match[2]!r} of {name}{hint} Options are {', '.join(allowed)}."


def load_weights(model, path):
    """Fill model from a local weights file or checkpoint folder.

    path: as `weights` of `create`, which says what is raised
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; give a .safetensors or .pth file or a checkpoint folder"
        )
    state = _adapted(model, _stored_weights(path))
    expected = model.state_dict()
    fitting = {k: t for k, t in state.items() if k in expected and expected[k].shape == t.shape}
    # Of a model without classes: the names that timm's files give to a head.
    names = classifier_names(model) or ["head", "head.fc", "head_dist"]
    heads = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    missing = [key for key in expected if key not in state and key not in heads]
    wrong = [key for key in state if key not in fitting and key not in heads]
    if missing or wrong:
        recipe = getattr(model, "recipe", "")
        raise ValueError(
            f"{path} holds another architecture than {type(model).__name__} {recipe}: "
            f"{len(missing)} tensors are missing (first {missing[:1]}), "
            f"{len(wrong)} do not fit (first {wrong[:1]})"
        )
    if heads - fitting.keys():
        warnings.warn(
            f"{path.name}: the head is left out and starts new with {model.num_classes} classes",
            stacklevel=3,
        )
    model.load_state_dict(fitting, strict=False)


def _stored_weights(path):
    """Return {name: tensor} of a file of weights, with the zeros of packed ones."""
    state = timm.models.load_state_dict(str(path), weights_only=True)
    if not any(name.endswith(packed.BITS) for name in state):
        return state
    record = path.with_name("model.json")
    if not record.is_file():
        raise FileNotFoundError(
            f"{path} is stored without its zeros and can be read only beside its {record.name}"
        )
    return packed.unpack(state, json.loads(record.read_text())["packed"])


def _adapted(model, state):
    """Return state, {name: tensor}, with the names and sizes that timm's class of model has."""
    family = _family(model) or VisionTransformer
    options = {}
    if family is VisionTransformer:  # DeiT-III has its own names for its layer scale
        options["adapt_layer_scale"] = True
    return inspect.getmodule(family).checkpoint_filter_fn(state, model, **options)


def _family(model):
    """Return the class of FAMILIES that model is of, or None."""
    return next((family for family in FAMILIES if isinstance(model, family)), None)


def classifier_names(model):
    """Return the names of the classifier layers, by timm's get_classifier.

    A distilled DeiT has two.
    """
    heads = model.get_classifier()
    if isinstance(heads, nn.Module):
        heads = [heads]
    heads = [head for head in heads if not isinstance(head, nn.Identity)]
    return [name for name, module in model.named_modules() if module in heads]


@dataclass(frozen=True)
class Block:
    """Describe one transformer block: its attention and MLP, whatever has been cut from them."""

    name: str
    stage: int
    attn: nn.Module
    mlp: nn.Module

    @property
    def num_heads(self):
        return getattr(self.attn, "num_heads", 0)

    @property
    def head_dim(self):
        """Size of a head's values, and of its queries and keys if none of these were cut."""
        return self.attn.proj.in_features // self.num_heads if self.num_heads else 0

    @property
    def qk_dim(self):
        """Size of a head's queries and keys."""
        if not self.num_heads:
            return 0
        return (self.attn.qkv.out_features // self.num_heads - self.head_dim) // 2

    @property
    def normalises_queries(self):
        """Whether a query's dimensions change each other before they meet the keys."""
        if isinstance(self.attn, attention.CutWindowAttentionV2):
            return True
        norm = getattr(self.attn, "q_norm", None)
        return not isinstance(norm, nn.Identity | None)

    @property
    def neurons(self):
        return self.mlp.fc2.in_features if hasattr(self.mlp, "fc2") else 0

    @property
    def writers(self):
        """The layers that give the outputs of attention and MLP."""
        attn, mlp = self.attn, self.mlp  # a Constant gives its own
        return [getattr(attn, "proj", attn), getattr(mlp, "fc2", mlp)]


class View:
    """Show a ViT or Swin, cut or not, as blocks, units and linear layers by role. See `view`.

    The residual stream is the tensor of tokens that the blocks pass on: each block reads it and
    adds something to it. Swin has one in each stage, with patch merging in between.
    """

    def __init__(self, model, kind, blocks):
        self.model = model
        self.kind = kind
        self.blocks = blocks
        self.classifiers = classifier_names(model)

    def layer(self, name):
        """Return the module called name. Raises ValueError with the nearest name for none."""
        return _look_up(dict(self.model.named_modules()), name, "layer")

    def parameter(self, name):
        """Return the parameter called name. Raises ValueError with the nearest name for none."""
        return _look_up(dict(self.model.named_parameters()), name, "parameter")

    def block(self, name):
        """Return the Block called name. Raises ValueError with the nearest name for none."""
        return _look_up({block.name: block for block in self.blocks}, name, "block")

    def block_of(self, name):
        """Return the Block of a module or parameter; None in stem, merging and classifier."""
        return next((block for block in self.blocks if name.startswith(f"{block.name}.")), None)

    def role(self, name):
        """Return the role of a linear layer by its name, or None for another module.

        Roles are qkv, proj, fc1, fc2, merge and head.
        """
        if name in self.classifiers:
            return "head"
        role = next((role for end, role in ROLES.items() if name.endswith(end)), None)
        # Attention pooling has an MLP, too, and lies in no block.
        return role if role == "merge" or self.block_of(name) else None

    def linears(self, roles=None):
        """Return {name: module} of the linear layers, in forward order.

        roles: some of qkv, proj, fc1, fc2, merge and head; None: all but the classifier, which is
            protected unless its role is given
        Raises ValueError for an unknown role, with the nearest one.
        """
        roles = list(ROLES.values() if roles is None else roles)
        _check_known(roles, [*ROLES.values(), "head"], "role")
        return {name: m for name, m in self.model.named_modules() if self.role(name) in roles}

    def units(self, kinds=("heads", "neurons")):
        """Return {(where, kind): how many there are now}, without those of which none are left.

        kinds: some of
            "heads", "neurons"  of a block
            "qk", "v"           dimensions of a block's heads, numbered head * size + dimension
            "width"             channels of a stage's residual stream: ("stages.0", "width"); a ViT
                                has one stage
            "filters"           of a convolution of the stem, factored or not, that feeds another
                                one of the same nn.Sequential
            "block"             the block itself: 1
        Raises ValueError for an unknown kind, with the nearest one.
        """
        _check_known(kinds, UNITS, "kind of unit")
        counts = {}
        for block in self.blocks:
            sizes = {
                "heads": block.num_heads,
                "neurons": block.neurons,
                "qk": block.num_heads * block.qk_dim,
                "v": block.num_heads * block.head_dim,
                "block": 1,
            }
            counts |= {(block.name, kind): sizes[kind] for kind in kinds if kind in sizes}
        if "width" in kinds:
            for stage in self.stages:
                first, _ = self.stream(stage)[0]
                counts[stage, "width"] = len(first.weight)
        if "filters" in kinds:
            for name, conv in self.stem:
                if is_factor(self.model, name):  # its last part says how many filters there are
                    name = name.rpartition(".")[0]
                followers = [module for _, module in _chain_behind(self.model, name)]
                if any(isinstance(module, _CONVOLUTIONS) for module in followers):
                    counts[name, "filters"] = conv.out_channels
        return {key: count for key, count in counts.items() if count}

    @property
    def stages(self):
        """Names of the stages: "stages.0" and so on. In each the residual stream has one width."""
        count = len(self.model.layers) if self.kind == "swin" else 1
        return [f"stages.{number}" for number in range(count)]

    @property
    def stem(self):
        """[(name, convolution)] of the patch embedding, in forward order."""
        modules = self.model.patch_embed.named_modules(prefix="patch_embed")
        return [(name, module) for name, module in modules if isinstance(module, nn.Conv2d)]

    @property
    def _whole_stem(self):
        """{name: convolution} of the patch embedding, without the parts of factored ones."""
        return {name: conv for name, conv in self.stem if not is_factor(self.model, name)}

    @property
    def matrices(self):
        """{name: module} of all that may become low rank.

        These are the stem's convolutions that are not factored, and the linear layers but the
        classifier.
        """
        return self._whole_stem | self.linears()

    @property
    def segments(self):
        """{module name: names of its layers, in forward order} along the residual stream.

        The modules make the stream one after the other: the patch embedding, the blocks, and in
        Swin patch merging between them. "" stands for the whole model and its classifier. Between
        the patch embedding and the first block a model may add to the stream.
        """
        merging = (swin_transformer.PatchMerging, swin_transformer_v2.PatchMerging)
        blocks = {block.name for block in self.blocks}
        segments = {"patch_embed": list(self._whole_stem)}
        for name, module in self.model.named_modules():
            if name in blocks or isinstance(module, merging):
                segments[name] = [layer for layer in self.linears() if layer.startswith(f"{name}.")]
        return segments | {"": self.classifiers}

    def ends_block(self, layer):
        """Return how the last layer of a block writes to the residual stream, by the layer's name.

        Returns (the norm that reads the stream before the layer, the factors [width] by which its
        outputs are scaled or None). Returns None for any other layer, and where a norm comes
        between the layer and the stream.
        """
        block = self.block_of(layer)
        if block is None:
            return None
        _, last = self.writes(block)
        if last is not self.model.get_submodule(layer):
            return None
        inside = self.model.get_submodule(block.name)
        scale = getattr(inside, "ls2", None)
        return inside.norm2, getattr(scale, "gamma", None)

    def writes(self, block):
        """Return the two modules whose outputs a block adds to the residual stream.

        On the way their outputs are scaled by the channel at most.
        """
        inside = self.model.get_submodule(block.name)
        norms_last = isinstance(inside, vision_transformer.ResPostBlock)
        if norms_last or isinstance(self.model, SwinTransformerV2):
            return [inside.norm1, inside.norm2]
        return block.writers

    def stream(self, stage):
        """Return all that is as wide as the residual stream of a stage: [(part, how)].

        The first part has a weight row for each channel. How a part is as wide:
            "rows", "columns"  of a linear layer or convolution
            "channels"         of a norm or a scale
            "merged"           columns or channels of patch merging, which sees four tokens side by
                               side
            "last"             dimension of a parameter
        Raises ValueError for an unknown stage, TypeError for what cannot be made narrower.
        """
        number = _look_up({name: i for i, name in enumerate(self.stages)}, stage, "stage")
        if number == 0:
            last = self.stem[-1][1]
            parts = _stem_end(self.model, last)
        else:
            parts = _merging(self.model.layers[number].downsample, "rows")
        for block in self.blocks:
            if block.stage == number:
                parts += _block_stream(block, self.model.get_submodule(block.name))
        if number + 1 < len(self.stages):
            return parts + _merging(self.model.layers[number + 1].downsample, "merged")
        return parts + _ending(self.model, self.classifiers)


@torch.no_grad()
def attention_weights(model, x):
    """Return {block name: attention weights} of images x in evaluation mode; rows sum to 1.

    Works on cut models; blocks without heads are left out. The model stays as it is.

    x: [B, 3, H, W]
    Returns tensors [B, heads, tokens, tokens], from and to; of Swin [B * windows, heads, tokens of
    a window, tokens of a window].
    """
    model = copy.deepcopy(model).eval()  # to be changed below
    weights = {}
    for block in view(model).blocks:
        if block.num_heads:
            block.attn.fused_attn = False  # the fused kernel keeps the weights to itself
            block.attn.attn_drop.register_forward_hook(partial(_keep_output, weights, block.name))
    model(x)
    return weights


def _keep_output(outputs, name, module, inputs, output):
    outputs[name] = output


def attention_maps(model, x):
    """Return {block name: [B, height, width]}, the attention that tokens of images x receive.

    It is the mean over heads, where 1 is what each token would get of equal shares. From where the
    attention comes:
        a ViT that reads its class token: from that token, not from the one for distillation
        other ViTs: from all tokens, in the mean
        Swin: from the tokens of the same window, with those that pad it, in the mean. Windows are
            put back where they were in the image.
    """
    kind, maps = view(model).kind, {}
    for name, weights in attention_weights(model, x).items():
        shares = weights.float().mean(1) * weights.shape[-1]  # [.., from, to]
        if kind == "vit":
            by_token = getattr(model, "global_pool", "") == "token" and model.cls_token is not None
            received = shares[:, 0] if by_token else shares.mean(1)
            patches = received[:, getattr(model, "num_prefix_tokens", 0) :]
            maps[name] = patches.unflatten(1, model.patch_embed.grid_size)
        else:  # Swin's windows lie in the first dimension
            block = model.get_submodule(name)
            maps[name] = _windows_in_place(shares.mean(1), block)
    return maps


def _windows_in_place(received, block):
    """Return values [B * windows, tokens of a window] of a Swin block as images [B, H, W]."""
    height, width = block.input_resolution
    rows, columns = block.window_size
    padded = height + -height % rows, width + -width % columns
    windows = received.view(-1, rows, columns, 1)
    image = swin_transformer.window_reverse(windows, block.window_size, *padded)[..., 0]
    return image[:, :height, :width].roll(tuple(block.shift_size), (1, 2))


_CONVOLUTIONS = (nn.Conv2d, layers.FactoredConv2d)


def _chain_behind(model, layer):
    """Return [(name, module)] behind a convolution in its nn.Sequential; [] for another layer."""
    parent, _, number = layer.rpartition(".")
    modules = dict(model.named_modules())
    chain = modules.get(parent)
    if not isinstance(modules.get(layer), _CONVOLUTIONS) or not isinstance(chain, nn.Sequential):
        return []
    children = list(chain.named_children())[int(number) + 1 :]
    return [(f"{parent}.{name}", module) for name, module in children]


def norm_after(model, layer):
    """Return the name of the batch norm that a convolution feeds (after pooling or not), or None.

    layer: name of a convolution; one outside an nn.Sequential has no such norm
    """
    for name, module in _chain_behind(model, layer):
        if isinstance(module, nn.BatchNorm2d):
            return name
        if not isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.Identity)):
            return None
    return None


def is_factor(model, layer):
    """Return whether a convolution, by its name, is one of the two parts of a factored one."""
    parent = model.get_submodule(layer.rpartition(".")[0])
    return isinstance(parent, layers.FactoredConv2d)


def _parts(owner, *names):
    """Return the attributes of owner with these names that are there."""
    parts = [getattr(owner, name, None) for name in names]
    return [part for part in parts if part is not None]


def _channels(modules):
    """Return (module, "channels") of each of these modules that has parameters."""
    return [(module, "channels") for module in modules if list(module.parameters())]


def _stem_end(model, last):
    """Return what is as wide as the first stage before the blocks, the last convolution first."""
    inside = list(model.patch_embed.modules())
    behind = inside[inside.index(last) + 1 :]
    parts = [(last, "rows"), *_channels(behind)]
    tokens = _parts(model, "cls_token", "reg_token", "dist_token", "pos_embed")
    parts += [(token, "last") for token in tokens]
    return parts + _channels(_parts(model, "norm_pre"))


def _merging(merging, side):
    """Return patch merging where it writes ("rows") or reads ("merged") a stage's stream."""
    # Swin's norm is on what merging reads, SwinV2's on what it writes.
    norm_side = "rows" if isinstance(merging, swin_transformer_v2.PatchMerging) else "merged"
    parts = [(merging.reduction, side)]
    if side == norm_side:
        parts.append((merging.norm, "channels" if side == "rows" else "merged"))
    return parts


def _block_stream(block, inside):
    """Return what of a block, with its module inside, is as wide as the residual stream."""
    if getattr(block.attn, "gate", None) is not None:
        raise TypeError("attention with a gate cannot be made narrower")
    readers = _parts(block.attn, "qkv") + _parts(block.mlp, "fc1")
    parts = [(reader, "columns") for reader in readers]
    parts += [(writer, "rows") for writer in block.writers]
    return parts + _channels(_parts(inside, "norm1", "norm2", "ls1", "ls2"))


def _ending(model, classifiers):
    """Return what is as wide as the last stage behind the blocks."""
    if getattr(model, "attn_pool", None) is not None:
        raise TypeError("a model that pools by attention cannot be made narrower")
    parts = _channels(_parts(model, "norm", "fc_norm"))
    return parts + [(model.get_submodule(name), "columns") for name in classifiers]


def view(model):
    """Return the View of a timm ViT/DeiT, Swin or SwinV2.

    Raises TypeError for a model that vitlab cannot see into.
    """
    blocks = []
    if family := _family(model):
        kind, pattern = FAMILIES[family]
        for name, module in model.named_modules():
            match = re.fullmatch(pattern, name)
            if match and not isinstance(module, layers.Skip):
                parts = [getattr(module, part, None) for part in ("attn", "mlp")]
                blocks.append(Block(name, int(match[1] or 0), *parts))
    if not blocks or not all(map(_is_plain, blocks)):
        raise TypeError(
            f"cannot see into {type(model).__name__}: supported are timm's VisionTransformer "
            "family (ViT, DeiT), SwinTransformer and (made by models.create) SwinTransformerV2, "
            "with fused qkv and a two-layer MLP; not EVA, SwiGLU, MaxViT or ConvNets"
        )
    return View(model, kind, blocks)


def _is_plain(block):
    """Return whether attention and MLP of a block are of classes that vitlab can cut."""
    attentions = (
        Attention,
        swin_transformer.WindowAttention,
        attention.CutWindowAttentionV2,
        layers.Constant,
    )
    return isinstance(block.attn, attentions) and isinstance(block.mlp, (Mlp, layers.Constant))
