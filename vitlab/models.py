"""Models: create any ViT or Swin of timm, and see it as blocks, heads, neurons and linear layers by role.

With `attention` the only module that knows timm's classes.
"""

import difflib
import fnmatch
import inspect
import json
import re
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

try:
    import timm
except RuntimeError as error:  # torchvision built against another torch: "operator torchvision::nms does not exist"
    raise ImportError(
        f"torchvision does not fit this torch {torch.__version__} ({error}). Install both from the same place, "
        "with the pair of versions that constraints.txt names."
    ) from error

from timm.layers import Attention, Mlp
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


class ConvStem(nn.Module):
    """Three 3x3 convolutions that turn patch_size x patch_size pixels into one token (for timm's `embed_layer`).

    Early convolutions make small ViTs train in few epochs (Xiao et al. 2021, Hassani et al. 2021). Strides are
    patch_size / 4 by the first convolution and 2 x 2 by max pooling, so that the parameters do not depend on
    patch_size: weights move from 32 px with patch 4 to 64 px with patch 8.

    x: [B, in_chans, H, W] with H and W multiples of patch_size. Returns [B, H*W / patch_size**2, embed_dim], or
    [B, H / patch_size, W / patch_size, embed_dim] with output_fmt "NHWC" (Swin).
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
        **timm_options,  # bias, norm_layer, strict_img_size, dynamic_img_pad: nothing to choose in this stem
    ):
        super().__init__()
        size, patch = (v[0] if isinstance(v, (tuple, list)) else v for v in (img_size, patch_size))
        if patch % 4 or size % patch:
            raise ValueError(f"patch_size must be a multiple of 4 that divides img_size; got {patch} and {size}")
        self.img_size, self.patch_size = (size, size), (patch, patch)
        self.grid_size = (size // patch, size // patch)
        self.num_patches = self.grid_size[0] ** 2
        self.channels_last = output_fmt == "NHWC"
        channels = (in_chans, *widths, embed_dim)
        steps = []
        for i, (a, b) in enumerate(zip(channels, channels[1:], strict=False)):
            stride = patch // 4 if i == 0 else 1
            steps.append(nn.Conv2d(a, b, 3, stride, 1, bias=False, device=device, dtype=dtype))
            if i < 2:
                steps.append(nn.MaxPool2d(2))
            steps += [nn.BatchNorm2d(b, device=device, dtype=dtype), nn.ReLU()]
        self.steps = nn.Sequential(*steps)

    def forward(self, x):
        x = self.steps(x).permute(0, 2, 3, 1)  # [B, H / patch, W / patch, embed_dim]
        return x if self.channels_last else x.flatten(1, 2)

    def feat_ratio(self, as_scalar=True):
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size):
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]


# Small models for 32 to 96 px, built from timm's own classes; every default can be overridden by keyword.
SMALL = {
    "conv_vit": (
        VisionTransformer,
        dict(embed_dim=128, depth=6, num_heads=4, mlp_ratio=2.0, class_token=False, global_pool="avg"),
    ),
    "conv_swin": (
        SwinTransformer,
        dict(embed_dim=96, depths=(2, 4), num_heads=(3, 6), window_size=4, mlp_ratio=2.0, drop_path_rate=0.0),
    ),
}


def nearest(name, known):
    """Words for an error: ', did you mean X?' with the nearest of known, or '.' if none is near."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f", did you mean {close[0]!r}?" if close else "."


def create(name, *, num_classes, image_size=None, pretrained=False, weights=None, **options):
    """A ViT or Swin by name: any of timm's, or the small `conv_vit` and `conv_swin` of the study files.

    num_classes: size of the new head. image_size: side in pixels (None: timm's own for the name). pretrained:
    timm's weights, downloaded by timm. weights: a local file (.safetensors, or .pth opened with weights_only) or
    a checkpoint folder; a head of another size is left out with a warning, position tables are resampled by timm.
    options: timm's own arguments of the class (embed_dim, depth, patch_size, window_size, drop_path_rate, ...).
    Returns the model in train mode, with `model.recipe` holding what is needed to build it again.
    Raises ValueError for an unknown name, options that the model cannot be built with (unknown ones with the nearest
    known) or weights of another architecture, FileNotFoundError for missing weights.
    """
    if pretrained and weights:
        raise ValueError("give either pretrained=True (timm's weights) or weights=... (a local file), not both")
    if name in SMALL and pretrained:
        raise ValueError(f"{name} has no weights to download; give weights=... or pretrained=False")
    if name not in SMALL and not timm.is_model(name):
        known = [*SMALL, *timm.list_models()]
        raise ValueError(
            f"unknown model {name!r}{nearest(name, known)} Known are {', '.join(SMALL)} and timm.list_models()."
        )
    sized = {} if image_size is None else {"img_size": image_size}
    try:
        model = _build(name, pretrained, num_classes, options | sized)
    except (TypeError, AssertionError) as error:  # timm's own words do not say which model or value they are about
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
    built, defaults = SMALL[name]
    chosen = {"patch_size": 4, "img_size": 32, **defaults, **options}
    stem = partial(ConvStem, widths=tuple(chosen.pop("stem_widths", (32, 64))))
    return built(num_classes=num_classes, embed_layer=stem, **chosen)


def _what_is_wrong(name, options, reason):
    """Words for options that a model cannot be built with, from what Python or timm gives as the reason."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", reason)
    kinds = {kind.__name__: kind for kind in (VisionTransformer, SwinTransformer, SwinTransformerV2)}
    if not found or found[1] not in kinds:
        return f"{name} cannot be built with {options}: {reason}"
    known = [*inspect.signature(kinds[found[1]]).parameters, "pretrained", "weights"]
    known += ["stem_widths"] if name in SMALL else []
    return f"unknown option {found[2]!r} of {name}{nearest(found[2], known)} Options are {', '.join(known)}."


def load_weights(model, path):
    """Fill model from a local weights file or checkpoint folder. See `create` for what is allowed and raised."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give a .safetensors or .pth file or a checkpoint folder")
    state = timm.models.load_state_dict(str(path), weights_only=True)
    if any(name.endswith(packed.BITS) for name in state):  # a checkpoint that is stored without its zeros
        record = path.with_name("model.json")
        if not record.is_file():
            raise FileNotFoundError(f"{path} is stored without its zeros and can be read only beside its {record.name}")
        state = packed.unpack(state, json.loads(record.read_text())["packed"])
    families = {SwinTransformer: swin_transformer, SwinTransformerV2: swin_transformer_v2}
    adapt = next((own for kind, own in families.items() if isinstance(model, kind)), vision_transformer)
    scales = {"adapt_layer_scale": True} if adapt is vision_transformer else {}  # DeiT-III's own names for it
    state = adapt.checkpoint_filter_fn(state, model, **scales)
    own = model.state_dict()
    named = classifier_names(model) or ["head", "head.fc", "head_dist"]  # of a model without classes the file's
    heads = {key for name in named for key in (f"{name}.weight", f"{name}.bias")}
    resized = [k for k in heads if k in state and k in own and state[k].shape != own[k].shape]
    missing = [k for k in own if k not in state and k not in heads]
    wrong = [k for k in state if k not in heads and (k not in own or own[k].shape != state[k].shape)]
    if missing or wrong:
        raise ValueError(
            f"{path} holds another architecture than {type(model).__name__} {getattr(model, 'recipe', '')}: "
            f"{len(missing)} tensors are missing (first {missing[:1]}), {len(wrong)} do not fit (first {wrong[:1]})"
        )
    if resized or not heads <= set(state):
        classes = next((own[key].shape[0] for key in heads if key in own), 0)
        warnings.warn(f"{path.name}: the head is left out and starts new with {classes} classes", stacklevel=3)
    model.load_state_dict({k: v for k, v in state.items() if k in own and k not in resized}, strict=False)


def classifier_names(model):
    """Names of the classifier layers, by timm's own get_classifier (two for distilled DeiT)."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    heads = [head for head in heads if not isinstance(head, nn.Identity)]
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


@dataclass(frozen=True)
class Block:
    """One transformer block: its attention and MLP, whatever has been cut from them."""

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
        return (self.attn.qkv.out_features // self.num_heads - self.head_dim) // 2 if self.num_heads else 0

    @property
    def normalises_queries(self):
        """Whether a query's dimensions change each other before they meet the keys."""
        normed = not isinstance(getattr(self.attn, "q_norm", None), nn.Identity | None)
        return normed or isinstance(self.attn, attention.CutWindowAttentionV2)

    @property
    def neurons(self):
        return self.mlp.fc2.in_features if hasattr(self.mlp, "fc2") else 0


class View:
    """A ViT or Swin as blocks, units and linear layers by role; works on models already cut. See `view`."""

    def __init__(self, model, kind, blocks):
        self.model, self.kind, self.blocks = model, kind, blocks
        self.classifiers = classifier_names(model)

    def role(self, name):
        """Role of a linear layer by name: qkv, proj, fc1, fc2, merge, head; None if it is no linear layer."""
        if name in self.classifiers:
            return "head"
        role = next((role for end, role in ROLES.items() if name.endswith(end)), None)
        return role if role == "merge" or self.block_of(name) else None  # attention pooling has an MLP, too

    def linears(self, roles=None):
        """{name: module} of the linear layers in forward order. roles: a subset of qkv, proj, fc1, fc2, merge and
        head; None means all but the classifier, which is protected unless asked for by its role."""
        known = [*ROLES.values(), "head"]
        for role in roles or ():
            if role not in known:
                raise ValueError(f"unknown role {role!r}{nearest(role, known)} Roles are {', '.join(known)}.")
        wanted = set(ROLES.values()) if roles is None else set(roles)
        return {name: m for name, m in self.model.named_modules() if self.role(name) in wanted}

    def select(self, roles=None, *, match="*", skip_ends=False):
        """{name: module} of the linear layers of these roles whose names match, in forward order.

        roles: as for `linears`; None protects the classifier, whatever match is. match: a shell pattern for the
        whole name, such as "*attn*", or several, of which one must fit. skip_ends: without the layers of the first
        and the last block. Raises ValueError for an unknown role and for a pattern, or all of it, that chooses nothing.
        """
        known, chosen = self.linears(roles), set()
        for pattern in [match] if isinstance(match, str) else match:
            found = fnmatch.filter(known, pattern)
            if not found:
                sort = ", ".join(roles) if roles else "any role but head"
                raise ValueError(f"no layer of {sort} matches {pattern!r}{nearest(pattern, known)}")
            chosen.update(found)
        if skip_ends:
            ends = tuple(f"{block.name}." for block in (self.blocks[0], self.blocks[-1]))
            chosen = {name for name in chosen if not name.startswith(ends)}
        if not chosen:
            raise ValueError(f"match={match!r} and skip_ends={skip_ends} leave no layer of {len(self.blocks)} blocks")
        return {name: module for name, module in known.items() if name in chosen}

    def block_of(self, name):
        """The Block that a module or parameter name lies in, or None (stem, merging, classifier)."""
        return next((b for b in self.blocks if name.startswith(b.name + ".")), None)

    def block(self, name):
        """The Block called name. Raises ValueError with the nearest name if there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        names = [b.name for b in self.blocks]
        raise ValueError(f"no block {name!r}{nearest(name, names)} Blocks are {', '.join(names)}.")

    def units(self, kinds=("heads", "neurons")):
        """{(where, kind): how many there are now}, without those of which none are left. Kinds:

        "heads", "neurons"  of a block
        "qk", "v"           dimensions of a block's heads, numbered head * size + dimension
        "width"             channels of a stage's residual stream: ("stages.0", "width"), of a ViT its only one
        "filters"           of a convolution of the stem, factored or not, that feeds another one of the same
                            nn.Sequential
        "block"             the block itself: 1
        """
        for kind in kinds:
            if kind not in UNITS:
                raise ValueError(f"unknown kind of unit {kind!r}{nearest(kind, UNITS)} Kinds are {', '.join(UNITS)}.")
        counts = {}
        for b in self.blocks:
            heads = b.num_heads
            own = {"heads": heads, "neurons": b.neurons, "qk": heads * b.qk_dim, "v": heads * b.head_dim, "block": 1}
            counts |= {(b.name, kind): own[kind] for kind in kinds if kind in own}
        if "width" in kinds:
            counts |= {(stage, "width"): len(self.stream(stage)[0][0].weight) for stage in self.stages}
        if "filters" in kinds:
            for name, conv in self.stem:
                whole = name.rpartition(".")[0] if is_factor(self.model, name) else name
                if _is_chained(self.model, whole):
                    counts[whole, "filters"] = conv.out_channels  # of a factored one what its last part gives
        return {key: count for key, count in counts.items() if count}

    @property
    def stages(self):
        """Names of the stages of the residual stream, which has one width in each: "stages.0" and so on."""
        return [f"stages.{i}" for i in range(len(self.model.layers) if self.kind == "swin" else 1)]

    @property
    def stem(self):
        """[(name, convolution)] of the patch embedding, in forward order."""
        modules = self.model.patch_embed.named_modules(prefix="patch_embed")
        return [(name, module) for name, module in modules if isinstance(module, nn.Conv2d)]

    @property
    def matrices(self):
        """{name: module} of all that may become low rank: the stem's convolutions that are not, and the linear layers
        but the classifier."""
        return {n: m for n, m in self.stem if not is_factor(self.model, n)} | self.linears()

    @property
    def segments(self):
        """{module name: its layers, in forward order}, of the modules that one after the other make the residual
        stream: the patch embedding, the blocks, and in Swin merging between them; "" stands for the whole model and
        its classifier. Between the patch embedding and the first block a model may add to the stream."""
        found = {"patch_embed": [name for name, module in self.stem if not is_factor(self.model, name)]}
        merging = (swin_transformer.PatchMerging, swin_transformer_v2.PatchMerging)
        blocks = {block.name for block in self.blocks}
        for name, module in self.model.named_modules():
            if name in blocks or isinstance(module, merging):
                found[name] = [layer for layer in self.linears() if layer.startswith(f"{name}.")]
        return found | {"": self.classifiers}

    def ends_block(self, layer):
        """(the norm that sees the residual stream before it, factors [width] of its outputs or None) of a layer that
        writes the last of a block to the stream; None for any other, and where a norm comes between."""
        block = self.block_of(layer)
        if block is None or self.writes(block)[1] is not self.model.get_submodule(layer):
            return None
        inside = self.model.get_submodule(block.name)
        return inside.norm2, getattr(getattr(inside, "ls2", None), "gamma", None)

    def writes(self, block):
        """Modules whose outputs, scaled by the channel at most, a block adds to the residual stream."""
        inside = self.model.get_submodule(block.name)
        if isinstance(self.model, SwinTransformerV2) or isinstance(inside, vision_transformer.ResPostBlock):
            return [inside.norm1, inside.norm2]
        return [getattr(block.attn, "proj", block.attn), getattr(block.mlp, "fc2", block.mlp)]

    def stream(self, stage):
        """[(module or parameter, how it is as wide as the stage's residual stream)]; the first one has a weight row
        for each channel. How: "rows" or "columns" of a linear layer or convolution, "channels" of a norm or a scale,
        "merged" for columns and channels of patch merging, which sees four tokens side by side, "last" dimension of
        a parameter. Raises ValueError for an unknown stage, TypeError for what cannot be made narrower."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r}{nearest(stage, self.stages)} Stages are {', '.join(self.stages)}.")
        number = self.stages.index(stage)
        found = _stem_end(self.model) if number == 0 else _merging(self.model.layers[number].downsample, "rows")
        for block in self.blocks:
            if block.stage == number:
                found += _block_stream(self.model.get_submodule(block.name))
        if number + 1 < len(self.stages):
            return found + _merging(self.model.layers[number + 1].downsample, "merged")
        return found + _ending(self.model, self.classifiers)


@torch.no_grad()
def attention_weights(model, x):
    """{block name: attention [B, heads, tokens, tokens]} of images x in evaluation mode, from and to; rows sum to 1.

    Of Swin [B * windows, heads, tokens of a window, tokens of a window]. Works on cut models; blocks without heads are
    left out. The model is left in the mode that it was in.
    """
    blocks = [block for block in view(model).blocks if block.num_heads]
    training, fused = model.training, [block.attn.fused_attn for block in blocks]
    found = {}
    try:
        with ExitStack() as hooks:
            for block in blocks:
                block.attn.fused_attn = False  # the kernel keeps them to itself
                keep = partial(lambda name, module, inputs, weights: found.update({name: weights}), block.name)
                hooks.enter_context(block.attn.attn_drop.register_forward_hook(keep))
            model.eval()(x)
    finally:
        model.train(training)
        for block, was in zip(blocks, fused, strict=True):
            block.attn.fused_attn = was
    return found


def attention_maps(model, x):
    """{block name: [B, height, width]}: the attention that tokens of images x receive, in the mean over heads, where 1
    is what each would get of equal shares.

    Of a ViT that reads its class token: from that token (not from the one for distillation). Of others: from all tokens
    in the mean. Of Swin: from those of the same window, with the tokens that pad it, windows put back where they were
    in the image.
    """
    seen, maps = view(model), {}
    for name, weights in attention_weights(model, x).items():
        shares = weights.float().mean(1) * weights.shape[-1]  # [.., from, to]
        if seen.kind == "vit":
            prefix = getattr(model, "num_prefix_tokens", 0)
            by_token = getattr(model, "global_pool", "") == "token" and model.cls_token is not None
            shares = shares[:, 0] if by_token else shares.mean(1)
            maps[name] = shares[:, prefix:].unflatten(1, model.patch_embed.grid_size)
            continue
        block = model.get_submodule(name)
        (height, width), (h, w) = block.input_resolution, block.window_size
        down, across = -(-height // h), -(-width // w)
        folded = shares.mean(1).view(len(x), down, across, h, w).transpose(2, 3).reshape(len(x), down * h, across * w)
        maps[name] = folded[:, :height, :width].roll(tuple(block.shift_size), (1, 2))
    return maps


def norm_after(model, layer):
    """Name of the batch norm that a convolution of an nn.Sequential feeds (after pooling or not), or None."""
    modules = dict(model.named_modules())
    parent, _, own = layer.rpartition(".")
    if not isinstance(modules.get(layer), nn.Conv2d | layers.FactoredConv2d) or not isinstance(
        modules[parent], nn.Sequential
    ):
        return None
    for name, module in list(modules[parent].named_children())[int(own) + 1 :]:
        if isinstance(module, nn.BatchNorm2d):
            return f"{parent}.{name}"
        if not isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.Identity)):
            return None
    return None


def is_factor(model, layer):
    """Whether a convolution is one of the two parts of a factored one."""
    return isinstance(model.get_submodule(layer.rpartition(".")[0]), layers.FactoredConv2d)


def _is_chained(model, layer):
    """Whether a convolution's outputs go to another one through a plain chain of modules."""
    parent, _, own = layer.rpartition(".")
    chain = model.get_submodule(parent)
    convolutions = nn.Conv2d | layers.FactoredConv2d
    return isinstance(chain, nn.Sequential) and any(isinstance(m, convolutions) for m in list(chain)[int(own) + 1 :])


def _stem_end(model):
    """What is as wide as the first stage in front of the blocks, the last convolution first."""
    inside = list(model.patch_embed.modules())
    last = max(i for i, module in enumerate(inside) if isinstance(module, nn.Conv2d))
    found = [(inside[last], "rows")]
    found += [(m, "channels") for m in inside[last + 1 :] if getattr(m, "weight", None) is not None]
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        if getattr(model, name, None) is not None:
            found.append((getattr(model, name), "last"))
    return found + [(m, "channels") for m in [getattr(model, "norm_pre", None)] if hasattr(m, "weight")]


def _merging(merging, side):
    """Patch merging where it writes ("rows") or reads ("merged") a stage's stream. Swin's norm is on what it reads,
    SwinV2's on what it writes."""
    writes = isinstance(merging, swin_transformer_v2.PatchMerging)
    norm = [(merging.norm, "channels" if writes else "merged")] if writes == (side == "rows") else []
    return [(merging.reduction, side), *norm]


def _block_stream(block):
    readers = [(m, "columns") for m in (getattr(block.attn, "qkv", None), getattr(block.mlp, "fc1", None)) if m]
    writers = [(getattr(block.attn, "proj", block.attn), "rows"), (getattr(block.mlp, "fc2", block.mlp), "rows")]
    scales = [getattr(block, name, None) for name in ("norm1", "norm2", "ls1", "ls2")]
    if getattr(block.attn, "gate", None) is not None:
        raise TypeError("attention with a gate cannot be made narrower")
    return [*readers, *writers, *((m, "channels") for m in scales if m is not None and list(m.parameters()))]


def _ending(model, classifiers):
    if getattr(model, "attn_pool", None) is not None:
        raise TypeError("a model that pools by attention cannot be made narrower")
    norms = [getattr(model, name, None) for name in ("norm", "fc_norm")]
    found = [(norm, "channels") for norm in norms if norm is not None and list(norm.parameters())]
    return found + [(model.get_submodule(name), "columns") for name in classifiers]


def view(model):
    """View of a timm ViT/DeiT, Swin or SwinV2. Raises TypeError for a model that vitlab cannot see into."""
    kind, found = None, []
    if isinstance(model, (SwinTransformer, SwinTransformerV2)):
        kind = "swin"
        found = [(f"layers.{s}.blocks.{i}", s, b) for s, st in enumerate(model.layers) for i, b in enumerate(st.blocks)]
    elif isinstance(model, VisionTransformer):
        kind, found = "vit", [(f"blocks.{i}", 0, b) for i, b in enumerate(model.blocks)]
    found = [each for each in found if not isinstance(each[2], layers.Skip)]
    known = (Attention, swin_transformer.WindowAttention, attention.CutWindowAttentionV2, layers.Constant)
    plain = [
        isinstance(getattr(b, "attn", None), known) and isinstance(getattr(b, "mlp", None), (Mlp, layers.Constant))
        for _, _, b in found
    ]
    if not found or not all(plain):
        raise TypeError(
            f"cannot see into {type(model).__name__}: supported are timm's VisionTransformer family (ViT, DeiT), "
            "SwinTransformer and (made by models.create) SwinTransformerV2, with fused qkv and a two-layer MLP; not "
            "EVA, SwiGLU, MaxViT or ConvNets"
        )
    return View(model, kind, [Block(name, stage, b.attn, b.mlp) for name, stage, b in found])
